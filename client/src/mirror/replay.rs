//! Acknowledged writes that are not durable yet, kept so that the loss of every cache loses none of them (R9).
//!
//! ```text
//! Opening ──every member has restarted──► Replaying ──all written again──► Serving
//! ```
//!
//! Whatever is acknowledged is kept, in that order, until a flush that began later has been answered by every member.
//! So what is durable on any member, and what is kept here, together are everything that was acknowledged, from the
//! moment on that the regions found dirty at the opening were settled. Then members that lost their caches are as good
//! as any, nobody has to be waited for, and initiators have lost nothing: no POWER ON, and flushes go on.
//!
//! Durable writes are kept as well while older ones are: those must not be written over them. So each block is written
//! once again, with the last that it was to hold.
//!
//! Nothing of the volume's is served meanwhile, and nothing equalised, so that no locks are needed. The lease is not
//! confirmed anew: attaches fence (R1), and what is written again was acknowledged by the owner of that epoch, under a
//! dirty bit; nothing is told to an initiator without a live lease.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use proto::frame::{Reply, Request, block_sums};
use proto::id::{BlockIndex, FlushNo, RegionIndex};
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

use super::mask::Mask;
use super::state::{Mirror, Phase, What, fault_of, limits};
use super::types::*;

/// What one entry counts for besides its data.
const ENTRY_BYTES: u64 = 128;

/// What a write did.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    Data(Bytes),
    Zero { discard: bool },
}

/// A write, or a part of one.
#[derive(Debug)]
struct Write {
    block: BlockIndex,
    count: u32,
    effect: Effect,
}

#[derive(Debug)]
struct Kept {
    write: Write,
    /// A flush with this number or a later one, answered by every member, makes it durable.
    covered_by: FlushNo,
}

impl Write {
    fn bytes(&self) -> u64 {
        match &self.effect {
            Effect::Data(data) => data.len() as u64 + ENTRY_BYTES,
            Effect::Zero { .. } => ENTRY_BYTES,
        }
    }

    /// The part of it from block `from` up to `to`.
    fn part(&self, from: u64, to: u64) -> Self {
        let bytes = |block: u64| ((block - self.block.0) * BLOCK_SIZE) as usize;
        let effect = match &self.effect {
            Effect::Data(data) => Effect::Data(data.slice(bytes(from)..bytes(to))),
            Effect::Zero { discard } => Effect::Zero { discard: *discard },
        };
        Self { block: BlockIndex(from), count: (to - from) as u32, effect }
    }

    fn regions(&self) -> impl Iterator<Item = RegionIndex> + use<> {
        let last = self.block.0 + u64::from(self.count) - 1;
        ((self.block.0 / REGION_BLOCKS) as u32..=(last / REGION_BLOCKS) as u32).map(RegionIndex)
    }

    fn request(&self) -> Request {
        let (block, count) = (self.block, self.count);
        match &self.effect {
            Effect::Data(data) => Request::Write { block, fua: false, sums: block_sums(data), data: data.clone() },
            Effect::Zero { discard: true } => Request::Discard { block, count },
            Effect::Zero { discard: false } => Request::WriteZeroes { block, count, fua: false },
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Replay {
    kept: VecDeque<Kept>,
    bytes: u64,
    /// Everything acknowledged is durable on every member, or kept.
    complete: bool,
    /// What is to be written again: the last that each block was to hold.
    todo: Vec<Write>,
    /// The first of these that has not been sent.
    next: usize,
    /// Those that are out, and who has not answered.
    out: BTreeMap<usize, Mask>,
}

impl Replay {
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Whether the loss of every cache loses nothing that was acknowledged.
    pub fn is_complete(&self) -> bool {
        self.complete && !mutant::is(Mutant::ReplayNotBelieved)
    }

    /// Every region that the opening found dirty is the same on all members' disks.
    pub fn all_settled(&mut self) {
        self.complete = true;
    }

    /// Whether another write would be too much to keep (R11).
    pub fn is_full(&self) -> bool {
        self.bytes >= limits::MAX_KEPT_BYTES
    }

    /// A write is being acknowledged; `next` is the next flush to begin.
    pub fn keep(&mut self, block: BlockIndex, count: u32, effect: Effect, next: FlushNo) {
        let write = Write { block, count, effect };
        self.bytes += write.bytes();
        self.kept.push_back(Kept { write, covered_by: next });
    }

    /// What each block was to hold last. Older writes are left out: a later one may have been durable.
    fn last_writes(&self) -> Vec<Write> {
        let mut writes = Vec::new();
        // Disjoint ranges of blocks that newer writes cover: first block and end.
        let mut covered: BTreeMap<u64, u64> = BTreeMap::new();
        for Kept { write, .. } in self.kept.iter().rev() {
            let (mut at, end) = (write.block.0, write.block.0 + u64::from(write.count));
            let before = covered.range(..=at).next_back().map_or(at, |(first, _)| *first);
            let mut gaps = Vec::new();
            for (first, covered_to) in covered.range(before..end) {
                if at < *first {
                    gaps.push((at, *first));
                }
                at = at.max(*covered_to);
            }
            if at < end {
                gaps.push((at, end));
            }
            writes.extend(gaps.iter().map(|(from, to)| write.part(*from, *to)));
            covered.extend(gaps);
        }
        writes
    }

    /// Every member has answered flush `no`.
    fn flushed(&mut self, no: FlushNo) {
        while let Some(kept) = self.kept.pop_front_if(|kept| kept.covered_by <= no) {
            self.bytes -= kept.write.bytes();
        }
    }

    /// A replica's answer is not awaited any more.
    pub fn forget(&mut self, slot: usize) {
        for pending in self.out.values_mut() {
            pending.remove(slot);
        }
    }
}

impl Mirror {
    /// Lets go of what is durable.
    pub(super) fn advance_kept(&mut self) {
        // Most of the time no flush has begun that could cover any of it.
        let begun = self.replay.kept.front().is_some_and(|kept| kept.covered_by < self.flush_next);
        if begun && self.phase != Phase::Replaying && self.everyone_counts() {
            let required = self.required();
            let answered = |slot: usize| self.slots[slot].attach.as_ref().expect("live").flushed;
            let all = required.iter().map(answered);
            let common = if mutant::is(Mutant::KeptTooShort) { all.max() } else { all.min() };
            let common = common.expect("a set has members");
            self.replay.flushed(common);
        }
    }

    /// Begins to write again what the members may have lost.
    pub(super) fn begin_replay(&mut self, out: &mut Vec<Output>) {
        self.phase = Phase::Replaying;
        (self.replay.next, self.replay.out) = (0, BTreeMap::new());
        self.replay.todo = self.replay.last_writes();
        let (writes, bytes) = (self.replay.kept.len(), self.replay.bytes);
        out.push(Output::Log(Event::Replaying { writes, bytes }));
    }

    pub(super) fn advance_replay(&mut self, now: u64, out: &mut Vec<Output>) {
        if self.phase != Phase::Replaying {
            return;
        }
        if self.live_members().is_empty() {
            self.reopen(now, out);
            return;
        }
        let replay = &mut self.replay;
        for (index, _) in replay.out.extract_if(.., |_, pending| pending.is_empty()) {
            for region in replay.todo[index].regions() {
                self.dirty.written(region, now, self.flush_next);
            }
        }
        while let Some(write) = self.replay.todo.get(self.replay.next) {
            if self.replay.out.len() >= limits::MAX_REPLAYED {
                break;
            }
            let (request, regions) = (write.request(), write.regions());
            let (index, targets) = (self.replay.next, self.live());
            regions.for_each(|region| self.dirty.writing(region));
            for slot in targets.iter() {
                self.send(now, slot, What::Replay(index), request.clone(), out);
            }
            self.replay.out.insert(index, targets);
            self.replay.next += 1;
        }
        if self.replay.next == self.replay.todo.len() && self.replay.out.is_empty() {
            self.replay.todo.clear();
            for kept in &mut self.replay.kept {
                kept.covered_by = self.flush_next;
            }
            self.begin_serving(out);
            self.want_flush();
        }
    }

    pub(super) fn replay_answered(&mut self, slot: usize, index: usize, reply: Reply) {
        match reply {
            Reply::Done(_) => {
                if let Some(pending) = self.replay.out.get_mut(&index) {
                    pending.remove(slot);
                }
            }
            Reply::Failed { code, .. } => self.lost.push_back((slot, fault_of(code))),
            _ => self.lost.push_back((slot, FaultReason::Nonsense)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_is_written_again_once_with_the_last_that_it_was_to_hold() {
        let mut replay = Replay::default();
        let data = |count: u32, byte: u8| Effect::Data(vec![byte; count as usize * BLOCK_SIZE as usize].into());
        replay.keep(BlockIndex(10), 10, data(10, 1), FlushNo(1));
        replay.keep(BlockIndex(0), 12, Effect::Zero { discard: true }, FlushNo(1));
        replay.keep(BlockIndex(14), 2, data(2, 2), FlushNo(1));
        replay.keep(BlockIndex(13), 4, data(4, 3), FlushNo(1));
        let mut blocks = BTreeMap::new();
        for write in replay.last_writes() {
            for i in 0..write.count {
                let byte = match &write.effect {
                    Effect::Data(data) => Some(data[(u64::from(i) * BLOCK_SIZE) as usize]),
                    Effect::Zero { discard } => discard.then_some(0),
                };
                assert_eq!(blocks.insert(write.block.0 + u64::from(i), byte), None, "once");
            }
        }
        let expected = [[0; 10], [0, 0, 1, 3, 3, 3, 3, 1, 1, 1]].concat();
        assert!(blocks.keys().copied().eq(0..20));
        assert!(blocks.values().copied().eq(expected.into_iter().map(Some)), "{blocks:?}");
    }
}
