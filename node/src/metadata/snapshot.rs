//! The machine as bytes, and back: a version byte, then JSON of everything in order. Equal machines give equal
//! bytes, so the hash of the bytes tells whether two voters agree.

use proto::cluster::{GatewayInfo, Member, Pool, VolumeInfo};
use proto::id::ClusterId;
use serde::{Deserialize, Serialize};

use super::state::{Metadata, Remembered};

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
}

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
        Ok(Self {
            cluster: all.cluster,
            applied: all.applied,
            revision: all.revision,
            members: all.members.into_iter().map(|member| (member.id, member)).collect(),
            pools: all.pools.into_iter().map(|pool| ((pool.node, pool.name.clone()), pool)).collect(),
            gateways: all.gateways.into_iter().map(|gateway| (gateway.name.clone(), gateway)).collect(),
            volumes: all.volumes.into_iter().map(|volume| (volume.id, volume)).collect(),
            settings: all.settings.into_iter().collect(),
            answer_order: all.answers.iter().map(|known| (known.id, known.index)).collect(),
            answers: all.answers.into_iter().map(|known| (known.id, known.answer)).collect(),
            forgotten: all.forgotten,
        })
    }

    /// Equal on all voters that have applied the same index.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.encode()).as_bytes()
    }
}
