//! Where the data plane meets the control plane: replicas that the metadata places here are made, opened, and
//! deleted against their tombstones.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proto::id::{Incarnation, NodeId, ReplicaId};
use tokio::sync::watch;

use super::plane::{DataConfig, DataPlane, PoolPlace, PoolSpec, ReplicaSpec};
use crate::control::agent::{HostFuture, PoolUsage, assignments};
use crate::control::daemon::{HostContext, StartHost};
use crate::control::{ReplicaAssignment, ReplicaHost, ReplicaWish};
use crate::raft::driver::Shown;
use crate::store::EngineKind;

/// What could not be opened is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);

/// What a storage node's daemon starts its replica server with.
pub fn start_host() -> StartHost {
    Box::new(|context| Box::pin(start(context)))
}

async fn start(context: HostContext) -> Result<Arc<dyn ReplicaHost>, String> {
    let HostContext { config, cluster, shown, data_listener } = context;
    let engine = EngineKind::from_env()
        .map_err(|found| format!("MD99_IO is {found:?}; it may be blocking, io_uring or auto"))?;
    let pools = config
        .pools
        .iter()
        .map(|pool| PoolSpec {
            name: pool.name.clone(),
            place: PoolPlace::Directory(pool.path.clone()),
            capacity: pool.capacity,
        })
        .collect();
    let incarnation = Incarnation(uuid::Uuid::new_v4().as_u64_pair().0);
    let data = DataConfig { listener: data_listener, cluster, incarnation, pools, threads: None, engine };
    let plane = Arc::new(DataPlane::start(data).await.map_err(|error| error.to_string())?);
    let opener = tokio::spawn(open_placed(plane.clone(), config.id, shown));
    Ok(Arc::new(Host { plane, opener }))
}

/// The data plane as the control plane sees it.
struct Host {
    plane: Arc<DataPlane>,
    opener: tokio::task::JoinHandle<()>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.opener.abort();
        self.plane.stop_and_wait();
    }
}

fn spec(assignment: &ReplicaAssignment) -> ReplicaSpec {
    ReplicaSpec {
        cluster: assignment.cluster,
        volume: assignment.volume,
        mirror: assignment.mirror,
        replica: assignment.replica,
        pool: assignment.pool.clone(),
        size_bytes: assignment.size,
        all_dirty: false,
    }
}

impl ReplicaHost for Host {
    fn create(&self, assignment: ReplicaAssignment) -> HostFuture<()> {
        let plane = self.plane.clone();
        Box::pin(async move { plane.create_replica(spec(&assignment)).await.map_err(|e| e.to_string()) })
    }

    fn delete(&self, assignment: ReplicaAssignment) -> HostFuture<()> {
        let plane = self.plane.clone();
        Box::pin(async move {
            let deleted = plane.delete_replica(assignment.volume, assignment.replica, &assignment.pool);
            deleted.await.map_err(|e| e.to_string())
        })
    }

    fn usage(&self) -> HostFuture<Vec<PoolUsage>> {
        let plane = self.plane.clone();
        Box::pin(async move {
            let stats = plane.pool_usage().await.map_err(|(path, error)| format!("{}: {error}", path.display()))?;
            let usage = stats.into_iter().map(|pool| PoolUsage {
                path: plane.pool_path(&pool.name).map_or_else(String::new, |path| path.display().to_string()),
                name: pool.name,
                kind: "file".to_owned(),
                capacity: pool.capacity,
                free: pool.free,
            });
            Ok(usage.collect())
        })
    }
}

/// Opens what was made before and is placed here, as soon as the metadata says so. A lost replica is made anew only
/// when the metadata are confirmed: what was applied before that may name volumes that are gone.
async fn open_placed(plane: Arc<DataPlane>, node: NodeId, mut shown: watch::Receiver<Shown>) {
    let mut open: BTreeSet<ReplicaId> = BTreeSet::new();
    let mut told: BTreeSet<(ReplicaId, String)> = BTreeSet::new();
    loop {
        let (view, confirmed) = {
            let shown = shown.borrow_and_update();
            (shown.view.clone(), shown.confirmed)
        };
        let mut failed = false;
        for placed in assignments(&view, node) {
            if placed.wish != (ReplicaWish::Keep { created: true }) || open.contains(&placed.replica) {
                continue;
            }
            match plane.open_replica(spec(&placed), confirmed).await {
                Ok(()) => {
                    open.insert(placed.replica);
                }
                Err(error) => {
                    failed = true;
                    let reason = error.to_string();
                    if told.insert((placed.replica, reason)) {
                        let (volume, replica) = (&placed.volume_name, placed.replica);
                        tracing::error!(%volume, %replica, %error, "replica can't be opened");
                    }
                }
            }
        }
        let again = async {
            if failed {
                tokio::time::sleep(RETRY).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            changed = shown.changed() => if changed.is_err() {
                return;
            },
            () = again => {}
        }
    }
}
