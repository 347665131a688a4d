//! The log as raft-rs reads it: in memory, from the last snapshot's tail on. What is on disk follows it in the
//! order of [`Persist`](super::core::Persist); at start it is loaded from there.
//!
//! Keeping it whole in memory is affordable because it is bounded: [`super::core`] takes a snapshot after so many
//! entries or bytes.

use raft::prelude::*;
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

/// Entries, hard state, snapshot: all that raft-rs may ask for.
#[derive(Clone, Default)]
pub struct MemoryLog {
    conf_state: ConfState,
    hard_state: HardState,
    /// Consecutive.
    entries: Vec<Entry>,
    /// Index and term of the entry before the first.
    before: (u64, u64),
    snapshot: Snapshot,
    bytes: usize,
}

impl MemoryLog {
    /// The log as it was loaded.
    ///
    /// # Errors
    /// What does not fit together, in words.
    pub fn load(
        conf_state: ConfState,
        hard_state: HardState,
        snapshot: Snapshot,
        entries: Vec<Entry>,
        before: (u64, u64),
    ) -> Result<Self, String> {
        let snapshot_index = snapshot.get_metadata().index;
        for (expected, entry) in (before.0 + 1..).zip(&entries) {
            if entry.index != expected {
                return Err(format!("log entry {} where {expected} should be", entry.index));
            }
        }
        let last = before.0 + entries.len() as u64;
        if before.0 > snapshot_index || last < snapshot_index {
            return Err(format!("log of entries {}..={last} beside a snapshot of {snapshot_index}", before.0 + 1));
        }
        if hard_state.commit > last {
            return Err(format!("entries up to {} were committed, the log ends at {last}", hard_state.commit));
        }
        let bytes = entries.iter().map(|entry| entry.data.len()).sum();
        Ok(Self { conf_state, hard_state, entries, before, snapshot, bytes })
    }

    /// The voters.
    pub fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }
    /// As last given to [`Self::set_hard_state`].
    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }
    /// Term, vote, commit.
    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }
    /// The latest snapshot; empty before the first.
    pub fn latest_snapshot(&self) -> &Snapshot {
        &self.snapshot
    }
    /// Index and term of the entry before the first.
    pub fn before(&self) -> (u64, u64) {
        self.before
    }
    /// The last index.
    pub fn last(&self) -> u64 {
        self.before.0 + self.entries.len() as u64
    }
    /// Bytes of data in the entries held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn at(&self, index: u64) -> usize {
        (index - self.before.0 - 1) as usize
    }

    /// Appends entries, dropping what they replace.
    ///
    /// # Panics
    /// When they leave a gap, or replace what a snapshot covers.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            first.index > self.before.0 && first.index <= self.last() + 1,
            "entries from {} appended to a log of {}..={}",
            first.index,
            self.before.0 + 1,
            self.last()
        );
        let keep = self.at(first.index);
        let dropped: usize = self.entries.drain(keep..).map(|entry| entry.data.len()).sum();
        self.bytes -= dropped;
        self.bytes += entries.iter().map(|entry| entry.data.len()).sum::<usize>();
        self.entries.extend_from_slice(entries);
    }

    /// Replaces everything by a snapshot from the leader.
    pub fn install(&mut self, snapshot: Snapshot) {
        self.before = (snapshot.get_metadata().index, snapshot.get_metadata().term);
        self.entries = Vec::new();
        self.bytes = 0;
        self.hard_state.commit = self.hard_state.commit.max(self.before.0);
        self.snapshot = snapshot;
    }

    /// Takes our own snapshot and forgets entries up to `compact_to`.
    ///
    /// # Panics
    /// When `compact_to` lies after the snapshot or the log.
    pub fn compact(&mut self, snapshot: Snapshot, compact_to: u64) {
        assert!(compact_to <= snapshot.get_metadata().index && compact_to <= self.last(), "compacted to {compact_to}");
        self.snapshot = snapshot;
        if compact_to <= self.before.0 {
            return;
        }
        let term = self.entries[self.at(compact_to)].term;
        let gone = self.at(compact_to) + 1;
        self.bytes -= self.entries.drain(..gone).map(|entry| entry.data.len()).sum::<usize>();
        self.before = (compact_to, term);
    }
}

impl Storage for MemoryLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.before.0 {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let mut entries = self.entries[self.at(low)..self.at(high)].to_vec();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.before.0 {
            return Ok(self.before.1);
        }
        if index == self.snapshot.get_metadata().index {
            return Ok(self.snapshot.get_metadata().term);
        }
        if index < self.before.0 {
            return Err(StorageError::Compacted.into());
        }
        match self.entries.get(self.at(index)) {
            Some(entry) => Ok(entry.term),
            None => Err(StorageError::Unavailable.into()),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let index = self.snapshot.get_metadata().index;
        if index == 0 || index < request_index {
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(self.snapshot.clone())
    }
}
