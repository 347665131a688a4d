//! What goes into a mirror and what comes out of it.

use bytes::Bytes;
use proto::frame::{Reply, Request, SetView};
use proto::id::{AttachId, BlockIndex, Epoch, MirrorId, NodeId, RegionIndex, ReplicaId, SetVersion};

/// One replica of the mirror's definition. Its place in the definition is its *slot*.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaDef {
    pub replica: ReplicaId,
    pub node: NodeId,
    /// `host:port` of the node's data plane, for copies from node to node.
    pub data_addr: String,
}

/// What a mirror is, as raft says, and how it is to behave.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    pub mirror: MirrorId,
    /// The session's epoch.
    pub epoch: Epoch,
    /// Size in blocks.
    pub blocks: u64,
    /// Blocks in a chunk: reads of a chunk go to one replica.
    pub chunk_blocks: u64,
    pub replicas: Vec<ReplicaDef>,
    /// The committed in-sync set when the session opened.
    pub version: SetVersion,
    pub members: Vec<ReplicaId>,
    /// Replicas that left the set while suspect regions waited for them (R8).
    pub awaited: Vec<ReplicaId>,
    /// Writes wait while fewer replicas are in sync.
    pub min_in_sync: usize,
    /// False: every write is durable before it is acknowledged (R9).
    pub write_cache: bool,
    /// Until when, on the session's clock, the previous owner may still read (R3); 0: it cannot.
    pub old_lease_until: u64,
    /// Fresh for every session: the hashes of equalise are keyed with it and a counter (R7).
    pub hash_seed: [u8; 32],
}

/// A request of the volume, in blocks of this mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorOp {
    /// Reads `count` blocks, at most `MAX_REQUEST_BLOCKS`.
    Read { block: BlockIndex, count: u32 },
    /// Writes whole blocks, at most `MAX_REQUEST_BLOCKS`.
    Write { block: BlockIndex, data: Bytes, fua: bool },
    /// Writes a part of one block: read, patched and written under its lock (R4).
    Merge { block: BlockIndex, offset: u32, data: Bytes, fua: bool },
    /// Makes blocks read as zeroes, at most `MAX_DISCARD_BLOCKS`.
    Zero { block: BlockIndex, count: u32, fua: bool, discard: bool },
    /// Makes every write acknowledged before it durable (R9).
    Flush,
    /// Compares a region over all replicas that are in sync (verify, scrub); with `repair`, equalises it.
    Compare { region: RegionIndex, repair: bool },
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpOutcome {
    Done,
    Data(Bytes),
    /// No in-sync replica has this block as it was written (R10).
    Medium {
        block: BlockIndex,
    },
    WriteFailed,
    NoSpace,
    /// Dropped before it had any effect.
    Aborted,
    Compared(Comparison),
}

/// What comparing a region found.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Comparison {
    /// Replicas that were compared.
    pub replicas: Vec<ReplicaId>,
    /// Replicas of the definition that are not in sync, so that nothing is said of them.
    pub absent: Vec<ReplicaId>,
    /// Blocks whose bytes are not the same everywhere, ascending.
    pub differ: Vec<BlockIndex>,
    /// (replica, block) whose bytes do not match their own sum or could not be read.
    pub bad: Vec<(ReplicaId, BlockIndex)>,
    /// Blocks compared.
    pub blocks: u64,
}

/// What happens to a mirror. Numbers of requests (`id`) rise.
#[derive(Clone, Debug)]
pub enum Input {
    Submit {
        id: u64,
        op: MirrorOp,
    },
    /// Drops the request if it has had no effect yet (R4).
    Abort {
        id: u64,
    },
    /// A connection to the slot's node is there and greeted.
    LinkUp {
        slot: usize,
    },
    /// There is none: it was lost, or could not be made. Said again for every failed attempt.
    LinkDown {
        slot: usize,
    },
    Reply {
        slot: usize,
        tag: u64,
        attach: AttachId,
        reply: Reply,
    },
    /// The definite answer to the last [`Output::ProposeSet`].
    SetDecided(SetDecision),
    /// An operator accepts the loss of what only unreachable replicas may hold (R8).
    Recover,
    /// How many bytes a second background work compares at most.
    LimitResync(Option<u64>),
    /// Ends the session: finish, flush, clean, detach.
    Close,
    /// Time passes; due about every [`super::TICK_MS`].
    Tick,
}

/// What raft says to a proposed set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetDecision {
    Committed(SetVersion),
    /// Refused because the set is another one: this is it.
    Refused {
        version: SetVersion,
        members: Vec<ReplicaId>,
        awaited: Vec<ReplicaId>,
    },
    /// Refused because another session owns the volume.
    Superseded,
}

/// Why a session must end at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    #[error("another session owns the volume")]
    Superseded,
    /// Where it is a later session's epoch this is the same; where raft knows none so high, its metadata is old.
    #[error("replica {replica} is attached to session epoch {epoch}")]
    Fenced { replica: ReplicaId, epoch: Epoch },
    #[error(
        "replica {replica} knows epoch {epoch} and set version {version}, newer than the metadata: \
         the voters were restored from an old image"
    )]
    MetadataIsOld { replica: ReplicaId, epoch: Epoch, version: SetVersion },
}

/// What a mirror wants done. To be carried out in order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send to the slot's node; the slot's index is the channel's key.
    Send { slot: usize, attach: AttachId, tag: u64, request: Request },
    /// Answers to requests under this attach are believed no more.
    GiveUp { slot: usize, attach: AttachId },
    /// Ends request `id`. To be passed on only under a live lease (R3).
    Complete { id: u64, outcome: OpOutcome },
    /// Commit this set, whose current version is `version`; ask until there is a definite answer (R2).
    ProposeSet { version: SetVersion, members: Vec<ReplicaId>, awaited: Vec<ReplicaId> },
    /// Every cache was lost, and with them acknowledged writes (R8): initiators must be told.
    PowerOn,
    /// Nothing more is to be done here; the session must end without another answer.
    Stop(StopReason),
    /// Close is done. `clean`: no dirty region is left.
    Closed { clean: bool },
    /// Something an operator should find in the log.
    Log(Event),
}

/// What is worth a line in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Event {
    #[error("replica {replica} left: {reason}")]
    Lost { replica: ReplicaId, reason: FaultReason },
    #[error("in-sync set version {version}: {members:?}")]
    SetChanged { version: SetVersion, members: Vec<ReplicaId> },
    #[error("replica {replica} joins; {regions} of {total} regions to compare")]
    Joining { replica: ReplicaId, regions: usize, total: u32 },
    #[error("took over with {kept:?}; {dirty} dirty regions, {blocked} of them wait for {awaited:?}")]
    TookOver { kept: Vec<ReplicaId>, dirty: usize, blocked: usize, awaited: Vec<ReplicaId> },
    #[error("every member has restarted: writes {writes} acknowledged writes again, {bytes} bytes")]
    Replaying { writes: usize, bytes: u64 },
    #[error("region {region}: {blocks} blocks matched their sum on no replica; took those of {replica}")]
    Restamped { region: RegionIndex, blocks: u32, replica: ReplicaId },
    #[error(
        "region {region}: no replica in sync has {blocks} blocks as they were written: they are bad on {replica} too"
    )]
    Distrusted { region: RegionIndex, blocks: u32, replica: ReplicaId },
    #[error("block {block} of replica {replica} fails its checksum")]
    BadBlock { replica: ReplicaId, block: BlockIndex },
}

/// Why a replica is not in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultReason {
    #[error("not reached yet")]
    NeverSeen,
    #[error("connection lost")]
    LinkLost,
    #[error("no answer in time")]
    TimedOut,
    #[error("answered {0:?}")]
    Refused(proto::frame::Code),
    #[error("restarted")]
    Restarted,
    #[error("a copy to it was left in doubt")]
    CopyInDoubt,
    #[error("answered with something else than was asked")]
    Nonsense,
}

/// Where a replica stands, for an operator.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaStatus {
    pub replica: ReplicaId,
    pub node: NodeId,
    pub standing: Standing,
    /// Since when, on the session's clock.
    pub since: u64,
}

/// See [`ReplicaStatus`].
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    InSync,
    /// In the set, but its attach is gone: about to leave.
    Leaving(FaultReason),
    Joining {
        todo: usize,
        total: usize,
        copied_bytes: u64,
        started: u64,
    },
    Missing(FaultReason),
}

/// A mirror for an operator.
#[derive(Clone, Debug, PartialEq)]
pub struct MirrorStatus {
    pub mirror: MirrorId,
    pub set: SetView,
    pub replicas: Vec<ReplicaStatus>,
    /// What requests wait for, if they do.
    pub waits: Option<String>,
    pub in_flight: usize,
    pub dirty_regions: usize,
    /// Regions still to be reconciled after a take-over.
    pub unsettled: usize,
    /// Bytes copied by equalise since the session opened.
    pub copied_bytes: u64,
    /// Bytes compared by equalise since the session opened.
    pub compared_bytes: u64,
    /// Blocks that matched their sum on no replica and were restamped.
    pub restamped_blocks: u64,
}
