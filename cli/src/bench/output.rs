//! How it is shown: one document, and a table made of it.

use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

use super::figures::Figures;
use super::shape::Shape;
use super::target::Round;
use crate::render;

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// By which md99.
    pub version: &'static str,
    /// When it began.
    pub began_unix_ms: u64,
    /// How long a round was to be.
    pub seconds: u64,
    /// How many bytes a round was to be instead.
    pub total: Option<u64>,
    /// Sessions at once.
    pub sessions: u16,
    /// Rounds of each shape on each target.
    pub rounds: u32,
    /// Whether everything was written once before.
    pub filled: bool,
    /// Whether the user ended it.
    pub interrupted: bool,
    /// The machine's load at the end.
    pub load_average_after: String,
    /// On what.
    pub targets: Vec<TargetInfo>,
    /// Shape by shape, on each target.
    pub measurements: Vec<Measurement>,
}

/// A target.
#[derive(Clone, Debug, Serialize)]
pub struct TargetInfo {
    /// How it is called.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// Its processes, as far as they were named.
    pub pids: Vec<u32>,
    /// Its size.
    pub device_bytes: u64,
    /// What of it was touched.
    pub region_bytes: u64,
}

/// A machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Its name.
    pub host: String,
    /// Its processor.
    pub processor: String,
    /// What may run at once.
    pub processors: usize,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its kernel.
    pub kernel: String,
    /// Its load of 1, 5 and 15 minutes before anything began.
    pub load_average: String,
}

fn proc_line(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The load of 1, 5 and 15 minutes.
pub fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_ascii_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

impl Machine {
    /// This one.
    pub fn look() -> Self {
        let uname = rustix::system::uname();
        let word = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        let kib = proc_line("/proc/meminfo", "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        Self {
            host: word(uname.nodename()),
            processor: proc_line("/proc/cpuinfo", "model name").unwrap_or_else(|| word(uname.machine())),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib.unwrap_or(0) << 10,
            kernel: format!("{} {}", word(uname.sysname()), word(uname.release())),
            load_average: load_average(),
        }
    }
}

/// One shape on one target.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// Which shape.
    pub shape: Shape,
    /// Which target, by its name.
    pub target: String,
    /// Every round.
    pub rounds: Vec<Round>,
    /// Its throughput as a part of the first target's.
    pub ratio: Option<f64>,
}

impl Serialize for Measurement {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut value = serializer.serialize_struct("Measurement", 8)?;
        let (lowest, highest) = self.range();
        value.serialize_field("shape", &self.shape)?;
        value.serialize_field("target", &self.target)?;
        value.serialize_field("median", &self.median())?;
        value.serialize_field("lowest_iops", &lowest)?;
        value.serialize_field("highest_iops", &highest)?;
        value.serialize_field("ratio", &self.ratio)?;
        value.serialize_field("errors", &self.errors())?;
        value.serialize_field("rounds", &self.rounds)?;
        value.end()
    }
}

impl Measurement {
    /// Nothing yet.
    pub fn new(shape: &Shape, target: &str) -> Self {
        Self { shape: shape.clone(), target: target.to_owned(), rounds: Vec::new(), ratio: None }
    }

    /// The median of its rounds, figure by figure.
    pub fn median(&self) -> Figures {
        Figures::median(&self.rounds.iter().map(|round| &round.figures).collect::<Vec<_>>())
    }

    /// The lowest and the highest throughput of a round.
    pub fn range(&self) -> (f64, f64) {
        let all = self.rounds.iter().map(|round| round.figures.iops);
        (all.clone().fold(f64::INFINITY, f64::min), all.fold(0.0, f64::max))
    }

    /// Requests that failed or were never answered.
    pub fn errors(&self) -> u64 {
        self.rounds.iter().map(|round| round.counts.errors + round.counts.unanswered).sum()
    }

    /// What went wrong, if anything.
    pub fn complaint(&self) -> Option<String> {
        let bad = self.rounds.iter().find(|round| !round.is_clean())?;
        let first = bad.counts.first_error.clone().unwrap_or_default();
        Some(format!("{} on {}: {} requests failed, the first: {first}", self.shape.name, self.target, self.errors()))
    }
}

impl Report {
    /// Compares everything with the first target.
    pub fn judge(&mut self) {
        let Some(first) = self.targets.first().map(|target| target.name.clone()) else { return };
        let bases: Vec<(String, f64)> = self
            .measurements
            .iter()
            .filter(|measurement| measurement.target == first)
            .map(|measurement| (measurement.shape.name.clone(), measurement.median().iops))
            .collect();
        for measurement in &mut self.measurements {
            let base = bases.iter().find(|(shape, iops)| *shape == measurement.shape.name && *iops > 0.0);
            measurement.ratio = base.map(|(_, base)| measurement.median().iops / base);
        }
    }

    /// For people.
    pub fn table(&self) -> String {
        let several = self.targets.len() > 1;
        let pids = self.targets.iter().any(|target| !target.pids.is_empty());
        let rounds = self.measurements.iter().any(|measurement| measurement.rounds.len() > 1);
        let mut header = vec!["SHAPE"];
        if several {
            header.push("TARGET");
        }
        header.extend(["IOPS", "MB/S", "P50 US", "P90", "P99", "P99.9", "MAX", "ERRORS", "LOAD US/IO"]);
        if pids {
            header.extend(["TARGET US/IO", "S/GIB", "MEMORY"]);
        }
        if several {
            header.push("RATIO");
        }
        if rounds {
            header.push("IOPS FROM..TO");
        }
        let rows = self.measurements.iter().map(|measurement| {
            let m = measurement.median();
            let some = |value: Option<f64>, digits: usize| value.map_or("-".into(), |v| format!("{v:.digits$}"));
            let mut row = vec![measurement.shape.name.clone()];
            if several {
                row.push(measurement.target.clone());
            }
            row.extend([
                format!("{:.0}", m.iops),
                format!("{:.1}", m.mb_per_s),
                format!("{:.0}", m.p50_us),
                format!("{:.0}", m.p90_us),
                format!("{:.0}", m.p99_us),
                format!("{:.0}", m.p999_us),
                format!("{:.0}", m.max_us),
                measurement.errors().to_string(),
                format!("{:.1}", m.load_us_per_io),
            ]);
            if pids {
                let mib = m.target_resident_bytes.map(|bytes| bytes / f64::from(1 << 20));
                row.extend([
                    some(m.target_us_per_io, 1),
                    some(m.target_s_per_gib, 2),
                    mib.map_or("-".into(), |mib| format!("{mib:.0} MiB")),
                ]);
            }
            if several {
                row.push(some(measurement.ratio, 2));
            }
            if rounds {
                let (lowest, highest) = measurement.range();
                row.push(format!("{lowest:.0}..{highest:.0}"));
            }
            row
        });
        let table = render::table_of(&header, rows);
        let loads = format!("load average before {}, after {}", self.machine.load_average, self.load_average_after);
        format!("{table}\n\n{loads}")
    }
}
