//! Replicas' files in memory, with faults to order. For tests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use proto::id::ReplicaId;

use super::era::Era;
use crate::replica::layout::Layout;
use crate::replica::{DiskData, DiskError, DiskIo, FileKind, FileLengths};

/// Decides which operations fail.
pub type Fault = Arc<dyn Fn(&DiskIo) -> Option<DiskError> + Send + Sync>;

/// A pool in memory; it outlives the data plane that uses it, as a directory does.
#[derive(Clone, Default)]
pub struct MemPool {
    replicas: Arc<Mutex<BTreeMap<ReplicaId, Arc<MemFiles>>>>,
    fault: Arc<Mutex<Option<Fault>>>,
}

impl std::fmt::Debug for MemPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemPool").field("replicas", &self.replicas).finish_non_exhaustive()
    }
}

impl MemPool {
    /// From now on `fault` is asked before every operation; `None`: none fails.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *self.fault.lock().expect("not poisoned") = fault;
    }

    /// The replica's files; with `create`, new ones where there are none.
    pub fn open(&self, replica: ReplicaId, create: bool) -> Option<Arc<MemFiles>> {
        let mut replicas = self.replicas.lock().expect("not poisoned");
        if create {
            let fault = self.fault.clone();
            let era = AtomicU64::new(1);
            let new = || Arc::new(MemFiles { data: Mutex::default(), meta: Mutex::default(), era, fault });
            return Some(replicas.entry(replica).or_insert_with(new).clone());
        }
        replicas.get(&replica).cloned()
    }

    /// Forgets the replica.
    pub fn delete(&self, replica: ReplicaId) {
        self.replicas.lock().expect("not poisoned").remove(&replica);
    }
}

/// A replica's two files in memory.
pub struct MemFiles {
    data: Mutex<Vec<u8>>,
    meta: Mutex<Vec<u8>>,
    era: AtomicU64,
    fault: Arc<Mutex<Option<Fault>>>,
}

impl std::fmt::Debug for MemFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemFiles").field("lengths", &self.lengths()).finish_non_exhaustive()
    }
}

impl MemFiles {
    fn file(&self, file: FileKind) -> std::sync::MutexGuard<'_, Vec<u8>> {
        match file {
            FileKind::Data => self.data.lock(),
            FileKind::Meta => self.meta.lock(),
        }
        .expect("not poisoned")
    }

    /// Makes the files as long as the layout says. `wipe`: the meta file reads as zeroes.
    pub fn size(&self, layout: &Layout, wipe: bool) {
        if wipe {
            self.file(FileKind::Meta).clear();
        }
        self.file(FileKind::Meta).resize(layout.meta_len() as usize, 0);
        self.file(FileKind::Data).resize(layout.data_len() as usize, 0);
    }

    /// Current lengths.
    pub fn lengths(&self) -> FileLengths {
        FileLengths { data: self.file(FileKind::Data).len() as u64, meta: self.file(FileKind::Meta).len() as u64 }
    }

    /// See [`super::era`].
    pub fn era(&self) -> Era {
        u128::from(self.era.load(Ordering::Relaxed)).to_le_bytes()
    }

    /// See [`super::era`].
    pub fn end_era(&self) {
        self.era.fetch_add(1, Ordering::Relaxed);
    }

    /// Changes the bytes of a file, as rot would.
    pub fn damage(&self, file: FileKind, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut self.file(file));
    }

    /// Carries an operation out.
    ///
    /// # Errors
    /// The ordered one; a range past the end of a file is an I/O error.
    pub fn execute(&self, io: &DiskIo) -> Result<DiskData, DiskError> {
        let fault = self.fault.lock().expect("not poisoned").clone();
        if let Some(error) = fault.and_then(|fault| fault(io)) {
            return Err(error);
        }
        match io {
            DiskIo::Read { file, offset, len } => {
                let file = self.file(*file);
                let range = *offset as usize..*offset as usize + *len as usize;
                file.get(range).map(|bytes| DiskData::Read(bytes.to_vec())).ok_or(DiskError::Io)
            }
            DiskIo::Write { file, offset, bytes } => {
                let mut file = self.file(*file);
                let range = *offset as usize..*offset as usize + bytes.len();
                file.get_mut(range).ok_or(DiskError::Io)?.copy_from_slice(bytes);
                Ok(DiskData::None)
            }
            DiskIo::Punch { offset, len } => {
                let mut file = self.file(FileKind::Data);
                let range = *offset as usize..(*offset + *len) as usize;
                file.get_mut(range).ok_or(DiskError::Io)?.fill(0);
                Ok(DiskData::None)
            }
            DiskIo::Sync { .. } => Ok(DiskData::None),
        }
    }
}
