//! `verify-volume` and `scrub-volume`: asked of the gateway that owns the volume, which compares under range locks.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use proto::cluster::*;
use proto::id::{MirrorId, ReplicaId};
use proto::limits::BLOCK_SIZE;
use proto::pb;
use proto::pb::gateway_client::GatewayClient;
use proto::pb::verify_event::Event;
use serde_json::{Value, json};
use tonic::transport::Endpoint;

use crate::config::Cluster;
use crate::failure::{Failure, Outcome};
use crate::{gateway, render, size, status};

/// How long a connection to a gateway may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);

/// `cluster verify-volume`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The volume
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `cluster scrub-volume`.
#[derive(Debug, Args)]
pub struct ScrubArgs {
    /// The volume
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Blocks compared.
    pub compared: u64,
    /// Blocks that differ, or whose checksum does not match.
    pub differences: u64,
    /// Of those, made good.
    pub repaired: u64,
    /// Replicas that could not be compared: where, and why.
    pub skipped: Vec<(String, String)>,
    /// Every difference, in words.
    pub told: Vec<Difference>,
}

/// Blocks that differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The mirror's place in the stripe.
    pub mirror: usize,
    /// The mirror.
    pub id: MirrorId,
    /// Block of the mirror.
    pub block: u64,
    /// Byte of the volume at which it begins; `None`: past the volume's end, where the last chunk is not whole.
    pub volume_byte: Option<u64>,
    /// Where the replicas are.
    pub places: Vec<String>,
    /// The replicas.
    pub replicas: Vec<ReplicaId>,
    /// In which way.
    pub what: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mirror {} block {} ", self.mirror, self.block)?;
        match self.volume_byte {
            Some(byte) => write!(f, "(volume byte {byte})")?,
            None => write!(f, "(past the volume's end)")?,
        }
        write!(f, ": {}", self.what)?;
        for (place, replica) in self.places.iter().zip(&self.replicas) {
            write!(f, "; {place} replica {replica}")?;
        }
        Ok(())
    }
}

/// Where a mirror's block is in the volume: chunk *c* lies in mirror *c mod w* (DESIGN §2).
pub fn volume_byte(volume: &VolumeInfo, mirror: usize, block: u64) -> Option<u64> {
    let chunk = u64::from(volume.chunk_size);
    let byte = block * BLOCK_SIZE;
    let at = (byte / chunk * volume.stripes() as u64 + mirror as u64) * chunk + byte % chunk;
    (at < volume.size).then_some(at)
}

/// `cluster verify-volume`.
///
/// # Errors
/// Where replicas differ, where one could not be compared, and where nobody could compare.
pub async fn verify(config: Option<&Path>, args: VerifyArgs) -> Outcome {
    let cluster = Cluster::find(config)?;
    let found = compare(&cluster, &args.name, false, !args.json).await?;
    tell(&args.name, &found, false, args.json)
}

/// `cluster scrub-volume`.
///
/// # Errors
/// Where something is wrong that was not repaired, and as for `verify-volume`.
pub async fn scrub(config: Option<&Path>, args: ScrubArgs) -> Outcome {
    let cluster = Cluster::find(config)?;
    let found = compare(&cluster, &args.name, true, !args.json).await?;
    tell(&args.name, &found, true, args.json)
}

fn tell(name: &str, found: &Found, repair: bool, as_json: bool) -> Outcome {
    let left = found.differences - found.repaired.min(found.differences);
    if as_json {
        let differences: Vec<Value> = found
            .told
            .iter()
            .map(|difference| {
                json!({"mirror": difference.mirror, "mirror_id": difference.id, "block": difference.block,
                       "volume_byte": difference.volume_byte, "what": difference.what,
                       "replicas": difference.replicas, "places": difference.places})
            })
            .collect();
        let skipped: Vec<Value> =
            found.skipped.iter().map(|(place, why)| json!({"replica": place, "why": why})).collect();
        render::json(&json!({
            "volume": name, "blocks_compared": found.compared, "differences": found.differences,
            "repaired": found.repaired, "skipped": skipped, "different_blocks": differences,
            "equal": left == 0 && found.skipped.is_empty(),
        }));
    } else {
        for (place, why) in &found.skipped {
            render::line(format!("not compared: {place}: {why}"));
        }
        let repaired = if repair { format!(", {} repaired", found.repaired) } else { String::new() };
        render::line(format!(
            "volume {name}: {} blocks ({}) compared, {} differ{repaired}",
            found.compared,
            size::show(found.compared * BLOCK_SIZE),
            found.differences
        ));
    }
    if left > 0 {
        let next = match repair {
            false => format!("`cluster scrub-volume {name}` repairs what it can"),
            true => "look at the nodes' disks and logs".into(),
        };
        return Err(Failure::new(format!("volume {name}: {left} blocks differ between replicas")).next(next));
    }
    if !found.skipped.is_empty() {
        return Err(Failure::new(format!(
            "volume {name}: what could be compared is equal, but {} replicas could not be",
            found.skipped.len()
        ))
        .next("bring them back (`cluster status` tells why they are not in sync), then repeat it"));
    }
    Ok(())
}

/// Compares all replicas of a volume through its owner. With `show`, progress and every difference are printed as
/// they come.
///
/// # Errors
/// No such volume, no gateway that could compare it, or one that could not finish.
pub async fn compare(cluster: &Cluster, name: &str, repair: bool, show: bool) -> Outcome<Found> {
    let status = cluster.status(false).await?;
    let volume = status.view.volume_named(name).ok_or_else(|| {
        Failure::new(format!("there is no volume {name}")).next("`cluster list-volumes` shows what exists")
    })?;
    let attempt = format!("{} volume {name}", if repair { "scrubbing" } else { "comparing" });
    // The owner; where nobody has it open, whoever is to serve it, or any gateway: it opens the volume for this.
    let asked = match volume.session.owner().or(volume.export.as_deref()) {
        Some(gateway) => gateway.to_owned(),
        None => gateway::choose(&status, None).map_err(|failure| failure.while_doing(&attempt))?,
    };
    let addr = match status.view.gateway(&asked) {
        Some(gateway) => gateway.control_addr.clone(),
        None => return Err(Failure::new(format!("{attempt}: its owner {asked} is not registered"))),
    };
    let silent = |error: &dyn std::fmt::Display| {
        Failure::new(format!("{attempt}: {asked} at {addr}: {error}"))
            .next("see whether that gateway runs: `cluster list-gateways`, and its log")
    };
    let channel = Endpoint::from_shared(format!("http://{addr}"))
        .map_err(|error| silent(&error))?
        .connect_timeout(CONNECT_PATIENCE)
        .connect()
        .await
        .map_err(|error| silent(&error))?;
    let mut client = GatewayClient::new(channel);
    let id: Vec<u8> = volume.id.into();
    let stream = match repair {
        false => client.verify_volume(pb::VerifyVolumeRequest { volume: id }).await,
        true => client.scrub_volume(pb::ScrubVolumeRequest { volume: id }).await,
    };
    let mut stream = stream.map_err(|status| silent(&status.message()))?.into_inner();
    let mut found = Found::default();
    let mut progress = show.then(|| render::Progress::new(format!("volume {name}:")));
    let mut whole = false;
    while let Some(event) = stream.message().await.map_err(|status| silent(&status.message()))? {
        match event.event {
            Some(Event::Progress(at)) => {
                if let Some(progress) = &mut progress {
                    let percent = at.blocks_done * 100 / at.blocks_total.max(1);
                    progress.at(format!("{percent}% of {} compared", size::show(at.blocks_total * BLOCK_SIZE)));
                }
            }
            Some(Event::Difference(difference)) => {
                for difference in differences(&status.view, volume, &difference)? {
                    if show {
                        render::line(&difference);
                    }
                    found.told.push(difference);
                }
            }
            Some(Event::Summary(summary)) => {
                whole = true;
                (found.compared, found.differences) = (summary.blocks_compared, summary.differences);
                found.repaired = summary.repaired;
                for skipped in summary.skipped {
                    let replica =
                        proto::convert::replica_id("skipped replica", &skipped.replica).map_err(|bad| silent(&bad))?;
                    let place = status::place_of(&status.view, volume, replica);
                    found.skipped.push((format!("{place} replica {replica}"), skipped.why));
                }
            }
            None => {}
        }
    }
    match whole {
        true => Ok(found),
        false => Err(silent(&"the comparison ended before its end")),
    }
}

fn differences(view: &ClusterView, volume: &VolumeInfo, message: &pb::VerifyDifference) -> Outcome<Vec<Difference>> {
    let bad = |bad: proto::convert::BadMessage| Failure::new(format!("bad answer from the gateway: {bad}"));
    let id = proto::convert::mirror_id("mirror", &message.mirror).map_err(bad)?;
    let mut replicas = Vec::new();
    for replica in &message.replicas {
        replicas.push(proto::convert::replica_id("replica", replica).map_err(bad)?);
    }
    let mirror = message.mirror_index as usize;
    let places: Vec<String> = replicas.iter().map(|replica| status::place_of(view, volume, *replica)).collect();
    let blocks = message.block..message.block.saturating_add(message.blocks.clamp(1, 1 << 20));
    Ok(blocks
        .map(|block| Difference {
            mirror,
            id,
            block,
            volume_byte: volume_byte(volume, mirror, block),
            places: places.clone(),
            replicas: replicas.clone(),
            what: message.what.clone(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::id::*;
    use uuid::Uuid;

    #[test]
    fn a_mirrors_block_is_found_in_the_volume() {
        let mirror = |n| MirrorInfo {
            id: MirrorId(Uuid::from_u128(n)),
            size: 1 << 20,
            replicas: Vec::new(),
            in_sync: InSyncSet::default(),
        };
        let volume = VolumeInfo {
            id: VolumeId(Uuid::nil()),
            name: "v".into(),
            size: (5 << 20) - 4096,
            replicas: 3,
            chunk_size: 256 << 10,
            min_in_sync: 1,
            write_cache: true,
            state: VolumeState::Ready,
            mirrors: (0..5).map(mirror).collect(),
            export: None,
            session: VolumeSession { epoch: Epoch(0), state: SessionState::Never, settled: true },
            recover_unix_ms: None,
            resync_limit: None,
            created_unix_ms: 0,
        };
        assert_eq!(volume_byte(&volume, 0, 0), Some(0));
        assert_eq!(volume_byte(&volume, 0, 63), Some(63 * 4096));
        assert_eq!(volume_byte(&volume, 1, 0), Some(256 << 10), "the second chunk");
        assert_eq!(volume_byte(&volume, 0, 64), Some(5 * (256 << 10)), "the second row");
        assert_eq!(volume_byte(&volume, 4, 255), None, "the volume ends one block before its last chunk does");
    }
}
