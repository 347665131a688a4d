//! What goes into the core and what comes out of it.

use std::fmt;

use bytes::Bytes;
use proto::frame::{Code, CopyTarget, Reply, Request};
use proto::id::{AttachId, BlockIndex, ClusterId, Epoch, Incarnation, MirrorId, RegionIndex, ReplicaId, VolumeId};

/// One connection of the replica protocol, numbered by the driver; a number is never used twice in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// One disk operation of one core; never used twice by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// One copy message on its way to a peer; never used twice by a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CopyToken(pub u64);

/// Whose replica this is. Stored in the superblock; a file of another's is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaIds {
    pub cluster: ClusterId,
    pub volume: VolumeId,
    pub mirror: MirrorId,
    pub replica: ReplicaId,
}

impl fmt::Display for ReplicaIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, volume, mirror, replica } = self;
        write!(f, "replica {replica} of mirror {mirror}, volume {volume}, cluster {cluster}")
    }
}

/// What a core is told of its replica when it is made.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Whose replica it should be.
    pub ids: ReplicaIds,
    /// Its size in blocks; at least one, at most [`proto::limits::MAX_MIRROR_SIZE`] bytes.
    pub blocks: u64,
    /// The process's random number (R1).
    pub incarnation: Incarnation,
    /// The era of the page cache: as long as it is the same, the cache has what earlier processes wrote. Another one
    /// after every boot, every fault, and every opening that failed on the disk. Zeroes: not known, and no allocation
    /// is journaled; see `journal`.
    pub era: [u8; 16],
    /// Pages of the block map that are kept in memory; modified and used pages may exceed it by what the requests
    /// in flight need. See [`super::ReplicaCore::set_cache_limit`].
    pub map_cache_pages: usize,
}

/// What [`super::ReplicaCore::create`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// A replica that its volume is created with: every block unallocated, every region clean.
    Clean,
    /// A replica that is added later: every block unallocated, every region dirty (R7).
    AllDirty,
    /// New metadata over a data file that has lost its own: every region dirty and suspect, every block unverified
    /// and unreadable until it is equalised (R10).
    Rebuilt,
    /// New metadata for a replica that has lost its data too: every region dirty and suspect, every block
    /// unallocated. Like `Rebuilt`, it says so to whoever attaches.
    Lost,
}

/// The lengths of a replica's two files, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLengths {
    pub data: u64,
    pub meta: u64,
}

/// A replica's two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKind {
    /// Block *n* at *n* × 4096, nothing else.
    Data,
    /// Superblocks, allocation journal and bitmaps, and the block map, which stores may keep elsewhere; see [`super`].
    Meta,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data file",
            Self::Meta => "meta file",
        })
    }
}

/// One disk operation. Offsets and lengths are multiples of 4096 and inside the file.
///
/// Operations run concurrently and end in any order; the core orders what must be ordered by waiting. Writes and
/// punches are volatile until a [`DiskIo::Sync`] of their file that was issued after they had ended has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskIo {
    /// Reads exactly `len` bytes; answered with [`DiskData::Read`]. Fewer bytes are an error.
    Read { file: FileKind, offset: u64, len: u32 },
    /// Writes all of `bytes`.
    Write { file: FileKind, offset: u64, bytes: Bytes },
    /// Frees a range of the data file, which then reads as zeroes.
    Punch { offset: u64, len: u64 },
    /// Makes everything that had been written to the file durable; of the meta file the block map only with `map`.
    Sync { file: FileKind, map: bool },
}

/// What a disk operation brings back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskData {
    /// Write, punch and sync.
    None,
    /// The bytes that a read asked for.
    Read(Vec<u8>),
}

/// Why a disk operation failed. The driver has logged the system's own error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum DiskError {
    #[error("no space left under the replica")]
    NoSpace,
    #[error("I/O error")]
    Io,
}

/// Why a copy message was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    #[error("the peer could not be reached, or did not answer in time")]
    Unreachable,
    #[error("the peer refused the copy: {0:?}")]
    Refused(Code),
}

/// What happens to a core.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame's request. [`Request::Hello`] never comes here.
    Request { conn: ConnId, channel: u32, tag: u64, attach: AttachId, request: Request },
    /// Any frame came in on this connection, a ping for example: its attach lives on.
    Heard { conn: ConnId },
    /// The connection is gone. Nothing that is answered to it later arrives anywhere.
    ConnectionLost { conn: ConnId },
    /// A disk operation has ended.
    DiskDone { op: OpId, result: Result<DiskData, DiskError> },
    /// A peer has answered, or could not be reached.
    CopySent { token: CopyToken, result: Result<(), CopyError> },
    /// Time has passed; wanted a few times a second.
    Tick,
}

/// What a core wants done.
#[derive(Clone, Debug)]
pub enum Output {
    /// Answers a request, on the connection it came on if that still stands.
    Reply { conn: ConnId, channel: u32, tag: u64, attach: AttachId, reply: Reply },
    /// Starts a disk operation; its end comes back as [`Input::DiskDone`], also after a fault.
    Disk { op: OpId, io: DiskIo },
    /// Sends `request`, a [`Request::CopyWrite`], to the peer under `to.attach`; the answer comes back as
    /// [`Input::CopySent`].
    SendCopy { to: CopyTarget, token: CopyToken, request: Request },
    /// The peer broke a limit (R11): the connection is closed and reported lost.
    CloseConnection { conn: ConnId, reason: CloseReason },
    /// The replica is open (after `open` or `create`) and may be sent requests.
    Opened(OpenReport),
    /// The replica could not be opened; the core is of no further use.
    OpenFailed(OpenError),
    /// The replica no longer knows what it holds and refuses everything. Once every disk operation has ended, the
    /// driver drops the page cache and opens a new core.
    Faulted(FaultReason),
    /// For the log and the counters.
    Notice(Notice),
}

/// Why a connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    #[error("more than {limit} requests in flight on one attach")]
    TooManyRequests { limit: usize },
}

/// What opening found, beyond success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenReport {
    /// The epoch in the superblock.
    pub epoch: Epoch,
    /// The copy of the superblock (0 or 1) that was bad or older and has been repaired.
    pub repaired_superblock: Option<u8>,
    /// Pages of the dirty bitmap and of the presence bitmap that failed their checksum.
    pub bad_bitmap_pages: u32,
    /// Dirty regions, all of them suspect.
    pub dirty: u64,
    /// The metadata was made anew over lost metadata.
    pub rebuilt: bool,
    /// Blocks that a killed process had written and only the allocation journal knew of; they are unverified now.
    pub journal_blocks: u64,
}

/// Why a replica could not be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("{file} is {found} bytes, expected {expected}: truncated")]
    Truncated { file: FileKind, found: u64, expected: u64 },
    /// `empty`: both are zeroes, as after a creation that was cut short.
    #[error("meta file: both superblock copies are bad")]
    NoSuperblock { empty: bool },
    #[error("meta file belongs to {found}, expected {expected}")]
    Foreign { found: Box<ReplicaIds>, expected: Box<ReplicaIds> },
    #[error("meta file has layout version {found}, expected {expected}")]
    Layout { found: u32, expected: u32 },
    #[error("meta file says {found} blocks, expected {expected}")]
    Size { found: u64, expected: u64 },
    #[error("{file}: {error}")]
    Disk { file: FileKind, error: DiskError },
}

/// Why a replica that was open refuses everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultReason {
    #[error("sync of the {0} failed")]
    Sync(FileKind),
    #[error("write of metadata failed: {0}")]
    MetaWrite(DiskError),
}

/// Why an attach ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachEnd {
    /// A newer one came (R1).
    Superseded(AttachId),
    /// Its connection was lost.
    ConnectionLost,
    /// Nothing was heard for the lease time.
    LeaseOver,
    /// The gateway ended it.
    Detached,
}

/// Something an operator or a counter wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// An attach was taken.
    Attached(AttachId),
    /// An attach has ended; its I/O may still be draining.
    AttachEnded { attach: AttachId, why: AttachEnd },
    /// A region's part of the block map failed its checksum, or is missing: the region is dirty and suspect, its blocks
    /// unverified (R10).
    BadMap { region: RegionIndex },
    /// A block's bytes do not match its sum (R10).
    ChecksumMismatch { block: BlockIndex },
    /// The disk could not read from this block on.
    ReadFailed { block: BlockIndex },
    /// The disk refused a write of data.
    WriteFailed { block: BlockIndex, error: DiskError },
    /// Space could not be freed; the blocks read as zeroes all the same.
    PunchFailed { block: BlockIndex },
    /// A copy ended early.
    CopyFailed { block: BlockIndex, error: CopyError },
}
