//! How a replica comes back into the in-sync set (R7).
//!
//! ```text
//! attached ─► Marking ─► Barrier ─► Listing ─► Equalising ─► Draining ─► Flushing ─► Proposing ─► member
//!             (as new)                                       └──── counts for acknowledgements ───┘
//! ```
//!
//! From its attach on it is sent every new write; one that it misses ends its attach, and with it the join.

use proto::frame::Request;
use proto::id::{FlushNo, RegionIndex};
use proto::mutant::{self, Mutant};

use super::mask::Mask;
use super::region_set::RegionSet;
use super::state::{Attach, Mirror, Phase, Role, What};
use super::types::*;

/// A replica on its way into the set.
#[derive(Debug)]
pub(super) struct Join {
    pub stage: JoinStage,
    /// Regions still to be equalised.
    pub todo: RegionSet,
    pub total: usize,
    pub copied_bytes: u64,
    pub started: u64,
}

/// See the module.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum JoinStage {
    /// Every region is being made dirty: it is new, or an old image.
    Marking,
    /// Writes that it was not sent are still out.
    Barrier,
    /// Everybody lists their dirty regions.
    Listing,
    /// [`Join::todo`] is being worked off.
    Equalising,
    /// It counts; writes up to this number that it was sent before are still out.
    Draining(u64),
    /// Its flush, begun after that.
    Flushing(FlushNo),
    /// Raft is, or is about to be, asked.
    Proposing,
}

impl Mirror {
    /// Begins the join of a replica that has just been attached, or was left out by the opening's decision.
    pub(super) fn start_join(&mut self, now: u64, slot: usize, out: &mut Vec<Output>) {
        self.forget_old_paths(now, slot);
        let attach = self.slots[slot].attach.as_mut().expect("attached");
        let info = attach.info();
        // More than one clean behind: an image from before cleans that it took part in (R6).
        attach.as_new |= info.set.clean.0 + 1 < self.clean.0 && !mutant::is(Mutant::TrustOldImage);
        let as_new = attach.as_new;
        attach.listed = None;
        attach.role = Role::Joining(Join {
            stage: if as_new { JoinStage::Marking } else { JoinStage::Barrier },
            todo: RegionSet::new(),
            total: 0,
            copied_bytes: 0,
            started: now,
        });
        if as_new {
            self.send(now, slot, What::MarkAllDirty, Request::MarkAllDirty, out);
        }
        self.recheck = true;
    }

    /// Replicas whose answers count already although they are in no set (R7).
    pub(super) fn counting(&self) -> Mask {
        if mutant::is(Mutant::JoinBeforeItCounts) {
            return Mask::EMPTY;
        }
        (0..self.slots.len())
            .filter(|s| {
                self.slots[*s].join().is_some_and(|j| {
                    matches!(j.stage, JoinStage::Draining(_) | JoinStage::Flushing(_) | JoinStage::Proposing)
                })
            })
            .collect()
    }

    /// Replicas that are to be added to the set.
    pub(super) fn ready_to_enter(&self) -> Mask {
        (0..self.slots.len())
            .filter(|s| self.slots[*s].join().is_some_and(|j| j.stage == JoinStage::Proposing))
            .collect()
    }

    pub(super) fn advance_joins(&mut self, now: u64, out: &mut Vec<Output>) {
        if self.phase != Phase::Serving {
            return;
        }
        for slot in 0..self.slots.len() {
            let Some(join) = self.slots[slot].join() else { continue };
            match join.stage {
                JoinStage::Marking | JoinStage::Proposing => {}
                // Until the take-over has settled its regions the members themselves may differ.
                JoinStage::Barrier => {
                    let members = self.live_members();
                    let ready = !members.is_empty() && self.settling.is_settled() && !self.is_listing();
                    if ready && (!self.writes_not_sent_to(slot) || mutant::is(Mutant::ListBeforeBarrier)) {
                        for s in (members | Mask::one(slot)).iter() {
                            self.request_list(now, s, out);
                        }
                        self.set_stage(slot, JoinStage::Listing);
                    }
                }
                JoinStage::Listing => self.listed(now, slot, out),
                JoinStage::Equalising => {
                    if join.todo.is_empty() {
                        // From here on it counts; what was answered without it must reach it before its flush.
                        self.set_stage(slot, JoinStage::Draining(self.last_op));
                        self.recheck = true;
                    }
                }
                JoinStage::Draining(last) => {
                    if !self.writes_awaited_from(slot, last) {
                        let no = self.want_flush();
                        self.set_stage(slot, JoinStage::Flushing(no));
                    }
                }
                JoinStage::Flushing(no) => {
                    if self.flushed(no, Mask::one(slot)) || mutant::is(Mutant::JoinWithoutFlush) {
                        self.settle_suspects(now, slot, None, out);
                        self.set_stage(slot, JoinStage::Proposing);
                    }
                }
            }
        }
    }

    fn is_listing(&self) -> bool {
        self.slots.iter().any(|s| s.join().is_some_and(|j| j.stage == JoinStage::Listing))
    }

    fn set_stage(&mut self, slot: usize, stage: JoinStage) {
        self.slots[slot].join_mut().expect("the caller found it joining").stage = stage;
    }

    /// Once every member and the replica itself have listed their regions: the union of the dirty ones is to be
    /// equalised, but for those that are unallocated everywhere, which read as zeroes on all of them.
    fn listed(&mut self, now: u64, slot: usize, out: &mut Vec<Output>) {
        let regions = self.regions();
        let members = self.live_members();
        let everyone = members | Mask::one(slot);
        // Its own list says nothing of what it has missed: the last member may be lost while an addition is in doubt.
        let mut complete = !members.is_empty();
        for s in everyone.iter() {
            let attach = self.slots[s].attach.as_ref().expect("live");
            if attach.listed.is_none() {
                // It became a member after the listing began.
                self.request_list(now, s, out);
                complete = false;
            } else {
                complete &= attach.listing_done(regions);
            }
        }
        if !complete {
            return;
        }
        let ignored = if mutant::is(Mutant::JoinIgnoresItsOwn) { Mask::one(slot) } else { Mask::EMPTY };
        let (dirty, allocated) = self.union_of_lists(everyone - ignored);
        let mut todo = RegionSet::new();
        for region in dirty.iter() {
            self.dirty.found(region, now, self.flush_next);
            if allocated.contains(region) {
                todo.insert(region);
            }
        }
        for s in everyone.iter() {
            let attach = self.slots[s].attach.as_mut().expect("live");
            let listed = attach.listed.take().expect("complete");
            if s == slot {
                attach.suspect = listed.suspect;
            }
        }
        let total = todo.len();
        out.push(Output::Log(Event::Joining { replica: self.slots[slot].def.replica, regions: total, total: regions }));
        let join = self.slots[slot].join_mut().expect("joining");
        (join.todo, join.total, join.stage) = (todo, total, JoinStage::Equalising);
        self.recheck = true;
    }

    pub(super) fn union_of_lists(&self, slots: Mask) -> (RegionSet, RegionSet) {
        let (mut dirty, mut allocated) = (RegionSet::new(), RegionSet::new());
        for s in slots.iter() {
            if let Some(Attach { listed: Some(listed), .. }) = &self.slots[s].attach {
                dirty.union_with(&listed.dirty);
                allocated.union_with(&listed.allocated);
            }
        }
        (dirty, allocated)
    }

    /// A region was equalised over `participants`: those of them that join have one less to do.
    pub(super) fn joined_region(&mut self, region: RegionIndex, participants: Mask) {
        for slot in participants.iter() {
            if let Some(join) = self.slots[slot].join_mut()
                && join.todo.remove(region)
            {
                self.recheck = true;
            }
        }
    }

    /// The next region that a join wants and that is free to be worked at.
    pub(super) fn next_join_region(&self, free: impl Fn(&RegionIndex) -> bool) -> Option<RegionIndex> {
        self.slots
            .iter()
            .filter_map(|s| s.join().filter(|j| j.stage == JoinStage::Equalising))
            .find_map(|j| j.todo.iter().find(&free))
    }
}
