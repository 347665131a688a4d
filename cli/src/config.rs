//! The small file by which every command finds its cluster.

use std::path::{Path, PathBuf};
use std::time::Duration;

use client::control::{ControlClient, ControlConfig};
use proto::cluster::ClusterStatus;
use proto::id::ClusterId;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};

/// Where it is looked for without `--config` and `MD99_CONFIG`.
pub const DEFAULT_PATH: &str = "/etc/md99/cluster.toml";

/// `cluster.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// The cluster's name, for people.
    pub name: String,
    /// The cluster's id: a member of another one is not obeyed.
    pub id: ClusterId,
    /// `host:port` of members' control services; one that is up is enough.
    pub members: Vec<String>,
}

impl ClusterConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it is not there, not TOML, or names no member.
    pub fn load(path: &Path) -> Outcome<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let failure = Failure::path(path, "cannot read the cluster's configuration", error);
            match missing {
                true => failure.next(
                    "name the file with --config FILE or MD99_CONFIG; `cluster init` and `cluster dev up` write it",
                ),
                false => failure,
            }
        })?;
        let config: Self =
            toml::from_str(&text).map_err(|error| Failure::path(path, "is not a cluster configuration", error))?;
        if config.members.is_empty() {
            return Err(Failure::path(path, "is not a cluster configuration", "it names no member"));
        }
        Ok(config)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// When the file system says no.
    pub fn save(&self, path: &Path) -> Outcome {
        let text = toml::to_string(self).expect("a configuration is plain values");
        write_whole(path, &text)
    }
}

/// Writes a small file so that a reader finds either the old one or the new one.
///
/// # Errors
/// When the file system says no.
pub fn write_whole(path: &Path, text: &str) -> Outcome {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(|error| Failure::path(path, "cannot write", error))
}

/// The cluster that a command works on.
pub struct Cluster {
    /// From where it is known.
    pub path: PathBuf,
    /// What the file says.
    pub config: ClusterConfig,
    /// The way to its members.
    pub control: ControlClient,
}

impl Cluster {
    /// Finds it by `--config`, `MD99_CONFIG`, or the default. Nothing is asked of it yet.
    ///
    /// # Errors
    /// See [`ClusterConfig::load`].
    pub fn find(path: Option<&Path>) -> Outcome<Self> {
        Self::with_patience(path, Duration::from_secs(15))
    }

    /// The same, giving requests up after `patience`.
    ///
    /// # Errors
    /// See [`ClusterConfig::load`].
    pub fn with_patience(path: Option<&Path>, patience: Duration) -> Outcome<Self> {
        let path = path.unwrap_or(Path::new(DEFAULT_PATH)).to_owned();
        let config = ClusterConfig::load(&path)?;
        let control =
            ControlClient::new(ControlConfig { deadline: patience, ..ControlConfig::new(config.members.clone()) });
        Ok(Self { path, config, control })
    }

    /// The cluster's state. Refuses to speak about a cluster that is not the file's.
    ///
    /// # Errors
    /// No answer, or another cluster's.
    pub async fn status(&self, allow_stale: bool) -> Outcome<ClusterStatus> {
        let status = self
            .control
            .status(allow_stale)
            .await
            .map_err(|error| Failure::control(&format!("cluster {}", self.config.name), &error))?;
        if status.view.id != self.config.id {
            return Err(Failure::new(format!(
                "{}: is for cluster {}, but the members that it names belong to cluster {} ({})",
                self.path.display(),
                self.config.id,
                status.view.id,
                status.view.name
            ))
            .next("correct the file, or name another one with --config"));
        }
        Ok(status)
    }
}
