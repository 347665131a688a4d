//! What a read may return.
//!
//! Writes to one sector follow one another: the next begins when the last is answered. A write that is not
//! answered, because its connection was lost, is repeated with the same content until it is. So at any moment a
//! sector has at most two possible values: what it held (`floor`) and what is being written (`newest`). A read may
//! return any version from the floor at its begin to the newest at its end; once one has returned a version, no
//! read that begins later may return an older one (R3). Discards and zeroes are writes of zeroes, which look all
//! alike: a read remembers which of them it may have met.
//!
//! A block is written as a whole, whatever fails: where a read finds a write in one sector of a block, it finds no
//! older one in the other sectors of that block that the same write covered. (Not so any more once every cache was
//! lost: a disk may tear a block then.)
//!
//! Where every cache was lost at once, writes that no flush covered may be gone (R9): [`History::caches_lost`] opens
//! each such sector to any version since the last durable one, until a read has seen which it is.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use client::block::SECTOR;
use proto::limits::BLOCK_SIZE;

use super::pattern::{self, Content};

/// Sectors of a block.
const BLOCK_SECTORS: u64 = BLOCK_SIZE / SECTOR;

/// A range of sectors; end exclusive.
pub type Sectors = Range<u64>;

/// Names a write; rises with every one. The lowest bit tells zeroes from data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32);

impl Version {
    /// Never written: reads as zeroes.
    const NEVER: Self = Self(1);
    fn is_zeroes(self) -> bool {
        self.0 & 1 == 1
    }
}

#[derive(Clone, Copy)]
struct Sector {
    floor: Version,
    newest: Version,
    /// No crash takes this one back.
    durable: Version,
    /// The last write of zeroes.
    zeroes: Version,
    /// Caches were lost, and no read has told yet what is there.
    uncertain: bool,
}

/// A write that is under way.
#[derive(Debug)]
pub struct Writing {
    range: Sectors,
    version: Version,
}

impl Writing {
    /// Where.
    pub fn range(&self) -> Sectors {
        self.range.clone()
    }

    /// The data to be written, where it is a write of data.
    pub fn content(&self, seed: u64) -> Vec<u8> {
        let mut data = vec![0; ((self.range.end - self.range.start) * SECTOR) as usize];
        for (sector, out) in self.range.clone().zip(data.chunks_exact_mut(SECTOR as usize)) {
            pattern::fill(seed, sector, self.version.0, out);
        }
        data
    }
}

struct Noted {
    range: Sectors,
    floors: Vec<Version>,
    /// The first write of zeroes that the read may have met, per sector.
    zeroes: Vec<Option<Version>>,
}

/// A read that is under way.
#[derive(Debug)]
pub struct Reading(u64);

/// A flush that is under way.
#[derive(Debug)]
pub struct Flushing {
    /// It covers so many of all answered writes.
    answered: u64,
}

/// A sector that holds what it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Which.
    pub sector: u64,
    /// What was read.
    pub found: Content,
    /// What could have been read.
    pub allowed: String,
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "byte {}: found {}, expected {}", self.sector * SECTOR, self.found, self.allowed)
    }
}

/// How much has not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnderWay {
    /// Reads that are not answered.
    pub reads: usize,
    /// Writes, zeroes and discards that are not answered.
    pub writes: usize,
    /// Those that are answered, and covered by no flush that is.
    pub unflushed: usize,
}

/// Every sector's possible values.
pub struct History {
    seed: u64,
    sectors: Vec<Sector>,
    /// Where each write of data wrote, by half its version.
    written: Vec<(u64, u32)>,
    /// Every cache was lost at least once.
    torn: bool,
    last: u32,
    writing: BTreeMap<u64, u64>,
    reading: BTreeMap<u64, Noted>,
    next_read: u64,
    /// Answered writes that no flush has covered, in the order of their answers.
    unflushed: VecDeque<(Sectors, Version)>,
    /// Answered writes that are durable.
    flushed: u64,
}

impl History {
    /// A device of so many sectors that was never written.
    pub fn new(seed: u64, sectors: u64) -> Self {
        let never = Sector {
            floor: Version::NEVER,
            newest: Version::NEVER,
            durable: Version::NEVER,
            zeroes: Version::NEVER,
            uncertain: false,
        };
        Self {
            seed,
            sectors: vec![never; sectors as usize],
            written: vec![(0, 0)],
            torn: false,
            last: 1,
            writing: BTreeMap::new(),
            reading: BTreeMap::new(),
            next_read: 0,
            unflushed: VecDeque::new(),
            flushed: 0,
        }
    }

    /// Sectors of the device.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// What is under way now.
    pub fn under_way(&self) -> UnderWay {
        UnderWay { reads: self.reading.len(), writes: self.writing.len(), unflushed: self.unflushed.len() }
    }

    /// Whether a write is under way somewhere in the range.
    pub fn is_being_written(&self, range: &Sectors) -> bool {
        overlaps(&self.writing, range)
    }

    /// A write of data begins. What it writes is [`Writing::content`].
    ///
    /// # Panics
    /// When another write is under way in the range.
    pub fn begin_write(&mut self, range: Sectors) -> Writing {
        self.begin(range, 0)
    }

    /// A discard or a write of zeroes begins.
    ///
    /// # Panics
    /// When another write is under way in the range.
    pub fn begin_zeroes(&mut self, range: Sectors) -> Writing {
        self.begin(range, 1)
    }

    fn begin(&mut self, range: Sectors, zeroes: u32) -> Writing {
        assert!(!self.is_being_written(&range), "two writes at once in {range:?}");
        self.last += 2;
        let version = Version(self.last & !1 | zeroes);
        for sector in &mut self.sectors[range.start as usize..range.end as usize] {
            sector.newest = version;
            if version.is_zeroes() {
                sector.zeroes = version;
            }
        }
        self.written.push((range.start, (range.end - range.start) as u32));
        self.writing.insert(range.start, range.end);
        if version.is_zeroes() {
            for noted in self.reading.values_mut() {
                let (from, to) = (range.start.max(noted.range.start), range.end.min(noted.range.end));
                for sector in from..to {
                    noted.zeroes[(sector - noted.range.start) as usize].get_or_insert(version);
                }
            }
        }
        Writing { range, version }
    }

    /// The write was answered; `durable`: it was asked to be (FUA).
    pub fn end_write(&mut self, writing: Writing, durable: bool) {
        let Writing { range, version } = writing;
        self.writing.remove(&range.start);
        for sector in &mut self.sectors[range.start as usize..range.end as usize] {
            assert_eq!(sector.newest, version, "writes of a sector follow one another");
            sector.floor = version;
            sector.uncertain = false;
            if durable {
                sector.durable = version;
            }
        }
        self.unflushed.push_back((range, version));
    }

    /// A flush begins: it covers the writes that were answered before.
    pub fn begin_flush(&self) -> Flushing {
        Flushing { answered: self.flushed + self.unflushed.len() as u64 }
    }

    /// The flush was answered.
    pub fn end_flush(&mut self, flushing: Flushing) {
        while self.flushed < flushing.answered {
            let Some((range, version)) = self.unflushed.pop_front() else { break };
            self.flushed += 1;
            for sector in &mut self.sectors[range.start as usize..range.end as usize] {
                sector.durable = sector.durable.max(version);
            }
        }
    }

    /// Every node lost power, and the gateway went with them: what no flush covered may be gone.
    pub fn caches_lost(&mut self) {
        self.torn = true;
        self.flushed += self.unflushed.len() as u64;
        self.unflushed.clear();
        for sector in self.sectors.iter_mut().filter(|sector| sector.durable != sector.newest) {
            sector.floor = sector.durable;
            sector.uncertain = true;
        }
    }

    /// A read begins.
    pub fn begin_read(&mut self, range: Sectors) -> Reading {
        let sectors = &self.sectors[range.start as usize..range.end as usize];
        let floors = sectors.iter().map(|sector| sector.floor).collect();
        let zeroes = sectors.iter().map(|s| {
            let possible = [s.floor, s.newest, if s.uncertain { s.zeroes } else { s.floor }];
            possible.into_iter().find(|version| version.is_zeroes() && *version >= s.floor)
        });
        let noted = Noted { range, floors, zeroes: zeroes.collect() };
        self.next_read += 1;
        self.reading.insert(self.next_read, noted);
        Reading(self.next_read)
    }

    /// The read was not answered and is not repeated.
    pub fn drop_read(&mut self, reading: Reading) {
        self.reading.remove(&reading.0);
    }

    /// The read was answered. Returns what is wrong, and remembers what later reads may not go back from.
    ///
    /// # Panics
    /// When `data` is shorter than the range.
    pub fn end_read(&mut self, reading: Reading, data: &[u8]) -> Vec<Wrong> {
        let noted = self.reading.remove(&reading.0).expect("a read ends once");
        let mut wrong = Vec::new();
        let mut seen = Vec::with_capacity(noted.floors.len());
        for (at, number) in noted.range.clone().enumerate() {
            let bytes = &data[at * SECTOR as usize..(at + 1) * SECTOR as usize];
            let found = pattern::read(self.seed, number, bytes);
            let sector = &mut self.sectors[number as usize];
            let floor = noted.floors[at];
            let version = match found {
                Content::Zero => noted.zeroes[at],
                Content::Version(version) => {
                    let version = Version(version);
                    let possible = !version.is_zeroes() && version >= floor && version <= sector.newest;
                    possible.then_some(version)
                }
                _ => None,
            };
            seen.push(version.filter(|version| !version.is_zeroes()));
            match version {
                Some(version) => {
                    sector.floor = sector.floor.max(version);
                    if std::mem::take(&mut sector.uncertain) && !being_written(&self.writing, number) {
                        // What was lost does not come back, and this one does not go any more.
                        sector.newest = sector.floor;
                    }
                }
                None => wrong.push(Wrong { sector: number, found, allowed: allowed(floor, sector) }),
            }
        }
        if wrong.is_empty() && !self.torn {
            self.find_torn(&noted.range, &seen, &mut wrong);
        }
        wrong
    }

    /// Finds blocks that hold a write in part. `seen`: the data found, sector by sector; nothing for zeroes, which
    /// look all alike.
    fn find_torn(&self, range: &Sectors, seen: &[Option<Version>], wrong: &mut Vec<Wrong>) {
        let at = |sector: u64| (sector - range.start) as usize;
        for (sector, version) in range.clone().zip(seen) {
            let Some(version) = version else { continue };
            let block = sector / BLOCK_SECTORS * BLOCK_SECTORS;
            let (start, len) = self.written.get(version.0 as usize / 2).copied().unwrap_or_default();
            let from = range.start.max(block).max(start);
            let to = range.end.min(block + BLOCK_SECTORS).min(start + u64::from(len));
            for other in from..to {
                let (newest, found) = match seen[at(other)] {
                    Some(found) => (found, Content::Version(found.0)),
                    None => (self.sectors[other as usize].zeroes, Content::Zero),
                };
                if newest < *version {
                    let allowed = format!("version {} as in sector {sector} of the same block, or newer", version.0);
                    wrong.push(Wrong { sector: other, found, allowed });
                }
            }
        }
    }
}

fn overlaps(writing: &BTreeMap<u64, u64>, range: &Sectors) -> bool {
    writing.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
}

fn being_written(writing: &BTreeMap<u64, u64>, sector: u64) -> bool {
    overlaps(writing, &(sector..sector + 1))
}

fn allowed(floor: Version, sector: &Sector) -> String {
    let newest = sector.newest;
    let name = |version: Version| match (version, version.is_zeroes()) {
        (Version::NEVER, _) => "zeroes (never written)".to_owned(),
        (version, true) => format!("zeroes (version {})", version.0),
        (version, false) => format!("version {}", version.0),
    };
    let flushed = if floor <= sector.durable && floor != Version::NEVER { ", flushed" } else { "" };
    match floor == newest {
        true => format!("{}{flushed}", name(floor)),
        false => format!("{}{flushed} to {}", name(floor), name(newest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(history: &mut History, range: Sectors, data: &[u8]) -> usize {
        let read = history.begin_read(range);
        history.end_read(read, data).len()
    }

    #[test]
    fn an_answered_write_is_the_only_thing_that_may_be_read() {
        let mut history = History::new(1, 64);
        assert_eq!(check(&mut history, 0..2, &[0; 1024]), 0);
        let write = history.begin_write(0..2);
        let data = write.content(1);
        history.end_write(write, false);
        assert_eq!(check(&mut history, 0..2, &data), 0);
        assert_eq!(check(&mut history, 0..2, &[0; 1024]), 2, "a lost write");
        assert_eq!(check(&mut history, 1..3, &data), 2, "misplaced data");
    }

    #[test]
    fn an_unanswered_write_may_be_there_or_not_until_a_read_has_seen_it() {
        let mut history = History::new(1, 64);
        let first = history.begin_write(0..1);
        let old = first.content(1);
        history.end_write(first, false);
        let second = history.begin_write(0..1);
        let new = second.content(1);
        assert_eq!(check(&mut history, 0..1, &old), 0);
        assert_eq!(check(&mut history, 0..1, &new), 0);
        assert_eq!(check(&mut history, 0..1, &old), 1, "seen, and gone again (R3)");
        history.end_write(second, false);
        assert_eq!(check(&mut history, 0..1, &new), 0);
    }

    #[test]
    fn reads_at_the_same_time_may_see_different_versions() {
        let mut history = History::new(1, 64);
        let write = history.begin_write(5..6);
        let new = write.content(1);
        let (a, b) = (history.begin_read(5..6), history.begin_read(5..6));
        assert_eq!(history.end_read(a, &new), []);
        assert_eq!(history.end_read(b, &[0; 512]), [], "it may have been served before the other");
        assert_eq!(check(&mut history, 5..6, &[0; 512]), 1);
    }

    #[test]
    fn zeroes_are_allowed_to_reads_that_met_a_discard() {
        let mut history = History::new(1, 64);
        let write = history.begin_write(0..4);
        let data = write.content(1);
        history.end_write(write, false);
        let read = history.begin_read(0..4);
        let discard = history.begin_zeroes(1..2);
        history.end_write(discard, false);
        let again = history.begin_write(1..2);
        let newer = again.content(1);
        let mut seen = data.clone();
        seen[512..1024].fill(0);
        assert_eq!(history.end_read(read, &seen), [], "the discard happened during the read");
        history.end_write(again, false);
        assert_eq!(check(&mut history, 1..2, &[0; 512]), 1, "it is over");
        assert_eq!(check(&mut history, 1..2, &newer), 0);
    }

    #[test]
    fn a_crash_of_everything_takes_back_what_no_flush_covered_and_nothing_else() {
        let mut history = History::new(1, 64);
        let write = |history: &mut History| {
            let write = history.begin_write(0..1);
            let data = write.content(1);
            history.end_write(write, false);
            data
        };
        let flushed = write(&mut history);
        let flush = history.begin_flush();
        let during = write(&mut history);
        history.end_flush(flush);
        assert_eq!(history.under_way(), UnderWay { reads: 0, writes: 0, unflushed: 1 });
        let last = write(&mut history);
        assert_eq!(check(&mut history, 0..1, &during), 1, "nothing was lost yet");
        history.caches_lost();
        assert_eq!(check(&mut history, 0..1, &[0; 512]), 1, "older than the flush");
        for possible in [&flushed, &during, &last] {
            let read = history.begin_read(0..1);
            let mut copy = History { sectors: history.sectors.clone(), ..History::new(1, 0) };
            let again = copy.begin_read(0..1);
            assert_eq!(copy.end_read(again, possible), []);
            for other in [&flushed, &during, &last].into_iter().filter(|other| *other != possible) {
                assert_eq!(check(&mut copy, 0..1, other), 1, "once it was read it stays");
            }
            history.drop_read(read);
        }
    }

    #[test]
    fn a_block_holds_all_of_a_write_or_nothing() {
        for (unit, torn) in [(4, true), (8, false)] {
            let mut history = History::new(1, 64);
            let first = history.begin_write(0..32);
            let old = first.content(1);
            history.end_write(first, false);
            let second = history.begin_write(0..32);
            let mut mixed = second.content(1);
            mixed[..unit * 512].copy_from_slice(&old[..unit * 512]);
            let found = check(&mut history, 0..32, &mixed);
            assert_eq!(found > 0, torn, "the first {unit} sectors are old");
            history.end_write(second, false);
        }
        // Writes to other sectors of the block come and go as they like.
        let mut history = History::new(1, 64);
        let writes = [history.begin_write(0..4), history.begin_write(4..6)];
        let mut mixed = writes[0].content(1);
        mixed.resize(8 * 512, 0);
        assert_eq!(check(&mut history, 0..8, &mixed), 0);
        mixed[4 * 512..6 * 512].copy_from_slice(&writes[1].content(1));
        assert_eq!(check(&mut history, 0..8, &mixed), 0);
    }

    #[test]
    fn writes_under_way_are_found_by_overlap() {
        let mut history = History::new(1, 64);
        let write = history.begin_write(8..16);
        for (range, overlaps) in [(0..8, false), (0..9, true), (10..12, true), (15..20, true), (16..20, false)] {
            assert_eq!(history.is_being_written(&range), overlaps, "{range:?}");
        }
        history.end_write(write, false);
        assert!(!history.is_being_written(&(0..64)));
    }
}
