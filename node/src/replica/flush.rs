//! Making answered writes durable (R9). One pass runs at a time; what comes meanwhile shares the next one.
//!
//! ```text
//! modified map pages ─► sync meta ─┐
//! sync data ───────────────────────┼─► answer
//! new presence bits, by a metadata ┘
//! pass
//! ```
//!
//! Everything that had been answered when a pass begins is on its way: data writes have ended, and their sums stand
//! in map pages, which are written as they are at that moment. A page of which a write is in flight is waited for
//! and written again if it was modified since.

use std::collections::BTreeSet;

use proto::frame::{Code, Reply};
use proto::id::FlushNo;

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
            running: None,
            data_written: true,
            meta_written: true,
        }
    }
}

#[derive(Debug)]
struct FlushPass {
    number: FlushNo,
    requests: Vec<u64>,
    /// Map pages whose write is awaited.
    writing: BTreeSet<u64>,
    /// Among them those that are to be written once more.
    again: BTreeSet<u64>,
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
        if self.flush.running.is_some() || self.flush.pending.is_empty() {
            return;
        }
        let requests = std::mem::take(&mut self.flush.pending);
        self.flush.begun = self.flush.begun.max(std::mem::take(&mut self.flush.next));
        let modified = std::mem::take(&mut self.map.modified);
        let in_flight: BTreeSet<u64> = self.map.writing().into_iter().collect();
        let again: BTreeSet<u64> = modified.intersection(&in_flight).copied().collect();
        let now: Vec<u64> = modified.difference(&in_flight).copied().collect();
        self.map.modified = again.clone();
        let writing = modified.union(&in_flight).copied().collect();
        let presence_stored = !self.store_presence();
        self.flush.running = Some(FlushPass {
            number: self.flush.begun,
            requests,
            writing,
            again,
            data_synced: !self.flush.data_written,
            meta: MetaSync::Writing,
            presence_stored,
        });
        self.write_map_pages(&now, out);
        if std::mem::take(&mut self.flush.data_written) {
            self.disk(Io::FlushSync(FileKind::Data), DiskIo::Sync { file: FileKind::Data }, out);
        }
        self.continue_flush(out);
    }

    /// A write of map pages has ended, a flush's or another.
    pub(super) fn flush_map_written(&mut self, first: u64, count: u64, out: &mut Vec<Output>) {
        let Some(pass) = &mut self.flush.running else { return };
        let mut again = Vec::new();
        for page in first..first + count {
            if pass.again.remove(&page) && self.map.modified.contains(&page) {
                again.push(page);
            } else {
                pass.writing.remove(&page);
            }
        }
        self.write_map_pages(&again, out);
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
        if pass.meta == MetaSync::Writing && pass.writing.is_empty() {
            if std::mem::take(&mut self.flush.meta_written) {
                pass.meta = MetaSync::Syncing;
                return self.disk(Io::FlushSync(FileKind::Meta), DiskIo::Sync { file: FileKind::Meta }, out);
            }
            pass.meta = MetaSync::Done;
        }
        if !(pass.data_synced && pass.meta == MetaSync::Done && pass.presence_stored) {
            return;
        }
        let pass = self.flush.running.take().expect("seen above");
        self.flush.completed = self.flush.completed.max(pass.number);
        for id in pass.requests {
            if let Some(op) = self.ops.remove(&id) {
                let done = Reply::Done(op.kind);
                self.finish(op, done, out);
            }
        }
    }
}
