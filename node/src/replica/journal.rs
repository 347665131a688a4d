//! The allocation journal: what a killed process knew of fresh blocks, and no flush had told the disk yet.
//!
//! A map page that allocates blocks is written only by a flush (R10), so a process that is killed before takes the
//! allocations with it, although the page cache still holds the data. So a request that allocated blocks is answered
//! only after a record (first block, count) of them has been written here, after its data; nothing is synced.
//! Requests that come meanwhile share the next write. A request that allocates nothing has nothing to do with this.
//!
//! ```text
//! write data ──► sums in the map ──► allocated blocks? ──► journal page ──► answer (FUA: flush pass)
//!                                        └─ no ─────────────────────────────┘
//! ```
//!
//! Each page tells in which era of the page cache it was written. It is believed in the same one only: after a power
//! cut the page may be on the disk while the data is not, and a fault, or a sync that fails while the replica is
//! opened, drops the cache. What it names was written before it was, so in the same era the page cache has that data,
//! or what came after it: a later write, or the zeroes of a later discard. When the replica is opened, such blocks of dirty regions
//! that the map has for unallocated become unverified, for equalising to settle, instead of being freed; they are
//! made durable before their map pages say so (R10).
//!
//! The records fill [`JOURNAL_PAGES`] pages in turn, numbered on and on. A flush pass begins a new page, and when it
//! has ended the older ones may be used again; every page tells the oldest that still counts. Each version of a page
//! is written beside the one before, so that a torn one takes nothing along that was answered. Where no page is free,
//! requests wait for a flush pass that is begun for their sake (R11); one is begun when half of them are full. A
//! record that is older than the last flush does no harm: its blocks are allocated, or hold zeroes.
//!
//! Together with the page cache the journal keeps everything that was answered, as long as only processes end. Whether
//! that has been so goes from process to process as a bit of every page, *whole*. Without it the replica opens with
//! losses, if any region was dirty, and becomes whole again when its last suspect region is settled: from then on it
//! holds all that the members hold. The next process of this era tells the gateway (`AttachInfo::kept`), which then
//! treats its restart as none (R8).

use std::collections::VecDeque;

use bytes::BytesMut;

use super::interface::{DiskData, DiskError, DiskIo, FaultReason, FileKind, Output};
use super::layout::{self, JOURNAL_PAGES, JOURNAL_RECORDS, JOURNAL_SLOTS, JournalPage, PAGE};
use super::state::{Io, Op, ReplicaCore};

/// Newest records that are looked through for a neighbour of a new one.
const MERGE_LOOK: usize = 16;

/// Records, and requests that wait for theirs.
#[derive(Debug)]
pub(super) struct Journal {
    /// The oldest page whose records no flush has covered.
    oldest: u64,
    /// The page that is being filled; free only below `oldest + JOURNAL_PAGES`.
    current: u64,
    /// What it holds, and how often it has been written.
    records: Vec<(u64, u32)>,
    versions: u64,
    /// Requests whose records are in no page yet.
    pending: VecDeque<(u64, Vec<(u64, u32)>)>,
    /// Requests whose records are being written.
    writing: Option<Vec<u64>>,
    /// Whatever this replica ever answered is still there.
    whole: bool,
    /// It was when this process opened it.
    pub(super) opened_whole: bool,
    /// No page says yet whether it is whole.
    unsaid: bool,
}

impl Default for Journal {
    fn default() -> Self {
        Self {
            oldest: 1,
            current: 1,
            records: Vec::new(),
            versions: 0,
            pending: VecDeque::new(),
            writing: None,
            whole: false,
            opened_whole: false,
            unsaid: true,
        }
    }
}

impl Journal {
    fn begin_page(&mut self) {
        self.current += 1;
        self.records.clear();
        self.versions = 0;
    }

    /// A flush pass begins, which covers all records so far; tells the first page that it does not cover.
    pub(super) fn begin_pass(&mut self) -> u64 {
        if !self.records.is_empty() {
            self.begin_page();
        }
        self.current
    }

    /// The records of pages below `first` are durable in the map.
    pub(super) fn flushed(&mut self, first: u64) {
        self.oldest = self.oldest.max(first);
    }

    fn add(&mut self, block: u64, count: u32) {
        for (first, n) in self.records.iter_mut().rev().take(MERGE_LOOK) {
            if *first + u64::from(*n) == block && n.checked_add(count).is_some() {
                *n += count;
                return;
            }
        }
        self.records.push((block, count));
    }

    /// Takes what an earlier process of this era left, from the slots in order; tells the blocks it names.
    pub(super) fn recover(&mut self, pages: &[JournalPage]) -> Vec<(u64, u32)> {
        let Some(newest) = pages.iter().max_by_key(|p| p.number) else { return Vec::new() };
        self.current = newest.number + 1;
        (self.whole, self.opened_whole, self.unsaid) = (newest.whole, newest.whole, false);
        let floor = pages.iter().map(|p| p.oldest).max().expect("there is one");
        let counting: Vec<&JournalPage> = pages.iter().filter(|p| p.number >= floor).collect();
        // They count until a flush has ended: what the map is told of them is not all durable before.
        self.oldest = counting.iter().map(|p| p.number).min().unwrap_or(self.current);
        counting.into_iter().flat_map(|p| p.records.iter().copied()).collect()
    }
}

/// Adds a block to ascending runs.
pub(super) fn add_to_runs(runs: &mut Vec<(u64, u32)>, block: u64) {
    match runs.last_mut() {
        Some((first, count)) if *first + u64::from(*count) == block => *count += 1,
        _ => runs.push((block, 1)),
    }
}

impl ReplicaCore {
    /// Whether allocations are journaled at all.
    pub(super) fn journals(&self) -> bool {
        self.config.era != [0; 16]
    }

    /// The request's blocks have just been allocated; it goes on when a record of them has been written.
    pub(super) fn journal(&mut self, id: u64, mut op: Op, fresh: Vec<(u64, u32)>) {
        // Counts as a disk operation: no newer attach begins before it has ended, for a later write to the same blocks
        // allocates nothing and would not wait for it.
        op.ios += 1;
        self.ops.insert(id, op);
        self.journal.pending.push_back((id, fresh));
    }

    pub(super) fn start_journal_write(&mut self, out: &mut Vec<Output>) {
        let journal = &mut self.journal;
        if journal.writing.is_some() || (journal.pending.is_empty() && !journal.unsaid) {
            return;
        }
        let mut ids = Vec::new();
        while let Some((id, fresh)) = journal.pending.front() {
            let used = journal.current - journal.oldest;
            if used >= JOURNAL_PAGES / 2 && !self.flush.is_running() {
                self.flush.wanted = true;
            }
            if used >= JOURNAL_PAGES {
                break;
            }
            if journal.records.len() + fresh.len() > JOURNAL_RECORDS {
                if !ids.is_empty() {
                    // What is new in this page is written first.
                    break;
                }
                journal.begin_page();
                continue;
            }
            ids.push(*id);
            let (_, fresh) = journal.pending.pop_front().expect("seen above");
            fresh.into_iter().for_each(|(block, count)| journal.add(block, count));
        }
        let free = journal.current - journal.oldest < JOURNAL_PAGES;
        if ids.is_empty() && !(journal.unsaid && free) {
            return;
        }
        journal.unsaid = false;
        journal.writing = Some(ids);
        let version = journal.versions;
        journal.versions += 1;
        let (number, oldest, whole) = (journal.current, journal.oldest, journal.whole);
        let page = JournalPage { number, oldest, whole, records: journal.records.clone() };
        self.write_journal_page(&page, version, Io::Journal, out);
    }

    pub(super) fn write_journal_page(&mut self, page: &JournalPage, version: u64, io: Io, out: &mut Vec<Output>) {
        let slot = page.number % JOURNAL_PAGES * 2 + version % 2;
        let mut bytes = BytesMut::with_capacity(PAGE as usize);
        layout::encode_journal(&mut bytes, slot, self.config.ids.replica, self.config.era, page);
        let offset = self.layout.journal(slot);
        self.disk(io, DiskIo::Write { file: FileKind::Meta, offset, bytes: bytes.freeze() }, out);
    }

    pub(super) fn journal_written(&mut self, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        let ids = self.journal.writing.take().expect("a journal write that ends has begun");
        // The pages were written when the replica was made, so space is no reason on most file systems.
        if let Err(error) = result {
            return self.fault(FaultReason::MetaWrite(error), out);
        }
        for id in ids {
            let mut op = self.ops.remove(&id).expect("a request outlives its disk operations");
            op.ios -= 1;
            self.written(id, op, out);
        }
    }

    /// The pages of this era, whatever their age.
    pub(super) fn decode_journal(&self, bytes: &[u8]) -> Vec<JournalPage> {
        if !self.journals() {
            return Vec::new();
        }
        (0..JOURNAL_SLOTS)
            .zip(bytes.chunks_exact(PAGE as usize))
            .filter_map(|(slot, page)| layout::decode_journal(page, slot, self.config.ids.replica, self.config.era))
            // Nobody counts so far, and the next one must fit.
            .filter(|page| page.number <= u64::MAX / 2)
            .filter(|page| page.number.checked_sub(page.oldest).is_some_and(|n| n < JOURNAL_PAGES))
            .collect()
    }

    /// Nothing is lost, or nothing of it is lacking any more, once no region is suspect.
    pub(super) fn find_whole(&mut self) {
        if self.journals() && !self.journal.whole && self.regions.suspect.ones() == 0 {
            // In a page of its own: two versions of one say the same of this.
            self.journal.begin_page();
            (self.journal.whole, self.journal.unsaid) = (true, true);
        }
    }
}
