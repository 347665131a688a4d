//! Between gRPC messages and the checked types of [`crate::cluster`]. Past this module nothing sees generated
//! types, and no value that came from the network is used before it was checked here.

use uuid::Uuid;

use crate::cluster::*;
use crate::id::*;
use crate::pb;

/// A message that says nothing sensible: the field, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct BadMessage {
    /// Which field.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
}

impl BadMessage {
    fn new(field: &'static str, why: impl ToString) -> Self {
        Self { field, why: why.to_string() }
    }
}

impl From<BadMessage> for Refusal {
    fn from(bad: BadMessage) -> Self {
        Self::invalid(bad.field, bad.why)
    }
}

type Checked<T> = Result<T, BadMessage>;

/// Longest name of anything, in bytes: a longer one is refused.
pub const MAX_NAME: usize = 64;
/// Longest address, path or reason, in bytes: a longer one is refused.
pub const MAX_TEXT: usize = 1024;

fn uuid(field: &'static str, bytes: &[u8]) -> Checked<Uuid> {
    Uuid::from_slice(bytes).map_err(|_| BadMessage::new(field, format!("{} bytes where a UUID has 16", bytes.len())))
}

macro_rules! uuid_wire {
    ($($read:ident $type:ident),*) => {$(
        /// Reads the sixteen bytes of this identifier.
        ///
        /// # Errors
        /// When there are not sixteen.
        pub fn $read(field: &'static str, bytes: &[u8]) -> Checked<$type> {
            uuid(field, bytes).map($type)
        }
        impl From<$type> for prost::alloc::vec::Vec<u8> {
            fn from(id: $type) -> Self {
                id.to_bytes().to_vec()
            }
        }
    )*};
}
uuid_wire!(cluster_id ClusterId, volume_id VolumeId, mirror_id MirrorId, replica_id ReplicaId);

/// Checks the name of something that people name: 1 to [`MAX_NAME`] of a-z, A-Z, 0-9, `.`, `_`, `-`, beginning
/// with a letter or digit, so that it can stand in an iSCSI name, a path and a shell command.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(field: &'static str, name: &str) -> Checked<()> {
    if name.is_empty() {
        return Err(BadMessage::new(field, "is empty"));
    }
    if name.len() > MAX_NAME {
        return Err(BadMessage::new(field, format!("{} bytes, at most {MAX_NAME} are allowed", name.len())));
    }
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.chars().all(word) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(BadMessage::new(
            field,
            format!("{name:?} may have letters, digits, '.', '_' and '-' only, and begins with a letter or digit"),
        ));
    }
    Ok(())
}

fn text(field: &'static str, text: String) -> Checked<String> {
    if text.len() > MAX_TEXT {
        return Err(BadMessage::new(field, format!("{} bytes, at most {MAX_TEXT} are allowed", text.len())));
    }
    Ok(text)
}

fn filled(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn present(number: u64) -> Option<u64> {
    (number != 0).then_some(number)
}

fn need<T>(field: &'static str, value: Option<T>) -> Checked<T> {
    value.ok_or_else(|| BadMessage::new(field, "is missing"))
}

fn all<P, T>(from: Vec<P>) -> Checked<Vec<T>>
where
    T: TryFrom<P, Error = BadMessage>,
{
    from.into_iter().map(T::try_from).collect()
}

fn into_all<T, P: From<T>>(from: Vec<T>) -> Vec<P> {
    from.into_iter().map(P::from).collect()
}

macro_rules! unit_enum {
    ($domain:ident, $pb:ident, $field:literal, [$($variant:ident $wire:ident),*]) => {
        impl From<$domain> for pb::$pb {
            fn from(value: $domain) -> Self {
                match value { $($domain::$variant => Self::$wire),* }
            }
        }
        impl TryFrom<pb::$pb> for $domain {
            type Error = BadMessage;
            fn try_from(value: pb::$pb) -> Checked<Self> {
                match value {
                    $(pb::$pb::$wire => Ok(Self::$variant),)*
                    pb::$pb::Unspecified => Err(BadMessage::new($field, "is not one of the known values")),
                }
            }
        }
    };
}
unit_enum!(Role, Role, "role", [Node Node, Witness Witness]);
unit_enum!(VolumeState, VolumeState, "volume state", [Creating Creating, Ready Ready, Deleting Deleting]);
unit_enum!(PreviousSession, PreviousSession, "previous session", [Never Never, Clean Clean, Unclean Unclean]);
unit_enum!(
    ReplicaCondition,
    ReplicaCondition,
    "replica condition",
    [InSync InSync, Joining Joining, Missing Missing, Refused Refused]
);

impl TryFrom<pb::Member> for Member {
    type Error = BadMessage;
    fn try_from(pb: pb::Member) -> Checked<Self> {
        check_name("member name", &pb.name)?;
        if pb.id == 0 {
            return Err(BadMessage::new("member id", "is 0, ids begin with 1"));
        }
        let role = pb.role().try_into()?;
        Ok(Self {
            id: NodeId(pb.id),
            role,
            name: pb.name,
            control_addr: text("control address", pb.control_addr)?,
            data_addr: text("data address", pb.data_addr)?,
        })
    }
}
impl From<Member> for pb::Member {
    fn from(m: Member) -> Self {
        let mut pb = Self { id: m.id.0, name: m.name, role: 0, control_addr: m.control_addr, data_addr: m.data_addr };
        pb.set_role(m.role.into());
        pb
    }
}

impl TryFrom<pb::ClusterDefinition> for ClusterDefinition {
    type Error = BadMessage;
    fn try_from(pb: pb::ClusterDefinition) -> Checked<Self> {
        check_name("cluster name", &pb.name)?;
        Ok(Self { id: cluster_id("cluster id", &pb.cluster)?, name: pb.name, members: all(pb.members)? })
    }
}
impl From<ClusterDefinition> for pb::ClusterDefinition {
    fn from(d: ClusterDefinition) -> Self {
        Self { cluster: d.id.into(), name: d.name, members: into_all(d.members) }
    }
}

impl TryFrom<pb::Pool> for Pool {
    type Error = BadMessage;
    fn try_from(pb: pb::Pool) -> Checked<Self> {
        check_name("pool name", &pb.name)?;
        Ok(Self {
            node: NodeId(pb.node),
            name: pb.name,
            kind: text("pool kind", pb.kind)?,
            path: text("pool path", pb.path)?,
            capacity: pb.capacity,
            free: pb.free,
        })
    }
}
impl From<Pool> for pb::Pool {
    fn from(p: Pool) -> Self {
        Self { node: p.node.0, name: p.name, kind: p.kind, path: p.path, capacity: p.capacity, free: p.free }
    }
}

impl TryFrom<pb::GatewayInfo> for GatewayInfo {
    type Error = BadMessage;
    fn try_from(pb: pb::GatewayInfo) -> Checked<Self> {
        check_name("gateway name", &pb.name)?;
        Ok(Self {
            name: pb.name,
            control_addr: text("control address", pb.control_addr)?,
            portal: text("portal", pb.portal)?,
        })
    }
}
impl From<GatewayInfo> for pb::GatewayInfo {
    fn from(g: GatewayInfo) -> Self {
        Self { name: g.name, control_addr: g.control_addr, portal: g.portal }
    }
}

impl TryFrom<pb::Replica> for ReplicaInfo {
    type Error = BadMessage;
    fn try_from(pb: pb::Replica) -> Checked<Self> {
        Ok(Self {
            id: replica_id("replica id", &pb.id)?,
            node: NodeId(pb.node),
            pool: pb.pool,
            ready: pb.ready,
            failure: filled(pb.failure),
        })
    }
}
impl From<ReplicaInfo> for pb::Replica {
    fn from(r: ReplicaInfo) -> Self {
        Self { id: r.id.into(), node: r.node.0, pool: r.pool, ready: r.ready, failure: r.failure.unwrap_or_default() }
    }
}

impl TryFrom<pb::InSyncSet> for InSyncSet {
    type Error = BadMessage;
    fn try_from(pb: pb::InSyncSet) -> Checked<Self> {
        let read = |ids: Vec<Vec<u8>>| {
            let ids = ids.iter().map(|id| replica_id("set member", id)).collect::<Checked<Vec<_>>>()?;
            if !ids.is_sorted_by(|a, b| a < b) {
                return Err(BadMessage::new("set members", "are not sorted, or not distinct"));
            }
            Ok(ids)
        };
        Ok(Self { version: SetVersion(pb.version), members: read(pb.members)?, awaited: read(pb.awaited)? })
    }
}
impl From<InSyncSet> for pb::InSyncSet {
    fn from(s: InSyncSet) -> Self {
        Self { version: s.version.0, members: into_all(s.members), awaited: into_all(s.awaited) }
    }
}

impl TryFrom<pb::Mirror> for MirrorInfo {
    type Error = BadMessage;
    fn try_from(pb: pb::Mirror) -> Checked<Self> {
        Ok(Self {
            id: mirror_id("mirror id", &pb.id)?,
            size: pb.size,
            replicas: all(pb.replicas)?,
            in_sync: need("in-sync set", pb.in_sync)?.try_into()?,
        })
    }
}
impl From<MirrorInfo> for pb::Mirror {
    fn from(m: MirrorInfo) -> Self {
        Self { id: m.id.into(), size: m.size, replicas: into_all(m.replicas), in_sync: Some(m.in_sync.into()) }
    }
}

impl TryFrom<pb::Session> for VolumeSession {
    type Error = BadMessage;
    fn try_from(pb: pb::Session) -> Checked<Self> {
        let wire = pb.state();
        let gateway = pb.gateway;
        let state = match wire {
            pb::SessionState::Never => SessionState::Never,
            pb::SessionState::Open => SessionState::Open { gateway },
            pb::SessionState::ClosedClean => SessionState::Closed { gateway, clean: true },
            pb::SessionState::ClosedUnclean => SessionState::Closed { gateway, clean: false },
            pb::SessionState::Unspecified => return Err(BadMessage::new("session state", "is not known")),
        };
        Ok(Self { epoch: Epoch(pb.epoch), state, settled: pb.settled })
    }
}
impl From<VolumeSession> for pb::Session {
    fn from(s: VolumeSession) -> Self {
        let (state, gateway) = match s.state {
            SessionState::Never => (pb::SessionState::Never, String::new()),
            SessionState::Open { gateway } => (pb::SessionState::Open, gateway),
            SessionState::Closed { gateway, clean: true } => (pb::SessionState::ClosedClean, gateway),
            SessionState::Closed { gateway, clean: false } => (pb::SessionState::ClosedUnclean, gateway),
        };
        Self { epoch: s.epoch.0, state: state.into(), gateway, settled: s.settled }
    }
}

impl TryFrom<pb::Volume> for VolumeInfo {
    type Error = BadMessage;
    fn try_from(pb: pb::Volume) -> Checked<Self> {
        let state = pb.state().try_into()?;
        Ok(Self {
            id: volume_id("volume id", &pb.id)?,
            name: pb.name,
            size: pb.size,
            replicas: pb.replicas,
            chunk_size: pb.chunk_size,
            min_in_sync: pb.min_in_sync,
            write_cache: pb.write_cache,
            state,
            mirrors: all(pb.mirrors)?,
            export: filled(pb.export),
            session: need("session", pb.session)?.try_into()?,
            recover_unix_ms: present(pb.recover_unix_ms),
            resync_limit: present(pb.resync_limit),
            created_unix_ms: pb.created_unix_ms,
        })
    }
}
impl From<VolumeInfo> for pb::Volume {
    fn from(v: VolumeInfo) -> Self {
        let mut pb = Self {
            id: v.id.into(),
            name: v.name,
            size: v.size,
            replicas: v.replicas,
            chunk_size: v.chunk_size,
            min_in_sync: v.min_in_sync,
            write_cache: v.write_cache,
            state: 0,
            mirrors: into_all(v.mirrors),
            export: v.export.unwrap_or_default(),
            session: Some(v.session.into()),
            recover_unix_ms: v.recover_unix_ms.unwrap_or(0),
            resync_limit: v.resync_limit.unwrap_or(0),
            created_unix_ms: v.created_unix_ms,
        };
        pb.set_state(v.state.into());
        pb
    }
}

impl TryFrom<pb::ClusterView> for ClusterView {
    type Error = BadMessage;
    fn try_from(pb: pb::ClusterView) -> Checked<Self> {
        Ok(Self {
            id: cluster_id("cluster id", &pb.cluster)?,
            name: pb.name,
            revision: pb.revision,
            stale: pb.stale,
            members: all(pb.members)?,
            pools: all(pb.pools)?,
            gateways: all(pb.gateways)?,
            volumes: all(pb.volumes)?,
        })
    }
}
impl From<ClusterView> for pb::ClusterView {
    fn from(v: ClusterView) -> Self {
        Self {
            cluster: v.id.into(),
            name: v.name,
            revision: v.revision,
            stale: v.stale,
            members: into_all(v.members),
            pools: into_all(v.pools),
            gateways: into_all(v.gateways),
            volumes: into_all(v.volumes),
        }
    }
}

fn object_kind(kind: &str) -> Checked<ObjectKind> {
    use ObjectKind::*;
    [Cluster, Member, Pool, Gateway, Volume, Mirror, Replica]
        .into_iter()
        .find(|known| known.to_string() == kind)
        .ok_or_else(|| BadMessage::new("object kind", format!("{kind:?} is not known")))
}

impl TryFrom<pb::Refusal> for Refusal {
    type Error = BadMessage;
    fn try_from(pb: pb::Refusal) -> Checked<Self> {
        use pb::refusal::Kind;
        Ok(match need("refusal", pb.kind)? {
            Kind::NotLeader(r) => {
                Self::NotLeader { leader: (r.leader != 0).then_some((NodeId(r.leader), r.leader_addr)) }
            }
            Kind::Unavailable(r) => Self::Unavailable { why: r.why },
            Kind::NotFound(r) => Self::NotFound { kind: object_kind(&r.kind)?, name: r.name },
            Kind::AlreadyExists(r) => Self::AlreadyExists { kind: object_kind(&r.kind)?, name: r.name },
            Kind::InUse(r) => Self::InUse { volume: r.volume, gateway: r.gateway, epoch: Epoch(r.epoch) },
            Kind::Superseded(r) => Self::Superseded { volume: r.volume, gateway: r.gateway, epoch: Epoch(r.epoch) },
            Kind::SetChanged(r) => Self::SetChanged {
                mirror: mirror_id("mirror", &r.mirror)?,
                current: need("current set", r.current)?.try_into()?,
            },
            Kind::TooFewNodes(r) => Self::TooFewNodes { wanted: r.wanted, available: r.available },
            Kind::NoSpace(r) => Self::NoSpace { place: r.place, wanted: r.wanted, available: r.available },
            Kind::Invalid(r) => Self::Invalid { what: r.what, why: r.why },
            Kind::WrongState(r) => Self::WrongState { kind: object_kind(&r.kind)?, name: r.name, state: r.state },
            Kind::Forgotten(r) => Self::Forgotten { revision: r.revision },
            Kind::Rejudge(r) => Self::Rejudge { epoch: Epoch(r.epoch) },
            Kind::OtherCluster(r) => {
                Self::OtherCluster { ours: cluster_id("ours", &r.ours)?, theirs: cluster_id("theirs", &r.theirs)? }
            }
        })
    }
}
impl From<Refusal> for pb::Refusal {
    fn from(r: Refusal) -> Self {
        use pb::refusal::{self as wire, Kind};
        let kind = match r {
            Refusal::NotLeader { leader } => {
                let (leader, leader_addr) = leader.map_or((0, String::new()), |(id, addr)| (id.0, addr));
                Kind::NotLeader(wire::NotLeader { leader, leader_addr })
            }
            Refusal::Unavailable { why } => Kind::Unavailable(wire::Unavailable { why }),
            Refusal::NotFound { kind, name } => Kind::NotFound(wire::NotFound { kind: kind.to_string(), name }),
            Refusal::AlreadyExists { kind, name } => {
                Kind::AlreadyExists(wire::AlreadyExists { kind: kind.to_string(), name })
            }
            Refusal::InUse { volume, gateway, epoch } => Kind::InUse(wire::InUse { volume, gateway, epoch: epoch.0 }),
            Refusal::Superseded { volume, gateway, epoch } => {
                Kind::Superseded(wire::Superseded { volume, gateway, epoch: epoch.0 })
            }
            Refusal::SetChanged { mirror, current } => {
                Kind::SetChanged(wire::SetChanged { mirror: mirror.into(), current: Some(current.into()) })
            }
            Refusal::TooFewNodes { wanted, available } => Kind::TooFewNodes(wire::TooFewNodes { wanted, available }),
            Refusal::NoSpace { place, wanted, available } => Kind::NoSpace(wire::NoSpace { place, wanted, available }),
            Refusal::Invalid { what, why } => Kind::Invalid(wire::Invalid { what, why }),
            Refusal::WrongState { kind, name, state } => {
                Kind::WrongState(wire::WrongState { kind: kind.to_string(), name, state })
            }
            Refusal::Forgotten { revision } => Kind::Forgotten(wire::Forgotten { revision }),
            Refusal::Rejudge { epoch } => Kind::Rejudge(wire::Rejudge { epoch: epoch.0 }),
            Refusal::OtherCluster { ours, theirs } => {
                Kind::OtherCluster(wire::OtherCluster { ours: ours.into(), theirs: theirs.into() })
            }
        };
        Self { kind: Some(kind) }
    }
}

/// The one place where a refusal becomes a gRPC status: its kind in the details, its sentence as the message.
pub fn refusal_to_status(refusal: Refusal) -> tonic::Status {
    use tonic::Code;
    let code = match &refusal {
        Refusal::NotLeader { .. } | Refusal::Unavailable { .. } => Code::Unavailable,
        Refusal::NotFound { .. } => Code::NotFound,
        Refusal::AlreadyExists { .. } => Code::AlreadyExists,
        Refusal::Invalid { .. } => Code::InvalidArgument,
        Refusal::TooFewNodes { .. } | Refusal::NoSpace { .. } => Code::ResourceExhausted,
        Refusal::InUse { .. }
        | Refusal::Superseded { .. }
        | Refusal::SetChanged { .. }
        | Refusal::WrongState { .. }
        | Refusal::Forgotten { .. }
        | Refusal::OtherCluster { .. } => Code::FailedPrecondition,
        Refusal::Rejudge { .. } => Code::Aborted,
    };
    let message = refusal.to_string();
    let details = prost::Message::encode_to_vec(&pb::Refusal::from(refusal));
    tonic::Status::with_details(code, message, details.into())
}

/// The refusal that a gRPC status carries; `None` where the status came from the transport or from elsewhere.
pub fn status_to_refusal(status: &tonic::Status) -> Option<Refusal> {
    if status.details().is_empty() {
        return None;
    }
    let refusal: pb::Refusal = prost::Message::decode(status.details()).ok()?;
    refusal.try_into().ok()
}

impl TryFrom<Option<pb::RequestId>> for RequestId {
    type Error = BadMessage;
    fn try_from(pb: Option<pb::RequestId>) -> Checked<Self> {
        let pb = need("request id", pb)?;
        Ok(Self { id: uuid("request id", &pb.id)?, since: pb.since })
    }
}
impl From<RequestId> for pb::RequestId {
    fn from(r: RequestId) -> Self {
        Self { id: r.id.as_bytes().to_vec(), since: r.since }
    }
}

impl TryFrom<pb::OpenSessionReply> for OpenedSession {
    type Error = BadMessage;
    fn try_from(pb: pb::OpenSessionReply) -> Checked<Self> {
        let previous = pb.previous().try_into()?;
        Ok(Self {
            epoch: Epoch(pb.epoch),
            volume: need("volume", pb.volume)?.try_into()?,
            old_lease_ms: pb.old_lease_ms,
            previous,
            revision: pb.revision,
        })
    }
}
impl From<OpenedSession> for pb::OpenSessionReply {
    fn from(o: OpenedSession) -> Self {
        let mut pb = Self {
            epoch: o.epoch.0,
            volume: Some(o.volume.into()),
            old_lease_ms: o.old_lease_ms,
            previous: 0,
            revision: o.revision,
        };
        pb.set_previous(o.previous.into());
        pb
    }
}

impl TryFrom<pb::ReplicaReport> for ReplicaReport {
    type Error = BadMessage;
    fn try_from(pb: pb::ReplicaReport) -> Checked<Self> {
        let condition = pb.condition().try_into()?;
        Ok(Self {
            replica: replica_id("replica", &pb.replica)?,
            condition,
            since_unix_ms: pb.since_unix_ms,
            regions_todo: pb.regions_todo,
            regions_total: pb.regions_total,
            bytes_copied: pb.bytes_copied,
            bytes_per_second: pb.bytes_per_second,
            eta_ms: present(pb.eta_ms),
            reason: text("reason", pb.reason)?,
        })
    }
}
impl From<ReplicaReport> for pb::ReplicaReport {
    fn from(r: ReplicaReport) -> Self {
        let mut pb = Self {
            replica: r.replica.into(),
            condition: 0,
            since_unix_ms: r.since_unix_ms,
            regions_todo: r.regions_todo,
            regions_total: r.regions_total,
            bytes_copied: r.bytes_copied,
            bytes_per_second: r.bytes_per_second,
            eta_ms: r.eta_ms.unwrap_or(0),
            reason: r.reason,
        };
        pb.set_condition(r.condition.into());
        pb
    }
}

impl TryFrom<pb::MirrorReport> for MirrorReport {
    type Error = BadMessage;
    fn try_from(pb: pb::MirrorReport) -> Checked<Self> {
        Ok(Self {
            mirror: mirror_id("mirror", &pb.mirror)?,
            replicas: all(pb.replicas)?,
            waiting: filled(text("waiting", pb.waiting)?),
            in_flight: pb.in_flight,
            dirty_regions: pb.dirty_regions,
        })
    }
}
impl From<MirrorReport> for pb::MirrorReport {
    fn from(m: MirrorReport) -> Self {
        Self {
            mirror: m.mirror.into(),
            replicas: into_all(m.replicas),
            waiting: m.waiting.unwrap_or_default(),
            in_flight: m.in_flight,
            dirty_regions: m.dirty_regions,
        }
    }
}

impl TryFrom<pb::SessionReport> for SessionReport {
    type Error = BadMessage;
    fn try_from(pb: pb::SessionReport) -> Checked<Self> {
        Ok(Self { mirrors: all(pb.mirrors)? })
    }
}
impl From<SessionReport> for pb::SessionReport {
    fn from(s: SessionReport) -> Self {
        Self { mirrors: into_all(s.mirrors) }
    }
}

impl TryFrom<pb::SessionRenewal> for SessionRenewal {
    type Error = BadMessage;
    fn try_from(pb: pb::SessionRenewal) -> Checked<Self> {
        Ok(Self {
            volume: volume_id("volume", &pb.volume)?,
            epoch: Epoch(pb.epoch),
            report: pb.report.map(SessionReport::try_from).transpose()?,
        })
    }
}
impl From<SessionRenewal> for pb::SessionRenewal {
    fn from(s: SessionRenewal) -> Self {
        Self { volume: s.volume.into(), epoch: s.epoch.0, report: s.report.map(Into::into) }
    }
}

impl TryFrom<pb::RenewLeaseReply> for Renewals {
    type Error = BadMessage;
    fn try_from(pb: pb::RenewLeaseReply) -> Checked<Self> {
        Ok(Self { results: all(pb.results)?, revision: pb.revision })
    }
}
impl From<Renewals> for pb::RenewLeaseReply {
    fn from(r: Renewals) -> Self {
        Self { results: into_all(r.results), revision: r.revision }
    }
}

impl TryFrom<pb::RenewalResult> for RenewalResult {
    type Error = BadMessage;
    fn try_from(pb: pb::RenewalResult) -> Checked<Self> {
        let outcome = if pb.lease_ms > 0 {
            RenewalOutcome::Granted { lease_ms: pb.lease_ms }
        } else {
            RenewalOutcome::Refused { current: pb.current.map(VolumeSession::try_from).transpose()? }
        };
        Ok(Self { volume: volume_id("volume", &pb.volume)?, epoch: Epoch(pb.epoch), outcome })
    }
}
impl From<RenewalResult> for pb::RenewalResult {
    fn from(r: RenewalResult) -> Self {
        let (lease_ms, current) = match r.outcome {
            RenewalOutcome::Granted { lease_ms } => (lease_ms, None),
            RenewalOutcome::Refused { current } => (0, current.map(Into::into)),
        };
        Self { volume: r.volume.into(), epoch: r.epoch.0, lease_ms, current }
    }
}

impl TryFrom<pb::ClusterStatus> for ClusterStatus {
    type Error = BadMessage;
    fn try_from(pb: pb::ClusterStatus) -> Checked<Self> {
        Ok(Self {
            view: need("view", pb.view)?.try_into()?,
            stale: pb.stale,
            leader: present(pb.leader).map(NodeId),
            leader_since_unix_ms: present(pb.leader_since_unix_ms),
            term: pb.term,
            applied: pb.applied,
            members: pb
                .members
                .into_iter()
                .map(|m| MemberStatus {
                    id: NodeId(m.id),
                    up: m.up,
                    since_unix_ms: present(m.since_unix_ms),
                    matched: m.matched,
                })
                .collect(),
            gateways: pb
                .gateways
                .into_iter()
                .map(|g| GatewayStatus { name: g.name, heard_unix_ms: present(g.heard_unix_ms) })
                .collect(),
            sessions: pb
                .sessions
                .into_iter()
                .map(|s| {
                    Ok(SessionStatus {
                        volume: volume_id("volume", &s.volume)?,
                        epoch: Epoch(s.epoch),
                        heard_unix_ms: s.heard_unix_ms,
                        report: s.report.map(SessionReport::try_from).transpose()?.unwrap_or_default(),
                    })
                })
                .collect::<Checked<Vec<_>>>()?,
            answered_by: NodeId(pb.answered_by),
            now_unix_ms: pb.now_unix_ms,
        })
    }
}
impl From<ClusterStatus> for pb::ClusterStatus {
    fn from(s: ClusterStatus) -> Self {
        Self {
            view: Some(s.view.into()),
            stale: s.stale,
            leader: s.leader.map_or(0, |id| id.0),
            term: s.term,
            applied: s.applied,
            members: s
                .members
                .into_iter()
                .map(|m| pb::MemberStatus {
                    id: m.id.0,
                    up: m.up,
                    since_unix_ms: m.since_unix_ms.unwrap_or(0),
                    matched: m.matched,
                })
                .collect(),
            gateways: s
                .gateways
                .into_iter()
                .map(|g| pb::GatewayStatus { name: g.name, heard_unix_ms: g.heard_unix_ms.unwrap_or(0) })
                .collect(),
            sessions: s
                .sessions
                .into_iter()
                .map(|s| pb::SessionStatus {
                    volume: s.volume.into(),
                    epoch: s.epoch.0,
                    heard_unix_ms: s.heard_unix_ms,
                    report: Some(s.report.into()),
                })
                .collect(),
            answered_by: s.answered_by.0,
            leader_since_unix_ms: s.leader_since_unix_ms.unwrap_or(0),
            now_unix_ms: s.now_unix_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> VolumeInfo {
        let replica = |n: u128| ReplicaInfo {
            id: ReplicaId(Uuid::from_u128(n)),
            node: NodeId(n as u64),
            pool: "p1".into(),
            ready: n != 2,
            failure: (n == 2).then(|| "disk full".into()),
        };
        VolumeInfo {
            id: VolumeId(Uuid::from_u128(1)),
            name: "tank".into(),
            size: 1 << 30,
            replicas: 3,
            chunk_size: 1 << 18,
            min_in_sync: 1,
            write_cache: true,
            state: VolumeState::Ready,
            mirrors: vec![MirrorInfo {
                id: MirrorId(Uuid::from_u128(2)),
                size: 1 << 30,
                replicas: vec![replica(1), replica(2), replica(3)],
                in_sync: InSyncSet {
                    version: SetVersion(4),
                    members: vec![ReplicaId(Uuid::from_u128(1)), ReplicaId(Uuid::from_u128(3))],
                    awaited: vec![ReplicaId(Uuid::from_u128(2))],
                },
            }],
            export: Some("gateway-1".into()),
            session: VolumeSession {
                epoch: Epoch(7),
                state: SessionState::Closed { gateway: "gateway-1".into(), clean: false },
                settled: false,
            },
            recover_unix_ms: Some(5),
            resync_limit: Some(7),
            created_unix_ms: 6,
        }
    }

    #[test]
    fn a_volume_survives_the_wire() {
        assert_eq!(VolumeInfo::try_from(pb::Volume::from(volume())), Ok(volume()));
    }

    #[test]
    fn every_refusal_survives_a_grpc_status() {
        let set = volume().mirrors[0].in_sync.clone();
        let cases = [
            Refusal::NotLeader { leader: None },
            Refusal::NotLeader { leader: Some((NodeId(3), "127.0.0.1:7400".into())) },
            Refusal::unavailable("no quorum"),
            Refusal::not_found(ObjectKind::Volume, "tank"),
            Refusal::AlreadyExists { kind: ObjectKind::Gateway, name: "g".into() },
            Refusal::InUse { volume: "tank".into(), gateway: "g".into(), epoch: Epoch(3) },
            Refusal::Superseded { volume: "tank".into(), gateway: String::new(), epoch: Epoch(3) },
            Refusal::SetChanged { mirror: MirrorId(Uuid::from_u128(2)), current: set },
            Refusal::TooFewNodes { wanted: 3, available: 2 },
            Refusal::NoSpace { place: "pool p1 of node n".into(), wanted: 2, available: 1 },
            Refusal::invalid("size", "is 0"),
            Refusal::WrongState { kind: ObjectKind::Volume, name: "tank".into(), state: "creating".into() },
            Refusal::Forgotten { revision: 9 },
            Refusal::Rejudge { epoch: Epoch(1) },
            Refusal::OtherCluster { ours: ClusterId(Uuid::from_u128(1)), theirs: ClusterId(Uuid::from_u128(2)) },
        ];
        for refusal in cases {
            assert_eq!(status_to_refusal(&refusal_to_status(refusal.clone())), Some(refusal));
        }
        assert_eq!(status_to_refusal(&tonic::Status::internal("elsewhere")), None);
    }

    #[test]
    fn messages_that_say_nothing_sensible_are_refused() {
        let mut short = pb::Volume::from(volume());
        short.id.pop();
        assert_eq!(VolumeInfo::try_from(short).unwrap_err().field, "volume id");
        let mut unsorted = pb::Volume::from(volume());
        unsorted.mirrors[0].in_sync.as_mut().unwrap().members.reverse();
        assert_eq!(VolumeInfo::try_from(unsorted).unwrap_err().field, "set members");
        let mut unknown = pb::Volume::from(volume());
        unknown.state = 99;
        assert_eq!(VolumeInfo::try_from(unknown).unwrap_err().field, "volume state");
    }

    #[test]
    fn names_that_could_not_stand_in_a_path_are_refused() {
        for good in ["tank", "a", "node-1", "A.b_c"] {
            assert_eq!(check_name("name", good), Ok(()), "{good}");
        }
        for bad in ["", "..", "-a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(check_name("name", bad).is_err(), "{bad}");
        }
    }
}
