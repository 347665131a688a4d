//! What a dev directory holds.
//!
//! ```text
//! DIR/dev.toml            what runs here, and where it listens
//!     dev.lock            held by the `cluster dev` command that is at work
//!     cluster.toml        for MD99_CONFIG
//!     node-1/node.toml    its configuration, and beside it:
//!            log          what it said
//!            pid          its process, while it runs
//!            state/       raft log, identity
//!            pools/       pool-1.. with the replicas
//!     witness-1/...
//!     gateway-1/gateway.toml, log, pid
//! ```

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use client::gateway::GatewayConfig;
use node::control::NodeConfig;
use node::control::config::PoolConfig;
use proto::cluster::{ClusterDefinition, Member, Role};
use proto::id::{ClusterId, NodeId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::process::Identity;
use super::{ports, process};
use crate::config::{ClusterConfig, write_whole};
use crate::failure::{Failure, Outcome};

const FILE: &str = "dev.toml";
const LOCK: &str = "dev.lock";
/// How long another `cluster dev` command is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that a pool has at least.
const MIN_POOL: u64 = 1 << 20;

/// What kind of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Storage node.
    Node,
    /// Witness.
    Witness,
    /// Gateway.
    Gateway,
}

impl Kind {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Witness => "witness",
            Self::Gateway => "gateway",
        }
    }
    /// The subcommand that runs it.
    fn role(self) -> &'static str {
        if self == Self::Gateway { "gateway" } else { "node" }
    }
}

/// One process of a dev cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// `node-1`, `witness-1`, `gateway-1`, ...
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its gRPC services.
    pub control: SocketAddr,
    /// The replica server of a node, the portal of a gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<SocketAddr>,
}

/// What `dev.toml` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Plan {
    cluster: ClusterId,
    name: String,
    pools: u32,
    pool_size: u64,
    parts: Vec<Part>,
}

/// How large a new dev cluster is, and where it listens.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Storage nodes.
    pub nodes: u32,
    /// Witnesses.
    pub witnesses: u32,
    /// Gateways.
    pub gateways: u32,
    /// Pools of each node.
    pub pools: u32,
    /// Bytes of each pool; `None`: its share of what the file system has free.
    pub pool_size: Option<u64>,
    /// The first of the ports; 0: any free ones.
    pub base_port: u16,
    /// The first gateway's portal; port 0: any free one.
    pub portal: SocketAddr,
}

/// A dev directory, locked while this value lives.
pub struct Dev {
    dir: PathBuf,
    plan: Plan,
    _lock: File,
}

impl Dev {
    /// The cluster in this directory.
    ///
    /// # Errors
    /// When it is none, or another command holds it for too long.
    pub fn open(dir: &Path) -> Outcome<Self> {
        let dir = dir.canonicalize().map_err(|error| no_cluster(dir, &error.to_string()))?;
        let file = dir.join(FILE);
        if !file.exists() {
            return Err(no_cluster(&dir, "it has no dev.toml"));
        }
        let lock = lock(&dir)?;
        let text = std::fs::read_to_string(&file).map_err(|error| Failure::path(&file, "cannot read", error))?;
        let plan: Plan = toml::from_str(&text).map_err(|error| Failure::path(&file, "is damaged", error))?;
        Ok(Self { dir, plan, _lock: lock })
    }

    /// Whether there is a dev cluster in this directory.
    ///
    /// # Errors
    /// When the directory holds something else.
    pub fn exists(dir: &Path) -> Outcome<bool> {
        if dir.join(FILE).exists() {
            return Ok(true);
        }
        if let Ok(other) = ClusterConfig::load(&dir.join("cluster.toml")) {
            return Err(Failure::new(format!(
                "{} belongs to another cluster, {} ({}), which `cluster dev` did not make",
                dir.display(),
                other.name,
                other.id
            ))
            .next("give another directory with --dir"));
        }
        match std::fs::read_dir(dir) {
            Ok(mut entries) => {
                let stranger = entries.find_map(|entry| entry.ok()).filter(|entry| entry.file_name() != LOCK);
                match stranger {
                    Some(entry) => Err(Failure::new(format!(
                        "{} is not a dev directory and not empty: it holds {}",
                        dir.display(),
                        entry.file_name().to_string_lossy()
                    ))
                    .next("give a new or empty directory with --dir")),
                    None => Ok(false),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Failure::path(dir, "cannot look into it", error)),
        }
    }

    /// Lays a new cluster out. Nothing is started.
    ///
    /// # Errors
    /// A port in use, or a file system that says no.
    pub fn create(dir: &Path, shape: &Shape) -> Outcome<Self> {
        let parts = place(shape)?;
        std::fs::create_dir_all(dir).map_err(|error| Failure::path(dir, "cannot create it", error))?;
        let dir = dir.canonicalize().map_err(|error| Failure::path(dir, "cannot find it", error))?;
        let lock = lock(&dir)?;
        if dir.join(FILE).exists() {
            return Err(Failure::new(format!("{}: another command has just made a cluster there", dir.display())));
        }
        let pool_size = match shape.pool_size {
            Some(size) => size,
            None => share_of_free(&dir, shape.nodes * shape.pools)?,
        };
        let name = dir.file_name().map_or("dev".into(), |name| name.to_string_lossy().into_owned());
        let name: String =
            name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).take(40).collect();
        let name = if name.starts_with(|c: char| c.is_ascii_alphanumeric()) { name } else { format!("dev{name}") };
        let plan = Plan { cluster: ClusterId(Uuid::new_v4()), name, pools: shape.pools, pool_size, parts };
        let dev = Self { dir, plan, _lock: lock };
        for part in dev.parts() {
            dev.write_config(part)?;
        }
        dev.cluster_config().save(&dev.config_path())?;
        // Last: with it the directory is a dev cluster's.
        write_whole(&dev.dir.join(FILE), &toml::to_string(&dev.plan).expect("plain values"))?;
        Ok(dev)
    }

    fn write_config(&self, part: &Part) -> Outcome {
        let home = self.home(part);
        std::fs::create_dir_all(&home).map_err(|error| Failure::path(&home, "cannot create it", error))?;
        let text = match part.kind {
            Kind::Gateway => {
                let config = GatewayConfig {
                    name: part.name.clone(),
                    members: self.cluster_config().members,
                    listen: part.control.to_string(),
                    portal: part.data.expect("a gateway has a portal").to_string(),
                    threads: None,
                    insecure: false,
                };
                toml::to_string(&config)
            }
            Kind::Node | Kind::Witness => toml::to_string(&self.node_config(part)?),
        };
        write_whole(&self.config_file(part), &text.expect("plain values"))
    }

    fn node_config(&self, part: &Part) -> Outcome<NodeConfig> {
        let home = self.home(part);
        let member = self.definition().members.into_iter().find(|member| member.name == part.name);
        let mut pools = Vec::new();
        for number in 1..=if part.kind == Kind::Node { self.plan.pools } else { 0 } {
            let name = format!("pool-{number}");
            let path = home.join("pools").join(&name);
            std::fs::create_dir_all(&path).map_err(|error| Failure::path(&path, "cannot create it", error))?;
            pools.push(PoolConfig { name, path, capacity: Some(self.plan.pool_size) });
        }
        Ok(NodeConfig {
            id: member.expect("every node and witness is a member").id,
            name: part.name.clone(),
            role: if part.kind == Kind::Node { Role::Node } else { Role::Witness },
            dir: home.join("state"),
            control_listen: part.control,
            data_listen: part.data,
            insecure: false,
            pools,
            cluster: None,
        })
    }

    /// What `init` gives its members.
    pub fn definition(&self) -> ClusterDefinition {
        let members = self.plan.parts.iter().filter(|part| part.kind != Kind::Gateway);
        let members = (1..).zip(members).map(|(id, part)| Member {
            id: NodeId(id),
            name: part.name.clone(),
            role: if part.kind == Kind::Node { Role::Node } else { Role::Witness },
            control_addr: part.control.to_string(),
            data_addr: part.data.map(|addr| addr.to_string()).unwrap_or_default(),
        });
        ClusterDefinition { id: self.plan.cluster, name: self.plan.name.clone(), members: members.collect() }
    }

    /// What `cluster.toml` says.
    pub fn cluster_config(&self) -> ClusterConfig {
        let members = self.definition().members.into_iter().map(|member| member.control_addr).collect();
        ClusterConfig { name: self.plan.name.clone(), id: self.plan.cluster, members }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// `cluster.toml`.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("cluster.toml")
    }
    /// Its processes: nodes, witnesses, gateways.
    pub fn parts(&self) -> &[Part] {
        &self.plan.parts
    }
    /// Pools of each node.
    pub fn pools(&self) -> u32 {
        self.plan.pools
    }
    /// Bytes of each pool.
    pub fn pool_size(&self) -> u64 {
        self.plan.pool_size
    }
    /// Processes of this kind.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &Part> {
        self.plan.parts.iter().filter(move |part| part.kind == kind)
    }
    /// Where this process keeps everything.
    pub fn home(&self, part: &Part) -> PathBuf {
        self.dir.join(&part.name)
    }
    /// Its configuration.
    pub fn config_file(&self, part: &Part) -> PathBuf {
        self.home(part).join(format!("{}.toml", part.kind.role()))
    }
    /// What it said.
    pub fn log_file(&self, part: &Part) -> PathBuf {
        self.home(part).join("log")
    }
    /// Its pid file.
    pub fn pid_file(&self, part: &Part) -> PathBuf {
        self.home(part).join("pid")
    }

    /// The process, if it was started and not seen to end.
    pub fn process(&self, part: &Part) -> Option<Identity> {
        Identity::load(&self.pid_file(part)).filter(|process| process.state() != process::State::Down)
    }

    /// The part of this name.
    ///
    /// # Errors
    /// When there is none, with the names that there are.
    pub fn part(&self, name: &str) -> Outcome<&Part> {
        self.plan.parts.iter().find(|part| part.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.plan.parts.iter().map(|part| part.name.as_str()).collect();
            Failure::new(format!("{} has no {name}", self.dir.display()))
                .next(format!("name one of {}", names.join(", ")))
        })
    }

    /// Starts a part that does not run. Its ports must be free.
    ///
    /// # Errors
    /// A port in use, or a process that cannot be started.
    pub fn start(&self, part: &Part) -> Outcome<Identity> {
        for (addr, purpose) in addresses(part) {
            ports::check_free(addr, &purpose)?;
        }
        process::start(&process::Start {
            role: part.kind.role(),
            config: &self.config_file(part),
            log: &self.log_file(part),
            pid_file: &self.pid_file(part),
        })
    }

    /// The last lines that a part said, for a failure's text.
    pub fn log_tail(&self, part: &Part) -> String {
        let text = std::fs::read(self.log_file(part)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].iter().map(|line| format!("\n    {line}")).collect()
    }
}

/// The addresses of a part, and what each is for.
pub fn addresses(part: &Part) -> Vec<(SocketAddr, String)> {
    let data = if part.kind == Kind::Gateway { "the portal" } else { "the data plane" };
    let mut all = vec![(part.control, format!("the control service of {}", part.name))];
    all.extend(part.data.map(|addr| (addr, format!("{data} of {}", part.name))));
    all
}

fn no_cluster(dir: &Path, why: &str) -> Failure {
    Failure::new(format!("{} is not a dev directory: {why}", dir.display()))
        .next(format!("`cluster dev up --dir {}` makes one", dir.display()))
}

fn lock(dir: &Path) -> Outcome<File> {
    let path = dir.join(LOCK);
    let failed = |error: std::io::Error| Failure::path(&path, "cannot lock", error);
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Failure::new(format!("another `cluster dev` command is at work in {}", dir.display())));
            }
            Err(error) => return Err(failed(error.into())),
        }
    }
}

fn share_of_free(dir: &Path, pools: u32) -> Outcome<u64> {
    let stat = rustix::fs::statvfs(dir).map_err(|error| Failure::path(dir, "cannot see its free space", error))?;
    let share = stat.f_bavail * stat.f_frsize / u64::from(pools.max(1));
    Ok((share >> 20 << 20).max(MIN_POOL))
}

/// Names and addresses of everything, checked to be free.
fn place(shape: &Shape) -> Outcome<Vec<Part>> {
    let (nodes, witnesses, gateways) = (shape.nodes as u16, shape.witnesses as u16, shape.gateways as u16);
    let portals = if shape.portal.port() == 0 { gateways } else { 0 };
    let count = nodes * 2 + witnesses + gateways + portals;
    let base = match shape.base_port {
        0 => ports::free_run(count)?,
        base => base,
    };
    let mut next = base;
    let mut port = || {
        let port = next;
        next = next.checked_add(1).ok_or_else(|| {
            Failure::usage(format!("--base-port {base}: {count} ports from there do not exist"))
                .next("choose a lower one")
        })?;
        Ok::<_, Failure>(SocketAddr::from(([127, 0, 0, 1], port)))
    };
    let mut parts = Vec::new();
    for number in 1..=nodes {
        parts.push(Part { name: format!("node-{number}"), kind: Kind::Node, control: port()?, data: Some(port()?) });
    }
    for number in 1..=witnesses {
        parts.push(Part { name: format!("witness-{number}"), kind: Kind::Witness, control: port()?, data: None });
    }
    for number in 1..=gateways {
        let control = port()?;
        let portal = match shape.portal.port() {
            0 => SocketAddr::new(shape.portal.ip(), port()?.port()),
            first => {
                let port = first.checked_add(number - 1).ok_or_else(|| {
                    Failure::usage(format!("--portal {}: no port is left for gateway-{number}", shape.portal))
                })?;
                SocketAddr::new(shape.portal.ip(), port)
            }
        };
        parts.push(Part { name: format!("gateway-{number}"), kind: Kind::Gateway, control, data: Some(portal) });
    }
    let mut seen: Vec<(SocketAddr, String)> = Vec::new();
    for (addr, purpose) in parts.iter().flat_map(addresses) {
        if let Some((_, other)) = seen.iter().find(|(known, _)| *known == addr) {
            return Err(Failure::usage(format!("{addr} would be used for {other} and for {purpose}"))
                .next("choose other ports with --base-port and --portal"));
        }
        ports::check_free(addr, &purpose)?;
        seen.push((addr, purpose));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            nodes: 3,
            witnesses: 2,
            gateways: 1,
            pools: 5,
            pool_size: Some(1 << 30),
            base_port: 0,
            portal: "127.0.0.1:0".parse().unwrap(),
        }
    }

    #[test]
    fn a_dev_directory_is_read_as_it_was_made() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Dev::exists(dir.path()).unwrap());
        let dev = Dev::create(dir.path(), &shape()).unwrap();
        let (definition, parts) = (dev.definition(), dev.parts().to_vec());
        assert_eq!(parts.len(), 6);
        for part in &parts[..5] {
            let config = NodeConfig::load(&dev.config_file(part)).unwrap();
            config.fits(&definition).unwrap();
        }
        drop(dev);
        assert!(Dev::exists(dir.path()).unwrap());
        let dev = Dev::open(dir.path()).unwrap();
        assert_eq!((dev.definition(), dev.parts().to_vec()), (definition, parts));
        assert_eq!(ClusterConfig::load(&dev.config_path()).unwrap(), dev.cluster_config());
        let text = dev.part("node-9").unwrap_err().to_string();
        assert!(text.contains("node-9") && text.contains("witness-2"), "{text}");
    }

    #[test]
    fn a_directory_of_something_else_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("letter.txt"), "").unwrap();
        let text = Dev::exists(dir.path()).unwrap_err().to_string();
        assert!(text.contains("letter.txt"), "{text}");
        let other = ClusterConfig { name: "prod".into(), id: ClusterId(Uuid::new_v4()), members: vec!["a:1".into()] };
        other.save(&dir.path().join("cluster.toml")).unwrap();
        let text = Dev::exists(dir.path()).unwrap_err().to_string();
        assert!(text.contains("prod"), "{text}");
    }

    #[test]
    fn a_portal_among_the_other_ports_is_refused() {
        let base = ports::free_run(20).unwrap();
        let clash = Shape { base_port: base, portal: SocketAddr::from(([127, 0, 0, 1], base + 1)), ..shape() };
        let text = place(&clash).unwrap_err().to_string();
        assert!(text.contains("node-1") && text.contains("gateway-1"), "{text}");
    }
}
