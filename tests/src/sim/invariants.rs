//! Rules of DESIGN §5 that hold at every step, checked from outside: on the simulated disks and on what was said.

use std::ops::Range;

use node::replica::FileKind;
use node::replica::layout::{Layout, MAP_BLOCKS, PageKind, decode_bitmap, decode_map};
use proto::frame::Kind;
use proto::id::AttachId;
use proto::limits::{MAX_ATTACH_IN_FLIGHT, REGION_BLOCKS};

use super::disk::{Content, Disk, PAGE};
use super::world::{World, replica_id};

/// Every so many events everything is compared with everything.
const SWEEP_EVERY: u64 = 2_000;

#[derive(Clone, Debug)]
struct Watched {
    /// The dirty bitmap's page as it is on the medium, and what it says.
    page: Content,
    dirty: Vec<bool>,
    /// When its cache was last lost, as a moment of the run.
    lost_at: u64,
}

/// What the checks remember.
#[derive(Debug)]
pub struct Invariants {
    nodes: Vec<Watched>,
    layout_dirty_page: u64,
    /// Counts the moments.
    moment: u64,
    cleaned: Vec<u64>,
}

impl Invariants {
    pub fn new(nodes: usize, regions: u64) -> Self {
        let watched = Watched { page: None, dirty: vec![true; regions as usize], lost_at: 0 };
        let layout_dirty_page = Layout::new(regions * REGION_BLOCKS).dirty(0) / PAGE;
        Self { nodes: vec![watched; nodes], layout_dirty_page, moment: 1, cleaned: Vec::new() }
    }

    pub fn now(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    pub fn cache_lost(&mut self, node: usize, disk: &Disk) {
        let now = self.now();
        self.nodes[node].lost_at = now;
        self.disk_moved(node, disk);
    }

    /// Looks at what the node's dirty bitmap says on the medium.
    pub fn disk_moved(&mut self, node: usize, disk: &Disk) {
        let page = disk.meta.durable(self.layout_dirty_page);
        let watched = &mut self.nodes[node];
        let same = match (page, &watched.page) {
            (Some(a), Some(b)) => a.as_ptr() == b.as_ptr(),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        watched.page = page.clone();
        let words: Option<Vec<u64>> = page
            .as_ref()
            .and_then(|bytes| decode_bitmap(bytes, PageKind::Dirty, 0, replica_id(node)).map(Iterator::collect));
        for region in 0..watched.dirty.len() {
            // A page that fails its checksum counts as all dirty (R5).
            let dirty = words.as_ref().is_none_or(|w| w[region / 64] >> (region % 64) & 1 == 1);
            if watched.dirty[region] && !dirty {
                self.cleaned.push(region as u64);
            }
            watched.dirty[region] = dirty;
        }
    }

    /// R5: before anything changes a region on the disk, its dirty bit is durable.
    pub fn changed(&mut self, node: usize, disk: &Disk, file: FileKind, pages: Range<u64>) -> Result<(), String> {
        if file != FileKind::Data {
            return Ok(());
        }
        self.disk_moved(node, disk);
        for region in pages.start / REGION_BLOCKS..pages.end.div_ceil(REGION_BLOCKS) {
            if !self.nodes[node].dirty[region as usize] {
                return Err(format!(
                    "R5: pages {pages:?} of node {node} changed while region {region} was clean on its disk"
                ));
            }
        }
        Ok(())
    }
}

/// Why nothing can be said of a block on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unreadable {
    /// Its map page is bad.
    Page,
    /// It is unverified.
    Block,
}

impl World {
    /// R1: when an attach is answered, nothing of an older one is with the disk.
    pub(super) fn check_drained(&mut self, node: usize, attach: AttachId) {
        if self.nodes[node].disk.writes_in_flight() {
            self.fail(format!("R1: node {node} answers attach {attach} with older writes in flight on its disk"));
        }
    }

    /// R2: an acknowledged write is on every replica of the committed set, but for one that has lost its cache since.
    pub(super) fn check_acknowledged(&mut self, number: u32, block: u64, data: &[u8], asked_at: u64) {
        for member in self.control.members.clone() {
            let node = (0..self.nodes.len()).find(|n| replica_id(*n) == member).expect("members are replicas");
            if self.invariants.nodes[node].lost_at > asked_at {
                continue;
            }
            for (i, expected) in data.chunks(PAGE as usize).enumerate() {
                let page = block + i as u64;
                let held = self.nodes[node].disk.data.cached(page).as_ref();
                if held.is_none_or(|bytes| bytes[..] != *expected) {
                    self.fail(format!(
                        "R2: write {number} was acknowledged while node {node}, of committed set version {}, has not \
                         block {page}",
                        self.control.version
                    ));
                    return;
                }
            }
        }
    }

    pub(super) fn moment(&mut self) -> u64 {
        self.invariants.now()
    }

    pub(super) fn check_continuously(&mut self) {
        for region in std::mem::take(&mut self.invariants.cleaned) {
            self.check_clean(region);
        }
        if self.counters.events.is_multiple_of(SWEEP_EVERY) {
            for region in 0..self.layout.regions {
                self.check_clean(region);
            }
            self.check_bounds();
        }
    }

    /// R11: what is out at the replicas is bounded.
    fn check_bounds(&mut self) {
        let limit = MAX_ATTACH_IN_FLIGHT * self.nodes.len();
        for gateway in 0..self.gateways.len() {
            let sent = self.gateways[gateway].session.as_ref().map_or(0, |s| s.mirror.sent_requests());
            if sent > limit {
                self.fail(format!("R11: gateway {gateway} has {sent} requests out, at most {limit}"));
            }
        }
    }

    /// R6: where two replicas differ, the region is dirty on at least one of them.
    fn check_clean(&mut self, region: u64) {
        let clean: Vec<usize> =
            (0..self.nodes.len()).filter(|n| !self.invariants.nodes[*n].dirty[region as usize]).collect();
        let last = ((region + 1) * REGION_BLOCKS).min(self.setup.blocks);
        for block in region * REGION_BLOCKS..last {
            for pair in clean.windows(2) {
                let (a, b) = (self.durable_block(pair[0], block), self.durable_block(pair[1], block));
                // A torn map page makes its regions dirty before anybody sees it (R10).
                if a != b && a != Err(Unreadable::Page) && b != Err(Unreadable::Page) {
                    self.fail(format!(
                        "R6: block {block} differs between nodes {} and {}, and region {region} is clean on both",
                        pair[0], pair[1]
                    ));
                    return;
                }
            }
        }
    }

    /// A block as it would be after the loss of every cache; `Err`: it could not be read.
    fn durable_block(&self, node: usize, block: u64) -> Result<Content, Unreadable> {
        let disk = &self.nodes[node].disk;
        let index = block / MAP_BLOCKS;
        let Some(page) = disk.meta.durable(self.layout.map(index) / PAGE) else { return Ok(None) };
        let map = decode_map(page, index, replica_id(node)).ok_or(Unreadable::Page)?;
        let at = (block % MAP_BLOCKS) as usize;
        if map.is_unverified(at) {
            return Err(Unreadable::Block);
        }
        let content = disk.data.durable(block).clone();
        let zeroes = content.as_ref().is_none_or(|bytes| bytes.iter().all(|b| *b == 0));
        Ok(content.filter(|_| map.is_allocated(at) && !zeroes))
    }

    /// After everything has healed: every replica holds the same, and nothing is dirty.
    pub fn check_equal(&mut self) {
        for node in 0..self.nodes.len() {
            if let Some(region) = self.invariants.nodes[node].dirty.iter().position(|d| *d) {
                self.fail(format!("region {region} is still dirty on node {node} after {:?}", Kind::Clean));
            }
        }
        for block in 0..self.setup.blocks {
            let all: Vec<_> = (0..self.nodes.len()).map(|n| self.durable_block(n, block)).collect();
            if all.iter().any(|b| b.is_err() || *b != all[0]) {
                self.fail(format!("block {block} is not the same everywhere after healing"));
                return;
            }
        }
    }
}
