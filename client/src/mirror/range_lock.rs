//! Range locks over whole blocks (R4): shared and exclusive, first come first served.
//!
//! A request waits while any conflicting one before it holds or waits, so a stream of reads cannot starve a write.
//! The table is a list in order of arrival; a mirror admits a few hundred requests at once, for which a scan is
//! cheaper than a tree.

use std::collections::VecDeque;

use proto::id::BlockIndex;

/// Who holds or awaits a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LockOwner {
    /// A request of the volume.
    Op(u64),
    /// The equalising, or comparing, of a region.
    Region(u32),
}

#[derive(Debug)]
struct Entry {
    owner: LockOwner,
    start: u64,
    end: u64,
    exclusive: bool,
    granted: bool,
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        (self.exclusive || other.exclusive) && self.start < other.end && other.start < self.end
    }
}

/// The lock table of one mirror.
#[derive(Debug, Default)]
pub struct RangeLocks {
    entries: VecDeque<Entry>,
    waiting: usize,
}

impl RangeLocks {
    /// Asks for a lock over `count` blocks; true if it is held at once, otherwise [`Self::release`] will name it.
    pub fn acquire(&mut self, owner: LockOwner, block: BlockIndex, count: u64, exclusive: bool) -> bool {
        let mut entry = Entry { owner, start: block.0, end: block.0 + count, exclusive, granted: false };
        entry.granted = !self.entries.iter().any(|e| e.conflicts(&entry));
        self.waiting += usize::from(!entry.granted);
        let granted = entry.granted;
        self.entries.push_back(entry);
        granted
    }

    /// Gives a lock up, or the wait for one; pushes onto `granted` who holds theirs now.
    ///
    /// # Panics
    /// If `owner` neither holds nor awaits a lock.
    pub fn release(&mut self, owner: LockOwner, granted: &mut Vec<LockOwner>) {
        let at = self.entries.iter().position(|e| e.owner == owner).expect("released a lock that was not taken");
        let gone = self.entries.remove(at).expect("found above");
        if !gone.granted {
            self.waiting -= 1;
        }
        if self.waiting == 0 {
            return;
        }
        for i in at..self.entries.len() {
            let e = &self.entries[i];
            if e.granted || !e.conflicts(&gone) || self.entries.iter().take(i).any(|earlier| earlier.conflicts(e)) {
                continue;
            }
            self.entries[i].granted = true;
            self.waiting -= 1;
            granted.push(self.entries[i].owner);
        }
    }

    /// How many hold or await a lock.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nobody holds or awaits one.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(n: u64) -> LockOwner {
        LockOwner::Op(n)
    }

    fn release(locks: &mut RangeLocks, n: u64) -> Vec<LockOwner> {
        let mut granted = Vec::new();
        locks.release(op(n), &mut granted);
        granted
    }

    #[test]
    fn readers_share_and_a_writer_waits_for_them() {
        let mut locks = RangeLocks::default();
        assert!(locks.acquire(op(1), BlockIndex(0), 4, false));
        assert!(locks.acquire(op(2), BlockIndex(2), 4, false));
        assert!(!locks.acquire(op(3), BlockIndex(3), 1, true));
        assert!(release(&mut locks, 1).is_empty());
        assert_eq!(release(&mut locks, 2), [op(3)]);
    }

    #[test]
    fn a_reader_does_not_overtake_a_waiting_writer() {
        let mut locks = RangeLocks::default();
        assert!(locks.acquire(op(1), BlockIndex(0), 1, false));
        assert!(!locks.acquire(op(2), BlockIndex(0), 2, true));
        assert!(!locks.acquire(op(3), BlockIndex(1), 1, false));
        assert!(locks.acquire(op(4), BlockIndex(2), 1, true), "no overlap, no wait");
        assert_eq!(release(&mut locks, 1), [op(2)]);
        assert_eq!(release(&mut locks, 2), [op(3)]);
    }

    #[test]
    fn giving_up_a_wait_lets_those_behind_pass() {
        let mut locks = RangeLocks::default();
        assert!(locks.acquire(op(1), BlockIndex(0), 1, false));
        assert!(!locks.acquire(op(2), BlockIndex(0), 1, true));
        assert!(!locks.acquire(op(3), BlockIndex(0), 1, false));
        assert_eq!(release(&mut locks, 2), [op(3)]);
    }
}
