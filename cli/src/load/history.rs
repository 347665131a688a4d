//! What a read may return.
//!
//! Writes to one sector follow one another: the next begins when the last is answered. A write that is not
//! answered, because its connection was lost, is repeated with the same content until it is. So at any moment a
//! sector has at most two possible values: what it held (`floor`) and what is being written (`newest`). A read may
//! return any version from the floor at its begin to the newest at its end; once one has returned a version, no
//! read that begins later may return an older one (R3). Discards and zeroes are writes of zeroes, which look all
//! alike: a read remembers which of them it may have met.

use std::collections::BTreeMap;
use std::ops::Range;

use client::block::SECTOR;

use super::pattern::{self, Content};

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

/// Every sector's possible values.
pub struct History {
    seed: u64,
    sectors: Vec<Sector>,
    last: u32,
    writing: BTreeMap<u64, u64>,
    reading: BTreeMap<u64, Noted>,
    next_read: u64,
}

impl History {
    /// A device of so many sectors that was never written.
    pub fn new(seed: u64, sectors: u64) -> Self {
        let never = Sector { floor: Version::NEVER, newest: Version::NEVER };
        Self {
            seed,
            sectors: vec![never; sectors as usize],
            last: 1,
            writing: BTreeMap::new(),
            reading: BTreeMap::new(),
            next_read: 0,
        }
    }

    /// Sectors of the device.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Whether a write is under way somewhere in the range.
    pub fn is_being_written(&self, range: &Sectors) -> bool {
        self.writing.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
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
        }
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

    /// The write was answered.
    pub fn end_write(&mut self, writing: Writing) {
        self.writing.remove(&writing.range.start);
        for sector in &mut self.sectors[writing.range.start as usize..writing.range.end as usize] {
            assert_eq!(sector.newest, writing.version, "writes of a sector follow one another");
            sector.floor = writing.version;
        }
    }

    /// A read begins.
    pub fn begin_read(&mut self, range: Sectors) -> Reading {
        let sectors = &self.sectors[range.start as usize..range.end as usize];
        let floors = sectors.iter().map(|sector| sector.floor).collect();
        let zeroes = sectors.iter().map(|s| [s.floor, s.newest].into_iter().find(|version| version.is_zeroes()));
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
            match version {
                Some(version) => sector.floor = sector.floor.max(version),
                None => wrong.push(Wrong { sector: number, found, allowed: allowed(floor, sector.newest) }),
            }
        }
        wrong
    }
}

fn allowed(floor: Version, newest: Version) -> String {
    let name = |version: Version| match (version, version.is_zeroes()) {
        (Version::NEVER, _) => "zeroes (never written)".to_owned(),
        (version, true) => format!("zeroes (version {})", version.0),
        (version, false) => format!("version {}", version.0),
    };
    match floor == newest {
        true => name(floor),
        false => format!("{} or {}", name(floor), name(newest)),
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
        history.end_write(write);
        assert_eq!(check(&mut history, 0..2, &data), 0);
        assert_eq!(check(&mut history, 0..2, &[0; 1024]), 2, "a lost write");
        assert_eq!(check(&mut history, 1..3, &data), 2, "misplaced data");
    }

    #[test]
    fn an_unanswered_write_may_be_there_or_not_until_a_read_has_seen_it() {
        let mut history = History::new(1, 64);
        let first = history.begin_write(0..1);
        let old = first.content(1);
        history.end_write(first);
        let second = history.begin_write(0..1);
        let new = second.content(1);
        assert_eq!(check(&mut history, 0..1, &old), 0);
        assert_eq!(check(&mut history, 0..1, &new), 0);
        assert_eq!(check(&mut history, 0..1, &old), 1, "seen, and gone again (R3)");
        history.end_write(second);
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
        history.end_write(write);
        let read = history.begin_read(0..4);
        let discard = history.begin_zeroes(1..2);
        history.end_write(discard);
        let again = history.begin_write(1..2);
        let newer = again.content(1);
        let mut seen = data.clone();
        seen[512..1024].fill(0);
        assert_eq!(history.end_read(read, &seen), [], "the discard happened during the read");
        history.end_write(again);
        assert_eq!(check(&mut history, 1..2, &[0; 512]), 1, "it is over");
        assert_eq!(check(&mut history, 1..2, &newer), 0);
    }

    #[test]
    fn writes_under_way_are_found_by_overlap() {
        let mut history = History::new(1, 64);
        let write = history.begin_write(8..16);
        for (range, overlaps) in [(0..8, false), (0..9, true), (10..12, true), (15..20, true), (16..20, false)] {
            assert_eq!(history.is_being_written(&range), overlaps, "{range:?}");
        }
        history.end_write(write);
        assert!(!history.is_being_written(&(0..64)));
    }
}
