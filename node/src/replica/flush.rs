//! Making answered writes durable (R9). One pass runs at a time; what comes meanwhile shares the next one.
//!
//! ```text
//! sync data ──► write map pages ──► sync meta ──► answer
//! new presence bits, by a metadata pass ──────────┘
//! ```
//!
//! Everything that had been answered when a pass begins is on its way: data writes have ended, and their sums stand
//! in map pages, which are written as they are at that moment. A page that allocates blocks is written only after
//! their data is durable (R10): otherwise a crash could leave the allocation without the data, and bytes that lay
//! there before would be taken for the block's. Where nothing was allocated, data and map pages go out together.
//!
//! A pass without requests brings allocations to the disk for the sake of the memory, or of the allocation journal:
//! see `map` and `journal`.

use bytes::Bytes;
use proto::frame::{Code, Reply};
use proto::id::FlushNo;
use proto::mutant::{self, Mutant};

use super::interface::{DiskData, DiskError, DiskIo, FaultReason, FileKind, Output};
use super::state::{Io, Op, ReplicaCore};

/// Flushes, and writes that are durable before they are answered.
#[derive(Debug)]
pub(super) struct FlushState {
    /// The newest flush of the current attach that has begun.
    pub(super) begun: FlushNo,
    /// The newest one that has ended.
    pub(super) completed: FlushNo,
    /// The newest one that waits for the next pass; 0: none.
    next: FlushNo,
    pending: Vec<u64>,
    /// The memory, or the journal, is full of allocations.
    pub(super) wanted: bool,
    running: Option<FlushPass>,
    /// Something has been written to the data file since it was last synced, as far as is known.
    pub(super) data_written: bool,
    /// Map pages have been written since the meta file was last synced.
    pub(super) meta_written: bool,
}

impl Default for FlushState {
    /// What an earlier process wrote, and the system has not yet brought to the disk, is to be synced too.
    fn default() -> Self {
        Self {
            begun: FlushNo(0),
            completed: FlushNo(0),
            next: FlushNo(0),
            pending: Vec::new(),
            wanted: false,
            running: None,
            data_written: true,
            meta_written: true,
        }
    }
}

#[derive(Debug)]
struct FlushPass {
    number: FlushNo,
    /// Journal pages below this one are covered.
    journal: u64,
    requests: Vec<u64>,
    /// Map pages as they were when the pass began, not written yet: first, count, bytes.
    held: Vec<(u64, u64, Bytes)>,
    /// They allocate blocks.
    data_first: bool,
    /// Writes of map pages in flight.
    writing: u32,
    data_synced: bool,
    meta: MetaSync,
    presence_stored: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum MetaSync {
    Writing,
    Syncing,
    Done,
}

impl FlushState {
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }
    /// A pass runs, or is to.
    pub(super) fn is_due(&self) -> bool {
        self.running.is_some() || self.wanted || !self.pending.is_empty()
    }
    /// Begins to count for a new attach.
    pub(super) fn restart(&mut self) {
        assert!(self.running.is_none(), "a flush of an older attach runs");
        self.pending.clear();
        (self.begun, self.completed, self.next) = (FlushNo(0), FlushNo(0), FlushNo(0));
    }
}

impl ReplicaCore {
    pub(super) fn flush_request(&mut self, id: u64, op: Op, flush: FlushNo, out: &mut Vec<Output>) {
        let current = self.attach.current.as_mut().expect("checked");
        if flush <= current.last_flush {
            return self.fail(op, Code::Invalid, 0, out);
        }
        current.last_flush = flush;
        if mutant::is(Mutant::FlushAtOnce) {
            let done = Reply::Done(op.kind);
            return self.finish(op, done, out);
        }
        self.flush.next = flush;
        self.flush.pending.push(id);
        self.ops.insert(id, op);
    }

    /// A write that must be durable before it is answered, and whose data has been written.
    pub(super) fn flush_write(&mut self, id: u64, op: Op) {
        self.flush.pending.push(id);
        self.ops.insert(id, op);
    }

    pub(super) fn start_flush_pass(&mut self, out: &mut Vec<Output>) {
        // Pages that are being written back would be written twice at a time; no more of that begins meanwhile.
        if self.flush.running.is_some() || !self.flush.is_due() || self.map.writing_back > 0 {
            return;
        }
        self.flush.wanted = false;
        let requests = std::mem::take(&mut self.flush.pending);
        self.flush.begun = self.flush.begun.max(std::mem::take(&mut self.flush.next));
        let journal = self.journal.begin_pass();
        let (held, data_first) = self.take_modified_map();
        let presence_stored = !self.store_presence();
        let unsynced = std::mem::take(&mut self.flush.data_written);
        self.flush.running = Some(FlushPass {
            number: self.flush.begun,
            journal,
            requests,
            held,
            data_first,
            writing: 0,
            data_synced: !unsynced,
            meta: MetaSync::Writing,
            presence_stored,
        });
        if unsynced {
            self.disk(Io::FlushSync(FileKind::Data), DiskIo::Sync { file: FileKind::Data, map: false }, out);
        }
        self.continue_flush(out);
    }

    /// A write of this pass's map pages has ended.
    pub(super) fn flush_map_written(&mut self, out: &mut Vec<Output>) {
        let pass = self.flush.running.as_mut().expect("the pass of this write");
        pass.writing -= 1;
        self.continue_flush(out);
    }

    pub(super) fn flush_presence_stored(&mut self, failed: bool, out: &mut Vec<Output>) {
        if failed {
            return self.fault(FaultReason::MetaWrite(DiskError::NoSpace), out);
        }
        let pass = self.flush.running.as_mut().expect("a flush waits for its presence bits");
        pass.presence_stored = true;
        self.continue_flush(out);
    }

    pub(super) fn flush_synced(&mut self, file: FileKind, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        if result.is_err() {
            return self.fault(FaultReason::Sync(file), out);
        }
        let pass = self.flush.running.as_mut().expect("the pass of this sync");
        match file {
            FileKind::Data => pass.data_synced = true,
            FileKind::Meta => pass.meta = MetaSync::Done,
        }
        self.continue_flush(out);
    }

    fn continue_flush(&mut self, out: &mut Vec<Output>) {
        let Some(pass) = &mut self.flush.running else { return };
        if !pass.data_first || pass.data_synced || mutant::is(Mutant::AllocatedAhead) {
            let held = std::mem::take(&mut pass.held);
            pass.writing += held.len() as u32;
            held.into_iter().for_each(|(first, count, bytes)| self.write_map(first, count, bytes, true, out));
        }
        let pass = self.flush.running.as_mut().expect("seen above");
        if pass.meta == MetaSync::Writing && pass.held.is_empty() && pass.writing == 0 {
            if std::mem::take(&mut self.flush.meta_written) {
                pass.meta = MetaSync::Syncing;
                return self.disk(Io::FlushSync(FileKind::Meta), DiskIo::Sync { file: FileKind::Meta, map: true }, out);
            }
            pass.meta = MetaSync::Done;
        }
        if !(pass.data_synced && pass.meta == MetaSync::Done && pass.presence_stored) {
            return;
        }
        let pass = self.flush.running.take().expect("seen above");
        self.flush.completed = self.flush.completed.max(pass.number);
        self.journal.flushed(pass.journal);
        for id in pass.requests {
            if let Some(op) = self.ops.remove(&id) {
                let done = Reply::Done(op.kind);
                self.finish(op, done, out);
            }
        }
    }
}
