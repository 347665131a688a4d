//! What a cluster consists of, as checked values: the metadata that raft keeps, refusals, and the reports that
//! are only shown. [`crate::convert`] turns them into gRPC messages and back.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::id::{ClusterId, Epoch, MirrorId, NodeId, ReplicaId, SetVersion, VolumeId};

/// What a member does besides voting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Keeps replicas.
    Node,
    /// Votes only, and is the preferred leader.
    Witness,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "node",
            Self::Witness => "witness",
        })
    }
}

/// One voter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// From 1; never used again.
    pub id: NodeId,
    /// Unique in the cluster.
    pub name: String,
    /// Storage node or witness.
    pub role: Role,
    /// `host:port` of its gRPC services.
    pub control_addr: String,
    /// `host:port` of its replica server; empty for a witness.
    #[serde(default)]
    pub data_addr: String,
}

/// What `init` gives every member once; the same everywhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterDefinition {
    /// Drawn at `init`.
    pub id: ClusterId,
    /// For people.
    pub name: String,
    /// The voters, by id.
    pub members: Vec<Member>,
}

/// Where a node keeps replicas, as it last reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Its node.
    pub node: NodeId,
    /// Unique on its node.
    pub name: String,
    /// `file`, later `lvm`.
    pub kind: String,
    /// Directory or volume group.
    pub path: String,
    /// Bytes that replicas may take together.
    pub capacity: u64,
    /// Bytes free on the medium.
    pub free: u64,
}

/// A gateway that has registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayInfo {
    /// Unique; a restarted gateway keeps its name and with it its sessions.
    pub name: String,
    /// `host:port` of its gRPC service.
    pub control_addr: String,
    /// `host:port` where initiators log in.
    pub portal: String,
}

/// One copy of one mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaInfo {
    /// Names its files.
    pub id: ReplicaId,
    /// Where it is.
    pub node: NodeId,
    /// Where on the node.
    pub pool: String,
    /// The node has created it.
    pub ready: bool,
    /// Why the node could not create it, from its last attempt.
    pub failure: Option<String>,
}

/// The replicas of a mirror that hold every acknowledged write (R2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InSyncSet {
    /// 0: not committed yet, the volume is being created.
    pub version: SetVersion,
    /// Sorted, without duplicates.
    pub members: Vec<ReplicaId>,
    /// Replicas that left the set while regions waited for what only they may hold (R8); sorted, no members.
    #[serde(default)]
    pub awaited: Vec<ReplicaId>,
}

/// A mirror's definition and its in-sync set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorInfo {
    /// Identity.
    pub id: MirrorId,
    /// Bytes, whole chunks; at least what the stripe puts here.
    pub size: u64,
    /// On distinct nodes, in the order of creation.
    pub replicas: Vec<ReplicaInfo>,
    /// Which of them hold everything.
    pub in_sync: InSyncSet,
}

/// Where a volume stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeState {
    /// Nodes are creating its replicas; it cannot be opened.
    Creating,
    /// It can be opened.
    Ready,
    /// A tombstone: nodes delete its replicas, and it goes with the last of them.
    Deleting,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Ready => "ready",
            Self::Deleting => "deleting",
        })
    }
}

/// Whether a gateway holds a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// Nobody ever opened it.
    Never,
    /// This gateway owns it.
    Open {
        /// The owner.
        gateway: String,
    },
    /// Its owner gave it up.
    Closed {
        /// The last owner.
        gateway: String,
        /// With everything flushed and no region dirty.
        clean: bool,
    },
}

/// A volume's latest session (R1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSession {
    /// 0: never opened.
    pub epoch: Epoch,
    /// Open or not.
    pub state: SessionState,
    /// No lease of an older epoch could live when this session was opened.
    pub settled: bool,
}

impl VolumeSession {
    /// The gateway that owns the volume now.
    pub fn owner(&self) -> Option<&str> {
        match &self.state {
            SessionState::Open { gateway } => Some(gateway),
            _ => None,
        }
    }
}

/// One volume, whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Identity.
    pub id: VolumeId,
    /// Unique among volumes that are not being deleted.
    pub name: String,
    /// Bytes that initiators see.
    pub size: u64,
    /// Replicas per mirror.
    pub replicas: u32,
    /// Bytes per chunk of the stripe.
    pub chunk_size: u32,
    /// A mirror with fewer members in sync makes writes wait (R2).
    pub min_in_sync: u32,
    /// Acknowledged writes may be volatile until flushed (R9).
    pub write_cache: bool,
    /// Where it stands.
    pub state: VolumeState,
    /// In stripe order; their number is the stripe's width.
    pub mirrors: Vec<MirrorInfo>,
    /// The gateway that is to serve it.
    pub export: Option<String>,
    /// Who owns it.
    pub session: VolumeSession,
    /// A forced recovery was asked for and no session has carried it out: when (R8).
    pub recover_unix_ms: Option<u64>,
    /// Bytes a second that a resync compares at most; `None`: no limit.
    pub resync_limit: Option<u64>,
    /// When it was created.
    pub created_unix_ms: u64,
}

impl VolumeInfo {
    /// Mirrors in the stripe.
    pub fn stripes(&self) -> usize {
        self.mirrors.len()
    }
    /// The mirror of this id.
    pub fn mirror(&self, id: MirrorId) -> Option<&MirrorInfo> {
        self.mirrors.iter().find(|mirror| mirror.id == id)
    }
}

/// The whole metadata at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterView {
    /// The cluster.
    pub id: ClusterId,
    /// Its name.
    pub name: String,
    /// The raft index of the last change; only ever rises.
    pub revision: u64,
    /// Whoever sent it knew no leader: there may be newer.
    pub stale: bool,
    /// By id.
    pub members: Vec<Member>,
    /// By node and name.
    pub pools: Vec<Pool>,
    /// By name.
    pub gateways: Vec<GatewayInfo>,
    /// By id.
    pub volumes: Vec<VolumeInfo>,
}

impl ClusterView {
    /// The volume of this id.
    pub fn volume(&self, id: VolumeId) -> Option<&VolumeInfo> {
        self.volumes.iter().find(|volume| volume.id == id)
    }
    /// The volume of this name that is not being deleted.
    pub fn volume_named(&self, name: &str) -> Option<&VolumeInfo> {
        self.volumes.iter().find(|volume| volume.name == name && volume.state != VolumeState::Deleting)
    }
    /// The member of this id.
    pub fn member(&self, id: NodeId) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }
    /// The gateway of this name.
    pub fn gateway(&self, name: &str) -> Option<&GatewayInfo> {
        self.gateways.iter().find(|gateway| gateway.name == name)
    }
}

/// What a request was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    /// A cluster.
    Cluster,
    /// A node or witness.
    Member,
    /// A pool.
    Pool,
    /// A gateway.
    Gateway,
    /// A volume.
    Volume,
    /// A mirror.
    Mirror,
    /// A replica.
    Replica,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "cluster",
            Self::Member => "member",
            Self::Pool => "pool",
            Self::Gateway => "gateway",
            Self::Volume => "volume",
            Self::Mirror => "mirror",
            Self::Replica => "replica",
        })
    }
}

/// Why a request was not carried out. All but [`Self::NotLeader`], [`Self::Unavailable`] and [`Self::Rejudge`]
/// are definite: the request has not been and will not be carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Ask the leader instead.
    #[error("this member does not lead")]
    NotLeader {
        /// Whom to ask: id and control address, where known.
        leader: Option<(NodeId, String)>,
    },
    /// No quorum, or no leader yet; whether the request will be carried out is not known.
    #[error("the cluster cannot answer: {why}")]
    Unavailable {
        /// What is missing.
        why: String,
    },
    /// It does not exist.
    #[error("there is no {kind} {name}")]
    NotFound {
        /// What.
        kind: ObjectKind,
        /// Which.
        name: String,
    },
    /// The name is taken.
    #[error("there is a {kind} {name} already")]
    AlreadyExists {
        /// What.
        kind: ObjectKind,
        /// Which.
        name: String,
    },
    /// Another gateway's session is open and its lease may live (R1).
    #[error("volume {volume} is open on gateway {gateway} (epoch {epoch})")]
    InUse {
        /// The volume's name.
        volume: String,
        /// The owner.
        gateway: String,
        /// Its session.
        epoch: Epoch,
    },
    /// The request's session epoch is not the current one, or the session is closed (R1).
    #[error("volume {volume} is at session epoch {epoch}, last owned by {gateway:?}")]
    Superseded {
        /// The volume's name.
        volume: String,
        /// The current or last owner, if any.
        gateway: String,
        /// The current epoch.
        epoch: Epoch,
    },
    /// The request's set version is not the current one (R2).
    #[error("mirror {mirror}'s in-sync set is at version {}", current.version)]
    SetChanged {
        /// The mirror.
        mirror: MirrorId,
        /// The current set.
        current: InSyncSet,
    },
    /// Each replica of a mirror needs a node of its own.
    #[error("{wanted} replicas need as many storage nodes with pools, and there are {available}")]
    TooFewNodes {
        /// Replicas per mirror.
        wanted: u32,
        /// Nodes with pools.
        available: u32,
    },
    /// A pool is too small.
    #[error("{place} has {available} bytes left, and {wanted} are needed")]
    NoSpace {
        /// Where.
        place: String,
        /// Bytes needed there.
        wanted: u64,
        /// Bytes not given to replicas yet.
        available: u64,
    },
    /// The request makes no sense.
    #[error("{what}: {why}")]
    Invalid {
        /// The offending part.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Not in this state.
    #[error("{kind} {name} is {state}")]
    WrongState {
        /// What.
        kind: ObjectKind,
        /// Which.
        name: String,
        /// The state that it is in.
        state: String,
    },
    /// The request is older than the oldest remembered answer: it may have been carried out long ago, and is not
    /// carried out now.
    #[error("the request is older than the answers remembered (from revision {revision} on)")]
    Forgotten {
        /// The oldest revision from which answers are remembered.
        revision: u64,
    },
    /// What the leader judged by has changed before the command was committed; it judges again.
    #[error("the session changed to epoch {epoch} while the request was judged")]
    Rejudge {
        /// The epoch found.
        epoch: Epoch,
    },
    /// The member belongs to another cluster.
    #[error("this member belongs to cluster {ours}, the request is for cluster {theirs}")]
    OtherCluster {
        /// The member's.
        ours: ClusterId,
        /// The request's.
        theirs: ClusterId,
    },
}

impl Refusal {
    /// Whether asking again, perhaps elsewhere, may be answered differently while the request stays the same.
    pub fn may_retry(&self) -> bool {
        matches!(self, Self::NotLeader { .. } | Self::Unavailable { .. } | Self::Rejudge { .. })
    }
    /// A refusal of an unknown thing.
    pub fn not_found(kind: ObjectKind, name: impl ToString) -> Self {
        Self::NotFound { kind, name: name.to_string() }
    }
    /// A refusal of a senseless part.
    pub fn invalid(what: impl ToString, why: impl ToString) -> Self {
        Self::Invalid { what: what.to_string(), why: why.to_string() }
    }
    /// A refusal for want of a quorum or leader.
    pub fn unavailable(why: impl ToString) -> Self {
        Self::Unavailable { why: why.to_string() }
    }
}

/// Identifies a request over all its tries, so that it is carried out once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId {
    /// Random.
    pub id: Uuid,
    /// A revision that its sender had seen before the first try.
    pub since: u64,
}

/// How the session before this one ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PreviousSession {
    /// There was none.
    Never,
    /// Closed, with nothing dirty.
    Clean,
    /// Lost, taken over, or closed with something dirty: reconcile (R8).
    Unclean,
}

/// The answer to a gateway that opened a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenedSession {
    /// The new session's epoch.
    pub epoch: Epoch,
    /// The volume as of the opening.
    pub volume: VolumeInfo,
    /// For how long from the answer an older lease may live; 0: none does (R3).
    pub old_lease_ms: u64,
    /// What to expect.
    pub previous: PreviousSession,
    /// The revision of the opening.
    pub revision: u64,
}

/// One session's part of a lease renewal.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRenewal {
    /// The volume.
    pub volume: VolumeId,
    /// The session.
    pub epoch: Epoch,
    /// How the volume is, for `status`.
    pub report: Option<SessionReport>,
}

/// What became of one session's renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenewalResult {
    /// The volume.
    pub volume: VolumeId,
    /// The session.
    pub epoch: Epoch,
    /// What the quorum says.
    pub outcome: RenewalOutcome,
}

/// Granted or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RenewalOutcome {
    /// The lease lives this long from when the gateway *sent* its request.
    Granted {
        /// Milliseconds, before the gateway's own margin for drift.
        lease_ms: u64,
    },
    /// The session is not current, or is being taken over. Without a current session the volume is gone.
    Refused {
        /// The session that is current.
        current: Option<VolumeSession>,
    },
}

/// Answers to a lease renewal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewals {
    /// One per session asked for, in the same order.
    pub results: Vec<RenewalResult>,
    /// The metadata's revision.
    pub revision: u64,
}

/// Where a replica stands, as its session's owner says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaCondition {
    /// Holds everything.
    InSync,
    /// Is being brought back.
    Joining,
    /// Cannot be reached.
    Missing,
    /// Answers, but cannot be used.
    Refused,
}

impl fmt::Display for ReplicaCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InSync => "in-sync",
            Self::Joining => "joining",
            Self::Missing => "missing",
            Self::Refused => "refused",
        })
    }
}

/// One replica in a [`MirrorReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Which.
    pub replica: ReplicaId,
    /// Where it stands.
    pub condition: ReplicaCondition,
    /// Since when.
    pub since_unix_ms: u64,
    /// Regions left to equalise.
    pub regions_todo: u64,
    /// Regions that were to be equalised when it began to join.
    pub regions_total: u64,
    /// Bytes copied to it since then.
    pub bytes_copied: u64,
    /// At this rate lately.
    pub bytes_per_second: u64,
    /// Time left, where it can be told.
    pub eta_ms: Option<u64>,
    /// Why it is not in sync, or what its joining waits for; empty: nothing to say.
    pub reason: String,
}

/// One mirror in a [`SessionReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorReport {
    /// Which.
    pub mirror: MirrorId,
    /// Its replicas.
    pub replicas: Vec<ReplicaReport>,
    /// What it waits for (R12); `None`: it serves.
    pub waiting: Option<String>,
    /// Requests in flight.
    pub in_flight: u64,
    /// Regions that are dirty.
    pub dirty_regions: u64,
}

/// What a session's owner says about its volume; kept in the leader's memory only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReport {
    /// In stripe order.
    pub mirrors: Vec<MirrorReport>,
}

/// A member as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Which.
    pub id: NodeId,
    /// Heard within the last election time-out.
    pub up: bool,
    /// Since when, where known.
    pub since_unix_ms: Option<u64>,
    /// The last log index known to be there.
    pub matched: u64,
}

/// A gateway as the leader heard it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayStatus {
    /// Which.
    pub name: String,
    /// When last; `None`: not since this leader leads.
    pub heard_unix_ms: Option<u64>,
}

/// A session as its owner reported it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStatus {
    /// The volume.
    pub volume: VolumeId,
    /// The session.
    pub epoch: Epoch,
    /// When its owner last renewed.
    pub heard_unix_ms: u64,
    /// What it said.
    pub report: SessionReport,
}

/// Everything that `status` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterStatus {
    /// The metadata.
    pub view: ClusterView,
    /// Not confirmed by a quorum.
    pub stale: bool,
    /// Who leads, as far as the member that answered knows.
    pub leader: Option<NodeId>,
    /// Since when the member that answered leads.
    pub leader_since_unix_ms: Option<u64>,
    /// The raft term.
    pub term: u64,
    /// The last log index applied.
    pub applied: u64,
    /// Empty in a stale answer: only a leader knows.
    pub members: Vec<MemberStatus>,
    /// Empty in a stale answer.
    pub gateways: Vec<GatewayStatus>,
    /// Sessions heard of since this leader leads.
    pub sessions: Vec<SessionStatus>,
    /// Who answered.
    pub answered_by: NodeId,
    /// The clock of who answered, to compare the other times with.
    pub now_unix_ms: u64,
}

impl ClusterStatus {
    /// The last report about this volume's *current* session, if its owner was heard by this leader.
    pub fn session(&self, volume: &VolumeInfo) -> Option<&SessionStatus> {
        self.sessions.iter().find(|session| session.volume == volume.id && session.epoch == volume.session.epoch)
    }
}

/// What a new volume should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Unique name.
    pub name: String,
    /// Bytes, a multiple of 4096.
    pub size: u64,
    /// Copies of every mirror.
    pub replicas: u32,
    /// Mirrors in the stripe.
    pub stripes: u32,
    /// Bytes per chunk, a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// From 1 to `replicas`.
    pub min_in_sync: u32,
    /// Whether acknowledged writes may be volatile until flushed.
    pub write_cache: bool,
    /// The gateway that is to serve it.
    pub export: Option<String>,
}
