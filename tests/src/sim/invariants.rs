//! The rules of DESIGN §5 that hold at every step, checked from outside: on the simulated disks and on what was said.
//!
//! | rule | checked |
//! |---|---|
//! | R1 | epochs rise (`voter`), none is given out twice (`volume`); an attach is answered when nothing older is with the disk and its epoch is on it, and nothing is done under an older one after that |
//! | R2 | what is acknowledged is on every member of the committed set, and on the medium of those who stay when one leaves; sets change a version at a time, none is empty |
//! | R3 | no reply without a lease (`gateway`), no older lease lives when a newer session counts on its end (`volume`) |
//! | R4 | by the history: two overlapping requests that mix are no register |
//! | R5 | nothing changes a region on a disk while its dirty bit is not durable there |
//! | R6 | where two replicas may differ, the region is dirty on one of them |
//! | R7 | who enters a set has what was acknowledged, durably if it was flushed; by the history, whoever is read; and all replicas are equal at the end |
//! | R8 | an old image of the voters stops the volume, nothing else does (`gateway`) |
//! | R9 | by the history; what a flush covered, and what the last member has, is on the medium; a POWER ON excuses a loss only when everybody who counts has lost a cache (`volume`) |
//! | R10 | nothing is read that nobody wrote; a medium error only where the disks of all who can be read had damaged something; no allocation on a medium without its data |
//! | R11 | bounds of requests, copies, logs, connections |
//! | R12 | by the history, and by what waits once everything has healed (`run`) |

use std::ops::Range;

use node::replica::FileKind;
use node::replica::layout::{BITMAP_BITS, Layout, MAP_BLOCKS, PageKind, decode_bitmap, decode_map};
use node::replica::superblock::Superblock;
use proto::frame::block_sum;
use proto::id::{AttachId, Epoch, ReplicaId, VolumeId};
use proto::limits::{MAX_ATTACH_IN_FLIGHT, REGION_BLOCKS};

use super::checker::Checker;
use super::disk::{Content, PAGE};
use super::net::Party;
use super::node::Replica;
use super::world::World;

/// Every so many events everything is compared with everything.
const SWEEP_EVERY: u64 = 4_000;
/// Connections that are there at once (R11): each session has one to each node, each node one to each other.
const MAX_CONNS: usize = 256;
/// Messages of the control plane under way at once (R11).
const MAX_MESSAGES: usize = 20_000;

/// Entries of a log that have been applied and are still there (R11): see `voter` for when it is cut.
const MAX_APPLIED: u64 = 200;

/// What the checks remember of a replica.
#[derive(Clone, Debug)]
pub struct Watched {
    /// The dirty bitmap's page as it is on the medium, and what it says.
    page: Content,
    pub dirty: Vec<bool>,
    dirty_page: u64,
    /// Somebody has put old files in its place, and it has not been told yet to distrust them: what its bits say was
    /// so once.
    pub old: bool,
    /// When its cache was last lost, as a moment of the run.
    pub lost_at: u64,
    /// Its cache was lost, and nothing has made up for that since: see `World::cache_lost`.
    pub lacks: bool,
    /// The newest attach under which it said that something was done.
    attach: AttachId,
    /// Pages of its map as they were on the medium when they were last looked at, and what they had allocated.
    maps: Vec<(Content, Vec<bool>)>,
}

impl Watched {
    pub fn new(layout: &Layout) -> Self {
        let dirty = vec![true; layout.regions as usize];
        let maps = vec![(None, vec![false; MAP_BLOCKS as usize]); layout.map_pages as usize];
        Self {
            page: None,
            dirty,
            dirty_page: layout.dirty(0) / PAGE,
            old: false,
            lost_at: 0,
            lacks: false,
            attach: AttachId::default(),
            maps,
        }
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

/// A block as it would be after the loss of every cache; `Err`: it could not be read.
fn durable_block(r: &Replica, block: u64) -> Result<Option<&[u8]>, Unreadable> {
    let index = block / MAP_BLOCKS;
    let Some(page) = map_page(r, index) else { return Ok(None) };
    let (map, bad) = decode_map(page, index, r.id);
    let at = (block % MAP_BLOCKS) as usize;
    if bad[at / REGION_BLOCKS as usize] {
        return Err(Unreadable::Page);
    }
    if map.is_unverified(at) {
        return Err(Unreadable::Block);
    }
    let content = r.disk.data.durable(block).as_ref().filter(|_| map.is_allocated(at));
    Ok(content.filter(|bytes| bytes.iter().any(|b| *b != 0)).map(|bytes| &bytes[..]))
}

/// Whether the medium has a block, and as its sum there says.
pub fn has_its_sum(r: &Replica, block: u64) -> bool {
    let index = block / MAP_BLOCKS;
    let sum = map_page(r, index).as_ref().and_then(|page| {
        let (map, _) = decode_map(page, index, r.id);
        let at = (block % MAP_BLOCKS) as usize;
        (map.is_allocated(at) && !map.is_unverified(at)).then(|| map.sums[at])
    });
    sum.is_some_and(|sum| r.disk.data.durable(block).as_ref().is_some_and(|bytes| block_sum(bytes) == sum))
}

/// A map page on the medium, if its presence bit says that there is one: a power cut may leave a page without it.
fn map_page(r: &Replica, index: u64) -> &Content {
    let (at, bit) = (index / BITMAP_BITS, (index % BITMAP_BITS) as usize);
    let presence = r.disk.meta.durable(r.layout.presence(at) / PAGE);
    let words = presence.as_ref().and_then(|page| decode_bitmap(page, PageKind::Presence, at, r.id));
    // Under a bad presence page every map page is looked at.
    let present = words.is_none_or(|mut words| words.nth(bit / 64).expect("a page of words") >> (bit % 64) & 1 == 1);
    if present { r.disk.meta.durable(r.layout.map(index) / PAGE) } else { &None }
}

/// The blocks of a run, as [`durable_block`] tells of each; the map's pages are looked at once.
fn durable_blocks(r: &Replica, blocks: Range<u64>) -> Vec<Result<Option<&[u8]>, Unreadable>> {
    let mut out = Vec::with_capacity((blocks.end - blocks.start) as usize);
    let mut known = None;
    for block in blocks {
        let index = block / MAP_BLOCKS;
        if known.as_ref().is_none_or(|(i, _)| *i != index) {
            let page = map_page(r, index);
            known = Some((index, page.as_ref().map(|page| decode_map(page, index, r.id))));
        }
        let at = (block % MAP_BLOCKS) as usize;
        out.push(match &known.as_ref().expect("looked at").1 {
            None => Ok(None),
            Some((_, bad)) if bad[at / REGION_BLOCKS as usize] => Err(Unreadable::Page),
            Some((map, _)) if map.is_unverified(at) => Err(Unreadable::Block),
            Some((map, _)) => Ok(r.disk.data.durable(block).as_deref().filter(|_| map.is_allocated(at))),
        });
    }
    out
}

/// Whether two blocks hold the same; what is not allocated holds zeroes.
fn same(a: Option<&[u8]>, b: Option<&[u8]>) -> bool {
    let zero = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
    match (a, b) {
        (None, None) => true,
        (Some(x), None) | (None, Some(x)) => zero(x),
        (Some(x), Some(y)) => x.as_ptr() == y.as_ptr() || x == y,
    }
}

impl World {
    /// A number that rises, to tell what came first.
    pub(super) fn moment(&mut self) -> u64 {
        self.moments += 1;
        self.moments
    }

    /// Looks at what a replica's dirty bitmap says on the medium.
    pub(super) fn disk_moved(&mut self, replica: usize) {
        let r = &mut self.replicas[replica];
        let page = r.disk.meta.durable(r.watched.dirty_page);
        let same = match (page, &r.watched.page) {
            (Some(a), Some(b)) => a.as_ptr() == b.as_ptr(),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        let page = page.clone();
        let words: Option<Vec<u64>> =
            page.as_ref().and_then(|bytes| decode_bitmap(bytes, PageKind::Dirty, 0, r.id).map(Iterator::collect));
        for region in 0..r.watched.dirty.len() {
            // A page that fails its checksum counts as all dirty (R5).
            let dirty = words.as_ref().is_none_or(|w| w[region / 64] >> (region % 64) & 1 == 1);
            if r.watched.dirty[region] && !dirty {
                self.cleaned.push((r.volume, r.mirror, region as u64));
            }
            r.watched.dirty[region] = dirty;
        }
        r.watched.old &= !r.watched.dirty.iter().all(|dirty| *dirty);
        r.watched.page = page;
    }

    /// R5: before anything changes a region on the disk, its dirty bit is durable.
    pub(super) fn check_dirty_before_data(&mut self, replica: usize, file: FileKind, pages: Range<u64>) {
        if file != FileKind::Data {
            return;
        }
        self.disk_moved(replica);
        for region in pages.start / REGION_BLOCKS..pages.end.div_ceil(REGION_BLOCKS) {
            if !self.replicas[replica].watched.dirty[region as usize] {
                return self.fail(
                    Checker::DirtyFirst,
                    format!(
                        "R5: pages {pages:?} of replica {replica} changed while region {region} was clean on its disk"
                    ),
                );
            }
        }
    }

    /// R1: when an attach is answered, nothing of an older one is with the disk.
    pub(super) fn check_drained(&mut self, replica: usize, attach: AttachId) {
        if self.replicas[replica].disk.writes_in_flight() {
            self.fail(
                Checker::Drained,
                format!("R1: replica {replica} answers attach {attach} with older writes in flight on its disk"),
            );
        }
    }

    /// R1: when an attach is answered its epoch is on the medium, in both copies of the superblock.
    pub(super) fn check_epoch_stored(&mut self, replica: usize, attach: AttachId) {
        let r = &self.replicas[replica];
        let stored = |copy: u8| {
            let page = r.disk.meta.durable(r.layout.superblock(copy) / PAGE).as_ref();
            page.and_then(|page| Superblock::decode(page).ok()).map(|superblock| superblock.epoch)
        };
        let stored = [stored(0), stored(1)];
        if stored.iter().any(|epoch| epoch.is_none_or(|epoch| epoch < attach.epoch)) {
            let what = format!("R1: replica {replica} answers attach {attach}, its disk says {stored:?}");
            self.fail(Checker::Fenced, what);
        }
    }

    /// R1: nothing is done under an attach that is older than one that was answered.
    pub(super) fn check_fenced(&mut self, replica: usize, attach: AttachId) {
        let newest = self.replicas[replica].watched.attach;
        if attach < newest {
            return self.fail(
                Checker::Fenced,
                format!("R1: replica {replica} does what attach {attach} asks for, after {newest} was answered"),
            );
        }
        self.replicas[replica].watched.attach = attach;
    }

    /// R10: an allocation reaches the medium after its data: there is none without.
    pub(super) fn check_allocated(&mut self, replica: usize) {
        let r = &mut self.replicas[replica];
        let mut ahead = None;
        for index in 0..r.layout.map_pages {
            let page = r.disk.meta.durable(r.layout.map(index) / PAGE);
            let (known, allocated) = &mut r.watched.maps[index as usize];
            let same = match (&page, &known) {
                (Some(a), Some(b)) => a.as_ptr() == b.as_ptr(),
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            known.clone_from(page);
            let Some((map, bad)) = page.as_ref().map(|page| decode_map(page, index, r.id)) else { continue };
            for (at, was) in allocated.iter_mut().enumerate() {
                // What is torn says nothing.
                if bad[at / REGION_BLOCKS as usize] {
                    continue;
                }
                let is = map.is_allocated(at) && !map.is_unverified(at);
                let block = index * MAP_BLOCKS + at as u64;
                if is && !*was && block < r.blocks && r.disk.data.durable(block).is_none() {
                    // A flush writes the page as it was when it began; the block may have been freed since.
                    if !r.disk.data.is_freed(block) {
                        ahead.get_or_insert(block);
                    }
                } else if !is && block < r.blocks {
                    r.disk.data.forget_freed(block);
                }
                *was = is;
            }
        }
        let Some(block) = ahead else { return };
        let volume = self.replicas[replica].volume;
        let rot = self.volumes.iter().any(|v| v.id == volume && v.is_doubted(replica, block));
        if !rot {
            let what = format!("R10: block {block} of replica {replica} is allocated on its disk, where nothing is");
            self.fail(Checker::Allocated, what);
        }
    }

    /// The attaches under which these are to be members.
    pub(super) fn note_proposed(&mut self, volume: VolumeId, mirror: usize, members: &[ReplicaId]) {
        let attach = |id: &ReplicaId| {
            let core = self.replicas[*self.replica_at.get(id)?].core.as_ref()?;
            Some((*id, core.current_attach()?))
        };
        let attaches = members.iter().filter_map(attach).collect();
        self.proposed.insert((volume, mirror), attaches);
    }

    /// R7: who enters the set has what was acknowledged, and on the medium what was flushed.
    pub(super) fn check_entered(&mut self, volume: VolumeId, mirror: usize, id: ReplicaId) {
        let proposed = self.proposed.get(&(volume, mirror)).and_then(|all| all.iter().find(|(r, _)| *r == id));
        let Some(replica) = self.replica_at.get(&id).copied() else { return };
        let attach = self.replicas[replica].core.as_ref().and_then(node::replica::ReplicaCore::current_attach);
        // One that was lost meanwhile is a member that has lost something, and leaves.
        if attach.is_none() || attach != proposed.map(|(_, attach)| *attach) {
            return;
        }
        self.replicas[replica].watched.lacks = false;
        for (covered, durable) in self.work.acknowledged(volume) {
            let known = self.volume(volume);
            let (at_mirror, at) = known.place(covered.block);
            if at_mirror != mirror {
                continue;
            }
            let doubted = known.is_doubted(replica, at) || known.history.is_given_up(covered.block);
            let disk = &self.replicas[replica].disk.data;
            let page = if durable { disk.durable(at) } else { disk.cached(at) };
            if !doubted && page.as_ref() != Some(&covered.data) {
                let kept = if durable { "flushed" } else { "acknowledged" };
                return self.fail(
                    Checker::Entered,
                    format!(
                        "R7: replica {replica} enters the set without block {at} of {kept} write {}",
                        covered.number
                    ),
                );
            }
        }
    }

    /// R2: who stays in a set that somebody has left has all on the medium that was acknowledged. Whoever left may have
    /// been the only one, and nobody asks it any more.
    pub(super) fn check_stayed(&mut self, volume: VolumeId, mirror: usize) {
        let proposed = self.proposed.get(&(volume, mirror)).cloned().unwrap_or_default();
        let known = self.volume(volume);
        for replica in self.members_of(volume, mirror) {
            let r = &self.replicas[replica];
            // One that was lost meanwhile leaves as well, or has its cache made up for.
            let attach = r.core.as_ref().and_then(node::replica::ReplicaCore::current_attach);
            if attach.is_none() || !proposed.contains(&(r.id, attach.expect("checked"))) {
                continue;
            }
            for (covered, _) in self.work.acknowledged(volume) {
                let (at_mirror, at) = known.place(covered.block);
                let doubted = known.is_doubted(replica, at) || known.history.is_given_up(covered.block);
                if at_mirror != mirror || doubted || r.disk.data.durable(at).as_ref() == Some(&covered.data) {
                    continue;
                }
                let number = covered.number;
                let what = format!(
                    "R2: replica {replica} stays in the set without block {at} of acknowledged write {number} on its \
                     medium"
                );
                return self.fail(Checker::Durable, what);
            }
        }
    }

    /// The members of a mirror's committed set, as replicas that have files.
    fn members_of(&self, volume: VolumeId, mirror: usize) -> Vec<usize> {
        let info = self.truth.volumes.get(&volume).and_then(|v| v.mirrors.get(mirror));
        let members = info.map(|m| m.in_sync.members.clone()).unwrap_or_default();
        members.iter().filter_map(|id: &ReplicaId| self.replica_at.get(id).copied()).collect()
    }

    /// R2: an acknowledged write is on every replica of the committed set, but for one that has lost its cache since.
    /// With `durable` (R9) it is on their media.
    pub(super) fn check_acknowledged(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        number: u32,
        block: u64,
        data: &[u8],
        asked_at: u64,
        durable: bool,
    ) {
        // Nothing that a superseded session says is passed on.
        if self.truth.volumes.get(&volume).is_none_or(|v| v.session.epoch != epoch) {
            return;
        }
        for (i, expected) in data.chunks(PAGE as usize).enumerate() {
            if self.volume(volume).history.is_given_up(block + i as u64) {
                continue;
            }
            let (mirror, at) = self.volume(volume).place(block + i as u64);
            let members = self.members_of(volume, mirror);
            // The last member has nobody who would make up for its cache.
            let durable = durable || members.len() == 1;
            for replica in members {
                let r = &self.replicas[replica];
                let known = self.volume(volume);
                let bad = known.suspect[block as usize + i] && durable_block(r, at) == Err(Unreadable::Block);
                if r.watched.lost_at > asked_at || known.rot.contains(&(replica, at)) || bad {
                    continue;
                }
                let page = if durable { r.disk.data.durable(at) } else { r.disk.data.cached(at) };
                if page.as_ref().is_none_or(|bytes| bytes[..] != *expected) {
                    let (checker, rule) = match durable {
                        true => (Checker::Durable, "R9: the durable write"),
                        false => (Checker::Acknowledged, "R2: write"),
                    };
                    return self.fail(
                        checker,
                        format!(
                            "{rule} {number} was acknowledged while replica {replica}, of the committed set of mirror \
                         {mirror}, has not block {at}"
                        ),
                    );
                }
            }
        }
    }

    pub(super) fn check_continuously(&mut self) {
        for (volume, mirror, region) in std::mem::take(&mut self.cleaned) {
            self.check_clean(volume, mirror, region);
        }
        if self.counters.events.is_multiple_of(SWEEP_EVERY) {
            self.sweep();
            self.check_bounds();
        }
    }

    fn sweep(&mut self) {
        let living: Vec<(VolumeId, Vec<u64>)> = (self.volumes.iter().filter(|v| !v.deleted))
            .map(|v| (v.id, v.mirrors.iter().map(|m| m.blocks.div_ceil(REGION_BLOCKS)).collect()))
            .collect();
        for (volume, mirrors) in living {
            for (mirror, regions) in mirrors.into_iter().enumerate() {
                for region in 0..regions {
                    self.check_clean(volume, mirror, region);
                }
            }
        }
    }

    /// R11: what is out at the replicas is bounded, and so is what is under way.
    fn check_bounds(&mut self) {
        let limit = MAX_ATTACH_IN_FLIGHT * self.setup.replicas;
        for gateway in 0..self.gateways.len() {
            let sent = self.gateways[gateway].most_sent();
            if sent > limit {
                self.fail(
                    Checker::Bounds,
                    format!("R11: a mirror of gateway {gateway} has {sent} requests out, at most {limit}"),
                );
            }
        }
        for (i, member) in self.members.iter().enumerate() {
            let kept = member.core.as_ref().map_or(0, |c| c.machine().applied() - c.raft().log().before().0);
            if kept > MAX_APPLIED {
                let what = format!("R11: member {i} keeps {kept} entries that it has applied");
                return self.fail(Checker::Bounds, what);
            }
        }
        let (conns, messages) = (self.net.open(), self.messages.len() + self.asks.len() + self.answers.len());
        if conns > MAX_CONNS || messages > MAX_MESSAGES {
            self.fail(
                Checker::Bounds,
                format!("R11: {conns} connections and {messages} messages of the control plane"),
            );
        }
    }

    /// R6: where two replicas differ, the region is dirty on at least one of them.
    fn check_clean(&mut self, volume: VolumeId, mirror: usize, region: u64) {
        let known = self.volume(volume);
        let of_mirror = known.mirrors[mirror].replicas.iter().filter_map(|id| self.replica_at.get(id).copied());
        let clean: Vec<usize> = of_mirror
            .filter(|r| {
                let r = &self.replicas[*r];
                !r.gone && !r.watched.old && !r.watched.dirty[region as usize]
            })
            .collect();
        let first = region * REGION_BLOCKS;
        let last = (first + REGION_BLOCKS).min(known.mirrors[mirror].blocks);
        for pair in clean.windows(2) {
            let (a, b) = (&self.replicas[pair[0]], &self.replicas[pair[1]]);
            let (of_a, of_b) = (durable_blocks(a, first..last), durable_blocks(b, first..last));
            let differs = of_a.into_iter().zip(of_b).position(|(a, b)| match (a, b) {
                // A torn map page makes its regions dirty before anybody sees it (R10).
                (Err(Unreadable::Page), _) | (_, Err(Unreadable::Page)) => false,
                (Ok(a), Ok(b)) => !same(a, b),
                (a, b) => a.is_err() != b.is_err(),
            });
            let Some(block) = differs.map(|i| first + i as u64) else { continue };
            // What a disk did by itself no bit can tell; its sum does. And where a disk failed, other copies may have
            // become bad knowingly.
            let at = known.block_of(mirror, block);
            let unverified = [a, b].iter().any(|r| durable_block(r, block) == Err(Unreadable::Block));
            if known.rot.contains(&(pair[0], block))
                || known.rot.contains(&(pair[1], block))
                || unverified && at.is_some_and(|at| known.suspect[at as usize])
            {
                continue;
            }
            self.fail(
                Checker::CleanMeansEqual,
                format!(
                    "R6: block {block} of mirror {mirror} differs between replicas {} and {}, and region {region} is \
                 clean on both",
                    pair[0], pair[1]
                ),
            );
            return;
        }
    }

    /// After everything has healed: every replica holds the same, and nothing is dirty.
    pub fn check_equal(&mut self) {
        let volume = self.current();
        let mirrors: Vec<(Vec<usize>, u64)> = (volume.mirrors.iter())
            .map(|m| (m.replicas.iter().filter_map(|id| self.replica_at.get(id).copied()).collect(), m.blocks))
            .collect();
        for (mirror, (replicas, blocks)) in mirrors.into_iter().enumerate() {
            for r in &replicas {
                if let Some(region) = self.replicas[*r].watched.dirty.iter().position(|d| *d) {
                    return self.fail(
                        Checker::DirtyLeft,
                        format!("region {region} is still dirty on replica {r} after everything"),
                    );
                }
            }
            for block in 0..blocks {
                let all: Vec<_> = replicas.iter().map(|r| durable_block(&self.replicas[*r], block)).collect();
                if all.iter().any(|b| b.is_err() || *b != all[0]) {
                    let known = self.current();
                    // Past the volume's end nobody reads it, or writes it again: what a disk did to it stays. A failed
                    // disk makes it bad, and that on every replica; that none is so for nothing is checked here, too.
                    let spoiled = replicas.iter().any(|r| known.rot.contains(&(*r, block)));
                    let failed = replicas.iter().any(|r| known.has_failed(*r, block));
                    let bad = all.iter().all(|b| *b == Err(Unreadable::Block));
                    if known.block_of(mirror, block).is_none() && (spoiled || failed && bad) {
                        continue;
                    }
                    return self.fail(
                        Checker::CleanMeansEqual,
                        format!("block {block} is not the same everywhere after healing"),
                    );
                }
            }
        }
    }

    /// Spoils blocks as the disk's faults say, after a sync.
    pub(super) fn disk_betrays(&mut self, replica: usize) {
        let (healed, spoiled) = self.replicas[replica].disk.take_synced();
        let id = self.replicas[replica].volume;
        if let Some(volume) = self.volumes.iter_mut().find(|v| v.id == id) {
            healed.into_iter().for_each(|page| _ = volume.rot.remove(&(replica, page)));
        }
        for page in spoiled {
            self.counters.spoiled += 1;
            self.spoiled(replica, page);
        }
    }

    pub(super) fn is_stopped(&self, party: Party) -> bool {
        self.stopped.contains_key(&party)
    }
}
