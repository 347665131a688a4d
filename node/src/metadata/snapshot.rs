//! The machine as bytes, and back: a version byte, then JSON of everything in order. Equal machines give equal
//! bytes, so the hash of the bytes tells whether two voters agree.

use std::collections::BTreeSet;

use proto::cluster::{GatewayInfo, Member, Pool, VolumeInfo, VolumeSpec, VolumeState};
use proto::id::{ClusterId, ReplicaId};
use proto::limits::{MAX_MIRROR_SIZE, MAX_REPLICAS};
use proto::mutant::{self, Mutant};
use serde::{Deserialize, Serialize};

use super::placement::check_spec;
use super::state::{MAX_ANSWERS, MAX_GATEWAYS, MAX_POOLS, MAX_SETTINGS, MAX_VOLUMES, Metadata, Remembered};

const VERSION: u8 = 1;

#[derive(Serialize, Deserialize)]
struct Everything {
    cluster: Option<(ClusterId, String)>,
    applied: u64,
    revision: u64,
    members: Vec<Member>,
    pools: Vec<Pool>,
    gateways: Vec<GatewayInfo>,
    volumes: Vec<VolumeInfo>,
    settings: Vec<(String, String)>,
    /// Oldest first.
    answers: Vec<Remembered>,
    forgotten: u64,
}

/// A snapshot that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadSnapshot {
    /// It is empty or of another version.
    #[error("metadata snapshot of version {found:?}, this program reads version {VERSION}: a newer one wrote it")]
    Version {
        /// The first byte, if any.
        found: Option<u8>,
    },
    /// It does not parse.
    #[error("metadata snapshot that does not parse: {0}")]
    Parse(#[from] serde_json::Error),
    /// No machine ever was like this.
    #[error("metadata snapshot that makes no sense: {why}")]
    Senseless {
        /// What is wrong.
        why: String,
    },
}

/// Indexes, epochs and versions above this leave no room for those that follow; no run reaches it.
const LAST_NUMBER: u64 = u64::MAX / 2;

impl Metadata {
    /// The whole machine as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let answers = self.answer_order.iter().filter_map(|(id, index)| {
            let answer = self.answers.get(id)?.clone();
            Some(Remembered { id: *id, index: *index, answer })
        });
        let everything = Everything {
            cluster: self.cluster.clone(),
            applied: self.applied,
            revision: self.revision,
            members: self.members.values().cloned().collect(),
            pools: self.pools.values().cloned().collect(),
            gateways: self.gateways.values().cloned().collect(),
            volumes: self.volumes.values().cloned().collect(),
            settings: self.settings.clone().into_iter().collect(),
            answers: answers.collect(),
            forgotten: self.forgotten,
        };
        let mut bytes = vec![VERSION];
        serde_json::to_writer(&mut bytes, &everything).expect("plain values always serialise");
        bytes
    }

    /// The machine of these bytes.
    ///
    /// # Errors
    /// When they are of another version or senseless.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadSnapshot> {
        let json = match bytes.split_first() {
            Some((&VERSION, json)) => json,
            other => return Err(BadSnapshot::Version { found: other.map(|(version, _)| *version) }),
        };
        let all: Everything = serde_json::from_slice(json)?;
        check(&all).map_err(|why| BadSnapshot::Senseless { why })?;
        let known = if mutant::is(Mutant::SnapshotForgets) { Vec::new() } else { all.answers };
        Ok(Self {
            cluster: all.cluster,
            applied: all.applied,
            revision: all.revision,
            members: all.members.into_iter().map(|member| (member.id, member)).collect(),
            pools: all.pools.into_iter().map(|pool| ((pool.node, pool.name.clone()), pool)).collect(),
            gateways: all.gateways.into_iter().map(|gateway| (gateway.name.clone(), gateway)).collect(),
            volumes: all.volumes.into_iter().map(|volume| (volume.id, volume)).collect(),
            settings: all.settings.into_iter().collect(),
            answer_order: known.iter().map(|known| (known.id, known.index)).collect(),
            answers: known.into_iter().map(|known| (known.id, known.answer)).collect(),
            forgotten: all.forgotten,
        })
    }

    /// Equal on all voters that have applied the same index.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.encode()).as_bytes()
    }
}

/// What the machine asserts, or relies on, while it applies commands. A snapshot comes from a peer or from the disk:
/// one that breaks it is refused, before the first command trips over it.
fn check(all: &Everything) -> Result<(), String> {
    let limit = |what: &str, found: usize, most: usize| match found <= most {
        true => Ok(()),
        false => Err(format!("{found} {what}, at most {most} are allowed")),
    };
    if all.applied > LAST_NUMBER || all.revision > all.applied || all.forgotten > all.applied {
        return Err(format!("revision {}, forgotten {} at entry {}", all.revision, all.forgotten, all.applied));
    }
    limit("volumes", all.volumes.len(), MAX_VOLUMES)?;
    limit("gateways", all.gateways.len(), MAX_GATEWAYS)?;
    limit("settings", all.settings.len(), MAX_SETTINGS)?;
    limit("answers", all.answers.len(), MAX_ANSWERS)?;
    once("member", all.members.iter().map(|member| member.id))?;
    once("pool", all.pools.iter().map(|pool| (pool.node, &pool.name)))?;
    once("gateway", all.gateways.iter().map(|gateway| &gateway.name))?;
    once("setting", all.settings.iter().map(|(key, _)| key))?;
    once("answer", all.answers.iter().map(|known| known.id))?;
    once("volume", all.volumes.iter().map(|volume| volume.id))?;
    let living = all.volumes.iter().filter(|volume| volume.state != VolumeState::Deleting);
    once("volume's name", living.map(|volume| &volume.name))?;
    for member in &all.members {
        limit("pools of a node", all.pools.iter().filter(|pool| pool.node == member.id).count(), MAX_POOLS)?;
    }
    if !all.answers.is_sorted_by_key(|known| known.index) || all.answers.iter().any(|known| known.index > all.applied) {
        return Err("answers are out of order".into());
    }
    all.volumes.iter().try_for_each(|volume| check_volume(volume).map_err(|why| format!("volume {}: {why}", volume.id)))
}

fn once<T: Ord>(what: &str, all: impl Iterator<Item = T>) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for one in all {
        if !seen.insert(one) {
            return Err(format!("a {what} is there twice"));
        }
    }
    Ok(())
}

fn check_volume(volume: &VolumeInfo) -> Result<(), String> {
    let spec = VolumeSpec {
        name: volume.name.clone(),
        size: volume.size,
        replicas: volume.replicas,
        stripes: u32::try_from(volume.mirrors.len()).unwrap_or(u32::MAX),
        chunk_size: volume.chunk_size,
        min_in_sync: volume.min_in_sync,
        write_cache: volume.write_cache,
        export: None,
    };
    check_spec(&spec).map_err(|refusal| refusal.to_string())?;
    if volume.session.epoch.0 > LAST_NUMBER {
        return Err(format!("epoch {}", volume.session.epoch));
    }
    for mirror in &volume.mirrors {
        let set = &mirror.in_sync;
        if mirror.size > MAX_MIRROR_SIZE || mirror.replicas.len() > MAX_REPLICAS || set.version.0 > LAST_NUMBER {
            let replicas = mirror.replicas.len();
            return Err(format!("{} bytes, {replicas} replicas, set version {}", mirror.size, set.version));
        }
        once("replica's node", mirror.replicas.iter().map(|replica| replica.node))?;
        once("replica", mirror.replicas.iter().map(|replica| replica.id))?;
        // A tombstone loses its replicas one by one, and keeps its last set.
        let defined = |id: &ReplicaId| {
            volume.state == VolumeState::Deleting || mirror.replicas.iter().any(|replica| replica.id == *id)
        };
        let members = set.members.iter().chain(&set.awaited);
        let sorted = set.members.is_sorted_by(|a, b| a < b) && set.awaited.is_sorted_by(|a, b| a < b);
        let apart = set.awaited.iter().all(|id| !set.members.contains(id));
        if !sorted || !apart || set.members.is_empty() != (set.version.0 == 0) || !members.clone().all(defined) {
            return Err(format!("in-sync set {set:?}"));
        }
    }
    Ok(())
}
