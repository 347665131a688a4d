//! What a gateway decides from what the cluster tells it, without clock or I/O: the simulation decides by the same.

use std::collections::BTreeMap;

use proto::cluster::{ClusterView, InSyncSet, OpenedSession, Refusal, VolumeSession, VolumeState};
use proto::id::{Epoch, MirrorId, ReplicaId, SetVersion, VolumeId};
use proto::limits::{BLOCK_SIZE, CLOCK_DRIFT_PERMILLE};

use crate::mirror::{MirrorConfig, ReplicaDef, SetDecision};

/// What a volume is wanted for at this gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Open and offered to initiators.
    Export,
    /// Open for the command line only.
    Open,
    /// Closed.
    Nothing,
}

/// The volumes that this gateway should have open; `pinned`: the command line needs it.
pub fn wants(view: &ClusterView, gateway: &str, pinned: impl Fn(VolumeId) -> bool) -> BTreeMap<VolumeId, Want> {
    let mut wanted = BTreeMap::new();
    for volume in view.volumes.iter().filter(|v| v.state == VolumeState::Ready) {
        if volume.export.as_deref() == Some(gateway) {
            wanted.insert(volume.id, Want::Export);
        } else if pinned(volume.id) {
            wanted.insert(volume.id, Want::Open);
        }
    }
    wanted
}

/// Until when a lease lives that was asked for at `sent` and granted for so long, on the clock of whoever asked (R3).
pub fn lease_until(sent: u64, lease_ms: u64) -> u64 {
    sent + lease_ms * (1_000 - CLOCK_DRIFT_PERMILLE) / 1_000
}

/// Until when an older lease may live of which the leader said so at the latest now; 0: none lives (R3).
pub fn old_lease_until(now: u64, old_lease_ms: u64) -> u64 {
    match old_lease_ms {
        0 => 0,
        ms => now + ms * (1_000 + CLOCK_DRIFT_PERMILLE) / 1_000,
    }
}

/// Whether a session whose renewal was refused is over. While somebody is taking it over the epoch is still its own:
/// then the lease just ends.
pub fn is_superseded(current: Option<&VolumeSession>, epoch: Epoch) -> bool {
    current.is_none_or(|c| c.epoch != epoch || c.owner().is_none())
}

/// Whether raft has forgotten an epoch that a replica knows: the epoch given out rises above all that raft ever gave,
/// so the voters were restored from an old image (R8).
pub fn is_forgotten(opened: Epoch, fenced: Epoch) -> bool {
    opened <= fenced
}

/// The mirrors of a session that has just opened.
pub fn mirror_configs(
    view: &ClusterView,
    opened: &OpenedSession,
    old_lease_until: u64,
    mut hash_seed: impl FnMut() -> [u8; 32],
) -> Vec<MirrorConfig> {
    let volume = &opened.volume;
    let data_addr = |node| view.members.iter().find(|m| m.id == node).map(|m| m.data_addr.clone());
    let mirrors = volume.mirrors.iter().map(|mirror| MirrorConfig {
        mirror: mirror.id,
        epoch: opened.epoch,
        blocks: mirror.size / BLOCK_SIZE,
        chunk_blocks: u64::from(volume.chunk_size) / BLOCK_SIZE,
        replicas: (mirror.replicas.iter())
            .map(|r| ReplicaDef {
                replica: r.id,
                node: r.node,
                // A view from before the node registered has no address yet; the link then says so and retries.
                data_addr: data_addr(r.node).unwrap_or_default(),
            })
            .collect(),
        version: mirror.in_sync.version,
        members: mirror.in_sync.members.clone(),
        awaited: mirror.in_sync.awaited.clone(),
        min_in_sync: volume.min_in_sync as usize,
        write_cache: volume.write_cache,
        old_lease_until,
        hash_seed: hash_seed(),
    });
    mirrors.collect()
}

/// What an answer says of a proposed set; `None`: not yet, the same request is to be repeated (R2).
pub fn set_decision(answer: Result<&InSyncSet, &Refusal>) -> Option<SetDecision> {
    match answer {
        Ok(set) => Some(SetDecision::Committed(set.version)),
        Err(Refusal::SetChanged { current, .. }) => Some(refused(current)),
        Err(Refusal::Superseded { .. } | Refusal::NotFound { .. }) => Some(SetDecision::Superseded),
        Err(_) => None,
    }
}

/// How a set that was decided so long ago that its answer is forgotten was decided: what is committed now tells.
pub fn decided_before(
    view: &ClusterView,
    volume: VolumeId,
    mirror: MirrorId,
    epoch: Epoch,
    members: &[ReplicaId],
    expected: SetVersion,
) -> Option<SetDecision> {
    let Some(volume) = view.volume(volume).filter(|v| v.session.epoch == epoch) else {
        return Some(SetDecision::Superseded);
    };
    let set = &volume.mirror(mirror)?.in_sync;
    Some(if set.version == expected.next() && set.members == members {
        SetDecision::Committed(set.version)
    } else {
        refused(set)
    })
}

fn refused(set: &InSyncSet) -> SetDecision {
    SetDecision::Refused { version: set.version, members: set.members.clone(), awaited: set.awaited.clone() }
}
