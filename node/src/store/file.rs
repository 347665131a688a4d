//! A replica's two files in a pool's directory: `<replica>.data` and `<replica>.meta`.
//!
//! Both are locked (flock) on the very descriptions that the I/O is done on, before anything is read: while a
//! killed predecessor's I/O is in flight its description, and so its lock, lives on (R1).

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
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
    dir: PathBuf,
    replica: ReplicaId,
    in_memory: bool,
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
    pub fn open(dir: &Path, replica: ReplicaId, create: bool) -> Result<(Self, Found), FileProblem> {
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
        Ok((Self { data, meta, dir: dir.to_owned(), replica, in_memory }, found))
    }

    /// Makes the files as long as the layout says, sparse, and their names durable. `wipe`: the meta file reads as
    /// zeroes afterwards; the data file keeps what it holds. Blocks.
    ///
    /// # Errors
    /// [`FileProblem`], which names the file.
    pub fn size(&self, layout: &Layout, wipe: bool) -> Result<(), FileProblem> {
        let problem = |file, source| FileProblem::Io { path: self.path(file), source };
        if wipe {
            self.meta.set_len(0).map_err(|e| problem(FileKind::Meta, e))?;
        }
        self.meta.set_len(layout.meta_len()).map_err(|e| problem(FileKind::Meta, e))?;
        self.data.set_len(layout.data_len()).map_err(|e| problem(FileKind::Data, e))?;
        for (file, kind) in [(&self.data, FileKind::Data), (&self.meta, FileKind::Meta)] {
            file.sync_all().map_err(|e| problem(kind, e))?;
        }
        sync_dir(&self.dir)
    }

    /// Current lengths.
    ///
    /// # Errors
    /// The system's.
    pub fn lengths(&self) -> io::Result<FileLengths> {
        Ok(FileLengths { data: self.data.metadata()?.len(), meta: self.meta.metadata()?.len() })
    }

    /// The path of one of the files, for messages.
    pub fn path(&self, file: FileKind) -> PathBuf {
        path(&self.dir, self.replica, file)
    }

    pub(crate) fn file(&self, file: FileKind) -> &File {
        match file {
            FileKind::Data => &self.data,
            FileKind::Meta => &self.meta,
        }
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
                let mut done = 0;
                while done < bytes.len() {
                    match rustix::io::pread(self.file(*file), &mut bytes[done..], offset + done as u64) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(n) => done += n,
                        Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(DiskData::Read(bytes))
            }
            DiskIo::Write { file, offset, bytes } => {
                self.file(*file).write_all_at(bytes, *offset)?;
                Ok(DiskData::None)
            }
            DiskIo::Punch { offset, len } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.data, flags, *offset, *len))?;
                Ok(DiskData::None)
            }
            DiskIo::Sync { file } => {
                self.file(*file).sync_data()?;
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
        match rustix::io::preadv2(self.file(file), &mut slices, offset, ReadWriteFlags::NOWAIT) {
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
