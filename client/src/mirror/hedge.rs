//! Which member is read, so that a slow one drags nothing along.
//!
//! Reads go to all members in turn, by chunk, but for one that takes much longer than another, as a disk with seeks
//! beside two without: it is asked now and then, to see whether it still does. Reads that a replica is late with are
//! sent to another member as well, and the first good answer counts.
//!
//! A slow disk, or a node whose processor somebody else uses, would otherwise delay every third read. A read may come
//! from any member (R3), so a second one is safe; the answer that comes later is dropped. The lock does not wait for
//! it: it changes nothing, and what it says of the bytes is not used (R4). While a replica is slow, others are read;
//! after [`SLOW_MS`] it is tried again.

use proto::frame::{Code, Reply, Request};
use proto::id::RegionIndex;
use proto::limits::REGION_BLOCKS;
use proto::mutant::{self, Mutant};

use super::foreground::Stage;
use super::limits;
use super::mask::Mask;
use super::state::{Mirror, TICK_MS, What};
use super::types::Output;

/// A read that has been out for so long, in milliseconds, is sent to another member as well.
const LATE_MS: u64 = 40;
/// For so long after that the replica is read only if all others are slow, too.
const SLOW_MS: u64 = 2_000;
/// A replica is behind if its reads take so many times as long as those of the quickest, and so many milliseconds.
const BEHIND: (u32, u32) = (4, 2);
/// It is asked again after this time all the same.
const ASK_AGAIN_MS: u64 = 100;

/// How quickly a replica reads.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct ReadPace {
    /// How long its reads take, smoothed, in sixteenths of a millisecond.
    lag: u32,
    asked_at: u64,
}

impl ReadPace {
    pub fn asked(&mut self, now: u64) {
        self.asked_at = now;
    }

    /// It is soon forgiven, and not condemned for one late answer.
    pub fn answered(&mut self, took_ms: u64) {
        let took = u32::try_from(took_ms).unwrap_or(u32::MAX).min(60_000) * 16;
        self.lag = if took < self.lag { u32::midpoint(self.lag, took) } else { self.lag + (took - self.lag) / 8 };
    }

    fn is_behind(&self, now: u64, quickest: u32) -> bool {
        self.lag > quickest * BEHIND.0 + BEHIND.1 * 16 && now < self.asked_at + ASK_AGAIN_MS
    }
}

impl Mirror {
    /// The replica to read `block` from: by chunk over the live members, so that one stream draws on all of them, but
    /// for those that are slow or behind.
    pub(super) fn pick(&self, now: u64, block: u64, tried: Mask) -> Option<usize> {
        let readable = if mutant::is(Mutant::ReadJoining) { self.live() } else { self.live_members() };
        let readable = readable - tried;
        let quick: Mask = readable.iter().filter(|slot| now >= self.slots[*slot].slow_until).collect();
        let quick = if quick.is_empty() { readable } else { quick };
        let quickest = quick.iter().map(|slot| self.slots[slot].pace.lag).min().unwrap_or_default();
        let from: Mask = quick.iter().filter(|slot| !self.slots[*slot].pace.is_behind(now, quickest)).collect();
        let turn = (block / self.cfg.chunk_blocks) as usize;
        from.iter().nth(turn % from.len().max(1))
    }

    /// Looks for late reads.
    pub(super) fn hedge_reads(&mut self, now: u64, out: &mut Vec<Output>) {
        if now.saturating_sub(std::mem::replace(&mut self.ticked_at, now)) > 2 * TICK_MS {
            // It was us who stood still: answers may be there and not read.
            return;
        }
        let late = self.sent.values().filter(|sent| now.saturating_sub(sent.at) >= LATE_MS);
        let late = late.filter_map(|sent| match sent.what {
            What::Op(id) => Some((id, sent.slot)),
            _ => None,
        });
        for (id, slot) in late.collect::<Vec<_>>() {
            let Some(op) = self.ops.get(&id).filter(|op| op.stage == Stage::Reading { slot } && op.hedge.is_none())
            else {
                continue;
            };
            self.slots[slot].slow_until = now + SLOW_MS;
            let (block, count, mut tried) = (op.block, op.count, op.tried);
            tried.insert(slot);
            let Some(other) = self.pick(now, block.0, tried) else { continue };
            if now < self.slots[other].slow_until || self.hedged() >= limits::MAX_HEDGED {
                continue;
            }
            self.ops.get_mut(&id).expect("looked at above").hedge = Some(other);
            self.send(now, other, What::Op(id), Request::Read { block, count }, out);
        }
    }

    /// Requests that are out beside those that the open requests stand for.
    fn hedged(&self) -> usize {
        let dropped = self.sent.values().filter(|sent| sent.what == What::Dropped).count();
        dropped + self.ops.values().filter(|op| op.hedge.is_some()).count()
    }

    /// A bad block is repaired though nobody needs the answer; if the write that came meanwhile made it look bad, that is
    /// found under the lock.
    pub(super) fn dropped_answered(&mut self, reply: Reply) {
        if let Reply::Failed { code: Code::Checksum | Code::ReadFailed, block, .. } = reply
            && block < self.cfg.blocks
        {
            self.repair(RegionIndex((block / REGION_BLOCKS) as u32));
        }
    }

    /// The read has its answer: the other one counts for nothing any more, but its replica must still give it.
    pub(super) fn drop_hedge(&mut self, id: u64) {
        let op = self.ops.get_mut(&id).expect("it was answered just now");
        if op.hedge.take().is_some() {
            self.sent.values_mut().filter(|sent| sent.what == What::Op(id)).for_each(|sent| sent.what = What::Dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_behind_after_some_slow_answers_and_is_forgiven_after_one_or_two_quick_ones() {
        let mut pace = ReadPace::default();
        pace.asked(1_000);
        for (took_ms, behind) in [(0, false), (1, false), (15, false), (6, true), (1, false)] {
            pace.answered(took_ms);
            assert_eq!(pace.is_behind(1_050, 0), behind, "after {took_ms} ms: {pace:?}");
        }
        (0..50).for_each(|_| pace.answered(10));
        assert!(pace.is_behind(1_050, 16) && !pace.is_behind(1_050, 48), "it depends on the quickest");
        assert!(!pace.is_behind(1_100, 16), "it is asked again");
        pace.asked(1_100);
        assert!(pace.is_behind(1_100, 16), "once");
        pace.answered(u64::MAX);
        pace.answered(0);
        assert!(pace.lag < 60_000 * 16);
    }
}
