//! The state and how commands change it.
//!
//! Exactly once (R2): the answers of the last [`MAX_ANSWERS`] requests are remembered by request id, and a
//! repeated request gets its first answer. Past that bound the oldest answer is forgotten, and its index noted:
//! a request whose sender had seen no later revision before its first try might be the forgotten one, so it is
//! refused ([`Refusal::Forgotten`]) and not carried out. [`Refusal::Rejudge`] is not an answer and not remembered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proto::cluster::*;
use proto::id::*;
use proto::limits::MAX_REPLICAS;
use proto::mutant::{self, Mutant};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::command::{Command, LeaseVerdict, PlannedMirror, Proposal};
use super::placement::{Space, check_spec, mirror_size};

/// Answers remembered; see above for what happens past it. About 2 MiB at most in practice.
pub const MAX_ANSWERS: usize = 8192;
/// Volumes, tombstones included: past it `CreateVolume` is refused.
pub const MAX_VOLUMES: usize = 1024;
/// Registered gateways: past it another name is refused.
pub const MAX_GATEWAYS: usize = 64;
/// Pools of one node: a report with more is refused.
pub const MAX_POOLS: usize = 64;
/// The least limit of a volume's resync, in bytes a second: below it one would hardly ever end.
pub const MIN_RESYNC_LIMIT: u64 = 1 << 20;
/// Settings: past it another key is refused.
pub const MAX_SETTINGS: usize = 256;
/// Bytes of a node's reason for a failed replica that are kept.
const MAX_REASON: usize = 512;

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Carried out, nothing to say.
    Done,
    /// This volume was created or changed.
    Volume(VolumeId),
    /// A session was opened.
    Opened {
        /// The volume.
        volume: VolumeId,
        /// The session.
        epoch: Epoch,
        /// How the one before it ended.
        previous: PreviousSession,
        /// No older lease could live any more.
        old_ended: bool,
    },
    /// The in-sync set as changed.
    Set(InSyncSet),
    /// Refused.
    Refused(Refusal),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remembered {
    pub(super) id: Uuid,
    pub(super) index: u64,
    pub(super) answer: Answer,
}

/// The cluster's metadata as of one log index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    pub(super) cluster: Option<(ClusterId, String)>,
    /// The last entry applied.
    pub(super) applied: u64,
    /// The last entry that changed something.
    pub(super) revision: u64,
    pub(super) members: BTreeMap<NodeId, Member>,
    pub(super) pools: BTreeMap<(NodeId, String), Pool>,
    pub(super) gateways: BTreeMap<String, GatewayInfo>,
    pub(super) volumes: BTreeMap<VolumeId, VolumeInfo>,
    pub(super) settings: BTreeMap<String, String>,
    pub(super) answers: BTreeMap<Uuid, Answer>,
    /// The remembered requests, oldest first, and the index of each.
    pub(super) answer_order: VecDeque<(Uuid, u64)>,
    /// The index of the newest forgotten answer; 0: none.
    pub(super) forgotten: u64,
}

impl Metadata {
    /// The last entry applied.
    pub fn applied(&self) -> u64 {
        self.applied
    }
    /// The last entry that changed something.
    pub fn revision(&self) -> u64 {
        self.revision
    }
    /// The cluster, once its first command has been applied.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster.as_ref().map(|(id, _)| *id)
    }
    /// The members by id.
    pub fn members(&self) -> &BTreeMap<NodeId, Member> {
        &self.members
    }
    /// The volumes by id, tombstones included.
    pub fn volumes(&self) -> &BTreeMap<VolumeId, VolumeInfo> {
        &self.volumes
    }
    /// The gateways by name.
    pub fn gateways(&self) -> &BTreeMap<String, GatewayInfo> {
        &self.gateways
    }
    /// A node's pools.
    pub fn pools_of(&self, node: NodeId) -> impl Iterator<Item = &Pool> {
        self.pools.values().filter(move |pool| pool.node == node)
    }
    /// The answer that a request got, if it is remembered.
    pub fn answer(&self, request: RequestId) -> Option<&Answer> {
        self.answers.get(&request.id)
    }

    /// Everything, for gateways and the command line.
    pub fn view(&self, stale: bool) -> ClusterView {
        let (id, name) = self.cluster.clone().unwrap_or_default();
        ClusterView {
            id,
            name,
            revision: self.revision,
            stale,
            members: self.members.values().cloned().collect(),
            pools: self.pools.values().cloned().collect(),
            gateways: self.gateways.values().cloned().collect(),
            volumes: self.volumes.values().cloned().collect(),
        }
    }

    /// Bytes that may still be given to replicas: capacities less the sizes of the replicas placed there, whether
    /// they exist yet, or still.
    pub fn space(&self) -> Space {
        let mut space = Space::new();
        for ((node, name), pool) in &self.pools {
            space.entry(*node).or_default().insert(name.clone(), pool.capacity);
        }
        for mirror in self.volumes.values().flat_map(|volume| &volume.mirrors) {
            for replica in &mirror.replicas {
                let pool = space.get_mut(&replica.node).and_then(|pools| pools.get_mut(&replica.pool));
                if let Some(left) = pool {
                    *left = left.saturating_sub(mirror.size);
                }
            }
        }
        space
    }

    /// Applies an entry that raft wrote by itself: nothing changes but the index.
    pub fn apply_empty(&mut self, index: u64) {
        self.advance(index);
    }

    fn advance(&mut self, index: u64) {
        assert!(index == self.applied + 1, "entry {index} applied after {}", self.applied);
        self.applied = index;
    }

    /// Applies the entry `index` that the leader of `term` appended. Entries come in order, each once.
    ///
    /// # Panics
    /// When an index is skipped or repeated.
    pub fn apply(&mut self, index: u64, term: u64, proposal: Proposal) -> Answer {
        self.advance(index);
        let Proposal { request, command } = proposal;
        if let Some(answer) = self.answers.get(&request.id) {
            return answer.clone();
        }
        if request.since < self.forgotten {
            let revision = self.forgotten;
            return Answer::Refused(Refusal::Forgotten { revision });
        }
        let before = Change(false);
        let mut change = before;
        let answer = self.carry_out(term, command, &mut change).unwrap_or_else(Answer::Refused);
        if change.0 {
            self.revision = index;
        }
        if !matches!(answer, Answer::Refused(Refusal::Rejudge { .. })) {
            self.remember(request.id, index, answer.clone());
        }
        answer
    }

    fn remember(&mut self, id: Uuid, index: u64, answer: Answer) {
        self.answers.insert(id, answer);
        self.answer_order.push_back((id, index));
        while self.answer_order.len() > MAX_ANSWERS {
            if let Some((oldest, index)) = self.answer_order.pop_front() {
                self.answers.remove(&oldest);
                self.forgotten = index;
            }
        }
    }

    fn carry_out(&mut self, term: u64, command: Command, change: &mut Change) -> Result<Answer, Refusal> {
        match command {
            Command::Init { definition } => self.init(definition, change),
            Command::UpdateMember { node, control_addr, data_addr } => {
                let member = self.members.get_mut(&node).ok_or(Refusal::not_found(ObjectKind::Member, node))?;
                change.set(&mut member.control_addr, control_addr);
                change.set(&mut member.data_addr, data_addr);
                Ok(Answer::Done)
            }
            Command::ReportPools { node, pools } => self.report_pools(node, pools, change),
            Command::RegisterGateway { gateway } => {
                if !self.gateways.contains_key(&gateway.name) && self.gateways.len() >= MAX_GATEWAYS {
                    return Err(Refusal::invalid("gateway", format!("there are {MAX_GATEWAYS} already")));
                }
                let known = self.gateways.insert(gateway.name.clone(), gateway.clone());
                change.0 |= known != Some(gateway);
                Ok(Answer::Done)
            }
            Command::CreateVolume { volume, spec, mirrors, unix_ms } => {
                self.create_volume(volume, spec, mirrors, unix_ms, change)
            }
            Command::ReplicaReady { node, replica } => self.replica_ready(node, replica, change),
            Command::ReplicaFailed { node, replica, mut reason } => {
                let mut end = reason.len().min(MAX_REASON);
                while !reason.is_char_boundary(end) {
                    end -= 1;
                }
                reason.truncate(end);
                let (_, found) = self.replica_of(node, replica)?;
                if !found.ready {
                    change.set(&mut found.failure, Some(reason));
                }
                Ok(Answer::Done)
            }
            Command::ReplicaDeleted { node, replica } => self.replica_deleted(node, replica, change),
            Command::DeleteVolume { volume } => {
                let volume = self.volume_mut(volume)?;
                if let SessionState::Open { gateway } = &volume.session.state {
                    return Err(Refusal::InUse {
                        volume: volume.name.clone(),
                        gateway: gateway.clone(),
                        epoch: volume.session.epoch,
                    });
                }
                change.set(&mut volume.state, VolumeState::Deleting);
                change.set(&mut volume.export, None);
                Ok(Answer::Done)
            }
            Command::ExportVolume { volume, gateway } => {
                let id = self.living(volume)?.id;
                if let Some(name) = gateway.as_ref().filter(|name| !self.gateways.contains_key(*name)) {
                    return Err(Refusal::not_found(ObjectKind::Gateway, name));
                }
                change.set(&mut self.volume_mut(id)?.export, gateway);
                Ok(Answer::Volume(id))
            }
            Command::OpenSession { volume, gateway, take_over, verdict } => {
                self.open_session(term, volume, gateway, take_over, verdict, change)
            }
            Command::CloseSession { volume, epoch, clean } => {
                let volume = self.owned(volume, epoch)?;
                let gateway = volume.session.owner().unwrap_or_default().to_owned();
                change.set(&mut volume.session.state, SessionState::Closed { gateway, clean });
                Ok(Answer::Done)
            }
            Command::ChangeSet { volume, mirror, epoch, expected, members, awaited } => {
                let stale = mutant::is(Mutant::StaleSetChange);
                let volume = if stale { self.volume_mut(volume)? } else { self.owned(volume, epoch)? };
                let found = volume.mirrors.iter_mut().find(|found| found.id == mirror);
                let found = found.ok_or(Refusal::not_found(ObjectKind::Mirror, mirror))?;
                change_set(found, expected, members, awaited, change).map(Answer::Set)
            }
            Command::RecoverVolume { volume, unix_ms } => {
                let volume = self.living(volume)?;
                let id = volume.id;
                // It is for what waits now, and only a session knows what that is.
                if volume.session.owner().is_none() {
                    return Err(Refusal::WrongState {
                        kind: ObjectKind::Volume,
                        name: volume.name.clone(),
                        state: "not open at any gateway, so that nothing waits".into(),
                    });
                }
                change.set(&mut self.volume_mut(id)?.recover_unix_ms, Some(unix_ms));
                Ok(Answer::Volume(id))
            }
            Command::FinishRecovery { volume, epoch } => {
                change.set(&mut self.owned(volume, epoch)?.recover_unix_ms, None);
                Ok(Answer::Done)
            }
            Command::SetVolume { volume, resync_limit } => {
                let id = self.living(volume)?.id;
                if resync_limit.is_some_and(|limit| limit < MIN_RESYNC_LIMIT) {
                    let least = format!("less than {} KiB a second", MIN_RESYNC_LIMIT >> 10);
                    return Err(Refusal::invalid("resync-limit", least));
                }
                change.set(&mut self.volume_mut(id)?.resync_limit, resync_limit);
                Ok(Answer::Volume(id))
            }
            Command::ChangeSetting { key, value } => {
                if !self.settings.contains_key(&key) && self.settings.len() >= MAX_SETTINGS {
                    return Err(Refusal::invalid("setting", format!("there are {MAX_SETTINGS} already")));
                }
                let before = match value.clone() {
                    Some(value) => self.settings.insert(key, value),
                    None => self.settings.remove(&key),
                };
                change.0 |= before != value;
                Ok(Answer::Done)
            }
        }
    }

    fn init(&mut self, definition: ClusterDefinition, change: &mut Change) -> Result<Answer, Refusal> {
        match self.cluster() {
            Some(ours) if ours != definition.id => {
                return Err(Refusal::OtherCluster { ours, theirs: definition.id });
            }
            Some(_) => return Ok(Answer::Done),
            None => {}
        }
        self.cluster = Some((definition.id, definition.name));
        self.members = definition.members.into_iter().map(|member| (member.id, member)).collect();
        change.0 = true;
        Ok(Answer::Done)
    }

    fn report_pools(&mut self, node: NodeId, pools: Vec<Pool>, change: &mut Change) -> Result<Answer, Refusal> {
        let member = self.members.get(&node).ok_or(Refusal::not_found(ObjectKind::Member, node))?;
        if member.role != Role::Node {
            return Err(Refusal::invalid("pools", format!("{} is a witness and has none", member.name)));
        }
        if pools.len() > MAX_POOLS {
            return Err(Refusal::invalid("pools", format!("{} of them, at most {MAX_POOLS} are allowed", pools.len())));
        }
        if let Some(other) = pools.iter().find(|pool| pool.node != node) {
            return Err(Refusal::invalid("pool", format!("{} is reported by another node", other.name)));
        }
        let new: BTreeMap<_, _> = pools.into_iter().map(|pool| ((node, pool.name.clone()), pool)).collect();
        let old: BTreeMap<_, _> = self.pools.extract_if(.., |(of, _), _| *of == node).collect();
        change.0 |= old != new;
        self.pools.extend(new);
        Ok(Answer::Done)
    }

    fn create_volume(
        &mut self,
        id: VolumeId,
        spec: VolumeSpec,
        mirrors: Vec<PlannedMirror>,
        unix_ms: u64,
        change: &mut Change,
    ) -> Result<Answer, Refusal> {
        check_spec(&spec)?;
        let exists = |name: String| Refusal::AlreadyExists { kind: ObjectKind::Volume, name };
        if self.volumes.values().any(|v| v.name == spec.name && v.state != VolumeState::Deleting) {
            return Err(exists(spec.name));
        }
        if self.volumes.contains_key(&id) {
            return Err(exists(id.to_string()));
        }
        if self.volumes.len() >= MAX_VOLUMES {
            return Err(Refusal::invalid("volume", format!("there are {MAX_VOLUMES} already")));
        }
        if let Some(name) = spec.export.as_ref().filter(|name| !self.gateways.contains_key(*name)) {
            return Err(Refusal::not_found(ObjectKind::Gateway, name));
        }
        self.check_plan(&spec, &mirrors)?;
        let mirrors = mirrors.into_iter().map(|mirror| MirrorInfo {
            id: mirror.id,
            size: mirror.size,
            replicas: mirror
                .replicas
                .into_iter()
                .map(|r| ReplicaInfo { id: r.id, node: r.node, pool: r.pool, ready: false, failure: None })
                .collect(),
            in_sync: InSyncSet::default(),
        });
        let volume = VolumeInfo {
            id,
            name: spec.name,
            size: spec.size,
            replicas: spec.replicas,
            chunk_size: spec.chunk_size,
            min_in_sync: spec.min_in_sync,
            write_cache: spec.write_cache,
            state: VolumeState::Creating,
            mirrors: mirrors.collect(),
            export: spec.export,
            session: VolumeSession { epoch: Epoch(0), state: SessionState::Never, settled: true },
            recover_unix_ms: None,
            resync_limit: None,
            created_unix_ms: unix_ms,
        };
        self.volumes.insert(id, volume);
        change.0 = true;
        Ok(Answer::Volume(id))
    }

    /// The leader planned by its applied state; what was committed since may have taken the space.
    fn check_plan(&self, spec: &VolumeSpec, mirrors: &[PlannedMirror]) -> Result<(), Refusal> {
        if mirrors.len() != spec.stripes as usize {
            return Err(Refusal::invalid("plan", format!("{} mirrors for {} stripes", mirrors.len(), spec.stripes)));
        }
        let mut space = self.space();
        let mut ids = BTreeSet::new();
        for (index, mirror) in (0..).zip(mirrors) {
            let size = mirror_size(spec, index);
            if mirror.size != size {
                return Err(Refusal::invalid("plan", format!("mirror {index} has {} of {size} bytes", mirror.size)));
            }
            let nodes: BTreeSet<_> = mirror.replicas.iter().map(|replica| replica.node).collect();
            if nodes.len() != spec.replicas as usize || mirror.replicas.len() > MAX_REPLICAS.min(nodes.len()) {
                return Err(Refusal::TooFewNodes { wanted: spec.replicas, available: nodes.len() as u32 });
            }
            for replica in &mirror.replicas {
                if !ids.insert(replica.id) {
                    return Err(Refusal::invalid("plan", format!("replica {} twice", replica.id)));
                }
                let place = format!("{}/{}", replica.node, replica.pool);
                let left = space.get_mut(&replica.node).and_then(|pools| pools.get_mut(&replica.pool));
                let left = left.ok_or(Refusal::not_found(ObjectKind::Pool, &place))?;
                if *left < size {
                    return Err(Refusal::NoSpace {
                        place: format!("pool {} of node {}", replica.pool, replica.node),
                        wanted: size,
                        available: *left,
                    });
                }
                *left -= size;
            }
        }
        Ok(())
    }

    fn replica_of(&mut self, node: NodeId, replica: ReplicaId) -> Result<(VolumeId, &mut ReplicaInfo), Refusal> {
        let volumes = self.volumes.values_mut();
        volumes
            .flat_map(|volume| volume.mirrors.iter_mut().map(|mirror| (volume.id, mirror)))
            .flat_map(|(id, mirror)| mirror.replicas.iter_mut().map(move |replica| (id, replica)))
            .find(|(_, found)| found.id == replica && found.node == node)
            .ok_or(Refusal::not_found(ObjectKind::Replica, replica))
    }

    /// With the last replica the volume is ready, and the first set of each mirror holds all (R7).
    fn replica_ready(&mut self, node: NodeId, replica: ReplicaId, change: &mut Change) -> Result<Answer, Refusal> {
        let (id, found) = self.replica_of(node, replica)?;
        change.set(&mut found.ready, true);
        change.set(&mut found.failure, None);
        let volume = self.volume_mut(id)?;
        let ready = volume.mirrors.iter().flat_map(|mirror| &mirror.replicas).all(|replica| replica.ready);
        if volume.state == VolumeState::Creating && ready {
            volume.state = VolumeState::Ready;
            for mirror in &mut volume.mirrors {
                let mut members: Vec<_> = mirror.replicas.iter().map(|replica| replica.id).collect();
                members.sort_unstable();
                mirror.in_sync = InSyncSet { version: SetVersion(1), members, awaited: Vec::new() };
            }
            change.0 = true;
        }
        Ok(Answer::Done)
    }

    fn replica_deleted(&mut self, node: NodeId, replica: ReplicaId, change: &mut Change) -> Result<Answer, Refusal> {
        let (id, _) = self.replica_of(node, replica)?;
        let volume = self.volume_mut(id)?;
        if volume.state != VolumeState::Deleting {
            return Err(Refusal::WrongState {
                kind: ObjectKind::Volume,
                name: volume.name.clone(),
                state: volume.state.to_string(),
            });
        }
        for mirror in &mut volume.mirrors {
            mirror.replicas.retain(|found| found.id != replica);
        }
        if volume.mirrors.iter().all(|mirror| mirror.replicas.is_empty()) {
            self.volumes.remove(&id);
        }
        change.0 = true;
        Ok(Answer::Done)
    }

    fn open_session(
        &mut self,
        term: u64,
        volume: VolumeId,
        gateway: String,
        take_over: bool,
        verdict: LeaseVerdict,
        change: &mut Change,
    ) -> Result<Answer, Refusal> {
        if !self.gateways.contains_key(&gateway) {
            return Err(Refusal::not_found(ObjectKind::Gateway, gateway));
        }
        let id = self.living(volume)?.id;
        let volume = self.volume_mut(id)?;
        if volume.state != VolumeState::Ready {
            return Err(Refusal::WrongState {
                kind: ObjectKind::Volume,
                name: volume.name.clone(),
                state: volume.state.to_string(),
            });
        }
        let session = &volume.session;
        if verdict.term != term || verdict.epoch != session.epoch {
            return Err(Refusal::Rejudge { epoch: session.epoch });
        }
        if let Some(owner) = session.owner().filter(|owner| *owner != gateway)
            && !verdict.ended
            && !take_over
        {
            return Err(Refusal::InUse {
                volume: volume.name.clone(),
                gateway: owner.to_owned(),
                epoch: session.epoch,
            });
        }
        let previous = match session.state {
            SessionState::Never => PreviousSession::Never,
            SessionState::Closed { clean: true, .. } => PreviousSession::Clean,
            _ => PreviousSession::Unclean,
        };
        let reused = mutant::is(Mutant::EpochReused) && session.owner() == Some(&gateway);
        let epoch = if reused { session.epoch } else { session.epoch.next() };
        let state = SessionState::Open { gateway };
        volume.session = VolumeSession { epoch, state, settled: verdict.ended };
        // Nobody has accepted the loss of what this session may wait for.
        volume.recover_unix_ms = None;
        change.0 = true;
        Ok(Answer::Opened { volume: id, epoch, previous, old_ended: verdict.ended })
    }

    fn volume_mut(&mut self, id: VolumeId) -> Result<&mut VolumeInfo, Refusal> {
        self.volumes.get_mut(&id).ok_or(Refusal::not_found(ObjectKind::Volume, id))
    }

    fn living(&self, id: VolumeId) -> Result<&VolumeInfo, Refusal> {
        let volume = self.volumes.get(&id).ok_or(Refusal::not_found(ObjectKind::Volume, id))?;
        if volume.state == VolumeState::Deleting {
            return Err(Refusal::WrongState {
                kind: ObjectKind::Volume,
                name: volume.name.clone(),
                state: volume.state.to_string(),
            });
        }
        Ok(volume)
    }

    /// The volume, if `epoch` is its open session.
    fn owned(&mut self, id: VolumeId, epoch: Epoch) -> Result<&mut VolumeInfo, Refusal> {
        let volume = self.volume_mut(id)?;
        if volume.session.epoch != epoch || volume.session.owner().is_none() {
            let gateway = match &volume.session.state {
                SessionState::Never => String::new(),
                SessionState::Open { gateway } | SessionState::Closed { gateway, .. } => gateway.clone(),
            };
            return Err(Refusal::Superseded { volume: volume.name.clone(), gateway, epoch: volume.session.epoch });
        }
        Ok(volume)
    }
}

/// The new set is a non-empty part of the mirror's definition, one version on (R2).
fn change_set(
    mirror: &mut MirrorInfo,
    expected: SetVersion,
    members: Vec<ReplicaId>,
    awaited: Vec<ReplicaId>,
    change: &mut Change,
) -> Result<InSyncSet, Refusal> {
    if mirror.in_sync.version != expected && !mutant::is(Mutant::StaleSetChange) {
        return Err(Refusal::SetChanged { mirror: mirror.id, current: mirror.in_sync.clone() });
    }
    if members.is_empty() {
        return Err(Refusal::invalid("set members", "the last one is never removed"));
    }
    if !members.is_sorted_by(|a, b| a < b) || !awaited.is_sorted_by(|a, b| a < b) {
        return Err(Refusal::invalid("set members", "are not sorted, or not distinct"));
    }
    if awaited.iter().any(|replica| members.contains(replica)) {
        return Err(Refusal::invalid("set members", "are awaited too"));
    }
    let defined = |id: &&ReplicaId| !mirror.replicas.iter().any(|replica| replica.id == **id);
    if let Some(stranger) = members.iter().chain(&awaited).find(defined) {
        return Err(Refusal::not_found(ObjectKind::Replica, stranger));
    }
    let version = if mutant::is(Mutant::SetKeepsVersion) { expected } else { expected.next() };
    mirror.in_sync = InSyncSet { version, members, awaited };
    change.0 = true;
    Ok(mirror.in_sync.clone())
}

/// Whether a command changed what a view shows.
#[derive(Clone, Copy)]
struct Change(bool);

impl Change {
    fn set<T: PartialEq>(&mut self, place: &mut T, value: T) {
        if *place != value {
            *place = value;
            self.0 = true;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine and the requests made of it.
    pub(crate) struct Bench {
        pub(crate) machine: Metadata,
        requests: u128,
    }

    pub(crate) fn definition() -> ClusterDefinition {
        let member = |n: u64, role: Role| Member {
            id: NodeId(n),
            name: format!("{role}-{n}"),
            role,
            control_addr: format!("127.0.0.1:{n}"),
            data_addr: String::new(),
        };
        ClusterDefinition {
            id: ClusterId(Uuid::from_u128(77)),
            name: "test".into(),
            members: vec![
                member(1, Role::Node),
                member(2, Role::Node),
                member(3, Role::Node),
                member(4, Role::Witness),
                member(5, Role::Witness),
            ],
        }
    }

    pub(crate) fn gateway(name: &str) -> GatewayInfo {
        GatewayInfo { name: name.into(), control_addr: String::new(), portal: String::new() }
    }

    pub(crate) fn pool(node: u64, name: &str, capacity: u64) -> Pool {
        Pool { node: NodeId(node), name: name.into(), kind: "file".into(), path: "/p".into(), capacity, free: capacity }
    }

    pub(crate) fn spec() -> VolumeSpec {
        VolumeSpec {
            name: "tank".into(),
            size: 1 << 20,
            replicas: 3,
            stripes: 1,
            chunk_size: 256 << 10,
            min_in_sync: 1,
            write_cache: true,
            export: None,
        }
    }

    fn rid(n: u128) -> ReplicaId {
        ReplicaId(Uuid::from_u128(n))
    }
    const VOLUME: VolumeId = VolumeId(Uuid::from_u128(1));
    const MIRROR: MirrorId = MirrorId(Uuid::from_u128(2));

    impl Bench {
        fn with_volume() -> Self {
            let mut bench = Self { machine: Metadata::default(), requests: 1000 };
            bench.ok(Command::Init { definition: definition() });
            bench.ok(Command::RegisterGateway { gateway: gateway("a") });
            bench.ok(Command::RegisterGateway { gateway: gateway("b") });
            for node in 1..=3 {
                bench.ok(Command::ReportPools { node: NodeId(node), pools: vec![pool(node, "p1", 4 << 20)] });
            }
            bench.ok(bench.create(VOLUME, "tank", 10));
            bench
        }

        fn ready() -> Self {
            let mut bench = Self::with_volume();
            for n in 1..=3 {
                bench.ok(Command::ReplicaReady { node: NodeId(n), replica: rid(10 + u128::from(n)) });
            }
            bench
        }

        fn create(&self, volume: VolumeId, name: &str, ids: u128) -> Command {
            let replicas = (1..=3).map(|n| super::super::command::PlannedReplica {
                id: rid(ids + n),
                node: NodeId(n as u64),
                pool: "p1".into(),
            });
            let mirror = PlannedMirror { id: MIRROR, size: 1 << 20, replicas: replicas.collect() };
            Command::CreateVolume {
                volume,
                spec: VolumeSpec { name: name.into(), ..spec() },
                mirrors: vec![mirror],
                unix_ms: 5,
            }
        }

        fn run(&mut self, command: Command) -> Answer {
            self.requests += 1;
            let request = RequestId { id: Uuid::from_u128(self.requests), since: self.machine.applied };
            self.run_as(request, command)
        }

        fn run_as(&mut self, request: RequestId, command: Command) -> Answer {
            self.machine.apply(self.machine.applied + 1, 1, Proposal { request, command })
        }

        fn ok(&mut self, command: Command) -> Answer {
            let answer = self.run(command);
            assert!(!matches!(answer, Answer::Refused(_)), "{answer:?}");
            answer
        }

        fn refused(&mut self, command: Command) -> Refusal {
            let revision = self.machine.revision;
            let answer = self.run(command);
            assert_eq!(self.machine.revision, revision, "a refused command changes nothing");
            let Answer::Refused(refusal) = answer else { panic!("{answer:?}") };
            refusal
        }

        fn open(&mut self, gateway: &str, take_over: bool, ended: bool) -> Answer {
            let epoch = self.machine.volumes[&VOLUME].session.epoch;
            let verdict = LeaseVerdict { term: 1, epoch, ended };
            self.run(Command::OpenSession { volume: VOLUME, gateway: gateway.into(), take_over, verdict })
        }

        fn set(&mut self, epoch: u64, expected: u64, members: &[u128]) -> Answer {
            self.run(Command::ChangeSet {
                volume: VOLUME,
                mirror: MIRROR,
                epoch: Epoch(epoch),
                expected: SetVersion(expected),
                members: members.iter().map(|n| rid(*n)).collect(),
                awaited: vec![],
            })
        }
    }

    #[test]
    fn a_volume_is_ready_when_its_last_replica_is_and_all_are_in_sync() {
        let mut bench = Bench::with_volume();
        for n in 1..=3 {
            assert_eq!(bench.machine.volumes[&VOLUME].state, VolumeState::Creating);
            bench.ok(Command::ReplicaReady { node: NodeId(n), replica: rid(10 + u128::from(n)) });
        }
        let volume = &bench.machine.volumes[&VOLUME];
        assert_eq!(volume.state, VolumeState::Ready);
        let set = InSyncSet { version: SetVersion(1), members: vec![rid(11), rid(12), rid(13)], awaited: vec![] };
        assert_eq!(volume.mirrors[0].in_sync, set);
    }

    #[test]
    fn a_failed_replica_says_why_until_it_is_ready() {
        let mut bench = Bench::with_volume();
        let failure = |bench: &Bench| bench.machine.volumes[&VOLUME].mirrors[0].replicas[0].failure.clone();
        bench.ok(Command::ReplicaFailed { node: NodeId(1), replica: rid(11), reason: "é".repeat(600) });
        assert_eq!(failure(&bench), Some("é".repeat(MAX_REASON / 2)));
        bench.ok(Command::ReplicaReady { node: NodeId(1), replica: rid(11) });
        assert_eq!(failure(&bench), None);
    }

    #[test]
    fn creation_is_refused_with_what_is_wrong() {
        let mut bench = Bench::ready();
        let other = VolumeId(Uuid::from_u128(9));
        let refusal = bench.refused(bench.create(other, "tank", 20));
        assert_eq!(refusal, Refusal::AlreadyExists { kind: ObjectKind::Volume, name: "tank".into() });
        for (id, name) in [(3, "b"), (4, "c"), (5, "d")] {
            bench.ok(bench.create(VolumeId(Uuid::from_u128(id)), name, id * 100));
        }
        let refusal = bench.refused(bench.create(other, "full", 20));
        assert!(matches!(refusal, Refusal::NoSpace { wanted: 1048576, available: 0, .. }), "{refusal:?}");
        bench.ok(Command::ReportPools { node: NodeId(1), pools: vec![] });
        let refusal = bench.refused(bench.create(other, "gone", 20));
        assert_eq!(refusal, Refusal::not_found(ObjectKind::Pool, "1/p1"));
    }

    #[test]
    fn a_session_is_refused_while_anothers_lease_may_live() {
        let mut bench = Bench::ready();
        let opened =
            |epoch, previous, old_ended| Answer::Opened { volume: VOLUME, epoch: Epoch(epoch), previous, old_ended };
        assert_eq!(bench.open("a", false, true), opened(1, PreviousSession::Never, true));
        let Answer::Refused(refusal) = bench.open("b", false, false) else { panic!() };
        assert_eq!(refusal, Refusal::InUse { volume: "tank".into(), gateway: "a".into(), epoch: Epoch(1) });
        assert_eq!(bench.open("a", false, false), opened(2, PreviousSession::Unclean, false), "same name");
        assert_eq!(bench.open("b", true, false), opened(3, PreviousSession::Unclean, false), "take-over");
        assert_eq!(bench.open("a", false, true), opened(4, PreviousSession::Unclean, true), "lease ended");
        bench.ok(Command::CloseSession { volume: VOLUME, epoch: Epoch(4), clean: true });
        assert_eq!(bench.open("b", false, false), opened(5, PreviousSession::Clean, false), "closed");
        let Answer::Refused(refusal) = bench.open("c", false, true) else { panic!() };
        assert_eq!(refusal, Refusal::not_found(ObjectKind::Gateway, "c"));
    }

    #[test]
    fn an_opening_judged_in_another_term_or_over_another_session_is_not_carried_out() {
        let mut bench = Bench::ready();
        let request = RequestId { id: Uuid::from_u128(1), since: bench.machine.applied };
        let open = |term, epoch| Command::OpenSession {
            volume: VOLUME,
            gateway: "a".into(),
            take_over: true,
            verdict: LeaseVerdict { term, epoch: Epoch(epoch), ended: true },
        };
        let rejudge = Answer::Refused(Refusal::Rejudge { epoch: Epoch(0) });
        assert_eq!(bench.run_as(request, open(2, 0)), rejudge, "appended in term 1, judged in 2");
        assert_eq!(bench.run_as(request, open(1, 7)), rejudge, "judged over session 7");
        assert!(matches!(bench.run_as(request, open(1, 0)), Answer::Opened { .. }), "not remembered");
    }

    #[test]
    fn a_set_changes_only_under_the_current_session_and_version() {
        let mut bench = Bench::ready();
        assert!(matches!(bench.set(0, 1, &[11]), Answer::Refused(Refusal::Superseded { .. })), "never opened");
        bench.open("a", false, true);
        let two = InSyncSet { version: SetVersion(2), members: vec![rid(11), rid(13)], awaited: vec![] };
        assert_eq!(bench.set(1, 1, &[11, 13]), Answer::Set(two.clone()));
        let changed = Refusal::SetChanged { mirror: MIRROR, current: two };
        assert_eq!(bench.set(1, 1, &[11]), Answer::Refused(changed));
        for bad in [&[][..], &[11, 11], &[13, 11], &[11, 99]] {
            assert!(matches!(bench.set(1, 2, bad), Answer::Refused(_)), "{bad:?}");
        }
        bench.open("b", true, false);
        let superseded = Refusal::Superseded { volume: "tank".into(), gateway: "b".into(), epoch: Epoch(2) };
        assert_eq!(bench.set(1, 2, &[11]), Answer::Refused(superseded));
        bench.ok(Command::CloseSession { volume: VOLUME, epoch: Epoch(2), clean: false });
        assert!(matches!(bench.set(2, 2, &[11]), Answer::Refused(Refusal::Superseded { .. })), "closed");
    }

    #[test]
    fn a_repeated_request_is_carried_out_once() {
        let mut bench = Bench::ready();
        bench.open("a", false, true);
        let request = RequestId { id: Uuid::from_u128(5), since: bench.machine.applied };
        let command = Command::ChangeSet {
            volume: VOLUME,
            mirror: MIRROR,
            epoch: Epoch(1),
            expected: SetVersion(1),
            members: vec![rid(11)],
            awaited: vec![],
        };
        let first = bench.run_as(request, command.clone());
        assert!(matches!(first, Answer::Set(_)));
        bench.set(1, 2, &[11, 12]);
        assert_eq!(bench.run_as(request, command), first);
        assert_eq!(bench.machine.volumes[&VOLUME].mirrors[0].in_sync.version, SetVersion(3));
    }

    #[test]
    fn a_request_older_than_the_remembered_answers_is_not_carried_out_again() {
        let mut bench = Bench::ready();
        let old = RequestId { id: Uuid::from_u128(5), since: bench.machine.applied };
        let setting = |value: &str| Command::ChangeSetting { key: "k".into(), value: Some(value.into()) };
        bench.run_as(old, setting("old"));
        for _ in 0..MAX_ANSWERS {
            bench.ok(setting("new"));
        }
        let forgotten = bench.machine.forgotten;
        assert!(forgotten > old.since);
        assert_eq!(bench.run_as(old, setting("old")), Answer::Refused(Refusal::Forgotten { revision: forgotten }));
        assert_eq!(bench.machine.settings["k"], "new");
        assert_eq!(bench.machine.answers.len(), MAX_ANSWERS);
    }

    #[test]
    fn a_deleted_volume_is_a_tombstone_until_its_last_replica_is_gone() {
        let mut bench = Bench::ready();
        bench.open("a", false, true);
        assert!(matches!(bench.refused(Command::DeleteVolume { volume: VOLUME }), Refusal::InUse { .. }));
        let early = Command::ReplicaDeleted { node: NodeId(1), replica: rid(11) };
        assert!(matches!(bench.refused(early), Refusal::WrongState { .. }));
        bench.ok(Command::CloseSession { volume: VOLUME, epoch: Epoch(1), clean: true });
        bench.ok(Command::DeleteVolume { volume: VOLUME });
        assert!(matches!(bench.open("a", false, true), Answer::Refused(Refusal::WrongState { .. })));
        bench.ok(bench.create(VolumeId(Uuid::from_u128(9)), "tank", 20));
        for n in 1..=3 {
            assert!(bench.machine.volumes.contains_key(&VOLUME));
            bench.ok(Command::ReplicaDeleted { node: NodeId(n), replica: rid(10 + u128::from(n)) });
        }
        assert!(!bench.machine.volumes.contains_key(&VOLUME));
    }

    #[test]
    fn a_resync_limit_is_set_and_removed_and_not_too_small() {
        let mut bench = Bench::with_volume();
        let set = |resync_limit| Command::SetVolume { volume: VOLUME, resync_limit };
        bench.ok(set(Some(5 << 20)));
        assert_eq!(bench.machine.volumes[&VOLUME].resync_limit, Some(5 << 20));
        assert!(matches!(bench.refused(set(Some(1000))), Refusal::Invalid { .. }));
        bench.ok(set(None));
        assert_eq!(bench.machine.volumes[&VOLUME].resync_limit, None);
        let unknown = Command::SetVolume { volume: VolumeId(Uuid::from_u128(99)), resync_limit: None };
        assert!(matches!(bench.refused(unknown), Refusal::NotFound { .. }));
    }

    #[test]
    fn a_forced_recovery_is_for_the_session_that_is_open() {
        let mut bench = Bench::ready();
        let recover = Command::RecoverVolume { volume: VOLUME, unix_ms: 9 };
        assert!(matches!(bench.refused(recover.clone()), Refusal::WrongState { .. }));
        bench.open("a", false, true);
        bench.ok(recover.clone());
        assert_eq!(bench.machine.volumes[&VOLUME].recover_unix_ms, Some(9));
        let finish = |epoch| Command::FinishRecovery { volume: VOLUME, epoch: Epoch(epoch) };
        assert!(matches!(bench.refused(finish(0)), Refusal::Superseded { .. }));
        bench.ok(finish(1));
        assert_eq!(bench.machine.volumes[&VOLUME].recover_unix_ms, None);
        bench.ok(recover);
        bench.open("a", false, true);
        assert_eq!(bench.machine.volumes[&VOLUME].recover_unix_ms, None, "the next one begins without it");
    }

    #[test]
    fn what_changes_nothing_makes_no_revision() {
        let mut bench = Bench::ready();
        let revision = bench.machine.revision;
        bench.ok(Command::RegisterGateway { gateway: gateway("a") });
        bench.ok(Command::ReportPools { node: NodeId(1), pools: vec![pool(1, "p1", 4 << 20)] });
        bench.ok(Command::ReplicaReady { node: NodeId(1), replica: rid(11) });
        assert_eq!(bench.machine.revision, revision);
        assert!(matches!(
            bench.refused(Command::Init {
                definition: ClusterDefinition { id: ClusterId(Uuid::from_u128(78)), ..definition() }
            }),
            Refusal::OtherCluster { .. }
        ));
    }

    #[test]
    fn a_snapshot_restores_the_same_machine() {
        let mut bench = Bench::ready();
        bench.open("a", false, true);
        bench.set(1, 1, &[11, 12]);
        let restored = Metadata::decode(&bench.machine.encode()).unwrap();
        assert_eq!(restored, bench.machine);
        assert_eq!(restored.hash(), bench.machine.hash());
    }
}
