//! A replica's two files in a pool's directory: `<replica>.data` and `<replica>.meta`.
//!
//! The core knows a data file and a meta file. The last part of the latter, the block map, lies behind the data here: a
//! write and its sums are then made durable by one sync of one file, which is most of what a small durable write costs.
//! Block *n* is at *n* × 4096 all the same, and what says whose the replica is, in the meta file.
//!
//! Both are locked (flock) on the very descriptions that the I/O is done on, before anything is read: while a
//! killed predecessor's I/O is in flight its description, and so its lock, lives on (R1).

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proto::buffer;
use proto::id::ReplicaId;
use rustix::fs::{Advice, FallocateFlags, FlockOperation};
use rustix::io::{Errno, ReadWriteFlags};

use crate::replica::layout::Layout;
use crate::replica::{DiskData, DiskIo, FileKind, FileLengths};

/// How long a lock that somebody holds is waited for: a killed process's last I/O ends in this time.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// What statfs says of a file system in memory (tmpfs).
const TMPFS: u64 = 0x0102_1994;

/// The two files, open and locked.
#[derive(Debug)]
pub struct FilePair {
    data: File,
    meta: File,
    layout: Layout,
    /// Bytes of data that were written since the data file's last sync began; `u64::MAX`: it is not known.
    unsynced_data: AtomicU64,
    /// Of the map, behind the data.
    map_writes: Writes,
    meta_writes: Writes,
    dir: PathBuf,
    replica: ReplicaId,
    in_memory: bool,
    device: u64,
}

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Data,
    Meta,
}

/// Writes that have ended, and how many of them a sync has covered. What earlier processes wrote counts as one.
#[derive(Debug)]
struct Writes {
    ended: AtomicU64,
    synced: AtomicU64,
}

impl Writes {
    fn new() -> Self {
        Self { ended: AtomicU64::new(1), synced: AtomicU64::new(0) }
    }
    fn ended(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }
    fn are_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire) == self.ended()
    }
}

/// A sync of a file of the core's, a file of ours at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SyncStep {
    part: Part,
    /// The writes that had ended when it began.
    covers: u64,
    /// The map is to be synced, too.
    map_too: bool,
}

impl SyncStep {
    pub(crate) fn part(self) -> Part {
        self.part
    }
}

/// What was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The data file existed, and had bytes on the medium.
    pub data: bool,
    /// The meta file existed, and was not empty.
    pub meta: bool,
}

/// Why the files can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FileProblem {
    #[error("{path} does not exist")]
    Missing { path: PathBuf },
    #[error("{path} is in use by another process")]
    Locked { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// The path of one of a replica's files.
pub fn path(dir: &Path, replica: ReplicaId, file: FileKind) -> PathBuf {
    let suffix = match file {
        FileKind::Data => "data",
        FileKind::Meta => "meta",
    };
    dir.join(format!("{replica}.{suffix}"))
}

impl FilePair {
    /// Opens and locks both files. With `create`, what is missing is made, empty. Blocks.
    ///
    /// # Errors
    /// [`FileProblem`], which names the file.
    pub fn open(dir: &Path, replica: ReplicaId, layout: Layout, create: bool) -> Result<(Self, Found), FileProblem> {
        let open = |file| {
            let path = path(dir, replica, file);
            let opened = OpenOptions::new().read(true).write(true).create(create).truncate(false).open(&path);
            let opened = opened.map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => FileProblem::Missing { path: path.clone() },
                _ => FileProblem::Io { path: path.clone(), source },
            })?;
            lock(&opened, &path)?;
            let meta = opened.metadata().map_err(|source| FileProblem::Io { path, source })?;
            Ok((opened, meta))
        };
        let (meta, meta_is) = open(FileKind::Meta)?;
        let (data, data_is) = open(FileKind::Data)?;
        let found = Found { data: data_is.blocks() > 0, meta: meta_is.len() > 0 };
        // A device lies in a file system in memory, too.
        let on_tmpfs = |file: &File| rustix::fs::fstatfs(file).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(TMPFS));
        let in_memory = [(&data, &data_is), (&meta, &meta_is)].iter().all(|(file, is)| is.is_file() && on_tmpfs(file));
        let (map_writes, meta_writes) = (Writes::new(), Writes::new());
        let (dir, device) = (dir.to_owned(), data_is.dev());
        let unsynced_data = AtomicU64::new(u64::MAX);
        Ok((
            Self { data, meta, layout, unsynced_data, map_writes, meta_writes, dir, replica, in_memory, device },
            found,
        ))
    }

    /// Makes the files as long as the layout says, sparse, and their names durable. All metadata read as zeroes
    /// afterwards; the blocks keep what they hold. Blocks.
    ///
    /// # Errors
    /// [`FileProblem`], which names the file.
    pub fn size(&self) -> Result<(), FileProblem> {
        let problem = |file, source| FileProblem::Io { path: self.path(file), source };
        let (data_len, map_at) = (self.layout.data_len(), self.layout.map(0));
        for len in [0, map_at] {
            self.meta.set_len(len).map_err(|e| problem(FileKind::Meta, e))?;
        }
        for len in [data_len, data_len + self.layout.meta_len() - map_at] {
            self.data.set_len(len).map_err(|e| problem(FileKind::Data, e))?;
        }
        for (file, kind) in [(&self.data, FileKind::Data), (&self.meta, FileKind::Meta)] {
            file.sync_all().map_err(|e| problem(kind, e))?;
        }
        sync_dir(&self.dir)
    }

    /// Current lengths of the files as the core knows them.
    ///
    /// # Errors
    /// The system's.
    pub fn lengths(&self) -> io::Result<FileLengths> {
        let (data, meta) = (self.data.metadata()?.len(), self.meta.metadata()?.len());
        let map = if meta < self.layout.map(0) { 0 } else { data.saturating_sub(self.layout.data_len()) };
        Ok(FileLengths { data: data.min(self.layout.data_len()), meta: meta + map })
    }

    /// The path of one of the files, for messages.
    pub fn path(&self, file: FileKind) -> PathBuf {
        path(&self.dir, self.replica, file)
    }

    /// The number of the device that the files are on.
    pub(crate) fn device(&self) -> u64 {
        self.device
    }

    pub(crate) fn part(&self, part: Part) -> &File {
        match part {
            Part::Data => &self.data,
            Part::Meta => &self.meta,
        }
    }

    /// Where these bytes of a file of the core's are.
    ///
    /// # Panics
    /// If they are in both of ours: nothing that the core does to blocks may reach the map.
    pub(crate) fn place(&self, file: FileKind, offset: u64, len: u64) -> (&File, u64) {
        let (data_len, map_at) = (self.layout.data_len(), self.layout.map(0));
        let end = if file == FileKind::Data { data_len } else { map_at };
        match (file, offset.checked_sub(map_at)) {
            (FileKind::Meta, Some(of_map)) => (&self.data, data_len + of_map),
            _ if len > end.saturating_sub(offset) => panic!("{len} bytes at {offset} of the {file} reach past {end}"),
            (FileKind::Data, _) => (&self.data, offset),
            (FileKind::Meta, None) => (&self.meta, offset),
        }
    }

    /// A write has ended, well or not. To be said before the core hears of it.
    pub(crate) fn wrote(&self, file: FileKind, offset: u64, len: usize) {
        match file {
            FileKind::Data => {
                let add = |known: u64| Some(known.saturating_add(len as u64));
                let _ = self.unsynced_data.fetch_update(Ordering::AcqRel, Ordering::Acquire, add);
            }
            FileKind::Meta if offset < self.layout.map(0) => _ = self.meta_writes.ended.fetch_add(1, Ordering::AcqRel),
            FileKind::Meta => _ = self.map_writes.ended.fetch_add(1, Ordering::AcqRel),
        }
    }

    /// Whether a sync of the data file has no more than so many bytes of data to write.
    pub(crate) fn has_unsynced_at_most(&self, bytes: u64) -> bool {
        self.unsynced_data.load(Ordering::Acquire) <= bytes
    }

    /// Whether a sync of the data file is one of the meta file as well: of the latter nothing but the map was written.
    pub(crate) fn data_has_all(&self) -> bool {
        self.meta_writes.are_synced()
    }

    /// What a sync begins with.
    pub(crate) fn sync_step(&self, file: FileKind, map: bool) -> SyncStep {
        if file == FileKind::Data {
            self.unsynced_data.store(0, Ordering::Release);
        }
        let map_too = file == FileKind::Meta && map && !self.map_writes.are_synced();
        if file == FileKind::Data || map_too && self.meta_writes.are_synced() {
            return SyncStep { part: Part::Data, covers: self.map_writes.ended(), map_too: false };
        }
        SyncStep { part: Part::Meta, covers: self.meta_writes.ended(), map_too }
    }

    /// A step has ended well. Returns the next one, if there is one.
    pub(crate) fn step_done(&self, step: SyncStep) -> Option<SyncStep> {
        let writes = match step.part {
            Part::Data => &self.map_writes,
            Part::Meta => &self.meta_writes,
        };
        writes.synced.fetch_max(step.covers, Ordering::AcqRel);
        step.map_too.then(|| SyncStep { part: Part::Data, covers: self.map_writes.ended(), map_too: false })
    }

    /// Names the files among those of this machine, as long as they exist.
    pub(crate) fn era_key(&self) -> Option<String> {
        self.meta.metadata().ok().map(|is| era_key(&is))
    }

    /// Forgets what the page cache holds. Pages whose write-back has failed go too, so that what is read next is
    /// what the disk holds.
    pub fn drop_cache(&self) {
        for file in [&self.data, &self.meta] {
            if let Err(error) = rustix::fs::fadvise(file.as_fd(), 0, None, Advice::DontNeed) {
                tracing::warn!(dir = %self.dir.display(), replica = %self.replica, %error, "page cache not dropped");
            }
        }
    }

    /// Carries an operation out and waits for it.
    ///
    /// # Errors
    /// The system's; a read past the end of the file is one.
    pub fn execute(&self, io: &DiskIo) -> io::Result<DiskData> {
        match io {
            DiskIo::Read { file, offset, len } => {
                let mut bytes = buffer::take_filled(*len as usize);
                let (file, offset) = self.place(*file, *offset, (*len).into());
                let mut done = 0;
                while done < bytes.len() {
                    match rustix::io::pread(file, &mut bytes[done..], offset + done as u64) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(n) => done += n,
                        Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(DiskData::Read(bytes))
            }
            DiskIo::Write { file, offset, bytes } => {
                let (part, at) = self.place(*file, *offset, bytes.len() as u64);
                let result = part.write_all_at(bytes, at);
                self.wrote(*file, *offset, bytes.len());
                result.map(|()| DiskData::None)
            }
            DiskIo::Punch { offset, len } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let (file, offset) = self.place(FileKind::Data, *offset, *len);
                rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, flags, offset, *len))?;
                Ok(DiskData::None)
            }
            DiskIo::Sync { file, map } => {
                let mut next = Some(self.sync_step(*file, *map));
                while let Some(step) = next {
                    self.part(step.part()).sync_data()?;
                    next = self.step_done(step);
                }
                Ok(DiskData::None)
            }
        }
    }

    /// The files have no disk behind them: nothing is ever waited for, and the kernel knows no reads that don't.
    pub(crate) fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// Reads what is in the page cache; `None`: not all of it is.
    pub(crate) fn read_cached(&self, file: FileKind, offset: u64, len: u32) -> Option<Vec<u8>> {
        let mut bytes = buffer::take_filled(len as usize);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let (file, offset) = self.place(file, offset, len.into());
        match rustix::io::preadv2(file, &mut slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(n) if n == len as usize => Some(bytes),
            _ => {
                drop(buffer::freeze(bytes));
                None
            }
        }
    }
}

fn era_key(meta: &std::fs::Metadata) -> String {
    // A device's own number, where it is one.
    let dev = if meta.rdev() != 0 { meta.rdev() } else { meta.dev() };
    format!("{dev:x}-{:x}", meta.ino())
}

fn lock(file: &File, path: &Path) -> Result<(), FileProblem> {
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::WOULDBLOCK) => return Err(FileProblem::Locked { path: path.to_owned() }),
            Err(error) => return Err(FileProblem::Io { path: path.to_owned(), source: error.into() }),
        }
    }
}

fn sync_dir(dir: &Path) -> Result<(), FileProblem> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|source| FileProblem::Io { path: dir.to_owned(), source })
}

/// Deletes a replica's files, durably. What is gone is gone. Blocks.
///
/// # Errors
/// [`FileProblem`], which names the file.
pub fn delete(dir: &Path, replica: ReplicaId) -> Result<(), FileProblem> {
    if let Ok(meta) = path(dir, replica, FileKind::Meta).metadata() {
        super::era::end(&era_key(&meta));
    }
    for file in [FileKind::Data, FileKind::Meta] {
        let path = path(dir, replica, file);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(FileProblem::Io { path, source }),
            _ => {}
        }
    }
    sync_dir(dir)
}

/// Bytes of the directory's file system, and bytes free for us; and bytes that replicas take here. Blocks.
///
/// # Errors
/// The system's.
pub fn usage(dir: &Path) -> io::Result<(u64, u64, u64)> {
    let fs = rustix::fs::statvfs(dir)?;
    let mut taken = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let is_ours = Path::new(&entry.file_name()).extension().is_some_and(|e| e == "data" || e == "meta");
        match entry.metadata() {
            Ok(meta) if is_ours => taken += meta.blocks() * 512,
            // Deleted since it was listed, or not a replica's.
            _ => {}
        }
    }
    Ok((fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize, taken))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn made() -> (tempfile::TempDir, FilePair) {
        let dir = tempfile::tempdir().unwrap();
        let (files, found) = FilePair::open(dir.path(), ReplicaId::default(), Layout::new(600), true).unwrap();
        assert!(!found.data && !found.meta);
        files.size().unwrap();
        (dir, files)
    }

    fn write(files: &FilePair, file: FileKind, offset: u64, fill: u8) {
        let bytes = Bytes::from(vec![fill; 4096]);
        files.execute(&DiskIo::Write { file, offset, bytes }).unwrap();
    }

    fn read(files: &FilePair, file: FileKind, offset: u64) -> u8 {
        let Ok(DiskData::Read(bytes)) = files.execute(&DiskIo::Read { file, offset, len: 4096 }) else {
            panic!("not read")
        };
        assert_eq!(files.read_cached(file, offset, 4096).unwrap(), bytes);
        bytes[0]
    }

    #[test]
    fn the_map_is_behind_the_data() {
        let (dir, files) = made();
        let layout = Layout::new(600);
        assert_eq!(files.lengths().unwrap(), FileLengths { data: layout.data_len(), meta: layout.meta_len() });
        for (file, offset, fill) in [
            (FileKind::Data, 0, 1),
            (FileKind::Data, 599 * 4096, 2),
            (FileKind::Meta, 0, 3),
            (FileKind::Meta, layout.map(0) - 4096, 4),
            (FileKind::Meta, layout.map(0), 5),
        ] {
            write(&files, file, offset, fill);
            assert_eq!(read(&files, file, offset), fill);
        }
        let data = std::fs::read(path(dir.path(), ReplicaId::default(), FileKind::Data)).unwrap();
        assert_eq!((data[0], data[599 * 4096], data[600 * 4096], data.len()), (1, 2, 5, 601 * 4096));
        // Metadata are made anew; the blocks stay.
        files.size().unwrap();
        assert_eq!([0, layout.map(0) - 4096, layout.map(0)].map(|at| read(&files, FileKind::Meta, at)), [0; 3]);
        assert_eq!(read(&files, FileKind::Data, 599 * 4096), 2);
    }

    #[test]
    fn a_file_that_was_cut_off_says_so() {
        let (dir, files) = made();
        let layout = Layout::new(600);
        let cut = |file, len| {
            let file = File::options().write(true).open(path(dir.path(), ReplicaId::default(), file)).unwrap();
            file.set_len(len).unwrap();
        };
        cut(FileKind::Data, 600 * 4096);
        assert_eq!(files.lengths().unwrap(), FileLengths { data: layout.data_len(), meta: layout.map(0) });
        cut(FileKind::Data, 9);
        assert_eq!(files.lengths().unwrap().data, 9);
        cut(FileKind::Meta, 4096);
        assert_eq!(files.lengths().unwrap().meta, 4096);
    }

    #[test]
    #[should_panic(expected = "reach past")]
    fn no_block_reaches_into_the_map() {
        let (_dir, files) = made();
        let _ = files.execute(&DiskIo::Punch { offset: 599 * 4096, len: 2 * 4096 });
    }

    /// The files that a sync goes to, in this order.
    fn synced(files: &FilePair, file: FileKind) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut next = Some(files.sync_step(file, true));
        while let Some(step) = next {
            parts.push(step.part());
            next = files.step_done(step);
        }
        parts
    }

    #[test]
    fn a_sync_covers_every_write_that_ended_before_it() {
        use Part::{Data, Meta};
        let (_dir, files) = made();
        let map = Layout::new(600).map(0);
        assert!(!files.data_has_all());
        assert_eq!(synced(&files, FileKind::Meta), [Meta, Data], "what an earlier process wrote");
        assert!(files.data_has_all());
        write(&files, FileKind::Meta, map, 1);
        assert!(files.data_has_all());
        assert_eq!(synced(&files, FileKind::Meta), [Data]);
        write(&files, FileKind::Meta, map, 2);
        write(&files, FileKind::Meta, 0, 2);
        assert!(!files.data_has_all());
        assert_eq!(synced(&files, FileKind::Data), [Data], "and the map with it");
        assert_eq!(synced(&files, FileKind::Meta), [Meta]);
        // What ends while a sync runs is not covered by it.
        let step = files.sync_step(FileKind::Meta, true);
        write(&files, FileKind::Meta, 0, 3);
        let data = files.sync_step(FileKind::Data, false);
        write(&files, FileKind::Meta, map, 3);
        assert!(files.step_done(data).is_none() && files.step_done(step).is_none());
        assert!(!files.data_has_all());
        assert_eq!(synced(&files, FileKind::Meta), [Meta, Data]);
        // One that failed has covered nothing.
        write(&files, FileKind::Meta, map, 4);
        let _ = files.sync_step(FileKind::Meta, true);
        // Bitmaps and superblocks do not wait for the map, nor for all that was written beside it.
        write(&files, FileKind::Meta, 0, 4);
        let step = files.sync_step(FileKind::Meta, false);
        assert_eq!(step.part(), Meta);
        assert!(files.step_done(step).is_none());
        assert_eq!(synced(&files, FileKind::Meta), [Data]);
    }
}
