//! Carries disk operations out for one data thread.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::blocking::{BlockingEngine, Sink};
use super::uring::{UringEngine, UringWaiter};
use super::{FilePair, ReplicaFiles, describe, outcome};
use crate::replica::{DiskData, DiskError, DiskIo};

/// Writes up to this many bytes are copied into the page cache in place: as a rule, and after one was throttled, until
/// one is quick. The kernel makes a throttled writer wait for as long as the disk takes for so many bytes.
const IN_PLACE_WRITE: usize = 1 << 20;
const IN_PLACE_PROBE: usize = 64 << 10;
/// Reads up to this many bytes are tried from the page cache in place.
const IN_PLACE_READ: u32 = 256 << 10;
/// A write in place that takes longer than this was throttled.
const THROTTLED: Duration = Duration::from_millis(5);
/// For this long after it, writes go through the engine.
const THROTTLE_PAUSE: Duration = Duration::from_millis(500);

/// An operation that has ended: the number it was submitted with, and how.
pub type Finished = (u64, Result<DiskData, DiskError>);

/// Which engine carries operations out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// io_uring where the system allows it, otherwise blocking threads.
    #[default]
    Auto,
    /// Blocking threads.
    Blocking,
    /// io_uring, or a failure to start.
    IoUring,
}

impl EngineKind {
    /// What `MD99_IO` asks for; [`Auto`](Self::Auto) if it is not set.
    ///
    /// # Errors
    /// The value, if it is none of `blocking`, `io_uring` and `auto`.
    pub fn from_env() -> Result<Self, String> {
        match std::env::var("MD99_IO").as_deref() {
            Err(_) | Ok("" | "auto") => Ok(Self::Auto),
            Ok("blocking") => Ok(Self::Blocking),
            Ok("io_uring") => Ok(Self::IoUring),
            Ok(other) => Err(other.to_owned()),
        }
    }
}

/// One data thread's engine.
#[derive(Debug)]
pub struct Engine {
    back: Back,
    in_place_write: usize,
    writes_wait_until: Option<Instant>,
}

#[derive(Debug)]
enum Back {
    Blocking(BlockingEngine),
    Uring(Box<UringEngine>),
}

/// Waits for operations to end, apart from the engine so that nothing is borrowed meanwhile.
#[derive(Clone, Debug)]
pub enum EngineWaiter {
    Blocking(Arc<Sink>),
    Uring(Rc<UringWaiter>),
}

impl EngineWaiter {
    /// Returns when operations may have ended since the last [`Engine::reap`]. Cancelling it loses nothing.
    ///
    /// # Errors
    /// The runtime's.
    pub async fn wait(&self) -> io::Result<()> {
        match self {
            Self::Blocking(sink) => {
                sink.wait().await;
                Ok(())
            }
            Self::Uring(waiter) => waiter.wait().await,
        }
    }
}

impl Engine {
    /// Starts an engine on the current thread, inside its runtime.
    ///
    /// # Errors
    /// Why there is no io_uring, where it was asked for.
    pub fn start(kind: EngineKind) -> io::Result<Self> {
        let uring = match kind {
            EngineKind::Blocking => None,
            EngineKind::IoUring => Some(UringEngine::start()?),
            EngineKind::Auto => match UringEngine::start() {
                Ok(uring) => Some(uring),
                Err(error) => {
                    tracing::info!(%error, "no io_uring here: blocking threads do the disk I/O");
                    None
                }
            },
        };
        let back = match uring {
            Some(uring) => Back::Uring(Box::new(uring)),
            None => Back::Blocking(BlockingEngine::start()),
        };
        Ok(Self { back, in_place_write: IN_PLACE_WRITE, writes_wait_until: None })
    }

    /// What [`wait`](EngineWaiter::wait)s for this engine.
    pub fn waiter(&self) -> EngineWaiter {
        match &self.back {
            Back::Blocking(blocking) => EngineWaiter::Blocking(blocking.sink()),
            Back::Uring(uring) => EngineWaiter::Uring(uring.waiter()),
        }
    }

    /// Does the operation at once if that takes no waiting.
    pub fn in_place(&mut self, files: &ReplicaFiles, io: &DiskIo) -> Option<Result<DiskData, DiskError>> {
        let files = match files {
            ReplicaFiles::Mem(files) => return Some(files.execute(io)),
            ReplicaFiles::File(files) => files,
        };
        match io {
            DiskIo::Read { .. } | DiskIo::Write { .. } | DiskIo::Sync { .. } if files.in_memory() => {
                let (what, file, offset) = describe(io);
                Some(outcome(files, what, file, offset, files.execute(io)))
            }
            DiskIo::Read { file, offset, len } if *len <= IN_PLACE_READ => {
                files.read_cached(*file, *offset, *len).map(|bytes| Ok(DiskData::Read(bytes)))
            }
            DiskIo::Write { bytes, .. } if bytes.len() <= self.in_place_write => {
                let began = Instant::now();
                if self.writes_wait_until.is_some_and(|until| began < until) {
                    return None;
                }
                let result = files.execute(io);
                let ended = Instant::now();
                let throttled = ended - began > THROTTLED;
                self.in_place_write = if throttled { IN_PLACE_PROBE } else { IN_PLACE_WRITE };
                self.writes_wait_until = throttled.then(|| ended + THROTTLE_PAUSE);
                let (what, file, offset) = describe(io);
                Some(outcome(files, what, file, offset, result))
            }
            _ => None,
        }
    }

    /// Takes an operation; it starts with the next [`kick`](Self::kick) at the latest.
    pub fn submit(&mut self, number: u64, files: &Arc<FilePair>, io: DiskIo) {
        match &mut self.back {
            Back::Blocking(blocking) => blocking.submit(number, files.clone(), io),
            Back::Uring(uring) => uring.submit(number, files.clone(), io),
        }
    }

    /// Starts what was submitted: one system call for all of it.
    pub fn kick(&mut self) {
        if let Back::Uring(uring) = &mut self.back {
            uring.kick();
        }
    }

    /// Takes what has ended.
    pub fn reap(&mut self, into: &mut Vec<Finished>) {
        match &mut self.back {
            Back::Blocking(blocking) => blocking.reap(into),
            Back::Uring(uring) => uring.reap(into),
        }
    }
}
