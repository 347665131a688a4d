//! Where things are in the meta file, and the format of its pages.
//!
//! ```text
//!  0  magic "m9pg"
//!  4  CRC-32 of bytes 8..4096; of a map page, of bytes 8..512
//!  8  kind      u8   1 dirty bitmap, 2 presence bitmap, 3 block map, 4 allocation journal
//!  9  zero      7 bytes
//! 16  index     u64  of the page among those of its kind
//! 24  zero      8 bytes
//! 32  replica   16 bytes
//! 48  zero      16 bytes
//! 64  bitmap:   4032 bytes, bit 0 of byte 0 first
//!     map:      3 × (256 allocation bits, 256 bits "unverified"), 3 × CRC-32 of a region's sums, zeroes up to 512,
//!               3 × 256 sums u32, then zeroes
//!     journal:  era 16 bytes, page number u64, oldest page that counts u64, number of records u32, whole u32,
//!               then records: first block u64, count u32; then zeroes
//! ```
//!
//! Of a map page a write that power cuts short leaves some sectors of 512 bytes as they were. What it changes are sums of
//! dirty regions, and the first sector, which is whole: another region of the page, clean and flushed, has the same bytes
//! before and after, and is as good as before.

use bytes::{BufMut, BytesMut};
use proto::id::ReplicaId;
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

/// Bytes in a page of the meta file.
pub const PAGE: u64 = 4096;
/// Bits in a bitmap page.
pub const BITMAP_BITS: u64 = (PAGE - HEADER as u64) * 8;
/// Words of 64 bits in a bitmap page.
pub(super) const BITMAP_WORDS: usize = (BITMAP_BITS / 64) as usize;
/// Regions whose blocks one map page describes.
pub const MAP_REGIONS: u64 = 3;
/// Blocks that one map page describes.
pub const MAP_BLOCKS: u64 = MAP_REGIONS * REGION_BLOCKS;
/// The version of all this, in the superblock.
pub const LAYOUT_VERSION: u32 = 3;
/// Pages of the allocation journal that may hold records that count, each in two versions.
pub const JOURNAL_PAGES: u64 = 8;
/// Pages of the meta file that the allocation journal takes.
pub const JOURNAL_SLOTS: u64 = JOURNAL_PAGES * 2;
/// Records in a page of the allocation journal.
pub const JOURNAL_RECORDS: usize = (PAGE as usize - HEADER - JOURNAL_HEADER) / JOURNAL_RECORD_BYTES;

/// Stands for the sum of an unverified block that is not to be taken for right: see [`MapPage::disown`].
pub(super) const DISOWNED: u32 = u32::MAX;

const HEADER: usize = 64;
const JOURNAL_HEADER: usize = 40;
const JOURNAL_RECORD_BYTES: usize = 12;
const MAGIC: [u8; 4] = *b"m9pg";
/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;
const MAP_BITS_BYTES: usize = 2 * REGION_BLOCKS as usize / 8;
const MAP_SUMS_BYTES: usize = REGION_BLOCKS as usize * 4;
/// Where the sums' checksums are in a map page.
const MAP_CRCS: usize = HEADER + MAP_REGIONS as usize * MAP_BITS_BYTES;

const _: () = assert!(MAP_CRCS + MAP_REGIONS as usize * 4 <= SECTOR && MAP_SUMS_BYTES.is_multiple_of(SECTOR));
const _: () = assert!(SECTOR + MAP_REGIONS as usize * MAP_SUMS_BYTES <= PAGE as usize);
const _: () = assert!(PAGE == BLOCK_SIZE);

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageKind {
    Dirty = 1,
    Presence = 2,
    Map = 3,
    Journal = 4,
}

/// Where things are in the meta file of a replica of a given size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub blocks: u64,
    pub regions: u64,
    pub map_pages: u64,
    pub dirty_pages: u64,
    pub presence_pages: u64,
}

impl Layout {
    /// The layout for a replica of `blocks` blocks.
    pub fn new(blocks: u64) -> Self {
        let regions = blocks.div_ceil(REGION_BLOCKS);
        let map_pages = regions.div_ceil(MAP_REGIONS);
        Self {
            blocks,
            regions,
            map_pages,
            dirty_pages: regions.div_ceil(BITMAP_BITS),
            presence_pages: map_pages.div_ceil(BITMAP_BITS),
        }
    }

    /// Offset of a superblock copy, 0 or 1.
    pub fn superblock(&self, copy: u8) -> u64 {
        u64::from(copy) * PAGE
    }
    /// Offset of a page of the allocation journal.
    pub fn journal(&self, slot: u64) -> u64 {
        (2 + slot) * PAGE
    }
    /// Offset of a page of the dirty bitmap.
    pub fn dirty(&self, page: u64) -> u64 {
        self.journal(JOURNAL_SLOTS + page)
    }
    /// Offset of a page of the presence bitmap.
    pub fn presence(&self, page: u64) -> u64 {
        self.dirty(self.dirty_pages + page)
    }
    /// Offset of a page of the block map.
    pub fn map(&self, page: u64) -> u64 {
        self.presence(self.presence_pages + page)
    }
    /// Length of the meta file.
    pub fn meta_len(&self) -> u64 {
        self.map(self.map_pages)
    }
    /// Length of the data file.
    pub fn data_len(&self) -> u64 {
        self.blocks * BLOCK_SIZE
    }
}

/// What is known of the blocks of one map page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapPage {
    /// CRC-32 of each block; meaningful where it is allocated and verified, or says [`DISOWNED`] where it is not
    /// verified.
    pub sums: [u32; MAP_BLOCKS as usize],
    /// The block has data; otherwise it reads as zeroes.
    pub allocated: [u64; MAP_BLOCKS as usize / 64],
    /// The block's sum and allocation were lost: it can't be read until it is equalised (R10).
    pub unverified: [u64; MAP_BLOCKS as usize / 64],
}

impl MapPage {
    /// Nothing allocated, all known.
    pub fn empty() -> Box<Self> {
        Box::new(Self { sums: [0; _], allocated: [0; _], unverified: [0; _] })
    }
    /// Nothing known.
    pub fn unverified() -> Box<Self> {
        Box::new(Self { sums: [0; _], allocated: [u64::MAX; _], unverified: [u64::MAX; _] })
    }
    /// Whether block `i` of the page has data, or isn't known.
    pub fn is_allocated(&self, i: usize) -> bool {
        bit(&self.allocated, i)
    }
    /// Whether block `i` of the page can't be trusted.
    pub fn is_unverified(&self, i: usize) -> bool {
        bit(&self.unverified, i)
    }
    /// Block `i` holds data with this sum.
    pub fn set(&mut self, i: usize, sum: u32) {
        self.sums[i] = sum;
        self.allocated[i / 64] |= 1 << (i % 64);
        self.unverified[i / 64] &= !(1 << (i % 64));
    }
    /// Block `i` reads as zeroes.
    pub fn clear(&mut self, i: usize) {
        self.sums[i] = 0;
        self.allocated[i / 64] &= !(1 << (i % 64));
        self.unverified[i / 64] &= !(1 << (i % 64));
    }
    /// Block `i` can't be trusted.
    pub fn distrust(&mut self, i: usize) {
        self.allocated[i / 64] |= 1 << (i % 64);
        self.unverified[i / 64] |= 1 << (i % 64);
    }
    /// Block `i` can't be trusted, and what it holds must not be taken for right later: it is older than what others
    /// held.
    pub fn disown(&mut self, i: usize) {
        self.distrust(i);
        self.sums[i] = DISOWNED;
    }
    /// Whether block `i` was disowned, and has not been written since. A journal page may still name it from before, so
    /// that none tells anything of such a block, and what is written there would go with this process: it is flushed
    /// before it is answered.
    pub fn is_disowned(&self, i: usize) -> bool {
        self.is_unverified(i) && self.sums[i] == DISOWNED
    }
    /// Whether any block of region `r` (0, 1 or 2) of the page is allocated or unverified.
    pub fn region_in_use(&self, r: usize) -> bool {
        let words = r * 4..r * 4 + 4;
        self.allocated[words.clone()].iter().chain(&self.unverified[words]).any(|w| *w != 0)
    }
}

fn bit(words: &[u64], i: usize) -> bool {
    words[i / 64] & (1 << (i % 64)) != 0
}

/// Appends a page with a bitmap's words.
pub fn encode_bitmap(
    out: &mut BytesMut,
    kind: PageKind,
    index: u64,
    replica: ReplicaId,
    words: impl Iterator<Item = u64>,
) {
    encode(out, kind, index, replica, |mut out| words.for_each(|w| out.put_u64_le(w)));
}

/// Appends a map page.
pub fn encode_map(out: &mut BytesMut, index: u64, replica: ReplicaId, map: &MapPage) {
    let start = out.len();
    header(out, PageKind::Map, index, replica);
    out.put_bytes(0, PAGE as usize - HEADER);
    let page = &mut out[start..];
    for (r, sums) in page[SECTOR..].chunks_exact_mut(MAP_SUMS_BYTES).take(MAP_REGIONS as usize).enumerate() {
        for (to, from) in sums.as_chunks_mut::<4>().0.iter_mut().zip(&map.sums[r * REGION_BLOCKS as usize..]) {
            *to = from.to_le_bytes();
        }
    }
    for r in 0..MAP_REGIONS as usize {
        let (allocated, unverified) = page[bits_of(r)].split_at_mut(MAP_BITS_BYTES / 2);
        for (bits, words) in [(allocated, &map.allocated), (unverified, &map.unverified)] {
            for (to, from) in bits.as_chunks_mut::<8>().0.iter_mut().zip(&words[r * 4..]) {
                *to = from.to_le_bytes();
            }
        }
        let crc = crc32fast::hash(&page[sums_of(r)]);
        page[crc_of(r)].copy_from_slice(&crc.to_le_bytes());
    }
    sign(page, SECTOR);
}

/// Makes a region of a map page bad, as it was when the page was read.
pub(super) fn keep_bad(page: &mut [u8], region: usize) {
    let crc = !crc32fast::hash(&page[sums_of(region)]);
    page[crc_of(region)].copy_from_slice(&crc.to_le_bytes());
    sign(page, SECTOR);
}

fn bits_of(region: usize) -> std::ops::Range<usize> {
    let at = HEADER + region * MAP_BITS_BYTES;
    at..at + MAP_BITS_BYTES
}

fn crc_of(region: usize) -> std::ops::Range<usize> {
    let at = MAP_CRCS + region * 4;
    at..at + 4
}

fn sums_of(region: usize) -> std::ops::Range<usize> {
    let at = SECTOR + region * MAP_SUMS_BYTES;
    at..at + MAP_SUMS_BYTES
}

/// Appends a page, whose payload is zeroes before it is filled.
fn encode(out: &mut BytesMut, kind: PageKind, index: u64, replica: ReplicaId, payload: impl FnOnce(&mut [u8])) {
    let start = out.len();
    header(out, kind, index, replica);
    out.put_bytes(0, PAGE as usize - HEADER);
    payload(&mut out[start + HEADER..]);
    sign(&mut out[start..], PAGE as usize);
}

fn header(out: &mut BytesMut, kind: PageKind, index: u64, replica: ReplicaId) {
    let start = out.len();
    out.reserve(PAGE as usize);
    out.put_slice(&MAGIC);
    out.put_u32_le(0);
    out.put_u8(kind as u8);
    out.put_bytes(0, 7);
    out.put_u64_le(index);
    out.put_u64_le(0);
    out.put_slice(&replica.to_bytes());
    out.put_bytes(0, 16);
    assert_eq!(out.len() - start, HEADER);
}

/// The checksum of what is before `end`.
fn sign(page: &mut [u8], end: usize) {
    let crc = crc32fast::hash(&page[8..end]);
    page[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Whether a page is the right one, and intact as far as its checksum goes.
fn is_intact(page: &[u8], kind: PageKind, index: u64, replica: ReplicaId) -> bool {
    let end = if kind == PageKind::Map { SECTOR } else { PAGE as usize };
    page.len() == PAGE as usize
        && page[0..4] == MAGIC
        && page[4..8] == crc32fast::hash(&page[8..end]).to_le_bytes()
        && page[8] == kind as u8
        && page[16..24] == index.to_le_bytes()
        && page[32..48] == replica.to_bytes()
}

/// The payload of a page, if it is the right one and intact.
fn payload(page: &[u8], kind: PageKind, index: u64, replica: ReplicaId) -> Option<&[u8]> {
    is_intact(page, kind, index, replica).then(|| &page[HEADER..])
}

/// The words of a bitmap page; `None`: it is bad.
pub fn decode_bitmap(
    page: &[u8],
    kind: PageKind,
    index: u64,
    replica: ReplicaId,
) -> Option<impl Iterator<Item = u64> + '_> {
    let payload = payload(page, kind, index, replica)?;
    Some(payload.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)))
}

/// A map page, and which of its regions are bad: their blocks are unverified.
pub fn decode_map(page: &[u8], index: u64, replica: ReplicaId) -> (Box<MapPage>, [bool; MAP_REGIONS as usize]) {
    let mut map = MapPage::unverified();
    let mut bad = [true; _];
    if !is_intact(page, PageKind::Map, index, replica) {
        return (map, bad);
    }
    for (r, bad) in bad.iter_mut().enumerate() {
        let sums = &page[sums_of(r)];
        *bad = page[crc_of(r)] != crc32fast::hash(sums).to_le_bytes();
        if *bad {
            continue;
        }
        for (to, from) in map.sums[r * REGION_BLOCKS as usize..].iter_mut().zip(sums.as_chunks::<4>().0) {
            *to = u32::from_le_bytes(*from);
        }
        let words = page[bits_of(r)].as_chunks::<8>().0;
        for i in 0..4 {
            map.allocated[r * 4 + i] = u64::from_le_bytes(words[i]);
            map.unverified[r * 4 + i] = u64::from_le_bytes(words[4 + i]);
        }
    }
    if mutant::is(Mutant::TornMapIsAllBad) && bad.contains(&true) {
        return (MapPage::unverified(), [true; _]);
    }
    (map, bad)
}

/// A page of the allocation journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalPage {
    /// Pages are numbered on and on.
    pub number: u64,
    /// Older pages than this one no longer count.
    pub oldest: u64,
    /// Whatever its writer had answered was still there.
    pub whole: bool,
    /// First block and count.
    pub records: Vec<(u64, u32)>,
}

/// Appends a journal page.
pub fn encode_journal(out: &mut BytesMut, slot: u64, replica: ReplicaId, era: [u8; 16], page: &JournalPage) {
    encode(out, PageKind::Journal, slot, replica, |mut out| {
        out.put_slice(&era);
        out.put_u64_le(page.number);
        out.put_u64_le(page.oldest);
        out.put_u32_le(page.records.len() as u32);
        out.put_u32_le(page.whole.into());
        for (first, count) in &page.records {
            out.put_u64_le(*first);
            out.put_u32_le(*count);
        }
    });
}

/// A journal page of this era; `None`: it is bad, or of another one.
pub fn decode_journal(page: &[u8], slot: u64, replica: ReplicaId, era: [u8; 16]) -> Option<JournalPage> {
    let payload = payload(page, PageKind::Journal, slot, replica)?;
    let (header, records) = payload.split_at(JOURNAL_HEADER);
    if header[..16] != era {
        return None;
    }
    let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
    let count = u32::from_le_bytes(header[32..36].try_into().expect("four bytes")) as usize;
    let records = records.chunks_exact(JOURNAL_RECORD_BYTES).take(count).map(|record| {
        let (first, count) = record.split_at(8);
        let first = u64::from_le_bytes(first.try_into().expect("eight bytes"));
        (first, u32::from_le_bytes(count.try_into().expect("four bytes")))
    });
    let records = records.collect();
    let whole = header[36] == 1;
    Some(JournalPage { number: u64_at(16), oldest: u64_at(24), whole, records })
}
