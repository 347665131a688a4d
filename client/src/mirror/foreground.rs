//! The volume's requests: gates, locks, what is sent for them and when they are acknowledged.
//!
//! A request is *gated* until the mirror serves and its regions are settled, then takes its range lock (R4), then
//! is sent. A write stays locked until every replica that it was sent to has answered, or was given up, *and* it
//! is acknowledged: were it readable before every member of the committed set has it, a later read from a member
//! that has not could return an older value (R3).

use bytes::{Bytes, BytesMut};
use proto::frame::{Code, Reply, Request, WhatNext, block_sum, block_sums};
use proto::id::{BlockIndex, FlushNo, RegionIndex};
use proto::limits::{BLOCK_SIZE, MAX_DISCARD_BLOCKS, MAX_REQUEST_BLOCKS, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

use super::mask::Mask;
use super::range_lock::LockOwner;
use super::replay::Effect;
use super::state::{Mirror, Phase, Sent, What, fault_of, limits};
use super::types::*;

/// How often a request that a replica answers with "again" is sent again before the replica is faulted.
const MAX_RESENDS: u8 = 3;

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Too many requests are open.
    Backlog,
    /// Waits for the mirror's state: see [`Mirror::gates_open`].
    Gated,
    /// Waits for its lock.
    Locking,
    /// A read is out at one replica.
    Reading { slot: usize },
    /// A read that failed somewhere goes block by block; this is the one that is out.
    ReadingBlock { at: u32, slot: usize },
    /// Sent to every live replica.
    Writing,
    /// Waits for this flush everywhere.
    Flushing { no: FlushNo },
    /// A comparison under way.
    Comparing,
}

#[derive(Clone, Debug)]
enum Kind {
    Read,
    Write {
        data: Bytes,
        sums: Vec<u32>,
    },
    /// `whole`: the block with the part in it, once the block was read under the lock.
    Merge {
        offset: u32,
        data: Bytes,
        whole: Option<(Bytes, Vec<u32>)>,
    },
    Zero {
        discard: bool,
    },
    Flush,
    Compare {
        repair: bool,
    },
}

impl Kind {
    /// What a writing request does, for [`super::replay`].
    fn effect(&self) -> Effect {
        match self {
            Self::Write { data, .. } | Self::Merge { whole: Some((data, _)), .. } => Effect::Data(data.clone()),
            Self::Zero { discard } => Effect::Zero { discard: *discard },
            kind => unreachable!("{kind:?} does not write"),
        }
    }

    /// What a writing request sends.
    fn request(&self, block: BlockIndex, count: u32, fua: bool) -> Request {
        match self {
            Self::Write { data, sums } | Self::Merge { whole: Some((data, sums)), .. } => {
                Request::Write { block, fua, sums: sums.clone(), data: data.clone() }
            }
            Self::Zero { discard: true } if !fua => Request::Discard { block, count },
            Self::Zero { .. } => Request::WriteZeroes { block, count, fua },
            kind => unreachable!("{kind:?} does not write"),
        }
    }
}

/// A request that was taken and has not ended.
#[derive(Debug)]
pub(super) struct Op {
    kind: Kind,
    pub block: BlockIndex,
    pub count: u32,
    fua: bool,
    pub stage: Stage,
    /// Replicas that it was sent to under their present attaches.
    pub sent: Mask,
    /// Of those, the ones that have not answered.
    pub pending: Mask,
    /// Of those, the ones that did it.
    done: Mask,
    /// Of those, the members whose disk refused it, and what the last of them said.
    refused: Mask,
    refusal: OpOutcome,
    /// Replicas whose bytes were bad for the block, or run of blocks, being read.
    pub tried: Mask,
    /// Blocks read so far, when reading block by block.
    pieces: BytesMut,
    /// A second replica that the read was sent to, since the first one is late.
    pub hedge: Option<usize>,
    resends: u8,
    /// It was sent before its mirror had one member left: the flush that makes it durable there (R9).
    durable_by: Option<FlushNo>,
    /// It was sent to somebody to be done, be it under an attach that is gone.
    had_effect: bool,
    pub answered: bool,
}

impl Op {
    fn new(op: MirrorOp) -> Self {
        let (kind, block, count, fua) = match op {
            MirrorOp::Read { block, count } => (Kind::Read, block, count, false),
            MirrorOp::Write { block, data, fua } => {
                let sums = block_sums(&data);
                let count = sums.len() as u32;
                assert_eq!(data.len() as u64, u64::from(count) * BLOCK_SIZE, "writes are whole blocks");
                (Kind::Write { data, sums }, block, count, fua)
            }
            MirrorOp::Merge { block, offset, data, fua } => {
                assert!(u64::from(offset) + data.len() as u64 <= BLOCK_SIZE, "a merge stays inside its block");
                (Kind::Merge { offset, data, whole: None }, block, 1, fua)
            }
            MirrorOp::Zero { block, count, fua, discard } => (Kind::Zero { discard }, block, count, fua),
            MirrorOp::Flush => (Kind::Flush, BlockIndex(0), 0, false),
            MirrorOp::Compare { region, repair } => {
                (Kind::Compare { repair }, BlockIndex(u64::from(region.0) * REGION_BLOCKS), 0, false)
            }
        };
        Self {
            kind,
            block,
            count,
            fua,
            stage: Stage::Gated,
            sent: Mask::EMPTY,
            pending: Mask::EMPTY,
            done: Mask::EMPTY,
            refused: Mask::EMPTY,
            refusal: OpOutcome::WriteFailed,
            tried: Mask::EMPTY,
            pieces: BytesMut::new(),
            hedge: None,
            resends: 0,
            durable_by: None,
            had_effect: false,
            answered: false,
        }
    }

    /// Begins again: nothing that was sent for it counts.
    pub fn restart(&mut self) {
        self.stage = Stage::Gated;
        (self.sent, self.pending, self.done, self.tried) = (Mask::EMPTY, Mask::EMPTY, Mask::EMPTY, Mask::EMPTY);
        (self.refused, self.durable_by, self.hedge) = (Mask::EMPTY, None, None);
        self.pieces.clear();
        // Others may write the rest of the block before this one has its lock again.
        if let Kind::Merge { whole, .. } = &mut self.kind {
            *whole = None;
        }
    }

    /// What a replica said counts no more: its attach was given up (R2).
    pub fn forget(&mut self, slot: usize) {
        for mask in [&mut self.sent, &mut self.pending, &mut self.done, &mut self.refused] {
            mask.remove(slot);
        }
        self.left_to_hedge(slot);
    }

    /// The read will get nothing more from the replica: whether another has it still out.
    fn left_to_hedge(&mut self, slot: usize) -> bool {
        let Stage::Reading { slot: first } = self.stage else { return false };
        let Some(hedge) = self.hedge.take_if(|hedge| first == slot || *hedge == slot) else { return false };
        if first == slot {
            self.stage = Stage::Reading { slot: hedge };
        }
        true
    }

    /// Changes blocks, once it is sent.
    pub fn is_writing(&self) -> bool {
        self.stage == Stage::Writing
    }

    fn writes(&self) -> bool {
        matches!(self.kind, Kind::Write { .. } | Kind::Merge { .. } | Kind::Zero { .. })
    }

    fn regions(&self) -> std::ops::RangeInclusive<u32> {
        if self.count == 0 {
            return std::ops::RangeInclusive::new(1, 0);
        }
        let last = self.block.0 + u64::from(self.count) - 1;
        (self.block.0 / REGION_BLOCKS) as u32..=(last / REGION_BLOCKS) as u32
    }

    fn compared_region(&self) -> RegionIndex {
        RegionIndex((self.block.0 / REGION_BLOCKS) as u32)
    }
}

impl Mirror {
    pub(super) fn submit(&mut self, now: u64, id: u64, op: MirrorOp, out: &mut Vec<Output>) {
        assert!(id > self.last_op, "request {id} after {}", self.last_op);
        self.last_op = id;
        if !matches!(op, MirrorOp::Compare { .. }) {
            self.foreground_at = now;
        }
        let mut op = Op::new(op);
        let end = op.block.0 + u64::from(op.count);
        assert!(end <= self.cfg.blocks, "blocks {}..{end} of a mirror of {}", op.block, self.cfg.blocks);
        let longest = if matches!(op.kind, Kind::Zero { .. }) { MAX_DISCARD_BLOCKS } else { MAX_REQUEST_BLOCKS };
        assert!(op.count <= longest, "a request of {} blocks", op.count);
        if self.is_closing() {
            out.push(Output::Complete { id, outcome: OpOutcome::Aborted });
            return;
        }
        if self.admitted == limits::MAX_OPEN_OPS {
            op.stage = Stage::Backlog;
            self.backlog.push_back(id);
        } else {
            self.admitted += 1;
            self.gated.insert(id);
        }
        self.ops.insert(id, op);
    }

    pub(super) fn abort(&mut self, id: u64, out: &mut Vec<Output>) {
        let Some(op) = self.ops.get(&id) else { return };
        if op.had_effect {
            // It began again after every member was lost: parts of it may be on disks.
            return;
        }
        match op.stage {
            Stage::Backlog => {
                self.backlog.retain(|b| *b != id);
                self.ops.remove(&id);
            }
            Stage::Gated => {
                self.gated.remove(&id);
                self.forget_op(id);
            }
            Stage::Locking => {
                self.locks.release(LockOwner::Op(id), &mut self.granted);
                self.forget_op(id);
            }
            _ => return,
        }
        out.push(Output::Complete { id, outcome: OpOutcome::Aborted });
    }

    /// Takes a request that has ended off the table and lets the next one in.
    fn forget_op(&mut self, id: u64) {
        self.ops.remove(&id);
        self.admitted -= 1;
        self.admit();
    }

    /// Lets requests in from the backlog while there is room.
    pub(super) fn admit(&mut self) {
        while self.admitted < limits::MAX_OPEN_OPS
            && let Some(next) = self.backlog.pop_front()
        {
            self.ops.get_mut(&next).expect("the backlog names open requests").stage = Stage::Gated;
            self.admitted += 1;
            self.gated.insert(next);
        }
    }

    /// Every cache was lost: a flush that was asked for before can't be had any more, since what it should have
    /// made durable may be gone (R9).
    pub(super) fn fail_flushes(&mut self, out: &mut Vec<Output>) {
        let flushes = self.ops.iter().filter(|(_, op)| matches!(op.kind, Kind::Flush));
        let flushes: Vec<(u64, Stage)> = flushes.map(|(id, op)| (*id, op.stage)).collect();
        for (id, stage) in flushes {
            if stage == Stage::Backlog {
                self.backlog.retain(|b| *b != id);
                self.ops.remove(&id);
            } else {
                self.gated.remove(&id);
                self.forget_op(id);
            }
            out.push(Output::Complete { id, outcome: OpOutcome::WriteFailed });
        }
    }

    /// Whether a request may go on to its lock. Demands the regions that it waits for.
    fn gates_open(&mut self, id: u64) -> bool {
        let op = &self.ops[&id];
        if self.phase != Phase::Serving && self.phase != Phase::Closing {
            return false;
        }
        if op.writes() && (self.members.len() < self.cfg.min_in_sync || self.replay.is_full()) {
            return false;
        }
        if self.settling.is_done() || mutant::is(Mutant::ServeUnsettled) {
            return true;
        }
        let mut open = true;
        for region in op.regions().map(RegionIndex) {
            open &= self.settling.demand(region);
        }
        open
    }

    /// Looks at requests that wait for the mirror's state, and at all of them after a change of membership.
    pub(super) fn advance_ops(&mut self, now: u64, out: &mut Vec<Output>) {
        if !self.gated.is_empty() && matches!(self.phase, Phase::Serving | Phase::Closing) {
            let gated: Vec<u64> = self.gated.iter().copied().collect();
            for id in gated {
                if self.ops.contains_key(&id) && self.gates_open(id) {
                    self.gated.remove(&id);
                    self.lock(now, id, out);
                }
            }
        }
        if std::mem::take(&mut self.recheck) {
            let all: Vec<u64> = self.ops.keys().copied().collect();
            for id in all {
                self.reconsider(now, id, out);
            }
        }
    }

    fn lock(&mut self, now: u64, id: u64, out: &mut Vec<Output>) {
        let op = self.ops.get_mut(&id).expect("open");
        match op.kind {
            Kind::Flush => {
                let no = self.want_flush();
                self.ops.get_mut(&id).expect("open").stage = Stage::Flushing { no };
                return;
            }
            Kind::Compare { repair } => {
                op.stage = Stage::Comparing;
                let region = op.compared_region();
                self.compare(region, id, repair);
                return;
            }
            _ => {}
        }
        let exclusive = op.writes() && !mutant::is(Mutant::WritesShareLocks);
        op.stage = Stage::Locking;
        if self.locks.acquire(LockOwner::Op(id), op.block, op.count.into(), exclusive) {
            self.start(now, id, out);
        }
    }

    /// Goes on with everyone whose lock was granted.
    pub(super) fn advance_granted(&mut self, now: u64, out: &mut Vec<Output>) {
        while let Some(owner) = self.granted.pop() {
            match owner {
                LockOwner::Op(id) => self.start(now, id, out),
                LockOwner::Region(region) => self.equalise_locked(now, RegionIndex(region), out),
            }
        }
    }

    /// The lock is held.
    fn start(&mut self, now: u64, id: u64, out: &mut Vec<Output>) {
        match &self.ops[&id].kind {
            Kind::Read | Kind::Merge { .. } => self.read(now, id, out),
            _ => self.write(now, id, out),
        }
    }

    // ---- reading --------------------------------------------------------------------------------------------

    fn read(&mut self, now: u64, id: u64, out: &mut Vec<Output>) {
        let op = &self.ops[&id];
        let (block, count, tried) = (op.block, op.count, op.tried);
        match self.pick(now, block.0, tried) {
            Some(slot) => {
                self.ops.get_mut(&id).expect("open").stage = Stage::Reading { slot };
                self.slots[slot].pace.asked(now);
                self.send(now, slot, What::Op(id), Request::Read { block, count }, out);
            }
            None if tried.is_empty() && mutant::is(Mutant::MadeUpRead) => {
                let zeroes = vec![0; count as usize * BLOCK_SIZE as usize];
                self.read_good(now, id, None, zeroes.into(), out);
            }
            None if tried.is_empty() => {
                // Nobody is there: the membership decides, and everything begins again.
                self.ops.get_mut(&id).expect("open").stage = Stage::Reading { slot: usize::MAX };
            }
            // Every member has a bad block somewhere in the range: take each block from where it is good.
            None => {
                self.ops.get_mut(&id).expect("open").tried = Mask::EMPTY;
                self.read_block(now, id, 0, out);
            }
        }
    }

    fn read_block(&mut self, now: u64, id: u64, at: u32, out: &mut Vec<Output>) {
        let op = &self.ops[&id];
        let block = BlockIndex(op.block.0 + u64::from(at));
        match self.pick(now, block.0, op.tried) {
            Some(slot) => {
                self.ops.get_mut(&id).expect("open").stage = Stage::ReadingBlock { at, slot };
                self.send(now, slot, What::Op(id), Request::Read { block, count: 1 }, out);
            }
            None if op.tried.is_empty() => {
                self.ops.get_mut(&id).expect("open").stage = Stage::ReadingBlock { at, slot: usize::MAX };
            }
            None => self.finish(now, id, OpOutcome::Medium { block }, out),
        }
    }

    fn read_answered(&mut self, now: u64, slot: usize, id: u64, reply: Reply, out: &mut Vec<Output>) {
        let op = &self.ops[&id];
        let (first, count, single) = match op.stage {
            Stage::Reading { slot: first } if slot != first && op.hedge != Some(slot) => return,
            Stage::Reading { .. } => (op.block.0, op.count, None),
            Stage::ReadingBlock { at, .. } => (op.block.0 + u64::from(at), 1, Some(at)),
            _ => return,
        };
        let bad = match reply {
            Reply::Read { block, sums, data } if block.0 == first && sums.len() as u32 == count => {
                // Bytes that the network or a node's memory changed are as bad as bytes that a disk did (R10).
                let wrong = data.chunks_exact(BLOCK_SIZE as usize).zip(&sums).position(|(b, s)| block_sum(b) != *s);
                let wrong = wrong.filter(|_| !mutant::is(Mutant::SumsUnchecked));
                match wrong {
                    None => return self.read_good(now, id, single, data, out),
                    Some(i) => Some(first + i as u64),
                }
            }
            Reply::Failed { code: Code::Checksum | Code::ReadFailed, block, .. } => {
                Some(block.clamp(first, first + u64::from(count) - 1))
            }
            Reply::Failed { code, .. } if code.what_next() == WhatNext::Retry => None,
            Reply::Failed { code, .. } => return self.lost.push_back((slot, fault_of(code))),
            _ => return self.lost.push_back((slot, FaultReason::Nonsense)),
        };
        let op = self.ops.get_mut(&id).expect("open");
        match bad {
            Some(block) => {
                op.tried.insert(slot);
                let replica = self.slots[slot].def.replica;
                out.push(Output::Log(Event::BadBlock { replica, block: BlockIndex(block) }));
                self.repair(RegionIndex((block / REGION_BLOCKS) as u32));
                if mutant::is(Mutant::FirstBadCopyIsAll) {
                    return self.finish(now, id, OpOutcome::Medium { block: BlockIndex(block) }, out);
                }
            }
            None => {
                op.resends += 1;
                if op.resends > MAX_RESENDS {
                    return self.lost.push_back((slot, FaultReason::Refused(Code::Busy)));
                }
            }
        }
        match single {
            None if self.ops.get_mut(&id).expect("open").left_to_hedge(slot) => {}
            None => self.read(now, id, out),
            Some(at) => self.read_block(now, id, at, out),
        }
    }

    fn read_good(&mut self, now: u64, id: u64, single: Option<u32>, data: Bytes, out: &mut Vec<Output>) {
        self.drop_hedge(id);
        let op = self.ops.get_mut(&id).expect("open");
        let data = match single {
            None => data,
            Some(at) => {
                op.pieces.extend_from_slice(&data);
                op.tried = Mask::EMPTY;
                if at + 1 < op.count {
                    return self.read_block(now, id, at + 1, out);
                }
                std::mem::take(&mut op.pieces).freeze()
            }
        };
        if let Kind::Merge { offset, data: part, whole } = &mut op.kind {
            let mut block = BytesMut::from(&data[..]);
            block[*offset as usize..*offset as usize + part.len()].copy_from_slice(part);
            let sums = block_sums(&block);
            *whole = Some((block.freeze(), sums));
            self.write(now, id, out);
        } else {
            self.finish(now, id, OpOutcome::Data(data), out);
        }
    }

    // ---- writing --------------------------------------------------------------------------------------------

    fn write(&mut self, now: u64, id: u64, out: &mut Vec<Output>) {
        let targets = self.live();
        // With one member left nothing else keeps an acknowledged write (R9).
        let last = self.members.len() == 1 && !mutant::is(Mutant::LastMemberCaches);
        let fua = !self.cfg.write_cache || last;
        let op = self.ops.get_mut(&id).expect("open");
        op.stage = Stage::Writing;
        op.had_effect = true;
        (op.sent, op.pending, op.done) = (targets, targets, Mask::EMPTY);
        op.fua |= fua;
        for region in op.regions() {
            self.dirty.writing(RegionIndex(region));
        }
        let op = &self.ops[&id];
        let request = op.kind.request(op.block, op.count, op.fua);
        for slot in targets.iter() {
            self.send(now, slot, What::Op(id), request.clone(), out);
        }
    }

    fn write_answered(&mut self, now: u64, slot: usize, id: u64, reply: Reply, out: &mut Vec<Output>) {
        let op = self.ops.get_mut(&id).expect("open");
        match reply {
            Reply::Done(_) => {
                op.pending.remove(slot);
                op.done.insert(slot);
            }
            Reply::Failed { code, .. } if code.what_next() == WhatNext::Retry && op.resends < MAX_RESENDS => {
                op.resends += 1;
                let request = op.kind.request(op.block, op.count, op.fua);
                self.send(now, slot, What::Op(id), request, out);
                return;
            }
            Reply::Failed { code: code @ (Code::WriteFailed | Code::NoSpace), .. } if self.slots[slot].is_member() => {
                op.pending.remove(slot);
                let refused = if mutant::is(Mutant::RefusalCountsAsDone) { &mut op.done } else { &mut op.refused };
                refused.insert(slot);
                op.refusal = if code == Code::NoSpace { OpOutcome::NoSpace } else { OpOutcome::WriteFailed };
            }
            Reply::Failed { code, .. } => {
                self.lost.push_back((slot, fault_of(code)));
                return;
            }
            _ => {
                self.lost.push_back((slot, FaultReason::Nonsense));
                return;
            }
        }
        self.reconsider(now, id, out);
    }

    /// What a write means that members' disks refused, once all members have answered: those that refused leave,
    /// if another did it. Where nobody did it is the initiator's error, since the last member is never removed
    /// (R2); the blocks may then be different everywhere, and are settled before anybody sees them.
    fn judge_refusals(&mut self, id: u64, out: &mut Vec<Output>) {
        let members = self.live_members();
        // While another may be a member already, which has not what these now hold, the lock is kept: reads would
        // see it, and later ones, there, would not (R3).
        let in_doubt = !self.proposed().within(members);
        let Some(op) = self.ops.get_mut(&id) else { return };
        if op.stage != Stage::Writing || op.refused.is_empty() || !(op.pending & members).is_empty() {
            return;
        }
        if !(op.done & members).is_empty() {
            let code = if op.refusal == OpOutcome::NoSpace { Code::NoSpace } else { Code::WriteFailed };
            self.lost.extend(op.refused.iter().map(|slot| (slot, fault_of(code))));
            return;
        }
        if in_doubt {
            return;
        }
        op.refused = Mask::EMPTY;
        if !std::mem::replace(&mut op.answered, true) {
            out.push(Output::Complete { id, outcome: op.refusal.clone() });
        }
        for region in op.regions() {
            self.settling.broken(RegionIndex(region));
        }
        // A joining replica may have done what no member did.
        let joining = (self.live() - members).iter();
        self.lost.extend(joining.map(|slot| (slot, FaultReason::CopyInDoubt)));
    }

    /// Who must have done a write, or a flush, before it is acknowledged: the committed members; while a change
    /// is in doubt those of the proposed set as well; and a joining replica that counts (R2, R7).
    pub(super) fn required(&self) -> Mask {
        self.members | self.proposed() | self.counting()
    }

    /// Whether all that are required can say that they have done something. A member that was given up and is back
    /// joins under another attach: what it answers there says nothing of what it lost in between, however far its join
    /// has come, until a newer set has it. Nor may one that is being added have been lost and come back, unless it has
    /// flushed all that it was sent since: the addition may be committed already (R2, R9).
    pub(super) fn everyone_counts(&self) -> bool {
        let members = self.live_members();
        let added = members | self.ready_to_enter();
        self.members.within(members)
            && self.proposed().within(added)
            && self.required().within(members | self.counting())
    }

    fn reconsider(&mut self, now: u64, id: u64, out: &mut Vec<Output>) {
        self.judge_refusals(id, out);
        let mut required = self.required();
        let mut hold = self.holds_acknowledgements() || !self.everyone_counts();
        if mutant::is(Mutant::AckBeforeCommit) {
            (required, hold) = (self.live_members(), false);
        }
        let Some(op) = self.ops.get_mut(&id) else { return };
        match op.stage {
            Stage::Writing => {
                if !op.answered && required.within(op.done) && !hold {
                    // With one member left nothing else keeps an acknowledged write (R9).
                    let alone = self.members.len() == 1 && !op.fua && !mutant::is(Mutant::LastMemberCaches);
                    if alone && op.durable_by.is_none_or(|no| !self.flushed(no, required)) {
                        if self.ops[&id].durable_by.is_none() {
                            let no = self.want_flush();
                            self.ops.get_mut(&id).expect("open").durable_by = Some(no);
                        }
                        return;
                    }
                    let op = self.ops.get_mut(&id).expect("open");
                    op.answered = true;
                    let durable = op.fua || alone;
                    if !durable {
                        self.unflushed_bytes += u64::from(op.count) * BLOCK_SIZE;
                    }
                    if !durable || !self.replay.is_empty() {
                        // Only a flush lets go of it, and the initiator of durable writes may never ask for one.
                        self.unflushed_since.get_or_insert(now);
                        self.replay.keep(op.block, op.count, op.kind.effect(), self.flush_next);
                    }
                    out.push(Output::Complete { id, outcome: OpOutcome::Done });
                }
                let op = &self.ops[&id];
                if op.answered && (op.pending.is_empty() || mutant::is(Mutant::UnlockEarly)) {
                    let next = self.flush_next;
                    for region in op.regions() {
                        self.dirty.written(RegionIndex(region), now, next);
                    }
                    self.forget_op(id);
                    self.locks.release(LockOwner::Op(id), &mut self.granted);
                }
            }
            Stage::Reading { .. } if mutant::is(Mutant::ForgottenRead) => {}
            Stage::Reading { slot } if slot == usize::MAX || !self.slots[slot].is_member() => {
                self.read(now, id, out);
            }
            Stage::ReadingBlock { slot, at } if slot == usize::MAX || !self.slots[slot].is_member() => {
                self.read_block(now, id, at, out);
            }
            Stage::Flushing { no } => {
                if hold {
                    return;
                }
                if self.flushed(no, required) {
                    self.finish(now, id, OpOutcome::Done, out);
                } else if no < self.flush_next && self.flush_pending.is_empty() && required.within(self.live()) {
                    // It ran before somebody counted who does now.
                    let no = self.want_flush();
                    self.ops.get_mut(&id).expect("open").stage = Stage::Flushing { no };
                }
            }
            _ => {}
        }
    }

    fn finish(&mut self, _now: u64, id: u64, outcome: OpOutcome, out: &mut Vec<Output>) {
        let locked = !matches!(self.ops[&id].kind, Kind::Flush | Kind::Compare { .. });
        self.forget_op(id);
        if locked {
            self.locks.release(LockOwner::Op(id), &mut self.granted);
        }
        if locked && mutant::is(Mutant::ReleasedTwice) {
            self.locks.release(LockOwner::Op(id), &mut self.granted);
        }
        out.push(Output::Complete { id, outcome });
    }

    /// A comparison has ended.
    pub(super) fn compared(&mut self, now: u64, id: u64, comparison: Comparison, out: &mut Vec<Output>) {
        if self.ops.contains_key(&id) {
            self.finish(now, id, OpOutcome::Compared(comparison), out);
        }
    }

    pub(super) fn op_answered(&mut self, now: u64, slot: usize, id: u64, reply: Reply, out: &mut Vec<Output>) {
        self.foreground_at = now;
        match self.ops.get(&id).map(|op| op.stage) {
            Some(Stage::Reading { .. } | Stage::ReadingBlock { .. }) => self.read_answered(now, slot, id, reply, out),
            Some(Stage::Writing) => self.write_answered(now, slot, id, reply, out),
            _ => {}
        }
    }

    // ---- flushing -------------------------------------------------------------------------------------------

    /// Asks for a flush that begins after this moment; it has done its work at `slots` when
    /// [`Self::flushed`] says so. Those who ask while one runs share the next.
    pub(super) fn want_flush(&mut self) -> FlushNo {
        self.flush_wanted = true;
        self.flush_next
    }

    /// Whether flush `no`, or a later one, was answered by all of these under their present attaches.
    pub(super) fn flushed(&self, no: FlushNo, slots: Mask) -> bool {
        slots.iter().all(|s| self.slots[s].attach.as_ref().is_some_and(|a| a.flushed >= no))
    }

    pub(super) fn advance_flush(&mut self, now: u64, out: &mut Vec<Output>) {
        let overdue = self.unflushed_since.is_some_and(|since| now >= since + limits::MAX_UNFLUSHED_MS);
        if overdue || self.unflushed_bytes >= limits::MAX_UNFLUSHED_BYTES {
            self.flush_wanted = true;
        }
        let targets = self.live();
        if !self.flush_wanted || !self.flush_pending.is_empty() || targets.is_empty() {
            return;
        }
        let flush = self.flush_next;
        self.flush_next = flush.next();
        self.flush_wanted = false;
        self.flush_pending = targets;
        self.unflushed_bytes = 0;
        self.unflushed_since = None;
        for slot in targets.iter() {
            self.send(now, slot, What::Flush(flush), Request::Flush { flush }, out);
        }
    }

    /// The requests that change blocks and were sent, but not to `slot` (R7's barrier).
    pub(super) fn writes_not_sent_to(&self, slot: usize) -> bool {
        self.ops.values().any(|op| op.is_writing() && !op.sent.contains(slot))
    }

    /// Whether a request up to number `last` still awaits `slot`'s answer.
    pub(super) fn writes_awaited_from(&self, slot: usize, last: u64) -> bool {
        self.ops.range(..=last).any(|(_, op)| op.is_writing() && op.pending.contains(slot))
    }

    /// Requests to replicas that are out, for tests and assertions.
    pub fn sent_requests(&self) -> usize {
        self.sent.values().filter(|Sent { what, .. }| !matches!(what, What::Attach)).count()
    }
}
