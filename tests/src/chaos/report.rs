//! What was done, and how long commands took meanwhile.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cli::load::meter::Slow;

use super::plan::Kind;

/// What a fault did is felt so much longer than it lasts: an election, a lease, a connection's next try.
pub const AFTERMATH: Duration = Duration::from_secs(3);

/// A fault that was.
#[derive(Clone, Copy, Debug)]
pub struct Past {
    pub kind: Kind,
    pub from: Instant,
    pub to: Instant,
}

/// Commands that took long while a kind of fault was in force.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    count: u64,
    /// The longest while nothing else was in force.
    alone: Duration,
    /// The longest at all.
    any: Duration,
}

/// Longest commands by kind of fault, as lines of a table.
pub fn stalls(past: &[Past], slow: &[Slow]) -> Vec<[String; 4]> {
    let mut rows: BTreeMap<Kind, Row> = BTreeMap::new();
    for fault in past {
        rows.entry(fault.kind).or_default().count += 1;
    }
    for command in slow {
        let ended = command.issued + command.took;
        let in_force = past.iter().filter(|fault| fault.from < ended && fault.to + AFTERMATH > command.issued);
        let in_force: Vec<&Past> = in_force.collect();
        for fault in &in_force {
            let row = rows.entry(fault.kind).or_default();
            row.any = row.any.max(command.took);
            if in_force.len() == 1 {
                row.alone = row.alone.max(command.took);
            }
        }
    }
    let ms = |took: Duration| if took.is_zero() { "-".into() } else { format!("{} ms", took.as_millis()) };
    let row = |(kind, row): (&Kind, &Row)| [kind.name().into(), row.count.to_string(), ms(row.alone), ms(row.any)];
    rows.iter().map(row).collect()
}
