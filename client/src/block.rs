//! The seam between the iSCSI target and a volume: what a block device offers to whoever serves it.
//!
//! Both sides live on one thread (the volume's), so nothing here is `Send`; a completion is pushed into the
//! requester's sink, which drains it in batches.

use std::rc::Rc;

use bytes::Bytes;

/// Bytes in a logical block as initiators see it.
pub const SECTOR: u64 = 512;

/// What does not change while a device is open, but for `bytes`, which may grow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Stable identity; VPD page 83 and the serial number derive from it.
    pub id: uuid::Uuid,
    /// The volume's name.
    pub name: String,
    /// Size in bytes, a multiple of 4096.
    pub bytes: u64,
    /// The optimal transfer unit in bytes: the stripe's chunk.
    pub chunk: u32,
    /// Whether acknowledged writes may be lost by a power cut until flushed (WCE=1).
    pub write_cache: bool,
}

/// One request. Offsets and lengths are bytes, multiples of [`SECTOR`], inside the device; the requester checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockRequest {
    /// Reads `len` bytes.
    Read { offset: u64, len: u32 },
    /// Writes `data`; with `fua` it is durable before it is answered.
    Write { offset: u64, data: Bytes, fua: bool },
    /// Makes every write that was answered before this one durable.
    Flush,
    /// Frees whole blocks; what is left over at the edges is zeroed. Reads as zeroes afterwards.
    Discard { offset: u64, len: u64 },
    /// Makes the range read as zeroes; `fua` as for a write.
    WriteZeroes { offset: u64, len: u64, fua: bool },
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockOutcome {
    /// Done. For reads the data in order, possibly in several pieces; empty otherwise.
    Done(Vec<Bytes>),
    /// Every in-sync copy of the block at this byte offset fails its checksum (R10): a medium error there.
    Medium { offset: u64 },
    /// The write could not be done by the last replica: a hardware error (R2).
    WriteFailed,
    /// No space is left under the last replica.
    NoSpace,
    /// Dropped on [`BlockDevice::abort`] before it had any effect.
    Aborted,
}

/// What a device tells everyone who serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Counts the moments at which every cache was lost (R8): each is a POWER ON OCCURRED unit attention.
    pub power_on: u64,
    /// Counts the growths: each is a CAPACITY DATA HAS CHANGED unit attention.
    pub capacity: u64,
    /// The session is over or superseded: connections are dropped, nothing more is answered (R1).
    pub gone: bool,
}

/// Where outcomes go: the requester's queue.
pub trait CompletionSink {
    /// Takes the outcome of the request that was submitted with `tag`. Called exactly once per request, never
    /// from inside `submit`. Not called at all once the device is gone.
    fn complete(&self, tag: u64, outcome: BlockOutcome);
}

/// A block device, served by one thread.
pub trait BlockDevice {
    /// Size and identity.
    fn info(&self) -> DeviceInfo;
    /// Takes a request. It waits as long as it must (R12): there is no time-out here.
    fn submit(&self, sink: &Rc<dyn CompletionSink>, tag: u64, request: BlockRequest);
    /// Asks to drop the request submitted with this sink and tag. If it already has an effect it is awaited
    /// instead (R4); either way its one outcome comes through the sink.
    fn abort(&self, sink: &Rc<dyn CompletionSink>, tag: u64);
    /// Follows the device's state.
    fn watch(&self) -> tokio::sync::watch::Receiver<DeviceState>;
}
