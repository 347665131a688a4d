//! What the cluster says of itself, asked again and again.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cli::config::Cluster;
use cli::status::{self, Owner};
use proto::cluster::{ClusterStatus, ReplicaCondition, VolumeInfo};

use super::lab::{Kind, Lab, Place};

/// Between two questions.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// An answer.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When it was asked for; it is no older than this.
    pub asked: Instant,
    pub leader: Option<Place>,
    /// The gateway on which the volume is exported.
    pub serving: Option<Place>,
    /// Nodes whose replicas are in sync, all of them, in the metadata and by the owner's word.
    pub in_sync: BTreeSet<Place>,
    /// The volume's session.
    pub epoch: u64,
    /// The gateway whose session it is.
    pub owner: Option<String>,
    /// What mirrors wait for.
    pub waits: Vec<String>,
    /// Replicas that are not in sync, for a failure's text.
    pub table: String,
}

/// Names and places, which do not change.
struct Names {
    /// By the members' names.
    places: Vec<(String, Place)>,
    nodes: Vec<Place>,
    volume: String,
}

/// Asks in the background.
pub struct Watch {
    last: Arc<Mutex<Option<Seen>>>,
    sessions: Arc<Mutex<Vec<(u64, String)>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Begins to ask about a volume.
    pub fn start(cluster: Cluster, lab: &Lab, volume: &str) -> Self {
        let places = (0..lab.members.len()).map(|place| (lab.name(place).to_owned(), place)).collect();
        let names = Names { places, nodes: lab.of(Kind::Node), volume: volume.to_owned() };
        let last: Arc<Mutex<Option<Seen>>> = Arc::default();
        let sessions: Arc<Mutex<Vec<(u64, String)>>> = Arc::default();
        let (last_of_task, sessions_of_task) = (last.clone(), sessions.clone());
        let task = tokio::spawn(async move {
            loop {
                let asked = Instant::now();
                if let Ok(status) = cluster.status(false).await
                    && let Some(volume) = status.view.volume_named(&names.volume)
                {
                    let seen = names.seen(asked, &status, volume);
                    let mut sessions = sessions_of_task.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(owner) = &seen.owner
                        && sessions.last().is_none_or(|(epoch, _)| *epoch != seen.epoch)
                    {
                        sessions.push((seen.epoch, owner.clone()));
                    }
                    *last_of_task.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
                }
                tokio::time::sleep(ASK_EVERY).await;
            }
        });
        Self { last, sessions, task }
    }

    /// The last answer.
    pub fn last(&self) -> Option<Seen> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The sessions seen, and whose each was.
    pub fn sessions(&self) -> Vec<(u64, String)> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Names {
    fn place(&self, name: &str) -> Option<Place> {
        self.places.iter().find(|(known, _)| known == name).map(|(_, place)| *place)
    }

    fn seen(&self, asked: Instant, status: &ClusterStatus, volume: &VolumeInfo) -> Seen {
        let name_of = |node| status.view.members.iter().find(|member| member.id == node).map(|m| m.name.as_str());
        let place_of = |node| name_of(node).and_then(|name| self.place(name));
        let mut in_sync: BTreeSet<Place> = self.nodes.iter().copied().collect();
        let mut waits = Vec::new();
        let reports = match status::owner(status, volume) {
            Owner::Heard(session) => session.report.mirrors.as_slice(),
            _ => &[],
        };
        for mirror in &volume.mirrors {
            let report = reports.iter().find(|report| report.mirror == mirror.id);
            waits.extend(report.and_then(|report| report.waiting.clone()));
            for replica in &mirror.replicas {
                let committed = mirror.in_sync.members.contains(&replica.id);
                let said = report.and_then(|report| report.replicas.iter().find(|r| r.replica == replica.id));
                let said = said.is_some_and(|said| said.condition == ReplicaCondition::InSync);
                if let Some(place) = place_of(replica.node).filter(|_| !committed || !said) {
                    in_sync.remove(&place);
                }
            }
        }
        Seen {
            asked,
            leader: status.leader.and_then(place_of),
            serving: volume.export.as_deref().and_then(|name| self.place(name)),
            in_sync,
            epoch: volume.session.epoch.0,
            owner: volume.session.owner().map(str::to_owned),
            waits,
            table: status::mirror_table(status, volume),
        }
    }
}

impl Seen {
    /// Whether every node is in sync and nothing waits.
    pub fn is_well(&self, nodes: usize) -> bool {
        self.in_sync.len() == nodes && self.waits.is_empty()
    }
}
