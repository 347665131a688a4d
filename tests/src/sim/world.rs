//! The world of one run: processes, network, disks and time.
//!
//! # Injected
//!
//! - Network: delays with long tails, slow hosts, reordering between connections, connections that are reset (what
//!   was sent last is lost), cuts in one or both directions between any two hosts (what was sent arrives after the
//!   cut has healed, however late), refused and unanswered dials.
//! - Processes: kill -9 (the page cache stays; what was given to the disk ends, or not, before the next process
//!   begins), stops longer than the lease, clocks whose rates differ by up to 1 %, take-overs of a live session,
//!   gateways that come back under their name, closes and re-openings.
//! - Hosts: power cuts of one, several or all nodes: of every page written since its last sync any version may
//!   remain, or sectors of several.
//! - Disks: operations that end in any order, take effect at their beginning or their end, are slow; failing reads
//!   and writes (what a failed write leaves is open), no space, failing syncs (the cache is lost with them).
//! - Control plane: no quorum for a while; requests and answers lost or late, and asked again.
//! - Initiators: overlapping requests, aborts.
//!
//! # Withheld, because no correct cluster could survive it, or because its rule comes with a later issue
//!
//! - A replica whose files are gone or old; bits that flip at rest; lost and misdirected writes.
//! - Voters restored from an old image; raft itself, which are simulated on their own (`node/tests/control_sim.rs`).
//! - Acknowledged and unflushed writes survive the loss of all caches only with R9's replay buffer, which comes
//!   later: until then the history may go back to what was flushed, once for every POWER ON.
//! - A punch that fails together with the zeroes that are then written in its stead: the replica's map has the
//!   blocks for zeroes already, and a later write that fails shows what is left there (an open fault, seed 600266).
//! - Disks that refuse writes, where writes wait for a second replica in sync: a block that a refused write broke is
//!   to be written again before a replica joins, and can't be (an open fault, seed 50504).
//! - Nobody runs two processes of one gateway's name, or of one node, at a time.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{Hash, Hasher};

use node::replica::layout::Layout;
use node::replica::{OpId, ReplicaIds};
use proto::id::{ClusterId, MirrorId, NodeId, ReplicaId, VolumeId};
use uuid::Uuid;

use super::control::{Answer, Ask, Control};
use super::faults::Fault;
use super::gateway::Gateway;
use super::history::History;
use super::invariants::Invariants;
use super::net::{Net, Packet, Party, Way};
use super::node::Node;
use super::rng::Rng;
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
    pub gateways: usize,
    pub blocks: u64,
    pub chunk_blocks: u64,
    pub write_cache: bool,
    pub min_in_sync: usize,
    /// Requests that initiators send before the faults end.
    pub ops: u64,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// Mean time between faults, in microseconds.
    pub fault_every: u64,
    /// Clock rates are within this many parts per thousand of true time.
    pub drift_permille: u64,
    pub trace: bool,
}

impl Setup {
    /// What a seed stands for. Each run has some of the faults only: together they hide one another.
    pub fn of_seed(seed: u64, ops: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5e7u64 << 32);
        let faults: Vec<Fault> = Fault::ALL.into_iter().filter(|_| rng.chance(350)).collect();
        let refusing = faults.iter().any(|f| matches!(f, Fault::WriteErrors | Fault::NoSpace));
        Self {
            seed,
            nodes: if rng.chance(850) { 3 } else { rng.pick(&[1, 2, 4, 5]) },
            gateways: 2,
            blocks: rng.between(200, 900),
            chunk_blocks: rng.pick(&[16, 64, 256]),
            write_cache: rng.chance(850),
            min_in_sync: if rng.chance(850) || refusing { 1 } else { 2 },
            ops,
            faults,
            fault_every: rng.pick(&[300 * MS, SECOND, 4 * SECOND]),
            drift_permille: rng.below(5),
            trace: false,
        }
    }

    /// A quiet cluster of three nodes for a scenario.
    pub fn quiet(seed: u64) -> Self {
        Self {
            seed,
            nodes: 3,
            gateways: 2,
            blocks: 700,
            chunk_blocks: 64,
            write_cache: true,
            min_in_sync: 1,
            ops: 0,
            faults: Vec::new(),
            fault_every: SECOND,
            drift_permille: 0,
            trace: false,
        }
    }
}

/// What happens at a moment. `boot` numbers a process: what was meant for one that is gone is dropped.
#[derive(Clone, Debug, Hash)]
pub enum Event {
    Deliver {
        conn: u64,
        way: Way,
    },
    DiskEnds {
        node: usize,
        boot: u32,
        op: u64,
    },
    NodeTick {
        node: usize,
        process: u32,
    },
    NodeStarts {
        node: usize,
        boot: u32,
    },
    CopyLate {
        node: usize,
        boot: u32,
        token: u64,
    },
    PeerDialled {
        node: usize,
        boot: u32,
        peer: usize,
        reached: bool,
    },
    GatewayTick {
        gateway: usize,
        boot: u32,
    },
    GatewayStarts {
        gateway: usize,
        boot: u32,
    },
    Dialled {
        gateway: usize,
        session: u64,
        node: usize,
        reached: bool,
    },
    AskArrives {
        gateway: usize,
        boot: u32,
        id: u64,
    },
    AnswerArrives {
        gateway: usize,
        boot: u32,
        id: u64,
        at: usize,
    },
    AskAgain {
        gateway: usize,
        boot: u32,
        id: u64,
    },
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

impl Event {
    /// The process that must run for this to happen to it.
    fn party(&self, net: &Net) -> Option<Party> {
        Some(match self {
            Self::Deliver { conn, way } => net.conn(*conn)?.ends(*way).1,
            Self::DiskEnds { node, .. }
            | Self::NodeTick { node, .. }
            | Self::CopyLate { node, .. }
            | Self::PeerDialled { node, .. } => Party::Node(*node),
            Self::GatewayTick { gateway, .. }
            | Self::Dialled { gateway, .. }
            | Self::AnswerArrives { gateway, .. }
            | Self::AskAgain { gateway, .. } => Party::Gateway(*gateway),
            _ => return None,
        })
    }
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
    pub(super) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    pub(super) net: Net,
    pub nodes: Vec<Node>,
    pub gateways: Vec<Gateway>,
    pub(super) control: Control,
    /// So far no disk has lost anything: processes were killed at most, and then nothing acknowledged may be missing.
    pub(super) lossless: bool,
    /// Stopped processes, and what waits for them.
    stopped: BTreeMap<Party, VecDeque<Event>>,
    /// Rates of the processes' clocks, in parts per million off true time.
    drift: BTreeMap<Party, i64>,
    pub(super) asked: BTreeMap<(usize, u64), Ask>,
    pub(super) answers: Vec<Answer>,
    pub(super) layout: Layout,
    pub history: History,
    pub(super) work: Work,
    pub(super) invariants: Invariants,
    pub counters: Counters,
    pub(super) faults_on: bool,
    pub(super) healed: bool,
    /// Folded over every event.
    digest: u64,
    failure: Option<String>,
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

fn uuid_of(kind: u8, n: usize) -> Uuid {
    let mut bytes = [kind; 16];
    bytes[15] = n as u8 + 1;
    Uuid::from_bytes(bytes)
}

pub fn replica_id(node: usize) -> ReplicaId {
    ReplicaId(uuid_of(0xaa, node))
}

pub fn node_id(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}

pub fn ids(node: usize) -> ReplicaIds {
    ReplicaIds {
        cluster: ClusterId(uuid_of(0xcc, 0)),
        volume: VolumeId(uuid_of(0xbb, 0)),
        mirror: MirrorId(uuid_of(0xdd, 0)),
        replica: replica_id(node),
    }
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let layout = Layout::new(setup.blocks);
        let mut rng = Rng::new(setup.seed);
        let members = (0..setup.nodes).map(replica_id).collect();
        let parties = (0..setup.nodes).map(Party::Node).chain((0..setup.gateways).map(Party::Gateway));
        let range = setup.drift_permille * 1000;
        let drift = parties.map(|p| (p, rng.between(0, 2 * range) as i64 - range as i64)).collect();
        let mut world = Self {
            rng,
            now: 0,
            queue: BTreeMap::new(),
            queued: 0,
            net: Net::default(),
            nodes: (0..setup.nodes).map(|_| Node::new(&layout)).collect(),
            gateways: (0..setup.gateways).map(|_| Gateway::default()).collect(),
            control: Control::new(members),
            stopped: BTreeMap::new(),
            drift,
            asked: BTreeMap::new(),
            answers: Vec::new(),
            layout,
            history: History::default(),
            work: Work::new(&setup),
            invariants: Invariants::new(setup.nodes, layout.regions),
            counters: Counters::default(),
            faults_on: false,
            lossless: true,
            healed: false,
            digest: 0xcbf2_9ce4_8422_2325,
            failure: None,
            setup,
        };
        for node in 0..world.nodes.len() {
            world.start_node(node);
        }
        for gateway in 0..world.gateways.len() {
            world.start_gateway(gateway);
        }
        world.start_clients();
        world
    }

    pub fn seconds(&self) -> u64 {
        self.now / SECOND
    }

    pub fn digest(&self) -> u64 {
        self.digest
    }

    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Something is wrong that must never be; the first one counts.
    pub(super) fn fail(&mut self, what: String) {
        self.log(|| format!("FAILED: {what}"));
        self.failure.get_or_insert(format!("at {}.{:06} s: {what}", self.now / SECOND, self.now % SECOND));
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
            Party::Control => 0,
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

    fn happen(&mut self, event: Event) {
        if let Some(party) = event.party(&self.net)
            && let Some(waiting) = self.stopped.get_mut(&party)
        {
            waiting.push_back(event);
            return;
        }
        let now = self.now;
        self.fold(&(now, &event));
        match event {
            Event::Deliver { conn, way } => self.deliver(conn, way),
            Event::DiskEnds { node, boot, op } => self.disk_ends(node, boot, OpId(op)),
            Event::NodeTick { node, process } => self.node_tick(node, process),
            Event::NodeStarts { node, boot } => {
                if self.nodes[node].boot == boot && self.nodes[node].is_down() {
                    self.start_node(node);
                }
            }
            Event::CopyLate { node, boot, token } => self.copy_late(node, boot, token),
            Event::PeerDialled { node, boot, peer, reached } => self.peer_dialled(node, boot, peer, reached),
            Event::GatewayTick { gateway, boot } => self.gateway_tick(gateway, boot),
            Event::GatewayStarts { gateway, boot } => {
                if self.gateways[gateway].boot == boot && !self.gateways[gateway].alive {
                    self.start_gateway(gateway);
                }
            }
            Event::Dialled { gateway, session, node, reached } => self.dialled(gateway, session, node, reached),
            Event::AskArrives { gateway, boot, id } => self.ask_arrives(gateway, boot, id),
            Event::AnswerArrives { gateway, boot, id, at } => self.answer_arrives(gateway, boot, id, at),
            Event::AskAgain { gateway, boot, id } => self.ask_again(gateway, boot, id),
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
            Party::Control => unreachable!("the control plane is asked, not connected to"),
        }
    }
}
