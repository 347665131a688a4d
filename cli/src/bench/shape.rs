//! What is asked of a target: named shapes of I/O, and the requests that make one up.

use client::block::SECTOR;
use client::initiator::lane::Io;
use serde::Serialize;

use crate::load::Rng;
use crate::size;

/// A shape of I/O.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Its name.
    pub name: String,
    /// Bytes of a request, a multiple of 512.
    pub block_size: u64,
    /// How many of a hundred requests read.
    pub read_percent: u8,
    /// One after the other, or anywhere.
    pub sequential: bool,
    /// Requests under way in each session.
    pub queue_depth: usize,
    /// Writes with force unit access.
    pub fua: bool,
    /// A flush of everything follows each write, and belongs to it.
    pub flush: bool,
    /// Every request begins so many bytes after a multiple of its size.
    pub offset: u64,
}

impl Shape {
    const fn base(name: String, block_size: u64, read_percent: u8, queue_depth: usize) -> Self {
        Self { name, block_size, read_percent, sequential: false, queue_depth, fua: false, flush: false, offset: 0 }
    }

    /// One that the command line describes.
    pub fn custom(block_size: u64, read_percent: u8, sequential: bool, queue_depth: usize, fua: bool) -> Self {
        let order = if sequential { "seq" } else { "rand" };
        let kind = match read_percent {
            0 => format!("{order}write"),
            100 => format!("{order}read"),
            percent => format!("{order}rw{percent}"),
        };
        let fua_word = if fua && read_percent < 100 { "-fua" } else { "" };
        let name = format!("{kind}-{}{fua_word}-q{queue_depth}", size::show(block_size).replace(' ', ""));
        Self { sequential, fua, ..Self::base(name, block_size, read_percent, queue_depth) }
    }

    /// The one that writes a region once from one end to the other.
    pub fn fill(block_size: u64) -> Self {
        Self { sequential: true, ..Self::base("fill".into(), block_size, 0, 8) }
    }

    /// Whether it changes anything.
    pub fn writes(&self) -> bool {
        self.read_percent < 100
    }

    /// Requests that find room in a region of so many bytes.
    pub fn slots(&self, region: u64) -> u64 {
        region.saturating_sub(self.offset) / self.block_size
    }

    /// In a few words.
    pub fn words(&self) -> String {
        let size = size::show(self.block_size);
        let order = if self.sequential { "sequential" } else { "random" };
        let kind = match self.read_percent {
            0 => "writes".into(),
            100 => "reads".into(),
            percent => format!("{percent} % reads, {} % writes", 100 - percent),
        };
        let mut words = format!("{size} {order} {kind}, depth {}", self.queue_depth);
        if self.fua && self.writes() {
            words.push_str(", FUA");
        }
        if self.flush {
            words.push_str(", each with a flush");
        }
        if self.offset > 0 {
            words.push_str(&format!(", {} off its alignment", size::show(self.offset)));
        }
        words
    }
}

/// The shapes that everything is compared by.
const USUAL: usize = 8;

/// All named shapes, the usual ones first.
pub fn named() -> Vec<Shape> {
    let base = |name: &str, block_size, read_percent, depth| Shape::base(name.into(), block_size, read_percent, depth);
    let sequential = |shape: Shape| Shape { sequential: true, ..shape };
    let all = vec![
        base("randread1", 4 << 10, 100, 1),
        base("randread32", 4 << 10, 100, 32),
        base("randwrite1", 4 << 10, 0, 1),
        base("randwrite32", 4 << 10, 0, 32),
        Shape { fua: true, ..base("randwritefua1", 4 << 10, 0, 1) },
        base("mixed", 64 << 10, 70, 16),
        sequential(base("seqread", 1 << 20, 100, 8)),
        sequential(base("seqwrite", 1 << 20, 0, 8)),
        base("write512", 512, 0, 1),
        Shape { offset: SECTOR, ..base("unaligned", 4 << 10, 0, 1) },
        sequential(base("seqread4k", 4 << 10, 100, 1)),
        sequential(base("seqwrite4k", 4 << 10, 0, 1)),
        Shape { flush: true, ..base("database", 8 << 10, 0, 1) },
    ];
    debug_assert!(all.len() > USUAL);
    all
}

/// The usual ones: 4k at depth 1 and 32, 64k mixed, 1M in sequence.
pub fn usual() -> Vec<Shape> {
    named().into_iter().take(USUAL).collect()
}

/// What a worker asks next, again and again.
#[derive(Clone, Debug)]
pub struct Requests {
    rng: Rng,
    slots: u64,
    next: u64,
    shape: Shape,
}

impl Requests {
    /// For one of `workers` workers on the first `region` bytes; in sequence each begins in a part of its own.
    pub fn new(shape: &Shape, region: u64, worker: u64, workers: u64, seed: u64) -> Self {
        let slots = shape.slots(region);
        let next = (u128::from(slots) * u128::from(worker) / u128::from(workers)) as u64;
        Self { rng: Rng::new(seed ^ (worker + 1) << 40), slots, next, shape: shape.clone() }
    }

    /// The next request, and what makes its contents differ from all others'.
    pub fn draw(&mut self) -> (Io, u64) {
        let slot = match self.shape.sequential {
            true => {
                self.next += 1;
                (self.next - 1) % self.slots
            }
            false => self.rng.below(self.slots),
        };
        let lba = (slot * self.shape.block_size + self.shape.offset) / SECTOR;
        let io = match self.rng.below(100) < u64::from(self.shape.read_percent) {
            true => Io::Read { lba },
            false => Io::Write { lba, fua: self.shape.fua },
        };
        (io, self.rng.draw())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_in_their_region_and_keep_their_share_of_reads() {
        let region = 1 << 20;
        for shape in named() {
            let mut requests = Requests::new(&shape, region, 0, 1, 7);
            let (mut reads, n) = (0u64, 10_000);
            for _ in 0..n {
                let (io, _) = requests.draw();
                let lba = match io {
                    Io::Read { lba } => {
                        reads += 1;
                        lba
                    }
                    Io::Write { lba, fua } => {
                        assert_eq!(fua, shape.fua, "{}", shape.name);
                        lba
                    }
                    Io::Flush => panic!("{}: a flush by itself", shape.name),
                };
                assert!(lba * SECTOR + shape.block_size <= region, "{}: {lba}", shape.name);
                assert_eq!(lba * SECTOR % shape.block_size, shape.offset, "{}", shape.name);
            }
            let percent = reads * 100 / n;
            assert!(percent.abs_diff(u64::from(shape.read_percent)) <= 2, "{}: {percent} % reads", shape.name);
        }
    }

    #[test]
    fn a_sequence_covers_its_region_once_in_order() {
        let mut requests = Requests::new(&Shape::fill(1 << 20), 4 << 20, 1, 2, 1);
        let at: Vec<u64> = (0..4)
            .map(|_| match requests.draw().0 {
                Io::Write { lba, .. } => (lba * SECTOR) >> 20,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(at, [2, 3, 0, 1], "the second of two workers begins in the middle");
    }
}
