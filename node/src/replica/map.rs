//! Which blocks are allocated, and their sums (R10): the pages of the block map that are in memory.
//!
//! ```text
//! absent ──► loading ──► ready ──► (written back if modified) ──► absent
//!               │ │  ▲
//!               │ └──┴─ sweeping: left-over bytes of unallocated blocks are freed
//!               └─ bad ──► marking: its regions become durably dirty ──► ready, every block unverified
//! ```
//!
//! A page that allocates blocks is written only by a flush, after their data; when such pages fill the memory, a
//! flush is begun for their sake, and above [`SLACK`] more requests wait for their pages.
//!
//! A power cut can leave bytes in a block that the map has for unallocated: a write whose allocation was lost, a punch
//! that was lost. They must never come back (R10), not even when the map page is lost later and the block's bytes
//! are all there is. So where regions were dirty when the process started, unallocated blocks are punched before
//! their map page is used; the flush that R8 asks for before such a region is served makes that durable. What
//! can't be punched is unverified, never zeroes. What a killed process had written is told from them by the `journal`.

use std::collections::BTreeSet;

use bytes::{Bytes, BytesMut};
use proto::frame::Code;
use proto::id::{BlockIndex, RegionIndex};
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

use super::bitset::BitSet;
use super::dirty_log::{Waiter, runs};
use super::interface::{DiskData, DiskError, DiskIo, FaultReason, FileKind, Notice, Output};
use super::journal::add_to_runs;
use super::layout::{self, DISOWNED, MAP_BLOCKS, MAP_REGIONS, MapPage, PAGE};
use super::state::{ById, Io, ReplicaCore};

/// Pages that stay in memory when a replica has had nothing to do for [`IDLE_MS`].
const IDLE_PAGES: usize = 64;
/// After this time without a request a replica gives memory back.
const IDLE_MS: u64 = 10_000;
/// The least that the memory is bounded to: requests that need two pages must find room for both.
const MIN_PAGES: usize = if cfg!(test) { 1 } else { 64 };
/// Pages above the limit at which loading waits: more than all requests in flight can hold in memory.
const SLACK: usize = 1024;
/// Map pages in one disk write.
const MAX_WRITE_PAGES: u64 = 64;

/// The pages in memory, with a clock hand that looks for one to drop.
#[derive(Debug)]
pub(super) struct MapCache {
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: ById<u64, u32>,
    hand: usize,
    limit: usize,
    /// Pages have come, or may go now: there may be too many.
    crowded: bool,
    /// Above so many pages no more are loaded.
    hard_limit: usize,
    /// Requests that wait for room.
    stalled: Vec<u64>,
    /// Pages that differ from the disk.
    modified: BTreeSet<u64>,
    /// Writes of single pages in flight, outside of flushes.
    pub(super) writing_back: u32,
    /// Pages with a region that was dirty when the process started, and that have not been swept since.
    pub(super) unswept: BitSet,
}

#[derive(Debug)]
struct Slot {
    page: u64,
    state: SlotState,
    /// Requests that wait for the page; on a page that is ready, requests that wait for its neighbour.
    waiters: Vec<u64>,
    /// Requests that will change the page when their data is on the disk.
    pins: u32,
    modified: bool,
    /// It allocates blocks whose data may not be durable yet.
    allocates: bool,
    writing: bool,
    /// Used since the hand passed.
    used: bool,
}

#[derive(Debug)]
enum SlotState {
    Absent,
    Loading,
    /// Bad as far as these regions go, which are being marked.
    Marking(Box<MapPage>, Vec<u64>),
    /// Unallocated blocks are being punched; so many punches have not ended.
    Sweeping(Box<MapPage>, u32),
    Ready(Box<MapPage>),
}

impl MapCache {
    pub(super) fn new(limit: usize, pages: u64) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            index: ById::default(),
            hand: 0,
            limit: limit.max(MIN_PAGES),
            crowded: false,
            hard_limit: limit.max(MIN_PAGES) + SLACK,
            stalled: Vec::new(),
            modified: BTreeSet::new(),
            writing_back: 0,
            unswept: BitSet::new(pages),
        }
    }

    pub(super) fn set_limit(&mut self, pages: usize) {
        self.limit = pages.max(MIN_PAGES);
        self.hard_limit = self.limit + SLACK;
        self.crowded = true;
    }

    fn slot(&mut self, page: u64) -> Option<&mut Slot> {
        self.index.get(&page).map(|i| &mut self.slots[*i as usize])
    }

    /// The page, if it is in memory.
    pub(super) fn get(&self, page: u64) -> Option<&MapPage> {
        match &self.slots[*self.index.get(&page)? as usize].state {
            SlotState::Ready(map) => Some(map),
            _ => None,
        }
    }

    fn insert(&mut self, page: u64, state: SlotState) {
        let slot = Slot {
            page,
            state,
            waiters: Vec::new(),
            pins: 0,
            modified: false,
            allocates: false,
            writing: false,
            used: true,
        };
        let i = match self.free.pop() {
            Some(i) => {
                self.slots[i as usize] = slot;
                i
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.crowded = true;
        assert!(self.index.insert(page, i).is_none(), "map page {page} twice in memory");
    }

    fn remove(&mut self, page: u64) -> Vec<u64> {
        let i = self.index.remove(&page).expect("in memory");
        let slot = &mut self.slots[i as usize];
        assert!(slot.pins == 0 && !slot.modified && !slot.writing, "map page {page} dropped while in use");
        slot.state = SlotState::Absent;
        self.free.push(i);
        std::mem::take(&mut slot.waiters)
    }

    pub(super) fn pin(&mut self, page: u64) {
        let slot = self.slot(page).expect("a pinned page is in memory");
        slot.pins += 1;
    }

    pub(super) fn unpin(&mut self, page: u64) {
        let slot = self.slot(page).expect("a pinned page is in memory");
        slot.pins = slot.pins.checked_sub(1).expect("pins are counted");
    }

    /// The page, to be changed.
    pub(super) fn modify(&mut self, page: u64) -> &mut MapPage {
        let i = self.index[&page] as usize;
        let slot = &mut self.slots[i];
        if !slot.modified {
            slot.modified = true;
            self.modified.insert(page);
        }
        match &mut slot.state {
            SlotState::Ready(map) => map,
            other => panic!("map page {page} is changed while {other:?}"),
        }
    }

    /// Data has been written to these blocks of the page: they have these sums.
    /// Those that this allocates are added to `fresh`. Tells whether any was disowned.
    pub(super) fn set_sums(&mut self, page: u64, at: usize, sums: &[u32], fresh: &mut Vec<(u64, u32)>) -> bool {
        let map = self.modify(page);
        let (mut allocates, mut disowned) = (false, false);
        for (i, sum) in (at..).zip(sums) {
            if !map.is_allocated(i) || map.is_unverified(i) {
                allocates = true;
                disowned |= map.is_disowned(i);
                add_to_runs(fresh, page * MAP_BLOCKS + i as u64);
            }
            map.set(i, *sum);
        }
        self.slot(page).expect("modified above").allocates |= allocates;
        disowned
    }

    #[cfg(test)]
    pub(super) fn set_hard_limit(&mut self, pages: usize) {
        self.hard_limit = pages;
    }
}

/// What the map says of up to 256 blocks.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) sums: Vec<u32>,
    allocated: [u64; 4],
    unverified: [u64; 4],
}

impl Snapshot {
    pub(super) fn allocated(&self, i: usize) -> bool {
        self.allocated[i / 64] & (1 << (i % 64)) != 0
    }
    pub(super) fn unverified(&self, i: usize) -> bool {
        self.unverified[i / 64] & (1 << (i % 64)) != 0
    }
    /// See [`MapPage::is_disowned`].
    pub(super) fn disowned(&self, i: usize) -> bool {
        self.unverified(i) && self.sums[i] == DISOWNED
    }
}

/// The map page of a block, and the block's place in it.
pub(super) fn place(block: u64) -> (u64, usize) {
    (block / MAP_BLOCKS, (block % MAP_BLOCKS) as usize)
}

impl ReplicaCore {
    /// Whether the map pages of these blocks are in memory, where they exist. If not, they are loaded and request
    /// `id` goes on when one of them has come.
    pub(super) fn map_or_wait(&mut self, block: BlockIndex, count: u64, id: u64, out: &mut Vec<Output>) -> bool {
        let (first, last) = (place(block.0).0, place(block.0 + count - 1).0);
        let mut waiting = false;
        for page in first..=last {
            if !self.regions.present.get(page) {
                continue;
            }
            if !self.load_map(page, out) {
                self.map.stalled.push(id);
                waiting = true;
                break;
            }
            let slot = self.map.slot(page).expect("loaded above");
            slot.used = true;
            if !matches!(slot.state, SlotState::Ready(_)) && !waiting {
                slot.waiters.push(id);
                waiting = true;
            }
        }
        if first < last {
            self.keep_neighbours(first, last, id, waiting);
        }
        !waiting
    }

    /// While a request waits for one of its pages, the others stay in memory, or two requests could take each
    /// other's pages away for ever.
    fn keep_neighbours(&mut self, first: u64, last: u64, id: u64, waiting: bool) {
        for page in first..=last {
            let Some(slot) = self.map.slot(page).filter(|s| matches!(s.state, SlotState::Ready(_))) else { continue };
            slot.waiters.retain(|known| *known != id);
            if waiting {
                slot.waiters.push(id);
            }
        }
    }

    /// Begins to load a page that isn't in memory. False: there is no room.
    pub(super) fn load_map(&mut self, page: u64, out: &mut Vec<Output>) -> bool {
        if self.map.index.contains_key(&page) {
            return true;
        }
        if self.map.index.len() >= self.map.hard_limit {
            self.map.crowded = true;
            return false;
        }
        self.map.insert(page, SlotState::Loading);
        let read = DiskIo::Read { file: FileKind::Meta, offset: self.layout.map(page), len: PAGE as u32 };
        self.disk(Io::MapLoad { page }, read, out);
        true
    }

    /// What is known of these blocks, at most 256. Their pages are in memory where they exist.
    pub(super) fn snapshot(&self, block: BlockIndex, count: u64) -> Snapshot {
        assert!((1..=256).contains(&count), "a snapshot of {count} blocks");
        let mut snapshot = Snapshot { sums: vec![0; count as usize], allocated: [0; 4], unverified: [0; 4] };
        let mut page_of = None;
        for i in 0..count as usize {
            let (page, at) = place(block.0 + i as u64);
            if page_of.is_none_or(|(known, _)| known != page) {
                let present = self.regions.present.get(page);
                page_of = Some((page, present.then(|| self.map.get(page).expect("the map page is in memory"))));
            }
            let Some((_, Some(map))) = page_of else { continue };
            snapshot.sums[i] = map.sums[at];
            snapshot.allocated[i / 64] |= u64::from(map.is_allocated(at)) << (i % 64);
            snapshot.unverified[i / 64] |= u64::from(map.is_unverified(at)) << (i % 64);
        }
        snapshot
    }

    /// A first version of the page is on the disk, and empty.
    pub(super) fn map_initialised(&mut self, page: u64) {
        self.map.insert(page, SlotState::Ready(MapPage::empty()));
    }

    pub(super) fn map_loaded(&mut self, page: u64, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        let bytes = match &result {
            Ok(DiskData::Read(bytes)) => bytes.as_slice(),
            _ => &[],
        };
        let (map, bad) = layout::decode_map(bytes, page, self.config.ids.replica);
        let bad: Vec<u64> =
            (page * MAP_REGIONS..self.layout.regions).zip(bad).filter_map(|(r, bad)| bad.then_some(r)).collect();
        if bad.is_empty() {
            return self.sweep(page, map, out);
        }
        // Lost, torn or rotten: the blocks are unverified, never zeroes, and before anybody acts on that, or the
        // page is written again, its regions are durably dirty (R10).
        for region in &bad {
            out.push(Output::Notice(Notice::BadMap { region: RegionIndex(*region as u32) }));
        }
        self.distrust(bad.iter().copied());
        let regions = bad.clone();
        self.map.slot(page).expect("a page that loads has its slot").state = SlotState::Marking(map, bad);
        if self.may_change_or_wait(regions.into_iter(), false, Waiter::Page(page)) {
            self.bad_page_marked(page, out);
        }
    }

    /// Frees what unallocated blocks still hold, once after the process has started.
    fn sweep(&mut self, page: u64, map: Box<MapPage>, out: &mut Vec<Output>) {
        let first_block = page * MAP_BLOCKS;
        let left_over = |at: &u64| {
            let block = first_block + at;
            block < self.layout.blocks
                && !map.is_allocated(*at as usize)
                && !map.is_unverified(*at as usize)
                && self.regions.suspect.get(block / REGION_BLOCKS)
        };
        let pieces = match self.map.unswept.get(page) {
            true => runs((0..MAP_BLOCKS).filter(left_over)),
            false => Vec::new(),
        };
        self.map.unswept.clear(page);
        let slot = self.map.slot(page).expect("a page that loads has its slot");
        if pieces.is_empty() {
            slot.state = SlotState::Ready(map);
            return self.page_ready(page);
        }
        slot.state = SlotState::Sweeping(map, pieces.len() as u32);
        for (at, count) in pieces {
            let (offset, len) = ((first_block + at) * BLOCK_SIZE, count * BLOCK_SIZE);
            self.disk(Io::Sweep { page, at, count }, DiskIo::Punch { offset, len }, out);
        }
    }

    pub(super) fn swept(&mut self, page: u64, at: u64, count: u64, failed: bool, out: &mut Vec<Output>) {
        self.flush.data_written = true;
        if failed {
            out.push(Output::Notice(Notice::PunchFailed { block: BlockIndex(page * MAP_BLOCKS + at) }));
        }
        let slot = self.map.slot(page).expect("a page that is swept has its slot");
        let SlotState::Sweeping(map, left) = &mut slot.state else {
            panic!("map page {page} swept while not sweeping")
        };
        *left -= 1;
        if failed {
            (at..at + count).for_each(|i| map.distrust(i as usize));
            slot.modified = true;
        }
        let slot = self.map.slot(page).expect("seen above");
        if matches!(slot.state, SlotState::Sweeping(_, 0)) {
            let SlotState::Sweeping(map, _) = std::mem::replace(&mut slot.state, SlotState::Absent) else {
                unreachable!("seen above")
            };
            slot.state = SlotState::Ready(map);
            self.page_ready(page);
        }
    }

    /// A page that was changed before it was ready counts as modified from here on: a flush would write it.
    fn page_ready(&mut self, page: u64) {
        if self.map.slot(page).is_some_and(|slot| slot.modified) {
            self.map.modified.insert(page);
        }
        self.wake_page(page);
    }

    pub(super) fn bad_page_marked(&mut self, page: u64, out: &mut Vec<Output>) {
        let slot = self.map.slot(page).expect("a page that is marked has its slot");
        let SlotState::Marking(map, bad) = std::mem::replace(&mut slot.state, SlotState::Absent) else {
            panic!("map page {page} is marked without being bad")
        };
        if bad.iter().all(|region| self.regions.durable.get(*region)) {
            slot.modified = true;
            let map = if mutant::is(Mutant::BadMapReadsAsZeroes) { MapPage::empty() } else { map };
            return self.sweep(page, map, out);
        }
        // No space for the dirty bits. The page stays bad on the disk and is found again.
        for id in self.map.remove(page) {
            if let Some(op) = self.ops.remove(&id) {
                if op.ended || op.ios > 0 {
                    self.ops.insert(id, op);
                } else {
                    self.fail(op, Code::NoSpace, 0, out);
                }
            }
        }
    }

    fn wake_page(&mut self, page: u64) {
        let slot = self.map.slot(page).expect("in memory");
        let waiters = std::mem::take(&mut slot.waiters);
        self.ready.extend(waiters);
    }

    /// Drops pages, or begins to write modified ones back, while there are too many. Only at the end of a step, when
    /// every request that goes on waiting stands in the table.
    pub(super) fn make_room(&mut self, out: &mut Vec<Output>) {
        // While requests wait for room, any step may have made some.
        if std::mem::take(&mut self.map.crowded) || !self.map.stalled.is_empty() {
            let limit = self.map.limit;
            self.shrink_map(limit, out);
            if self.map.index.len() < self.map.hard_limit {
                self.ready.extend(std::mem::take(&mut self.map.stalled));
            }
        }
    }

    fn shrink_map(&mut self, limit: usize, out: &mut Vec<Output>) {
        // The first round may find every page just used.
        let mut looks = self.map.slots.len() * 2;
        while self.map.index.len() > limit && looks > 0 {
            looks -= 1;
            self.map.hand = (self.map.hand + 1) % self.map.slots.len();
            let slot = &mut self.map.slots[self.map.hand];
            if !matches!(slot.state, SlotState::Ready(_)) || slot.pins > 0 || slot.writing {
                continue;
            }
            slot.waiters.retain(|id| self.ops.contains_key(id));
            if !slot.waiters.is_empty() {
                continue;
            }
            let page = slot.page;
            if std::mem::take(&mut slot.used) {
                continue;
            }
            if !slot.modified {
                self.map.remove(page);
            } else if self.flush.is_due() {
                // The flush writes it.
            } else if slot.allocates {
                self.flush.wanted = true;
            } else {
                // It can be dropped when it has been written. Its data may reach the disk later than it does: a
                // crash then leaves a mismatch in a dirty region.
                self.map.writing_back += 1;
                let (bytes, _) = self.encode_map(page, 1);
                self.write_map(page, 1, bytes, false, out);
            }
        }
    }

    /// Gives memory back when there is nothing to do.
    pub(super) fn trim_map(&mut self, out: &mut Vec<Output>) {
        if self.is_open() && self.now - self.busy_at > IDLE_MS && self.map.index.len() > IDLE_PAGES {
            self.shrink_map(IDLE_PAGES, out);
            if self.map.index.len() <= IDLE_PAGES {
                let kept = self.map.slots.iter().rposition(|s| !matches!(s.state, SlotState::Absent));
                self.map.slots.truncate(kept.map_or(0, |i| i + 1));
                let len = self.map.slots.len() as u32;
                self.map.free.retain(|i| *i < len);
                self.map.slots.shrink_to_fit();
            }
        }
    }

    /// Every modified page as it is now, to be written, in runs; and whether any of them allocates blocks.
    pub(super) fn take_modified_map(&mut self) -> (Vec<(u64, u64, Bytes)>, bool) {
        let (mut taken, mut any_allocates) = (Vec::new(), false);
        for (first, count) in runs(std::mem::take(&mut self.map.modified).into_iter()) {
            for at in (first..first + count).step_by(MAX_WRITE_PAGES as usize) {
                let n = (first + count - at).min(MAX_WRITE_PAGES);
                let (bytes, allocates) = self.encode_map(at, n);
                any_allocates |= allocates;
                taken.push((at, n, bytes));
            }
        }
        (taken, any_allocates)
    }

    /// The bytes of modified pages, which count as being written from here on; and whether they allocate blocks.
    fn encode_map(&mut self, first: u64, count: u64) -> (Bytes, bool) {
        let mut bytes = BytesMut::with_capacity((count * PAGE) as usize);
        let mut any_allocates = false;
        for page in first..first + count {
            let slot = self.map.slot(page).expect("a modified page is in memory");
            assert!(slot.modified && !slot.writing, "map page {page} written twice at a time");
            (slot.modified, slot.writing) = (false, true);
            any_allocates |= std::mem::take(&mut slot.allocates);
            let SlotState::Ready(map) = &slot.state else { panic!("map page {page} written while {:?}", slot.state) };
            layout::encode_map(&mut bytes, page, self.config.ids.replica, map);
            self.map.modified.remove(&page);
        }
        (bytes.freeze(), any_allocates)
    }

    pub(super) fn write_map(&mut self, first: u64, count: u64, bytes: Bytes, flush: bool, out: &mut Vec<Output>) {
        let write = DiskIo::Write { file: FileKind::Meta, offset: self.layout.map(first), bytes };
        self.disk(Io::MapWrite { first, count, flush }, write, out);
    }

    pub(super) fn map_written(
        &mut self,
        first: u64,
        count: u64,
        flush: bool,
        result: Result<DiskData, DiskError>,
        out: &mut Vec<Output>,
    ) {
        if let Err(error) = result {
            return self.fault(FaultReason::MetaWrite(error), out);
        }
        for page in first..first + count {
            let slot = self.map.slot(page).expect("a page that is written stays in memory");
            slot.writing = false;
        }
        self.flush.meta_written = true;
        self.map.crowded = true;
        if flush {
            self.flush_map_written(out);
        } else {
            self.map.writing_back -= 1;
        }
    }
}
