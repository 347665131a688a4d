//! The control plane of one member: gRPC messages to a leader, raft messages to a voter, log entries and snapshots to
//! the metadata machine.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use node::control::core::{ControlCore, Input, Now, Output, REQUEST_MS, Request};
use node::metadata::command::{LeaseVerdict, PlannedMirror, PlannedReplica};
use node::metadata::state::{MAX_GATEWAYS, MAX_POOLS, MAX_SETTINGS, MAX_VOLUMES};
use node::metadata::{Command, Metadata, Proposal};
use node::raft::core::{CoreConfig, RaftCore};
use node::raft::log_store::{LogStore, MemoryStore};
use node::raft::transport;
use prost::Message as _;
use proto::cluster::*;
use proto::convert::{self, BadMessage, check_name};
use proto::id::*;
use proto::limits::{MAX_MIRRORS, MAX_REPLICAS};
use proto::pb;
use protobuf::Message as _;
use raft::prelude::{Entry, Message, MessageType};
use uuid::Uuid;

use super::source::{Seen, Source};

/// What a member may hold for one input: its log, the metadata twice, their encodings, answers.
pub const MEMORY: usize = 48 << 20;
/// Items of one input.
const MAX_ITEMS: usize = 64;

fn definition() -> ClusterDefinition {
    let member = |n: u64, role: Role| Member {
        id: NodeId(n),
        name: format!("{role}-{n}"),
        role,
        control_addr: format!("127.0.0.1:{n}"),
        data_addr: if role == Role::Node { format!("127.0.0.1:10{n}") } else { String::new() },
    };
    let roles = [Role::Node, Role::Node, Role::Node, Role::Witness, Role::Witness];
    ClusterDefinition {
        id: ClusterId(Uuid::from_u128(77)),
        name: "test".into(),
        members: (1..).zip(roles).map(|(n, role)| member(n, role)).collect(),
    }
}

fn gateway(name: &str) -> GatewayInfo {
    GatewayInfo { name: name.into(), control_addr: "127.0.0.1:1".into(), portal: "127.0.0.1:3260".into() }
}

fn pools(node: u64) -> Vec<Pool> {
    let pool = |name: &str| Pool {
        node: NodeId(node),
        name: name.into(),
        kind: "file".into(),
        path: "/p".into(),
        capacity: 1 << 40,
        free: 1 << 40,
    };
    vec![pool("p1"), pool("p2")]
}

fn request_id(n: u128, since: u64) -> RequestId {
    RequestId { id: Uuid::from_u128(n), since }
}

/// What must hold of the metadata, whatever was asked of them; `before`: epochs and versions never fall.
fn check_metadata(machine: &Metadata, before: &mut BTreeMap<(VolumeId, usize), u64>) {
    assert!(machine.volumes().len() <= MAX_VOLUMES && machine.gateways().len() <= MAX_GATEWAYS);
    for node in machine.members().keys() {
        assert!(machine.pools_of(*node).count() <= MAX_POOLS);
    }
    let mut names = BTreeSet::new();
    let mut rises = |volume: VolumeId, which: usize, number: u64| {
        let last = before.insert((volume, which), number).unwrap_or(0);
        assert!(number >= last, "{volume}, {which}: {number} after {last}");
    };
    for volume in machine.volumes().values() {
        assert_eq!(check_name("volume", &volume.name), Ok(()));
        let lives = volume.state != VolumeState::Deleting;
        assert!(!lives || names.insert(&volume.name), "two volumes named {}", volume.name);
        assert!(!volume.mirrors.is_empty() && volume.mirrors.len() <= MAX_MIRRORS);
        rises(volume.id, 0, volume.session.epoch.0);
        for (which, mirror) in (1..).zip(&volume.mirrors) {
            assert!(mirror.replicas.len() <= MAX_REPLICAS);
            let nodes: BTreeSet<_> = mirror.replicas.iter().map(|replica| replica.node).collect();
            assert_eq!(nodes.len(), mirror.replicas.len(), "replicas of a mirror are on distinct nodes");
            let set = &mirror.in_sync;
            rises(volume.id, which, set.version.0);
            assert_eq!(set.members.is_empty(), set.version.0 == 0, "the first set has members");
            for ids in [&set.members, &set.awaited] {
                assert!(ids.is_sorted_by(|a, b| a < b), "sorted and distinct");
                let defined = |id: &ReplicaId| mirror.replicas.iter().any(|replica| replica.id == *id);
                assert!(!lives || ids.iter().all(defined), "members are defined");
            }
            assert!(set.awaited.iter().all(|id| !set.members.contains(id)), "awaited ones are no members");
        }
    }
}

fn same(a: &Metadata, b: &Metadata) {
    assert!(a == b && a.hash() == b.hash(), "two machines differ that have applied the same log");
    let bytes = a.encode();
    let again = Metadata::decode(&bytes).expect("what we encode can be read");
    assert!(again == *a && again.encode() == bytes, "a snapshot is the machine");
    assert!(bytes.len() < 16 << 20, "a snapshot of {} bytes", bytes.len());
}

/// A member with its log in memory.
struct Member1 {
    core: ControlCore,
    store: MemoryStore,
    now: Now,
    /// Persists whose end is not reported yet.
    unreported: VecDeque<u64>,
    /// Report only when told.
    slow: bool,
    tickets: u64,
    answered: BTreeMap<u64, u32>,
    /// Entries of the log, not applied to the second machine yet.
    log: BTreeMap<u64, (u64, Vec<u8>)>,
    second: Metadata,
    before: BTreeMap<(VolumeId, usize), u64>,
    /// It has stopped, because it can't read its log.
    stopped: bool,
}

impl Member1 {
    fn new(voters: Vec<u64>) -> Self {
        let mut store = MemoryStore::default();
        let log = store.load().expect("in memory").into_log(&voters).expect("an empty log");
        let mut config = CoreConfig::new(1, voters, vec![]);
        (config.min_election_tick, config.max_election_tick) = (5, 6);
        (config.snapshot_entries, config.tail_entries) = (40, 8);
        let raft = RaftCore::new(config, log, 7).expect("a configuration that makes sense");
        let core = ControlCore::new(NodeId(1), definition(), raft).expect("an empty log");
        Self {
            core,
            store,
            now: Now { boot_ms: 1_000_000, unix_ms: 5 },
            unreported: VecDeque::new(),
            slow: false,
            tickets: 0,
            answered: BTreeMap::new(),
            log: BTreeMap::new(),
            second: Metadata::default(),
            before: BTreeMap::new(),
            stopped: false,
        }
    }

    /// A leader of its own, with nodes and gateways.
    fn leader() -> Self {
        let mut member = Self::new(vec![1]);
        (0..12).for_each(|_| member.tick());
        for node in 1..=3 {
            let command = Command::ReportPools { node: NodeId(node), pools: pools(node) };
            member.request(Request::Forward(request_id(node.into(), 0), command));
        }
        for (n, name) in [(10, "a"), (11, "b")] {
            member.request(Request::Lead(request_id(n, 0), Command::RegisterGateway { gateway: gateway(name) }));
        }
        assert_eq!(member.core.machine().gateways().len(), 2);
        member
    }

    fn tick(&mut self) {
        self.now.boot_ms += 100;
        self.now.unix_ms += 100;
        self.input(Input::Tick);
    }

    fn request(&mut self, request: Request) {
        self.tickets += 1;
        self.input(Input::Request(self.tickets, request));
    }

    fn input(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        let mut steps = 0;
        while let Some(input) = inputs.pop_front() {
            steps += 1;
            assert!(steps < 10_000, "one input leads to ever more");
            if self.stopped {
                return;
            }
            let mut out = Vec::new();
            if self.core.step(self.now, input, &mut out).is_err() {
                self.stopped = true;
            }
            for output in out {
                match output {
                    Output::Persist(persist) => {
                        self.store.write(std::slice::from_ref(&persist)).expect("in memory");
                        if let Some(snapshot) = &persist.install {
                            // The second machine learns of it as the first one does.
                            self.log.clear();
                            if let Ok(machine) = Metadata::decode(&snapshot.data) {
                                self.second = machine;
                            }
                        }
                        for entry in persist.entries {
                            self.log.split_off(&entry.index);
                            self.log.insert(entry.index, (entry.term, entry.data.to_vec()));
                        }
                        self.unreported.push_back(persist.number);
                    }
                    Output::Answer(ticket, _) => *self.answered.entry(ticket).or_default() += 1,
                    Output::Send(_) | Output::Changed | Output::BadMessage(_) => {}
                }
            }
            if !self.slow {
                inputs.extend(self.unreported.drain(..).map(Input::Persisted));
            }
        }
    }

    /// The second machine applies what the first one has, and must be equal.
    fn catch_up(&mut self) {
        if self.stopped {
            return;
        }
        let machine = self.core.machine();
        while self.second.applied() < machine.applied() {
            let index = self.second.applied() + 1;
            let Some((term, data)) = self.log.remove(&index) else { panic!("entry {index} was never written") };
            match data.is_empty() {
                true => self.second.apply_empty(index),
                false => drop(self.second.apply(index, term, Proposal::decode(&data).expect("applied by the other"))),
            }
        }
        check_metadata(machine, &mut self.before);
    }

    fn end(mut self, seen: &mut Seen) {
        self.slow = false;
        for _ in 0..REQUEST_MS / 100 + 2 {
            self.tick();
        }
        self.catch_up();
        seen.note(("stopped", self.stopped));
        if self.stopped {
            return;
        }
        same(self.core.machine(), &self.second);
        for ticket in 1..=self.tickets {
            let times = self.answered.get(&ticket).copied().unwrap_or(0);
            assert_eq!(times, 1, "request {ticket} was answered {times} times");
        }
    }
}

/// An id: sixteen bytes as they come; a single one names something that exists.
fn resolve(bytes: &mut Vec<u8>, known: &[Uuid]) {
    if let [n] = bytes[..]
        && !known.is_empty()
    {
        *bytes = known[usize::from(n) % known.len()].as_bytes().to_vec();
    }
}

/// As in `node::control::service`.
fn understand(kind: u8, bytes: &[u8], machine: &Metadata) -> Result<Option<Request>, BadMessage> {
    fn decode<T: prost::Message + Default>(bytes: &[u8]) -> Result<T, BadMessage> {
        T::decode(bytes).map_err(|error| BadMessage { field: "message", why: error.to_string() })
    }
    let volumes: Vec<Uuid> = machine.volumes().keys().map(|id| id.0).collect();
    let mirrors = || machine.volumes().values().flat_map(|volume| &volume.mirrors);
    let volume = |mut bytes: Vec<u8>| {
        resolve(&mut bytes, &volumes);
        convert::volume_id("volume", &bytes)
    };
    let replicas: Vec<Uuid> = mirrors().flat_map(|mirror| mirror.replicas.iter().map(|r| r.id.0)).collect();
    let members = |ids: Vec<Vec<u8>>| {
        ids.into_iter()
            .map(|mut bytes| {
                resolve(&mut bytes, &replicas);
                convert::replica_id("member", &bytes)
            })
            .collect::<Result<Vec<_>, _>>()
    };
    let filled = |text: String| (!text.is_empty()).then_some(text);
    let missing = |field| BadMessage { field, why: "is missing".into() };
    Ok(Some(match kind {
        0 => {
            let m: pb::RegisterGatewayRequest = decode(bytes)?;
            let gateway = m.gateway.ok_or(missing("gateway"))?.try_into()?;
            Request::Lead(m.request.try_into()?, Command::RegisterGateway { gateway })
        }
        1 => {
            let m: pb::OpenSessionRequest = decode(bytes)?;
            let (request, volume) = (m.request.try_into()?, volume(m.volume)?);
            Request::Open { request, volume, gateway: m.gateway, take_over: m.take_over }
        }
        2 => {
            let m: pb::CloseSessionRequest = decode(bytes)?;
            let command = Command::CloseSession { volume: volume(m.volume)?, epoch: Epoch(m.epoch), clean: m.clean };
            Request::Lead(m.request.try_into()?, command)
        }
        3 => {
            let mut m: pb::RenewLeaseRequest = decode(bytes)?;
            m.sessions.iter_mut().for_each(|session| resolve(&mut session.volume, &volumes));
            let sessions = m.sessions.into_iter().map(SessionRenewal::try_from).collect::<Result<_, _>>()?;
            Request::Renew { gateway: m.gateway, sessions }
        }
        4 => {
            let mut m: pb::ChangeSetRequest = decode(bytes)?;
            resolve(&mut m.mirror, &mirrors().map(|mirror| mirror.id.0).collect::<Vec<_>>());
            let command = Command::ChangeSet {
                volume: volume(m.volume)?,
                mirror: convert::mirror_id("mirror", &m.mirror)?,
                epoch: Epoch(m.epoch),
                expected: SetVersion(m.expected),
                members: members(m.members)?,
                awaited: members(m.awaited)?,
            };
            Request::Lead(m.request.try_into()?, command)
        }
        5 => {
            let m: pb::FinishRecoveryRequest = decode(bytes)?;
            let command = Command::FinishRecovery { volume: volume(m.volume)?, epoch: Epoch(m.epoch) };
            Request::Lead(m.request.try_into()?, command)
        }
        6 => match decode::<pb::StatusRequest>(bytes)?.stale {
            true => Request::StaleStatus,
            false => Request::Status,
        },
        7 => {
            let m: pb::CreateVolumeRequest = decode(bytes)?;
            let spec = VolumeSpec {
                name: m.name,
                size: m.size,
                replicas: m.replicas,
                stripes: m.stripes,
                chunk_size: m.chunk_size,
                min_in_sync: m.min_in_sync,
                write_cache: m.write_cache,
                export: filled(m.export),
            };
            Request::Create(m.request.try_into()?, spec)
        }
        8 => {
            let m: pb::DeleteVolumeRequest = decode(bytes)?;
            Request::Lead(m.request.try_into()?, Command::DeleteVolume { volume: volume(m.volume)? })
        }
        9 => {
            let m: pb::ExportVolumeRequest = decode(bytes)?;
            let command = Command::ExportVolume { volume: volume(m.volume)?, gateway: filled(m.gateway) };
            Request::Lead(m.request.try_into()?, command)
        }
        10 => {
            let m: pb::RecoverVolumeRequest = decode(bytes)?;
            Request::Lead(m.request.try_into()?, Command::RecoverVolume { volume: volume(m.volume)?, unix_ms: 9 })
        }
        20 => {
            let m: pb::SetVolumeRequest = decode(bytes)?;
            let resync_limit = Some(m.resync_limit).filter(|limit| *limit > 0);
            Request::Lead(m.request.try_into()?, Command::SetVolume { volume: volume(m.volume)?, resync_limit })
        }
        // What nodes, gateways and the command line are told, and what `init` sends: only read here.
        11 => {
            let definition: pb::ClusterDefinition = decode(bytes)?;
            drop(ClusterDefinition::try_from(definition)?);
            return Ok(None);
        }
        12 => {
            drop(ClusterView::try_from(decode::<pb::ClusterView>(bytes)?)?);
            return Ok(None);
        }
        13 => {
            drop(OpenedSession::try_from(decode::<pb::OpenSessionReply>(bytes)?)?);
            return Ok(None);
        }
        14 => {
            drop(Renewals::try_from(decode::<pb::RenewLeaseReply>(bytes)?)?);
            return Ok(None);
        }
        15 => {
            drop(ClusterStatus::try_from(decode::<pb::ClusterStatus>(bytes)?)?);
            return Ok(None);
        }
        16 => {
            let refusal = Refusal::try_from(decode::<pb::Refusal>(bytes)?)?;
            let status = convert::refusal_to_status(refusal.clone());
            assert_eq!(convert::status_to_refusal(&status), Some(refusal), "a refusal comes back");
            return Ok(None);
        }
        _ => return Ok(None),
    }))
}

const KINDS: u8 = 21;

/// Items: kind, message with its length.
pub fn run_commands(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let mut member = Member1::leader();
    let mut items = 0;
    while !source.is_empty() && items < MAX_ITEMS {
        items += 1;
        let kind = source.u8() % KINDS;
        let bytes = source.item();
        match kind {
            // Nodes that have made, or deleted, their replicas.
            17 | 18 => {
                let replicas: Vec<(NodeId, ReplicaId)> = member
                    .core
                    .machine()
                    .volumes()
                    .values()
                    .flat_map(|volume| &volume.mirrors)
                    .flat_map(|mirror| mirror.replicas.iter().map(|replica| (replica.node, replica.id)))
                    .collect();
                for (node, replica) in replicas {
                    let command = match kind {
                        17 => Command::ReplicaReady { node, replica },
                        _ => Command::ReplicaDeleted { node, replica },
                    };
                    let request = request_id(1 << 64 | u128::from(member.tickets), 0);
                    member.request(Request::Forward(request, command));
                }
            }
            19 => (0..1 + bytes.len() % 64).for_each(|_| member.tick()),
            _ => match understand(kind, bytes, member.core.machine()) {
                Ok(Some(request)) => {
                    seen.note(kind);
                    let revision = member.core.machine().revision();
                    member.request(request);
                    seen.note((kind, member.core.machine().revision() > revision));
                }
                Ok(None) => seen.note((kind, "read")),
                Err(bad) => seen.note((kind, bad.field)),
            },
        }
        member.catch_up();
    }
    member.end(seen);
}

fn item(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let mut item = vec![kind];
    item.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
    item.extend_from_slice(bytes);
    item
}

/// Where an input's items begin; `head` bytes come before the length.
pub fn records(input: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 0;
    while let Some(head) = input.get(at..at + 3) {
        starts.push(at);
        at += 3 + usize::from(u16::from_le_bytes([head[1], head[2]]));
    }
    starts
}

pub fn command_seeds() -> Vec<Vec<u8>> {
    let id = |n: u128| Some(pb::RequestId::from(request_id(n, 3)));
    let volume = || vec![0];
    let create = |n, name: &str, stripes| {
        let message = pb::CreateVolumeRequest {
            request: id(n),
            name: name.into(),
            size: 64 << 20,
            replicas: 3,
            stripes,
            chunk_size: 256 << 10,
            min_in_sync: 1,
            write_cache: true,
            export: "a".into(),
        };
        item(7, &message.encode_to_vec())
    };
    let open = |n, gateway: &str, take_over| {
        let message = pb::OpenSessionRequest { request: id(n), volume: volume(), gateway: gateway.into(), take_over };
        item(1, &message.encode_to_vec())
    };
    let report = pb::SessionReport {
        mirrors: vec![pb::MirrorReport {
            mirror: vec![1; 16],
            replicas: vec![pb::ReplicaReport { replica: vec![2; 16], condition: 1, ..Default::default() }],
            waiting: "for nothing".into(),
            in_flight: 1,
            dirty_regions: 2,
        }],
    };
    let renewal = pb::SessionRenewal { volume: volume(), epoch: 1, report: Some(report) };
    let renew = pb::RenewLeaseRequest { gateway: "a".into(), sessions: vec![renewal.clone(), renewal] };
    let change = |n, expected, members: &[u8], awaited: &[u8]| {
        let one = |ids: &[u8]| ids.iter().map(|id| vec![*id]).collect();
        let message = pb::ChangeSetRequest {
            request: id(n),
            volume: volume(),
            mirror: vec![0],
            epoch: 1,
            expected,
            members: one(members),
            awaited: one(awaited),
        };
        item(4, &message.encode_to_vec())
    };
    let close = pb::CloseSessionRequest { request: id(60), volume: volume(), epoch: 1, clean: true };
    let life = [
        create(20, "tank", 1),
        item(17, &[]),
        open(21, "a", false),
        item(3, &renew.encode_to_vec()),
        change(22, 1, &[0, 1], &[2]),
        change(23, 2, &[0, 1, 2], &[]),
        open(24, "b", false),
        open(25, "b", true),
        item(19, &[0; 20]),
        item(10, &pb::RecoverVolumeRequest { request: id(26), volume: volume() }.encode_to_vec()),
        item(20, &pb::SetVolumeRequest { request: id(29), volume: volume(), resync_limit: 1 << 30 }.encode_to_vec()),
        item(5, &pb::FinishRecoveryRequest { request: id(27), volume: volume(), epoch: 2 }.encode_to_vec()),
        item(9, &pb::ExportVolumeRequest { request: id(28), volume: volume(), gateway: "b".into() }.encode_to_vec()),
        item(2, &close.encode_to_vec()),
        item(6, &pb::StatusRequest { stale: false }.encode_to_vec()),
        item(8, &pb::DeleteVolumeRequest { request: id(29), volume: volume() }.encode_to_vec()),
        item(18, &[]),
    ];
    let register = pb::RegisterGatewayRequest { request: id(30), gateway: Some(gateway("c").into()) };
    let leader = Member1::leader();
    let view: pb::ClusterView = leader.core.machine().view(false).into();
    let refusal = pb::Refusal::from(Refusal::not_found(ObjectKind::Volume, "tank"));
    let mut seeds = vec![life.concat(), [&life[..3], &life[7..13]].concat().concat()];
    seeds.push([create(40, "a", 5), create(41, "b", 32), create(40, "a", 5), item(17, &[])].concat());
    seeds.push([item(0, &register.encode_to_vec()), item(6, &[8, 1])].concat());
    seeds.push(item(11, &pb::ClusterDefinition::from(definition()).encode_to_vec()));
    seeds.push(item(12, &view.encode_to_vec()));
    seeds.push(item(16, &refusal.encode_to_vec()));
    let mut member = Member1::leader();
    member.request(understand(7, &create(50, "x", 2)[3..], member.core.machine()).expect("understood").expect("asks"));
    let known = member.core.machine().volumes().values().next().expect("created").clone();
    let opened = OpenedSession {
        epoch: Epoch(1),
        volume: known,
        old_lease_ms: 0,
        previous: PreviousSession::Never,
        revision: 9,
    };
    seeds.push(item(13, &pb::OpenSessionReply::from(opened).encode_to_vec()));
    seeds
}

// --- raft ---

const TYPES: [MessageType; 19] = [
    MessageType::MsgHup,
    MessageType::MsgBeat,
    MessageType::MsgPropose,
    MessageType::MsgAppend,
    MessageType::MsgAppendResponse,
    MessageType::MsgRequestVote,
    MessageType::MsgRequestVoteResponse,
    MessageType::MsgSnapshot,
    MessageType::MsgHeartbeat,
    MessageType::MsgHeartbeatResponse,
    MessageType::MsgUnreachable,
    MessageType::MsgSnapStatus,
    MessageType::MsgCheckQuorum,
    MessageType::MsgTransferLeader,
    MessageType::MsgTimeoutNow,
    MessageType::MsgReadIndex,
    MessageType::MsgReadIndexResp,
    MessageType::MsgRequestPreVote,
    MessageType::MsgRequestPreVoteResponse,
];

/// A message that says of itself little that is impossible: each field from the input.
fn message(source: &mut Source<'_>, member: &Member1) -> Message {
    let mut message = Message::default();
    let head = source.u8();
    message.set_msg_type(TYPES[usize::from(source.u8()) % TYPES.len()]);
    message.to = 1;
    message.from = 2 + u64::from(head & 1);
    let term = member.core.raft().term();
    message.term = if head & 2 != 0 { source.number() } else { term.saturating_add(u64::from(head >> 2 & 1)) };
    let last = member.core.raft().log().last();
    let near = |source: &mut Source<'_>| match head & 8 {
        0 => (last + u64::from(source.u8() % 8)).saturating_sub(3),
        _ => source.number(),
    };
    message.index = near(source);
    let known = member.core.raft().term_of(message.index);
    message.log_term = if head & 16 == 0 { known.unwrap_or(1) } else { source.number() };
    message.commit = near(source);
    message.reject = head & 32 != 0;
    message.reject_hint = near(source);
    message.request_snapshot = if head & 64 != 0 { source.number() } else { 0 };
    let shape = source.u8();
    for n in 1..=u64::from(shape & 3) {
        let mut entry = Entry {
            term: message.log_term.max(u64::from(shape >> 2 & 1) * message.term),
            index: message.index.wrapping_add(n),
            ..Entry::default()
        };
        if shape & 8 != 0 {
            let request = request_id(u128::from(source.u8()) | 1 << 32, 0);
            let command = Command::ChangeSetting { key: "k".into(), value: Some("v".into()) };
            entry.data = Proposal { request, command }.encode().expect("short").into();
        } else if shape & 16 != 0 {
            entry.data = source.item().to_vec().into();
        }
        message.entries.push(entry);
    }
    if shape & 32 != 0 {
        message.context = source.item().to_vec().into();
    }
    if message.get_msg_type() == MessageType::MsgSnapshot || shape & 64 != 0 {
        let shape = source.u8();
        let (index, term) = (near(source), if shape & 1 == 0 { message.term } else { source.number() });
        let mut machine = Metadata::default();
        // A machine of that index, where that is not far.
        while shape & 2 == 0 && machine.applied() < index.min(400) {
            machine.apply_empty(machine.applied() + 1);
        }
        let data = if shape & 4 == 0 { machine.encode() } else { source.item().to_vec() };
        let snapshot = message.mut_snapshot();
        snapshot.data = data.into();
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (index, term);
        let conf = metadata.mut_conf_state();
        conf.voters = vec![1, 2, 3];
        for (bit, list) in
            [&mut conf.learners, &mut conf.voters_outgoing, &mut conf.learners_next].into_iter().enumerate()
        {
            if shape & (8 << bit) != 0 {
                list.push(source.number());
            }
        }
        conf.auto_leave = shape & 64 != 0;
    }
    message
}

/// Items: what, bytes with their length.
pub fn run_raft(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let mut member = Member1::new(vec![1, 2, 3]);
    let mut items = 0;
    while !source.is_empty() && items < MAX_ITEMS {
        items += 1;
        let what = source.u8();
        let bytes = source.item();
        let mut of = Source::new(bytes);
        match what % 12 {
            // As bytes of a batch, put right where nothing but a refusal would come of it.
            0 | 1 => {
                let from = 2 + u64::from(what >> 7);
                let bytes = match Message::parse_from_bytes(bytes) {
                    Ok(mut message) if what & 64 == 0 => {
                        (message.from, message.to) = (from, 1);
                        message.write_to_bytes().expect("in memory")
                    }
                    _ => bytes.to_vec(),
                };
                let cluster = definition().id;
                let batch = pb::RaftBatch {
                    cluster: cluster.to_bytes().to_vec().into(),
                    from,
                    to: 1,
                    messages: vec![bytes.into()],
                };
                match transport::decode(cluster, NodeId(1), &batch) {
                    Ok(messages) => member.input(Input::Messages(messages)),
                    Err(why) => seen.words(&why),
                }
            }
            2 => (0..1 + bytes.len() % 12).for_each(|_| member.tick()),
            // Votes for whoever asks.
            3 => {
                let leads = member.core.raft().leads();
                for kind in [MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse] {
                    (0..6).take_while(|_| !leads).for_each(|_| member.tick());
                    let term = member.core.raft().term() + u64::from(kind == MessageType::MsgRequestPreVoteResponse);
                    let mut vote = Message { from: 2, to: 1, term, ..Message::default() };
                    vote.set_msg_type(kind);
                    member.input(Input::Messages(vec![vote]));
                }
            }
            // Acknowledges all that is in the log.
            4 => {
                let (term, index) = (member.core.raft().term(), member.core.raft().log().last());
                let mut response = Message { from: 2, to: 1, term, index, ..Message::default() };
                response.set_msg_type(MessageType::MsgAppendResponse);
                member.input(Input::Messages(vec![response]));
            }
            5 => {
                member.slow = !member.slow;
                let reported: Vec<u64> = member.unreported.drain(..).collect();
                reported.into_iter().for_each(|number| member.input(Input::Persisted(number)));
            }
            6 => {
                let command = Command::ChangeSetting { key: "k".into(), value: None };
                let request = request_id(u128::from(of.u64()) | 1 << 70, 0);
                member.request(Request::Forward(request, command));
            }
            7 => member.input(Input::Unreachable(2 + u64::from(of.u8() & 1))),
            8 => member.input(Input::SnapshotSent(2, of.u8() & 1 == 0)),
            _ => {
                let message = message(&mut of, &member);
                let kind = message.get_msg_type() as i32;
                let (term, last) = (member.core.raft().term(), member.core.raft().log().last());
                member.input(Input::Messages(vec![message]));
                let raft = member.core.raft();
                let grown = raft.log().last().saturating_sub(last).min(3);
                seen.note((kind, (raft.term() - term).min(3), grown, raft.leads(), raft.leader()));
            }
        }
        member.catch_up();
        if member.stopped {
            break;
        }
    }
    member.end(seen);
}

pub fn raft_seeds() -> Vec<Vec<u8>> {
    let of = |kind: MessageType| TYPES.iter().position(|known| *known == kind).expect("listed") as u8;
    let mut seeds = Vec::new();
    for (kind, _) in (0..).zip(TYPES) {
        for leads in [false, true] {
            let head = if leads { [item(3, &[]), item(4, &[])].concat() } else { item(2, &[0; 3]) };
            // Near the log's end, of the next term; entries that can be read, a context, a snapshot.
            seeds.push([head.clone(), item(9, &[4, kind, 3, 3, 3, 0x0b, 1, 2, 0, 3, 0, 0])].concat());
            seeds.push([head.clone(), item(9, &[4, kind, 5, 6, 1, 0x6a, 1, 2, 16, 0, 9, 9, 4, 0, 5])].concat());
            seeds.push(
                [head, item(9, &[14, kind, 9, 242, 244, 242, 0x47, 0x38, 244, 245, 2, 3]), item(2, &[0; 9])].concat(),
            );
        }
    }
    let append = item(9, &[4, of(MessageType::MsgAppend), 3, 9, 3, 0x0b, 1, 2, 3]);
    let snapshot = item(9, &[4, of(MessageType::MsgSnapshot), 3, 3, 3, 0, 0, 7]);
    let round = [item(3, &[]), item(4, &[]), item(6, &[1]), item(4, &[]), item(2, &[0; 5])];
    seeds.push([round.concat(), round.concat(), item(5, &[]), round.concat(), append.clone()].concat());
    seeds.push([append.clone(), append.clone(), snapshot.clone(), append.clone(), snapshot, append].concat());
    let mut plain = Message { from: 2, to: 1, term: 2, ..Message::default() };
    plain.set_msg_type(MessageType::MsgHeartbeat);
    seeds.push(item(0, &plain.write_to_bytes().expect("in memory")));
    seeds
}

// --- log entries and snapshots ---

/// Items: 0, a log entry; 1, a snapshot that the machine becomes.
pub fn run_metadata(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let (mut first, mut second) = (Metadata::default(), Metadata::default());
    let mut before = BTreeMap::new();
    let mut items = 0;
    while !source.is_empty() && items < MAX_ITEMS {
        items += 1;
        let what = source.u8();
        let bytes = source.item();
        if what & 1 == 1 {
            match Metadata::decode(bytes) {
                Ok(machine) => {
                    second = Metadata::decode(&machine.encode()).expect("what we encode can be read");
                    assert!(machine == second, "a snapshot is the machine");
                    first = machine;
                    before.clear();
                    seen.note("snapshot");
                }
                Err(error) => seen.words(&error.to_string()),
            }
        } else {
            match Proposal::decode(bytes) {
                Ok(proposal) => {
                    let index = first.applied() + 1;
                    let answer = first.apply(index, 1, proposal.clone());
                    assert_eq!(answer, second.apply(index, 1, proposal), "two machines answer the same");
                    seen.words(&format!("{answer:?}"));
                }
                Err(error) => seen.words(&error.to_string()),
            }
        }
        check_metadata(&first, &mut before);
        drop((first.space(), first.view(false)));
    }
    same(&first, &second);
    let view: pb::ClusterView = first.view(false).into();
    assert!(view.encoded_len() < 16 << 20);
    const { assert!(MAX_SETTINGS < 1 << 10) };
}

fn commands() -> Vec<Command> {
    let volume = VolumeId(Uuid::from_u128(1));
    let mirror = MirrorId(Uuid::from_u128(2));
    let replica = |n: u64| ReplicaId(Uuid::from_u128(10 + u128::from(n)));
    let spec = VolumeSpec {
        name: "tank".into(),
        size: 1 << 20,
        replicas: 3,
        stripes: 1,
        chunk_size: 256 << 10,
        min_in_sync: 1,
        write_cache: true,
        export: None,
    };
    let planned = |n| PlannedReplica { id: replica(n), node: NodeId(n), pool: "p1".into() };
    let mirrors = vec![PlannedMirror { id: mirror, size: 1 << 20, replicas: (1..=3).map(planned).collect() }];
    let verdict = LeaseVerdict { term: 1, epoch: Epoch(0), ended: true };
    let mut all = vec![Command::Init { definition: definition() }];
    all.extend((1..=3).map(|n| Command::ReportPools { node: NodeId(n), pools: pools(n) }));
    all.push(Command::RegisterGateway { gateway: gateway("a") });
    all.push(Command::CreateVolume { volume, spec, mirrors, unix_ms: 5 });
    all.extend((1..=3).map(|n| Command::ReplicaReady { node: NodeId(n), replica: replica(n) }));
    all.extend([
        Command::OpenSession { volume, gateway: "a".into(), take_over: false, verdict },
        Command::ChangeSet {
            volume,
            mirror,
            epoch: Epoch(1),
            expected: SetVersion(1),
            members: vec![replica(1), replica(3)],
            awaited: vec![replica(2)],
        },
        Command::UpdateMember { node: NodeId(2), control_addr: "x:1".into(), data_addr: "x:2".into() },
        Command::ReplicaFailed { node: NodeId(1), replica: replica(1), reason: "no space".into() },
        Command::RecoverVolume { volume, unix_ms: 6 },
        Command::SetVolume { volume, resync_limit: Some(1 << 20) },
        Command::FinishRecovery { volume, epoch: Epoch(1) },
        Command::ExportVolume { volume, gateway: Some("a".into()) },
        Command::ChangeSetting { key: "k".into(), value: Some("v".into()) },
        Command::CloseSession { volume, epoch: Epoch(1), clean: true },
        Command::DeleteVolume { volume },
        Command::ReplicaDeleted { node: NodeId(1), replica: replica(1) },
    ]);
    all
}

pub fn metadata_seeds() -> Vec<Vec<u8>> {
    let entries: Vec<Vec<u8>> = (1..)
        .zip(commands())
        .map(|(n, command)| Proposal { request: request_id(n, 0), command }.encode().expect("short"))
        .collect();
    let mut machine = Metadata::default();
    let mut seeds = Vec::new();
    for (index, entry) in (1..).zip(&entries) {
        machine.apply(index, 1, Proposal::decode(entry).expect("just made"));
        if index > 8 && index % 3 == 0 {
            seeds.push([item(1, &machine.encode()), item(0, entry), item(0, &entries[9])].concat());
        }
    }
    seeds.push(entries.iter().flat_map(|entry| item(0, entry)).collect());
    seeds
}

pub const METADATA_WORDS: &[&[u8]] = &[
    b"18446744073709551615",
    b"18446744073709551614",
    b"4294967296",
    b"-1",
    b"null",
    b"true",
    b"\"\"",
    b"[]",
    b"{}",
    b"[[[[[[[[[[[[[[[[",
    b"\\u0000",
    b"Deleting",
    b"Creating",
    b"Ready",
    b"00000000-0000-0000-0000-00000000000b",
    b"00000000-0000-0000-0000-00000000000c",
];
