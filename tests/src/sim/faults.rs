//! What goes wrong, and when.

use client::mirror::Standing;
use proto::cluster::SessionState;

use super::disk::{DiskFaults, PAGE};
use super::net::Party;
use super::world::{Event, MS, SECOND, World};

/// A class of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    KillNode,
    KillWitness,
    PowerCut,
    PowerCutAll,
    StopNode,
    StopWitness,
    KillGateway,
    StopGateway,
    TakeOver,
    Close,
    Recreate,
    CutGateway,
    CutNodes,
    CutControl,
    OneWay,
    Partition,
    IsolateLeader,
    Reset,
    SlowHost,
    SlowDisk,
    WriteErrors,
    PunchErrors,
    ReadErrors,
    NoSpace,
    SyncFails,
    NoQuorum,
    KillAll,
    BitFlips,
    LostWrites,
    Misdirected,
    LoseFiles,
    OldImage,
    /// What chance alone hardly ever brings together; scenarios show it, and seeds whose setup asks for it.
    Strand,
    Orphan,
}

impl Fault {
    pub const ALL: [Self; 32] = [
        Self::KillNode,
        Self::KillWitness,
        Self::PowerCut,
        Self::PowerCutAll,
        Self::StopNode,
        Self::StopWitness,
        Self::KillGateway,
        Self::StopGateway,
        Self::TakeOver,
        Self::Close,
        Self::Recreate,
        Self::CutGateway,
        Self::CutNodes,
        Self::CutControl,
        Self::OneWay,
        Self::Partition,
        Self::IsolateLeader,
        Self::Reset,
        Self::SlowHost,
        Self::SlowDisk,
        Self::WriteErrors,
        Self::PunchErrors,
        Self::ReadErrors,
        Self::NoSpace,
        Self::SyncFails,
        Self::NoQuorum,
        Self::KillAll,
        Self::BitFlips,
        Self::LostWrites,
        Self::Misdirected,
        Self::LoseFiles,
        Self::OldImage,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KillNode => "node killed",
            Self::KillWitness => "witness killed",
            Self::PowerCut => "power cut",
            Self::PowerCutAll => "power cut everywhere",
            Self::StopNode => "node stopped",
            Self::StopWitness => "witness stopped",
            Self::KillGateway => "gateway killed",
            Self::StopGateway => "gateway stopped",
            Self::TakeOver => "take-over",
            Self::Close => "close",
            Self::Recreate => "volume deleted and re-created",
            Self::CutGateway => "gateway cut off a node",
            Self::CutNodes => "nodes cut off each other",
            Self::CutControl => "gateway cut off the control plane",
            Self::OneWay => "one way cut",
            Self::Partition => "partition",
            Self::IsolateLeader => "leader isolated",
            Self::Reset => "connection reset",
            Self::SlowHost => "slow host",
            Self::SlowDisk => "slow disk",
            Self::WriteErrors => "write errors",
            Self::PunchErrors => "punch errors",
            Self::ReadErrors => "read errors",
            Self::NoSpace => "no space",
            Self::SyncFails => "sync fails",
            Self::NoQuorum => "no quorum",
            Self::KillAll => "killed everywhere",
            Self::BitFlips => "bits flipped at rest",
            Self::LostWrites => "lost writes",
            Self::Misdirected => "misdirected writes",
            Self::LoseFiles => "files of a replica lost",
            Self::OldImage => "old image of a replica",
            Self::Strand => "owner cut off with one node, and taken over",
            Self::Orphan => "take-over that reaches only nodes that have lost power",
        }
    }

    /// After these a disk may not have what was written to it.
    fn is_of_a_disk(self) -> bool {
        matches!(self, Self::WriteErrors | Self::PunchErrors | Self::ReadErrors | Self::NoSpace | Self::SyncFails)
    }
}

impl World {
    pub fn start_faults(&mut self) {
        self.faults_on = true;
        self.after(SECOND, Event::Fault);
    }

    pub(super) fn next_fault(&mut self) {
        if !self.faults_on || self.setup.faults.is_empty() {
            return;
        }
        let fault = self.rng.pick(&self.setup.faults.clone());
        if !self.is_held_back(fault) {
            self.counters.fault(fault.name());
            self.inject(fault);
        }
        let wait = self.rng.between(self.setup.fault_every / 10, 2 * self.setup.fault_every);
        self.after(wait, Event::Fault);
    }

    fn a_node(&mut self) -> usize {
        self.rng.below(self.nodes.len() as u64) as usize
    }

    fn a_gateway(&mut self) -> usize {
        // Most often the one that serves.
        let any = self.rng.below(self.gateways.len() as u64) as usize;
        self.operator.wanted.filter(|_| self.rng.chance(800)).unwrap_or(any)
    }

    /// How long something lasts: mostly short, sometimes longer than a lease.
    fn a_while(&mut self) -> u64 {
        let longest = self.rng.pick(&[300 * MS, 2 * SECOND, 12 * SECOND]);
        self.rng.between(50 * MS, longest)
    }

    fn kill_for_a_while(&mut self, node: usize, power: bool) {
        self.kill_node(node, power);
        let process = self.nodes[node].process;
        let wait = self.a_while();
        self.after(wait, Event::NodeStarts { node, process });
    }

    fn kill_gateway_for_a_while(&mut self, gateway: usize) {
        self.kill_gateway(gateway);
        let boot = self.gateways[gateway].boot;
        let wait = self.a_while();
        self.after(wait, Event::GatewayStarts { gateway, boot });
    }

    fn stop_for_a_while(&mut self, party: Party) {
        self.stop(party);
        let wait = self.a_while();
        self.after(wait, Event::Resume { party });
    }

    /// Nothing gets through between any of these and any of those.
    fn part(&mut self, these: &[Party], those: &[Party], both_ways: bool) {
        for a in these {
            for b in those {
                self.cut_for_a_while(*a, *b);
                if both_ways {
                    self.cut_for_a_while(*b, *a);
                }
            }
        }
    }

    fn all_members(&self) -> Vec<Party> {
        (0..self.members.len()).map(|m| self.member_party(m)).collect()
    }

    /// Every replica of the volume in every set, and its owner there and about to take none out, if it is not closed and
    /// clean; every process running, nothing cut, slow, or failing.
    fn is_whole(&self) -> bool {
        let Some(volume) = self.truth.living() else { return false };
        let in_sync = volume.mirrors.iter().all(|m| m.in_sync.members.len() == m.replicas.len());
        let mut sessions = self.gateways.iter().filter_map(|g| g.session(volume.id));
        let kept = match &volume.session.state {
            SessionState::Open { .. } => sessions.any(|s| {
                let replicas = || s.core.status().into_iter().flat_map(|m| m.replicas);
                s.epoch == volume.session.epoch && replicas().all(|r| r.standing == Standing::InSync)
            }),
            SessionState::Closed { clean, .. } => *clean,
            SessionState::Never => true,
        };
        in_sync
            && kept
            && volume.state == proto::cluster::VolumeState::Ready
            && self.volumes.last().is_some_and(|v| v.id == volume.id)
            && self.net.is_whole()
            && self.stopped.is_empty()
            && self.nodes.iter().all(|n| n.up && n.faults.is_none())
            && self.replicas.iter().all(|r| r.gone || r.is_open)
    }

    /// While a replica that has lost its files, or got old ones, comes back, nothing takes the others away: what an
    /// old image is worth can be told only beside another replica.
    fn is_held_back(&mut self, fault: Fault) -> bool {
        if let Some(until) = self.returning_until {
            let back = self.now > until + 90 * SECOND || self.now + 29 * SECOND > until && self.is_whole();
            if back {
                self.returning_until = None;
            }
        }
        // After a while they, too, let it come back.
        let gentle = [Fault::KillGateway, Fault::TakeOver, Fault::Close, Fault::Reset, Fault::SlowHost];
        self.returning_until.is_some_and(|until| self.now > until || !gentle.contains(&fault))
    }

    /// A replica of the current volume on the disk that fails in this run.
    fn a_bad_replica(&mut self) -> Option<usize> {
        let volume = self.volumes.last()?.id;
        let all = self.replicas_of(self.setup.bad_node);
        let all: Vec<usize> = all.into_iter().filter(|r| self.replicas[*r].volume == volume).collect();
        if all.is_empty() { None } else { Some(self.rng.pick(&all)) }
    }

    fn cut_for_a_while(&mut self, from: Party, to: Party) {
        let wait = self.a_while();
        self.cut_for(from, to, wait);
    }

    fn cut_for(&mut self, from: Party, to: Party, micros: u64) {
        self.log(|| format!("{from:?} does not reach {to:?} any more"));
        self.net.cut(from, to);
        self.after(micros, Event::Heal { from, to });
    }

    fn calm_in_a_while(&mut self, party: Party) {
        let wait = self.a_while();
        self.after(wait, Event::Calm { party });
    }

    pub fn inject(&mut self, fault: Fault) {
        let node = self.a_node();
        let gateway = self.a_gateway();
        let (n, g) = (Party::Node(node), Party::Gateway(gateway));
        self.log(|| format!("fault: {}", fault.name()));
        if fault.is_of_a_disk() {
            self.lose_trust();
        }
        match fault {
            Fault::KillNode => self.kill_for_a_while(node, false),
            Fault::PowerCut => self.kill_for_a_while(node, true),
            Fault::PowerCutAll => {
                let spared = self.rng.below(3 * self.nodes.len() as u64) as usize;
                for node in (0..self.nodes.len()).filter(|node| *node != spared) {
                    self.kill_for_a_while(node, true);
                }
            }
            Fault::StopNode => self.stop_for_a_while(n),
            Fault::KillWitness | Fault::StopWitness if self.setup.witnesses == 0 => {}
            Fault::KillWitness => {
                let witness = self.rng.below(self.setup.witnesses as u64) as usize;
                self.kill_witness(witness);
                let member = self.setup.nodes + witness;
                let life = self.members[member].life;
                let wait = self.a_while();
                self.after(wait, Event::WitnessStarts { member, life });
            }
            Fault::StopWitness => {
                let witness = self.rng.below(self.setup.witnesses as u64) as usize;
                self.stop_for_a_while(Party::Witness(witness));
            }
            Fault::KillGateway => {
                self.kill_gateway_for_a_while(gateway);
                if self.rng.chance(500) {
                    let other = self.rng.below(self.gateways.len() as u64) as usize;
                    let take_over = self.rng.chance(500);
                    self.want_on(other, take_over);
                }
            }
            Fault::StopGateway => {
                self.stop_for_a_while(g);
                if self.rng.chance(700) {
                    let take_over = self.rng.chance(700);
                    self.want_on((gateway + 1) % self.gateways.len(), take_over);
                }
            }
            Fault::TakeOver => self.want_on((gateway + 1) % self.gateways.len(), true),
            Fault::Close => {
                if !self.volumes.is_empty() {
                    self.close_session(gateway);
                }
                if self.rng.chance(300) {
                    self.want_on((gateway + 1) % self.gateways.len(), false);
                }
            }
            Fault::CutGateway => {
                self.cut_for_a_while(g, n);
                self.cut_for_a_while(n, g);
            }
            Fault::CutNodes => {
                let other = Party::Node((node + 1) % self.nodes.len());
                self.cut_for_a_while(n, other);
                self.cut_for_a_while(other, n);
            }
            Fault::CutControl => self.cut_for_a_while(g, Party::Control),
            Fault::OneWay => match self.rng.below(4) {
                0 => self.cut_for_a_while(g, n),
                1 => self.cut_for_a_while(n, g),
                2 => self.cut_for_a_while(n, Party::Node((node + 1) % self.nodes.len())),
                _ => self.cut_for_a_while(Party::Control, g),
            },
            Fault::Recreate => self.operator.recreate = true,
            Fault::Partition => {
                let gateways = (0..self.gateways.len()).map(Party::Gateway);
                let all: Vec<Party> = self.all_members().into_iter().chain(gateways).collect();
                let (these, those): (Vec<Party>, Vec<Party>) = all.into_iter().partition(|_| self.rng.chance(500));
                let both_ways = self.rng.chance(700);
                self.part(&these, &those, both_ways);
            }
            Fault::IsolateLeader => {
                let leaders = self.leaders();
                if !leaders.is_empty() {
                    let leader = self.rng.pick(&leaders);
                    let leader = self.member_party(leader);
                    let others: Vec<Party> = self.all_members().into_iter().filter(|p| *p != leader).collect();
                    let both_ways = self.rng.chance(700);
                    self.part(&[leader], &others, both_ways);
                }
            }
            Fault::Reset if self.volumes.is_empty() => {}
            Fault::Reset => self.reset_link(gateway, node),
            Fault::SlowHost => {
                self.net.slow.insert(n);
                self.calm_in_a_while(n);
            }
            Fault::SlowDisk => {
                self.nodes[node].faults.slow = self.rng.pick(&[10, 100]);
                self.calm_in_a_while(n);
            }
            Fault::WriteErrors => {
                self.nodes[node].faults.write_errors = self.rng.pick(&[20, 1000]);
                self.calm_in_a_while(n);
            }
            Fault::PunchErrors => {
                self.nodes[node].faults.punch_errors = self.rng.pick(&[100, 1000]);
                self.calm_in_a_while(n);
            }
            Fault::ReadErrors => {
                self.distrust_all(node);
                self.nodes[node].faults.read_errors = self.rng.pick(&[20, 1000]);
                self.calm_in_a_while(n);
            }
            Fault::NoSpace => {
                self.nodes[node].faults.full = true;
                self.calm_in_a_while(n);
            }
            Fault::SyncFails => self.nodes[node].faults.fail_sync = true,
            Fault::KillAll => {
                for node in 0..self.nodes.len() {
                    self.kill_for_a_while(node, false);
                }
                for gateway in 0..self.gateways.len() {
                    self.kill_gateway_for_a_while(gateway);
                }
            }
            Fault::NoQuorum => {
                let all = self.all_members();
                for i in 0..all.len() {
                    self.part(&all[i..=i], &all[i + 1..], true);
                }
            }
            Fault::Strand => {
                let gateways = (0..self.gateways.len()).map(Party::Gateway);
                let all = self.all_members().into_iter().chain(gateways).chain([Party::Control]);
                let others: Vec<Party> = all.filter(|party| ![n, g].contains(party)).collect();
                let wait = self.rng.between(3, 12) * SECOND;
                for (here, there) in others.iter().flat_map(|other| [(n, *other), (g, *other)]) {
                    self.cut_for(here, there, wait);
                    self.cut_for(there, here, wait);
                }
                self.want_on((gateway + 1) % self.gateways.len(), true);
            }
            Fault::Orphan => {
                let other = (gateway + 1) % self.gateways.len();
                let wait = self.rng.pick(&[12, 30]);
                let wait = self.rng.between(6, wait) * SECOND;
                self.cut_for(n, Party::Gateway(other), wait);
                self.cut_for(Party::Gateway(other), n, wait);
                self.kill_gateway_for_a_while(gateway);
                for node in (0..self.nodes.len()).filter(|at| *at != node) {
                    self.kill_node(node, true);
                    let process = self.nodes[node].process;
                    let wait = self.rng.between(50 * MS, SECOND);
                    self.after(wait, Event::NodeStarts { node, process });
                }
                self.want_on(other, true);
            }
            Fault::BitFlips => {
                for _ in 0..self.rng.between(1, 12) {
                    let Some(replica) = self.a_bad_replica() else { return };
                    let page = self.rng.below(self.replicas[replica].blocks);
                    self.flip_bit(replica, page);
                }
            }
            Fault::LostWrites => {
                self.nodes[self.setup.bad_node].faults.lost_writes = self.rng.pick(&[10, 200]);
                self.calm_in_a_while(Party::Node(self.setup.bad_node));
            }
            Fault::Misdirected => {
                self.nodes[self.setup.bad_node].faults.misdirected = self.rng.pick(&[10, 200]);
                self.calm_in_a_while(Party::Node(self.setup.bad_node));
            }
            Fault::LoseFiles | Fault::OldImage if self.setup.replicas < 2 => {}
            Fault::LoseFiles => {
                if let Some(replica) = self.a_bad_replica().filter(|_| self.is_whole()) {
                    self.kill_for_a_while(self.setup.bad_node, true);
                    self.lose_files(replica);
                    self.returning_until = Some(self.now + 30 * SECOND);
                }
            }
            Fault::OldImage => {
                let node = self.setup.bad_node;
                let ours = self.replicas_of(node);
                let has = |r: &usize| self.replicas[*r].image.is_some();
                if ours.iter().any(has) && self.rng.chance(500) {
                    if self.is_whole() {
                        self.kill_for_a_while(node, true);
                        self.restore_images(node);
                        self.returning_until = Some(self.now + 30 * SECOND);
                    }
                } else {
                    self.copy_images(node);
                }
            }
        }
    }

    /// A bit of a block at rest flips; whether there was one.
    pub fn flip_bit(&mut self, replica: usize, page: u64) -> bool {
        let flipped = self.replicas[replica].disk.data.flip(page, PAGE as usize, &mut self.rng);
        if flipped {
            self.counters.spoiled += 1;
            self.spoiled(replica, page);
        }
        flipped
    }

    /// Somebody copies the files of a node's replicas, as they are on the medium.
    pub fn copy_images(&mut self, node: usize) {
        self.log(|| format!("the replicas of node {node} are copied"));
        for replica in self.replicas_of(node) {
            let r = &mut self.replicas[replica];
            if r.is_open {
                let mut watched = r.watched.clone();
                watched.lost_at = 0;
                r.image = Some((r.disk.durable_copy(), watched));
            }
        }
    }

    /// The copies are put in place of the files; the process must be down.
    ///
    /// # Panics
    /// If it is not.
    pub fn restore_images(&mut self, node: usize) {
        assert!(self.nodes[node].is_down(), "files are restored under a running process");
        self.lose_trust();
        for replica in self.replicas_of(node) {
            let now = self.moment();
            let r = &mut self.replicas[replica];
            if let Some((disk, watched)) = r.image.clone() {
                (r.disk, r.watched) = (disk, watched);
                // Other files have another inode.
                r.era += 1;
                (r.watched.old, r.watched.lost_at) = (true, now);
                self.log(|| format!("replica {replica} gets an old image"));
                self.cache_lost(replica);
            }
        }
    }

    pub(super) fn calm(&mut self, party: Party) {
        self.log(|| format!("{party:?} is well again"));
        if let Party::Node(node) = party {
            self.nodes[node].faults = DiskFaults::default();
            self.net.slow.remove(&party);
        }
    }

    /// Everything is well from here on: all processes run, everybody reaches everybody.
    pub fn heal(&mut self) {
        self.log(|| "everything heals".to_owned());
        (self.faults_on, self.healed) = (false, true);
        self.net.heal_all();
        self.stir_network();
        for node in 0..self.nodes.len() {
            self.calm(Party::Node(node));
        }
        self.resume_all();
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_down() {
                self.start_node(node);
            }
        }
        for member in self.setup.nodes..self.members.len() {
            if self.members[member].is_down() {
                self.start_member(member);
            }
        }
        for gateway in 0..self.gateways.len() {
            if !self.gateways[gateway].alive {
                self.start_gateway(gateway);
            }
        }
        let owner = self.operator.wanted.unwrap_or(0);
        let others = self.gateways.iter().enumerate().any(|(i, g)| i != owner && g.has_sessions());
        self.want_on(owner, others);
    }
}
