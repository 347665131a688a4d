//! Making a region the same on all attached replicas (R7).
//!
//! ```text
//! Locking ─► Hashing ─► Restamping ─► Copying ─► (Relaying) ─► done
//! ```
//!
//! Under the region's exclusive lock every replica hashes what is on its disk; a base is chosen per block, and
//! only blocks that differ are copied, from node to node, or through here where the nodes can't reach each other.
//! A copy in flight belongs to the *destination's* attach: if its source is lost before it answered, or could not
//! say that every part of it was taken, the destination's attach is given up too, before the lock is, so that no
//! copy lands after a newer write.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use proto::frame::{BlockHash, Code, CopyTarget, Reply, Request, block_sum};
use proto::id::{BlockIndex, RegionIndex};
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

use super::mask::Mask;
use super::range_lock::LockOwner;
use super::state::{Mirror, Phase, What, fault_of, limits};
use super::types::*;

/// After a request of the volume, background work leaves room for so long.
const FOREGROUND_MS: u64 = 50;
/// While it does, one region at a time is equalised, and between two of them it rests so many times as long as the first
/// one took: a third of what the machines could do is left to it, in all mirrors of a volume together.
const YIELDING_REST: u64 = 2;
/// In milliseconds at least, and at most: it always advances, by 20 to 120 MiB/s.
const YIELDING_REST_MS: (u64, u64) = (8, 40);
/// What a limit did not let begin in so much time, since the clock ticks seldom, is made up for.
const CATCH_UP_MS: u64 = 100;
/// Nodes that could not reach each other are not tried again for so long, nor within one join: trying ends it.
const NO_PATH_MS: u64 = 60_000;
/// A region that could not be equalised is tried again after this.
const RETRY_MS: u64 = 2_000;
/// So often a block that no member can vouch for holds a join up; then it is bad on the joining replica too.
const MAX_HOPELESS_TRIES: u32 = 10;
/// When such a region is looked at once more: what could not be read may be readable again.
const HOPELESS_AGAIN_MS: u64 = 60_000;

/// Which blocks of a region.
type Blocks = [u64; 4];

fn set_bit(blocks: &mut Blocks, i: usize) {
    blocks[i / 64] |= 1 << (i % 64);
}

fn bits(blocks: &Blocks) -> impl Iterator<Item = usize> + '_ {
    (0..REGION_BLOCKS as usize).filter(|i| blocks[i / 64] >> (i % 64) & 1 == 1)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EqualiseStage {
    Locking,
    Hashing,
    Restamping,
    Copying,
    Relaying,
}

#[derive(Debug)]
enum Outstanding {
    Hashes { slot: usize },
    Restamp { blocks: Blocks },
    Distrust,
    Copy { source: usize, target: usize, blocks: Blocks },
    RelayRead { target: usize, block: u64, count: u32 },
    RelayWrite,
}

/// A region being equalised, or compared.
#[derive(Debug)]
pub(super) struct Equalise {
    stage: EqualiseStage,
    /// When its lock was got.
    locked_at: u64,
    /// Those whose hashes count and that are made equal.
    participants: Mask,
    /// Only look.
    compare_only: bool,
    /// Nobody waits for it.
    yields: bool,
    /// Comparisons that wait for this run.
    comparing: Vec<u64>,
    comparison: Comparison,
    /// The region was dirty before this run.
    was_dirty: bool,
    outstanding: BTreeMap<u64, Outstanding>,
    hashes: Vec<Option<Vec<BlockHash>>>,
    restamps: Vec<(usize, Blocks)>,
    /// Blocks of joining replicas that no member can vouch for.
    distrusts: Vec<(usize, Blocks)>,
    copies: Vec<(usize, usize, Blocks)>,
    relays: VecDeque<(usize, usize, u64, u32)>,
    failed: bool,
    /// A block that no member can vouch for was left as it is on a joining replica, for another look.
    hopeless: bool,
    /// Such a block is bad on a joining replica now, too.
    distrusted: bool,
    /// Those that had bad blocks, if all of them are replaced.
    had_bad: Mask,
}

/// What the mirror's background work has before it.
#[derive(Debug, Default)]
pub(super) struct Background {
    /// Regions with a bad block.
    pub repairs: std::collections::BTreeSet<RegionIndex>,
    /// Comparisons that have not begun: region, request, whether to repair.
    pub compares: VecDeque<(RegionIndex, u64, bool)>,
    /// Regions that failed, and when to try again.
    pub retry_at: BTreeMap<RegionIndex, u64>,
    /// Regions whose join waits for blocks that no member can vouch for, and how often that was found.
    hopeless: BTreeMap<RegionIndex, u32>,
    /// Replicas whose nodes could not reach each other, source and destination, and when that was found.
    pub no_path: BTreeMap<(usize, usize), u64>,
    /// A run lost somebody and must be looked at.
    pub stirred: bool,
    /// Bytes a second that work nobody waits for compares at most.
    limit: Option<u64>,
    /// When the limit lets the next region begin.
    allowed_at: u64,
    /// Mirrors of the volume with such work: they rest for each other.
    busy_mirrors: u64,
}

impl Background {
    pub fn set_limit(&mut self, now: u64, limit: Option<u64>) {
        self.limit = limit;
        self.allowed_at = self.allowed_at.min(now);
    }
}

impl Mirror {
    /// So many mirrors of the volume have background work now, this one perhaps among them.
    pub(crate) fn rest_for(&mut self, busy_mirrors: u64) {
        self.background.busy_mirrors = busy_mirrors;
    }

    /// Whether it has regions to equalise that nobody waits for.
    pub(crate) fn has_background(&self) -> bool {
        !self.settling.unsettled.is_empty() || self.next_join_region(|_| true).is_some()
    }

    pub(super) fn repair(&mut self, region: RegionIndex) {
        self.background.repairs.insert(region);
    }

    pub(super) fn compare(&mut self, region: RegionIndex, id: u64, repair: bool) {
        self.background.compares.push_back((region, id, repair));
    }

    /// A join begins: nodes that could not reach this one some time ago may try again.
    pub(super) fn forget_old_paths(&mut self, now: u64, slot: usize) {
        self.background.no_path.retain(|(_, target), found| *target != slot || now < *found + NO_PATH_MS);
    }

    /// Whether a region that somebody needs may be begun: what is looked at once more after a long while is not held up
    /// till then.
    fn is_due(&self, now: u64, region: &RegionIndex) -> bool {
        let backs_off = self.background.retry_at.get(region).is_some_and(|at| *at <= now + RETRY_MS);
        !self.equalising.contains_key(region) && !backs_off
    }

    /// Begins what is due: demanded regions at once, the rest as the foreground leaves room.
    pub(super) fn advance_background(&mut self, now: u64, out: &mut Vec<Output>) {
        if !matches!(self.phase, Phase::Serving | Phase::Closing) {
            return;
        }
        self.background.retry_at.retain(|_, at| now < *at);
        while self.equalising.len() < limits::MAX_DEMANDED_REGIONS {
            let free = |r: &RegionIndex| !self.equalising.contains_key(r) && !self.background.retry_at.contains_key(r);
            let next = (self.settling.demanded.iter().copied().find(|r| self.is_due(now, r))).or_else(|| {
                self.background.repairs.iter().copied().find(free).filter(|_| self.phase == Phase::Serving)
            });
            let Some(region) = next else { break };
            self.background.repairs.remove(&region);
            self.begin_equalise(now, region, Vec::new(), false, out);
        }
        for _ in 0..self.background.compares.len() {
            let Some((region, id, repair)) = self.background.compares.pop_front() else { break };
            if self.equalising.contains_key(&region) || self.equalising.len() >= limits::MAX_DEMANDED_REGIONS {
                self.background.compares.push_back((region, id, repair));
            } else {
                self.begin_equalise(now, region, vec![id], !repair, out);
            }
        }
        if self.phase == Phase::Closing {
            // Only what a request still waits for.
            return;
        }
        let yielding = now < self.foreground_at + FOREGROUND_MS;
        let most = if yielding { 1 } else { limits::MAX_BACKGROUND_REGIONS };
        while self.equalising.len() < most
            && (!yielding || now >= self.background_next)
            && (self.background.limit.is_none() || now >= self.background.allowed_at)
        {
            let due = |r: &RegionIndex| self.is_due(now, r);
            let Some(region) = self.settling.unsettled.iter().find(due).or_else(|| self.next_join_region(due)) else {
                break;
            };
            if let Some(limit) = self.background.limit {
                let (_, blocks) = self.blocks_of(region);
                let takes = u64::from(blocks) * BLOCK_SIZE * 1_000 / limit;
                self.background.allowed_at = self.background.allowed_at.max(now.saturating_sub(CATCH_UP_MS)) + takes;
            }
            self.begin_equalise(now, region, Vec::new(), false, out);
            // It may have ended at once: then nobody was there.
            if let Some(run) = self.equalising.get_mut(&region) {
                run.yields = true;
            }
        }
    }

    fn begin_equalise(
        &mut self,
        now: u64,
        region: RegionIndex,
        comparing: Vec<u64>,
        compare_only: bool,
        out: &mut Vec<Output>,
    ) {
        let run = Equalise {
            stage: EqualiseStage::Locking,
            locked_at: 0,
            participants: Mask::EMPTY,
            compare_only,
            yields: false,
            comparing,
            comparison: Comparison::default(),
            was_dirty: false,
            outstanding: BTreeMap::new(),
            hashes: vec![None; self.slots.len()],
            restamps: Vec::new(),
            distrusts: Vec::new(),
            copies: Vec::new(),
            relays: VecDeque::new(),
            failed: false,
            hopeless: false,
            distrusted: false,
            had_bad: Mask::EMPTY,
        };
        assert!(self.equalising.insert(region, run).is_none(), "region {region} is being equalised already");
        let (first, count) = self.blocks_of(region);
        let locked = if mutant::is(Mutant::EqualiseWithoutLock) { 0 } else { count };
        if self.locks.acquire(LockOwner::Region(region.0), BlockIndex(first), locked.into(), !compare_only) {
            self.equalise_locked(now, region, out);
        }
    }

    fn blocks_of(&self, region: RegionIndex) -> (u64, u32) {
        let first = u64::from(region.0) * REGION_BLOCKS;
        (first, REGION_BLOCKS.min(self.cfg.blocks - first) as u32)
    }

    pub(super) fn equalise_locked(&mut self, now: u64, region: RegionIndex, out: &mut Vec<Output>) {
        let compare_only = self.equalising[&region].compare_only;
        let participants = if compare_only { self.live_members() } else { self.live() };
        let was_dirty = self.dirty.contains(region);
        if !compare_only {
            self.dirty.writing(region);
        }
        let mut key = self.cfg.hash_seed;
        self.hash_count += 1;
        for (k, c) in key.iter_mut().zip(self.hash_count.to_le_bytes()) {
            *k ^= c;
        }
        let (block, count) = self.blocks_of(region);
        let request = Request::Hashes { block: BlockIndex(block), count, key };
        let mut outstanding = BTreeMap::new();
        for slot in participants.iter() {
            let tag = self.send(now, slot, What::Equalise(region), request.clone(), out);
            outstanding.insert(tag, Outstanding::Hashes { slot });
        }
        let run = self.equalising.get_mut(&region).expect("begun");
        run.stage = EqualiseStage::Hashing;
        run.locked_at = now;
        (run.participants, run.was_dirty, run.outstanding) = (participants, was_dirty, outstanding);
        run.failed |= participants.is_empty();
        self.compared_bytes += u64::from(count) * BLOCK_SIZE;
        self.equalise_next(now, region, out);
    }

    pub(super) fn equalise_answered(
        &mut self,
        now: u64,
        slot: usize,
        region: RegionIndex,
        tag: u64,
        reply: Reply,
        out: &mut Vec<Output>,
    ) {
        let (_, count) = self.blocks_of(region);
        let Some(run) = self.equalising.get_mut(&region) else { return };
        let Some(what) = run.outstanding.remove(&tag) else { return };
        match (what, reply) {
            (Outstanding::Hashes { slot }, Reply::Hashes(hashes)) if hashes.len() as u32 == count => {
                run.hashes[slot] = Some(hashes);
            }
            (Outstanding::Restamp { blocks }, Reply::Done(_)) => {
                self.restamped_blocks += bits(&blocks).count() as u64;
            }
            (Outstanding::Copy { target, blocks, .. }, Reply::Done(_)) => {
                self.count_copied(target, bits(&blocks).count())
            }
            (
                Outstanding::Copy { source, target, .. },
                Reply::Failed { code: code @ (Code::PeerUnreachable | Code::PeerRefused), .. },
            ) => {
                // Some of it may still be on its way, and would land on whatever is written once the lock is gone:
                // the destination's attach goes first. Next time it goes through here.
                if code == Code::PeerUnreachable {
                    self.background.no_path.insert((source, target), now);
                }
                run.failed = true;
                if !mutant::is(Mutant::KeepTargetOfLateCopy) {
                    self.lost.push_back((target, FaultReason::CopyInDoubt));
                }
            }
            // Its source is not what it was when it was hashed: all of it has ended, and it is hashed again.
            (
                Outstanding::Copy { .. } | Outstanding::RelayRead { .. },
                Reply::Failed { code: Code::Checksum | Code::ReadFailed, .. },
            ) => {
                run.failed = true;
            }
            (Outstanding::RelayRead { target, block, count }, Reply::Read { block: b, sums, data })
                if b.0 == block && sums.len() as u32 == count && sums_match(&data, &sums) =>
            {
                if self.slots[target].is_live() && run.participants.contains(target) {
                    let request = Request::Write { block: b, fua: false, sums, data };
                    let tag = self.send(now, target, What::Equalise(region), request, out);
                    let run = self.equalising.get_mut(&region).expect("above");
                    run.outstanding.insert(tag, Outstanding::RelayWrite);
                    self.count_copied(target, count as usize);
                } else {
                    run.failed = true;
                }
            }
            (Outstanding::RelayWrite | Outstanding::Distrust, Reply::Done(_)) => {}
            (_, Reply::Failed { code, .. }) => {
                run.failed = true;
                self.lost.push_back((slot, fault_of(code)));
            }
            _ => {
                run.failed = true;
                self.lost.push_back((slot, FaultReason::Nonsense));
            }
        }
        self.equalise_next(now, region, out);
    }

    fn count_copied(&mut self, target: usize, blocks: usize) {
        let bytes = blocks as u64 * BLOCK_SIZE;
        self.copied_bytes += bytes;
        if let Some(join) = self.slots[target].join_mut() {
            join.copied_bytes += bytes;
        }
    }

    /// A replica's attach was given up with this request unanswered.
    pub(super) fn equalise_lost(&mut self, region: RegionIndex, tag: u64) {
        let Some(run) = self.equalising.get_mut(&region) else { return };
        match run.outstanding.remove(&tag) {
            Some(Outstanding::Copy { target, .. }) => {
                run.failed = true;
                self.lost.push_back((target, FaultReason::CopyInDoubt));
            }
            Some(Outstanding::Hashes { .. }) | None => {}
            Some(_) => run.failed = true,
        }
        self.background.stirred = true;
    }

    /// A replica's attach was given up: no run makes it equal any more.
    pub(super) fn equalise_forget(&mut self, slot: usize) {
        for run in self.equalising.values_mut() {
            run.participants.remove(slot);
            // Copies to it end with its attach; their sources may wait for it for a long time yet.
            let ended = |o: &Outstanding| matches!(o, Outstanding::Copy { target, .. } if *target == slot);
            for (tag, _) in run.outstanding.extract_if(.., |_, o| ended(o)) {
                self.sent.remove(&tag);
            }
            self.background.stirred = true;
        }
    }

    /// Goes on with runs that lost somebody.
    pub(super) fn advance_equalise(&mut self, now: u64, out: &mut Vec<Output>) {
        if std::mem::take(&mut self.background.stirred) {
            let all: Vec<RegionIndex> = self.equalising.keys().copied().collect();
            for region in all {
                self.equalise_next(now, region, out);
            }
        }
    }

    /// Takes the next stage when nothing of this one is outstanding.
    fn equalise_next(&mut self, now: u64, region: RegionIndex, out: &mut Vec<Output>) {
        loop {
            let Some(run) = self.equalising.get_mut(&region) else { return };
            if run.stage == EqualiseStage::Locking || !run.outstanding.is_empty() {
                return;
            }
            // A target whose attach must go may still take a copy until it has gone.
            if !self.lost.is_empty() {
                self.background.stirred = true;
                return;
            }
            let ended = run.failed
                || match run.stage {
                    EqualiseStage::Locking => unreachable!("returned above"),
                    EqualiseStage::Hashing => {
                        run.stage = EqualiseStage::Restamping;
                        self.plan(region, out);
                        let run = self.equalising.get_mut(&region).expect("above");
                        let compare_only = run.compare_only;
                        if !compare_only {
                            let (restamps, distrusts) =
                                (std::mem::take(&mut run.restamps), std::mem::take(&mut run.distrusts));
                            for (slot, blocks) in restamps {
                                self.restamp(now, region, slot, blocks, false, out);
                            }
                            for (slot, blocks) in distrusts {
                                self.restamp(now, region, slot, blocks, true, out);
                            }
                        }
                        compare_only
                    }
                    EqualiseStage::Restamping => {
                        run.stage = EqualiseStage::Copying;
                        for (source, target, blocks) in std::mem::take(&mut run.copies) {
                            self.copy(now, region, source, target, blocks, out);
                        }
                        false
                    }
                    EqualiseStage::Copying => {
                        run.stage = EqualiseStage::Relaying;
                        false
                    }
                    EqualiseStage::Relaying => match run.relays.pop_front() {
                        None => true,
                        Some((source, target, block, count)) => {
                            self.relay(now, region, source, target, block, count, out);
                            false
                        }
                    },
                };
            if ended {
                self.end_equalise(now, region, out);
                return;
            }
        }
    }

    fn still_takes_part(&self, region: RegionIndex, slot: usize) -> bool {
        self.equalising[&region].participants.contains(slot) && self.slots[slot].is_live()
    }

    fn restamp(
        &mut self,
        now: u64,
        region: RegionIndex,
        slot: usize,
        blocks: Blocks,
        distrust: bool,
        out: &mut Vec<Output>,
    ) {
        if !self.still_takes_part(region, slot) {
            self.equalising.get_mut(&region).expect("runs").failed = true;
            return;
        }
        let block = BlockIndex(u64::from(region.0) * REGION_BLOCKS);
        let (request, what) = if distrust {
            (Request::Distrust { block, blocks }, Outstanding::Distrust)
        } else {
            (Request::Restamp { block, blocks }, Outstanding::Restamp { blocks })
        };
        let tag = self.send(now, slot, What::Equalise(region), request, out);
        let run = self.equalising.get_mut(&region).expect("runs");
        run.outstanding.insert(tag, what);
    }

    fn copy(
        &mut self,
        now: u64,
        region: RegionIndex,
        source: usize,
        target: usize,
        blocks: Blocks,
        out: &mut Vec<Output>,
    ) {
        if !self.still_takes_part(region, source) || !self.still_takes_part(region, target) {
            // The target is out, or will be compared again from another base.
            self.equalising.get_mut(&region).expect("runs").failed |= self.slots[target].is_live();
            return;
        }
        if self.background.no_path.contains_key(&(source, target)) {
            let base = u64::from(region.0) * REGION_BLOCKS;
            let run = self.equalising.get_mut(&region).expect("runs");
            run.relays.extend(runs(&blocks).map(|(at, n)| (source, target, base + at as u64, n)));
            return;
        }
        let attach = self.slots[target].attach.as_ref().expect("live").id;
        let def = &self.slots[target].def;
        let to = CopyTarget { addr: def.data_addr.clone(), replica: def.replica, attach };
        let block = BlockIndex(u64::from(region.0) * REGION_BLOCKS);
        let request = Request::CopyTo { block, blocks, target: to };
        let tag = self.send(now, source, What::Equalise(region), request, out);
        let run = self.equalising.get_mut(&region).expect("runs");
        run.outstanding.insert(tag, Outstanding::Copy { source, target, blocks });
    }

    fn relay(
        &mut self,
        now: u64,
        region: RegionIndex,
        source: usize,
        target: usize,
        block: u64,
        count: u32,
        out: &mut Vec<Output>,
    ) {
        if !self.still_takes_part(region, source) || !self.still_takes_part(region, target) {
            self.equalising.get_mut(&region).expect("runs").failed = true;
            return;
        }
        let request = Request::Read { block: BlockIndex(block), count };
        let tag = self.send(now, source, What::Equalise(region), request, out);
        let run = self.equalising.get_mut(&region).expect("runs");
        run.outstanding.insert(tag, Outstanding::RelayRead { target, block, count });
    }

    /// All hashes are there: compares them, and decides what is copied from where.
    fn plan(&mut self, region: RegionIndex, out: &mut Vec<Output>) {
        let (first, count) = self.blocks_of(region);
        let run = &self.equalising[&region];
        let hashed: Vec<usize> = run.participants.iter().filter(|s| run.hashes[*s].is_some()).collect();
        let hash = |slot: usize, i: usize| &run.hashes[slot].as_ref().expect("hashed")[i];
        let mut comparison = Comparison {
            replicas: hashed.iter().map(|s| self.slots[*s].def.replica).collect(),
            absent: self.ids_of(self.all_slots() - hashed.iter().copied().collect()),
            blocks: count.into(),
            ..Comparison::default()
        };
        let mut restamps: BTreeMap<usize, Blocks> = BTreeMap::new();
        let mut copies: BTreeMap<(usize, usize), Blocks> = BTreeMap::new();
        let mut distrusts: BTreeMap<usize, Blocks> = BTreeMap::new();
        let (mut had_bad, mut stays_bad) = (Mask::EMPTY, false);
        let bases = self.base_ranks(region, &hashed);
        if bases.is_empty() && !run.compare_only {
            // The last member was lost meanwhile; of the others none says what is right.
            self.equalising.get_mut(&region).expect("runs").failed = true;
            return;
        }
        let broken = self.settling.is_broken(region);
        let unsettled = self.settling.unsettled.contains(region);
        let kept = |slot: usize| self.slots[slot].attach.as_ref().is_some_and(|a| a.info().kept);
        let all_kept = bases.iter().all(|(_, slot)| kept(*slot));
        for i in 0..count as usize {
            let differs =
                |a: usize, b: usize| hash(a, i).hash != hash(b, i).hash || !hash(a, i).readable || !hash(b, i).readable;
            if hashed.windows(2).any(|pair| differs(pair[0], pair[1])) {
                comparison.differ.push(BlockIndex(first + i as u64));
            }
            for slot in hashed.iter().filter(|s| !hash(**s, i).intact) {
                had_bad.insert(*slot);
                comparison.bad.push((self.slots[*slot].def.replica, BlockIndex(first + i as u64)));
            }
            let held_by = |s: usize| bases.iter().filter(|(_, other)| !differs(s, *other)).count();
            let intact = bases.iter().find(|(_, s)| hash(*s, i).intact);
            // Only what a restart, or a write that failed everywhere, left behind may be taken for right although it
            // matches no sum. Elsewhere the block is bad (R10), however dirty its region.
            let may_be_left =
                |rank: u8, s: usize| unsettled && (rank > 0 || broken) && run.was_dirty && hash(s, i).readable;
            let left = bases.iter().filter(|(rank, s)| may_be_left(*rank, *s));
            // What most have is taken: a disk that has silently dropped a write is alone with what it has.
            let left = left.min_by_key(|(rank, s)| (std::cmp::Reverse(held_by(*s)), *rank, *s));
            let base = match (intact, left) {
                // Sums are behind where processes were killed: an older block may match where newer ones do not.
                (Some((1.., base)), Some((_, most))) if all_kept && held_by(*most) > held_by(*base) => *most,
                (Some((_, base)), _) => *base,
                (None, Some((_, most))) => *most,
                (None, None) => {
                    stays_bad = true;
                    for slot in hashed.iter().filter(|s| self.slots[**s].join().is_some()) {
                        set_bit(distrusts.entry(*slot).or_default(), i);
                    }
                    continue;
                }
            };
            if !hash(base, i).intact {
                set_bit(restamps.entry(base).or_default(), i);
            }
            for slot in hashed.iter().copied().filter(|s| *s != base) {
                // One that has the same bytes under a wrong sum is copied as well: restamped it would be certified as it
                // is then, which a disk may have changed since it was hashed.
                if differs(slot, base) || !hash(slot, i).intact {
                    set_bit(copies.entry((base, slot)).or_default(), i);
                }
            }
        }
        if !run.compare_only {
            for (slot, blocks) in &restamps {
                let (replica, blocks) = (self.slots[*slot].def.replica, bits(blocks).count() as u32);
                out.push(Output::Log(Event::Restamped { region, blocks, replica }));
            }
        }
        let run = self.equalising.get_mut(&region).expect("above");
        run.comparison = comparison;
        run.had_bad = if stays_bad { Mask::EMPTY } else { had_bad };
        run.restamps = restamps.into_iter().collect();
        run.copies = copies.into_iter().map(|((source, target), blocks)| (source, target, blocks)).collect();
        // A joining replica's block can't be made equal to one that no member can vouch for, and must not be served as
        // if it were. Its join waits a little, and then takes it over as what it is: bad.
        let tries = self.background.hopeless.get(&region).copied().unwrap_or_default();
        run.hopeless = !distrusts.is_empty() && tries < MAX_HOPELESS_TRIES;
        if !run.hopeless && !run.compare_only {
            for (slot, blocks) in &distrusts {
                let (replica, blocks) = (self.slots[*slot].def.replica, bits(blocks).count() as u32);
                out.push(Output::Log(Event::Distrusted { region, blocks, replica }));
            }
            run.distrusted = !distrusts.is_empty();
            run.distrusts = distrusts.into_iter().collect();
        }
    }

    /// Who may be the base of a region's blocks, best first (R7): members that have not restarted; of those that
    /// have, members dirty there before members clean there. Where that is to be settled, a replica that lost its
    /// cache is none beside one that holds all that it took, however well its older blocks match their sums.
    fn base_ranks(&self, region: RegionIndex, hashed: &[usize]) -> Vec<(u8, usize)> {
        // Only until the region is settled: what is written afterwards is on the members, and on nobody who left.
        let released = self.settling.released.contains(region) && self.settling.unsettled.contains(region);
        let extra = if released { self.settling.extra_bases } else { Mask::EMPTY };
        let mut ranks: Vec<(u8, usize)> = (hashed.iter().copied())
            .filter(|s| self.slots[*s].is_member() || extra.contains(*s))
            .map(|s| {
                let attach = self.slots[s].attach.as_ref().expect("hashed replicas are attached");
                let dirty = attach.listed.as_ref().is_none_or(|l| l.dirty.contains(region));
                let rank = match (attach.suspect.contains(region), attach.restarted) {
                    (false, false) => 0,
                    _ if dirty => 1,
                    _ => 2,
                };
                (rank, s)
            })
            .collect();
        let holds_all =
            |(rank, s): &(u8, usize)| *rank == 0 || self.slots[*s].attach.as_ref().expect("live").info().kept;
        if self.settling.unsettled.contains(region) && ranks.iter().any(holds_all) {
            ranks.retain(holds_all);
        }
        ranks.sort_unstable();
        ranks
    }

    fn end_equalise(&mut self, now: u64, region: RegionIndex, out: &mut Vec<Output>) {
        let run = self.equalising.remove(&region).expect("runs");
        let took = now.saturating_sub(run.locked_at);
        if run.yields {
            let rest = (took * YIELDING_REST).clamp(YIELDING_REST_MS.0, YIELDING_REST_MS.1);
            self.background_next = now + rest * self.background.busy_mirrors.max(1);
        }
        if !run.compare_only && !mutant::is(Mutant::EqualisedStaysDirty) {
            self.dirty.written(region, now, self.flush_next);
        }
        if run.failed {
            self.background.retry_at.insert(region, now + RETRY_MS);
            self.background.compares.extend(run.comparing.iter().map(|id| (region, *id, !run.compare_only)));
        } else {
            if !run.compare_only && self.live_members().within(run.participants) {
                // The members are as equal as they can be; a replica that joins is not, if a block is hopeless.
                self.settling.equalised(region);
                self.mended(region, run.had_bad & run.participants);
                if run.hopeless {
                    *self.background.hopeless.entry(region).or_default() += 1;
                    self.background.retry_at.insert(region, now + RETRY_MS);
                } else {
                    self.joined_region(region, run.participants);
                    if self.background.hopeless.remove(&region).is_some() && run.distrusted {
                        self.background.repairs.insert(region);
                        self.background.retry_at.insert(region, now + HOPELESS_AGAIN_MS);
                    }
                }
            }
            for id in run.comparing {
                self.compared(now, id, run.comparison.clone(), out);
            }
        }
        self.locks.release(LockOwner::Region(region.0), &mut self.granted);
    }
}

fn sums_match(data: &Bytes, sums: &[u32]) -> bool {
    data.chunks_exact(BLOCK_SIZE as usize).zip(sums).all(|(b, s)| block_sum(b) == *s)
}

/// The runs of set bits, as (first, length).
fn runs(blocks: &Blocks) -> impl Iterator<Item = (usize, u32)> {
    let mut found: Vec<(usize, u32)> = Vec::new();
    for i in bits(blocks) {
        match found.last_mut() {
            Some((first, n)) if *first + *n as usize == i => *n += 1,
            _ => found.push((i, 1)),
        }
    }
    found.into_iter()
}
