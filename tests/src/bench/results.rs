//! What the figures have to be, and how they are written down.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use cli::bench::figures::Figures;
use cli::bench::output::{Machine, load_average};

/// What a figure is told by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// A part of the same figure of the fan-out.
    Fanout,
    /// A part of the same figure of tgtd.
    Tgtd,
    /// So many times what was published of another product on a machine like this.
    Anchor,
    /// A part of the best of its kind.
    Best,
    /// Itself, and it has to be small.
    AtMost,
}

/// One figure, and what it has to be.
#[derive(Clone, Debug)]
pub struct Line {
    /// In a few words.
    pub figure: &'static str,
    /// How it is told.
    pub by: By,
    /// The figure itself.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// What it is divided by, if that was measured.
    pub bound: Option<f64>,
    /// What the ratio, or the figure itself, has to be.
    pub floor: f64,
    /// What it should be.
    pub goal: f64,
    /// What must be known to read it.
    pub note: String,
}

impl Line {
    /// What is compared with floor and goal.
    fn measure(&self) -> Option<f64> {
        match self.by {
            By::AtMost => Some(self.value),
            _ => self.bound.filter(|bound| *bound > 0.0).map(|bound| self.value / bound),
        }
    }

    /// `goal`, `floor`, or `no`.
    pub fn met(&self) -> &'static str {
        let Some(measure) = self.measure() else { return "-" };
        let reaches = |limit: f64| if self.by == By::AtMost { measure <= limit } else { measure >= limit };
        match (reaches(self.goal), reaches(self.floor)) {
            (true, _) => "goal",
            (false, true) => "floor",
            (false, false) => "NO",
        }
    }

    fn cells(&self) -> [String; 8] {
        let of = match self.by {
            By::Fanout => "fan-out",
            By::Tgtd => "tgtd",
            By::Anchor => "Ceph, as published",
            By::Best => "the best of these",
            By::AtMost => "",
        };
        let bound = match (self.by, self.bound) {
            (By::AtMost, _) => "at most".into(),
            (_, None) => format!("{of}: not measured"),
            (_, Some(bound)) => format!("{} {of}", number(bound)),
        };
        let ratio = match self.by {
            By::AtMost => "-".into(),
            _ => self.measure().map_or("-".into(), |ratio| format!("{ratio:.2}")),
        };
        [
            self.figure.into(),
            format!("{} {}", number(self.value), self.unit),
            bound,
            ratio,
            number(self.floor),
            number(self.goal),
            self.met().into(),
            self.note.clone(),
        ]
    }
}

/// A number with as many digits as matter.
fn number(value: f64) -> String {
    let text = match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// What one shape gave on one target, or of the fan-out.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The shape.
    pub shape: String,
    /// The target.
    pub target: String,
    /// The median of its rounds.
    pub figures: Figures,
    /// The lowest and the highest throughput of a round.
    pub range: (f64, f64),
    /// Requests that failed.
    pub errors: u64,
}

/// Everything.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// Shape by shape.
    pub measured: Vec<Measured>,
    /// What has to be.
    pub lines: Vec<Line>,
    /// What else is worth a line.
    pub notes: Vec<String>,
}

const HEADER: [&str; 8] = ["FIGURE", "MD99", "BOUND", "RATIO", "FLOOR", "GOAL", "MET", "NOTE"];
const SHAPES: [&str; 11] =
    ["SHAPE", "TARGET", "IOPS", "MB/S", "P50 US", "P99", "P99.9", "MAX", "US CPU/IO", "IOPS FROM..TO", "ERRORS"];

impl Results {
    /// The median of this shape on this target.
    pub fn find(&self, shape: &str, target: &str) -> Option<&Figures> {
        let found = self.measured.iter().find(|measured| measured.shape == shape && measured.target == target);
        found.map(|measured| &measured.figures)
    }

    fn shape_rows(&self) -> Vec<[String; 11]> {
        let row = |measured: &Measured| {
            let f = &measured.figures;
            [
                measured.shape.clone(),
                measured.target.clone(),
                format!("{:.0}", f.iops),
                format!("{:.1}", f.mb_per_s),
                format!("{:.0}", f.p50_us),
                format!("{:.0}", f.p99_us),
                format!("{:.0}", f.p999_us),
                format!("{:.0}", f.max_us),
                f.target_us_per_io.map_or("-".into(), |us| format!("{us:.1}")),
                format!("{:.0}..{:.0}", measured.range.0, measured.range.1),
                measured.errors.to_string(),
            ]
        };
        self.measured.iter().map(row).collect()
    }

    /// For the terminal.
    pub fn text(&self) -> String {
        let shapes = cli::render::table(SHAPES, self.shape_rows());
        let lines = cli::render::table(HEADER, self.lines.iter().map(Line::cells));
        [vec![shapes, lines], self.notes.clone()].concat().join("\n\n")
    }

    /// For the file: one section.
    pub fn markdown(&self, about: &About) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "## {}, {}\n", about.date, about.commit);
        let machine = &about.machine;
        let _ = writeln!(
            text,
            "{}, {} processors, {} MiB of memory, {}. Load average before {}, after {}. {}\n",
            machine.processor,
            machine.processors,
            machine.memory_bytes >> 20,
            machine.kernel,
            machine.load_average,
            about.load_average_after,
            about.parameters,
        );
        let table = |text: &mut String, header: &[&str], rows: Vec<Vec<String>>| {
            let header: Vec<String> = header.iter().map(|word| word.to_lowercase()).collect();
            let _ = writeln!(text, "| {} |\n|{}", header.join(" | "), "---|".repeat(header.len()));
            for row in rows {
                let _ = writeln!(text, "| {} |", row.join(" | "));
            }
            text.push('\n');
        };
        table(&mut text, &HEADER, self.lines.iter().map(|line| line.cells().to_vec()).collect());
        table(&mut text, &SHAPES, self.shape_rows().into_iter().map(Vec::from).collect());
        for note in &self.notes {
            let _ = writeln!(text, "- {note}");
        }
        text
    }
}

/// When, what and where.
#[derive(Clone, Debug)]
pub struct About {
    /// The day and the hour.
    pub date: String,
    /// Of md99.
    pub commit: String,
    /// Where.
    pub machine: Machine,
    /// The load after it.
    pub load_average_after: String,
    /// Lengths and sizes.
    pub parameters: String,
}

fn said(command: &str, args: &[&str]) -> String {
    let output = Command::new(command).args(args).output().ok().filter(|output| output.status.success());
    output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl About {
    /// Now, here, this work tree.
    pub fn look(parameters: String) -> Self {
        let dirty = if said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() { "" } else { "+" };
        let commit = said("git", &["rev-parse", "--short=12", "HEAD"]);
        Self {
            date: said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            commit: if commit.is_empty() { "no commit".into() } else { format!("commit {commit}{dirty}") },
            machine: Machine::look(),
            load_average_after: String::new(),
            parameters,
        }
    }

    /// The run is over.
    pub fn after(&mut self) {
        self.load_average_after = load_average();
    }
}

const TOP: &str = "# Results\n\nWritten by `tests/bench/run`, the newest first. Ratios are of one interleaved run; figures of different runs, and \
                   of machines that did something else meanwhile (load average), do not compare.\n";

/// Puts a section before those that the file has.
///
/// # Errors
/// When the file system says no.
pub fn record(path: &Path, section: &str) -> std::io::Result<()> {
    let before = std::fs::read_to_string(path).unwrap_or_default();
    let older = before.find("\n## ").map_or("", |at| &before[at..]);
    std::fs::write(path, format!("{TOP}\n{section}{older}"))
}

/// The median of every figure, for each shape and target, in the order of their first appearance.
pub fn medians(rounds: &[(String, String, Figures, u64)]) -> Vec<Measured> {
    let mut order: Vec<(&str, &str)> = Vec::new();
    let mut all: BTreeMap<(&str, &str), Vec<(&Figures, u64)>> = BTreeMap::new();
    for (shape, target, figures, errors) in rounds {
        let key = (shape.as_str(), target.as_str());
        if !all.contains_key(&key) {
            // All targets of a shape stand together.
            let after = order.iter().rposition(|(other, _)| *other == key.0).map_or(order.len(), |at| at + 1);
            order.insert(after, key);
        }
        all.entry(key).or_default().push((figures, *errors));
    }
    let each = order.into_iter().map(|key| {
        let rounds = &all[&key];
        let figures: Vec<&Figures> = rounds.iter().map(|(figures, _)| *figures).collect();
        let iops = figures.iter().map(|figures| figures.iops);
        Measured {
            shape: key.0.into(),
            target: key.1.into(),
            range: (iops.clone().fold(f64::INFINITY, f64::min), iops.fold(0.0, f64::max)),
            figures: Figures::median(&figures),
            errors: rounds.iter().map(|(_, errors)| errors).sum(),
        }
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(by: By, value: f64, bound: Option<f64>) -> Line {
        Line { figure: "x", by, value, unit: "IOPS", bound, floor: 0.5, goal: 0.8, note: String::new() }
    }

    #[test]
    fn a_line_is_met_by_its_ratio_or_by_itself() {
        for (by, value, bound, met) in [
            (By::Fanout, 90.0, Some(100.0), "goal"),
            (By::Fanout, 60.0, Some(100.0), "floor"),
            (By::Tgtd, 40.0, Some(100.0), "NO"),
            (By::Tgtd, 40.0, None, "-"),
        ] {
            assert_eq!(line(by, value, bound).met(), met, "{value} of {bound:?}");
        }
        let at_most = |value| Line { floor: 400.0, goal: 200.0, ..line(By::AtMost, value, None) };
        assert_eq!([at_most(100.0).met(), at_most(300.0).met(), at_most(500.0).met()], ["goal", "floor", "NO"]);
    }

    #[test]
    fn the_newest_section_comes_first_and_none_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("RESULTS.md");
        record(&path, "## one\n\nfirst\n").unwrap();
        record(&path, "## two\n\nsecond\n").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(TOP));
        let (two, one) = (text.find("## two").unwrap(), text.find("## one").unwrap());
        assert!(two < one && text.contains("first") && text.matches("# Results").count() == 1, "{text}");
    }

    #[test]
    fn numbers_have_as_many_digits_as_matter() {
        for (value, text) in
            [(0.4, "0.4"), (1.0, "1"), (12345.6, "12346"), (12.34, "12.3"), (2.5, "2.5"), (100.0, "100")]
        {
            assert_eq!(number(value), text);
        }
    }
}
