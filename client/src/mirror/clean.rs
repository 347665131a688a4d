//! The gateway's half of the dirty-region log: which regions may have their bits cleared (R6).
//!
//! A region is cleaned when it has been idle for a while, every replica of the definition is in sync, and each
//! has answered a flush that began after the region's last write. One clean at a time; the next begins when this
//! one is durable everywhere.
//!
//! ```text
//! clean n: announces A          clean n + 1: clears A, announces B          clean n + 2: clears B, ...
//! ```
//!
//! A clean clears what was dirty already, and has not changed since, when the one before it began: an image of a
//! replica that holds the region as it was before, and takes it for clean, is then behind by two, while a member that
//! has only missed the last clean is behind by one.
//!
//! A bit that is soon set again costs a sync on every replica, and a write that waits for it. So where many of the
//! regions that are cleaned are written again, as in a large volume written at random, a region must have been idle for
//! longer, until the volume itself is idle.

use std::collections::{BTreeMap, BTreeSet};

use proto::frame::{CleanEntry, Request};
use proto::id::{CleanNo, FlushNo, RegionIndex};
use proto::mutant::{self, Mutant};

use super::mask::Mask;
use super::region_set::RegionSet;
use super::state::{Mirror, Phase, What, limits};
use super::types::*;

/// How long a region is left alone after its last write: at least, and at most.
const IDLE_MS: (u64, u64) = (3_000, 48_000);
/// That it is too short is seen in this time, if more than one of so many writes finds its region cleaned not long ago.
const LOOK_MS: u64 = 3_000;
const TOLERATED: u32 = 32;
/// Regions that a replica marks dirty ahead of a sequential stream (R5): nobody says so to the gateway, and they are
/// cleaned with the region that the stream was in.
const MARKED_AHEAD: u32 = 8;
/// How often a clean is looked for.
const CLEAN_EVERY_MS: u64 = 1_000;

/// What is known of one dirty region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DirtyRegion {
    in_flight: u32,
    last_write: u64,
    /// A flush with this number or a later one covers all its writes.
    covered_by: FlushNo,
}

/// How long a region must have been idle.
#[derive(Debug)]
struct Patience {
    idle_ms: u64,
    /// Those that have been cleaned not long ago, and not been written again.
    cleaned: RegionSet,
    forget_at: u64,
    /// Writes since it was looked at last, and those of them that found their region cleaned.
    writes: u32,
    regretted: u32,
    look_at: u64,
    /// When it is halved, unless it is doubled before.
    halve_at: u64,
}

impl Default for Patience {
    fn default() -> Self {
        let cleaned = RegionSet::new();
        Self { idle_ms: IDLE_MS.0, cleaned, forget_at: 0, writes: 0, regretted: 0, look_at: 0, halve_at: 0 }
    }
}

impl Patience {
    fn think_over(&mut self, now: u64) {
        if now < self.look_at {
            return;
        }
        if self.regretted > self.writes / TOLERATED {
            self.idle_ms = (self.idle_ms * 2).min(IDLE_MS.1);
            self.halve_at = now + 2 * self.idle_ms;
        } else if now >= self.halve_at {
            self.idle_ms = (self.idle_ms / 2).max(IDLE_MS.0);
            self.halve_at = now + 2 * self.idle_ms;
        }
        (self.writes, self.regretted, self.look_at) = (0, 0, now + LOOK_MS);
        if now >= self.forget_at {
            self.cleaned = RegionSet::new();
            self.forget_at = now + IDLE_MS.1;
        }
    }
}

/// The regions that may be dirty on some replica, as far as this session knows.
#[derive(Debug, Default)]
pub(super) struct DirtyTracker {
    regions: BTreeMap<RegionIndex, DirtyRegion>,
    /// For the next clean: they were dirty, as they are here, before the last one began, which is durable everywhere.
    announced: Vec<(RegionIndex, DirtyRegion)>,
    patience: Patience,
}

impl DirtyTracker {
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    pub fn contains(&self, region: RegionIndex) -> bool {
        self.regions.contains_key(&region)
    }

    fn is_still(&self, (region, was): &(RegionIndex, DirtyRegion)) -> bool {
        self.regions.get(region) == Some(was)
    }

    /// Something that changes the region is about to be sent.
    pub fn writing(&mut self, region: RegionIndex) {
        let patience = &mut self.patience;
        patience.writes = patience.writes.saturating_add(1);
        let entry = self.regions.entry(region).or_insert_with(|| {
            patience.regretted += u32::from(patience.cleaned.remove(region));
            DirtyRegion { in_flight: 0, last_write: 0, covered_by: FlushNo(u64::MAX) }
        });
        entry.in_flight += 1;
        entry.covered_by = FlushNo(u64::MAX);
    }

    /// It has been answered by all, or they were given up; `next` is the next flush to begin.
    pub fn written(&mut self, region: RegionIndex, now: u64, next: FlushNo) {
        let entry = self.regions.get_mut(&region).expect("written after writing");
        entry.in_flight -= 1;
        entry.last_write = now;
        if entry.in_flight == 0 {
            entry.covered_by = next;
        }
    }

    /// A replica says that the region is dirty.
    pub fn found(&mut self, region: RegionIndex, now: u64, next: FlushNo) {
        self.regions.entry(region).or_insert(DirtyRegion { in_flight: 0, last_write: now, covered_by: next });
    }

    /// Every attach is gone, and with it all that was in flight.
    pub fn settle_in_flight(&mut self, next: FlushNo) {
        self.announced.clear();
        for region in self.regions.values_mut() {
            region.in_flight = 0;
            region.covered_by = next;
        }
    }
}

/// The clean that is out.
#[derive(Debug)]
pub(super) struct Cleaning {
    no: CleanNo,
    /// Who has not answered.
    pending: Mask,
    failed: bool,
    /// The regions as they were: one that has changed since stays.
    regions: Vec<(RegionIndex, DirtyRegion)>,
    /// Those for the next one.
    announces: Vec<(RegionIndex, DirtyRegion)>,
}

impl Mirror {
    pub(super) fn advance_clean(&mut self, now: u64, out: &mut Vec<Output>) {
        if let Some(Cleaning { pending, .. }) = &self.cleaning {
            if !pending.is_empty() {
                return;
            }
            let done = self.cleaning.take().expect("checked above");
            if !done.failed {
                for cleaned in done.regions {
                    if self.dirty.is_still(&cleaned) {
                        self.dirty.regions.remove(&cleaned.0);
                        self.dirty.patience.cleaned.insert(cleaned.0);
                    }
                }
                self.dirty.announced = done.announces;
            }
        }
        let closing = self.phase == Phase::Closing;
        let due = closing || (self.phase == Phase::Serving && now >= self.clean_next);
        // R6: only when every replica of the definition is in sync.
        let all = if mutant::is(Mutant::CleanWithoutAll) { self.members } else { self.all_slots() };
        if !due
            || self.live_members() != all
            || self.members != all
            || self.change.is_some()
            || !(self.settling.is_settled() || mutant::is(Mutant::CleanUnsettled))
            || self.dirty.regions.is_empty()
        {
            return;
        }
        let flushed = |slot: usize| self.slots[slot].attach.as_ref().expect("live").flushed;
        let common = all.iter().map(flushed).min().expect("a mirror has replicas");
        self.dirty.patience.think_over(now);
        let at_rest = now >= self.foreground_at + IDLE_MS.0;
        let idle_ms = if at_rest { IDLE_MS.0 } else { self.dirty.patience.idle_ms };
        let idle = |r: &DirtyRegion| r.in_flight == 0 && (closing || now >= r.last_write + idle_ms);
        let announced = std::mem::take(&mut self.dirty.announced);
        // Where nothing was announced, what is announced now is cleared next.
        self.clean_next = if announced.is_empty() { now } else { now + CLEAN_EVERY_MS };
        let free = |r: &RegionIndex| !self.equalising.contains_key(r) && !self.settling.has_to_tell(*r);
        let regions: Vec<_> = announced.into_iter().filter(|was| self.dirty.is_still(was) && free(&was.0)).collect();
        let announces: Vec<_> = (self.dirty.regions.iter())
            .filter(|(_, r)| r.covered_by <= common || mutant::is(Mutant::CleanAsBoolean))
            .filter(|(region, r)| idle(r) && free(region))
            .filter(|(region, _)| regions.binary_search_by_key(region, |(r, _)| r).is_err())
            .map(|(region, r)| (*region, *r))
            .take(limits::MAX_CLEAN_REGIONS / 2)
            .collect();
        let at_once = mutant::is(Mutant::ClearUnannounced);
        let (regions, announces) = if at_once { (announces, Vec::new()) } else { (regions, announces) };
        if regions.is_empty() && announces.is_empty() {
            self.clean_next = now + CLEAN_EVERY_MS;
            // Equalised regions are not flushed by writes.
            if self.dirty.regions.values().any(|r| idle(r) && r.covered_by > common) && self.flush_pending.is_empty() {
                self.want_flush();
                self.advance_flush(now, out);
            }
            return;
        }
        // A replica that is lost before it answers takes this number over when it is back in the set.
        let no = self.clean.next();
        self.clean = no;
        let named = self.with_marked_ahead(regions.iter().map(|(region, _)| *region));
        for slot in all.iter() {
            let flush = flushed_of(self, slot);
            let entries = named.iter().map(|region| CleanEntry { region: *region, flush }).collect();
            self.send(now, slot, What::Clean, Request::Clean { clean: no, entries }, out);
        }
        self.cleaning = Some(Cleaning { no, pending: all, failed: false, regions, announces });
    }

    /// These regions, and after each those that replicas may have marked with it and in which nothing was changed.
    fn with_marked_ahead(&self, regions: impl Iterator<Item = RegionIndex>) -> BTreeSet<RegionIndex> {
        let mut named = BTreeSet::new();
        for region in regions {
            named.insert(region);
            let ahead = (region.0 + 1..self.regions().min(region.0 + 1 + MARKED_AHEAD)).map(RegionIndex);
            for next in ahead.filter(|r| !self.dirty.contains(*r) && !self.equalising.contains_key(r)) {
                // Room is kept for the regions that are known to be dirty.
                if named.len() < limits::MAX_CLEAN_REGIONS / 2 {
                    named.insert(next);
                }
            }
        }
        named
    }

    pub(super) fn clean_answered(&mut self, slot: usize) {
        if let Some(cleaning) = &mut self.cleaning {
            cleaning.pending.remove(slot);
            self.slots[slot].clean_acked = cleaning.no;
        }
    }

    pub(super) fn clean_lost(&mut self, slot: usize) {
        // Whoever is in its place has to be told anew.
        self.dirty.announced.clear();
        if let Some(cleaning) = &mut self.cleaning {
            cleaning.announces.clear();
            if cleaning.pending.contains(slot) {
                cleaning.pending.remove(slot);
                cleaning.failed = true;
            }
        }
    }

    /// Tells a replica that regions which were suspect are equalised and flushed (R7): those of `group`, or all.
    pub(super) fn settle_suspects(&mut self, now: u64, slot: usize, group: Option<&RegionSet>, out: &mut Vec<Output>) {
        let attach = self.slots[slot].attach.as_mut().expect("attached");
        let flush = attach.flushed;
        let settled: Vec<_> = attach.suspect.iter().filter(|r| group.is_none_or(|g| g.contains(*r))).collect();
        for region in &settled {
            attach.suspect.remove(*region);
        }
        let entries: Vec<_> = settled.into_iter().map(|region| CleanEntry { region, flush }).collect();
        for entries in entries.chunks(limits::MAX_CLEAN_REGIONS) {
            self.send(now, slot, What::Settle, Request::Settle { entries: entries.to_vec() }, out);
        }
    }

    // ---- closing --------------------------------------------------------------------------------------------

    pub(super) fn begin_close(&mut self, out: &mut Vec<Output>) {
        if matches!(self.phase, Phase::Opening { .. } | Phase::Replaying) {
            if !self.replay.is_empty() {
                self.close_wanted = true;
                return;
            }
            // What is dirty stays so.
            self.phase = Phase::Closed;
            out.push(Output::Closed { clean: false });
            return;
        }
        self.phase = Phase::Closing;
        self.closing_flush = None;
    }

    pub(super) fn advance_close(&mut self, now: u64, out: &mut Vec<Output>) {
        if self.phase != Phase::Closing {
            return;
        }
        let members = self.live_members();
        if !self.ops.is_empty() || !self.equalising.is_empty() || self.change.is_some() || self.cleaning.is_some() {
            if !self.ops.is_empty() || !self.equalising.is_empty() {
                // The last flush begins when these have ended.
                self.closing_flush = None;
            }
            return;
        }
        let flush = match self.closing_flush {
            Some(flush) => flush,
            None => {
                let flush = self.want_flush();
                self.closing_flush = Some(flush);
                self.advance_flush(now, out);
                flush
            }
        };
        if !self.flushed(flush, members) {
            if flush < self.flush_next && self.flush_pending.is_empty() {
                self.closing_flush = Some(self.want_flush());
                self.advance_flush(now, out);
            }
            return;
        }
        if self.dirty.len() > 0 && members == self.all_slots() && self.settling.is_settled() {
            return; // advance_clean goes on with it
        }
        for slot in self.live().iter() {
            self.send(now, slot, What::Detach, Request::Detach, out);
        }
        self.phase = Phase::Closed;
        out.push(Output::Closed { clean: self.dirty.len() == 0 });
    }
}

fn flushed_of(mirror: &Mirror, slot: usize) -> FlushNo {
    mirror.slots[slot].attach.as_ref().expect("live").flushed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_are_soon_written_again_are_left_alone_for_longer_until_they_are_not() {
        let mut tracker = DirtyTracker::default();
        let mut now = 0;
        // A hundred writes, so many of them to regions that had been cleaned.
        let mut look = |regretted: u32, ms: u64| {
            for r in 0..100 {
                tracker.regions.clear();
                if r < regretted {
                    tracker.patience.cleaned.insert(RegionIndex(r));
                }
                tracker.writing(RegionIndex(r));
            }
            now += ms;
            tracker.patience.think_over(now);
            tracker.patience.idle_ms
        };
        assert_eq!(look(0, LOOK_MS), 3_000);
        assert_eq!(look(3, LOOK_MS), 3_000, "few");
        assert_eq!(look(4, LOOK_MS - 1), 3_000, "too early to tell");
        assert_eq!(look(4, 1), 6_000);
        assert_eq!([100; 5].map(|n| look(n, LOOK_MS)), [12_000, 24_000, 48_000, 48_000, 48_000]);
        assert_eq!(look(0, 95_999), 48_000);
        assert_eq!([0; 6].map(|n| look(n, 96_000)), [24_000, 12_000, 6_000, 3_000, 3_000, 3_000]);
    }
}
