//! What whoever has opened a volume's session makes of it, in a gateway or elsewhere: what the volume runs with, and
//! how its in-sync sets are decided. What is made of single answers is [`decide`]'s.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::cluster::{ClusterView, OpenedSession, Refusal};
use proto::id::{Epoch, MirrorId, ReplicaId, SetVersion, VolumeId};
use tokio::sync::mpsc;

use super::decide;
use crate::block::DeviceInfo;
use crate::control::ControlClient;
use crate::mirror::{MirrorStatus, SetDecision};
use crate::volume::{Stripe, VolumeCommand, VolumeConfig};

/// Between attempts to get a definite answer about a proposed set.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// What the volume of a session is run with. `name` is what the nodes' logs call its owner; the previous owner's lease
/// may live until `old_lease_until` (R3).
pub fn volume_config(
    name: String,
    view: &ClusterView,
    opened: &OpenedSession,
    old_lease_until: u64,
    lease_until: &Arc<AtomicU64>,
    status: &Arc<Mutex<Vec<MirrorStatus>>>,
) -> VolumeConfig {
    let volume = &opened.volume;
    let chunk = u64::from(volume.chunk_size);
    VolumeConfig {
        cluster: view.id,
        volume: volume.id,
        epoch: opened.epoch,
        gateway: name,
        device: DeviceInfo {
            id: volume.id.0,
            name: volume.name.clone(),
            bytes: volume.size,
            chunk: volume.chunk_size,
            write_cache: volume.write_cache,
        },
        stripe: Stripe { chunk, width: volume.mirrors.len() as u64 },
        mirrors: decide::mirror_configs(view, opened, old_lease_until, hash_seed),
        lease_until: lease_until.clone(),
        status: status.clone(),
    }
}

fn hash_seed() -> [u8; 32] {
    let mut seed = [0; 32];
    seed[..16].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    seed[16..].copy_from_slice(uuid::Uuid::new_v4().as_bytes());
    seed
}

/// Has a set decided that the volume proposes for one of its mirrors, and tells it.
pub fn propose_set(
    control: &ControlClient,
    opened: &OpenedSession,
    mirror: usize,
    expected: SetVersion,
    members: Vec<ReplicaId>,
    awaited: Vec<ReplicaId>,
    commands: &mpsc::UnboundedSender<VolumeCommand>,
) {
    let (control, commands) = (control.clone(), commands.clone());
    let (volume, definition, epoch) = (opened.volume.id, opened.volume.mirrors[mirror].id, opened.epoch);
    tokio::spawn(async move {
        let decision = decide_set(&control, volume, definition, epoch, expected, members, awaited, &commands).await;
        let _ = commands.send(VolumeCommand::SetDecided { mirror, decision });
    });
}

/// Asks for a set until the answer is definite: while it is in doubt the same request is repeated (R2).
async fn decide_set(
    control: &ControlClient,
    volume: VolumeId,
    mirror: MirrorId,
    epoch: Epoch,
    expected: SetVersion,
    members: Vec<ReplicaId>,
    awaited: Vec<ReplicaId>,
    session: &mpsc::UnboundedSender<VolumeCommand>,
) -> SetDecision {
    let request = loop {
        match control.new_request().await {
            Ok(request) => break request,
            Err(_) if session.is_closed() => return SetDecision::Superseded,
            Err(_) => tokio::time::sleep(ASK_AGAIN).await,
        }
    };
    let mut told = false;
    loop {
        let answer =
            control.change_set(request, volume, mirror, epoch, expected, members.clone(), awaited.clone()).await;
        let refusal = match &answer {
            Ok(set) => Some(Ok(set)),
            Err(error) => error.refusal().map(Err),
        };
        if let Some(decision) = refusal.and_then(decide::set_decision) {
            return decision;
        }
        let Err(error) = answer else { unreachable!("a set that was changed is decided") };
        if let Some(Refusal::Forgotten { .. }) = error.refusal()
            && let Ok(status) = control.status(false).await
            && let Some(decision) = decide::decided_before(&status.view, volume, mirror, epoch, &members, expected)
        {
            return decision;
        }
        if session.is_closed() {
            return SetDecision::Superseded;
        }
        if !told {
            tracing::warn!(%volume, %mirror, %error, "in-sync set not decided yet");
            told = true;
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}
