//! The volumes of a run as those know them who look from outside: what initiators were told of each, where its blocks
//! lie, which of them a disk may have damaged, and which sessions it had.

use std::collections::{BTreeMap, BTreeSet};

use client::mirror::Standing;
use client::volume::Stripe;
use node::replica::ReplicaCore;
use node::replica::superblock::Superblock;
use proto::cluster::{VolumeInfo, VolumeState};
use proto::id::{Epoch, MirrorId, RegionIndex, ReplicaId, VolumeId};
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};

use super::checker::Checker;
use super::disk::PAGE;
use super::history::{BLOCK_SECTORS, History};
use super::invariants::has_its_sum;
use super::net::Party;
use super::world::World;

/// One mirror of a volume.
#[derive(Clone, Debug)]
pub struct MirrorOf {
    pub id: MirrorId,
    pub blocks: u64,
    pub replicas: Vec<ReplicaId>,
}

/// A lease as it was used, in true time.
#[derive(Clone, Debug)]
struct Leases {
    /// By epoch: until when it may be used at the latest.
    until: BTreeMap<Epoch, u64>,
    /// By epoch: from when on no older one may live.
    alone_from: BTreeMap<Epoch, u64>,
}

/// See the module.
pub struct Volume {
    pub id: VolumeId,
    pub stripe: Stripe,
    /// What initiators see.
    pub blocks: u64,
    pub write_cache: bool,
    pub mirrors: Vec<MirrorOf>,
    pub history: History,
    /// Blocks that a disk may have been unable to keep: a medium error is believed there.
    pub suspect: Vec<bool>,
    /// Blocks (replica, mirror block) that a disk may have been unable to keep, and replicas that it may have been unable
    /// to read.
    doubted: BTreeSet<(usize, u64)>,
    unreadable: BTreeSet<usize>,
    /// Regions of replicas that joined with blocks that no member could vouch for.
    distrusted: BTreeSet<(usize, RegionIndex)>,
    /// Blocks (replica, mirror block) that a disk has silently spoiled and that were not written since.
    pub rot: BTreeSet<(usize, u64)>,
    leases: Leases,
    /// By block: the moment at which a request that writes it ended last.
    pub ended_at: Vec<u64>,
    /// By mirror: its POWER ON was told while a replica that counts had everything, and it has not settled since.
    told_early: Vec<bool>,
    /// By mirror: the moment of the last POWER ON.
    said: Vec<u64>,
    /// It is being deleted, or gone.
    pub deleted: bool,
}

impl Volume {
    fn new(number: usize, info: &VolumeInfo) -> Self {
        let mirrors: Vec<MirrorOf> = (info.mirrors.iter())
            .map(|m| MirrorOf {
                id: m.id,
                blocks: m.size / BLOCK_SIZE,
                replicas: m.replicas.iter().map(|r| r.id).collect(),
            })
            .collect();
        let blocks = info.size / BLOCK_SIZE;
        Self {
            id: info.id,
            stripe: Stripe { chunk: u64::from(info.chunk_size), width: mirrors.len() as u64 },
            blocks,
            write_cache: info.write_cache,
            mirrors,
            history: History::new(number as u64),
            suspect: vec![false; blocks as usize],
            ended_at: vec![0; blocks as usize],
            told_early: vec![false; info.mirrors.len()],
            said: vec![0; info.mirrors.len()],
            doubted: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            distrusted: BTreeSet::new(),
            rot: BTreeSet::new(),
            leases: Leases { until: BTreeMap::new(), alone_from: BTreeMap::new() },
            deleted: false,
        }
    }

    /// The mirror and its block that hold a block of the volume.
    pub fn place(&self, block: u64) -> (usize, u64) {
        let piece = self.stripe.pieces(block * BLOCK_SIZE, BLOCK_SIZE).next().expect("a block is not empty");
        (piece.mirror, piece.offset / BLOCK_SIZE)
    }

    /// The volume's block that a mirror's block holds; the last chunks of a mirror may hold none.
    pub fn block_of(&self, mirror: usize, block: u64) -> Option<u64> {
        let at = self.stripe.volume_offset(mirror, block * BLOCK_SIZE) / BLOCK_SIZE;
        (at < self.blocks).then_some(at)
    }

    /// Whether a replica's disk may have been unable to keep a block, or to read it.
    pub fn has_failed(&self, replica: usize, block: u64) -> bool {
        self.unreadable.contains(&replica) || self.doubted.contains(&(replica, block))
    }

    /// Whether a replica may be without a block: its disk may have failed it, or it has taken it over as bad.
    pub fn is_doubted(&self, replica: usize, block: u64) -> bool {
        let region = RegionIndex((block / REGION_BLOCKS) as u32);
        self.has_failed(replica, block) || self.distrusted.contains(&(replica, region))
    }

    pub fn check_history(&self) -> Result<(), String> {
        self.history.check(self.blocks * BLOCK_SECTORS, |sector| self.place(sector / BLOCK_SECTORS).0)
    }
}

impl World {
    /// The volume that initiators use, or the last one that they used.
    ///
    /// # Panics
    /// Before the first one is ready.
    pub fn current(&self) -> &Volume {
        self.volumes.last().expect("a volume has been made")
    }

    pub(super) fn current_mut(&mut self) -> &mut Volume {
        self.volumes.last_mut().expect("a volume has been made")
    }

    /// What its initiators were told.
    pub fn history(&self) -> &History {
        &self.current().history
    }

    pub(super) fn volume_mut(&mut self, id: VolumeId) -> &mut Volume {
        self.volumes.iter_mut().find(|v| v.id == id).expect("a volume that was made is known")
    }

    pub(super) fn volume(&self, id: VolumeId) -> &Volume {
        self.volumes.iter().find(|v| v.id == id).expect("a volume that was made is known")
    }

    pub(super) fn history_of(&mut self, id: VolumeId) -> &mut History {
        &mut self.volume_mut(id).history
    }

    pub(super) fn mirror_id(&self, volume: VolumeId, mirror: usize) -> MirrorId {
        self.volume(volume).mirrors[mirror].id
    }

    /// The metadata have changed.
    pub(super) fn volumes_changed(&mut self) {
        let fresh: Vec<VolumeInfo> =
            self.truth.volumes.values().filter(|v| !self.volumes.iter().any(|k| k.id == v.id)).cloned().collect();
        for info in fresh {
            self.log(|| format!("volume {} is made: {} mirrors of {} bytes", info.id, info.mirrors.len(), info.size));
            self.volumes.push(Volume::new(self.volumes.len(), &info));
        }
        for volume in &mut self.volumes {
            volume.deleted = self.truth.volumes.get(&volume.id).is_none_or(|v| v.state == VolumeState::Deleting);
        }
    }

    /// A disk failed there: what the blocks hold on it is open.
    pub(super) fn distrust(&mut self, replica: usize, blocks: std::ops::Range<u64>) {
        let (volume, mirror) = (self.replicas[replica].volume, self.replicas[replica].mirror);
        let Some(volume) = self.volumes.iter_mut().find(|v| v.id == volume) else { return };
        for block in blocks {
            volume.doubted.insert((replica, block));
            if let Some(block) = volume.block_of(mirror, block) {
                volume.suspect[block as usize] = true;
            }
        }
    }

    /// A node's disks fail reads: any block may have been unreadable there for a while.
    pub(super) fn distrust_all(&mut self, node: usize) {
        let here = self.replicas_of(node);
        if let Some(volume) = self.volumes.last_mut() {
            volume.suspect.fill(true);
            volume.unreadable.extend(here.into_iter().filter(|r| self.replicas[*r].volume == volume.id));
        }
    }

    /// Whether every member that a session could read when it was asked, at `asked_ms` of its clock, may have been unable
    /// to keep, or to read, a block of the volume. One that has joined since came too late to be asked, perhaps: what was
    /// found is told when other mirrors' parts are there, and under a lease.
    pub(super) fn may_be_bad(&self, gateway: usize, volume: VolumeId, block: u64, asked_ms: u64) -> bool {
        let known = self.volume(volume);
        let (mirror, at) = known.place(block);
        let Some(session) = self.gateways[gateway].session(volume) else { return true };
        let status = session.core.mirrors()[mirror].status();
        let mut read = status.replicas.iter().filter(|r| r.standing == Standing::InSync && r.since <= asked_ms);
        let doubted = |id: &ReplicaId| self.replica_at.get(id).is_some_and(|r| known.is_doubted(*r, at));
        known.suspect[block as usize] && read.all(|r| doubted(&r.replica))
    }

    pub(super) fn damaged_blocks(&self) -> Vec<u64> {
        let damaged = self.current().suspect.iter().enumerate().filter(|(_, damaged)| **damaged);
        damaged.map(|(block, _)| block as u64).collect()
    }

    /// From here on disks may have lost what was not flushed. A mirror that has announced the loss of its caches and
    /// not settled since still decides what is there: its POWER ON excuses a loss now, though it did not before.
    pub(super) fn lose_trust(&mut self) {
        if !std::mem::take(&mut self.lossless) {
            return;
        }
        let Some(id) = self.volumes.last().map(|v| v.id) else { return };
        let sessions = self.gateways.iter().filter_map(|g| g.session(id));
        let unsettled: Vec<usize> = sessions
            .flat_map(|s| s.core.status().into_iter().enumerate())
            .filter(|(_, m)| m.unsettled > 0 || m.waits.is_some())
            .map(|(mirror, _)| mirror)
            .collect();
        for mirror in unsettled {
            self.excuse(id, mirror);
        }
    }

    /// Whether every replica that counts for a mirror, or is waited for, has lost its cache and nothing has made up for it.
    /// A member that was killed before it stored that the last session counts on it, where another one has stored that,
    /// is taken for an old image, and does not count (R6).
    fn all_lack(&self, volume: VolumeId, mirror: usize) -> bool {
        let Some(info) = self.truth.volumes.get(&volume).and_then(|v| v.mirrors.get(mirror)) else { return true };
        let at = |ids: &[ReplicaId]| ids.iter().filter_map(|id| self.replica_at.get(id).copied()).collect::<Vec<_>>();
        let (mut counts, awaited) = (at(&info.in_sync.members), at(&info.in_sync.awaited));
        let newest = counts.iter().map(|r| self.kept_epoch(*r)).max();
        counts.retain(|r| Some(self.kept_epoch(*r)) == newest);
        counts.iter().chain(&awaited).all(|r| self.replicas[*r].watched.lacks)
    }

    /// The session that last counted on a replica, as its disk says.
    fn kept_epoch(&self, replica: usize) -> Epoch {
        let r = &self.replicas[replica];
        if r.disk.meta.bytes() == 0 {
            // Its files are deleted.
            return Epoch(0);
        }
        let pages = [0, 1].map(|copy| r.disk.meta.durable(r.layout.superblock(copy) / PAGE).as_ref());
        let known = pages.into_iter().flatten().filter_map(|page| Superblock::decode(page).ok());
        known.max_by_key(|superblock| superblock.generation).map_or(Epoch(0), |superblock| superblock.kept_epoch)
    }

    /// What was not flushed may be lost.
    fn excuse(&mut self, volume: VolumeId, mirror: usize) {
        let known = self.volume_mut(volume);
        let said = known.said[mirror];
        known.history.power_on(mirror, said);
        self.work.forget(false);
    }

    /// A session says that every cache of a mirror was lost. It excuses what is lost if that is true, or as soon as it
    /// is: until then the blocks wait for who has them (R8).
    pub(super) fn power_on_said(&mut self, volume: VolumeId, mirror: usize) {
        let known = self.volume_mut(volume);
        known.said[mirror] = known.history.moment();
        if self.lossless {
            return;
        }
        // Whatever is lost of it, and when: it was not flushed.
        self.work.forget(false);
        if self.all_lack(volume, mirror) {
            self.excuse(volume, mirror);
        } else {
            self.volume_mut(volume).told_early[mirror] = true;
        }
    }

    /// A replica may have lost what was not flushed.
    pub(super) fn cache_lost(&mut self, replica: usize) {
        self.replicas[replica].watched.lacks = true;
        let (volume, mirror) = (self.replicas[replica].volume, self.replicas[replica].mirror);
        let early = self.volumes.iter().any(|v| v.id == volume && v.told_early[mirror]);
        if early && self.all_lack(volume, mirror) {
            self.excuse(volume, mirror);
        }
    }

    /// Where a session has settled a mirror its members have all that there is, whatever they had lost before.
    pub(super) fn made_up_for(&mut self, gateway: usize, volume: VolumeId) {
        let lacking = self.replicas.iter().any(|r| r.volume == volume && r.watched.lacks);
        if !lacking && !self.volume(volume).told_early.contains(&true) {
            return;
        }
        let Some(session) = self.gateways[gateway].session(volume) else { return };
        let mut whole = Vec::new();
        for (i, mirror) in session.core.mirrors().iter().enumerate().filter(|(_, m)| m.is_settled()) {
            let status = mirror.status();
            let members = status.replicas.iter().filter(|r| r.standing == Standing::InSync);
            whole.extend(members.filter_map(|r| self.replica_at.get(&r.replica).map(|at| (i, *at))));
        }
        // One that has lost its cache since is not attached any more.
        let epoch = session.epoch;
        let attached = |r: &usize| {
            let core = self.replicas[*r].core.as_ref();
            core.and_then(ReplicaCore::current_attach).is_some_and(|a| a.epoch == epoch)
        };
        whole.retain(|(_, r)| attached(r));
        for (mirror, replica) in whole {
            self.replicas[replica].watched.lacks = false;
            self.volume_mut(volume).told_early[mirror] = false;
        }
    }

    /// A disk has spoiled a block without a word: its sum tells, and another copy has it (R10).
    pub(super) fn spoiled(&mut self, replica: usize, block: u64) {
        self.lose_trust();
        self.log(|| format!("block {block} of replica {replica} is spoiled"));
        self.distrust(replica, block..block + 1);
        self.replicas[replica].disk.rotten = true;
        let volume = self.replicas[replica].volume;
        self.volume_mut(volume).rot.insert((replica, block));
    }

    /// A replica was opened. Where its disk had dropped what a killed process was about to flush, the sums are as old as
    /// what is left: the block looks like that of a replica which never got the write, and is as good as another's.
    pub(super) fn replica_opened(&mut self, replica: usize) {
        let r = &self.replicas[replica];
        let Some(known) = self.volumes.iter_mut().find(|v| v.id == r.volume) else { return };
        let spoiled = known.rot.range((replica, 0)..(replica + 1, 0)).map(|(_, block)| *block);
        for block in spoiled.filter(|block| has_its_sum(r, *block)).collect::<Vec<_>>() {
            if let Some(block) = known.block_of(r.mirror, block) {
                known.history.give_up_block(block);
            }
        }
    }

    /// Where no replica had a block as it was written, one of them was taken for right (R7). Where a disk had spoiled
    /// it, that is a loss that nobody could have prevented: all copies were damaged at once.
    pub(super) fn restamped(&mut self, volume: VolumeId, mirror: usize, region: RegionIndex) {
        let first = u64::from(region.0) * REGION_BLOCKS;
        let replicas = &self.replicas;
        let volume = self.volumes.iter_mut().find(|v| v.id == volume).expect("it is served");
        let spoiled: Vec<u64> = (volume.rot.iter())
            .filter(|(r, b)| replicas[*r].mirror == mirror && (first..first + REGION_BLOCKS).contains(b))
            .map(|(_, b)| *b)
            .collect();
        for block in spoiled {
            if let Some(block) = volume.block_of(mirror, block) {
                volume.history.give_up_block(block);
            }
        }
    }

    /// A block could not be read. Where a disk has spoiled it elsewhere, and a session has yet to settle what it found,
    /// that is two copies at once, too: nobody may tell any more which of the rest is newer.
    pub(super) fn unreadable(&mut self, replica: usize, block: u64) {
        let (id, mirror) = (self.replicas[replica].volume, self.replicas[replica].mirror);
        let mut sessions = self.gateways.iter().filter_map(|g| g.session(id));
        let settled = sessions.all(|s| s.core.mirrors()[mirror].is_settled());
        let replicas = &self.replicas;
        let Some(volume) = self.volumes.iter_mut().find(|v| v.id == id).filter(|_| !settled) else { return };
        let elsewhere = |(r, b): &(usize, u64)| *b == block && *r != replica && replicas[*r].mirror == mirror;
        if volume.rot.iter().any(elsewhere)
            && let Some(block) = volume.block_of(mirror, block)
        {
            volume.history.give_up_block(block);
        }
    }

    /// Blocks that no member could vouch for are bad on a joining replica, too.
    pub(super) fn distrusted(&mut self, volume: VolumeId, region: RegionIndex, replica: ReplicaId) {
        let Some(replica) = self.replica_at.get(&replica).copied() else { return };
        self.volume_mut(volume).distrusted.insert((replica, region));
    }

    // ---- R3 -------------------------------------------------------------------------------------------------

    /// The true time at which a gateway's clock shows this.
    fn true_time(&self, gateway: usize, clock_ms: u64) -> u64 {
        let party = Party::Gateway(gateway);
        let ahead = clock_ms as i128 - i128::from(self.clock(party));
        let drift = i128::from(self.drift.get(&party).copied().unwrap_or_default());
        (i128::from(self.now) + ahead * 1_000 * 1_000_000 / (1_000_000 + drift)).max(0) as u64
    }

    /// A session opens: from this moment on, of its own clock, it counts on no older lease to live.
    pub(super) fn check_opening(&mut self, gateway: usize, volume: VolumeId, epoch: Epoch, old_lease_until: u64) {
        let alone = if old_lease_until == 0 { self.now } else { self.true_time(gateway, old_lease_until) };
        let leases = &mut self.volume_mut(volume).leases;
        if leases.alone_from.insert(epoch, alone).is_some() && !self.voters_restored {
            return self.fail(Checker::Epochs, format!("R1: epoch {epoch} was given out twice"));
        }
        self.check_leases(volume);
    }

    /// A session has a lease until then, on its gateway's clock.
    pub(super) fn check_lease(&mut self, gateway: usize, volume: VolumeId, epoch: Epoch, until: u64) {
        let until = self.true_time(gateway, until);
        self.volume_mut(volume).leases.until.insert(epoch, until);
        self.check_leases(volume);
    }

    /// Its gateway uses the session no more.
    pub(super) fn lease_over(&mut self, volume: VolumeId, epoch: Epoch) {
        let now = self.now;
        if let Some(until) = self.volume_mut(volume).leases.until.get_mut(&epoch) {
            *until = now.min(*until);
        }
    }

    /// R3: no older lease lives when a newer session takes them all for ended.
    fn check_leases(&mut self, volume: VolumeId) {
        let leases = &self.volume(volume).leases;
        let mut wrong = None;
        for (epoch, alone) in &leases.alone_from {
            if let Some((old, until)) = leases.until.range(..epoch).find(|(_, until)| **until > *alone) {
                wrong = Some(format!(
                    "R3: the lease of epoch {old} lives until {until} µs, epoch {epoch} counts on its end at {alone} µs"
                ));
            }
        }
        if let Some(what) = wrong.filter(|_| !self.voters_restored) {
            self.fail(Checker::Leases, what);
        }
    }
}
