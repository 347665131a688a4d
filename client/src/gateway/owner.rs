//! One volume's sessions, one after the other, for as long as the volume is wanted here.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::cluster::{OpenedSession, VolumeInfo};
use proto::id::{Epoch, VolumeId};
use tokio::sync::{mpsc, oneshot, watch};

use super::decide::{self, Want};
use super::threads::Open;
use super::{Shared, session};
use crate::clock::now_ms;
use crate::control::{ControlError, ViewReceiver};
use crate::iscsi::iqn;
use crate::mirror::{MirrorStatus, StopReason};
use crate::volume::{VolumeCommand, VolumeEvent};

/// Between attempts to open a volume.
const OPEN_AGAIN: Duration = Duration::from_millis(500);
/// How long a close may take until the session is left to the next one to reconcile.
const CLOSE_PATIENCE: Duration = Duration::from_secs(20);

/// A session that is open, for the lease task and the command line.
pub(super) struct OpenSession {
    pub epoch: Epoch,
    pub volume: VolumeInfo,
    pub lease_until: Arc<AtomicU64>,
    pub commands: mpsc::UnboundedSender<VolumeCommand>,
    status: Arc<Mutex<Vec<MirrorStatus>>>,
}

impl OpenSession {
    pub(super) fn status(&self) -> Vec<MirrorStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How a session ended.
enum End {
    Closed,
    Stopped(StopReason),
}

/// Opens the volume and serves it until it is wanted no more. Reopens it after a session that was lost.
pub(super) async fn own(
    shared: Arc<Shared>,
    volume: VolumeId,
    mut want: watch::Receiver<Want>,
    mut views: ViewReceiver,
) {
    let mut told = String::new();
    let mut fenced = Epoch(0);
    while *want.borrow_and_update() != Want::Nothing {
        let opened = tokio::select! {
            opened = open(&shared, volume) => opened,
            changed = want.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        match opened {
            Ok(opened) if decide::is_forgotten(opened.epoch, fenced) => {
                // A session must not be opened until an epoch is high enough by chance.
                tracing::error!(
                    %volume, epoch = %opened.epoch, known = %fenced,
                    "volume not served: a replica knows a newer session than the metadata, which is an old image"
                );
                let _ = want.wait_for(|want| *want == Want::Nothing).await;
                return;
            }
            Ok(opened) => {
                told.clear();
                match serve(&shared, opened, &mut want, &mut views).await {
                    End::Closed => {}
                    End::Stopped(reason @ StopReason::MetadataIsOld { .. }) => {
                        // Nothing but an operator can help; a new session would find the same (R8).
                        tracing::error!(%volume, %reason, "volume not served");
                        let _ = want.wait_for(|want| *want == Want::Nothing).await;
                        return;
                    }
                    End::Stopped(StopReason::Fenced { epoch, .. }) => fenced = fenced.max(epoch),
                    End::Stopped(StopReason::Superseded) => {}
                }
            }
            Err(error) => {
                if told != error.to_string() {
                    tracing::warn!(%volume, %error, "volume not opened");
                    told = error.to_string();
                }
            }
        }
        let gone = views.borrow_and_update().volume(volume).is_none();
        if gone {
            return;
        }
        let _ = tokio::time::timeout(OPEN_AGAIN, want.changed()).await;
    }
}

async fn open(shared: &Shared, volume: VolumeId) -> Result<OpenedSession, ControlError> {
    let request = shared.control.new_request().await?;
    shared.control.open_session(request, volume, &shared.config.name, false).await
}

async fn serve(
    shared: &Arc<Shared>,
    opened: OpenedSession,
    want: &mut watch::Receiver<Want>,
    views: &mut ViewReceiver,
) -> End {
    let (id, epoch) = (opened.volume.id, opened.epoch);
    let iqn = iqn(&opened.volume.name);
    let (event_sender, mut events) = mpsc::unbounded_channel();
    let (commands, command_receiver) = mpsc::unbounded_channel();
    let (logins, login_receiver) = mpsc::unbounded_channel();
    let (close, close_receiver) = oneshot::channel();
    let mut close = Some(close);
    let lease_until = Arc::new(AtomicU64::new(0));
    let status: Arc<Mutex<Vec<MirrorStatus>>> = Arc::default();
    let old_lease_until = decide::old_lease_until(now_ms(), opened.old_lease_ms);
    let config = session::volume_config(
        shared.config.name.clone(),
        &views.borrow(),
        &opened,
        old_lease_until,
        &lease_until,
        &status,
    );
    tracing::info!(volume = %opened.volume.name, %epoch, old_lease_ms = opened.old_lease_ms, "session opened");
    shared.threads.open(Open {
        config,
        iqn: iqn.clone(),
        events: event_sender,
        commands: command_receiver,
        logins: login_receiver,
        close: close_receiver,
        commander: commands.clone(),
    });
    let session = OpenSession { epoch, volume: opened.volume.clone(), lease_until, commands: commands.clone(), status };
    shared.sessions().insert(id, session);
    shared.renew.notify_one();
    shared.changed.notify_waiters();
    let mut exported = false;
    let mut recovering = None;
    let mut resync_limit = None;
    let mut deadline = None;
    let end = loop {
        let wanted = *want.borrow_and_update();
        if exported != (wanted == Want::Export) {
            exported = wanted == Want::Export;
            match exported {
                true => shared.registry.add(&iqn, logins.clone()),
                false => shared.registry.remove(&iqn),
            }
        }
        if wanted == Want::Nothing
            && let Some(close) = close.take()
        {
            let _ = close.send(());
            deadline = Some(tokio::time::Instant::now() + CLOSE_PATIENCE);
        }
        let (asked, limit) = match views.borrow_and_update().volume(id) {
            Some(volume) => (volume.recover_unix_ms, volume.resync_limit),
            None => (None, resync_limit),
        };
        if limit != resync_limit {
            resync_limit = limit;
            let _ = commands.send(VolumeCommand::LimitResync(limit));
        }
        if asked.is_some() && asked != recovering {
            recovering = asked;
            let _ = commands.send(VolumeCommand::Recover);
            tokio::spawn(finish_recovery(shared.clone(), id, epoch));
        }
        tokio::select! {
            event = events.recv() => match event {
                Some(VolumeEvent::ProposeSet { mirror, version, members, awaited }) => {
                    session::propose_set(&shared.control, &opened, mirror, version, members, awaited, &commands);
                }
                Some(VolumeEvent::Stopped(reason)) => break End::Stopped(reason),
                Some(VolumeEvent::Closed { clean }) => {
                    let _ = commands.send(VolumeCommand::Supersede);
                    give_back(shared, id, epoch, clean).await;
                    break End::Closed;
                }
                None => break End::Stopped(StopReason::Superseded),
            },
            _ = want.changed() => {}
            () = views.changed() => {}
            () = until(deadline) => {
                tracing::warn!(volume = %opened.volume.name, "did not close in time");
                let _ = commands.send(VolumeCommand::Supersede);
                break End::Closed;
            }
        }
    };
    shared.registry.remove(&iqn);
    shared.sessions().remove(&id);
    end
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Tells the cluster that the session is over, as far as it answers.
async fn give_back(shared: &Shared, volume: VolumeId, epoch: Epoch, clean: bool) {
    let closed = async {
        let request = shared.control.new_request().await?;
        shared.control.close_session(request, volume, epoch, clean).await
    };
    match closed.await {
        Ok(_) => tracing::info!(%volume, %epoch, clean, "session closed"),
        Err(error) => tracing::warn!(%volume, %epoch, %error, "session not closed"),
    }
}

/// Takes the operator's request back: the mirrors have been told, and it is for what waits now.
async fn finish_recovery(shared: Arc<Shared>, volume: VolumeId, epoch: Epoch) {
    while shared.sessions().get(&volume).is_some_and(|session| session.epoch == epoch) {
        let done = async {
            let request = shared.control.new_request().await?;
            shared.control.finish_recovery(request, volume, epoch).await
        };
        match done.await {
            Ok(_) => return,
            Err(error) if error.refusal().is_some() => return,
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
}
