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

/// Counts.
pub struct Meter(Mutex<(Instant, Measured)>);

impl Default for Meter {
    fn default() -> Self {
        Self(Mutex::new((Instant::now(), Measured::default())))
    }
}

impl Meter {
    fn with<T>(&self, work: impl FnOnce(&mut (Instant, Measured)) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// A command that was issued first at `issued` has been answered.
    pub fn answered(&self, issued: Instant, bytes: u64) {
        let took = issued.elapsed();
        self.with(|(_, measured)| {
            measured.commands += 1;
            measured.bytes += bytes;
            measured.longest_ms = measured.longest_ms.max(ms(took));
        });
    }

    /// A connection was made anew.
    pub fn reconnected(&self) {
        self.with(|(_, measured)| measured.reconnects += 1);
    }

    /// Commands answered since the last [`Self::take`].
    pub fn commands(&self) -> u64 {
        self.with(|(_, measured)| measured.commands)
    }

    /// What was measured since the last call; begins anew.
    pub fn take(&self) -> Measured {
        self.with(|(since, measured)| {
            let now = Instant::now();
            let taken = Measured { seconds: (now - *since).as_secs_f64(), ..*measured };
            (*since, *measured) = (now, Measured::default());
            taken
        })
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
