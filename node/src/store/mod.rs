//! Where replicas' files are, and how disk operations are carried out.
//!
//! - [`file`]: a replica's two files in a directory: made, locked, opened, deleted;
//! - [`era`]: whether the page cache still has what earlier processes wrote to them;
//! - [`mem`]: the same in memory, with faults to order, for tests;
//! - [`engine`]: carries [`DiskIo`](crate::replica::DiskIo) out for one data thread, through a pool of blocking
//!   threads ([`blocking`]) or an io_uring ([`uring`]).
//!
//! What the page cache can take or give at once is done in place by the data thread, without a hop to either: a
//! small buffered write is a copy into memory, a read with `RWF_NOWAIT` never waits for a disk. When a write did
//! take long (the kernel throttles writers), writes go through the engine for a while.

pub mod blocking;
pub mod engine;
pub mod era;
pub mod file;
pub mod mem;
pub mod uring;

pub use engine::{Engine, EngineKind, EngineWaiter, Finished};
pub use file::{FilePair, FileProblem, Found};
pub use mem::{MemFiles, MemPool};

use std::io;
use std::sync::Arc;

use crate::replica::{DiskData, DiskError, DiskIo, FileKind, FileLengths};

/// A replica's two files, wherever they are.
#[derive(Clone, Debug)]
pub enum ReplicaFiles {
    File(Arc<FilePair>),
    Mem(Arc<MemFiles>),
}

impl ReplicaFiles {
    /// Current lengths.
    ///
    /// # Errors
    /// The system's.
    pub fn lengths(&self) -> io::Result<FileLengths> {
        match self {
            Self::File(files) => files.lengths(),
            Self::Mem(files) => Ok(files.lengths()),
        }
    }

    /// The era of the page cache, for a core that is about to open.
    pub fn era(&self) -> era::Era {
        match self {
            Self::File(files) => files.era_key().map_or(era::UNKNOWN, |key| era::present(&key)),
            Self::Mem(files) => files.era(),
        }
    }

    /// What was written may be gone: a sync has failed.
    pub fn end_era(&self) {
        match self {
            Self::File(files) => _ = files.era_key().map(|key| era::end(&key)),
            Self::Mem(files) => files.end_era(),
        }
    }

    /// Forgets what the page cache holds, so that what is read next comes from the disk.
    pub fn drop_cache(&self) {
        if let Self::File(files) = self {
            files.drop_cache();
        }
    }
}

/// What the core is told of a system error. The error itself is logged by whoever carries the operation out.
pub(crate) fn disk_error(error: &io::Error) -> DiskError {
    match error.raw_os_error() {
        Some(e) if e == rustix::io::Errno::NOSPC.raw_os_error() || e == rustix::io::Errno::DQUOT.raw_os_error() => {
            DiskError::NoSpace
        }
        _ => DiskError::Io,
    }
}

/// The outcome for the core, and a line in the log if it is a bad one.
pub(crate) fn outcome(
    files: &FilePair,
    what: &'static str,
    file: FileKind,
    offset: u64,
    result: io::Result<DiskData>,
) -> Result<DiskData, DiskError> {
    result.map_err(|error| {
        tracing::warn!(path = %files.path(file).display(), offset, %error, "{what} failed");
        disk_error(&error)
    })
}

/// What an operation is called in the log, and where it is.
pub(crate) fn describe(io: &DiskIo) -> (&'static str, FileKind, u64) {
    match io {
        DiskIo::Read { file, offset, .. } => ("read", *file, *offset),
        DiskIo::Write { file, offset, .. } => ("write", *file, *offset),
        DiskIo::Punch { offset, .. } => ("punch", FileKind::Data, *offset),
        DiskIo::Sync { file, .. } => ("sync", *file, 0),
    }
}
