//! What a load measures, phase by phase.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Serialize;

/// What was measured from one [`Meter::take`] to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    /// For how long.
    pub seconds: f64,
    /// Commands answered.
    pub commands: u64,
    /// Bytes read, written, zeroed and discarded.
    pub bytes: u64,
    /// The longest time from a command's first issue to its answer, all repetitions included.
    pub longest_ms: f64,
    /// Logins after a lost connection.
    pub reconnects: u64,
}

impl Measured {
    /// Commands per second.
    pub fn iops(&self) -> f64 {
        self.commands as f64 / self.seconds.max(1e-9)
    }
    /// Millions of bytes per second.
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.seconds.max(1e-9)
    }
}

/// From when on a command counts as slow.
pub const SLOW: Duration = Duration::from_millis(250);
/// Slow commands that are kept until they are taken; more are only counted in the longest.
const MAX_SLOW: usize = 10_000;

/// A command that took long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow {
    /// When it was issued first.
    pub issued: Instant,
    /// Until it was answered, all repetitions included.
    pub took: Duration,
}

struct Counts {
    since: Instant,
    measured: Measured,
    slow: Vec<Slow>,
}

/// Counts.
pub struct Meter(Mutex<Counts>);

impl Default for Meter {
    fn default() -> Self {
        Self(Mutex::new(Counts { since: Instant::now(), measured: Measured::default(), slow: Vec::new() }))
    }
}

impl Meter {
    fn with<T>(&self, work: impl FnOnce(&mut Counts) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// A command that was issued first at `issued` has been answered.
    pub fn answered(&self, issued: Instant, bytes: u64) {
        let took = issued.elapsed();
        self.with(|counts| {
            counts.measured.commands += 1;
            counts.measured.bytes += bytes;
            counts.measured.longest_ms = counts.measured.longest_ms.max(ms(took));
            if took >= SLOW && counts.slow.len() < MAX_SLOW {
                counts.slow.push(Slow { issued, took });
            }
        });
    }

    /// Commands answered since the last [`Self::take`].
    pub fn commands(&self) -> u64 {
        self.with(|counts| counts.measured.commands)
    }

    /// The slow ones since the last call.
    pub fn take_slow(&self) -> Vec<Slow> {
        self.with(|counts| std::mem::take(&mut counts.slow))
    }

    /// What was measured since the last call; begins anew.
    pub fn take(&self) -> Measured {
        self.with(|counts| {
            let now = Instant::now();
            let taken = Measured { seconds: (now - counts.since).as_secs_f64(), ..counts.measured };
            (counts.since, counts.measured) = (now, Measured::default());
            taken
        })
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
