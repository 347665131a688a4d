//! A disk with a page cache above it: what was written and not synced may be lost, in part, page by page and
//! sector by sector.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use node::replica::layout::Layout;
use node::replica::{DiskData, DiskError, DiskIo, FileKind, OpId};

use super::rng::Rng;

/// Bytes in a page: what a file keeps together.
pub const PAGE: u64 = 4096;
/// Bytes that a disk writes in one piece.
pub const SECTOR: usize = 512;

/// A page's bytes; `None`: zeroes, as in a hole.
pub type Content = Option<Bytes>;

#[derive(Clone, Debug, Default)]
struct Page {
    durable: Content,
    /// What a failed sync has left in the page cache: it is read, and no later sync writes it.
    stranded: Option<Content>,
    /// Written since, oldest first; the last one is what a read sees.
    volatile: Vec<(u64, Content)>,
    /// It is a hole because what was there has been freed.
    freed: bool,
}

impl Page {
    fn cached(&self) -> &Content {
        let clean = self.stranded.as_ref().unwrap_or(&self.durable);
        self.volatile.last().map_or(clean, |(_, content)| content)
    }

    /// This is on the medium now; `written` are the versions that may have been there before it.
    fn settle(&mut self, content: Content, written: &[(u64, Content)]) {
        let punch = written.iter().rposition(|(_, content)| content.is_none());
        let held = self.durable.is_some() || punch.is_some_and(|at| written[..at].iter().any(|(_, c)| c.is_some()));
        self.freed = content.is_none() && (self.freed || held);
        self.durable = content;
    }
}

/// One file.
#[derive(Clone, Debug)]
pub struct SimFile {
    pages: Vec<Page>,
    /// Pages with something volatile.
    unsynced: BTreeSet<u64>,
    /// Pages in which a failed write has left parts of what was there before.
    patched: BTreeSet<u64>,
    /// Counts the writes.
    seq: u64,
}

impl SimFile {
    pub fn new(bytes: u64) -> Self {
        Self {
            pages: vec![Page::default(); (bytes / PAGE) as usize],
            unsynced: BTreeSet::new(),
            patched: BTreeSet::new(),
            seq: 0,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// What a read sees.
    pub fn cached(&self, page: u64) -> &Content {
        self.pages[page as usize].cached()
    }

    /// What is on the medium.
    pub fn durable(&self, page: u64) -> &Content {
        &self.pages[page as usize].durable
    }

    /// Whether there was something that was freed.
    pub fn is_freed(&self, page: u64) -> bool {
        self.pages[page as usize].freed
    }

    /// What was there is known to be gone.
    pub fn forget_freed(&mut self, page: u64) {
        self.pages[page as usize].freed = false;
    }

    pub fn is_synced(&self, page: u64) -> bool {
        self.pages[page as usize].volatile.is_empty()
    }

    fn put(&mut self, page: u64, content: Content) {
        self.patched.remove(&page);
        self.pages[page as usize].volatile.push((self.seq, content));
        self.unsynced.insert(page);
    }

    fn write(&mut self, offset: u64, bytes: &Bytes) {
        self.seq += 1;
        for i in 0..bytes.len() as u64 / PAGE {
            self.put(offset / PAGE + i, Some(bytes.slice((i * PAGE) as usize..((i + 1) * PAGE) as usize)));
        }
    }

    fn punch(&mut self, offset: u64, len: u64) {
        self.seq += 1;
        for page in offset / PAGE..(offset + len) / PAGE {
            self.put(page, None);
        }
    }

    fn read(&self, offset: u64, len: u32) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        for (i, piece) in out.chunks_mut(PAGE as usize).enumerate() {
            if let Some(bytes) = self.cached(offset / PAGE + i as u64) {
                piece.copy_from_slice(&bytes[..piece.len()]);
            }
        }
        out
    }

    /// Everything written up to number `mark` reaches the medium; but for what `betray` names, which the disk says it
    /// has, and either drops or puts elsewhere. Returns the pages that were spoiled by that.
    fn sync(&mut self, mark: u64, end: u64, betray: &mut dyn FnMut(u64, &Content) -> Betrayal) -> Vec<u64> {
        let pages = &mut self.pages;
        let mut strayed: Vec<(u64, Content)> = Vec::new();
        let mut spoiled = Vec::new();
        self.unsynced.retain(|at| {
            if *at >= end {
                return true;
            }
            let page = &mut pages[*at as usize];
            let n = page.volatile.iter().take_while(|(seq, _)| *seq <= mark).count();
            let written: Vec<(u64, Content)> = page.volatile.drain(..n).collect();
            if let Some((_, content)) = written.last().cloned() {
                page.stranded = None;
                match betray(*at, &content) {
                    Betrayal::None => page.settle(content, &written),
                    Betrayal::Lost => spoiled.push(*at),
                    Betrayal::Misdirected(to) => {
                        spoiled.push(*at);
                        strayed.push((to, content));
                    }
                }
            }
            !page.volatile.is_empty()
        });
        for (to, content) in strayed {
            pages[to as usize].durable = content;
            spoiled.push(to);
        }
        spoiled
    }

    /// A sync fails: nobody writes these pages any more, and they look as if they were on the medium.
    fn strand(&mut self, mark: u64) {
        let pages = &mut self.pages;
        self.unsynced.retain(|at| {
            let page = &mut pages[*at as usize];
            let n = page.volatile.iter().take_while(|(seq, _)| *seq <= mark).count();
            if let Some((_, content)) = page.volatile.drain(..n).next_back() {
                page.stranded = Some(content);
            }
            !page.volatile.is_empty()
        });
    }

    /// What looks clean is forgotten, so that what is read next is what the medium holds.
    fn drop_clean(&mut self) {
        self.pages.iter_mut().for_each(|page| page.stranded = None);
    }

    /// The cache is lost: of each page any version that was written since the last sync may be on the medium, or
    /// sectors of several.
    fn lose(&mut self, rng: &mut Rng) {
        self.drop_clean();
        let mode = rng.below(4);
        for at in std::mem::take(&mut self.unsynced) {
            let page = &mut self.pages[at as usize];
            let volatile = std::mem::take(&mut page.volatile);
            let version = |rng: &mut Rng| match rng.below(volatile.len() as u64 + 1) {
                0 => page.durable.clone(),
                i => volatile[i as usize - 1].1.clone(),
            };
            let left = match mode {
                0 => page.durable.clone(),
                1 => volatile.last().expect("unsynced").1.clone(),
                2 => version(rng),
                _ => torn(&version(rng), &version(rng), rng),
            };
            page.settle(left, &volatile);
        }
    }

    /// Flips a bit at rest, of the first so many bytes of a page; false where there is nothing but zeroes.
    pub fn flip(&mut self, page: u64, bytes: usize, rng: &mut Rng) -> bool {
        let page = &mut self.pages[page as usize];
        let at = rng.below(bytes as u64) as usize;
        let bit = 1 << rng.below(8);
        let flipped = |content: &Content| {
            content.as_ref().map(|bytes| {
                let mut bytes = bytes.to_vec();
                bytes[at] ^= bit;
                Bytes::from(bytes)
            })
        };
        if !page.volatile.is_empty() || page.durable.is_none() {
            return false;
        }
        page.durable = flipped(&page.durable);
        true
    }
}

/// What a disk makes of a page that it says it has written.
enum Betrayal {
    None,
    Lost,
    /// It lies at another page now.
    Misdirected(u64),
}

/// A page with some sectors of one version and some of another.
fn torn(a: &Content, b: &Content, rng: &mut Rng) -> Content {
    if a == b {
        return a.clone();
    }
    let zeroes = Bytes::from_static(&[0; PAGE as usize]);
    let (a, b) = (a.as_ref().unwrap_or(&zeroes), b.as_ref().unwrap_or(&zeroes));
    let mut out = Vec::with_capacity(PAGE as usize);
    for (x, y) in a.chunks(SECTOR).zip(b.chunks(SECTOR)) {
        out.extend_from_slice(if rng.chance(500) { x } else { y });
    }
    Some(out.into())
}

/// How a disk behaves now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskFaults {
    /// Every operation takes so many times as long.
    pub slow: u64,
    /// In a thousand: reads and writes of data that fail.
    pub read_errors: u64,
    pub write_errors: u64,
    /// And punches, while writes do not.
    pub punch_errors: u64,
    /// Writes of data fail for want of space.
    pub full: bool,
    /// The next sync fails.
    pub fail_sync: bool,
    /// In a thousand: pages of data that the disk says it has and drops, or puts elsewhere.
    pub lost_writes: u64,
    pub misdirected: u64,
}

#[derive(Clone, Debug)]
struct InFlight {
    io: DiskIo,
    /// A write that took effect before its end, or a read's bytes, taken early.
    early: Option<DiskData>,
    /// What a sync covers.
    mark: u64,
    failing: Option<DiskError>,
}

/// Pages of a file that have just changed.
pub type Changed = Option<(FileKind, std::ops::Range<u64>)>;

/// The two files of a replica, and what its process gave the disk to do.
#[derive(Clone, Debug)]
pub struct Disk {
    pub data: SimFile,
    pub meta: SimFile,
    /// The first page of the block map.
    map_at: u64,
    in_flight: BTreeMap<OpId, InFlight>,
    /// Pages of data that the last sync spoiled.
    spoiled: Vec<u64>,
    betrays: (u64, u64),
    /// Some page was spoiled once: those that are written well since are told.
    pub rotten: bool,
    healed: Vec<u64>,
}

impl DiskFaults {
    /// All is well.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl Disk {
    pub fn new(layout: &Layout) -> Self {
        Self::of_bytes(layout.data_len(), layout.meta_len(), layout.map(0))
    }

    /// As of a replica that was deleted.
    pub fn gone() -> Self {
        Self::of_bytes(0, 0, 0)
    }

    fn of_bytes(data: u64, meta: u64, map_at: u64) -> Self {
        Self {
            data: SimFile::new(data),
            meta: SimFile::new(meta),
            map_at: map_at / PAGE,
            in_flight: BTreeMap::new(),
            spoiled: Vec::new(),
            betrays: (0, 0),
            rotten: false,
            healed: Vec::new(),
        }
    }

    pub fn file(&self, file: FileKind) -> &SimFile {
        match file {
            FileKind::Data => &self.data,
            FileKind::Meta => &self.meta,
        }
    }

    fn file_mut(&mut self, file: FileKind) -> &mut SimFile {
        match file {
            FileKind::Data => &mut self.data,
            FileKind::Meta => &mut self.meta,
        }
    }

    /// What is on the medium, for whoever copies it.
    pub fn durable_copy(&self) -> Self {
        let durable = |file: &SimFile| {
            let mut copy = SimFile::new(file.bytes());
            for (page, old) in copy.pages.iter_mut().zip(&file.pages) {
                page.durable = old.durable.clone();
            }
            copy
        };
        Self { data: durable(&self.data), meta: durable(&self.meta), ..Self::of_bytes(0, 0, self.map_at * PAGE) }
    }

    /// Whether writes of data are with the disk. Punches may be: a replica frees what holds nothing on its own.
    pub fn writes_in_flight(&self) -> bool {
        self.in_flight.values().any(|f| matches!(f.io, DiskIo::Write { file: FileKind::Data, .. }))
    }

    /// Takes an operation; says how long it will take and what it has changed already.
    pub fn begin(&mut self, op: OpId, io: DiskIo, host: &mut DiskFaults, rng: &mut Rng) -> (u64, Changed) {
        let faults = *host;
        self.betrays = (faults.lost_writes, faults.misdirected);
        let is_data =
            !matches!(&io, DiskIo::Write { file: FileKind::Meta, .. } | DiskIo::Read { file: FileKind::Meta, .. });
        let (mut micros, failing) = match &io {
            DiskIo::Sync { .. } => {
                let failing = std::mem::take(&mut host.fail_sync).then_some(DiskError::Io);
                (rng.tail(300, 20_000), failing)
            }
            DiskIo::Read { .. } => {
                (rng.tail(20, 3_000), (is_data && rng.chance(faults.read_errors)).then_some(DiskError::Io))
            }
            DiskIo::Write { .. } if is_data && faults.full => (rng.tail(20, 3_000), Some(DiskError::NoSpace)),
            DiskIo::Write { .. } => {
                (rng.tail(20, 3_000), (is_data && rng.chance(faults.write_errors)).then_some(DiskError::Io))
            }
            DiskIo::Punch { .. } => {
                // Both a punch and the zeroes in its stead failing is withheld: see `world`.
                let writable = faults.write_errors == 0 && !faults.full;
                (rng.tail(20, 3_000), (writable && rng.chance(faults.punch_errors)).then_some(DiskError::Io))
            }
        };
        micros *= faults.slow.max(1);
        let mark = if let DiskIo::Sync { file, .. } = &io { self.file(*file).seq } else { 0 };
        let mut flight = InFlight { io, early: None, mark, failing };
        let mut changed = None;
        if !matches!(flight.io, DiskIo::Sync { .. }) && flight.failing.is_none() && rng.chance(300) {
            let (data, what) = self.perform(&flight);
            (flight.early, changed) = (Some(data), what);
        }
        self.in_flight.insert(op, flight);
        (micros, changed)
    }

    /// The metadata file is made anew, empty, and durable as such.
    pub fn wipe_meta(&mut self) {
        self.meta = SimFile::new(self.meta.bytes());
    }

    /// Whether an operation in flight is a sync.
    pub fn is_sync(&self, op: OpId) -> bool {
        matches!(self.in_flight[&op].io, DiskIo::Sync { .. })
    }

    /// Pages of data that syncs have put right, and those that they have spoiled, since this was asked last.
    pub fn take_synced(&mut self) -> (Vec<u64>, Vec<u64>) {
        (std::mem::take(&mut self.healed), std::mem::take(&mut self.spoiled))
    }

    /// The pages that an operation in flight reads or writes.
    pub fn touches(&self, op: OpId) -> Changed {
        match &self.in_flight[&op].io {
            DiskIo::Write { file, offset, bytes } => Some((*file, offset / PAGE..(offset + bytes.len() as u64) / PAGE)),
            DiskIo::Read { file, offset, len } => Some((*file, offset / PAGE..(offset + u64::from(*len)) / PAGE)),
            _ => None,
        }
    }

    /// An operation has ended.
    pub fn end(&mut self, op: OpId, rng: &mut Rng) -> (Result<DiskData, DiskError>, Changed) {
        let flight = self.in_flight.remove(&op).expect("a disk operation ends once");
        if let Some(error) = flight.failing {
            if let DiskIo::Sync { file, .. } = flight.io {
                self.file_mut(file).strand(flight.mark);
                return (Err(error), None);
            }
            // What a failed write leaves is anybody's guess.
            let changed = if rng.chance(500) { self.perform_in_part(&flight.io, rng) } else { None };
            return (Err(error), changed);
        }
        if let Some(data) = flight.early {
            return (Ok(data), None);
        }
        if let DiskIo::Sync { file, map } = flight.io {
            self.sync(file, map, flight.mark, Some(rng));
            return (Ok(DiskData::None), None);
        }
        let (data, changed) = self.perform(&flight);
        (Ok(data), changed)
    }

    fn perform(&mut self, flight: &InFlight) -> (DiskData, Changed) {
        match &flight.io {
            DiskIo::Read { file, offset, len } => (DiskData::Read(self.file(*file).read(*offset, *len)), None),
            DiskIo::Write { file, offset, bytes } => {
                self.file_mut(*file).write(*offset, bytes);
                let pages = offset / PAGE..(offset + bytes.len() as u64) / PAGE;
                (DiskData::None, Some((*file, pages)))
            }
            DiskIo::Punch { offset, len } => {
                self.data.punch(*offset, *len);
                (DiskData::None, Some((FileKind::Data, offset / PAGE..(offset + len) / PAGE)))
            }
            DiskIo::Sync { file, map } => {
                self.sync(*file, *map, flight.mark, None);
                (DiskData::None, None)
            }
        }
    }

    fn sync(&mut self, file: FileKind, map: bool, mark: u64, rng: Option<&mut Rng>) {
        let end = if file == FileKind::Meta && !map { self.map_at } else { u64::MAX };
        let (lost, misdirected) = self.betrays;
        let betrays = lost + misdirected > 0;
        let (Some(rng), FileKind::Data, true) = (rng, file, betrays || self.rotten) else {
            self.file_mut(file).sync(mark, end, &mut |_, _| Betrayal::None);
            return;
        };
        let pages = self.data.pages.len() as u64;
        let patched = self.data.patched.clone();
        let healed = &mut self.healed;
        let spoiled = self.data.sync(mark, end, &mut |at, content| {
            // Space that is freed is not written.
            let n = if betrays && content.is_some() { rng.below(1000) } else { 1000 };
            if n < lost {
                return Betrayal::Lost;
            }
            if n < lost + misdirected {
                return Betrayal::Misdirected((at + 1 + rng.below(pages.max(2) - 1)) % pages);
            }
            if !patched.contains(&at) {
                healed.push(at);
            }
            Betrayal::None
        });
        self.spoiled.extend(spoiled);
    }

    /// Some of a write's pages, for one that failed or was cut off.
    fn perform_in_part(&mut self, io: &DiskIo, rng: &mut Rng) -> Changed {
        let DiskIo::Write { file, offset, bytes } = io else { return None };
        let first = offset / PAGE;
        let target = self.file_mut(*file);
        target.seq += 1;
        for i in 0..bytes.len() as u64 / PAGE {
            let new = Some(bytes.slice((i * PAGE) as usize..((i + 1) * PAGE) as usize));
            match rng.below(3) {
                0 => {}
                1 => target.put(first + i, new),
                _ => {
                    let old = target.cached(first + i).clone();
                    target.put(first + i, torn(&old, &new, rng));
                    target.patched.insert(first + i);
                }
            }
        }
        Some((*file, first..first + bytes.len() as u64 / PAGE))
    }

    /// The process is gone: what it gave to the disk ends, or not, before another process has the locks (R1).
    pub fn process_gone(&mut self, rng: &mut Rng) -> Vec<Changed> {
        let in_flight = std::mem::take(&mut self.in_flight);
        let mut changed = Vec::new();
        for flight in in_flight.into_values() {
            if flight.early.is_some() || flight.failing.is_some() || rng.chance(400) {
                continue;
            }
            changed.push(match flight.io {
                DiskIo::Write { .. } if rng.chance(300) => self.perform_in_part(&flight.io, rng),
                _ => self.perform(&flight).1,
            });
        }
        changed
    }

    /// The page cache is asked to forget what needs no writing.
    pub fn drop_clean(&mut self) {
        self.data.drop_clean();
        self.meta.drop_clean();
    }

    /// Power is gone, or the cache was dropped after a failed sync.
    pub fn lose_cache(&mut self, rng: &mut Rng) {
        self.data.lose(rng);
        self.meta.lose(rng);
    }
}
