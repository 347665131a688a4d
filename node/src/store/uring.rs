//! Disk operations through an io_uring of the data thread's own.
//!
//! Operations gather in the submission queue and start with one `io_uring_enter` per wake-up; what has ended is
//! told through an eventfd that the thread's runtime watches.
#![expect(unsafe_code, reason = "the ring takes raw pointers; each block says why they stay valid")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::event::EventfdFlags;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use super::engine::Finished;
use super::file::SyncStep;
use super::{FilePair, describe, outcome};
use crate::replica::{DiskData, DiskIo, FileKind};

/// Operations in the kernel at a time; more wait here, bounded by the replicas' own limits.
const ENTRIES: u32 = 256;

/// The data thread's ring.
pub struct UringEngine {
    ring: IoUring,
    slots: Vec<Option<Running>>,
    free: Vec<u32>,
    waiting: VecDeque<(u64, Arc<FilePair>, DiskIo)>,
    waiter: Rc<UringWaiter>,
    /// The submission queue has entries that the kernel has not been told of.
    unsubmitted: bool,
}

impl std::fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringEngine").field("waiting", &self.waiting.len()).finish_non_exhaustive()
    }
}

/// What the kernel has in hand. Owns the buffer and keeps the file open until the operation has ended.
struct Running {
    number: u64,
    files: Arc<FilePair>,
    io: DiskIo,
    /// A read's buffer, with room for what was asked for.
    bytes: Vec<u8>,
    /// Bytes read or written so far.
    done: usize,
    /// What a sync is at.
    step: Option<SyncStep>,
}

/// Watches the ring's eventfd.
#[derive(Debug)]
pub struct UringWaiter {
    event: AsyncFd<OwnedFd>,
}

impl UringWaiter {
    pub(super) async fn wait(&self) -> io::Result<()> {
        let mut ready = self.event.readable().await?;
        let mut count = [0; 8];
        match rustix::io::read(self.event.get_ref(), &mut count) {
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => ready.clear_ready(),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl UringEngine {
    pub(super) fn start() -> io::Result<Self> {
        let ring = IoUring::builder().build(ENTRIES)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE] {
            if !probe.is_supported(code) {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring lacks an operation"));
            }
        }
        let event = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        // SAFETY: an `OwnedFd` is its descriptor for as long as it lives, and the `AsyncFd` owns it.
        let event = unsafe { AsyncFd::register_with_interest(event, tokio::io::Interest::READABLE) }?;
        Ok(Self {
            ring,
            slots: (0..ENTRIES).map(|_| None).collect(),
            free: (0..ENTRIES).rev().collect(),
            waiting: VecDeque::new(),
            waiter: Rc::new(UringWaiter { event }),
            unsubmitted: false,
        })
    }

    pub(super) fn waiter(&self) -> Rc<UringWaiter> {
        self.waiter.clone()
    }

    pub(super) fn submit(&mut self, number: u64, files: Arc<FilePair>, io: DiskIo) {
        self.waiting.push_back((number, files, io));
        self.fill();
    }

    fn fill(&mut self) {
        while !self.waiting.is_empty() {
            let Some(slot) = self.free.pop() else { return };
            let (number, files, io) = self.waiting.pop_front().expect("seen above");
            let len = if let DiskIo::Read { len, .. } = &io { *len as usize } else { 0 };
            let step = if let DiskIo::Sync { file, map } = &io { Some(files.sync_step(*file, *map)) } else { None };
            let bytes = proto::buffer::take(len);
            self.slots[slot as usize] = Some(Running { number, files, io, bytes, done: 0, step });
            self.push(slot);
        }
    }

    /// Queues the rest of a slot's operation. There are as many slots as queue entries, so there is always room.
    fn push(&mut self, slot: u32) {
        let running = self.slots[slot as usize].as_mut().expect("the slot is taken");
        let entry = running.entry().user_data(slot.into());
        // SAFETY: the entry's pointers go into a buffer that the slot owns (a read's `bytes`, which is neither
        // moved in memory nor touched, or a write's `Bytes`), of a file that the slot keeps open. The slot is
        // emptied only when the completion with its number has been taken; `drop` waits for all of them.
        unsafe { self.ring.submission().push(&entry) }.expect("as many entries as slots");
        self.unsubmitted = true;
    }

    pub(super) fn kick(&mut self) {
        while std::mem::take(&mut self.unsubmitted) {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => self.unsubmitted = true,
                // The kernel is short of memory, or completions have to be taken first: with the next kick.
                Err(error) => {
                    tracing::warn!(%error, "io_uring_enter");
                    self.unsubmitted = true;
                    return;
                }
            }
        }
    }

    pub(super) fn reap(&mut self, into: &mut Vec<Finished>) {
        loop {
            let ended: Vec<(u32, i32)> =
                self.ring.completion().map(|e: cqueue::Entry| (e.user_data() as u32, e.result())).collect();
            if ended.is_empty() {
                break;
            }
            for (slot, result) in ended {
                self.ended(slot, result, into);
            }
        }
        self.fill();
        self.kick();
    }

    fn ended(&mut self, slot: u32, result: i32, into: &mut Vec<Finished>) {
        let running = self.slots[slot as usize].as_mut().expect("an operation that ends has begun");
        if running.took(result) == Progress::More {
            return self.push(slot);
        }
        let running = self.slots[slot as usize].take().expect("seen above");
        self.free.push(slot);
        into.push((running.number, running.finish(result)));
    }
}

impl Drop for UringEngine {
    /// The kernel must be done with the buffers before they go.
    fn drop(&mut self) {
        self.waiting.clear();
        let mut ended = Vec::new();
        while self.slots.iter().any(Option::is_some) {
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                // Better to leak the buffers than to free what the kernel may write to.
                tracing::warn!(%error, "io_uring_enter at the end");
                self.slots.drain(..).for_each(std::mem::forget);
                return;
            }
            self.reap(&mut ended);
        }
    }
}

fn fd(file: &File) -> types::Fd {
    types::Fd(file.as_raw_fd())
}

#[derive(PartialEq, Eq)]
enum Progress {
    More,
    Ended,
}

impl Running {
    fn entry(&mut self) -> squeue::Entry {
        match &self.io {
            DiskIo::Read { file, offset, len } => {
                let (file, offset) = self.files.place(*file, *offset, (*len).into());
                let (fd, at, left) = (fd(file), offset + self.done as u64, len - self.done as u32);
                let to = self.bytes.spare_capacity_mut()[self.done..].as_mut_ptr().cast::<u8>();
                opcode::Read::new(fd, to, left).offset(at).build()
            }
            DiskIo::Write { file, offset, bytes } => {
                let (file, offset) = self.files.place(*file, *offset, bytes.len() as u64);
                let (at, rest) = (offset + self.done as u64, &bytes[self.done..]);
                opcode::Write::new(fd(file), rest.as_ptr(), rest.len() as u32).offset(at).build()
            }
            DiskIo::Punch { offset, len } => {
                let (file, offset) = self.files.place(FileKind::Data, *offset, *len);
                let mode = (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits() as i32;
                opcode::Fallocate::new(fd(file), *len).offset(offset).mode(mode).build()
            }
            DiskIo::Sync { .. } => {
                let part = self.step.expect("a sync has its step").part();
                opcode::Fsync::new(fd(self.files.part(part))).flags(types::FsyncFlags::DATASYNC).build()
            }
        }
    }

    /// Whether the operation has to go on after this result.
    fn took(&mut self, result: i32) -> Progress {
        if result == -Errno::INTR.raw_os_error() || result == -Errno::AGAIN.raw_os_error() {
            return Progress::More;
        }
        let wanted = match &self.io {
            DiskIo::Read { len, .. } => *len as usize,
            DiskIo::Write { bytes, .. } => bytes.len(),
            DiskIo::Punch { .. } | DiskIo::Sync { .. } => 0,
        };
        if let Some(step) = self.step.filter(|_| result == 0) {
            self.step = self.files.step_done(step);
            return if self.step.is_some() { Progress::More } else { Progress::Ended };
        }
        self.done += result.max(0) as usize;
        if result > 0 && self.done < wanted { Progress::More } else { Progress::Ended }
    }

    fn finish(mut self, result: i32) -> Result<DiskData, crate::replica::DiskError> {
        let ended = match (&self.io, result) {
            (_, ..0) => Err(io::Error::from_raw_os_error(-result)),
            (DiskIo::Read { len, .. }, _) if self.done < *len as usize => Err(io::ErrorKind::UnexpectedEof.into()),
            (DiskIo::Read { len, .. }, _) => {
                assert!(self.done == *len as usize && self.bytes.capacity() >= self.done, "read past the buffer");
                // SAFETY: the kernel has written `done` bytes from the start of the buffer on, which holds them.
                unsafe { self.bytes.set_len(self.done) };
                Ok(DiskData::Read(std::mem::take(&mut self.bytes)))
            }
            (DiskIo::Write { bytes, .. }, _) if self.done < bytes.len() => Err(io::ErrorKind::WriteZero.into()),
            _ => Ok(DiskData::None),
        };
        let (what, file, offset) = describe(&self.io);
        if let DiskIo::Write { bytes, .. } = &self.io {
            self.files.wrote(file, offset, bytes.len());
        }
        outcome(&self.files, what, file, offset, ended)
    }
}
