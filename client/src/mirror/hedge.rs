//! Reads that a replica is late with are sent to another member as well, and the first good answer counts.
//!
//! A slow disk, or a node whose processor somebody else uses, would otherwise delay every third read. A read may come
//! from any member (R3), so a second one is safe; the answer that comes later is dropped. The lock does not wait for it:
//! it changes nothing, and what it says of the bytes is not used (R4). While a replica is slow,
//! others are read; after [`SLOW_MS`] it is tried again.

use proto::frame::{Code, Reply, Request};
use proto::id::RegionIndex;
use proto::limits::REGION_BLOCKS;

use super::foreground::Stage;
use super::limits;
use super::state::{Mirror, TICK_MS, What};
use super::types::Output;

/// A read that has been out for so long, in milliseconds, is sent to another member as well.
const LATE_MS: u64 = 40;
/// For so long after that the replica is read only if all others are slow, too.
const SLOW_MS: u64 = 2_000;

impl Mirror {
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
