//! Making and opening a replica.
//!
//! ```text
//! create: bitmaps, journal ─► sync both files ─► superblocks ─► sync ─► opened
//! open:   sync meta ─► superblocks ─► bitmaps ─► map pages under a bad presence page ─► bad superblock copy rewritten
//!         ─► journal ─► dirty regions without a map page punched ─► opened
//! journal that names blocks of dirty regions:
//!         sync data ─► map pages in which they are unallocated: unverified ─► sync meta
//! ```
//!
//! The sync comes first because a killed predecessor may have written dirty bits, or an epoch, that are only in the
//! page cache: read from there they would pass for durable (R1, R5).
//!
//! A replica without a good superblock was never made, or has lost it; so the superblock comes last (§6).

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use proto::frame::SetView;
use proto::id::{AttachId, AttachNo, BlockIndex, Epoch};
use proto::limits::{REGION_BLOCKS, REGION_SIZE};

use super::bitset::BitSet;
use super::dirty_log::runs;
use super::interface::{
    Config, Create, DiskData, DiskError, DiskIo, FileKind, FileLengths, OpenError, OpenReport, Output,
};
use super::layout::{self, BITMAP_BITS, BITMAP_WORDS, JOURNAL_SLOTS, MAP_BLOCKS, MAP_REGIONS, PAGE, PageKind};
use super::state::{Io, Phase, ReplicaCore};
use super::superblock::{BadCopy, Superblock};

/// Pages that are read or written in one disk operation.
const PIECE_PAGES: u64 = 256;

/// Where opening stands.
#[derive(Debug)]
pub(super) struct Opening {
    stage: Stage,
    /// Disk operations in flight.
    ios: u32,
    copies: [Result<Superblock, BadCopy>; 2],
    /// Runs of pages that are being read, first page of the stage and count, by the operation's piece.
    pieces: Vec<(u64, u64)>,
    /// Blocks that the journal names, by map page; ascending, and from the end when the pages are looked at.
    named: Vec<(u64, Vec<(u64, u64)>)>,
    /// It is being made, not opened.
    new: bool,
    report: OpenReport,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    NewBitmaps,
    NewBitmapsSync,
    NewSuperblocks,
    FirstSync,
    Superblocks,
    Bitmaps,
    LostPresence,
    Repair,
    LastSync,
    Journal,
    JournalData,
    JournalMap,
    JournalMeta,
    /// Nothing else is awaited.
    Sweep,
}

impl Opening {
    fn new(stage: Stage) -> Self {
        let report = OpenReport {
            epoch: Epoch(0),
            repaired_superblock: None,
            bad_bitmap_pages: 0,
            dirty: 0,
            rebuilt: false,
            journal_blocks: 0,
        };
        let copies = [Err(BadCopy::Zero), Err(BadCopy::Zero)];
        Self { stage, ios: 0, copies, pieces: Vec::new(), named: Vec::new(), new: stage == Stage::NewBitmaps, report }
    }
}

impl ReplicaCore {
    /// Makes a replica in files that are as long as [`Layout`] says and read as zeroes, but for the data file of a
    /// replica that is [`Create::Rebuilt`]. Ends with [`Output::Opened`] or [`Output::OpenFailed`].
    pub fn create(config: Config, create: Create, out: &mut Vec<Output>) -> Self {
        let superblock = Superblock {
            generation: 1,
            ids: config.ids,
            blocks: config.blocks,
            epoch: Epoch(0),
            kept_epoch: Epoch(0),
            set: SetView::default(),
            rebuilt: matches!(create, Create::Rebuilt | Create::Lost),
        };
        let mut core = Self::new(config, superblock, Opening::new(Stage::NewBitmaps));
        let layout = core.layout;
        if create != Create::Clean {
            core.regions.dirty = BitSet::full(layout.regions);
        }
        if matches!(create, Create::Rebuilt | Create::Lost) {
            core.regions.suspect = BitSet::full(layout.regions);
        }
        if create == Create::Rebuilt {
            // The map is gone: every page of it is a lost one.
            core.regions.present = BitSet::full(layout.map_pages);
        }
        // Written now, they find room whenever they are needed.
        core.opening().ios += 1;
        let bytes = Bytes::from(vec![0; (JOURNAL_SLOTS * PAGE) as usize]);
        let write = DiskIo::Write { file: FileKind::Meta, offset: layout.journal(0), bytes };
        core.disk(Io::Open(0), write, out);
        let replica = config.ids.replica;
        let mut at = 0;
        let bitmap_pages = layout.dirty_pages + layout.presence_pages;
        while at < bitmap_pages {
            let n = PIECE_PAGES.min(bitmap_pages - at);
            let mut bytes = BytesMut::with_capacity((n * PAGE) as usize);
            for page in at..at + n {
                let (kind, index, set) = match page.checked_sub(layout.dirty_pages) {
                    None => (PageKind::Dirty, page, &core.regions.dirty),
                    Some(index) => (PageKind::Presence, index, &core.regions.present),
                };
                let words = set.words(index as usize * BITMAP_WORDS, BITMAP_WORDS);
                layout::encode_bitmap(&mut bytes, kind, index, replica, words);
            }
            core.opening().ios += 1;
            let write = DiskIo::Write { file: FileKind::Meta, offset: layout.dirty(at), bytes: bytes.freeze() };
            core.disk(Io::Open(0), write, out);
            at += n;
        }
        core
    }

    /// Opens a replica whose files are as long as `lengths` says. Ends with [`Output::Opened`] or
    /// [`Output::OpenFailed`].
    pub fn open(config: Config, lengths: FileLengths, out: &mut Vec<Output>) -> Self {
        let superblock = Superblock {
            generation: 0,
            ids: config.ids,
            blocks: config.blocks,
            epoch: Epoch(0),
            kept_epoch: Epoch(0),
            set: SetView::default(),
            rebuilt: false,
        };
        let mut core = Self::new(config, superblock, Opening::new(Stage::FirstSync));
        let layout = core.layout;
        // Whose it is comes before how long it is; for that, the superblocks must be there.
        if lengths.meta < 2 * PAGE {
            core.phase = Phase::Unopened;
            out.push(Output::OpenFailed(OpenError::Truncated {
                file: FileKind::Meta,
                found: lengths.meta,
                expected: layout.meta_len(),
            }));
            return core;
        }
        core.opening().pieces = vec![(lengths.data, lengths.meta)];
        core.opening().ios = 1;
        core.disk(Io::Open(0), DiskIo::Sync { file: FileKind::Meta, map: true }, out);
        core
    }

    fn opening(&mut self) -> &mut Opening {
        match &mut self.phase {
            Phase::Opening(opening) => opening,
            other => panic!("opening while {other:?}"),
        }
    }

    fn open_failed(&mut self, error: OpenError, out: &mut Vec<Output>) {
        self.phase = Phase::Unopened;
        out.push(Output::OpenFailed(error));
    }

    pub(super) fn opening_done(&mut self, piece: u32, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        self.opening().ios -= 1;
        match self.opening().stage {
            Stage::Superblocks => {
                let copy = match result {
                    Ok(DiskData::Read(bytes)) => Superblock::decode(&bytes),
                    _ => Err(BadCopy::Damaged),
                };
                self.opening().copies[piece as usize] = copy;
            }
            Stage::Bitmaps => self.take_bitmaps(piece, result.ok()),
            Stage::LostPresence => self.look_for_map_pages(result.ok()),
            Stage::Journal => self.take_journal(result.ok()),
            Stage::JournalMap => {
                if let Err(error) = self.mark_journaled(piece, result, out) {
                    return self.open_failed(OpenError::Disk { file: FileKind::Meta, error }, out);
                }
            }
            Stage::Sweep if result.is_err() => self.keep_unswept(piece),
            // What could not be made durable is not believed, and never synced again in the hope that it can (R2): the
            // next opening is of another era.
            stage => {
                if let Err(error) = result {
                    let file = if stage == Stage::JournalData { FileKind::Data } else { FileKind::Meta };
                    return self.open_failed(OpenError::Disk { file, error }, out);
                }
            }
        }
        if self.opening().ios == 0 {
            self.next_stage(out);
        }
    }

    fn next_stage(&mut self, out: &mut Vec<Output>) {
        match self.opening().stage {
            Stage::NewBitmaps => {
                self.opening().stage = Stage::NewBitmapsSync;
                self.opening().ios = 2;
                for file in [FileKind::Data, FileKind::Meta] {
                    self.disk(Io::Open(0), DiskIo::Sync { file, map: true }, out);
                }
            }
            Stage::NewBitmapsSync => {
                self.opening().stage = Stage::NewSuperblocks;
                self.opening().ios = 2;
                (0..2).for_each(|copy| self.write_superblock(copy, out));
            }
            Stage::NewSuperblocks | Stage::Repair => {
                self.opening().stage = Stage::LastSync;
                self.opening().ios = 1;
                self.disk(Io::Open(0), DiskIo::Sync { file: FileKind::Meta, map: true }, out);
            }
            Stage::FirstSync => {
                self.opening().stage = Stage::Superblocks;
                self.opening().ios = 2;
                for copy in 0..2u8 {
                    let offset = self.layout.superblock(copy);
                    let read = DiskIo::Read { file: FileKind::Meta, offset, len: PAGE as u32 };
                    self.disk(Io::Open(copy.into()), read, out);
                }
            }
            Stage::Superblocks => match self.choose_superblock() {
                Ok(()) => self.read_bitmaps(out),
                Err(error) => self.open_failed(error, out),
            },
            Stage::Bitmaps => {
                let lost = std::mem::take(&mut self.opening().pieces);
                if lost.is_empty() {
                    return self.repair_superblock(out);
                }
                self.opening().stage = Stage::LostPresence;
                self.opening().pieces = lost;
                self.next_stage(out);
            }
            Stage::LostPresence => {
                // One at a time, from the last: there may be a hundred MiB of them.
                let Some((first, count)) = self.opening().pieces.last().copied() else {
                    return self.repair_superblock(out);
                };
                self.opening().ios = 1;
                let offset = self.layout.map(first);
                let read = DiskIo::Read { file: FileKind::Meta, offset, len: (count * PAGE) as u32 };
                self.disk(Io::Open(0), read, out);
            }
            Stage::LastSync => self.read_journal(out),
            Stage::Journal => {
                if self.opening().named.is_empty() {
                    return self.sweep_unmapped(out);
                }
                self.opening().stage = Stage::JournalData;
                self.opening().ios = 1;
                self.disk(Io::Open(0), DiskIo::Sync { file: FileKind::Data, map: false }, out);
            }
            Stage::JournalData => {
                self.opening().stage = Stage::JournalMap;
                self.read_journaled(out);
            }
            Stage::JournalMap => self.read_journaled(out),
            Stage::JournalMeta => self.sweep_unmapped(out),
            Stage::Sweep => self.opened(out),
        }
    }

    fn write_superblock(&mut self, copy: u8, out: &mut Vec<Output>) {
        let offset = self.layout.superblock(copy);
        let bytes = self.superblock.encode().into();
        self.disk(Io::Open(0), DiskIo::Write { file: FileKind::Meta, offset, bytes }, out);
    }

    /// Takes the newer good copy, if the files are what they should be.
    fn choose_superblock(&mut self) -> Result<(), OpenError> {
        let expected = self.config;
        let layout = self.layout;
        let (data_len, meta_len) = self.opening().pieces[0];
        let copies = self.opening().copies.clone();
        let best = copies.iter().flatten().max_by_key(|c| c.generation);
        let Some(best) = best else {
            if let Some(BadCopy::Layout(found)) =
                copies.iter().filter_map(|c| c.as_ref().err()).max_by_key(|bad| matches!(bad, BadCopy::Layout(_)))
            {
                return Err(OpenError::Layout { found: *found, expected: layout::LAYOUT_VERSION });
            }
            let empty = copies.iter().all(|c| matches!(c, Err(BadCopy::Zero)));
            return Err(OpenError::NoSuperblock { empty });
        };
        if best.ids != expected.ids {
            return Err(OpenError::Foreign { found: best.ids.into(), expected: expected.ids.into() });
        }
        if best.blocks != expected.blocks {
            return Err(OpenError::Size { found: best.blocks, expected: expected.blocks });
        }
        for (file, found, expected) in
            [(FileKind::Data, data_len, layout.data_len()), (FileKind::Meta, meta_len, layout.meta_len())]
        {
            if found < expected {
                return Err(OpenError::Truncated { file, found, expected });
            }
        }
        self.superblock = best.clone();
        let other = copies.iter().position(|c| c.as_ref() != Ok(best));
        self.opening().report.repaired_superblock = other.map(|i| i as u8);
        Ok(())
    }

    fn read_bitmaps(&mut self, out: &mut Vec<Output>) {
        let layout = self.layout;
        let pages = layout.dirty_pages + layout.presence_pages;
        let pieces: Vec<(u64, u64)> =
            (0..pages).step_by(PIECE_PAGES as usize).map(|at| (at, PIECE_PAGES.min(pages - at))).collect();
        let opening = self.opening();
        opening.stage = Stage::Bitmaps;
        opening.ios = pieces.len() as u32;
        opening.pieces = Vec::new();
        for (at, n) in pieces {
            let read = DiskIo::Read { file: FileKind::Meta, offset: layout.dirty(at), len: (n * PAGE) as u32 };
            self.disk(Io::Open(at as u32), read, out);
        }
    }

    /// Takes bitmap pages from page `first` on; what can't be read is bad.
    fn take_bitmaps(&mut self, first: u32, data: Option<DiskData>) {
        let layout = self.layout;
        let replica = self.config.ids.replica;
        let first = u64::from(first);
        let count = PIECE_PAGES.min(layout.dirty_pages + layout.presence_pages - first);
        let bytes = match data {
            Some(DiskData::Read(bytes)) => bytes,
            _ => vec![0; (count * PAGE) as usize],
        };
        for (page, bytes) in (first..first + count).zip(bytes.chunks_exact(PAGE as usize)) {
            let (kind, index) = match page.checked_sub(layout.dirty_pages) {
                None => (PageKind::Dirty, page),
                Some(index) => (PageKind::Presence, index),
            };
            let at = index as usize * BITMAP_WORDS;
            let set = if kind == PageKind::Dirty { &mut self.regions.dirty } else { &mut self.regions.present };
            if let Some(words) = layout::decode_bitmap(bytes, kind, index, replica) {
                set.replace_words(at, words);
                if kind == PageKind::Dirty {
                    let words = self.regions.dirty.words(at, BITMAP_WORDS).collect::<Vec<_>>();
                    self.regions.durable.replace_words(at, words.into_iter());
                }
                continue;
            }
            // R5: a bad dirty page counts as all dirty. A bad presence page: look at each of its map pages.
            set.set_range(index * BITMAP_BITS, (index + 1) * BITMAP_BITS);
            self.opening().report.bad_bitmap_pages += 1;
            if kind == PageKind::Dirty {
                self.passes.rewrite_dirty(index);
            } else {
                self.passes.presence_pages.insert(index);
                let (first, end) = (index * BITMAP_BITS, ((index + 1) * BITMAP_BITS).min(layout.map_pages));
                let pieces = (first..end).step_by(PIECE_PAGES as usize).map(|at| (at, PIECE_PAGES.min(end - at)));
                self.opening().pieces.extend(pieces);
            }
        }
    }

    /// Looks at map pages whose presence is not known. A good one is there; any other may have been lost, so its
    /// regions are dirty and suspect, and its blocks unverified when it is loaded (R10).
    fn look_for_map_pages(&mut self, data: Option<DiskData>) {
        let (first, count) = self.opening().pieces.pop().expect("one was asked for");
        let bytes = match data {
            Some(DiskData::Read(bytes)) => bytes,
            _ => vec![0; (count * PAGE) as usize],
        };
        for (page, bytes) in (first..first + count).zip(bytes.chunks_exact(PAGE as usize)) {
            let (_, bad) = layout::decode_map(bytes, page, self.config.ids.replica);
            let bad = (page * MAP_REGIONS..self.layout.regions).zip(bad).filter(|(_, bad)| *bad);
            self.distrust(bad.map(|(region, _)| region));
        }
    }

    fn repair_superblock(&mut self, out: &mut Vec<Output>) {
        match self.opening().report.repaired_superblock {
            Some(copy) => {
                self.opening().stage = Stage::Repair;
                self.opening().ios = 1;
                self.write_superblock(copy, out);
            }
            None => self.read_journal(out),
        }
    }

    fn read_journal(&mut self, out: &mut Vec<Output>) {
        self.opening().stage = Stage::Journal;
        if self.opening().new || !self.journals() {
            return self.sweep_unmapped(out);
        }
        self.opening().ios = 1;
        let len = (JOURNAL_SLOTS * PAGE) as u32;
        let read = DiskIo::Read { file: FileKind::Meta, offset: self.layout.journal(0), len };
        self.disk(Io::Open(0), read, out);
    }

    /// Takes the blocks that the journal names. Those of a clean region have been flushed since (R6).
    fn take_journal(&mut self, data: Option<DiskData>) {
        let Some(DiskData::Read(bytes)) = data else { return };
        let pages = self.decode_journal(&bytes);
        let mut named: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
        for (first, count) in self.journal.recover(&pages) {
            if !self.in_range(BlockIndex(first), count.into()) {
                continue;
            }
            let end = first + u64::from(count);
            let (mut at, mut dirty) = (first, Vec::new());
            while at < end {
                let next = end.min((at / REGION_BLOCKS + 1) * REGION_BLOCKS);
                if self.regions.dirty.get(at / REGION_BLOCKS) {
                    dirty.push((at, next));
                }
                at = next;
            }
            for (from, to) in dirty {
                named.entry(from / MAP_BLOCKS).or_default().push((from, to));
            }
        }
        for page in named.keys() {
            // Its first version was durable before anything changed under it; its presence bit may not have been.
            if !self.regions.present.get(*page) {
                self.regions.present.set(*page);
                self.passes.presence_pages.insert(page / BITMAP_BITS);
            }
        }
        self.opening().named = named.into_iter().collect();
    }

    /// Reads the next map pages under which the journal names blocks.
    fn read_journaled(&mut self, out: &mut Vec<Output>) {
        let opening = self.opening();
        let rest = opening.named.len().saturating_sub(PIECE_PAGES as usize);
        let pages: Vec<u64> = opening.named[rest..].iter().map(|(page, _)| *page).collect();
        opening.ios = pages.len() as u32;
        if pages.is_empty() {
            opening.stage = Stage::JournalMeta;
            opening.ios = 1;
            return self.disk(Io::Open(0), DiskIo::Sync { file: FileKind::Meta, map: true }, out);
        }
        for (i, page) in (rest..).zip(pages) {
            let read = DiskIo::Read { file: FileKind::Meta, offset: self.layout.map(page), len: PAGE as u32 };
            self.disk(Io::Open(i as u32), read, out);
        }
    }

    /// A map page under which the journal names blocks has been read, or written. Blocks that it has for unallocated
    /// become unverified; their data is durable. What is bad of the page is found again when it is used.
    fn mark_journaled(
        &mut self,
        index: u32,
        result: Result<DiskData, DiskError>,
        out: &mut Vec<Output>,
    ) -> Result<(), DiskError> {
        let replica = self.config.ids.replica;
        match result {
            Ok(DiskData::Read(bytes)) => {
                let (page, named) = self.opening().named[index as usize].clone();
                let (mut map, bad) = layout::decode_map(&bytes, page, replica);
                let mut marked = 0;
                for at in named.into_iter().flat_map(|(from, to)| from..to).map(|b| (b % MAP_BLOCKS) as usize) {
                    if !map.is_allocated(at) && !map.is_unverified(at) {
                        map.distrust(at);
                        marked += 1;
                    }
                }
                if marked > 0 {
                    let mut bytes = BytesMut::with_capacity(PAGE as usize);
                    layout::encode_map(&mut bytes, page, replica, &map);
                    (0..bad.len()).filter(|r| bad[*r]).for_each(|r| layout::keep_bad(&mut bytes, r));
                    self.opening().report.journal_blocks += marked;
                    self.opening().ios += 1;
                    let offset = self.layout.map(page);
                    let write = DiskIo::Write { file: FileKind::Meta, offset, bytes: bytes.freeze() };
                    self.disk(Io::Open(index), write, out);
                }
            }
            Ok(DiskData::None) => {}
            Err(error) => return Err(error),
        }
        if self.opening().ios == 0 {
            let rest = self.opening().named.len().saturating_sub(PIECE_PAGES as usize);
            self.opening().named.truncate(rest);
        }
        Ok(())
    }

    /// Frees what dirty regions without a map page may hold: writes whose map page was lost before it was promised.
    /// They read as zeroes, and must never read as anything else (see `map`).
    fn sweep_unmapped(&mut self, out: &mut Vec<Output>) {
        self.opening().stage = Stage::Sweep;
        let new = self.opening().new;
        let in_doubt: Vec<u64> = (0..self.layout.regions).filter(|r| !new && self.regions.dirty.get(*r)).collect();
        let (mapped, unmapped): (Vec<u64>, Vec<u64>) =
            in_doubt.into_iter().partition(|r| self.regions.present.get(r / MAP_REGIONS));
        for region in mapped {
            self.map.unswept.set(region / MAP_REGIONS);
        }
        let pieces = runs(unmapped.into_iter());
        if pieces.is_empty() {
            return self.opened(out);
        }
        let opening = self.opening();
        opening.ios = pieces.len() as u32;
        opening.pieces = pieces.clone();
        for (i, (first, count)) in pieces.into_iter().enumerate() {
            let offset = first * REGION_SIZE;
            let len = ((first + count) * REGION_SIZE).min(self.layout.data_len()) - offset;
            self.disk(Io::Open(i as u32), DiskIo::Punch { offset, len }, out);
        }
    }

    /// What can't be freed can't be trusted: its map pages count as written, so one that isn't there was lost, and
    /// one that is, is swept when it is loaded.
    fn keep_unswept(&mut self, piece: u32) {
        let (first, count) = self.opening().pieces[piece as usize];
        for page in first / MAP_REGIONS..=(first + count - 1) / MAP_REGIONS {
            self.regions.present.set(page);
            self.passes.presence_pages.insert(page / BITMAP_BITS);
            self.map.unswept.set(page);
        }
    }

    fn opened(&mut self, out: &mut Vec<Output>) {
        let mut report = self.opening().report.clone();
        if self.opening().new {
            self.regions.durable = self.regions.dirty.clone();
        } else {
            self.regions.suspect = self.regions.dirty.clone();
        }
        self.find_whole();
        report.epoch = self.superblock.epoch;
        report.dirty = self.regions.dirty.ones();
        report.rebuilt = self.superblock.rebuilt;
        self.attach.newest = AttachId { epoch: self.superblock.epoch, attach: AttachNo(0) };
        self.phase = Phase::Open;
        out.push(Output::Opened(report));
    }
}
