//! The gateway: serves the volumes that the metadata exports on it over iSCSI.
//!
//! - `config`: what its file says;
//! - `run` (here): registers, follows the metadata, and keeps one owner task for each volume that it should serve;
//! - [`decide`]: what it makes of the cluster's answers;
//! - `owner`: one volume's sessions, one after the other: open, serve, ask raft on the volume's behalf, close;
//! - [`session`]: what a volume runs with, and how its sets are decided, for whoever has opened it;
//! - `lease`: renews the leases of all sessions together (R3);
//! - `threads`: where volumes live, with their links and initiators;
//! - `service`: what the command line asks of a gateway.

mod config;
pub mod decide;
mod lease;
mod owner;
mod service;
pub mod session;
mod threads;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::cluster::{ClusterView, GatewayInfo};
use proto::id::VolumeId;
use proto::pb::gateway_server::GatewayServer;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use self::decide::Want;
use crate::control::{ControlClient, ControlConfig, ViewReceiver};
use crate::iscsi::server::{Portal, Registry};

pub use config::{GatewayConfig, GatewayError};

/// How long a gateway that is told to stop waits for its sessions to close.
const CLOSE_PATIENCE: Duration = Duration::from_secs(25);
/// Between attempts to reach the cluster.
const RETRY: Duration = Duration::from_millis(500);

struct Owner {
    want: watch::Sender<Want>,
    task: JoinHandle<()>,
}

/// What all tasks of the gateway share.
struct Shared {
    config: GatewayConfig,
    control: ControlClient,
    registry: Registry,
    threads: threads::Threads,
    /// Open sessions, by volume.
    sessions: Mutex<BTreeMap<VolumeId, owner::OpenSession>>,
    /// Volumes that the command line has open although they are not exported here, and how often.
    pinned: Mutex<BTreeMap<VolumeId, usize>>,
    changed: Notify,
    /// A session has opened: renew now.
    renew: Notify,
    started_unix_ms: u64,
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, BTreeMap<VolumeId, owner::OpenSession>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn pinned(&self) -> MutexGuard<'_, BTreeMap<VolumeId, usize>> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a gateway until `shutdown` is done, then closes its sessions cleanly.
///
/// # Errors
/// When it cannot listen, or its configuration makes no sense. A cluster that does not answer is waited for.
pub async fn run(config: GatewayConfig, shutdown: impl Future<Output = ()>) -> Result<(), GatewayError> {
    let portal_addr = config.portal_addr()?;
    let listen_addr = config.listen_addr()?;
    let registry = Registry::new(crate::iscsi::PORTAL_GROUP_TAG);
    let portal = Portal::bind(portal_addr, registry.clone()).map_err(|error| GatewayError::Listen {
        what: "portal",
        addr: portal_addr,
        error,
    })?;
    let listener = tokio::net::TcpListener::bind(listen_addr).await.map_err(|error| GatewayError::Listen {
        what: "control service",
        addr: listen_addr,
        error,
    })?;
    let threads = threads::Threads::start(config.threads).map_err(GatewayError::Threads)?;
    let shared = Arc::new(Shared {
        control: ControlClient::new(ControlConfig::new(config.members.clone())),
        registry,
        threads,
        sessions: Mutex::default(),
        pinned: Mutex::default(),
        changed: Notify::new(),
        renew: Notify::new(),
        started_unix_ms: unix_ms(),
        config,
    });
    let (stop, stopping) = watch::channel(false);
    let stopped = |mut stopping: watch::Receiver<bool>| async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let portal = tokio::spawn(portal.run(stopped(stopping.clone())));
    let service = GatewayServer::new(service::Service::new(shared.clone()));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let service = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, stopped(stopping.clone())),
    );
    let leases = tokio::spawn(lease::renew(shared.clone()));
    let mut owners = BTreeMap::new();
    tokio::select! {
        () = follow(&shared, portal_addr, listen_addr, &mut owners) => {}
        () = shutdown => tracing::info!("closing"),
    }
    close(&shared, owners).await;
    let _ = stop.send(true);
    let _ = portal.await;
    // Streams to the command line may still be open; nobody waits for them.
    let _ = tokio::time::timeout(Duration::from_secs(1), service).await;
    leases.abort();
    Ok(())
}

/// Registers and then keeps an owner task for every volume that should be open here. Never ends.
async fn follow(shared: &Arc<Shared>, portal: SocketAddr, listen: SocketAddr, owners: &mut BTreeMap<VolumeId, Owner>) {
    let info =
        GatewayInfo { name: shared.config.name.clone(), control_addr: listen.to_string(), portal: portal.to_string() };
    let mut told = String::new();
    while let Err(error) = shared.control.register_gateway(info.clone()).await {
        if told != error.to_string() {
            tracing::warn!(%error, "cluster not reached");
            told = error.to_string();
        }
        tokio::time::sleep(RETRY).await;
    }
    let mut views = loop {
        match shared.control.watch().await {
            Ok(views) => break views,
            Err(error) => tracing::warn!(%error, "cluster not reached"),
        }
        tokio::time::sleep(RETRY).await;
    };
    tracing::info!(gateway = %shared.config.name, %portal, %listen, "serving");
    loop {
        let view = views.borrow_and_update();
        reconcile(shared, &view, &views, owners);
        tokio::select! {
            () = views.changed() => {}
            () = shared.changed.notified() => {}
        }
    }
}

fn reconcile(shared: &Arc<Shared>, view: &ClusterView, views: &ViewReceiver, owners: &mut BTreeMap<VolumeId, Owner>) {
    owners.retain(|_, owner| !owner.task.is_finished());
    let pinned: Vec<VolumeId> = shared.pinned().keys().copied().collect();
    let wanted = decide::wants(view, &shared.config.name, |volume| pinned.contains(&volume));
    for (volume, owner) in &*owners {
        let want = wanted.get(volume).copied().unwrap_or(Want::Nothing);
        owner.want.send_if_modified(|w| std::mem::replace(w, want) != want);
    }
    for (volume, want) in wanted {
        owners.entry(volume).or_insert_with(|| {
            let (sender, receiver) = watch::channel(want);
            let (shared, views) = (shared.clone(), views.clone());
            let task = tokio::spawn(async move {
                owner::own(shared.clone(), volume, receiver, views).await;
                // It may be wanted again by now.
                shared.changed.notify_one();
            });
            Owner { want: sender, task }
        });
    }
}

async fn close(shared: &Arc<Shared>, owners: BTreeMap<VolumeId, Owner>) {
    for owner in owners.values() {
        owner.want.send_replace(Want::Nothing);
    }
    let all = async {
        for owner in owners.into_values() {
            let _ = owner.task.await;
        }
    };
    if tokio::time::timeout(CLOSE_PATIENCE, all).await.is_err() {
        let open: Vec<_> = shared.sessions().keys().map(ToString::to_string).collect();
        tracing::warn!(volumes = open.join(", "), "not closed in time; the next session reconciles them");
    }
}

fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_millis() as u64)
}
