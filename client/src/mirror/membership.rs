//! Who leaves and who enters the in-sync set, one change at a time (R2).
//!
//! ```text
//! a member's attach is given up ─► Flushing (survivors) ─► Proposed ─► Storing (survivors) ─► none
//! a joining replica is equal    ─────────────────────────► Proposed ─► Storing            ─► none
//! ```
//!
//! While a removal is anywhere on its way, no write is acknowledged that the lost member would have had to do:
//! until the commit it is *required* and can't answer, after it [`Mirror::holds_acknowledgements`] until the
//! survivors have stored the new set. While an addition is in doubt both sets are required.

use proto::frame::{Request, SetView};
use proto::id::{FlushNo, SetVersion};
use proto::mutant::{self, Mutant};

use super::join::JoinStage;
use super::mask::Mask;
use super::state::{Attach, Mirror, Phase, Role, What};
use super::types::*;

/// A change of the set under way.
#[derive(Debug)]
pub(super) struct Change {
    /// The set that will be.
    members: Mask,
    awaited: Mask,
    stage: ChangeStage,
}

#[derive(Debug, PartialEq, Eq)]
enum ChangeStage {
    /// The survivors' flush: without it a second loss could take what only the first still had on its disk.
    Flushing(FlushNo),
    /// Raft was asked and has not given a definite answer.
    Proposed,
    /// Committed; these have yet to store it.
    Storing(Mask),
}

impl Mirror {
    /// The members of a set that may already be the committed one.
    pub(super) fn proposed(&self) -> Mask {
        match &self.change {
            Some(Change { members, stage: ChangeStage::Proposed, .. }) if !mutant::is(Mutant::IgnoreDoubt) => *members,
            _ => Mask::EMPTY,
        }
    }

    /// Whether a committed change has yet to be stored by its members.
    pub(super) fn holds_acknowledgements(&self) -> bool {
        matches!(&self.change, Some(Change { stage: ChangeStage::Storing(pending), .. }) if !pending.is_empty())
    }

    /// Whether raft has a proposal that it has not decided.
    pub(super) fn is_in_doubt(&self) -> bool {
        matches!(&self.change, Some(Change { stage: ChangeStage::Proposed, .. }))
    }

    pub(super) fn advance_membership(&mut self, now: u64, out: &mut Vec<Output>) {
        if !matches!(self.phase, Phase::Serving | Phase::Closing) {
            return;
        }
        if let Some(Change { stage: ChangeStage::Storing(pending), .. }) = &self.change
            && pending.is_empty()
        {
            self.change = None;
            self.recheck = true;
        }
        if self.is_in_doubt() {
            return;
        }
        let live = self.live_members();
        if live.is_empty() {
            // The last member is never removed: wait for it, or for others that are its equal (R2, R8).
            self.reopen(now, out);
            return;
        }
        if live != self.members {
            self.shrink(now, live, out);
            return;
        }
        if self.change.is_some() {
            return;
        }
        if let Some(slot) = self.ready_to_enter().iter().next() {
            self.propose(self.members | Mask::one(slot), self.awaited, out);
        } else if !self.awaited.is_empty() && self.settling.blocked.is_empty() && self.settling.is_done() {
            self.propose(self.members, Mask::EMPTY, out);
        }
    }

    /// Takes the lost members out: flush the survivors, then commit.
    fn shrink(&mut self, now: u64, live: Mask, out: &mut Vec<Output>) {
        match &self.change {
            Some(Change { members, stage: ChangeStage::Flushing(no), .. }) if *members == live => {
                let no = *no;
                if self.flushed(no, live) || mutant::is(Mutant::RemovedUnflushed) {
                    for slot in live.iter().filter(|_| mutant::is(Mutant::StoreSetEarly)) {
                        let set = SetView { version: self.version.next(), ..self.set_view() };
                        self.store_set(now, slot, set, out);
                    }
                    self.propose(live, self.awaited | self.owed(), out);
                }
            }
            _ => {
                let no = self.want_flush();
                self.change = Some(Change { members: live, awaited: self.awaited, stage: ChangeStage::Flushing(no) });
                self.advance_flush(now, out);
            }
        }
    }

    pub(super) fn propose(&mut self, members: Mask, awaited: Mask, out: &mut Vec<Output>) {
        let awaited = awaited - members;
        assert!(!members.is_empty(), "R2: the last member is never removed");
        self.change = Some(Change { members, awaited, stage: ChangeStage::Proposed });
        let (members, awaited) = (self.ids_of(members), self.ids_of(awaited));
        out.push(Output::ProposeSet { version: self.version, members, awaited });
    }

    pub(super) fn set_decided(&mut self, now: u64, decision: SetDecision, out: &mut Vec<Output>) {
        let Some(Change { members, awaited, stage: ChangeStage::Proposed }) = &self.change else { return };
        let (members, awaited) = (*members, *awaited);
        match decision {
            SetDecision::Superseded => self.stop(StopReason::Superseded, out),
            SetDecision::Refused { version, members, awaited } => {
                // Another set is committed than this session knew: adopt it. Nothing was acknowledged under the
                // proposed one alone, and whoever is missing is found missing again.
                self.version = version;
                self.members = self.mask_of(&members);
                self.awaited = self.mask_of(&awaited);
                self.change = None;
                self.demote_and_promote(now);
                self.recheck = true;
            }
            SetDecision::Committed(version) => {
                assert!(version > self.version, "set version {version} after {}", self.version);
                self.version = version;
                self.members = members;
                self.awaited = awaited;
                self.demote_and_promote(now);
                out.push(Output::Log(Event::SetChanged { version, members: self.ids_of(members) }));
                self.recheck = true;
                if !matches!(self.phase, Phase::Serving | Phase::Closing) {
                    self.change = None;
                    return;
                }
                let storing = self.live_members();
                self.change = Some(Change { members, awaited, stage: ChangeStage::Storing(storing) });
                for slot in storing.iter() {
                    self.store_set(now, slot, self.set_view(), out);
                }
            }
        }
    }

    /// Brings the roles of attached replicas in line with the committed set.
    fn demote_and_promote(&mut self, now: u64) {
        for slot in 0..self.slots.len() {
            let member = self.members.contains(slot);
            let s = &mut self.slots[slot];
            if let Some(Attach { role, restarted, .. }) = &mut s.attach
                && member
                && matches!(role, Role::Joining(j) if j.stage == JoinStage::Proposing)
            {
                // What its restart took has been copied to it: it is as good a base as any now.
                (*role, *restarted) = (Role::Member, false);
                s.since = now;
            }
            if !member && self.slots[slot].is_member() {
                // It left by another's decision; it may come back by joining.
                self.lost.push_back((slot, FaultReason::CopyInDoubt));
            }
        }
    }

    pub(super) fn store_set(&mut self, now: u64, slot: usize, set: SetView, out: &mut Vec<Output>) {
        let (what, accounted) = (What::StoreSet(set.version), self.settling.is_accounted());
        self.send(now, slot, what, Request::StoreSet { set, accounted }, out);
    }

    pub(super) fn set_stored(&mut self, slot: usize, version: SetVersion) {
        // Not by the answer to an older one.
        if version == self.version
            && let Some(Change { stage: ChangeStage::Storing(pending), .. }) = &mut self.change
        {
            pending.remove(slot);
        }
    }

    /// A replica's attach is gone: it stores nothing any more. If it was a member it leaves by a change of its own.
    pub(super) fn change_lost(&mut self, slot: usize) {
        if let Some(Change { stage: ChangeStage::Storing(pending), .. }) = &mut self.change {
            pending.remove(slot);
        }
    }

    /// Holds acknowledgements until these have stored the committed set.
    pub(super) fn begin_storing(&mut self, members: Mask) {
        self.change = Some(Change { members, awaited: self.awaited, stage: ChangeStage::Storing(members) });
    }

    /// Forgets a change that raft has not been asked for, or has decided.
    pub(super) fn drop_decided_change(&mut self) {
        if !self.is_in_doubt() {
            self.change = None;
        }
    }
}
