//! How things look: tables, times, progress. Columns and words are stable; colour is never used, so that output is
//! the same on a terminal, in a pipe and in a log.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Prints to standard output. A reader that went away (`| head`) ends the command quietly.
pub fn line(text: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Prints a value as JSON.
pub fn json(value: &impl Serialize) {
    line(serde_json::to_string_pretty(value).expect("output is plain values"));
}

/// A table without borders.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    table_of(&header, rows.into_iter().map(Vec::from))
}

/// The same where the columns are chosen as it goes; every row has as many as the header.
pub fn table_of(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// How long, in the two largest units.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86400, seconds / 3600 % 24),
    }
}

/// How long ago `then` was, on the clock that says `now`.
pub fn ago(now_unix_ms: u64, then_unix_ms: u64) -> String {
    span(Duration::from_millis(now_unix_ms.saturating_sub(then_unix_ms)))
}

/// Asks on the terminal; anything but yes is no. Without a terminal the answer is no.
pub fn confirmed(question: &str) -> bool {
    if !std::io::stdin().is_terminal() {
        return false;
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// Plain progress lines come no more often than this.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Progress of long work: a bar on a terminal, now and then a line elsewhere; on standard error either way.
pub struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    said: Option<(Instant, String)>,
}

impl Progress {
    /// Begins.
    pub fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{spinner} {prefix} {msg}").expect("a valid template");
            bar.set_style(style);
            bar.set_prefix(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { what, bar, said: None }
    }

    /// Where it stands.
    pub fn at(&mut self, text: impl Into<String>) {
        let text = text.into();
        match &self.bar {
            Some(bar) => bar.set_message(text),
            None => {
                let due = self.said.as_ref().is_none_or(|(when, said)| *said != text && when.elapsed() >= LINE_EVERY);
                if due {
                    eprintln!("{} {text}", self.what);
                    self.said = Some((Instant::now(), text));
                }
            }
        }
    }

    /// Ends; what comes next is not overwritten.
    pub fn done(self) {}
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_told_in_the_two_largest_units() {
        for (ms, text) in [
            (0, "0 ms"),
            (999, "999 ms"),
            (1500, "1 s"),
            (61_000, "1 min 1 s"),
            (7_260_000, "2 h 1 min"),
            (90_000_000, "1 d 1 h"),
        ] {
            assert_eq!(span(Duration::from_millis(ms)), text);
        }
        assert_eq!(ago(5_000, 9_000), "0 ms", "a clock that went back is no reason to panic");
    }

    #[test]
    fn tables_have_no_trailing_blanks() {
        let text = table(["NAME", "SIZE"], [["tank".into(), "2 GiB".into()], ["b".into(), String::new()]]);
        assert_eq!(text, "NAME  SIZE\ntank  2 GiB\nb");
    }
}
