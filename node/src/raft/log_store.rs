//! The durable log: one redb file per voter, and the same in memory for tests and simulation.
//!
//! ```text
//! table "log"   entry index (u64)  -> eraftpb.Entry
//! table "meta"  "hard_state"       -> eraftpb.HardState
//!               "snapshot"         -> eraftpb.Snapshot
//!               "before"           -> index, term of the entry before the first (two u64, little endian)
//!               "owner"            -> cluster id (16 bytes), member id (u64, little endian)
//! ```
//! A batch of [`Persist`]s is one transaction: after a crash all of it is there or nothing, and what was there
//! before is whole. redb checks its pages' checksums when it opens a file that was not closed.

use std::path::{Path, PathBuf};

use proto::id::{ClusterId, NodeId};
use protobuf::Message as _;
use raft::prelude::{ConfState, Entry, HardState, Snapshot};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::core::Persist;
use super::memory_log::MemoryLog;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Bytes that redb may cache; the log is read once, at start.
const CACHE: usize = 1 << 20;

/// What went wrong with the log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// redb could not do it.
    #[error("raft log {path}: {source}")]
    Store {
        /// The file.
        path: PathBuf,
        /// redb's error.
        source: Box<redb::Error>,
    },
    /// What is there makes no sense.
    #[error("raft log {path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It is another member's.
    #[error(
        "raft log {path} belongs to member {found_member} of cluster {found_cluster}, \
         this is member {member} of cluster {cluster}"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found_cluster: ClusterId,
        /// Whose it is.
        found_member: NodeId,
        /// Who we are.
        cluster: ClusterId,
        /// Who we are.
        member: NodeId,
    },
}

/// All that is durable.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// Term, vote, commit.
    pub hard_state: HardState,
    /// Empty before the first.
    pub snapshot: Snapshot,
    /// Index and term of the entry before the first.
    pub before: (u64, u64),
    /// Consecutive.
    pub entries: Vec<Entry>,
}

impl Loaded {
    /// The log for raft-rs, with these voters.
    ///
    /// # Errors
    /// What does not fit together.
    pub fn into_log(mut self, voters: &[u64]) -> Result<MemoryLog, String> {
        // raft-rs 0.7 panics when a voter in term 0 refuses a vote, which a witness does for its priority. All
        // begin in term 1 instead; nobody leads it, so nothing is promised by that.
        self.hard_state.term = self.hard_state.term.max(1);
        let conf_state = ConfState { voters: voters.to_vec(), ..ConfState::default() };
        MemoryLog::load(conf_state, self.hard_state, self.snapshot, self.entries, self.before)
    }
}

/// Where the log is kept.
pub trait LogStore: Send + 'static {
    /// Reads everything.
    ///
    /// # Errors
    /// When it cannot be read or makes no sense.
    fn load(&mut self) -> Result<Loaded, LogError>;
    /// Writes these in order and makes them durable, all or nothing.
    ///
    /// # Errors
    /// When it is not known to be durable: the voter must stop.
    fn write(&mut self, batch: &[Persist]) -> Result<(), LogError>;
}

/// In memory: "durable" means that it is in here.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore(Loaded);

impl LogStore for MemoryStore {
    fn load(&mut self) -> Result<Loaded, LogError> {
        Ok(self.0.clone())
    }

    fn write(&mut self, batch: &[Persist]) -> Result<(), LogError> {
        let durable = &mut self.0;
        for persist in batch {
            if let Some(snapshot) = &persist.install {
                durable.entries.clear();
                durable.before = (snapshot.get_metadata().index, snapshot.get_metadata().term);
                durable.snapshot = snapshot.clone();
            }
            if let Some(first) = persist.entries.first() {
                let keep = first.index - durable.before.0 - 1;
                durable.entries.truncate(keep as usize);
                durable.entries.extend_from_slice(&persist.entries);
            }
            if let Some((snapshot, before)) = &persist.compact {
                durable.snapshot = snapshot.clone();
                let gone = before.0 - durable.before.0;
                durable.entries.drain(..gone as usize);
                durable.before = *before;
            }
            if let Some(hard_state) = &persist.hard_state {
                durable.hard_state = hard_state.clone();
            }
        }
        Ok(())
    }
}

/// A redb file.
pub struct RedbStore {
    database: Database,
    path: PathBuf,
}

impl RedbStore {
    /// Opens or creates this member's log.
    ///
    /// # Errors
    /// When it is damaged, in use, or another member's.
    pub fn open(path: &Path, cluster: ClusterId, member: NodeId) -> Result<Self, LogError> {
        let fail = |source: redb::Error| LogError::Store { path: path.into(), source: Box::new(source) };
        let database = Database::builder().set_cache_size(CACHE).create(path).map_err(|e| fail(e.into()))?;
        let store = Self { database, path: path.into() };
        let mut owner = cluster.to_bytes().to_vec();
        owner.extend_from_slice(&member.0.to_le_bytes());
        let found = store.claim(&owner).map_err(fail)?;
        if found != owner {
            let Some((id, number)) = found.split_first_chunk::<16>() else {
                return Err(store.damaged("its owner is not readable"));
            };
            let Ok(number) = number.try_into() else { return Err(store.damaged("its owner is not readable")) };
            return Err(LogError::Foreign {
                path: path.into(),
                found_cluster: ClusterId::from_bytes(*id),
                found_member: NodeId(u64::from_le_bytes(number)),
                cluster,
                member,
            });
        }
        Ok(store)
    }

    /// Writes the owner where there is none; returns who it is.
    fn claim(&self, owner: &[u8]) -> Result<Vec<u8>, redb::Error> {
        let transaction = self.database.begin_write()?;
        let found = {
            transaction.open_table(LOG)?;
            let mut meta = transaction.open_table(META)?;
            let found = meta.get("owner")?.map(|found| found.value().to_vec());
            if found.is_none() {
                meta.insert("owner", owner)?;
            }
            found
        };
        match found {
            Some(found) => {
                transaction.abort()?;
                Ok(found)
            }
            None => {
                transaction.commit()?;
                Ok(owner.to_vec())
            }
        }
    }

    fn damaged(&self, why: impl ToString) -> LogError {
        LogError::Damaged { path: self.path.clone(), why: why.to_string() }
    }

    fn read(&self) -> Result<Result<Loaded, String>, redb::Error> {
        let transaction = self.database.begin_read()?;
        let meta = transaction.open_table(META)?;
        let log = transaction.open_table(LOG)?;
        let mut loaded = Loaded::default();
        if let Some(bytes) = meta.get("hard_state")? {
            match HardState::parse_from_bytes(bytes.value()) {
                Ok(hard_state) => loaded.hard_state = hard_state,
                Err(error) => return Ok(Err(format!("hard state: {error}"))),
            }
        }
        if let Some(bytes) = meta.get("snapshot")? {
            match Snapshot::parse_from_bytes(bytes.value()) {
                Ok(snapshot) => loaded.snapshot = snapshot,
                Err(error) => return Ok(Err(format!("snapshot: {error}"))),
            }
        }
        if let Some(bytes) = meta.get("before")? {
            match bytes.value().as_chunks::<8>() {
                ([index, term], []) => loaded.before = (u64::from_le_bytes(*index), u64::from_le_bytes(*term)),
                _ => return Ok(Err("the entry before the first is not readable".into())),
            }
        }
        for entry in log.iter()? {
            let (index, bytes) = entry?;
            match Entry::parse_from_bytes(bytes.value()) {
                Ok(entry) if entry.index == index.value() => loaded.entries.push(entry),
                Ok(entry) => return Ok(Err(format!("entry {} under index {}", entry.index, index.value()))),
                Err(error) => return Ok(Err(format!("entry {}: {error}", index.value()))),
            }
        }
        Ok(Ok(loaded))
    }

    fn put(&self, batch: &[Persist]) -> Result<(), redb::Error> {
        let bytes =
            |message: &dyn protobuf::Message| message.write_to_bytes().expect("raft messages have no required fields");
        let transaction = self.database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            let mut log = transaction.open_table(LOG)?;
            let mut put_snapshot = |snapshot: &Snapshot, before: (u64, u64)| -> Result<(), redb::Error> {
                let mut pair = before.0.to_le_bytes().to_vec();
                pair.extend_from_slice(&before.1.to_le_bytes());
                meta.insert("snapshot", bytes(snapshot).as_slice())?;
                meta.insert("before", pair.as_slice())?;
                Ok(())
            };
            for persist in batch {
                if let Some(snapshot) = &persist.install {
                    log.retain(|_, _| false)?;
                    put_snapshot(snapshot, (snapshot.get_metadata().index, snapshot.get_metadata().term))?;
                }
                if let Some(first) = persist.entries.first() {
                    log.retain_in(first.index.., |_, _| false)?;
                    for entry in &persist.entries {
                        log.insert(entry.index, bytes(entry).as_slice())?;
                    }
                }
                if let Some((snapshot, before)) = &persist.compact {
                    log.retain_in(..=before.0, |_, _| false)?;
                    put_snapshot(snapshot, *before)?;
                }
            }
            if let Some(hard_state) = batch.iter().rev().find_map(|persist| persist.hard_state.as_ref()) {
                meta.insert("hard_state", bytes(hard_state).as_slice())?;
            }
        }
        // redb's default durability: on disk when this returns.
        transaction.commit()?;
        Ok(())
    }
}

impl LogStore for RedbStore {
    fn load(&mut self) -> Result<Loaded, LogError> {
        match self.read() {
            Ok(Ok(loaded)) => Ok(loaded),
            Ok(Err(why)) => Err(self.damaged(why)),
            Err(source) => Err(LogError::Store { path: self.path.clone(), source: Box::new(source) }),
        }
    }

    fn write(&mut self, batch: &[Persist]) -> Result<(), LogError> {
        if !batch.iter().any(Persist::writes) {
            return Ok(());
        }
        self.put(batch).map_err(|source| LogError::Store { path: self.path.clone(), source: Box::new(source) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![index as u8].into(), ..Entry::default() }
    }

    fn snapshot(index: u64, term: u64) -> Snapshot {
        let mut snapshot = Snapshot { data: b"state".to_vec().into(), ..Snapshot::default() };
        snapshot.mut_metadata().index = index;
        snapshot.mut_metadata().term = term;
        snapshot
    }

    fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
        HardState { term, vote, commit, ..HardState::default() }
    }

    fn history() -> Vec<Persist> {
        vec![
            Persist {
                entries: (1..=6).map(|index| entry(index, 1)).collect(),
                hard_state: Some(hard_state(1, 2, 3)),
                ..Persist::default()
            },
            // A new leader replaces what was not committed.
            Persist {
                entries: vec![entry(5, 2), entry(6, 2), entry(7, 2)],
                hard_state: Some(hard_state(2, 3, 4)),
                ..Persist::default()
            },
            Persist {
                compact: Some((snapshot(6, 2), (4, 1))),
                hard_state: Some(hard_state(2, 3, 6)),
                ..Persist::default()
            },
            Persist {
                install: Some(snapshot(20, 3)),
                entries: vec![entry(21, 3)],
                hard_state: Some(hard_state(3, 0, 20)),
                ..Persist::default()
            },
        ]
    }

    #[test]
    fn a_log_that_was_not_closed_is_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let (cluster, member) = (ClusterId(Uuid::from_u128(1)), NodeId(2));
        let mut model = MemoryStore::default();
        for (step, persist) in history().into_iter().enumerate() {
            let path = dir.path().join("raft.redb");
            {
                let mut store = RedbStore::open(&path, cluster, member).unwrap();
                store.write(std::slice::from_ref(&persist)).unwrap();
                model.write(&[persist]).unwrap();
                // A copy taken while the file is open is what a kill leaves behind.
                std::fs::copy(&path, dir.path().join(format!("killed-{step}"))).unwrap();
            }
            for file in ["raft.redb".into(), format!("killed-{step}")] {
                let found = RedbStore::open(&dir.path().join(&file), cluster, member).unwrap().load().unwrap();
                let expected = model.load().unwrap();
                assert_eq!(found.entries, expected.entries, "{file}");
                assert_eq!(found.hard_state, expected.hard_state, "{file}");
                assert_eq!(found.snapshot, expected.snapshot, "{file}");
                assert_eq!(found.before, expected.before, "{file}");
                found.into_log(&[1, 2, 3]).unwrap();
            }
        }
    }

    #[test]
    fn a_batch_is_as_good_as_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = RedbStore::open(&dir.path().join("l"), ClusterId::default(), NodeId(1)).unwrap();
        store.write(&history()).unwrap();
        let found = store.load().unwrap();
        assert_eq!(found.entries, vec![entry(21, 3)]);
        assert_eq!(found.before, (20, 3));
        assert_eq!(found.hard_state, hard_state(3, 0, 20));
    }

    #[test]
    fn another_members_log_is_refused_and_both_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let (ours, theirs) = (ClusterId(Uuid::from_u128(1)), ClusterId(Uuid::from_u128(2)));
        drop(RedbStore::open(&path, theirs, NodeId(1)).unwrap());
        let error = RedbStore::open(&path, ours, NodeId(1)).err().unwrap().to_string();
        assert!(error.contains(&ours.to_string()) && error.contains(&theirs.to_string()), "{error}");
    }

    #[test]
    fn a_log_with_a_gap_is_refused() {
        let loaded = Loaded { entries: vec![entry(1, 1), entry(3, 1)], ..Loaded::default() };
        assert!(loaded.into_log(&[1]).is_err());
        let lost = Loaded { hard_state: hard_state(1, 1, 5), entries: vec![entry(1, 1)], ..Loaded::default() };
        assert!(lost.into_log(&[1]).is_err(), "committed entries are missing");
    }
}
