//! Regions and their dirty bits, and the pass that makes small metadata durable: dirty bits, first versions of map
//! pages, presence bits, superblocks.
//!
//! One pass runs at a time and takes everything that has gathered (group commit), so that many regions cost one
//! sync:
//!
//! ```text
//! write dirty pages, presence pages, first map pages, superblock copy 0 ─► sync ─► wake
//!        └─ only with a superblock: write copy 1 ─► sync ─► wake those that wait for it
//! ```

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};
use proto::frame::{CleanEntry, Code, Kind, RegionWindow, Reply, SetView};
use proto::id::{AttachId, BlockIndex, CleanNo, FlushNo, RegionIndex};
use proto::limits::{MAX_REPLICAS, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

use super::bitset::BitSet;
use super::interface::{DiskData, DiskError, DiskIo, FaultReason, FileKind, Output};
use super::layout::{self, BITMAP_BITS, BITMAP_WORDS, Layout, MAP_REGIONS, MapPage, PAGE, PageKind};
use super::state::{Body, ById, Changing, Io, Op, ReplicaCore};

/// Regions that are marked ahead of a sequential stream (R5), so that it waits for a sync once in that many MiB.
const MARK_AHEAD: u64 = 8;
/// Sequential streams that are told apart.
const STREAMS: usize = 8;

/// What is known of each region.
#[derive(Debug)]
pub(super) struct Regions {
    /// Replicas may differ here.
    pub(super) dirty: BitSet,
    /// The dirty bit is known to be on the disk: the region may be changed (R5).
    pub(super) durable: BitSet,
    /// Was dirty when the process started, or is damaged, and has not been equalised since.
    pub(super) suspect: BitSet,
    /// By map page: it has been written, so its absence is a loss.
    pub(super) present: BitSet,
    /// Regions that have changed, or are changing, under the current attach.
    changes: ById<u32, Change>,
    /// Where recent writes ended, oldest first from `next_stream`.
    streams: [u64; STREAMS],
    next_stream: usize,
}

/// When a region last changed (R6).
#[derive(Clone, Copy, Debug, Default)]
struct Change {
    /// The newest flush that had begun when the last change was complete.
    flush: FlushNo,
    in_flight: u32,
}

impl Regions {
    pub(super) fn new(layout: &Layout) -> Self {
        Self {
            dirty: BitSet::new(layout.regions),
            durable: BitSet::new(layout.regions),
            suspect: BitSet::new(layout.regions),
            present: BitSet::new(layout.map_pages),
            changes: ById::default(),
            streams: [u64::MAX; STREAMS],
            next_stream: 0,
        }
    }

    pub(super) fn begin_change(&mut self, region: u32) {
        self.changes.entry(region).or_default().in_flight += 1;
    }

    /// `begun` is the newest flush that has begun.
    pub(super) fn end_change(&mut self, region: u32, changed: bool, begun: FlushNo) {
        let change = self.changes.get_mut(&region).expect("a change that ends has begun");
        change.in_flight = change.in_flight.checked_sub(1).expect("changes are counted");
        if changed {
            change.flush = begun;
        }
        if change.in_flight == 0 && change.flush == FlushNo(0) && !changed {
            self.changes.remove(&region);
        }
    }

    /// Whether nothing has changed the region since flush `flush` began.
    fn unchanged_since(&self, region: u32, flush: FlushNo) -> bool {
        mutant::is(Mutant::CleanAsBoolean)
            || self.changes.get(&region).is_none_or(|c| c.in_flight == 0 && c.flush < flush)
    }

    pub(super) fn forget_changes(&mut self) {
        if mutant::is(Mutant::AttachWithoutDrain) {
            return;
        }
        assert!(self.changes.values().all(|c| c.in_flight == 0), "changes in flight at the start of an attach");
        self.changes.clear();
    }

    /// Notes where a write begins and ends; tells whether it goes on where another one ended.
    pub(super) fn follow_stream(&mut self, block: BlockIndex, end: u64) -> bool {
        if let Some(stream) = self.streams.iter_mut().find(|s| **s == block.0) {
            *stream = end;
            return true;
        }
        self.streams[self.next_stream] = end;
        self.next_stream = (self.next_stream + 1) % STREAMS;
        false
    }
}

/// The passes: what gathers for the next, and the running one.
#[derive(Debug, Default)]
pub(super) struct MetaPasses {
    dirty_pages: BTreeSet<u64>,
    pub(super) presence_pages: BTreeSet<u64>,
    init_pages: BTreeSet<u64>,
    superblock: bool,
    /// Woken after the first sync.
    waiters: Vec<Waiter>,
    /// Woken when both superblock copies are durable.
    superblock_waiters: Vec<Waiter>,
    running: Option<Pass>,
}

impl MetaPasses {
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }
    /// The next pass writes this page of the dirty bitmap.
    pub(super) fn rewrite_dirty(&mut self, page: u64) {
        self.dirty_pages.insert(page);
    }
    /// Somebody waits for a pass, and none runs.
    pub(super) fn can_start(&self) -> bool {
        self.running.is_none() && !(self.waiters.is_empty() && self.superblock_waiters.is_empty())
    }
}

/// Who waits for a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    /// A request whose regions are to be durably dirty, or whose metadata is to be durable.
    Op(u64),
    /// A bad map page, whose regions are to be durably dirty before it is used.
    Page(u64),
    /// The attach that is being taken.
    Attach(AttachId),
    /// The running flush pass, for its presence bits.
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PassWrite {
    Dirty(u64),
    Presence(u64),
    Init { first: u64, count: u64 },
    Superblock,
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Pages,
    PagesSync,
    SecondCopy,
    SecondCopySync,
}

#[derive(Debug)]
struct Pass {
    stage: Stage,
    writing: u32,
    /// What the dirty pages say on the disk once this pass is durable.
    dirty: BTreeMap<u64, Vec<u64>>,
    init: BTreeSet<u64>,
    /// Dirty pages that found no space.
    failed_dirty: BTreeSet<u64>,
    /// It writes presence pages.
    presence: bool,
    failed_presence: bool,
    /// Something found no space.
    no_space: bool,
    superblock: Option<Bytes>,
    waiters: Vec<Waiter>,
    superblock_waiters: Vec<Waiter>,
}

impl Pass {
    /// Whether the region, and its map page, will be as needed when this pass is durable.
    fn covers(&self, region: u64, regions: &Regions) -> bool {
        let (page, bit) = (region / BITMAP_BITS, region % BITMAP_BITS);
        let marks = || self.dirty.get(&page).is_some_and(|w| w[(bit / 64) as usize] & (1 << (bit % 64)) != 0);
        let map_page = region / MAP_REGIONS;
        matches!(self.stage, Stage::Pages | Stage::PagesSync)
            && (regions.durable.get(region) || regions.dirty.get(region) && marks())
            && (regions.present.get(map_page) || self.init.contains(&map_page))
    }
}

impl ReplicaCore {
    /// Whether the region's dirty bit is durable and its map page written: it may change (R5).
    fn may_change(&self, region: u64) -> bool {
        self.regions.durable.get(region) && self.regions.present.get(region / MAP_REGIONS)
    }

    /// Whether all these regions may change. If not, `waiter` is woken when they may, or when they can't; `ahead`
    /// marks more behind the last one.
    pub(super) fn may_change_or_wait(
        &mut self,
        regions: impl Iterator<Item = u64>,
        ahead: bool,
        waiter: Waiter,
    ) -> bool {
        let (mut missing, mut in_running) = (false, true);
        let mut last = 0;
        for region in regions {
            last = region;
            if self.may_change(region) {
                continue;
            }
            missing = true;
            if self.passes.running.as_ref().is_some_and(|p| p.covers(region, &self.regions)) {
                continue;
            }
            in_running = false;
            self.mark(region);
        }
        if !missing {
            return true;
        }
        if in_running {
            let running = self.passes.running.as_mut().expect("it covers the regions");
            running.waiters.push(waiter);
        } else {
            if ahead {
                for region in last + 1..(last + 1 + MARK_AHEAD).min(self.layout.regions) {
                    if !self.may_change(region) {
                        self.mark(region);
                    }
                }
            }
            self.passes.waiters.push(waiter);
        }
        false
    }

    /// The next pass makes the region dirty, and gives it a map page.
    fn mark(&mut self, region: u64) {
        self.regions.dirty.set(region);
        if !self.regions.durable.get(region) {
            self.passes.dirty_pages.insert(region / BITMAP_BITS);
        }
        let map_page = region / MAP_REGIONS;
        let initialising = self.passes.running.as_ref().is_some_and(|p| p.init.contains(&map_page));
        if !self.regions.present.get(map_page) && !initialising {
            self.passes.init_pages.insert(map_page);
        }
    }

    /// Regions whose part of a map page is damaged are dirty and suspect (R10).
    pub(super) fn distrust(&mut self, regions: impl Iterator<Item = u64>) {
        for region in regions {
            self.attach.accounted = false;
            self.attach.distrusted |= self.attach.current.is_some();
            self.regions.dirty.set(region);
            self.regions.suspect.set(region);
            if !self.regions.durable.get(region) {
                self.passes.dirty_pages.insert(region / BITMAP_BITS);
            }
        }
    }

    /// The next pass stores the superblock as it now is, in both copies.
    pub(super) fn store_superblock(&mut self, waiter: Waiter) {
        self.passes.superblock = true;
        self.passes.superblock_waiters.push(waiter);
    }

    /// The running flush needs the presence bits; tells whether any are still to become durable.
    pub(super) fn store_presence(&mut self) -> bool {
        if !self.passes.presence_pages.is_empty() {
            self.passes.waiters.push(Waiter::Flush);
            return true;
        }
        // Those that the running pass writes are not durable yet either.
        match &mut self.passes.running {
            Some(pass) if pass.presence && matches!(pass.stage, Stage::Pages | Stage::PagesSync) => {
                pass.waiters.push(Waiter::Flush);
                true
            }
            _ => false,
        }
    }

    pub(super) fn start_meta_pass(&mut self, out: &mut Vec<Output>) {
        if !self.passes.can_start() {
            return;
        }
        let replica = self.config.ids.replica;
        let mut pass = Pass {
            stage: Stage::Pages,
            writing: 0,
            dirty: BTreeMap::new(),
            init: std::mem::take(&mut self.passes.init_pages),
            failed_dirty: BTreeSet::new(),
            presence: !self.passes.presence_pages.is_empty(),
            failed_presence: false,
            no_space: false,
            superblock: None,
            waiters: std::mem::take(&mut self.passes.waiters),
            superblock_waiters: std::mem::take(&mut self.passes.superblock_waiters),
        };
        let mut writes = Vec::new();
        for page in std::mem::take(&mut self.passes.dirty_pages) {
            let words: Vec<u64> = self.regions.dirty.words(page as usize * BITMAP_WORDS, BITMAP_WORDS).collect();
            let mut bytes = BytesMut::new();
            layout::encode_bitmap(&mut bytes, PageKind::Dirty, page, replica, words.iter().copied());
            pass.dirty.insert(page, words);
            writes.push((PassWrite::Dirty(page), self.layout.dirty(page), bytes.freeze()));
        }
        for page in std::mem::take(&mut self.passes.presence_pages) {
            let mut bytes = BytesMut::new();
            let words = self.regions.present.words(page as usize * BITMAP_WORDS, BITMAP_WORDS);
            layout::encode_bitmap(&mut bytes, PageKind::Presence, page, replica, words);
            writes.push((PassWrite::Presence(page), self.layout.presence(page), bytes.freeze()));
        }
        let empty = MapPage::empty();
        for (first, count) in runs(pass.init.iter().copied()) {
            let mut bytes = BytesMut::with_capacity((count * PAGE) as usize);
            (first..first + count).for_each(|page| layout::encode_map(&mut bytes, page, replica, &empty));
            writes.push((PassWrite::Init { first, count }, self.layout.map(first), bytes.freeze()));
        }
        if std::mem::take(&mut self.passes.superblock) {
            self.superblock.generation += 1;
            let bytes = Bytes::from(self.superblock.encode());
            pass.superblock = Some(bytes.clone());
            writes.push((PassWrite::Superblock, self.layout.superblock(0), bytes));
        }
        pass.writing = writes.len() as u32;
        assert!(pass.writing > 0, "a pass without anything to write");
        self.passes.running = Some(pass);
        for (write, offset, bytes) in writes {
            self.disk(Io::PassWrite(write), DiskIo::Write { file: FileKind::Meta, offset, bytes }, out);
        }
    }

    pub(super) fn pass_write_done(
        &mut self,
        write: PassWrite,
        result: Result<DiskData, DiskError>,
        out: &mut Vec<Output>,
    ) {
        let pass = self.passes.running.as_mut().expect("the pass of this write");
        pass.writing -= 1;
        pass.no_space |= result == Err(DiskError::NoSpace);
        match (result, write) {
            (Ok(_), _) => {}
            // A page without space keeps what it said, or is torn and then counts as all dirty: what the disk says
            // is known, and nothing else has changed.
            (Err(DiskError::NoSpace), PassWrite::Dirty(page)) => {
                pass.dirty.remove(&page);
                pass.failed_dirty.insert(page);
                self.passes.dirty_pages.insert(page);
            }
            (Err(DiskError::NoSpace), PassWrite::Init { first, count }) => {
                (first..first + count).for_each(|page| {
                    pass.init.remove(&page);
                });
            }
            (Err(DiskError::NoSpace), PassWrite::Presence(page)) => {
                pass.failed_presence = true;
                self.passes.presence_pages.insert(page);
            }
            (Err(error), _) => return self.fault(FaultReason::MetaWrite(error), out),
        }
        if pass.writing == 0 {
            pass.stage = match pass.stage {
                Stage::Pages => Stage::PagesSync,
                Stage::SecondCopy => Stage::SecondCopySync,
                Stage::PagesSync | Stage::SecondCopySync => unreachable!("nothing is written during the sync"),
            };
            let pages_only = pass.stage == Stage::PagesSync && pass.superblock.is_none();
            if mutant::is(Mutant::DirtyWithoutSync) && pages_only {
                return self.pass_sync_done(Ok(DiskData::None), out);
            }
            let map = !pass.init.is_empty();
            self.disk(Io::PassSync, DiskIo::Sync { file: FileKind::Meta, map }, out);
        }
    }

    pub(super) fn pass_sync_done(&mut self, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        if result.is_err() {
            return self.fault(FaultReason::Sync(FileKind::Meta), out);
        }
        let mut pass = self.passes.running.take().expect("the pass of this sync");
        if pass.stage == Stage::PagesSync {
            self.pages_durable(&mut pass, out);
            if let Some(bytes) = pass.superblock.take() {
                pass.stage = Stage::SecondCopy;
                pass.writing = 1;
                self.passes.running = Some(pass);
                let offset = self.layout.superblock(1);
                let write = DiskIo::Write { file: FileKind::Meta, offset, bytes };
                return self.disk(Io::PassWrite(PassWrite::Superblock), write, out);
            }
        }
        for waiter in std::mem::take(&mut pass.superblock_waiters) {
            self.wake(waiter, &pass, out);
        }
    }

    fn pages_durable(&mut self, pass: &mut Pass, out: &mut Vec<Output>) {
        for (page, words) in &pass.dirty {
            // A region that a clean has cleared meanwhile, and that has not become dirty again, stays clear.
            let first = *page as usize * BITMAP_WORDS;
            let old: Vec<u64> = self.regions.durable.words(first, BITMAP_WORDS).collect();
            let dirty: Vec<u64> = self.regions.dirty.words(first, BITMAP_WORDS).collect();
            let new = old.iter().zip(words).zip(dirty).map(|((old, on_disk), dirty)| old | (on_disk & dirty));
            self.regions.durable.replace_words(first, new);
        }
        for page in std::mem::take(&mut pass.init) {
            self.regions.present.set(page);
            self.passes.presence_pages.insert(page / BITMAP_BITS);
            self.map_initialised(page);
        }
        for waiter in std::mem::take(&mut pass.waiters) {
            self.wake(waiter, pass, out);
        }
    }

    fn wake(&mut self, waiter: Waiter, pass: &Pass, out: &mut Vec<Output>) {
        match waiter {
            Waiter::Attach(id) => self.attach_stored(id, out),
            Waiter::Page(page) => self.bad_page_marked(page, out),
            Waiter::Flush => self.flush_presence_stored(pass.failed_presence, out),
            Waiter::Op(id) => {
                let Some(op) = self.ops.remove(&id) else { return };
                let Body::Meta { cleaned } = &op.body else {
                    let regions = self.waits_for(&op);
                    self.ops.insert(id, op);
                    if regions.into_iter().all(|r| self.may_change(r)) || !pass.no_space {
                        return self.ready.push_back(id);
                    }
                    let op = self.ops.remove(&id).expect("inserted above");
                    if op.ended {
                        self.ops.insert(id, op);
                        return;
                    }
                    return self.fail(op, Code::NoSpace, 0, out);
                };
                let failed = |region: &u32| pass.failed_dirty.contains(&(u64::from(*region) / BITMAP_BITS));
                let all_failed = op.kind == Kind::MarkAllDirty && !pass.failed_dirty.is_empty();
                if all_failed || cleaned.iter().any(failed) {
                    // The disk still says dirty, perhaps: so does the memory.
                    for region in cleaned.clone() {
                        self.regions.dirty.set(region.into());
                    }
                    return self.fail(op, Code::NoSpace, 0, out);
                }
                let done = Reply::Done(op.kind);
                self.finish(op, done, out);
            }
        }
    }

    /// The regions that must be durably dirty before the request goes on.
    fn waits_for(&self, op: &Op) -> Vec<u64> {
        match &op.changing {
            Changing::Nothing => Vec::new(),
            Changing::Span(first, last) => (u64::from(*first)..=u64::from(*last)).collect(),
            Changing::List(list) => list.iter().map(|r| u64::from(*r)).collect(),
        }
    }

    pub(super) fn list_regions(&self, first: RegionIndex, count: u32) -> Reply {
        let kind = Kind::ListRegions;
        let (start, n) = (u64::from(first.0), u64::from(count));
        if n == 0 || start + n > self.layout.regions {
            return Reply::Failed { kind, code: Code::Invalid, block: 0 };
        }
        let mut allocated = vec![0u8; n.div_ceil(8) as usize];
        for i in (0..n).filter(|i| self.map_region_in_use(start + i)) {
            allocated[(i / 8) as usize] |= 1 << (i % 8);
        }
        Reply::Regions(RegionWindow {
            first,
            count,
            dirty: self.regions.dirty.window(start, n).into(),
            suspect: self.regions.suspect.window(start, n).into(),
            allocated: allocated.into(),
        })
    }

    /// The entries whose region has not changed since their flush, which has ended under this attach (R6).
    fn settled<'a>(&'a self, entries: &'a [CleanEntry]) -> impl Iterator<Item = u32> + 'a {
        entries
            .iter()
            .filter(|e| u64::from(e.region.0) < self.layout.regions)
            .filter(|e| e.flush > FlushNo(0) && e.flush <= self.flush.completed)
            .filter(|e| self.regions.unchanged_since(e.region.0, e.flush))
            .map(|e| e.region.0)
    }

    pub(super) fn clean(&mut self, id: u64, mut op: Op, clean: CleanNo, entries: &[CleanEntry], out: &mut Vec<Output>) {
        if clean < self.superblock.set.clean {
            return self.fail(op, Code::Invalid, 0, out);
        }
        let mut cleaned: Vec<u32> = self.settled(entries).collect();
        // What is suspect was found so since it was settled, by a bad map page, and the owner does not know (R10).
        cleaned
            .retain(|region| !self.regions.suspect.get((*region).into()) && self.regions.dirty.clear((*region).into()));
        for region in &cleaned {
            // From here on a write waits until the bit is durable again (R5).
            self.regions.durable.clear((*region).into());
            self.passes.dirty_pages.insert(u64::from(*region) / BITMAP_BITS);
        }
        self.superblock.set.clean = clean;
        self.no_longer_rebuilt();
        self.find_whole();
        op.body = Body::Meta { cleaned };
        self.ops.insert(id, op);
        self.store_superblock(Waiter::Op(id));
    }

    /// Regions that were equalised and flushed are suspect no more; what was written since does not make them so.
    pub(super) fn settle(&mut self, entries: &[CleanEntry]) {
        let known = |e: &&CleanEntry| u64::from(e.region.0) < self.layout.regions && e.flush <= self.flush.completed;
        let settled: Vec<u32> = entries.iter().filter(known).map(|e| e.region.0).collect();
        for region in settled {
            self.regions.suspect.clear(region.into());
        }
        self.find_whole();
    }

    pub(super) fn mark_all_dirty(&mut self, id: u64, op: Op) {
        self.regions.dirty = BitSet::full(self.layout.regions);
        self.passes.dirty_pages.extend(0..self.layout.dirty_pages);
        self.ops.insert(id, op);
        self.passes.waiters.push(Waiter::Op(id));
    }

    pub(super) fn store_set(&mut self, id: u64, op: Op, set: SetView, accounted: bool, out: &mut Vec<Output>) {
        let known = &self.superblock.set;
        if set.version < known.version || set.members.len() > MAX_REPLICAS {
            return self.fail(op, Code::Invalid, 0, out);
        }
        // The clean number only says how much this replica has been told to clean, so it never falls.
        let clean = set.clean.max(known.clean);
        self.superblock.set = SetView { clean, ..set };
        self.superblock.kept_epoch = self.superblock.epoch;
        self.attach.distrusted &= self.regions.suspect.ones() > 0;
        let unseen = self.attach.distrusted && !mutant::is(Mutant::AccountedUnseen);
        (self.attach.told, self.attach.accounted) = (true, accounted && !unseen);
        self.no_longer_rebuilt();
        self.ops.insert(id, op);
        self.store_superblock(Waiter::Op(id));
    }

    /// A rebuilt replica is an ordinary one again once a committed set counts it in and nothing in it is suspect.
    fn no_longer_rebuilt(&mut self) {
        if self.regions.suspect.ones() == 0 && self.superblock.set.members.contains(&self.config.ids.replica) {
            self.superblock.rebuilt = false;
        }
    }

    /// Whether a region has an allocated block, or may have.
    fn map_region_in_use(&self, region: u64) -> bool {
        let page = region / MAP_REGIONS;
        self.regions.present.get(page)
            && self.map.get(page).is_none_or(|map| map.region_in_use((region % MAP_REGIONS) as usize))
    }
}

/// Runs of consecutive numbers among ascending ones, as (first, count).
pub(super) fn runs(numbers: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for n in numbers {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == n => *count += 1,
            _ => runs.push((n, 1)),
        }
    }
    runs
}

/// The regions that `count` blocks from `block` lie in, first and last.
pub(super) fn regions_of(block: BlockIndex, count: u64) -> (u32, u32) {
    let (first, last) = (block.0 / REGION_BLOCKS, (block.0 + count - 1) / REGION_BLOCKS);
    (first as u32, last as u32)
}
