//! What raft's log entries say. An entry is a version byte and JSON: the log is small and slow enough that
//! reading it with any tool, when something is amiss, is worth more than its bytes.

use proto::cluster::{ClusterDefinition, GatewayInfo, Pool, RequestId, VolumeSpec};
use proto::id::{Epoch, MirrorId, NodeId, ReplicaId, SetVersion, VolumeId};
use serde::{Deserialize, Serialize};

/// The first byte of every entry.
const VERSION: u8 = 1;
/// Longest entry, in bytes: a longer one is refused before it is proposed. A volume of 32 mirrors with five
/// replicas each takes about 30 KiB.
pub const MAX_PROPOSAL: usize = 256 << 10;

/// A command and the request that it carries out, once (R2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The request.
    pub request: RequestId,
    /// What to do.
    pub command: Command,
}

/// An entry that this version cannot read.
#[derive(Debug, thiserror::Error)]
pub enum BadProposal {
    /// It is empty or of another version.
    #[error("log entry of version {found:?}, this program reads version {VERSION}: a newer one wrote it")]
    Version {
        /// The first byte, if any.
        found: Option<u8>,
    },
    /// It is too long.
    #[error("log entry of {bytes} bytes, at most {MAX_PROPOSAL} are allowed")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It does not parse.
    #[error("log entry that does not parse: {0}")]
    Parse(#[from] serde_json::Error),
}

impl Proposal {
    /// The entry's bytes.
    ///
    /// # Errors
    /// When they are too many.
    pub fn encode(&self) -> Result<Vec<u8>, BadProposal> {
        let mut bytes = vec![VERSION];
        serde_json::to_writer(&mut bytes, self)?;
        match bytes.len() > MAX_PROPOSAL {
            true => Err(BadProposal::TooLong { bytes: bytes.len() }),
            false => Ok(bytes),
        }
    }

    /// Reads an entry's bytes.
    ///
    /// # Errors
    /// When they are too many, of another version, or senseless.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadProposal> {
        if bytes.len() > MAX_PROPOSAL {
            return Err(BadProposal::TooLong { bytes: bytes.len() });
        }
        match bytes.split_first() {
            Some((&VERSION, json)) => Ok(serde_json::from_slice(json)?),
            other => Err(BadProposal::Version { found: other.map(|(version, _)| *version) }),
        }
    }
}

/// What the leader judged about older leases when it proposed an opening (R1). The command is carried out only
/// where that judgement still holds: in the leader's own term, over the session that it looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseVerdict {
    /// The term in which it was judged. An entry appended in another term was passed on by a deposed leader.
    pub term: u64,
    /// The session that was current.
    pub epoch: Epoch,
    /// No lease of that session or an older one can live any more.
    pub ended: bool,
}

/// A mirror as the leader planned it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMirror {
    /// Its id.
    pub id: MirrorId,
    /// Its size in bytes.
    pub size: u64,
    /// Its replicas, on distinct nodes.
    pub replicas: Vec<PlannedReplica>,
}

/// A replica as the leader placed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedReplica {
    /// Its id.
    pub id: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// Its pool there.
    pub pool: String,
}

/// One change of the metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Defines the cluster; the first command of every log. A second one changes nothing.
    Init {
        /// From `cluster init`.
        definition: ClusterDefinition,
    },
    /// A member says where it listens.
    UpdateMember {
        /// Which.
        node: NodeId,
        /// `host:port`.
        control_addr: String,
        /// `host:port`, empty for a witness.
        data_addr: String,
    },
    /// A node says which pools it has; those not named are gone.
    ReportPools {
        /// Which.
        node: NodeId,
        /// All of its pools.
        pools: Vec<Pool>,
    },
    /// A gateway makes itself known.
    RegisterGateway {
        /// It.
        gateway: GatewayInfo,
    },
    /// Creates a volume as the leader planned it.
    CreateVolume {
        /// The volume's id.
        volume: VolumeId,
        /// What was asked for.
        spec: VolumeSpec,
        /// In stripe order.
        mirrors: Vec<PlannedMirror>,
        /// The leader's clock, to be shown.
        unix_ms: u64,
    },
    /// A node has created a replica.
    ReplicaReady {
        /// The node.
        node: NodeId,
        /// The replica.
        replica: ReplicaId,
    },
    /// A node could not create a replica; it tries again.
    ReplicaFailed {
        /// The node.
        node: NodeId,
        /// The replica.
        replica: ReplicaId,
        /// Why.
        reason: String,
    },
    /// A node has deleted a replica whose volume is a tombstone.
    ReplicaDeleted {
        /// The node.
        node: NodeId,
        /// The replica.
        replica: ReplicaId,
    },
    /// Makes a volume a tombstone.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Says which gateway serves a volume.
    ExportVolume {
        /// Which.
        volume: VolumeId,
        /// `None`: none.
        gateway: Option<String>,
    },
    /// Opens a session (R1).
    OpenSession {
        /// Which volume.
        volume: VolumeId,
        /// For whom.
        gateway: String,
        /// Though another's lease may live.
        take_over: bool,
        /// What the leader judged.
        verdict: LeaseVerdict,
    },
    /// Ends a session.
    CloseSession {
        /// Which volume.
        volume: VolumeId,
        /// Its session.
        epoch: Epoch,
        /// With nothing dirty.
        clean: bool,
    },
    /// Changes an in-sync set (R2).
    ChangeSet {
        /// Which volume.
        volume: VolumeId,
        /// Which of its mirrors.
        mirror: MirrorId,
        /// The owner's session.
        epoch: Epoch,
        /// The version that is changed.
        expected: SetVersion,
        /// The new members, sorted.
        members: Vec<ReplicaId>,
        /// Replicas outside of it that regions wait for (R8), sorted.
        #[serde(default)]
        awaited: Vec<ReplicaId>,
    },
    /// Asks for a forced recovery (R8).
    RecoverVolume {
        /// Which volume.
        volume: VolumeId,
        /// The leader's clock, to be shown.
        unix_ms: u64,
    },
    /// The owner has carried the recovery out.
    FinishRecovery {
        /// Which volume.
        volume: VolumeId,
        /// The owner's session.
        epoch: Epoch,
    },
    /// Changes a setting; `None` removes it.
    ChangeSetting {
        /// Which.
        key: String,
        /// To what.
        value: Option<String>,
    },
    /// Changes what may be changed of a volume while it is served.
    SetVolume {
        /// Which volume.
        volume: VolumeId,
        /// Bytes a second that a resync compares at most; `None`: no limit.
        resync_limit: Option<u64>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn an_entry_of_another_version_is_refused() {
        let proposal = Proposal {
            request: RequestId { id: Uuid::from_u128(1), since: 2 },
            command: Command::DeleteVolume { volume: VolumeId(Uuid::from_u128(3)) },
        };
        let bytes = proposal.encode().unwrap();
        // Golden bytes: a change here needs a new version and a way to read the old one.
        assert_eq!(
            std::str::from_utf8(&bytes[1..]).unwrap(),
            r#"{"request":{"id":"00000000-0000-0000-0000-000000000001","since":2},"command":{"DeleteVolume":{"volume":"00000000-0000-0000-0000-000000000003"}}}"#
        );
        assert_eq!(Proposal::decode(&bytes).unwrap(), proposal);
        let mut newer = bytes.clone();
        newer[0] = 9;
        assert!(matches!(Proposal::decode(&newer), Err(BadProposal::Version { found: Some(9) })));
        assert!(matches!(Proposal::decode(&[]), Err(BadProposal::Version { found: None })));
        assert!(matches!(Proposal::decode(&bytes[..20]), Err(BadProposal::Parse(_))));
        assert!(matches!(Proposal::decode(&vec![1; MAX_PROPOSAL + 1]), Err(BadProposal::TooLong { .. })));
    }
}
