//! The gateway's side: what `client/src/mirror` does with each input, in the order in which it does it.

use crate::config::{Config, Mutant};
use crate::state::*;

/// One gateway, and what it can reach at once.
pub struct Cx<'a> {
    pub cfg: &'a Config,
    pub g: &'a mut Gateway,
    pub wire: &'a mut Wire,
    pub proposals: &'a mut [Option<Proposal>; 3],
    pub promise: &'a mut Promise,
    /// Members that a take-over has just decided to keep, and replicas about to be proposed.
    pub kept: Mask,
    /// Replicas whose caches have not been lost. For the checker.
    pub untouched: Mask,
    pub breach: &'a mut Option<Breach>,
    /// The leader would say that no older lease lives (R3).
    pub old_lease_over: bool,
}

impl Cx<'_> {
    fn is(&self, mutant: Mutant) -> bool {
        self.cfg.mutant == Some(mutant)
    }

    // ---- state.rs: slots and sets -----------------------------------------------------------------------------

    fn slots_where(&self, pred: impl Fn(&Slot) -> bool) -> Mask {
        (0..N).filter(|s| pred(&self.g.slots[*s])).map(bit).sum()
    }
    /// `Mirror::live_members`
    pub fn live_members(&self) -> Mask {
        self.slots_where(|s| s.role == Role::Member) & self.g.members
    }
    /// `Mirror::live`
    pub fn live(&self) -> Mask {
        self.slots_where(Slot::is_live)
    }
    /// `Mirror::counting`
    fn counting(&self) -> Mask {
        if self.is(Mutant::JoinWithoutCounting) {
            return 0;
        }
        self.slots_where(|s| {
            matches!(s.join(), Some(JoinStage::Draining(_) | JoinStage::Flushing(_) | JoinStage::Proposing))
        })
    }
    fn proposed(&self) -> Mask {
        match self.g.change {
            Change::Proposed { members, .. } if !self.is(Mutant::IgnoreDoubt) => members,
            _ => 0,
        }
    }
    fn in_doubt(&self) -> bool {
        matches!(self.g.change, Change::Proposed { .. })
    }
    /// `Mirror::required`
    fn required(&self) -> Mask {
        if self.is(Mutant::AckBeforeCommit) {
            return self.live_members() | self.counting();
        }
        self.g.members | self.proposed() | self.counting()
    }

    pub fn send(&mut self, slot: usize, what: What) {
        let attach = AttachId(self.g.slots[slot].attach);
        assert!(attach.is_some(), "only attached replicas are sent to");
        self.wire.push(Msg { slot: slot as u8, attach, what, stage: Stage::Sent });
    }

    /// `Mirror::attach_where_due`
    pub fn attach(&mut self, slot: usize) {
        // The code numbers the attaches of all replicas together; what counts is their order at each.
        let Slot { attaches, clean_acked, attached_before, .. } = self.g.slots[slot];
        let attaches = attaches + 1;
        let attach = AttachId::new(self.g.epoch, attaches).0;
        let role = Role::Attaching;
        self.g.slots[slot] = Slot { attach, role, attaches, clean_acked, attached_before, ..Slot::EMPTY };
        self.send(slot, What::Attach);
    }

    /// `Mirror::attached`
    pub fn attached(&mut self, slot: usize, r: &Replica, stored_epoch: u8) {
        if r.version > self.g.version || stored_epoch > self.g.epoch {
            *self.breach = Some(Breach::MetadataIsOld);
            return self.stop();
        }
        let s = &mut self.g.slots[slot];
        s.as_new = r.clean < s.clean_acked || (s.attached_before && stored_epoch < self.g.epoch);
        s.attached_before = true;
        s.restarted = !r.told;
        (s.info_told, s.info_suspect, s.info_kept) = (r.told, r.suspect, r.kept);
        (s.info_clean, s.info_epoch, s.info_version) = (r.clean, r.kept_epoch, r.version);
        s.role = Role::Standby;
        if self.g.phase == Phase::Opening {
            self.request_list(slot);
        } else {
            self.start_join(slot);
        }
    }

    fn request_list(&mut self, slot: usize) {
        if !self.g.slots[slot].asked {
            self.g.slots[slot].asked = true;
            self.send(slot, What::List);
        }
        self.g.slots[slot].listed = None;
    }

    /// `Mirror::give_up`
    fn give_up(&mut self, slot: usize) {
        let attach = AttachId(self.g.slots[slot].attach);
        let Slot { attaches, clean_acked, attached_before, .. } = self.g.slots[slot];
        self.g.slots[slot] = Slot { attaches, clean_acked, attached_before, ..Slot::EMPTY };
        if !attach.is_some() {
            return;
        }
        // Answers under this attach are believed no more; requests may still be carried out.
        self.wire.retain(|m| m.attach != attach || m.slot as usize != slot || !matches!(m.stage, Stage::Answered(_)));
        // A flush that nobody waits for can only help.
        self.wire.retain(|m| {
            m.attach != attach
                || m.slot as usize != slot
                || !matches!(m.what, What::Flush(_))
                || m.stage == Stage::Begun
        });
        self.g.flush_pending &= !bit(slot);
        // `equalise_lost`: the destination of a copy whose source is lost goes too.
        if let Some(eq) = &mut self.g.eq {
            eq.participants &= !bit(slot);
            match &mut eq.stage {
                EqStage::Hashing { pending } => *pending &= !bit(slot),
                EqStage::Copying { base, pending } => {
                    *pending &= !bit(slot);
                    if *base as usize == slot && *pending != 0 {
                        eq.failed = true;
                        let targets = std::mem::take(pending);
                        if self.cfg.mutant != Some(Mutant::KeepTargetOfLostCopy) {
                            self.g.lost |= targets;
                        }
                    }
                }
                EqStage::Locking | EqStage::Planning => {}
            }
        }
        self.g.announced = false;
        if let Some(cleaning) = &mut self.g.cleaning {
            cleaning.failed |= cleaning.announces || cleaning.pending & bit(slot) != 0;
            cleaning.pending &= !bit(slot);
        }
        if let Change::Storing { pending } = &mut self.g.change {
            *pending &= !bit(slot);
        }
        if self.g.extra_bases & bit(slot) != 0 {
            self.g.extra_bases &= !bit(slot);
            self.g.left_behind |= bit(slot);
            if self.g.settle == Settle::Unsettled && self.g.released {
                self.g.settle = Settle::Blocked;
            }
        }
        self.g.replay.out &= !bit(slot);
        if let Some(op) = &mut self.g.op {
            op.sent &= !bit(slot);
            op.pending &= !bit(slot);
            op.done &= !bit(slot);
        }
    }

    pub fn stop(&mut self) {
        self.g.phase = Phase::Stopped;
        let epoch = self.g.epoch;
        self.wire.retain(|m| m.attach.epoch() != epoch || !matches!(m.stage, Stage::Answered(_)));
    }

    /// Whether an answer under this attach counts (`Mirror::answered`, R1).
    pub fn believes(&self, slot: usize, attach: AttachId) -> bool {
        self.g.slots[slot].attach == attach.0
    }

    // ---- answers ----------------------------------------------------------------------------------------------

    pub fn listed(&mut self, slot: usize, dirty: bool, suspect: bool) {
        self.g.slots[slot].listed = Some((dirty, suspect));
        self.g.slots[slot].asked = false;
    }

    pub fn flush_done(&mut self, slot: usize, no: u8) {
        let s = &mut self.g.slots[slot];
        s.flushed = s.flushed.max(no);
        self.g.flush_pending &= !bit(slot);
    }

    pub fn stored(&mut self, slot: usize) {
        if let Change::Storing { pending } = &mut self.g.change {
            *pending &= !bit(slot);
        }
    }

    pub fn cleaned(&mut self, slot: usize) {
        if let Some(cleaning) = &mut self.g.cleaning {
            cleaning.pending &= !bit(slot);
            self.g.slots[slot].clean_acked = self.g.clean;
        }
    }

    pub fn marked(&mut self, slot: usize) {
        if self.g.slots[slot].join() == Some(JoinStage::Marking) {
            self.g.slots[slot].role = Role::Joining(JoinStage::Barrier);
        }
    }

    pub fn written(&mut self, slot: usize, value: u8) {
        if self.g.phase == Phase::Replaying {
            self.g.replay.out &= !bit(slot);
            return;
        }
        if let Some(op) = &mut self.g.op
            && op.value == Some(value)
            && op.stage == OpStage::Writing
        {
            op.pending &= !bit(slot);
            op.done |= bit(slot);
        }
    }

    /// A read's answer: it ends, under a lease that lives now (R3).
    pub fn read(&mut self, slot: usize, value: u8) {
        let Some(op) = self.g.op.filter(|op| op.stage == OpStage::Reading(slot as u8)) else { return };
        self.g.op = None;
        if !self.g.lease && !self.is(Mutant::ReplyAfterLease) {
            return;
        }
        if value < op.floor {
            *self.breach = Some(Breach::ReadWentBack { got: value, known: op.floor });
        }
        self.promise.seen = self.promise.seen.max(value);
    }

    pub fn hashed(&mut self, slot: usize, value: u8) {
        if let Some(Equalise { stage: EqStage::Hashing { pending }, values, .. }) = &mut self.g.eq {
            *pending &= !bit(slot);
            values[slot] = value + 1;
        }
    }

    pub fn copied(&mut self, target: usize) {
        if let Some(Equalise { stage: EqStage::Copying { pending, .. }, .. }) = &mut self.g.eq {
            *pending &= !bit(target);
        }
    }

    /// `Mirror::set_decided`
    pub fn decided(&mut self, proposal: &Proposal, current: &Raft) {
        let Change::Proposed { members, awaited } = self.g.change else { return };
        match proposal.decision {
            Decision::Asked => unreachable!("not an answer"),
            Decision::Superseded => self.stop(),
            Decision::Refused if self.is(Mutant::StaleSet) => {
                self.g.version = current.version;
                self.g.change = Change::None;
            }
            Decision::Refused => {
                self.g.version = current.version;
                self.g.members = current.members;
                self.g.awaited = current.awaited;
                self.g.change = Change::None;
                self.demote_and_promote();
            }
            Decision::Committed(version) => {
                if version <= self.g.version {
                    *self.breach = Some(Breach::VersionFell);
                    return;
                }
                self.g.version = version;
                (self.g.members, self.g.awaited) = (members, awaited);
                self.demote_and_promote();
                if !matches!(self.g.phase, Phase::Serving | Phase::Closing) {
                    self.g.change = Change::None;
                    return;
                }
                let storing = self.live_members();
                self.store_set(storing);
            }
        }
    }

    fn store_set(&mut self, storing: Mask) {
        self.g.change = Change::Storing { pending: storing };
        for slot in slots(storing) {
            self.send(slot, What::StoreSet { version: self.g.version, clean: self.g.clean });
        }
    }

    fn demote_and_promote(&mut self) {
        for slot in 0..N {
            let member = self.g.members & bit(slot) != 0;
            if member && self.g.slots[slot].join() == Some(JoinStage::Proposing) {
                let s = &mut self.g.slots[slot];
                (s.role, s.as_new, s.restarted) = (Role::Member, false, false);
            }
            if !member && self.g.slots[slot].role == Role::Member {
                self.g.lost |= bit(slot);
            }
        }
    }

    // ---- `Mirror::advance` ------------------------------------------------------------------------------------

    pub fn advance(&mut self) {
        for _ in 0..64 {
            let before = *self.g;
            while self.g.lost != 0 {
                let slot = self.g.lost.trailing_zeros() as usize;
                self.g.lost &= !bit(slot);
                self.give_up(slot);
            }
            if matches!(self.g.phase, Phase::Off | Phase::Stopped | Phase::Closed) || self.breach.is_some() {
                return;
            }
            self.advance_opening();
            self.advance_replay();
            self.advance_membership();
            self.advance_settling();
            self.advance_joins();
            self.advance_equalise();
            self.advance_kept();
            self.advance_op();
            self.advance_flush();
            self.advance_clean();
            self.advance_close();
            if *self.g == before {
                return;
            }
        }
        panic!("a gateway does not come to rest: {:?}", self.g);
    }

    // ---- take_over.rs -----------------------------------------------------------------------------------------

    fn reopen(&mut self) {
        if self.g.phase == Phase::Closing && self.g.replay.is_empty() {
            self.g.phase = Phase::Closed;
            return;
        }
        self.g.close_wanted |= self.g.phase == Phase::Closing;
        if self.g.phase == Phase::Replaying && self.is(Mutant::SecondLossForgets) {
            self.g.replay.forget();
        }
        for slot in 0..N {
            self.give_up(slot);
        }
        self.g.lost = 0;
        if !self.in_doubt() {
            self.g.change = Change::None;
        }
        self.g.eq = None;
        (self.g.cleaning, self.g.announced) = (None, false);
        self.g.flush_pending = 0;
        self.g.flush_wanted = false;
        (self.g.settle, self.g.settle_ended, self.g.released) = (Settle::Done, false, false);
        (self.g.left_behind, self.g.extra_bases, self.g.awaited_before) = (0, 0, false);
        self.g.writing = 0;
        self.g.covered = if self.g.tracked { self.g.flush_next } else { 0 };
        if let Some(op) = &mut self.g.op {
            if op.answered {
                self.g.op = None;
            } else {
                op.stage = OpStage::Gated;
                (op.sent, op.pending, op.done, op.durable_by) = (0, 0, 0, None);
            }
        }
        if let Some(flush) = &mut self.g.flush_op {
            flush.no = 0;
        }
        self.g.phase = Phase::Opening;
    }

    /// Members, and those awaited, that have not answered.
    pub fn awaiting(&self) -> Mask {
        slots(self.g.members | self.g.awaited)
            .filter(|s| !(self.g.slots[*s].is_answered() && self.g.slots[*s].listed.is_some()))
            .map(bit)
            .sum()
    }

    /// Whether the opening could go on without those that have not answered, if they can't be reached.
    pub fn could_decide_without(&self) -> Mask {
        let awaiting = self.awaiting();
        let waits = self.g.phase != Phase::Opening
            || self.in_doubt()
            || slots(awaiting).any(|s| self.g.slots[s].attach != 0)
            || self.g.members & !awaiting == 0;
        if waits { 0 } else { awaiting }
    }

    fn advance_opening(&mut self) {
        if self.g.phase == Phase::Opening && !self.in_doubt() && self.awaiting() == 0 {
            self.decide(0);
        }
    }

    /// `Mirror::advance_opening` once its patience is over, and `Mirror::decide`.
    pub fn decide(&mut self, missing: Mask) {
        let unfenced = self.g.members & missing != 0;
        if unfenced && !self.old_lease_over && !self.is(Mutant::TakeOverUnderOldLease) {
            return;
        }
        let reached = self.g.members & !missing;
        self.find_old_images(reached);
        let eligible: Mask = slots(reached).filter(|s| !self.g.slots[*s].as_new).map(bit).sum();
        let intact: Mask = slots(eligible).filter(|s| !self.g.slots[*s].info_suspect).map(bit).sum();
        let mut killed: Mask = slots(eligible).filter(|s| self.g.slots[*s].info_kept).map(bit).sum();
        if self.is(Mutant::KilledIsLost) {
            killed = 0;
        }
        let whole = intact | killed;
        let complete = self.g.replay.complete;
        let mut blocked = false;
        let mut left_behind = 0;
        let keep = if intact != 0 && !self.is(Mutant::KeepRestarted) {
            whole
        } else if eligible == 0 {
            return;
        } else {
            let suspect = slots(eligible).any(|s| self.g.slots[s].listed.is_some_and(|l| l.1));
            let all_here = missing == 0 && self.g.awaited == 0;
            if !(complete || all_here || self.is(Mutant::GoOnWithRestarted)) {
                left_behind = missing | self.g.awaited;
                blocked = suspect;
            }
            if killed == 0 || self.is(Mutant::KeepRestarted) { eligible } else { killed }
        };
        let clean = slots(keep).map(|s| self.g.slots[s].info_clean).max().expect("somebody is kept");
        self.g.clean = self.g.clean.max(clean);
        let dirty = slots(keep).any(|s| self.g.slots[s].listed.expect("listed").0);
        if dirty && !self.g.tracked && self.cfg.cleans() {
            (self.g.tracked, self.g.writing, self.g.covered) = (true, 0, self.g.flush_next);
        }
        self.g.settle = match (blocked, dirty) {
            (true, _) => Settle::Blocked,
            (false, true) => Settle::Unsettled,
            (false, false) => Settle::Done,
        };
        self.g.settle_ended = false;
        self.g.left_behind = left_behind;
        self.g.awaited_before = self.g.awaited != 0;
        (self.g.released, self.g.extra_bases) = (false, 0);
        for slot in 0..N {
            if !self.g.slots[slot].is_answered() {
                continue;
            }
            if keep & bit(slot) != 0 {
                let s = &mut self.g.slots[slot];
                s.role = Role::Member;
                s.suspect = s.listed.expect("listed").1;
            } else {
                self.start_join(slot);
            }
        }
        if whole == 0 && !complete {
            // What is taken for an old image is not believed (R6): one that was killed before it could store that this
            // session keeps it, where another could.
            let held = self.untouched & self.g.members & !self.slots_where(|s| s.as_new);
            if !blocked && held != 0 && self.promise.acked > self.promise.flushed {
                *self.breach = Some(Breach::GivenUpThoughHeld);
            }
            self.every_cache_was_lost();
        }
        let g = &*self.g;
        let current = |s: usize| {
            let slot = &g.slots[s];
            slot.info_told && slot.info_epoch == g.epoch && slot.info_version == g.version && slot.info_clean == g.clean
        };
        let store = keep == g.members && !slots(keep).all(current);
        slots(keep).for_each(|s| self.g.slots[s].forget_info());
        if store {
            self.store_set(keep);
        }
        if whole == 0 && !self.g.replay.is_empty() {
            self.begin_replay();
        } else {
            self.begin_serving();
        }
    }

    /// `Mirror::begin_serving`, `begin_close`
    fn begin_serving(&mut self) {
        self.g.phase = if std::mem::take(&mut self.g.close_wanted) { Phase::Closing } else { Phase::Serving };
        self.g.closing_flush = 0;
    }

    // ---- replay.rs --------------------------------------------------------------------------------------------

    fn begin_replay(&mut self) {
        self.g.phase = Phase::Replaying;
        let kept = self.g.replay.kept().len() as u8;
        // Of each block what was written last: nothing older goes over what is durable.
        let next = if self.is(Mutant::ReplayInOrder) { 0 } else { kept - 1 };
        (self.g.replay.next, self.g.replay.writing, self.g.replay.out) = (next, false, 0);
    }

    fn advance_replay(&mut self) {
        if self.g.phase != Phase::Replaying {
            return;
        }
        if self.live_members() == 0 {
            return self.reopen();
        }
        if self.g.replay.writing {
            if self.g.replay.out != 0 {
                return;
            }
            self.g.replay.writing = false;
            self.changed();
        }
        let next = self.g.replay.next;
        if let Some(Kept { value, .. }) = self.g.replay.kept().get(next as usize).copied() {
            let targets = self.live();
            self.changing();
            for slot in slots(targets) {
                self.send(slot, What::Write { value, fua: false });
            }
            (self.g.replay.next, self.g.replay.writing, self.g.replay.out) = (next + 1, true, targets);
            return;
        }
        self.g.replay.next = 0;
        if self.is(Mutant::ReplayedIsDurable) {
            self.g.replay.forget();
        } else if !self.is(Mutant::ReplayUnderOldFlush) {
            self.g.replay.cover(self.g.flush_next);
        }
        self.begin_serving();
        self.want_flush();
    }

    /// Lets go of what is durable.
    fn advance_kept(&mut self) {
        let guarded = self.g.phase != Phase::Replaying || self.is(Mutant::ReplayUnderOldFlush);
        let all = self.everyone_counts() || self.is(Mutant::LetGoWithoutAll);
        if self.g.replay.is_empty() || !guarded || !all {
            return;
        }
        let asked = match self.cfg.mutant {
            Some(Mutant::LetGoWithoutAll) => self.live_members(),
            Some(Mutant::LetGoWithoutAdded) => self.g.members,
            _ => self.required(),
        };
        let answered = slots(asked).map(|slot| self.g.slots[slot].flushed).min();
        self.g.replay.flushed(answered.unwrap_or(0));
    }

    // ---- take_over.rs: going on -------------------------------------------------------------------------------

    /// The flush that waits fails, and initiators are told.
    fn every_cache_was_lost(&mut self) {
        self.g.power_on = true;
        if !self.is(Mutant::FlushOutlivesLoss) {
            self.g.flush_op = None;
        }
        self.promise.acked = self.promise.flushed;
        self.promise.seen = self.promise.flushed;
        self.promise.power_on_epoch = self.g.epoch;
        if let Some(op) = &mut self.g.op {
            op.floor = self.promise.flushed;
        }
    }

    fn find_old_images(&mut self, reached: Mask) {
        if self.is(Mutant::KeepOldImage) {
            return;
        }
        let known = |g: &Gateway| slots(reached).map(|s| g.slots[s]).filter(|s| !s.as_new).collect::<Vec<_>>();
        let infos = known(self.g);
        let clean = infos.iter().map(|s| s.info_clean).max().unwrap_or(0);
        let epoch = infos.iter().map(|s| s.info_epoch).max().unwrap_or(0);
        for slot in slots(reached) {
            let s = &mut self.g.slots[slot];
            let behind = s.info_clean + 1 < clean || s.info_epoch < epoch;
            s.as_new |= s.restarted && behind;
        }
    }

    fn flushed(&self, no: u8, mask: Mask) -> bool {
        slots(mask).all(|s| self.g.slots[s].attach != 0 && self.g.slots[s].flushed >= no)
    }

    fn want_flush(&mut self) -> u8 {
        self.g.flush_wanted = true;
        self.g.flush_next
    }

    fn is_settled(&self) -> bool {
        self.g.settle == Settle::Done
    }

    fn advance_settling(&mut self) {
        if !matches!(self.g.phase, Phase::Serving | Phase::Closing) {
            return;
        }
        if self.g.settle == Settle::Blocked {
            self.try_release();
        }
        // A member that is not there may lack what the others were made equal with.
        if let Settle::Flushing(no) = self.g.settle
            && self.everyone_counts()
            && self.flushed(no, self.required())
        {
            self.g.settle = Settle::Done;
            for slot in slots(self.live_members()) {
                self.settle_suspects(slot);
            }
        }
        if self.g.settle == Settle::Equalised {
            self.g.settle = Settle::Flushing(self.want_flush());
        }
        if self.is_settled() && !self.g.settle_ended {
            self.g.settle_ended = true;
            self.g.replay.complete = true;
            self.g.extra_bases = 0;
            self.kept |= self.live_members();
            for slot in slots(self.live_members()) {
                self.settle_suspects(slot);
                self.g.slots[slot].restarted = false;
                if !self.g.slots[slot].asked {
                    self.g.slots[slot].listed = None;
                }
            }
        }
    }

    /// `Mirror::settle_suspects`
    fn settle_suspects(&mut self, slot: usize) {
        if std::mem::take(&mut self.g.slots[slot].suspect) {
            let flush = self.g.slots[slot].flushed;
            self.send(slot, What::Settle { flush });
        }
    }

    fn try_release(&mut self) {
        let mut all_here = !self.g.awaited_before;
        for slot in slots(self.g.left_behind) {
            let here = self.g.slots[slot].join().is_some();
            all_here &= here && self.g.slots[slot].listed.is_some();
            if here && self.g.slots[slot].listed.is_none() {
                self.request_list(slot);
            }
        }
        if !all_here {
            return;
        }
        for slot in slots(self.g.left_behind) {
            if !self.g.slots[slot].as_new {
                self.g.slots[slot].suspect = self.g.slots[slot].listed.expect("listed").1;
                self.g.extra_bases |= bit(slot);
            }
        }
        (self.g.settle, self.g.released, self.g.left_behind) = (Settle::Unsettled, true, 0);
    }

    // ---- membership.rs ----------------------------------------------------------------------------------------

    fn advance_membership(&mut self) {
        if !matches!(self.g.phase, Phase::Serving | Phase::Closing) {
            return;
        }
        if self.g.change == (Change::Storing { pending: 0 }) {
            self.g.change = Change::None;
        }
        if self.in_doubt() {
            return;
        }
        let live = self.live_members();
        if live == 0 {
            return self.reopen();
        }
        if live != self.g.members {
            return self.shrink(live);
        }
        if self.g.change != Change::None {
            return;
        }
        // The lowest of two that are ready enters first; numbering them otherwise is another run of the model.
        let ready = self.slots_where(|s| s.join() == Some(JoinStage::Proposing));
        if ready != 0 {
            let slot = ready.trailing_zeros() as usize;
            self.propose(self.g.members | bit(slot), self.g.awaited);
        } else if self.g.awaited != 0 && self.is_settled() {
            self.propose(self.g.members, 0);
        }
    }

    fn shrink(&mut self, live: Mask) {
        match self.g.change {
            Change::Flushing { members, no } if members == live => {
                if self.flushed(no, live) {
                    let owed = self.g.left_behind | self.g.extra_bases;
                    self.propose(live, self.g.awaited | owed);
                }
            }
            _ if self.is(Mutant::NoSurvivorFlush) => {
                let owed = self.g.left_behind | self.g.extra_bases;
                self.propose(live, self.g.awaited | owed);
            }
            _ => {
                let no = self.want_flush();
                self.g.change = Change::Flushing { members: live, no };
                self.advance_flush();
            }
        }
    }

    fn propose(&mut self, members: Mask, awaited: Mask) {
        let awaited = awaited & !members;
        self.g.change = Change::Proposed { members, awaited };
        let proposal =
            Proposal { epoch: self.g.epoch, expected: self.g.version, members, awaited, decision: Decision::Asked };
        let free = self.proposals.iter_mut().find(|p| p.is_none()).expect("one proposal a session");
        *free = Some(proposal);
    }

    // ---- join.rs ----------------------------------------------------------------------------------------------

    fn start_join(&mut self, slot: usize) {
        let clean = self.g.clean;
        let s = &mut self.g.slots[slot];
        s.as_new |= s.info_clean + 1 < clean;
        s.forget_info();
        s.listed = None;
        s.suspect = false;
        let marking = s.as_new && self.cfg.mutant != Some(Mutant::KeepOldImage);
        s.role = Role::Joining(if marking { JoinStage::Marking } else { JoinStage::Barrier });
        if marking {
            self.send(slot, What::MarkDirty);
        }
    }

    fn set_join(&mut self, slot: usize, stage: JoinStage) {
        if stage == JoinStage::Proposing {
            self.kept |= bit(slot);
        }
        self.g.slots[slot].role = Role::Joining(stage);
    }

    fn advance_joins(&mut self) {
        if self.g.phase != Phase::Serving {
            return;
        }
        for slot in 0..N {
            let Some(stage) = self.g.slots[slot].join() else { continue };
            match stage {
                JoinStage::Marking | JoinStage::Proposing => {}
                JoinStage::Barrier => {
                    let not_sent = self.g.op.is_some_and(|op| op.stage == OpStage::Writing && op.sent & bit(slot) == 0);
                    let listing = self.slots_where(|s| s.join() == Some(JoinStage::Listing)) != 0;
                    if (!not_sent || self.is(Mutant::NoBarrier)) && self.is_settled() && !listing {
                        for s in slots(self.live_members() | bit(slot)) {
                            self.request_list(s);
                        }
                        self.set_join(slot, JoinStage::Listing);
                    }
                }
                JoinStage::Listing => self.join_listed(slot),
                JoinStage::Equalising { todo: true } => {}
                JoinStage::Equalising { todo: false } => {
                    if self.is(Mutant::JoinWithoutCounting) {
                        self.set_join(slot, JoinStage::Proposing);
                    } else {
                        self.set_join(slot, JoinStage::Draining(self.promise.submitted));
                    }
                }
                JoinStage::Draining(last) => {
                    let awaited = self.g.op.is_some_and(|op| {
                        op.stage == OpStage::Writing
                            && op.value.is_some_and(|v| v <= last)
                            && op.pending & bit(slot) != 0
                    });
                    if self.is(Mutant::JoinWithoutFlush) {
                        self.set_join(slot, JoinStage::Proposing);
                    } else if !awaited {
                        let no = self.want_flush();
                        self.set_join(slot, JoinStage::Flushing(no));
                    }
                }
                JoinStage::Flushing(no) => {
                    if self.flushed(no, bit(slot)) {
                        self.settle_suspects(slot);
                        self.set_join(slot, JoinStage::Proposing);
                    }
                }
            }
        }
    }

    /// `Mirror::listed`
    fn join_listed(&mut self, slot: usize) {
        // While a change is in doubt nobody else may be left: its own list tells nothing.
        if self.live_members() == 0 && !self.is(Mutant::JoinToNobody) {
            return;
        }
        let everyone = self.live_members() | bit(slot);
        let mut complete = true;
        for s in slots(everyone) {
            if self.g.slots[s].listed.is_none() {
                if !self.g.slots[s].asked {
                    self.request_list(s);
                }
                complete = false;
            }
        }
        if !complete {
            return;
        }
        let dirty = slots(everyone).any(|s| self.g.slots[s].listed.expect("listed").0);
        if dirty && !self.g.tracked && self.cfg.cleans() {
            (self.g.tracked, self.g.writing, self.g.covered) = (true, 0, self.g.flush_next);
        }
        for s in slots(everyone) {
            let listed = self.g.slots[s].listed.take().expect("listed");
            if s == slot {
                self.g.slots[s].suspect = listed.1;
            }
        }
        self.set_join(slot, JoinStage::Equalising { todo: dirty });
    }

    // ---- equalise.rs ------------------------------------------------------------------------------------------

    fn op_holds_lock(&self) -> bool {
        self.g.op.is_some_and(|op| matches!(op.stage, OpStage::Writing | OpStage::Reading(_) | OpStage::Stranded))
    }

    fn advance_equalise(&mut self) {
        if !matches!(self.g.phase, Phase::Serving | Phase::Closing) {
            return;
        }
        // With no member there it fails, and is tried again later.
        if self.g.eq.is_none() && (self.live_members() != 0 || self.is(Mutant::JoinToNobody) && self.live() != 0) {
            let joins = self.slots_where(|s| s.join() == Some(JoinStage::Equalising { todo: true })) != 0;
            let demanded =
                self.g.settle == Settle::Unsettled && (self.g.phase == Phase::Serving || self.g.op.is_some());
            if demanded || (joins && self.g.phase == Phase::Serving) {
                self.g.eq = Some(Equalise { stage: EqStage::Locking, participants: 0, values: [0; N], failed: false });
            }
        }
        let Some(eq) = self.g.eq else { return };
        match eq.stage {
            EqStage::Locking => {
                if self.op_holds_lock() && !self.is(Mutant::EqualiseWithoutLock) {
                    return;
                }
                let participants = self.live();
                self.changing();
                for slot in slots(participants) {
                    self.send(slot, What::Hash);
                }
                let stage = EqStage::Hashing { pending: participants };
                self.g.eq = Some(Equalise { stage, participants, ..eq });
            }
            EqStage::Hashing { pending: 0 } | EqStage::Planning => {
                if eq.failed {
                    return self.end_equalise();
                }
                let mut values = slots(eq.participants).map(|s| eq.values[s]);
                let first = values.next();
                let bases = self.bases();
                if bases.is_empty() && !self.is(Mutant::JoinToNobody) {
                    self.g.eq = Some(Equalise { failed: true, ..eq });
                    return self.end_equalise();
                }
                if values.all(|v| Some(v) == first) || bases.is_empty() {
                    return self.end_equalise();
                }
                self.g.eq = Some(Equalise { stage: EqStage::Planning, ..eq });
                if let [base] = bases[..] {
                    self.copy_from(base);
                }
            }
            EqStage::Copying { pending: 0, .. } => self.end_equalise(),
            EqStage::Hashing { .. } | EqStage::Copying { .. } => {}
        }
    }

    /// Something that changes the region is about to be sent (`DirtyTracker::writing`).
    fn changing(&mut self) {
        if !self.cfg.cleans() {
            return;
        }
        if !self.g.tracked {
            (self.g.tracked, self.g.writing) = (true, 0);
        }
        self.g.writing += 1;
        self.g.covered = NEVER;
        self.g.announced = false;
    }

    /// It has ended (`DirtyTracker::written`).
    fn changed(&mut self) {
        if !self.cfg.cleans() {
            return;
        }
        self.g.writing = self.g.writing.saturating_sub(1);
        if self.g.writing == 0 {
            self.g.covered = self.g.flush_next;
        }
    }

    /// Who may be the base, best rank only (`Mirror::base_ranks`): the code takes the first of them, and the model
    /// any.
    pub fn bases(&self) -> Vec<usize> {
        let Some(eq) = self.g.eq else { return Vec::new() };
        let released = self.g.released && self.g.settle == Settle::Unsettled;
        let extra = if released { self.g.extra_bases } else { 0 };
        let ranked: Vec<(u8, usize)> = slots(eq.participants)
            .filter(|s| eq.values[*s] != 0)
            .filter(|s| self.g.slots[*s].role == Role::Member || extra & bit(*s) != 0)
            .map(|s| {
                let slot = &self.g.slots[s];
                let dirty = slot.listed.is_none_or(|l| l.0);
                let rank = match (slot.suspect, slot.restarted) {
                    _ if self.is(Mutant::KeepRestarted) => 0,
                    (false, false) => 0,
                    // What a kill left is whole; what a power cut left may lack what was acknowledged.
                    _ if slot.info_kept && !self.is(Mutant::KilledRanksAsCut) => 1,
                    _ if dirty => 2,
                    _ => 3,
                };
                (rank, s)
            })
            .collect();
        let best = ranked.iter().map(|(rank, _)| *rank).min();
        ranked.into_iter().filter(|(rank, _)| Some(*rank) == best).map(|(_, s)| s).collect()
    }

    /// `Mirror::plan` and the copies.
    pub fn copy_from(&mut self, base: usize) {
        let Some(eq) = self.g.eq.filter(|eq| eq.stage == EqStage::Planning) else { return };
        let targets: Mask = slots(eq.participants).filter(|s| eq.values[*s] != eq.values[base]).map(bit).sum();
        for target in slots(targets) {
            let target_attach = self.g.slots[target].attach;
            self.send(base, What::CopyTo { target: target as u8, target_attach });
        }
        let stage = EqStage::Copying { base: base as u8, pending: targets };
        self.g.eq = Some(Equalise { stage, ..eq });
    }

    fn end_equalise(&mut self) {
        let Some(eq) = self.g.eq.take() else { return };
        self.changed();
        if !eq.failed && self.live_members() & !eq.participants == 0 {
            if self.g.settle == Settle::Unsettled {
                self.g.settle = Settle::Equalised;
            }
            for slot in slots(eq.participants) {
                if self.g.slots[slot].join() == Some(JoinStage::Equalising { todo: true }) {
                    self.set_join(slot, JoinStage::Equalising { todo: false });
                }
            }
        }
    }

    // ---- foreground.rs ----------------------------------------------------------------------------------------

    /// `Mirror::gates_open`
    fn gates_open(&self) -> bool {
        self.is_serving() && self.is_settled()
    }
    fn is_serving(&self) -> bool {
        matches!(self.g.phase, Phase::Serving | Phase::Closing)
    }

    /// Whom a read may be sent to now (`Mirror::pick`; by chunk in the code, any in the model).
    pub fn readable(&self) -> Mask {
        let holds = self.g.eq.is_some_and(|eq| eq.stage != EqStage::Locking);
        let free = !holds || self.is(Mutant::EqualiseWithoutLock);
        let ready = self.g.op.is_some_and(|op| {
            op.value.is_none() && matches!(op.stage, OpStage::Gated | OpStage::Locking | OpStage::Stranded)
        });
        if !(ready && free && self.gates_open()) {
            return 0;
        }
        if self.is(Mutant::ReadJoining) { self.live() } else { self.live_members() }
    }

    pub fn read_from(&mut self, slot: usize) {
        if let Some(op) = &mut self.g.op {
            op.stage = OpStage::Reading(slot as u8);
            self.send(slot, What::Read);
        }
    }

    fn advance_op(&mut self) {
        self.advance_the_op();
        self.reconsider_flush();
    }

    fn advance_the_op(&mut self) {
        let Some(op) = self.g.op else { return };
        match op.stage {
            OpStage::Gated | OpStage::Locking if op.value.is_some() => {
                if op.stage == OpStage::Gated && !self.gates_open() {
                    return;
                }
                let holds = self.g.eq.is_some_and(|eq| eq.stage != EqStage::Locking);
                if holds && !self.is(Mutant::EqualiseWithoutLock) {
                    self.g.op = Some(Op { stage: OpStage::Locking, ..op });
                } else {
                    self.write();
                }
            }
            OpStage::Reading(slot) => {
                let slot = &self.g.slots[slot as usize];
                let read = slot.role == Role::Member || self.is(Mutant::ReadJoining) && slot.is_live();
                let stage = if read { op.stage } else { OpStage::Stranded };
                self.g.op = Some(Op { stage, ..op });
            }
            OpStage::Writing => self.reconsider_write(),
            _ => {}
        }
    }

    fn write(&mut self) {
        let targets = self.live();
        if targets == 0 {
            return;
        }
        let alone = self.g.members.count_ones() == 1 && !self.is(Mutant::LastMemberWithoutFua);
        let Some(op) = &mut self.g.op else { return };
        op.stage = OpStage::Writing;
        (op.sent, op.pending, op.done) = (targets, targets, 0);
        op.fua |= alone;
        let fua = op.fua;
        let value = op.value.expect("a write");
        self.changing();
        for slot in slots(targets) {
            self.send(slot, What::Write { value, fua });
        }
    }

    fn hold(&self) -> bool {
        if self.is(Mutant::AckBeforeCommit) {
            return false;
        }
        matches!(self.g.change, Change::Storing { pending } if pending != 0) || !self.everyone_counts()
    }

    /// `Mirror::everyone_counts`: a member that left and is back does not before a newer set adds it. Nor does one that
    /// was lost after it was proposed before it is flushed again: flushes that it answered before are older than what
    /// was copied to it.
    fn everyone_counts(&self) -> bool {
        let back = self.g.members & !self.live_members() != 0 && !self.is(Mutant::ReturnedMemberCounts);
        let ready = self.live_members() | self.slots_where(|s| s.join() == Some(JoinStage::Proposing));
        let returned = self.proposed() & !ready != 0 && !self.is(Mutant::ReturnedCountsUnflushed);
        let ok = self.live_members() | self.counting();
        !back && !returned && self.required() & !ok == 0
    }

    /// `Mirror::reconsider`, of a write.
    fn reconsider_write(&mut self) {
        let (required, hold) = (self.required(), self.hold());
        let Some(mut op) = self.g.op else { return };
        if !op.answered && required & !op.done == 0 && !hold {
            let alone = self.g.members.count_ones() == 1 && !op.fua && !self.is(Mutant::LastMemberWithoutFua);
            if alone && op.durable_by.is_none_or(|no| !self.flushed(no, required)) {
                if op.durable_by.is_none() {
                    op.durable_by = Some(self.want_flush());
                    self.g.op = Some(op);
                }
                return;
            }
            op.answered = true;
            self.g.op = Some(op);
            let (value, durable) = (op.value.expect("a write"), op.fua || alone);
            let older = !self.g.replay.is_empty() && !self.is(Mutant::DurableNotKept);
            if !durable || older {
                let early = u8::from(self.is(Mutant::LetGoEarly));
                self.g.replay.keep(value, self.g.flush_next - early);
            }
            self.acknowledged(value, durable);
        }
        if op.answered && (op.pending == 0 || self.is(Mutant::UnlockEarly)) {
            self.changed();
            self.g.op = None;
        }
    }

    fn acknowledged(&mut self, value: u8, durable: bool) {
        // Not told without a lease; and who was told that every cache was lost expects nothing of older sessions.
        if !self.g.lease || self.g.epoch < self.promise.power_on_epoch {
            return;
        }
        self.promise.acked = self.promise.acked.max(value);
        if durable {
            self.promise.flushed = self.promise.flushed.max(value);
        }
    }

    /// `Mirror::reconsider`, of a flush.
    pub fn reconsider_flush(&mut self) {
        let Some(flush) = self.g.flush_op else { return };
        if flush.no == 0 {
            if self.is_serving() {
                let no = self.want_flush();
                self.g.flush_op = Some(FlushOp { no, ..flush });
            }
            return;
        }
        if self.hold() {
            return;
        }
        let required = self.required();
        if self.flushed(flush.no, required) {
            self.g.flush_op = None;
            if self.g.lease && self.g.epoch >= self.promise.power_on_epoch {
                self.promise.flushed = self.promise.flushed.max(flush.covers);
            }
        } else if flush.no < self.g.flush_next && self.g.flush_pending == 0 && required & !self.live() == 0 {
            let no = self.want_flush();
            self.g.flush_op = Some(FlushOp { no, ..flush });
        }
    }

    fn advance_flush(&mut self) {
        let targets = self.live();
        if !self.g.flush_wanted || self.g.flush_pending != 0 || targets == 0 {
            return;
        }
        let no = self.g.flush_next;
        self.g.flush_next += 1;
        self.g.flush_wanted = false;
        self.g.flush_pending = targets;
        for slot in slots(targets) {
            self.send(slot, What::Flush(no));
        }
    }

    // ---- clean.rs ---------------------------------------------------------------------------------------------

    fn advance_clean(&mut self) {
        if let Some(cleaning) = self.g.cleaning {
            if cleaning.pending != 0 {
                return;
            }
            self.g.cleaning = None;
            let same = self.g.writing == 0 && self.g.covered == cleaning.was;
            if !cleaning.failed && same && self.g.tracked {
                if cleaning.announces {
                    self.g.announced = true;
                } else {
                    (self.g.tracked, self.g.covered) = (false, 0);
                }
            }
        }
        let closing = self.g.phase == Phase::Closing;
        let due = closing || (self.g.phase == Phase::Serving && self.g.clean_due);
        let live = self.live_members();
        let everyone = if self.is(Mutant::CleanWithoutAll) { self.g.members } else { self.cfg.all() };
        let all_in_sync = live == everyone && self.g.members == everyone;
        if !due || !all_in_sync || self.g.change != Change::None || !self.is_settled() || !self.g.tracked {
            return;
        }
        let common = slots(everyone).map(|s| self.g.slots[s].flushed).min().expect("a mirror has replicas");
        if self.g.writing != 0 || self.g.eq.is_some() {
            return;
        }
        if self.g.covered > common {
            if self.g.flush_pending == 0 {
                self.want_flush();
                self.advance_flush();
            }
            return;
        }
        let announces = !std::mem::take(&mut self.g.announced) && !self.is(Mutant::ClearUnannounced);
        self.g.clean_due = announces;
        self.g.clean += 1;
        for slot in slots(everyone) {
            // No region's last write is covered by flush 0.
            let flush = if announces { 0 } else { self.g.slots[slot].flushed };
            self.send(slot, What::Clean { no: self.g.clean, flush });
        }
        self.g.cleaning = Some(Cleaning { pending: everyone, failed: false, was: self.g.covered, announces });
    }

    fn advance_close(&mut self) {
        if self.g.phase != Phase::Closing {
            return;
        }
        let busy = self.g.op.is_some() || self.g.flush_op.is_some() || self.g.eq.is_some();
        if busy || self.g.change != Change::None || self.g.cleaning.is_some() {
            if busy {
                self.g.closing_flush = 0;
            }
            return;
        }
        if self.g.closing_flush == 0 {
            self.g.closing_flush = self.want_flush();
            self.advance_flush();
        }
        let members = self.live_members();
        if !self.flushed(self.g.closing_flush, members) {
            if self.g.closing_flush < self.g.flush_next && self.g.flush_pending == 0 {
                self.g.closing_flush = self.want_flush();
                self.advance_flush();
            }
            return;
        }
        if self.g.tracked && members == self.cfg.all() && self.is_settled() {
            return;
        }
        self.g.phase = Phase::Closed;
    }
}
