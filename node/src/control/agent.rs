//! What a storage node wants of the control plane: it makes its addresses and pools known, creates the replicas
//! that were placed on it, and deletes those whose volume is a tombstone. Nothing else is ever deleted.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use proto::cluster::{ClusterView, Pool, VolumeState};
use proto::id::{ClusterId, MirrorId, NodeId, ReplicaId, VolumeId};
use tokio::sync::watch;

use super::config::NodeConfig;
use crate::metadata::Command;
use crate::raft::driver::{ControlHandle, Shown};

/// How often pools are measured, and what failed is tried again.
const INTERVAL: Duration = Duration::from_secs(5);
/// Free space is reported when it has changed by one part in so many of the capacity.
const FREE_STEPS: u64 = 50;

/// A future of a [`ReplicaHost`].
pub type HostFuture<T> = Pin<Box<dyn Future<Output = Result<T, String>> + Send>>;

/// What should become of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaWish {
    /// It is to be there. `created`: it has been, and is never made anew if it is missing.
    Keep {
        /// The node has said that it is ready.
        created: bool,
    },
    /// There is a tombstone: it is to go.
    Delete,
}

/// A replica that was placed on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaAssignment {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its volume.
    pub volume: VolumeId,
    /// Its volume's name.
    pub volume_name: String,
    /// Its mirror.
    pub mirror: MirrorId,
    /// The mirror's place in the stripe.
    pub mirror_index: u32,
    /// Itself.
    pub replica: ReplicaId,
    /// Its pool on this node.
    pub pool: String,
    /// Bytes.
    pub size: u64,
    /// What should become of it.
    pub wish: ReplicaWish,
}

/// A pool as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolUsage {
    /// Its name in the configuration.
    pub name: String,
    /// `file`, later `lvm`.
    pub kind: String,
    /// Directory or volume group.
    pub path: String,
    /// Bytes that replicas may take together.
    pub capacity: u64,
    /// Bytes free on the medium.
    pub free: u64,
}

/// Whoever keeps the replicas of this node. All calls come from one task, one after the other.
pub trait ReplicaHost: Send + Sync + 'static {
    /// Creates this replica, empty; returns once that is durable. Repeated after a crash: what was begun is begun
    /// anew, what is there already is left as it is.
    fn create(&self, assignment: ReplicaAssignment) -> HostFuture<()>;
    /// Deletes this replica; returns once that is durable. Repeated: what is gone is gone.
    fn delete(&self, assignment: ReplicaAssignment) -> HostFuture<()>;
    /// The pools as they are.
    fn usage(&self) -> HostFuture<Vec<PoolUsage>>;
}

/// The replicas placed on `node`.
pub fn assignments(view: &ClusterView, node: NodeId) -> Vec<ReplicaAssignment> {
    let mut found = Vec::new();
    for volume in &view.volumes {
        for (index, mirror) in (0..).zip(&volume.mirrors) {
            for replica in mirror.replicas.iter().filter(|replica| replica.node == node) {
                let wish = match volume.state {
                    VolumeState::Deleting => ReplicaWish::Delete,
                    _ => ReplicaWish::Keep { created: replica.ready },
                };
                found.push(ReplicaAssignment {
                    cluster: view.id,
                    volume: volume.id,
                    volume_name: volume.name.clone(),
                    mirror: mirror.id,
                    mirror_index: index,
                    replica: replica.id,
                    pool: replica.pool.clone(),
                    size: mirror.size,
                    wish,
                });
            }
        }
    }
    found
}

/// The task that does all this.
pub struct NodeAgent {
    config: Arc<NodeConfig>,
    handle: ControlHandle,
    host: Option<Arc<dyn ReplicaHost>>,
    /// What could not be done, to be logged once.
    failures: BTreeMap<ReplicaId, String>,
}

impl NodeAgent {
    /// An agent of this member; a witness has no host.
    pub fn new(config: Arc<NodeConfig>, handle: ControlHandle, host: Option<Arc<dyn ReplicaHost>>) -> Self {
        Self { config, handle, host, failures: BTreeMap::new() }
    }

    /// Runs until dropped. Dropping it between two steps loses nothing: it begins anew from the metadata.
    pub async fn run(mut self) {
        let mut shown = self.handle.shown();
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut measure = true;
        loop {
            self.once(&mut shown, measure).await;
            measure = tokio::select! {
                changed = shown.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return,
                },
                _ = interval.tick() => true,
            };
        }
    }

    async fn once(&mut self, shown: &mut watch::Receiver<Shown>, measure: bool) {
        let (mut view, confirmed) = {
            let shown = shown.borrow_and_update();
            (shown.view.clone(), shown.confirmed)
        };
        if view.member(self.config.id).is_none() {
            return;
        }
        self.addresses(&view, !confirmed && self.host.is_some()).await;
        let Some(host) = self.host.clone() else { return };
        if !confirmed {
            match shown.wait_for(|shown| shown.confirmed).await {
                Ok(shown) => view = shown.view.clone(),
                Err(_) => return,
            }
        }
        let unknown = !view.pools.iter().any(|pool| pool.node == self.config.id);
        if measure || unknown {
            self.pools(&view, &*host).await;
        }
        for assignment in assignments(&view, self.config.id) {
            self.replica(&view, assignment, &*host, measure).await;
        }
    }

    /// Proposes a change of address where the configuration says another than the metadata. A port 0 was only
    /// ever given to be replaced: the definition knows the real one.
    ///
    /// With `confirm` it proposes them in any case. Once that is applied here the metadata are as new as this
    /// process: before, the log's snapshot may say that a replica is to be created which has been created, lost and
    /// replaced, or deleted, since.
    async fn addresses(&self, view: &ClusterView, confirm: bool) {
        let Some(member) = view.member(self.config.id) else { return };
        let listens = |known: &str, addr: std::net::SocketAddr| match addr.port() == 0 || addr.ip().is_unspecified() {
            true => known.to_owned(),
            false => addr.to_string(),
        };
        let control_addr = listens(&member.control_addr, self.config.control_listen);
        let data_addr = match self.config.data_listen {
            Some(addr) => listens(&member.data_addr, addr),
            None => String::new(),
        };
        if confirm || control_addr != member.control_addr || data_addr != member.data_addr {
            let command = Command::UpdateMember { node: self.config.id, control_addr, data_addr };
            self.carry_out(command).await;
        }
    }

    async fn pools(&self, view: &ClusterView, host: &dyn ReplicaHost) {
        let usage = match host.usage().await {
            Ok(usage) => usage,
            Err(why) => return tracing::warn!(node = %self.config.name, %why, "pools cannot be measured"),
        };
        let mut pools: Vec<Pool> = usage
            .into_iter()
            .map(|pool| Pool {
                node: self.config.id,
                name: pool.name,
                kind: pool.kind,
                path: pool.path,
                capacity: pool.capacity,
                free: pool.free,
            })
            .collect();
        pools.sort_by(|a, b| a.name.cmp(&b.name));
        let known: Vec<&Pool> = view.pools.iter().filter(|pool| pool.node == self.config.id).collect();
        let same = |a: &Pool, b: &Pool| {
            let step = (a.capacity / FREE_STEPS).max(1);
            Pool { free: 0, ..a.clone() } == Pool { free: 0, ..b.clone() } && a.free.abs_diff(b.free) < step
        };
        let unchanged = known.len() == pools.len() && known.iter().zip(&pools).all(|(a, b)| same(a, b));
        if !unchanged {
            self.carry_out(Command::ReportPools { node: self.config.id, pools }).await;
        }
    }

    async fn replica(
        &mut self,
        view: &ClusterView,
        assignment: ReplicaAssignment,
        host: &dyn ReplicaHost,
        again: bool,
    ) {
        let (node, replica) = (self.config.id, assignment.replica);
        if self.failures.contains_key(&replica) && !again {
            return;
        }
        let volume = assignment.volume_name.clone();
        let (tried, done) = match assignment.wish {
            ReplicaWish::Keep { created: true } => return,
            ReplicaWish::Keep { created: false } => {
                (host.create(assignment).await, Command::ReplicaReady { node, replica })
            }
            ReplicaWish::Delete => (host.delete(assignment).await, Command::ReplicaDeleted { node, replica }),
        };
        let reason = match tried {
            Ok(()) => {
                self.failures.remove(&replica);
                return self.carry_out(done).await;
            }
            Err(reason) => reason,
        };
        if self.failures.insert(replica, reason.clone()).as_ref() != Some(&reason) {
            tracing::warn!(node = %self.config.name, %volume, %replica, %reason, "replica cannot be made or deleted");
        }
        let known = view.volumes.iter().flat_map(|volume| &volume.mirrors).flat_map(|mirror| &mirror.replicas);
        let told = known.filter(|known| known.id == replica).any(|known| known.failure.as_ref() == Some(&reason));
        if !told && matches!(done, Command::ReplicaReady { .. }) {
            self.carry_out(Command::ReplicaFailed { node, replica, reason }).await;
        }
    }

    async fn carry_out(&self, command: Command) {
        if let Err(refusal) = self.handle.carry_out(command.clone()).await {
            // The volume may have gone meanwhile: the next view tells.
            tracing::debug!(node = %self.config.name, ?command, %refusal, "refused");
        }
    }
}
