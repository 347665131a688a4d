//! What processes take: processor time and memory, from /proc.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use crate::failure::{Failure, Outcome};

/// A moment's reading of some processes.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    each: Vec<Process>,
    /// What they hold in memory together.
    pub resident_bytes: u64,
}

#[derive(Clone, Debug, Default)]
struct Process {
    /// User and system time of all its threads, also of those that have ended; in steps of 10 ms.
    coarse: Duration,
    /// Of each thread, to the nanosecond.
    threads: BTreeMap<String, Duration>,
}

/// `1,2,3`, or `-` for none.
///
/// # Errors
/// What is not a list of pids, or one of no process.
pub fn parse(text: &str) -> Outcome<Vec<u32>> {
    if text.trim() == "-" {
        return Ok(Vec::new());
    }
    let pids = text.split(',').map(|pid| {
        let bad = || Failure::usage(format!("--pids {text}: {pid:?} is no process id")).next("write --pids 1,2,3");
        let pid: u32 = pid.trim().parse().map_err(|_| bad())?;
        match fs::exists(format!("/proc/{pid}/stat")) {
            Ok(true) => Ok(pid),
            _ => Err(Failure::new(format!("--pids {text}: there is no process {pid}"))),
        }
    });
    pids.collect()
}

impl Reading {
    /// Reads them now. A process that has ended counts as nothing.
    pub fn take(pids: &[u32]) -> Self {
        let mut resident_bytes = 0;
        let each = pids
            .iter()
            .map(|pid| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                // The name, in parentheses, may hold anything.
                let fields: Vec<u64> = stat
                    .rsplit_once(')')
                    .map_or("", |(_, rest)| rest)
                    .split_ascii_whitespace()
                    .map(|field| field.parse().unwrap_or(0))
                    .collect();
                let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0);
                let (ticks, page) = (rustix::param::clock_ticks_per_second().max(1), rustix::param::page_size() as u64);
                resident_bytes += field(24) * page;
                let coarse = Duration::from_secs_f64((field(14) + field(15)) as f64 / ticks as f64);
                Process { coarse, threads: threads(*pid) }
            })
            .collect();
        Self { each, resident_bytes }
    }

    /// Processor time from an earlier reading to this one.
    pub fn since(&self, earlier: &Reading) -> Duration {
        let pairs = self.each.iter().zip(&earlier.each);
        pairs
            .map(|(now, before)| {
                let same = !now.threads.is_empty() && now.threads.keys().eq(before.threads.keys());
                match same {
                    true => now.threads.values().sum::<Duration>().saturating_sub(before.threads.values().sum()),
                    // What an ended thread took is in the coarse figure only.
                    false => now.coarse.saturating_sub(before.coarse),
                }
            })
            .sum()
    }
}

fn threads(pid: u32) -> BTreeMap<String, Duration> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return BTreeMap::new() };
    let times = tasks.flatten().filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let nanos = text.split_ascii_whitespace().next()?.parse().ok()?;
        Some((task.file_name().to_string_lossy().into_owned(), Duration::from_nanos(nanos)))
    });
    times.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_computes_is_seen_to() {
        let pids = parse(&std::process::id().to_string()).unwrap();
        let before = Reading::take(&pids);
        let began = std::time::Instant::now();
        let mut n = 1u64;
        while began.elapsed() < Duration::from_millis(50) {
            n = std::hint::black_box(n.wrapping_mul(3));
        }
        let after = Reading::take(&pids);
        assert!(after.since(&before) > Duration::ZERO);
        assert!(after.resident_bytes > 1 << 16);
    }

    #[test]
    fn what_is_no_process_is_refused() {
        assert!(parse("-").unwrap().is_empty());
        assert!(parse("1,x").unwrap_err().to_string().contains("no process id"));
        assert!(parse("4194399").unwrap_err().to_string().contains("no process 4194399"));
    }
}
