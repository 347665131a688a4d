//! What a session begins with, and begins again with after every member was lost (R8): attach to everyone, decide
//! who is kept, and let no dirty region be seen before it is the same everywhere and on every disk.

use std::collections::BTreeSet;

use proto::id::{FlushNo, RegionIndex};
use proto::mutant::{self, Mutant};

use super::mask::Mask;
use super::region_set::RegionSet;
use super::state::{Mirror, Phase, Role};
use super::types::*;

/// How long a replica that is silent, rather than refusing, is waited for.
const SILENT_MS: u64 = 2_000;
/// How long those that are missing are waited for when all that were reached have restarted.
const RESTARTED_MS: u64 = 5_000;

/// How long a member is hoped for when an operator has given up on all of them, before another replica becomes the
/// set.
const FORCED_MS: u64 = 10_000;

/// The regions that a take-over found dirty, on their way to being served.
#[derive(Debug, Default)]
pub(super) struct Settling {
    /// To be equalised.
    pub unsettled: RegionSet,
    /// Equalised since the last group began its flush.
    equalised: RegionSet,
    /// A group of equalised regions and the flush after which they are served.
    flushing: Option<(RegionSet, FlushNo)>,
    /// As these two, of regions where bad blocks were replaced, and which are served all along.
    mended: RegionSet,
    telling: Option<(RegionSet, FlushNo)>,
    /// Suspect on every reachable member, while others, [`Self::left_behind`], may know better.
    pub blocked: RegionSet,
    pub left_behind: Mask,
    /// Somebody was waited for when a member restarted: it has missed writes to regions that are suspect by now.
    awaited_before: bool,
    /// Regions that were blocked, for which these replicas are bases as well although no members.
    pub released: RegionSet,
    pub extra_bases: Mask,
    /// Regions that a write which failed everywhere may have left different, and wrong against their sums.
    broken: RegionSet,
    /// Regions that a request waits for.
    pub demanded: BTreeSet<RegionIndex>,
    /// The members' lists were dropped, as nothing is left to settle.
    ended: bool,
}

impl Settling {
    /// Whether every request may be served.
    pub fn is_done(&self) -> bool {
        self.is_settled() && self.blocked.is_empty()
    }

    /// Whether nothing is left to equalise or flush, and nothing waits for others.
    pub fn is_settled(&self) -> bool {
        self.unsettled.is_empty() && self.equalised.is_empty() && self.flushing.is_none() && self.blocked.is_empty()
    }

    /// Whether those who are waited for have missed no write to what is suspect: a later session, too, may then take
    /// suspect regions from them (R8). It has no other way to know, as the members may not restart in between.
    pub fn is_accounted(&self) -> bool {
        !self.awaited_before || self.is_settled()
    }

    /// Regions that are not served yet.
    pub fn left(&self) -> usize {
        self.unsettled.len()
            + self.equalised.len()
            + self.blocked.len()
            + self.flushing.as_ref().map_or(0, |(group, _)| group.len())
    }

    /// Whether a region may be served; if not, it is brought forward.
    pub fn demand(&mut self, region: RegionIndex) -> bool {
        if self.unsettled.contains(region) {
            self.demanded.insert(region);
            return false;
        }
        !(self.blocked.contains(region)
            || self.equalised.contains(region)
            || self.flushing.as_ref().is_some_and(|(group, _)| group.contains(region)))
    }

    /// A write to the region failed on every member: what they hold there is undefined, and may not be seen before
    /// it is the same everywhere.
    pub fn broken(&mut self, region: RegionIndex) {
        self.broken.insert(region);
        if !self.blocked.contains(region) {
            self.unsettled.insert(region);
            self.ended = false;
        }
    }

    /// Whether a write failed there.
    pub fn is_broken(&self, region: RegionIndex) -> bool {
        self.broken.contains(region)
    }

    /// Whether a replica has yet to be told that bad blocks of its were replaced there.
    pub fn has_to_tell(&self, region: RegionIndex) -> bool {
        self.mended.contains(region) || self.telling.as_ref().is_some_and(|(group, _)| group.contains(region))
    }

    /// The region was equalised over all members.
    pub fn equalised(&mut self, region: RegionIndex) {
        if self.unsettled.remove(region) {
            self.demanded.remove(&region);
            self.broken.remove(region);
            self.equalised.insert(region);
        }
    }
}

impl Mirror {
    /// Every member is gone: whatever is known of them is void, and the session begins anew with them.
    pub(super) fn reopen(&mut self, now: u64, out: &mut Vec<Output>) {
        if self.phase == Phase::Closing && self.replay.is_empty() {
            self.phase = Phase::Closed;
            out.push(Output::Closed { clean: false });
            return;
        }
        self.close_wanted |= self.phase == Phase::Closing;
        for slot in 0..self.slots.len() {
            if let Some(attach) = self.slots[slot].attach.take() {
                out.push(Output::GiveUp { slot, attach: attach.id });
            }
            self.slots[slot].unreachable = false;
            if self.slots[slot].refusals == 0 {
                self.slots[slot].retry_at = now;
            }
        }
        self.sent.clear();
        self.lost.clear();
        self.drop_decided_change();
        self.equalising.clear();
        self.cleaning = None;
        self.flush_pending = Mask::EMPTY;
        self.flush_wanted = false;
        self.unflushed_bytes = 0;
        self.unflushed_since = None;
        self.settling = Settling::default();
        self.forced = false;
        self.reset_ops();
        self.phase = Phase::Opening { since: now };
    }

    pub(super) fn advance_opening(&mut self, now: u64, out: &mut Vec<Output>) {
        let Phase::Opening { since } = self.phase else { return };
        if self.is_in_doubt() {
            return;
        }
        let regions = self.regions();
        let ready = |slot: usize| {
            let s = &self.slots[slot];
            s.is_answered() && s.attach.as_ref().is_some_and(|a| a.listing_done(regions))
        };
        let awaiting = (self.members | self.awaited).iter().filter(|s| !ready(*s)).collect::<Mask>();
        if !awaiting.is_empty() {
            if now < since + SILENT_MS && awaiting.iter().any(|s| !self.slots[s].unreachable) {
                return;
            }
            // An attach or a listing that is under way ends by an answer or by a time-out of its own.
            if awaiting.iter().any(|s| self.slots[s].attach.is_some()) {
                return;
            }
        }
        // Whoever the old owner could read is fenced by our attach; for the others its lease must end (R3).
        let unfenced = !(self.members & awaiting).is_empty();
        if unfenced && now < self.cfg.old_lease_until && !mutant::is(Mutant::TakeOverInLease) {
            return;
        }
        self.decide(now, since, awaiting, out);
    }

    /// R8: who is kept, and what must wait. `missing` were not reached.
    fn decide(&mut self, now: u64, since: u64, missing: Mask, out: &mut Vec<Output>) {
        let reached = self.members - missing;
        self.find_old_images(reached);
        let is = |slot: usize| self.slots[slot].attach.as_ref().expect("reached");
        let eligible: Mask = reached.iter().filter(|s| !is(*s).as_new).collect();
        let intact: Mask = eligible.iter().filter(|s| is(*s).info().suspect == 0).collect();
        // Those that were killed at most have everything too, but not all of its sums.
        let killed: Mask = eligible.iter().filter(|s| is(*s).info().kept).collect();
        let whole = intact | killed;
        let complete = self.replay.is_complete();
        let (mut blocked, mut left_behind) = (RegionSet::new(), Mask::EMPTY);
        let keep = if !intact.is_empty() {
            whole
        } else if eligible.is_empty() {
            if self.forced && now >= since + FORCED_MS {
                self.adopt_the_best(out);
            }
            return;
        } else {
            let mut suspect = RegionSet::new();
            for slot in eligible.iter() {
                suspect.union_with(&is(slot).listed.as_ref().expect("ready").suspect);
            }
            // A replica that left while regions waited for it does not know those that were written without it, and
            // if a member restarted after that, they are suspect as well: nobody can tell which are which.
            let go_on = self.forced || mutant::is(Mutant::GoOnWithRestarted);
            if !(go_on || missing.is_empty() && self.awaited.is_empty()) {
                // The more are there, the fewer blocks are taken for right without a sum that says so.
                if now < since + RESTARTED_MS {
                    return;
                }
                if !complete {
                    left_behind = missing | self.awaited;
                    blocked = suspect;
                }
            }
            if killed.is_empty() { eligible } else { killed }
        };
        self.forced = false;
        self.clean = keep.iter().map(|s| is(s).info().set.clean).max().expect("somebody is kept").max(self.clean);
        let (dirty, allocated) = self.union_of_lists(keep);
        let (mut unsettled, mut equalised) = (RegionSet::new(), RegionSet::new());
        for region in dirty.iter().filter(|region| !blocked.contains(*region)) {
            // What nobody has allocated reads as zeroes everywhere, but that may be on no disk yet.
            if allocated.contains(region) {
                unsettled.insert(region)
            } else {
                equalised.insert(region)
            };
        }
        for region in dirty.iter() {
            self.dirty.found(region, now, self.flush_next);
        }
        out.push(Output::Log(Event::TookOver {
            kept: self.ids_of(keep),
            dirty: dirty.len(),
            blocked: blocked.len(),
            awaited: self.ids_of(left_behind),
        }));
        // Without a restart since, no region has become suspect that those who are waited for have missed writes to.
        let known =
            |slot: usize| is(slot).info().accounted || mutant::is(Mutant::ReleaseToOlder) && !is(slot).restarted;
        let awaited_before = !self.awaited.is_empty() && !keep.iter().all(known);
        self.settling = Settling { unsettled, equalised, blocked, left_behind, awaited_before, ..Settling::default() };
        for slot in 0..self.slots.len() {
            if !self.slots[slot].is_answered() {
                continue;
            }
            if keep.contains(slot) {
                let s = &mut self.slots[slot];
                let attach = s.attach.as_mut().expect("answered");
                attach.role = Role::Member;
                // Kept until the regions are settled: it tells who was dirty where.
                attach.suspect = attach.listed.as_ref().expect("ready").suspect.clone();
                s.since = now;
            } else {
                if self.members.contains(slot) {
                    self.slots[slot].fault = FaultReason::Restarted;
                }
                self.start_join(now, slot, out);
            }
        }
        if whole.is_empty() && !complete {
            self.fail_flushes(out);
            if !mutant::is(Mutant::SilentLoss) {
                out.push(Output::PowerOn);
            }
        }
        let current = |s: &usize| {
            let info = self.slots[*s].attach.as_ref().expect("kept").info();
            let set = &info.set;
            info.told && info.kept_epoch == self.cfg.epoch && set.version == self.version && set.clean == self.clean
        };
        if keep == self.members && !keep.iter().all(|s| current(&s)) {
            self.store_set_again(now, out);
        }
        // Also where processes were killed only: what is kept has sums, and they have not.
        if intact.is_empty() && !self.replay.is_empty() && !mutant::is(Mutant::ReplayNothing) {
            self.begin_replay(out);
        } else {
            self.begin_serving(out);
        }
        if !self.replay.is_empty() {
            self.unflushed_since = Some(now);
        }
    }

    /// Every member holds what it must: requests may come.
    pub(super) fn begin_serving(&mut self, out: &mut Vec<Output>) {
        self.phase = Phase::Serving;
        self.recheck = true;
        if std::mem::take(&mut self.close_wanted) {
            self.begin_close(out);
        }
    }

    /// A member that has restarted, and is behind the others by more than one clean or was not kept by the session
    /// that kept them, comes from an old image (R6). One that has not restarted has missed nothing: the owner may
    /// have died before it told everybody.
    fn find_old_images(&mut self, reached: Mask) {
        let infos = || reached.iter().filter_map(|s| self.slots[s].attach.as_ref()).filter(|a| !a.as_new);
        let clean = infos().map(|a| a.info().set.clean).max().unwrap_or_default();
        let epoch = infos().map(|a| a.info().kept_epoch).max().unwrap_or_default();
        for slot in reached.iter() {
            let attach = self.slots[slot].attach.as_mut().expect("reached");
            let info = attach.info();
            let behind = info.set.clean.0 + 1 < clean.0 || info.kept_epoch < epoch;
            attach.as_new |= attach.restarted && behind && !mutant::is(Mutant::TrustOldImage);
        }
    }

    /// `recover-volume --force` with no member to be had: the replica that was in the set last becomes the set.
    fn adopt_the_best(&mut self, out: &mut Vec<Output>) {
        let info = |slot: usize| self.slots[slot].attach.as_ref().expect("answered").info();
        // One that was made anew holds nothing that could be recovered.
        let there = (0..self.slots.len()).filter(|s| self.slots[*s].is_answered() && !info(*s).rebuilt);
        let best =
            there.max_by_key(|s| (info(*s).set.version, info(*s).set.clean, std::cmp::Reverse(info(*s).suspect)));
        if let Some(slot) = best {
            self.slots[slot].attach.as_mut().expect("answered").as_new = false;
            self.propose(Mask::one(slot), Mask::EMPTY, out);
        }
    }

    /// Brings the settling of the regions on.
    pub(super) fn advance_settling(&mut self, now: u64, out: &mut Vec<Output>) {
        if !matches!(self.phase, Phase::Serving | Phase::Closing) {
            return;
        }
        if !self.settling.blocked.is_empty() {
            self.try_release(now, out);
        }
        // A member that is not there may lack what the others were made equal with: until its removal is committed it
        // could be the base of a later session, and a read from here would be taken back (R3).
        if let Some((_, no)) = &self.settling.flushing
            && (self.everyone_counts() || mutant::is(Mutant::ServedWithoutOne))
            && self.flushed(*no, self.required())
            && let Some((group, _)) = self.settling.flushing.take()
        {
            for slot in self.live_members().iter() {
                self.settle_suspects(now, slot, Some(&group), out);
            }
        }
        if self.settling.flushing.is_none() && !self.settling.equalised.is_empty() {
            let group = std::mem::take(&mut self.settling.equalised);
            let no = self.want_flush();
            self.settling.flushing = Some((group, no));
        }
        if let Some((_, no)) = &self.settling.telling
            && self.flushed(*no, self.required())
            && let Some((group, _)) = self.settling.telling.take()
        {
            for slot in self.live_members().iter() {
                self.settle_suspects(now, slot, Some(&group), out);
            }
        }
        if self.settling.telling.is_none() && !self.settling.mended.is_empty() {
            let group = std::mem::take(&mut self.settling.mended);
            self.settling.telling = Some((group, self.want_flush()));
        }
        if self.settling.is_settled() && !self.settling.ended {
            self.settling.ended = true;
            self.replay.all_settled();
            self.settling.extra_bases = Mask::EMPTY;
            for slot in self.live_members().iter() {
                // Those that nobody has allocated had nothing to equalise.
                self.settle_suspects(now, slot, None, out);
                let attach = self.slots[slot].attach.as_mut().expect("live");
                (attach.listed, attach.restarted) = (None, false);
            }
            self.recheck = true;
        }
    }

    /// Bad blocks of a region were replaced on these. A bad page of a replica's map makes regions suspect whenever it is
    /// found (R10), which nobody but the replica knows: once what was replaced is flushed it is told as if the region had
    /// been listed, or it would keep it dirty for as long as the session lasts. Not where others are waited for: they may
    /// know better, and a later session must wait for them, too (R8).
    pub(super) fn mended(&mut self, region: RegionIndex, had_bad: Mask) {
        if self.settling.blocked.contains(region) {
            return;
        }
        for slot in had_bad.iter() {
            if let Some(attach) = &mut self.slots[slot].attach {
                attach.suspect.insert(region);
            }
        }
        let served = !self.settling.equalised.contains(region);
        if served && !(had_bad & self.members).is_empty() {
            self.settling.mended.insert(region);
        }
    }

    /// Blocked regions go on when those that they wait for have come, or an operator gave them up.
    fn try_release(&mut self, now: u64, out: &mut Vec<Output>) {
        let regions = self.regions();
        let others = self.settling.left_behind;
        let mut all_here = !self.settling.awaited_before;
        for slot in others.iter() {
            let here = self.slots[slot].join().is_some();
            all_here &= here && self.slots[slot].attach.as_ref().is_some_and(|a| a.listing_done(regions));
            if here && self.slots[slot].attach.as_ref().is_some_and(|a| a.listed.is_none()) {
                self.request_list(now, slot, out);
            }
        }
        if !all_here && !self.forced {
            return;
        }
        self.forced = false;
        let blocked = std::mem::take(&mut self.settling.blocked);
        for slot in others.iter().filter(|_| all_here) {
            let attach = self.slots[slot].attach.as_mut().expect("all are here");
            if !attach.as_new {
                attach.suspect = attach.listed.as_ref().expect("listed").suspect.clone();
                self.settling.extra_bases.insert(slot);
            }
        }
        self.settling.unsettled.union_with(&blocked);
        self.settling.released.union_with(&blocked);
        self.settling.left_behind = Mask::EMPTY;
        self.recheck = true;
    }

    /// A replica that regions had waited for is gone again before they were settled: they wait again.
    pub(super) fn extra_base_lost(&mut self, slot: usize) {
        if !self.settling.extra_bases.contains(slot) || mutant::is(Mutant::LostBaseForgotten) {
            return;
        }
        self.settling.extra_bases.remove(slot);
        self.settling.left_behind.insert(slot);
        let unsettled: Vec<_> =
            (self.settling.released.iter()).filter(|r| self.settling.unsettled.contains(*r)).collect();
        for region in unsettled {
            self.settling.unsettled.remove(region);
            self.settling.demanded.remove(&region);
            self.settling.blocked.insert(region);
        }
    }

    /// Replicas outside of the set that regions wait for, or are being settled from.
    pub(super) fn owed(&self) -> Mask {
        self.settling.left_behind | self.settling.extra_bases
    }

    /// The members' superblocks are behind what is committed: a removal was committed and its owner died.
    fn store_set_again(&mut self, now: u64, out: &mut Vec<Output>) {
        let members = self.members;
        self.begin_storing(members);
        for slot in members.iter() {
            self.store_set(now, slot, self.set_view(), out);
        }
    }
}
