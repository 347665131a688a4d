//! Carries disk operations out for one data thread.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::blocking::{BlockingEngine, Sink};
use super::uring::{UringEngine, UringWaiter};
use super::{FilePair, ReplicaFiles, describe, outcome};
use crate::replica::{DiskData, DiskError, DiskIo, FileKind};

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

/// A sync in place has at most so many bytes of data to write.
const IN_PLACE_SYNC: u64 = 256 << 10;
/// After a sync in place that took longer than this none is tried for so many times as long: on a slow disk the thread
/// waits for a twentieth of its time at most.
const SLOW_SYNC: Duration = Duration::from_millis(2);
const SLOW_SYNC_PAUSE: u32 = 20;

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
    /// Operations that the back has.
    in_hand: usize,
    /// Syncs that the back has, and what they sync of which replica's files.
    syncs: Vec<(u64, Arc<FilePair>, u8)>,
    /// Syncs that wait for others of the same file. The kernel tells one of those that run at a time that a page could not
    /// be written, whichever asks first.
    later: VecDeque<(u64, Arc<FilePair>, DiskIo)>,
    /// A sync that the thread may carry out itself.
    held: Option<(u64, Arc<FilePair>, DiskIo)>,
    /// Syncs that end with another one, by its number.
    shared: HashMap<u64, u64>,
    syncs_wait_until: Option<Instant>,
    disk: Disk,
}

/// Where the files of the thread's replicas are.
#[derive(Debug)]
enum Disk {
    Unknown,
    /// All are on this device.
    One(u64),
    Several,
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
        Ok(Self {
            back,
            in_place_write: IN_PLACE_WRITE,
            writes_wait_until: None,
            in_hand: 0,
            syncs: Vec::new(),
            later: VecDeque::new(),
            held: None,
            shared: HashMap::new(),
            syncs_wait_until: None,
            disk: Disk::Unknown,
        })
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
        if !matches!(io, DiskIo::Sync { .. }) {
            return self.pass_on(number, files.clone(), io);
        }
        match self.disk {
            Disk::Unknown => self.disk = Disk::One(files.device()),
            Disk::One(device) if device != files.device() => self.disk = Disk::Several,
            _ => {}
        }
        if let Some((first, held, DiskIo::Sync { file: FileKind::Data, .. })) = &self.held
            && Arc::ptr_eq(held, files)
            && files.data_has_all()
            && !self.shared.contains_key(first)
        {
            self.shared.insert(*first, number);
            return;
        }
        if let Some((number, files, io)) = self.held.replace((number, files.clone(), io)) {
            self.pass_on(number, files, io);
        }
    }

    fn pass_on(&mut self, number: u64, files: Arc<FilePair>, io: DiskIo) {
        let syncs = synced_by(&io);
        if syncs != 0 {
            if self.has_to_wait(&files, syncs) {
                return self.later.push_back((number, files, io));
            }
            self.syncs.push((number, files.clone(), syncs));
        }
        self.in_hand += 1;
        match &mut self.back {
            Back::Blocking(blocking) => blocking.submit(number, files, io),
            Back::Uring(uring) => uring.submit(number, files, io),
        }
    }

    /// Whether a sync of the same file runs, or waits already.
    fn has_to_wait(&self, files: &Arc<FilePair>, syncs: u8) -> bool {
        let same = |other: &Arc<FilePair>, parts: u8| Arc::ptr_eq(other, files) && parts & syncs != 0;
        self.syncs.iter().any(|(_, other, parts)| same(other, *parts))
            || self.later.iter().any(|(_, other, io)| same(other, synced_by(io)))
    }

    /// Starts what was submitted: one system call for all of it. A sync may be left for [`sync_here`](Self::sync_here).
    pub fn kick(&mut self) {
        if !self.may_sync_here()
            && let Some((number, files, io)) = self.held.take()
        {
            self.pass_on(number, files, io);
        }
        if let Back::Uring(uring) = &mut self.back {
            uring.kick();
        }
    }

    /// Whether a sync is better waited for by the thread itself than told to another and told of by it: it makes a few
    /// small writes durable, the disk is quick and has nothing else to do, and no replica on another disk would wait.
    fn may_sync_here(&self) -> bool {
        let Some((number, files, _)) = &self.held else { return false };
        self.in_hand == 0
            && self.later.is_empty()
            && self.shared.contains_key(number)
            && files.has_unsynced_at_most(IN_PLACE_SYNC)
            && matches!(self.disk, Disk::One(_))
            && self.syncs_wait_until.is_none_or(|until| Instant::now() >= until)
    }

    /// Carries the sync out that was left, if one was. To be called when nothing else is to be done.
    pub fn sync_here(&mut self, into: &mut Vec<Finished>) {
        let Some((number, files, io)) = self.held.take() else { return };
        let began = Instant::now();
        let result = files.execute(&io);
        let took = began.elapsed();
        self.syncs_wait_until = (took > SLOW_SYNC).then(|| began + took + took * SLOW_SYNC_PAUSE);
        let (what, file, offset) = describe(&io);
        into.push((number, outcome(&files, what, file, offset, result)));
        self.end_shared(into, into.len() - 1);
    }

    /// What has ended from `first` on has ended those that share it, too.
    fn end_shared(&mut self, ended: &mut Vec<Finished>, first: usize) {
        if self.shared.is_empty() {
            return;
        }
        for i in first..ended.len() {
            let (number, result) = &ended[i];
            let result = result.as_ref().map(|_| DiskData::None).map_err(|error| *error);
            if let Some(other) = self.shared.remove(number) {
                ended.push((other, result));
            }
        }
    }

    /// Takes what has ended.
    pub fn reap(&mut self, into: &mut Vec<Finished>) {
        let before = into.len();
        match &mut self.back {
            Back::Blocking(blocking) => blocking.reap(into),
            Back::Uring(uring) => uring.reap(into),
        }
        self.in_hand -= into.len() - before;
        if !self.syncs.is_empty() {
            self.syncs.retain(|(number, ..)| !into[before..].iter().any(|(ended, _)| ended == number));
            for (number, files, io) in std::mem::take(&mut self.later) {
                self.pass_on(number, files, io);
            }
        }
        self.end_shared(into, before);
    }
}

/// What an operation syncs: the data file (1), the meta file (2), both, or nothing.
fn synced_by(io: &DiskIo) -> u8 {
    match io {
        DiskIo::Sync { file: FileKind::Data, .. } => 1,
        DiskIo::Sync { file: FileKind::Meta, map } => 2 | u8::from(*map),
        _ => 0,
    }
}
