//! What the command line asks of a gateway: comparisons and scrubs, which run through the volume's owner under
//! range locks, and figures.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::convert::volume_id;
use proto::id::{RegionIndex, ReplicaId, VolumeId};
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};
use proto::pb::{self, gateway_server, verify_event::Event};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Shared;
use crate::mirror::Comparison;
use crate::volume::VolumeCommand;

/// Regions compared at once.
const AT_ONCE: usize = 4;
/// How long a volume that is closed may take to be opened for a comparison.
const OPEN_PATIENCE: Duration = Duration::from_secs(20);
/// Differences told one by one; more are only counted.
const MAX_TOLD: u64 = 10_000;
/// Regions between two reports of progress.
const PROGRESS_EVERY: u64 = 32;

pub(super) struct Service {
    shared: Arc<Shared>,
}

impl Service {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn start(&self, volume: &[u8], repair: bool) -> Result<Response<Events>, Status> {
        let volume = volume_id("volume", volume).map_err(|bad| Status::invalid_argument(bad.to_string()))?;
        let (sender, receiver) = mpsc::channel(64);
        let shared = self.shared.clone();
        tokio::spawn(async move {
            let pin = Pin::new(&shared, volume);
            if let Err(status) = compare(&shared, volume, repair, &sender).await {
                let _ = sender.send(Err(status)).await;
            }
            drop(pin);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

type Events = ReceiverStream<Result<pb::VerifyEvent, Status>>;

/// Keeps a volume open while something is done with it.
struct Pin<'a> {
    shared: &'a Shared,
    volume: VolumeId,
}

impl<'a> Pin<'a> {
    fn new(shared: &'a Shared, volume: VolumeId) -> Self {
        *shared.pinned().entry(volume).or_default() += 1;
        shared.changed.notify_one();
        Self { shared, volume }
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let mut pinned = self.shared.pinned();
        let left = pinned.get_mut(&self.volume).map_or(0, |n| {
            *n -= 1;
            *n
        });
        if left == 0 {
            pinned.remove(&self.volume);
        }
        drop(pinned);
        self.shared.changed.notify_one();
    }
}

async fn compare(
    shared: &Shared,
    volume: VolumeId,
    repair: bool,
    events: &mpsc::Sender<Result<pb::VerifyEvent, Status>>,
) -> Result<(), Status> {
    let opened = async {
        loop {
            let found = shared.sessions().get(&volume).map(|s| (s.volume.clone(), s.commands.clone()));
            match found {
                Some(found) => return found,
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let (info, commands) = tokio::time::timeout(OPEN_PATIENCE, opened)
        .await
        .map_err(|_| Status::failed_precondition("this gateway could not open the volume; see its log"))?;
    let regions: Vec<(usize, RegionIndex)> = (info.mirrors.iter().enumerate())
        .flat_map(|(i, mirror)| {
            let regions = (mirror.size / BLOCK_SIZE).div_ceil(REGION_BLOCKS) as u32;
            (0..regions).map(move |r| (i, RegionIndex(r)))
        })
        .collect();
    let total: u64 = info.mirrors.iter().map(|m| m.size / BLOCK_SIZE).sum();
    let mut summary = pb::VerifySummary::default();
    let mut skipped: BTreeMap<ReplicaId, ()> = BTreeMap::new();
    let mut running: std::collections::VecDeque<(usize, oneshot::Receiver<Comparison>)> = Default::default();
    let mut next = regions.into_iter();
    let mut done = 0;
    loop {
        while running.len() < AT_ONCE {
            let Some((mirror, region)) = next.next() else { break };
            let (answer, receiver) = oneshot::channel();
            commands
                .send(VolumeCommand::Compare { mirror, region, repair, answer })
                .map_err(|_| Status::aborted("the volume's session has ended"))?;
            running.push_back((mirror, receiver));
        }
        let Some((mirror, receiver)) = running.pop_front() else { break };
        let comparison = receiver.await.map_err(|_| Status::aborted("the volume's session has ended"))?;
        done += 1;
        summary.blocks_compared += comparison.blocks;
        skipped.extend(comparison.absent.iter().map(|r| (*r, ())));
        for difference in differences(&comparison) {
            summary.differences += difference.blocks;
            summary.repaired += if repair { difference.blocks } else { 0 };
            if summary.differences <= MAX_TOLD {
                let difference = pb::VerifyDifference {
                    mirror: info.mirrors[mirror].id.into(),
                    mirror_index: mirror as u32,
                    ..difference
                };
                send(events, Event::Difference(difference)).await?;
            }
        }
        if done % PROGRESS_EVERY == 0 {
            let progress = pb::VerifyProgress { blocks_done: summary.blocks_compared, blocks_total: total };
            send(events, Event::Progress(progress)).await?;
        }
    }
    summary.skipped = (skipped.into_keys())
        .map(|replica| pb::VerifySkipped { replica: replica.into(), why: "not in sync".into() })
        .collect();
    send(events, Event::Summary(summary)).await
}

async fn send(events: &mpsc::Sender<Result<pb::VerifyEvent, Status>>, event: Event) -> Result<(), Status> {
    let event = pb::VerifyEvent { event: Some(event) };
    events.send(Ok(event)).await.map_err(|_| Status::cancelled("nobody listens"))
}

/// What a comparison found, block by block, without the mirror's names.
fn differences(comparison: &Comparison) -> impl Iterator<Item = pb::VerifyDifference> {
    let mut found: BTreeMap<u64, pb::VerifyDifference> = BTreeMap::new();
    let blank =
        |block: u64, what: &str| pb::VerifyDifference { block, blocks: 1, what: what.into(), ..Default::default() };
    for block in &comparison.differ {
        let entry = found.entry(block.0).or_insert_with(|| blank(block.0, "replicas differ"));
        entry.replicas = comparison.replicas.iter().map(|r| (*r).into()).collect();
    }
    for (replica, block) in &comparison.bad {
        let entry = found.entry(block.0).or_insert_with(|| blank(block.0, "checksum"));
        if entry.what != "checksum" {
            entry.what = "replicas differ, checksum".into();
            entry.replicas.clear();
        }
        entry.replicas.push((*replica).into());
    }
    found.into_values()
}

#[tonic::async_trait]
impl gateway_server::Gateway for Service {
    type VerifyVolumeStream = Events;
    type ScrubVolumeStream = Events;

    async fn verify_volume(&self, request: Request<pb::VerifyVolumeRequest>) -> Result<Response<Events>, Status> {
        self.start(&request.into_inner().volume, false)
    }

    async fn scrub_volume(&self, request: Request<pb::ScrubVolumeRequest>) -> Result<Response<Events>, Status> {
        self.start(&request.into_inner().volume, true)
    }

    async fn stats(&self, _: Request<pb::StatsRequest>) -> Result<Response<pb::GatewayStats>, Status> {
        let volumes = (self.shared.sessions().iter())
            .map(|(id, session)| pb::VolumeStats {
                volume: (*id).into(),
                epoch: session.epoch.0,
                resync_bytes: session.status().iter().map(|m| m.copied_bytes).sum(),
                ..pb::VolumeStats::default()
            })
            .collect();
        Ok(Response::new(pb::GatewayStats {
            name: self.shared.config.name.clone(),
            started_unix_ms: self.shared.started_unix_ms,
            volumes,
        }))
    }
}
