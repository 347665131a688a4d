//! A daemon's configuration file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use proto::cluster::{ClusterDefinition, Role};
use proto::convert::check_name;
use proto::id::NodeId;
use serde::{Deserialize, Serialize};

/// `node.toml`. See the crate's `control` module for an example.
///
/// ```
/// let text = r#"
///     id = 1
///     name = "node-1"
///     role = "node"                       # or "witness": no data_listen, no pools
///     dir = "/var/lib/md99/node-1"        # raft log, identity; locked while the daemon runs
///     control_listen = "127.0.0.1:7400"
///     data_listen = "127.0.0.1:7401"
///     insecure = false                    # true: may listen elsewhere than on loopback
///
///     [[pools]]
///     name = "pool-1"
///     path = "/srv/md99/pool-1"
///     capacity = 107374182400             # bytes; without it: what the file system has
///
///     [cluster]                           # optional: without it the daemon waits for `cluster init`
///     id = "1f0e8e9c-6a52-4bb8-9a4e-3f3f1a0f7a11"
///     name = "demo"
///     [[cluster.members]]
///     id = 1
///     name = "node-1"
///     role = "node"
///     control_addr = "127.0.0.1:7400"
///     data_addr = "127.0.0.1:7401"
/// "#;
/// let config = node::control::NodeConfig::parse(text).unwrap();
/// assert_eq!(config.pools[0].name, "pool-1");
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The member's id, from 1, as in the cluster's definition.
    pub id: NodeId,
    /// The member's name, as in the cluster's definition.
    pub name: String,
    /// Storage node or witness.
    pub role: Role,
    /// Where the raft log and the member's identity are kept.
    pub dir: PathBuf,
    /// Where gRPC is served.
    pub control_listen: SocketAddr,
    /// Where the replica protocol is served; storage nodes only.
    pub data_listen: Option<SocketAddr>,
    /// Allows listening elsewhere than on loopback, without transport security.
    #[serde(default)]
    pub insecure: bool,
    /// Where replicas are kept; storage nodes only.
    #[serde(default)]
    pub pools: Vec<PoolConfig>,
    /// The cluster, where `cluster init` is not used.
    pub cluster: Option<ClusterDefinition>,
}

/// One pool of a storage node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Unique on this node.
    pub name: String,
    /// A directory.
    pub path: PathBuf,
    /// Bytes that replicas may take together; `None`: what the file system has.
    pub capacity: Option<u64>,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has keys that are not known.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// It makes no sense.
    #[error("configuration of {name}: {why}")]
    Senseless {
        /// The member.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// It would listen where anybody can reach it.
    #[error(
        "{name} would listen on {addr}, which is not a loopback address, and there is no transport security yet: \
         set insecure = true if the network is trusted"
    )]
    NotLoopback {
        /// The member.
        name: String,
        /// The address.
        addr: SocketAddr,
    },
}

impl NodeConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse_file(&text, path)
    }

    /// Reads and checks a text.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::parse_file(text, Path::new("configuration"))
    }

    fn parse_file(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what a parser does not.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let senseless = |why: String| Err(ConfigError::Senseless { name: self.name.clone(), why });
        if let Err(bad) = check_name("name", &self.name) {
            return senseless(bad.to_string());
        }
        if self.id.0 == 0 {
            return senseless("id is 0, ids begin with 1".into());
        }
        let storage = self.role == Role::Node;
        if storage != self.data_listen.is_some() {
            return senseless("a node needs data_listen, a witness must not have it".into());
        }
        if !storage && !self.pools.is_empty() {
            return senseless("a witness has no pools".into());
        }
        for (at, pool) in self.pools.iter().enumerate() {
            if let Err(bad) = check_name("pool name", &pool.name) {
                return senseless(bad.to_string());
            }
            if self.pools[..at].iter().any(|other| other.name == pool.name) {
                return senseless(format!("two pools are named {}", pool.name));
            }
        }
        for addr in [Some(self.control_listen), self.data_listen].into_iter().flatten() {
            if !addr.ip().is_loopback() && !self.insecure {
                return Err(ConfigError::NotLoopback { name: self.name.clone(), addr });
            }
        }
        match &self.cluster {
            Some(definition) => self.fits(definition).or_else(senseless),
            None => Ok(()),
        }
    }

    /// Whether this member is one of the cluster's, and the cluster is one.
    ///
    /// # Errors
    /// What does not fit.
    pub fn fits(&self, definition: &ClusterDefinition) -> Result<(), String> {
        let members = &definition.members;
        for (at, member) in members.iter().enumerate() {
            check_name("member name", &member.name).map_err(|bad| bad.to_string())?;
            if member.id.0 == 0 || members[..at].iter().any(|o| o.id == member.id || o.name == member.name) {
                return Err(format!("member {} ({}) is in the cluster twice, or has id 0", member.id, member.name));
            }
        }
        if members.is_empty() || members.len() > MAX_VOTERS {
            return Err(format!("a cluster of {} voters, from 1 to {MAX_VOTERS} are allowed", members.len()));
        }
        match members.iter().find(|member| member.id == self.id) {
            Some(own) if own.name == self.name && own.role == self.role => Ok(()),
            Some(own) => Err(format!(
                "member {} of cluster {} is {} {}, this is {} {}",
                self.id, definition.id, own.role, own.name, self.role, self.name
            )),
            None => Err(format!("cluster {} has no member {}", definition.id, self.id)),
        }
    }
}

/// Voters of a cluster (DESIGN §4).
pub const MAX_VOTERS: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        id = 1
        name = "node-1"
        role = "node"
        dir = "/tmp/x"
        control_listen = "127.0.0.1:1"
        data_listen = "127.0.0.1:2"
    "#;

    #[test]
    fn what_makes_no_sense_is_refused_and_named() {
        NodeConfig::parse(GOOD).unwrap();
        for (from, to, says) in [
            ("id = 1", "id = 0", "id is 0"),
            ("role = \"node\"", "role = \"witness\"", "must not have it"),
            ("role = \"node\"", "role = \"king\"", "king"),
            ("127.0.0.1:1", "0.0.0.0:7400", "0.0.0.0:7400"),
            ("id = 1", "id = 1\nspeed = 9", "speed"),
            ("\"node-1\"", "\"../node\"", "../node"),
        ] {
            let error = NodeConfig::parse(&GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let trusted = GOOD.replace("127.0.0.1:1", "0.0.0.0:1").replace("id = 1", "id = 1\ninsecure = true");
        NodeConfig::parse(&trusted).unwrap();
    }
}
