//! The world of one run: processes, network, disks and time.
//!
//! # Injected
//!
//! - Network: delays with long tails, slow hosts, reordering between connections, connections that are reset (what
//!   was sent last is lost), cuts in one or both directions between any two hosts or sets of hosts (what was sent on a
//!   connection arrives after the cut has healed, however late), refused and unanswered dials. What members say to each
//!   other, and what they are asked, is lost, late by up to 0.8 s, out of order and doubled.
//! - Processes: kill -9 (the page cache stays; what was given to the disk ends, or not, before the next process
//!   begins; of what a voter's log was writing all or nothing is there), stops longer than the lease, clocks whose
//!   rates differ by up to 1 %, take-overs of a live session, gateways that come back under their name, closes and
//!   re-openings; nodes and witnesses alike.
//! - Hosts: power cuts of one, several or all nodes: of every page written since its last sync any version may
//!   remain, or sectors of several.
//! - Disks: operations that end in any order, take effect at their beginning or their end, are slow; failing reads
//!   and writes (what a failed write leaves is open), no space, failing syncs (the cache is lost with them). On one
//!   node a run: bits of data that flip at rest, writes of data that the disk says it has and drops or puts
//!   elsewhere, the loss of a replica's files, and their return as they were some time ago.
//! - Control plane: voters cut off, isolated leaders, no quorum for a while; requests and answers lost or late, and
//!   asked again; views that are old.
//! - Initiators: overlapping requests, parts of blocks, aborts. The operator: moves the volume, deletes it and makes
//!   another one of its name on its space.
//!
//! # Withheld, because no correct cluster could survive it, or because what would is not there yet
//!
//! - Silent damage (flips, lost and misdirected writes) on two copies of a block at once: with sums that fail
//!   everywhere nobody knows what was there. So it is one node's disks, the same for a whole run. Where other copies
//!   of such a block can't be read at all and its region is dirty, the replica is taken for right as R7 says; nothing
//!   is claimed of the block from there on. Nor where such a disk drops a write whose sum a killed process had not
//!   written yet: what is left matches its sum, as a replica's does that never got the write.
//! - Silent damage of metadata: its pages have sums against bits that flip, which are tried elsewhere (`replica`'s own
//!   tests, a scenario), but a write of a dirty bit, a superblock or a map page that the disk says it has and drops
//!   leaves an older page that is whole: R5, R1 and R10 rest on the disk's word there.
//! - The return of a replica's old files, or their loss, while another replica is missing, and losses of the others
//!   until it has been told: an old image can be known only beside a newer replica (R6).
//! - Voters restored from an old image: a quorum of them has forgotten what it promised. R8 says what to do about the
//!   replicas, and a scenario shows it.
//! - Acknowledged and unflushed writes may be lost with all caches of a mirror where the session that acknowledged them
//!   has ended: the history of that mirror's blocks may go back to what was flushed, once for every POWER ON. Nothing
//!   else excuses it (R9).
//! - Failing reads of a volume with one replica: a medium error is all that is left.
//! - A punch that fails together with the zeroes that are then written in its stead: the replica's map has the
//!   blocks for zeroes already, and a later write that fails shows what is left there (an open fault, seed 600266).
//! - Nobody runs two processes of one gateway's name, or of one node, at a time.
//!
//! # Not in the product yet, and so not here
//!
//! Growing a volume, replacing or moving a replica, changing the voters: there is no command for any of them.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use client::volume::SessionOutput;
use node::control::core::{Input as MemberInput, Reply as ControlReply};
use node::replica::{OpId, Output as ReplicaOutput};
use proto::cluster::{ClusterDefinition, ClusterView, Refusal};
use proto::id::{AttachId, ClusterId, ReplicaId, VolumeId};
use raft::prelude::Message;
use uuid::Uuid;

use super::ask::{Ask, OPERATOR_TICK};
use super::checker::Checker;
use super::faults::Fault;
use super::gateway::Gateway;
use super::net::{Net, Packet, Party, Way};
use super::node::{Node, Replica};
use super::operator::Operator;
use super::rng::Rng;
use super::volume::Volume;
use super::voter::{Member, Truth, definition};
use super::work::Work;

/// Microseconds in a millisecond.
pub const MS: u64 = 1000;
/// Microseconds in a second.
pub const SECOND: u64 = 1000 * MS;

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub nodes: usize,
    pub witnesses: usize,
    pub gateways: usize,
    /// Of the volume.
    pub blocks: u64,
    pub chunk_blocks: u64,
    /// Mirrors.
    pub stripes: usize,
    /// Of each mirror.
    pub replicas: usize,
    pub write_cache: bool,
    pub min_in_sync: usize,
    /// What a node's pool takes.
    pub pool_bytes: u64,
    /// Requests that initiators send before the faults end.
    pub ops: u64,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// Mean time between faults, in microseconds.
    pub fault_every: u64,
    /// They begin before the volume is there.
    pub faults_at_once: bool,
    /// The node whose disks damage data without a word, and lose files.
    pub bad_node: usize,
    /// Clock rates are within this many parts per thousand of true time.
    pub drift_permille: u64,
    pub trace: bool,
}

impl Setup {
    /// What a seed stands for. Each run has some of the faults only: together they hide one another.
    pub fn of_seed(seed: u64, ops: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5e7u64 << 32);
        let faults: Vec<Fault> = Fault::ALL.into_iter().filter(|_| rng.chance(300)).collect();
        let nodes: usize = if rng.chance(700) { 3 } else { rng.pick(&[4, 5]) };
        let blocks = rng.between(200, 900);
        let stripes = rng.pick(&[1, 1, 2, 3]);
        let chunk_blocks = rng.pick(&[16, 64, 256]);
        Self {
            seed,
            nodes,
            // At most five vote.
            witnesses: if rng.chance(850) { 5 - nodes } else { 0 },
            gateways: 2,
            blocks,
            chunk_blocks,
            stripes,
            replicas: if rng.chance(850) { 3 } else { rng.pick(&[1, 2, nodes]) },
            write_cache: rng.chance(850),
            min_in_sync: if rng.chance(850) { 1 } else { 2 },
            // Most often not for a second volume before the first is gone.
            pool_bytes: (blocks + chunk_blocks * stripes as u64) * 4096 * rng.pick(&[1, 1, 3]),
            ops,
            faults,
            fault_every: rng.pick(&[300 * MS, SECOND, 4 * SECOND]),
            faults_at_once: rng.chance(150),
            bad_node: rng.below(nodes as u64) as usize,
            drift_permille: rng.below(5),
            trace: false,
        }
        .possible()
    }

    /// A quiet cluster of three nodes for a scenario.
    pub fn quiet(seed: u64) -> Self {
        Self {
            seed,
            nodes: 3,
            witnesses: 2,
            gateways: 2,
            blocks: 700,
            chunk_blocks: 64,
            stripes: 1,
            replicas: 3,
            write_cache: true,
            min_in_sync: 1,
            pool_bytes: 64 << 20,
            ops: 0,
            faults: Vec::new(),
            fault_every: SECOND,
            faults_at_once: false,
            bad_node: 0,
            drift_permille: 0,
            trace: false,
        }
    }

    fn possible(mut self) -> Self {
        self.min_in_sync = self.min_in_sync.min(self.replicas);
        if self.replicas == 1 {
            self.faults.retain(|fault| *fault != Fault::ReadErrors);
        }
        self
    }
}

/// What happens at a moment. `boot`, `process` and `life` number processes: what was meant for one that is gone is
/// dropped.
#[derive(Clone, Debug, Hash)]
pub enum Event {
    Deliver {
        conn: u64,
        way: Way,
    },
    DiskEnds {
        replica: usize,
        boot: u32,
        op: u64,
    },
    ReplicaOpens {
        replica: usize,
        boot: u32,
    },
    NodeTick {
        node: usize,
        process: u32,
    },
    NodeStarts {
        node: usize,
        process: u32,
    },
    Agent {
        node: usize,
        process: u32,
    },
    CopyLate {
        node: usize,
        process: u32,
        tag: u64,
    },
    PeerDialled {
        node: usize,
        process: u32,
        peer: usize,
        volume: VolumeId,
        reached: bool,
    },
    MemberTick {
        member: usize,
        life: u32,
    },
    LogWritten {
        member: usize,
        life: u32,
    },
    RaftArrives {
        message: u64,
        to: usize,
        life: u32,
    },
    Unreachable {
        member: usize,
        to: u64,
    },
    SnapshotSent {
        member: usize,
        to: u64,
        arrived: bool,
    },
    WitnessStarts {
        member: usize,
        life: u32,
    },
    GatewayTick {
        gateway: usize,
        boot: u32,
    },
    GatewayStarts {
        gateway: usize,
        boot: u32,
    },
    Follow {
        gateway: usize,
        boot: u32,
    },
    ViewArrives {
        gateway: usize,
        boot: u32,
        view: u64,
    },
    Dialled {
        gateway: usize,
        volume: VolumeId,
        session: u64,
        node: usize,
        reached: bool,
    },
    AskArrives {
        ask: u64,
        attempt: u32,
    },
    AnswerArrives {
        ask: u64,
        attempt: u32,
        answer: u64,
    },
    AskAgain {
        ask: u64,
        attempt: u32,
    },
    TryElsewhere {
        ask: u64,
        attempt: u32,
    },
    Operator,
    Client {
        client: usize,
    },
    Abort {
        client: usize,
        number: u32,
    },
    Resume {
        party: Party,
    },
    Heal {
        from: Party,
        to: Party,
    },
    Calm {
        party: Party,
    },
    Fault,
    /// For scenarios: nothing happens, but a wait ends.
    Alarm,
}

/// What was injected and done, for the summary.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub faults: BTreeMap<&'static str, u64>,
    pub events: u64,
    pub sessions: u64,
    pub lost: u64,
    pub set_changes: u64,
    pub joins: u64,
    pub power_ons: u64,
    pub recovers: u64,
    pub late_copies: u64,
    pub held_replies: u64,
    pub copied_bytes: u64,
    pub restamped: u64,
    pub completed: u64,
    pub unanswered: u64,
    pub medium: u64,
    pub aborted: u64,
    pub failed_writes: u64,
    /// Blocks that a disk damaged without a word, and those of which nothing could be claimed after it.
    pub spoiled: u64,
    pub given_up: u64,
    pub recreated: u64,
    /// Sessions that were refused because the metadata are an old image.
    pub refusing: u64,
    /// Raft terms.
    pub terms: u64,
}

impl Counters {
    pub fn fault(&mut self, name: &'static str) {
        *self.faults.entry(name).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (name, n) in &other.faults {
            *self.faults.entry(name).or_default() += n;
        }
        let pairs = [
            (&mut self.events, other.events),
            (&mut self.sessions, other.sessions),
            (&mut self.lost, other.lost),
            (&mut self.set_changes, other.set_changes),
            (&mut self.joins, other.joins),
            (&mut self.power_ons, other.power_ons),
            (&mut self.recovers, other.recovers),
            (&mut self.late_copies, other.late_copies),
            (&mut self.held_replies, other.held_replies),
            (&mut self.copied_bytes, other.copied_bytes),
            (&mut self.restamped, other.restamped),
            (&mut self.completed, other.completed),
            (&mut self.unanswered, other.unanswered),
            (&mut self.medium, other.medium),
            (&mut self.aborted, other.aborted),
            (&mut self.failed_writes, other.failed_writes),
            (&mut self.spoiled, other.spoiled),
            (&mut self.given_up, other.given_up),
            (&mut self.recreated, other.recreated),
            (&mut self.refusing, other.refusing),
            (&mut self.terms, other.terms),
        ];
        for (mine, theirs) in pairs {
            *mine += theirs;
        }
    }
}

/// See the module.
pub struct World {
    pub setup: Setup,
    pub(super) rng: Rng,
    pub now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    pub(super) net: Net,
    pub nodes: Vec<Node>,
    /// Nodes' votes first, then witnesses'.
    pub members: Vec<Member>,
    pub gateways: Vec<Gateway>,
    pub replicas: Vec<Replica>,
    pub(super) replica_at: BTreeMap<ReplicaId, usize>,
    pub volumes: Vec<Volume>,
    pub(super) operator: Operator,
    pub(super) definition: ClusterDefinition,
    pub truth: Truth,
    /// What members had applied at some indices.
    pub(super) hashes: BTreeMap<u64, [u8; 32]>,
    /// Voters got old logs back: nothing is claimed of raft any more, only of the data.
    pub voters_restored: bool,
    /// So far no disk has lost anything: processes were killed at most, and then nothing acknowledged may be missing.
    pub(super) lossless: bool,
    /// A replica is coming back of which nobody must be left alone with before this.
    pub(super) returning_until: Option<u64>,
    /// Stopped processes, and what waits for them.
    pub(super) stopped: BTreeMap<Party, VecDeque<Event>>,
    /// Rates of the processes' clocks, in parts per million off true time.
    pub(super) drift: BTreeMap<Party, i64>,
    pub(super) asks: BTreeMap<u64, Ask>,
    pub(super) next_ask: u64,
    /// What is on its way.
    pub(super) messages: BTreeMap<u64, Message>,
    pub(super) next_message: u64,
    pub(super) answers: BTreeMap<u64, Result<ControlReply, Refusal>>,
    pub(super) views: BTreeMap<u64, Arc<ClusterView>>,
    pub(super) next_answer: u64,
    pub(super) work: Work,
    pub(super) moments: u64,
    /// By volume and mirror: who is to be in the set that was proposed last, and its attach then.
    pub(super) proposed: BTreeMap<(VolumeId, usize), Vec<(ReplicaId, AttachId)>>,
    /// Regions that have just become clean on a replica.
    pub(super) cleaned: Vec<(VolumeId, usize, u64)>,
    pub counters: Counters,
    pub(super) faults_on: bool,
    pub(super) healed: bool,
    pub(super) scratch: Vec<ReplicaOutput>,
    pub(super) session_scratch: Vec<SessionOutput>,
    /// Folded over every event.
    digest: u64,
    failure: Option<(Checker, String)>,
}

/// FNV-1a: stable over versions, unlike the standard library's.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

pub fn cluster_id() -> ClusterId {
    ClusterId(Uuid::from_u128(0xcc))
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let mut rng = Rng::new(setup.seed);
        let range = setup.drift_permille * 1000;
        let parties = (0..setup.nodes).map(Party::Node).chain((0..setup.witnesses).map(Party::Witness));
        let parties = parties.chain((0..setup.gateways).map(Party::Gateway));
        let drift = parties.map(|p| (p, rng.between(0, 2 * range) as i64 - range as i64)).collect();
        let mut world = Self {
            rng,
            now: 0,
            queue: BTreeMap::new(),
            queued: 0,
            net: Net::default(),
            nodes: (0..setup.nodes).map(|_| Node::default()).collect(),
            members: (0..setup.nodes + setup.witnesses).map(|_| Member::default()).collect(),
            gateways: (0..setup.gateways).map(|_| Gateway::default()).collect(),
            replicas: Vec::new(),
            replica_at: BTreeMap::new(),
            volumes: Vec::new(),
            operator: Operator::default(),
            definition: definition(&setup),
            truth: Truth::default(),
            hashes: BTreeMap::new(),
            voters_restored: false,
            stopped: BTreeMap::new(),
            drift,
            asks: BTreeMap::new(),
            next_ask: 0,
            messages: BTreeMap::new(),
            next_message: 0,
            answers: BTreeMap::new(),
            views: BTreeMap::new(),
            next_answer: 0,
            work: Work::new(&setup),
            moments: 0,
            proposed: BTreeMap::new(),
            cleaned: Vec::new(),
            counters: Counters::default(),
            faults_on: false,
            lossless: true,
            returning_until: None,
            healed: false,
            scratch: Vec::new(),
            session_scratch: Vec::new(),
            digest: 0xcbf2_9ce4_8422_2325,
            failure: None,
            setup,
        };
        for node in 0..world.nodes.len() {
            world.start_node(node);
        }
        for member in world.nodes.len()..world.members.len() {
            world.start_member(member);
        }
        for gateway in 0..world.gateways.len() {
            world.start_gateway(gateway);
        }
        world.after(OPERATOR_TICK, Event::Operator);
        world.start_clients();
        world
    }

    pub fn seconds(&self) -> u64 {
        self.now / SECOND
    }

    pub fn digest(&self) -> u64 {
        self.digest
    }

    pub fn failure(&self) -> Option<&(Checker, String)> {
        self.failure.as_ref()
    }

    /// Something is wrong that must never be; the first one counts.
    pub(super) fn fail(&mut self, checker: Checker, what: String) {
        self.log(|| format!("FAILED: {checker:?}: {what}"));
        let what = format!("at {}.{:06} s: {what}", self.now / SECOND, self.now % SECOND);
        self.failure.get_or_insert((checker, what));
    }

    pub(super) fn log(&self, line: impl FnOnce() -> String) {
        if self.setup.trace {
            println!("{:>4}.{:06} {}", self.now / SECOND, self.now % SECOND, line());
        }
    }

    pub(super) fn fold(&mut self, what: &impl Hash) {
        let mut fnv = Fnv(self.digest);
        what.hash(&mut fnv);
        self.digest = fnv.0;
    }

    /// A process's own clock, in milliseconds.
    pub(super) fn clock(&self, party: Party) -> u64 {
        let drift = self.drift.get(&party).copied().unwrap_or_default();
        let here = self.now as i128 * (1_000_000 + drift as i128) / 1_000_000;
        // Clocks do not begin at the same number either.
        let offset = match party {
            Party::Gateway(i) => 1_000 * (i as u64 + 1),
            Party::Node(i) => 500_000 * (i as u64 + 1),
            Party::Witness(i) => 700_000 * (i as u64 + 1),
            Party::Control | Party::Operator => 0,
        };
        here as u64 / MS + offset
    }

    pub(super) fn schedule(&mut self, at: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((at.max(self.now), self.queued), event);
    }

    pub(super) fn after(&mut self, micros: u64, event: Event) {
        self.schedule(self.now + micros, event);
    }

    pub(super) fn stop(&mut self, party: Party) {
        self.log(|| format!("{party:?} is stopped"));
        self.stopped.entry(party).or_default();
    }

    pub(super) fn resume(&mut self, party: Party) {
        let Some(waiting) = self.stopped.remove(&party) else { return };
        self.log(|| format!("{party:?} goes on"));
        for event in waiting {
            self.happen(event);
        }
    }

    /// A process that dies is stopped no more, and what waited for it is gone.
    pub(super) fn unstop(&mut self, party: Party) {
        if let Some(waiting) = self.stopped.remove(&party) {
            // Packets are the connections' and are looked at again when these are closed.
            drop(waiting);
        }
    }

    pub(super) fn resume_all(&mut self) {
        let all: Vec<Party> = self.stopped.keys().copied().collect();
        for party in all {
            self.resume(party);
        }
    }

    pub(super) fn send(&mut self, conn: u64, way: Way, packet: Packet) {
        if let Some(at) = self.net.send(self.now, conn, way, packet, &mut self.rng) {
            self.schedule(at, Event::Deliver { conn, way });
        }
    }

    pub(super) fn close(&mut self, conn: u64, way_out: Way, reset: bool) {
        if let Some(at) = self.net.close(self.now, conn, way_out, reset, &mut self.rng) {
            self.schedule(at, Event::Deliver { conn, way: way_out });
        }
    }

    /// What waited for a cut to heal is on its way again.
    pub(super) fn stir_network(&mut self) {
        for (conn, way, n) in self.net.waiting() {
            for _ in 0..n {
                let delay = self.rng.between(20, 2_000);
                self.after(delay, Event::Deliver { conn, way });
            }
        }
    }

    /// Lets the next event happen; false when there is none, or something has failed.
    pub fn step(&mut self) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let Some(((at, _), event)) = self.queue.pop_first() else { return false };
        self.now = at;
        self.counters.events += 1;
        self.happen(event);
        true
    }

    /// Lets events happen until `done` says so, `micros` at most; whether it did.
    pub fn run_until(&mut self, micros: u64, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.now + micros;
        self.schedule(end, Event::Alarm);
        loop {
            if done(self) {
                return true;
            }
            if self.now >= end || !self.step() {
                return false;
            }
        }
    }

    /// Lets so much time pass.
    pub fn run_for(&mut self, micros: u64) {
        self.run_until(micros, |_| false);
    }

    /// The process that must run for this to happen to it.
    fn concerns(&self, event: &Event) -> Option<Party> {
        Some(match event {
            Event::Deliver { conn, way } => self.net.conn(*conn)?.ends(*way).1,
            Event::DiskEnds { replica, .. } | Event::ReplicaOpens { replica, .. } => {
                Party::Node(self.replicas[*replica].node)
            }
            Event::NodeTick { node, .. }
            | Event::Agent { node, .. }
            | Event::CopyLate { node, .. }
            | Event::PeerDialled { node, .. } => Party::Node(*node),
            Event::MemberTick { member, .. }
            | Event::LogWritten { member, .. }
            | Event::Unreachable { member, .. }
            | Event::SnapshotSent { member, .. }
            | Event::RaftArrives { to: member, .. } => self.member_party(*member),
            Event::GatewayTick { gateway, .. }
            | Event::Follow { gateway, .. }
            | Event::ViewArrives { gateway, .. }
            | Event::Dialled { gateway, .. } => Party::Gateway(*gateway),
            Event::AskArrives { ask, .. } => self.member_party(self.asks.get(ask)?.member),
            Event::AnswerArrives { ask, .. } | Event::AskAgain { ask, .. } | Event::TryElsewhere { ask, .. } => {
                self.asks.get(ask)?.from
            }
            _ => return None,
        })
    }

    fn happen(&mut self, event: Event) {
        if let Some(party) = self.concerns(&event)
            && let Some(waiting) = self.stopped.get_mut(&party)
        {
            waiting.push_back(event);
            return;
        }
        let now = self.now;
        self.fold(&(now, &event));
        match event {
            Event::Deliver { conn, way } => self.deliver(conn, way),
            Event::DiskEnds { replica, boot, op } => self.disk_ends(replica, boot, OpId(op)),
            Event::ReplicaOpens { replica, boot } => self.replica_opens(replica, boot),
            Event::NodeTick { node, process } => self.node_tick(node, process),
            Event::NodeStarts { node, process } => {
                if self.nodes[node].process == process && self.nodes[node].is_down() {
                    self.start_node(node);
                }
            }
            Event::Agent { node, process } => self.agent(node, process),
            Event::CopyLate { node, process, tag } => self.copy_late(node, process, tag),
            Event::PeerDialled { node, process, peer, volume, reached } => {
                self.peer_dialled(node, process, peer, volume, reached);
            }
            Event::MemberTick { member, life } => self.member_tick(member, life),
            Event::LogWritten { member, life } => self.log_written(member, life),
            Event::RaftArrives { message, to, life } => self.raft_arrives(message, to, life),
            Event::Unreachable { member, to } => self.member_step(member, MemberInput::Unreachable(to)),
            Event::SnapshotSent { member, to, arrived } => {
                self.member_step(member, MemberInput::SnapshotSent(to, arrived));
            }
            Event::WitnessStarts { member, life } => {
                if self.members[member].life == life && self.members[member].is_down() {
                    self.start_member(member);
                }
            }
            Event::GatewayTick { gateway, boot } => self.gateway_tick(gateway, boot),
            Event::GatewayStarts { gateway, boot } => {
                if self.gateways[gateway].boot == boot && !self.gateways[gateway].alive {
                    self.start_gateway(gateway);
                }
            }
            Event::Follow { gateway, boot } => self.follow(gateway, boot),
            Event::ViewArrives { gateway, boot, view } => self.view_arrives(gateway, boot, view),
            Event::Dialled { gateway, volume, session, node, reached } => {
                self.dialled(gateway, volume, session, node, reached);
            }
            Event::AskArrives { ask, attempt } => self.ask_arrives(ask, attempt),
            Event::AnswerArrives { ask, attempt, answer } => self.answer_arrives(ask, attempt, answer),
            Event::AskAgain { ask, attempt } => self.ask_again(ask, attempt),
            Event::TryElsewhere { ask, attempt } => self.try_elsewhere(ask, attempt),
            Event::Operator => self.operator(),
            Event::Client { client } => self.client(client),
            Event::Abort { client, number } => self.abort(client, number),
            Event::Resume { party } => self.resume(party),
            Event::Heal { from, to } => {
                self.net.heal(from, to);
                self.log(|| format!("{from:?} reaches {to:?} again"));
                self.stir_network();
            }
            Event::Calm { party } => self.calm(party),
            Event::Fault => self.next_fault(),
            Event::Alarm => {}
        }
        self.check_continuously();
    }

    fn deliver(&mut self, conn: u64, way: Way) {
        let Some((_, to)) = self.net.conn(conn).map(|c| c.ends(way)) else { return };
        let Some(packet) = self.net.receive(conn, way) else { return };
        match to {
            Party::Node(node) => self.node_receives(node, conn, way, packet),
            Party::Gateway(gateway) => self.gateway_receives(gateway, conn, packet),
            other => unreachable!("{other:?} is asked, not connected to"),
        }
    }
}
