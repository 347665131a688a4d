//! Voters in memory under a seeded loop: messages are lost, late and out of order, members crash with what their
//! disk had, are stopped and go on, are cut off; clocks differ in rate. Independent checkers watch:
//!
//! - R3: no two session epochs of a volume hold a usable lease at one time;
//! - R2: a request is carried out once, whatever its tries met;
//! - all voters hold the same state after the same log index, also those that got a snapshot.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use node::control::core::{ControlCore, Input, Now, Output, Reply, Request};
use node::control::daemon::voters;
use node::metadata::Command;
use node::raft::core::{CoreConfig, Persist, RaftCore};
use node::raft::log_store::{LogStore, MemoryStore};
use proto::cluster::*;
use proto::id::*;
use proto::limits::LEASE_MS;
use raft::prelude::Message;
use uuid::Uuid;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

#[derive(Debug)]
enum Event {
    Tick(usize),
    Deliver(usize, Message),
    Written(usize, u64),
    Ask(usize, u64, Request),
    Answered(u64, Result<Reply, Refusal>),
    Chaos,
    Gateway(usize),
}

struct Voter {
    core: Option<ControlCore>,
    store: MemoryStore,
    /// Given to the disk and not durable.
    writing: VecDeque<Persist>,
    /// Rises with every crash: what the disk reports after one is not for us.
    life: u64,
    stopped_until: u64,
    cut_off: bool,
    /// Thousandths of real time.
    rate: u64,
    waiting: VecDeque<Input>,
}

#[derive(Clone, Debug)]
struct Use {
    epoch: u64,
    from: u64,
    until: u64,
}

#[derive(Default)]
struct Gateway {
    session: Option<(u64, u64)>, // epoch, not to be used before
    version: u64,
    asking: Option<Asking>,
}

#[derive(Clone)]
struct Asking {
    request: Request,
    sent: u64,
    tries: u64,
    ticket: u64,
    serial: u64,
}

struct World {
    random: Random,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    bodies: BTreeMap<u64, Event>,
    order: u64,
    voters: Vec<Voter>,
    gateways: Vec<Gateway>,
    /// Which gateway asked, and the number of its request: answers to earlier ones come late.
    tickets: BTreeMap<u64, (usize, u64)>,
    hashes: BTreeMap<u64, [u8; 32]>,
    uses: Vec<Use>,
    sets: u64,
    opened: u64,
    /// Sessions that were over when their opening, asked for again, was answered.
    opened_in_vain: u64,
    calm: bool,
    volume: VolumeId,
    mirror: MirrorId,
    replicas: Vec<ReplicaId>,
    restored: u64,
}

fn definition() -> ClusterDefinition {
    let members = (1..=5).map(|n| Member {
        id: NodeId(n),
        name: format!("m{n}"),
        role: if n <= 3 { Role::Node } else { Role::Witness },
        control_addr: format!("m{n}"),
        data_addr: String::new(),
    });
    ClusterDefinition { id: ClusterId(Uuid::from_u128(1)), name: "sim".into(), members: members.collect() }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: Random(seed),
            now: 1_000,
            events: BinaryHeap::new(),
            bodies: BTreeMap::new(),
            order: 0,
            voters: Vec::new(),
            gateways: vec![Gateway::default(), Gateway::default()],
            tickets: BTreeMap::new(),
            hashes: BTreeMap::new(),
            uses: Vec::new(),
            sets: 0,
            opened: 0,
            opened_in_vain: 0,
            calm: true,
            volume: VolumeId::default(),
            mirror: MirrorId::default(),
            replicas: Vec::new(),
            restored: 0,
        };
        for at in 0..5 {
            let rate = 990 + world.random.below(21);
            world.voters.push(Voter {
                core: None,
                store: MemoryStore::default(),
                writing: VecDeque::new(),
                life: 0,
                stopped_until: 0,
                cut_off: false,
                rate,
                waiting: VecDeque::new(),
            });
            world.start(at);
            world.after(at as u64 * 7, Event::Tick(at));
        }
        world
    }

    fn after(&mut self, delay: u64, event: Event) {
        self.order += 1;
        self.events.push(Reverse((self.now + delay, self.order)));
        self.bodies.insert(self.order, event);
    }

    fn start(&mut self, at: usize) {
        let definition = definition();
        let (ids, preferred) = voters(&definition);
        let log = self.voters[at].store.load().unwrap().into_log(&ids).unwrap();
        let mut config = CoreConfig::new(at as u64 + 1, ids, preferred);
        // Pinned, so that a seed runs the same every time.
        config.min_election_tick = 5;
        config.max_election_tick = 6;
        config.snapshot_entries = 20;
        config.tail_entries = 5;
        let raft = RaftCore::new(config, log, self.random.next()).unwrap();
        self.voters[at].core = Some(ControlCore::new(NodeId(at as u64 + 1), definition, raft).unwrap());
    }

    fn crash(&mut self, at: usize) {
        let durable = self.random.below(self.voters[at].writing.len() as u64 + 1);
        let voter = &mut self.voters[at];
        let survived: Vec<Persist> = voter.writing.drain(..).take(durable as usize).collect();
        voter.store.write(&survived).unwrap();
        voter.core = None;
        voter.life += 1;
        voter.waiting.clear();
        self.start(at);
    }

    fn input(&mut self, at: usize, input: Input) {
        if self.voters[at].stopped_until > self.now {
            return self.voters[at].waiting.push_back(input);
        }
        let now = Now { boot_ms: at as u64 * 5_000 + self.now * self.voters[at].rate / 1000, unix_ms: self.now };
        let mut out = Vec::new();
        let core = self.voters[at].core.as_mut().unwrap();
        let before = core.machine().applied();
        core.step(now, input, &mut out).unwrap();
        let applied = core.machine().applied();
        if applied > before + 15 {
            self.restored += 1;
        }
        if applied != before {
            let hash = core.machine().hash();
            let known = *self.hashes.entry(applied).or_insert(hash);
            assert_eq!(known, hash, "member {} differs from another at index {applied}", at + 1);
        }
        for output in out {
            match output {
                Output::Send(messages) => self.send(at, messages),
                Output::Persist(persist) => {
                    self.voters[at].writing.push_back(*persist);
                    let life = self.voters[at].life;
                    let delay = 1 + self.random.below(15);
                    self.after(delay, Event::Written(at, life));
                }
                Output::Answer(ticket, answer) => {
                    let lost = !self.calm && self.random.percent(10);
                    if !lost {
                        let delay = 1 + self.random.below(if self.calm { 3 } else { 30 });
                        self.after(delay, Event::Answered(ticket, answer));
                    }
                }
                Output::Changed => {}
                Output::BadMessage(bad) => panic!("{bad}"),
            }
        }
    }

    fn send(&mut self, from: usize, messages: Vec<Message>) {
        for message in messages {
            let to = message.to as usize - 1;
            if message.get_msg_type() == raft::eraftpb::MessageType::MsgSnapshot {
                let number = message.to;
                self.voters[from].waiting.push_back(Input::SnapshotSent(number, true));
            }
            let apart = self.voters[from].cut_off != self.voters[to].cut_off;
            if apart || (!self.calm && self.random.percent(8)) {
                continue;
            }
            let late = if !self.calm && self.random.percent(3) { 800 } else { 20 };
            let delay = 1 + self.random.below(late);
            self.after(delay, Event::Deliver(to, message));
        }
    }

    /// Runs until this time.
    fn run(&mut self, until: u64) {
        while let Some(Reverse((time, order))) = self.events.peek().copied() {
            if time > until {
                break;
            }
            self.events.pop();
            self.now = time;
            let event = self.bodies.remove(&order).unwrap();
            self.handle(event);
        }
        self.now = until;
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick(at) => {
                if self.voters[at].stopped_until <= self.now {
                    while let Some(input) = self.voters[at].waiting.pop_front() {
                        self.input(at, input);
                    }
                    self.input(at, Input::Tick);
                }
                self.after(100, Event::Tick(at));
            }
            Event::Deliver(at, message) => self.input(at, Input::Messages(vec![message])),
            Event::Written(at, life) => {
                if self.voters[at].life != life {
                    return;
                }
                let persist = self.voters[at].writing.pop_front().unwrap();
                self.voters[at].store.write(std::slice::from_ref(&persist)).unwrap();
                self.send(at, persist.then_send);
                self.input(at, Input::Persisted(persist.number));
            }
            Event::Ask(at, ticket, request) => self.input(at, Input::Request(ticket, request)),
            Event::Answered(ticket, answer) => {
                if let Some((which, serial)) = self.tickets.remove(&ticket) {
                    let current = self.gateways[which].asking.as_ref().is_some_and(|asking| asking.serial == serial);
                    if current {
                        self.answered(which, ticket, answer);
                    }
                }
            }
            Event::Chaos => {
                if self.calm {
                    return;
                }
                let at = self.random.below(5) as usize;
                match self.random.below(4) {
                    0 => self.crash(at),
                    1 => self.voters[at].stopped_until = self.now + 500 + self.random.below(12_000),
                    2 => self.voters[at].cut_off = true,
                    _ => self.voters.iter_mut().for_each(|voter| voter.cut_off = false),
                }
                let delay = 300 + self.random.below(3_000);
                self.after(delay, Event::Chaos);
            }
            Event::Gateway(which) => {
                self.gateway(which);
                let delay = 200 + self.random.below(900);
                self.after(delay, Event::Gateway(which));
            }
        }
    }

    fn ask(&mut self, which: usize, request: Request) {
        self.order += 1;
        let asking = Asking { request, sent: self.now, tries: 0, ticket: 0, serial: self.order };
        self.gateways[which].asking = Some(asking);
        self.try_again(which);
    }

    fn try_again(&mut self, which: usize) {
        self.order += 1;
        let ticket = self.order;
        let now = self.now;
        let asking = self.gateways[which].asking.as_mut().unwrap();
        asking.tries += 1;
        asking.ticket = ticket;
        if matches!(asking.request, Request::Renew { .. }) {
            asking.sent = now;
        }
        let (request, serial) = (asking.request.clone(), asking.serial);
        self.tickets.insert(ticket, (which, serial));
        // Mostly whoever leads, now and then whoever thinks so.
        let leaders = (0..5).filter(|at| self.voters[*at].core.as_ref().is_some_and(|core| core.raft().leads()));
        let leaders: Vec<usize> = leaders.collect();
        let at = match leaders.is_empty() || self.random.percent(20) {
            true => self.random.below(5) as usize,
            false => leaders[self.random.below(leaders.len() as u64) as usize],
        };
        let delay = 1 + self.random.below(20);
        self.after(delay, Event::Ask(at, ticket, request));
    }

    fn request(&mut self) -> RequestId {
        let id = Uuid::from_u128(u128::from(self.random.next()) << 64 | u128::from(self.random.next()));
        RequestId { id, since: *self.hashes.keys().next().unwrap() }
    }

    fn gateway(&mut self, which: usize) {
        if self.gateways[which].asking.is_some() {
            // Still the same request, perhaps elsewhere.
            return self.try_again(which);
        }
        let name = ["a", "b"][which].to_owned();
        let request = self.request();
        let Some((epoch, _)) = self.gateways[which].session else {
            let take_over = self.random.percent(30);
            let volume = self.volume;
            return self.ask(which, Request::Open { request, volume, gateway: name, take_over });
        };
        match self.random.below(20) {
            0 => {
                // Whatever becomes of it, this gateway uses the session no more.
                self.end_use(epoch);
                self.gateways[which].session = None;
                let clean = self.random.percent(70);
                let close = Command::CloseSession { volume: self.volume, epoch: Epoch(epoch), clean };
                self.ask(which, Request::Lead(request, close));
            }
            1..=4 => {
                let mut members = self.replicas.clone();
                let out = self.random.below(4) as usize;
                if out < 3 {
                    members.remove(out);
                }
                let change = Command::ChangeSet {
                    volume: self.volume,
                    mirror: self.mirror,
                    epoch: Epoch(epoch),
                    expected: SetVersion(self.gateways[which].version),
                    members,
                    awaited: vec![],
                };
                self.ask(which, Request::Lead(request, change));
            }
            _ => {
                let session = SessionRenewal { volume: self.volume, epoch: Epoch(epoch), report: None };
                self.ask(which, Request::Renew { gateway: name, sessions: vec![session] });
            }
        }
    }

    fn end_use(&mut self, epoch: u64) {
        let now = self.now;
        for used in self.uses.iter_mut().filter(|used| used.epoch == epoch) {
            used.until = used.until.min(now);
        }
    }

    fn answered(&mut self, which: usize, ticket: u64, answer: Result<Reply, Refusal>) {
        let Some(asking) = self.gateways[which].asking.clone() else { return };
        let renewal = matches!(asking.request, Request::Renew { .. });
        match &answer {
            Err(refusal) if refusal.may_retry() => return,
            // A lease counts from the sending of the very try that is answered.
            _ if renewal && asking.ticket != ticket => return,
            _ => self.gateways[which].asking = None,
        }
        match answer {
            Ok(Reply::Opened(opened)) => {
                self.opened += 1;
                let from = self.now + opened.old_lease_ms;
                self.gateways[which].session = Some((opened.epoch.0, from));
                self.gateways[which].version = opened.volume.mirrors[0].in_sync.version.0;
            }
            Ok(Reply::Set(set, _)) => {
                self.sets += 1;
                self.gateways[which].version = set.version.0;
            }
            Ok(Reply::Renewed(renewals)) => match &renewals.results[0].outcome {
                RenewalOutcome::Granted { lease_ms } => {
                    assert_eq!(*lease_ms, LEASE_MS);
                    let (epoch, from) = self.gateways[which].session.unwrap();
                    let used = Use { epoch, from: self.now.max(from), until: asking.sent + LEASE_MS };
                    if used.from < used.until {
                        self.check(&used);
                        self.uses.push(used);
                    }
                }
                RenewalOutcome::Refused { .. } => self.gateways[which].session = None,
            },
            Err(Refusal::Superseded { .. }) => {
                self.opened_in_vain += u64::from(matches!(asking.request, Request::Open { .. }));
                self.gateways[which].session = None;
            }
            Err(Refusal::SetChanged { current, .. }) => self.gateways[which].version = current.version.0,
            Ok(_) | Err(_) => {}
        }
    }

    /// R3: the checker.
    fn check(&self, new: &Use) {
        for old in self.uses.iter().filter(|old| old.epoch != new.epoch) {
            let apart = old.until <= new.from || new.until <= old.from;
            assert!(apart, "two leases at one time: {old:?} and {new:?}");
        }
    }

    /// Asks until there is a definite answer.
    fn must(&mut self, request: Request) -> Result<Reply, Refusal> {
        for _ in 0..400 {
            self.order += 1;
            let ticket = self.order;
            let leader = (0..5).find(|at| {
                let voter = &self.voters[*at];
                voter.stopped_until <= self.now && voter.core.as_ref().is_some_and(|core| core.raft().leads())
            });
            self.after(1, Event::Ask(leader.unwrap_or(0), ticket, request.clone()));
            for _ in 0..20 {
                let until = self.now + 20;
                // Takes the answer before `handle` does.
                while let Some(Reverse((time, order))) = self.events.peek().copied() {
                    if time > until {
                        break;
                    }
                    self.events.pop();
                    self.now = time;
                    match self.bodies.remove(&order).unwrap() {
                        Event::Answered(answered, answer) if answered == ticket => match answer {
                            Err(refusal) if refusal.may_retry() => {}
                            answer => return answer,
                        },
                        event => self.handle(event),
                    }
                }
                self.now = until;
            }
        }
        panic!("no definite answer to {request:?}");
    }

    fn lead(&mut self, command: Command) {
        let request = RequestId { id: Uuid::from_u128(u128::from(self.random.next())), since: 0 };
        self.must(Request::Lead(request, command)).unwrap();
    }

    fn set_up(&mut self) {
        self.run(5_000);
        for name in ["a", "b"] {
            let gateway = GatewayInfo { name: name.into(), control_addr: String::new(), portal: String::new() };
            self.lead(Command::RegisterGateway { gateway });
        }
        for node in 1..=3 {
            let pool = Pool {
                node: NodeId(node),
                name: "p".into(),
                kind: "file".into(),
                path: String::new(),
                capacity: 1 << 30,
                free: 1 << 30,
            };
            self.lead(Command::ReportPools { node: NodeId(node), pools: vec![pool] });
        }
        let request = RequestId { id: Uuid::from_u128(42), since: 0 };
        let spec = VolumeSpec {
            name: "tank".into(),
            size: 1 << 20,
            replicas: 3,
            stripes: 1,
            chunk_size: 1 << 18,
            min_in_sync: 1,
            write_cache: true,
            export: None,
        };
        let Ok(Reply::Volume(volume, _)) = self.must(Request::Create(request, spec)) else { panic!() };
        for replica in &volume.mirrors[0].replicas {
            self.lead(Command::ReplicaReady { node: replica.node, replica: replica.id });
        }
        self.volume = volume.id;
        self.mirror = volume.mirrors[0].id;
        self.replicas = volume.mirrors[0].replicas.iter().map(|replica| replica.id).collect();
        self.replicas.sort();
    }
}

fn run(seed: u64) -> (u64, u64, usize, u64) {
    println!("seed {seed}");
    let mut world = World::new(seed);
    world.set_up();
    world.calm = false;
    world.after(10, Event::Gateway(0));
    world.after(20, Event::Gateway(1));
    world.after(500, Event::Chaos);
    let end = world.now + 120_000;
    world.run(end);
    // Everything heals: every request gets its answer, all voters come to the same state.
    world.calm = true;
    for voter in &mut world.voters {
        voter.cut_off = false;
        voter.stopped_until = 0;
    }
    let end = world.now + 20_000;
    world.run(end);
    let Ok(Reply::Status(status)) = world.must(Request::Status) else { panic!() };
    let asked = world.gateways.iter().filter_map(|gateway| gateway.asking.clone()).collect::<Vec<_>>();
    let volume = status.view.volume(world.volume).unwrap();
    let doubt = asked.iter().filter(|asking| matches!(asking.request, Request::Lead(..))).count() as u64;
    let version = volume.mirrors[0].in_sync.version.0;
    assert!((1 + world.sets..=1 + world.sets + doubt).contains(&version), "R2: version {version}, {} sets", world.sets);
    let opens = asked.iter().filter(|asking| matches!(asking.request, Request::Open { .. })).count() as u64;
    let epoch = volume.session.epoch.0;
    let opened = world.opened + world.opened_in_vain;
    assert!((opened..=opened + opens).contains(&epoch), "epoch {epoch}, {opened} openings");
    let end = world.now + 3_000;
    world.run(end);
    let applied: Vec<u64> = world.voters.iter().map(|v| v.core.as_ref().unwrap().machine().applied()).collect();
    assert!(applied.iter().max().unwrap() - applied.iter().min().unwrap() < 5, "{applied:?}");
    (world.sets, world.opened, world.uses.len(), world.restored)
}

#[test]
fn leases_never_overlap_and_requests_are_carried_out_once() {
    let (first, count) = match std::env::var("MD99_SEED") {
        Ok(seed) => (seed.parse().unwrap(), 1),
        Err(_) => (1, 12),
    };
    let mut sums = (0, 0, 0, 0);
    for seed in first..first + count {
        let (sets, opened, uses, restored) = run(seed);
        sums = (sums.0 + sets, sums.1 + opened, sums.2 + uses, sums.3 + restored);
    }
    println!("{} set changes, {} openings, {} leases, {} catch-ups", sums.0, sums.1, sums.2, sums.3);
    if count > 1 {
        assert!(sums.0 > 50 && sums.1 > 50 && sums.2 > 200 && sums.3 > 0, "the loop does too little: {sums:?}");
    }
}
