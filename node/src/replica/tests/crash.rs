//! Random requests, crashes and reopenings from a printed seed; a model of every block watches.

use std::collections::BTreeSet;

use proto::frame::{CleanEntry, Code, Reply, Request, block_sums};
use proto::id::*;

use super::super::*;
use super::rig::*;

/// What a block may hold: 0 is zeroes, anything else the seed of a pattern.
type Content = u64;

/// One block's contents in the order in which they were sent, from the one that a flush made durable on.
#[derive(Clone, Debug)]
struct History {
    contents: Vec<(u64, Content)>,
    /// The number of the newest answered one.
    answered: u64,
}

impl History {
    fn new(content: Content) -> Self {
        Self { contents: vec![(0, content)], answered: 0 }
    }
    fn newest(&self) -> Content {
        self.contents.iter().find(|(n, _)| *n == self.answered).expect("kept").1
    }
    fn possible(&self) -> BTreeSet<Content> {
        self.contents.iter().map(|(_, c)| *c).collect()
    }
    /// What it may hold if nothing was lost: what was answered last, or was in flight.
    fn kept(&self) -> BTreeSet<Content> {
        self.contents.iter().filter(|(n, _)| *n >= self.answered).map(|(_, c)| *c).collect()
    }
    fn send(&mut self, content: Content) {
        let n = self.contents.last().expect("never empty").0 + 1;
        self.contents.push((n, content));
    }
    /// The one request in flight was answered.
    fn answer(&mut self) {
        self.answered = self.contents.last().expect("never empty").0;
    }
    fn flushed(&mut self, answered: u64) {
        self.contents.retain(|(n, _)| *n >= answered);
    }
}

enum Pending {
    Write { block: u64, count: u64 },
    Flush { no: u64, answered: Vec<u64> },
    Other,
}

fn content_of(block: u64, bytes: &[u8], possible: &BTreeSet<Content>) -> Option<Content> {
    possible.iter().copied().find(|c| match c {
        0 => bytes.iter().all(|b| *b == 0),
        seed => pattern(block, 1, *seed)[..] == *bytes,
    })
}

struct World {
    rig: Rig,
    rng: Rng,
    model: Vec<History>,
    pending: Vec<(u64, Pending)>,
    /// Blocks that a request in flight changes: the gateway's locks keep others away (R4).
    locked: BTreeSet<u64>,
    next_content: u64,
    flush_no: u64,
    completed_flush: u64,
    clean_no: u64,
    epoch: u64,
    attach: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rig = Rig::create(Create::Clean);
        // Every other seed with less memory than the map needs: pages are written back and loaded all the time.
        rig.cache_pages = if seed.is_multiple_of(2) { 64 } else { 2 };
        rig.core.set_cache_limit(rig.cache_pages);
        rig.attach(1, 1);
        let n = BLOCKS as usize;
        Self {
            rig,
            rng: Rng(seed),
            model: vec![History::new(0); n],
            pending: Vec::new(),
            locked: BTreeSet::new(),
            next_content: 1,
            flush_no: 0,
            completed_flush: 0,
            clean_no: 0,
            epoch: 1,
            attach: 1,
        }
    }

    fn range(&mut self) -> Option<(u64, u64)> {
        let count = if self.rng.chance(80) { 1 + self.rng.below(4) } else { 1 + self.rng.below(200) };
        let block = self.rng.below(BLOCKS - count + 1);
        (block..block + count).all(|b| !self.locked.contains(&b)).then_some((block, count))
    }

    fn issue(&mut self) {
        match self.rng.below(100) {
            0..55 => {
                let Some((block, count)) = self.range() else { return };
                let zero = self.rng.chance(20);
                let content = if zero { 0 } else { self.next_content };
                self.next_content += 1;
                (block..block + count).for_each(|b| {
                    self.locked.insert(b);
                    self.model[b as usize].send(content);
                });
                let fua = self.rng.chance(10);
                let request = if zero {
                    Request::WriteZeroes { block: BlockIndex(block), count: count as u32, fua }
                } else {
                    let data = pattern(block, count, content);
                    Request::Write { block: BlockIndex(block), fua, sums: block_sums(&data), data }
                };
                let tag = self.rig.send(request);
                self.pending.push((tag, Pending::Write { block, count }));
            }
            55..65 => {
                self.flush_no += 1;
                let tag = self.rig.send(Request::Flush { flush: FlushNo(self.flush_no) });
                let answered = self.model.iter().map(|h| h.answered).collect();
                self.pending.push((tag, Pending::Flush { no: self.flush_no, answered }));
            }
            65..72 => {
                // The gateway cleans what it knows to be idle and flushed; sometimes it is wrong about idle.
                self.clean_no += 1;
                let entries = (0..7u32)
                    .map(|r| CleanEntry { region: RegionIndex(r), flush: FlushNo(self.completed_flush) })
                    .collect();
                let tag = self.rig.send(Request::Clean { clean: CleanNo(self.clean_no), entries });
                self.pending.push((tag, Pending::Other));
            }
            72..78 => {
                let Some((block, count)) = self.range() else { return };
                let tag = self.rig.send(read(block, count as u32));
                self.pending.push((tag, Pending::Other));
            }
            _ => {
                for _ in 0..1 + self.rng.below(6) {
                    if !self.rig.queue.is_empty() {
                        let at = self.rng.below(self.rig.queue.len() as u64) as usize;
                        self.rig.end_one(at);
                    }
                }
            }
        }
        self.collect();
    }

    fn collect(&mut self) {
        for (tag, pending) in std::mem::take(&mut self.pending) {
            let Some(reply) = self.rig.replies.remove(&tag) else {
                self.pending.push((tag, pending));
                continue;
            };
            match pending {
                Pending::Write { block, count } => {
                    assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
                    for b in block..block + count {
                        self.locked.remove(&b);
                        self.model[b as usize].answer();
                    }
                }
                Pending::Flush { no, answered } => {
                    assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
                    self.completed_flush = self.completed_flush.max(no);
                    // R9: what had been answered when it was sent is what a crash may go back to, at most.
                    self.model.iter_mut().zip(answered).for_each(|(history, n)| history.flushed(n));
                }
                Pending::Other => {
                    if let Reply::Read { data, block, .. } = reply {
                        for (b, bytes) in (block.0..).zip(data.chunks_exact(B)) {
                            let found = content_of(b, bytes, &self.model[b as usize].possible());
                            assert!(found.is_some(), "block {b} reads as something it never held");
                        }
                    }
                }
            }
        }
    }

    /// After a crash: every block is old or new, or flagged in a dirty region; clean regions hold what was answered.
    /// After a kill nothing that was answered is lost: the bytes under a block that is flagged are what they should be.
    fn check(&mut self, rotten: bool, killed: bool) {
        self.pending.clear();
        self.locked.clear();
        if self.rng.chance(70) {
            self.epoch += 1;
        }
        self.attach += 1;
        self.rig.replies.clear();
        let info = self.rig.attach(self.epoch, self.attach);
        assert_eq!(info.held, AttachId::default(), "a fresh process has held nothing");
        (self.flush_no, self.completed_flush) = (0, 0);
        let (dirty_before, ..) = self.rig.regions();
        for block in 0..BLOCKS {
            let region = block / 256;
            let (b, was_dirty) = (block as usize, dirty_before & (1 << region) != 0);
            let content = match self.rig.bytes(block, 1) {
                Ok(bytes) => {
                    let exact = killed && !rotten;
                    let possible = if exact { self.model[b].kept() } else { self.model[b].possible() };
                    let found = content_of(block, &bytes, &possible);
                    let found =
                        found.unwrap_or_else(|| panic!("block {block} holds none of {possible:?} (dirty {was_dirty})"));
                    if !was_dirty {
                        assert_eq!(found, self.model[b].newest(), "R6: block {block} of a clean region went back");
                    }
                    found
                }
                Err(Code::Checksum) => {
                    let (dirty, suspect, _) = self.rig.regions();
                    let flagged = dirty & suspect & (1 << region) != 0;
                    assert!(flagged || rotten, "block {block} is flagged in a clean region");
                    if killed && !rotten {
                        self.rig.done(Request::Restamp { block: BlockIndex(block), blocks: [1, 0, 0, 0] });
                        let bytes = self.rig.bytes(block, 1).expect("restamped");
                        let kept = self.model[b].kept();
                        let found = content_of(block, &bytes, &kept);
                        assert!(found.is_some(), "block {block} holds none of {kept:?} after a kill");
                    }
                    let content = self.next_content;
                    self.next_content += 1;
                    self.rig.done(write(block, 1, content));
                    content
                }
                Err(other) => panic!("block {block}: {other:?}"),
            };
            self.model[b] = History::new(content);
        }
        // What the crash left, and what was written above, may still be in the cache only.
        self.flush_no = 1;
        self.completed_flush = 1;
        self.rig.flush(1);
        self.clean_no = self.clean_no.max(info.set.clean.0);
    }

    fn run(&mut self, rotten: bool) {
        for _ in 0..4 {
            for _ in 0..120 {
                self.issue();
            }
            let killed = self.rng.chance(30);
            if killed {
                self.rig.kill();
            } else {
                let mut rng = self.rng.clone();
                self.rng.next();
                self.rig.data_flip(rotten, &mut rng);
                self.rig.power_cut(&mut rng);
            }
            assert!(matches!(self.rig.opened, Some(Ok(_))), "{:?}", self.rig.opened);
            self.check(rotten, killed);
        }
    }
}

impl Rig {
    /// Flips a bit somewhere, but not in a superblock: a power cut may tear the other copy.
    fn data_flip(&mut self, rotten: bool, rng: &mut Rng) {
        if !rotten {
            return;
        }
        let (file, first) = if rng.chance(50) { (&mut self.meta, 2 * B) } else { (&mut self.data, 0) };
        let at = first + rng.below((file.durable.len() - first) as u64) as usize;
        file.durable[at] ^= 1 << rng.below(8);
    }
}

fn seeds() -> std::ops::Range<u64> {
    let n = std::env::var("MD99_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(25);
    let first = std::env::var("MD99_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    first..first + n
}

/// R5, R6, R9, R10 under power cuts and kills.
#[test]
fn flushed_data_survives_and_nothing_comes_back_wrong() {
    for seed in seeds() {
        println!("seed {seed}");
        World::new(seed).run(false);
    }
}

/// R10 with flipped bits on top: never wrong data, at worst a refusal.
#[test]
fn rot_is_never_returned_as_data() {
    for seed in seeds() {
        println!("seed {seed}");
        World::new(seed ^ 0xb17_f11b).run(true);
    }
}
