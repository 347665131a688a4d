//! Members in namespaces: each has a network namespace with one link to a bridge, on which the initiators sit too.
//! Cuts are made where packets arrive, so that each direction can be cut alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cli::config::ClusterConfig;
use client::gateway::GatewayConfig;
use node::control::NodeConfig;
use node::control::config::PoolConfig;
use proto::cluster::{ClusterDefinition, Role};
use proto::id::{ClusterId, NodeId};
use rustix::process::{Pid, Signal};

/// Bytes of a node's disk.
const DISK: u64 = 384 << 20;
/// Pools of a node, all on its disk.
const POOLS: u32 = 3;
/// Bytes that a pool may give to replicas.
const POOL: u64 = 128 << 20;
const CONTROL_PORT: u16 = 7400;
const DATA_PORT: u16 = 7401;
const PORTAL_PORT: u16 = 3260;
/// How long a connection's both ends are answered with resets.
const RESETS_LAST: Duration = Duration::from_millis(150);
/// Between two looks whether a full disk is still full.
const FILL_AGAIN: Duration = Duration::from_millis(20);

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Node,
    Witness,
    Gateway,
}

/// One process, and where it lives.
pub struct Member {
    pub name: String,
    pub kind: Kind,
    pub addr: Ipv4Addr,
    child: Option<Child>,
}

impl Member {
    /// Where its gRPC services are.
    pub fn control(&self) -> SocketAddr {
        (self.addr, CONTROL_PORT).into()
    }
    /// Where a gateway's portal is.
    pub fn portal(&self) -> SocketAddr {
        (self.addr, PORTAL_PORT).into()
    }
}

/// A place on the bridge: a member by its number, or the initiators after all members.
pub type Place = usize;

/// Keeps a disk full.
struct Filler {
    stop: Arc<AtomicBool>,
    task: std::thread::JoinHandle<()>,
}

/// The whole of it.
pub struct Lab {
    dir: PathBuf,
    pub members: Vec<Member>,
    cuts: BTreeMap<(Place, Place), u32>,
    fillers: BTreeMap<Place, Filler>,
    pub definition: ClusterDefinition,
}

fn tool(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}", said.trim());
    Ok(())
}

fn ip(words: &str) -> Result<()> {
    tool(Command::new("ip").args(words.split_whitespace()))
}

fn netns(name: &str) -> String {
    format!("--net=/run/netns/{name}")
}

/// Every namespace drops what comes from some places, and answers what comes from others with resets.
const RULES: &str = "table ip chaos {
    set drops { type ipv4_addr; }
    set resets { type ipv4_addr; }
    chain arriving {
        type filter hook input priority 0; policy accept;
        ip saddr @drops drop
        ip saddr @resets tcp flags & rst == 0 reject with tcp reset
    }
}";

impl Lab {
    /// Names and addresses; nothing is made yet.
    pub fn new(dir: &Path, gateways: usize) -> Self {
        let named = |kind: Kind, word: &str, count: usize, first: u8| -> Vec<Member> {
            let member = |n: usize| Member {
                name: format!("{word}-{}", n + 1),
                kind,
                addr: Ipv4Addr::new(10, 99, 0, first + n as u8),
                child: None,
            };
            (0..count).map(member).collect()
        };
        let mut members = named(Kind::Node, "node", 3, 1);
        members.extend(named(Kind::Witness, "witness", 2, 11));
        members.extend(named(Kind::Gateway, "gateway", gateways, 21));
        let voters = members.iter().filter(|member| member.kind != Kind::Gateway);
        let voters = (1..).zip(voters).map(|(id, member)| proto::cluster::Member {
            id: NodeId(id),
            name: member.name.clone(),
            role: if member.kind == Kind::Node { Role::Node } else { Role::Witness },
            control_addr: member.control().to_string(),
            data_addr: if member.kind == Kind::Node { format!("{}:{DATA_PORT}", member.addr) } else { String::new() },
        });
        let definition =
            ClusterDefinition { id: ClusterId(uuid::Uuid::new_v4()), name: "chaos".into(), members: voters.collect() };
        Self { dir: dir.to_owned(), members, cuts: BTreeMap::new(), fillers: BTreeMap::new(), definition }
    }

    /// Makes the namespaces, links and disks, and writes every configuration. This process must be alone in
    /// namespaces of its own already.
    ///
    /// # Errors
    /// When a tool says no.
    pub fn set_up(dir: &Path, gateways: usize) -> Result<Self> {
        let lab = Self::new(dir, gateways);
        lab.make_network()?;
        for member in &lab.members {
            lab.make_home(member)?;
        }
        lab.cluster_config().save(&lab.config_path()).map_err(|failure| anyhow::anyhow!("{failure}"))?;
        // The members run this very program, also when the file is replaced meanwhile, under the name by which it is
        // the `cluster` command.
        std::os::unix::fs::symlink(format!("/proc/{}/exe", std::process::id()), lab.program())?;
        Ok(lab)
    }

    fn make_network(&self) -> Result<()> {
        // Where ip(8) keeps names of namespaces; the machine's own stay out of sight.
        tool(Command::new("mount").args(["-t", "tmpfs", "run", "/run"]))?;
        ip("link set lo up")?;
        ip("link add bridge type bridge")?;
        ip(&format!("addr add {}/24 dev bridge", self.addr(self.initiators())))?;
        ip("link set bridge up")?;
        for (number, member) in self.members.iter().enumerate() {
            let name = &member.name;
            ip(&format!("netns add {name}"))?;
            ip(&format!("link add link{number} type veth peer name eth0 netns {name}"))?;
            ip(&format!("link set link{number} master bridge up"))?;
            ip(&format!("-n {name} addr add {}/24 dev eth0", member.addr))?;
            ip(&format!("-n {name} link set eth0 up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        (0..=self.initiators()).try_for_each(|place| self.nft(place, RULES))
    }

    fn make_home(&self, member: &Member) -> Result<()> {
        let home = self.home(member);
        std::fs::create_dir_all(&home)?;
        let text = if member.kind == Kind::Gateway {
            toml::to_string(&GatewayConfig {
                name: member.name.clone(),
                members: self.cluster_config().members,
                listen: member.control().to_string(),
                portal: member.portal().to_string(),
                threads: Some(1),
                insecure: true,
            })?
        } else {
            let storage = member.kind == Kind::Node;
            let disk = home.join("disk");
            if storage {
                std::fs::create_dir_all(&disk)?;
                let size = format!("size={DISK}");
                tool(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "disk"]).arg(&disk))?;
            }
            let pool = |number| PoolConfig {
                name: format!("pool-{number}"),
                path: disk.join(format!("pool-{number}")),
                capacity: Some(POOL),
            };
            let pools: Vec<PoolConfig> = (1..=if storage { POOLS } else { 0 }).map(pool).collect();
            for pool in &pools {
                std::fs::create_dir_all(&pool.path)?;
            }
            let id = self.definition.members.iter().find(|m| m.name == member.name).context("a voter")?.id;
            toml::to_string(&NodeConfig {
                id,
                name: member.name.clone(),
                role: if storage { Role::Node } else { Role::Witness },
                dir: home.join("state"),
                control_listen: member.control(),
                data_listen: storage.then(|| (member.addr, DATA_PORT).into()),
                insecure: true,
                pools,
                cluster: None,
            })?
        };
        std::fs::write(self.config_file(member), text)?;
        Ok(())
    }

    fn home(&self, member: &Member) -> PathBuf {
        self.dir.join(&member.name)
    }
    fn config_file(&self, member: &Member) -> PathBuf {
        self.home(member).join("config.toml")
    }
    fn program(&self) -> PathBuf {
        self.dir.join("cluster")
    }
    /// `cluster.toml`.
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("cluster.toml")
    }
    fn cluster_config(&self) -> ClusterConfig {
        let members = self.definition.members.iter().map(|member| member.control_addr.clone()).collect();
        ClusterConfig { name: self.definition.name.clone(), id: self.definition.id, members }
    }

    /// Where the initiators are.
    pub fn initiators(&self) -> Place {
        self.members.len()
    }
    /// The members of a kind.
    pub fn of(&self, kind: Kind) -> Vec<Place> {
        (0..self.members.len()).filter(|place| self.members[*place].kind == kind).collect()
    }
    /// The member of this name.
    pub fn named(&self, name: &str) -> Option<Place> {
        self.members.iter().position(|member| member.name == name)
    }
    /// A place's name.
    pub fn name(&self, place: Place) -> &str {
        self.members.get(place).map_or("initiators", |member| &member.name)
    }
    fn addr(&self, place: Place) -> Ipv4Addr {
        self.members.get(place).map_or(Ipv4Addr::new(10, 99, 0, 254), |member| member.addr)
    }

    fn nft(&self, place: Place, script: &str) -> Result<()> {
        let mut command = match self.members.get(place) {
            Some(member) => {
                let mut command = Command::new("nsenter");
                command.arg(netns(&member.name)).arg("nft");
                command
            }
            None => Command::new("nft"),
        };
        tool(command.arg(script))
    }

    /// Starts a member that is down.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, place: Place) -> Result<()> {
        let member = &self.members[place];
        ensure!(member.child.is_none(), "{} runs", member.name);
        let log = File::options().create(true).append(true).open(self.log_file(place))?;
        let role = if member.kind == Kind::Gateway { "gateway" } else { "node" };
        let child = Command::new("nsenter")
            .arg(netns(&member.name))
            .arg(self.program())
            .arg(role)
            .arg("--config")
            .arg(self.config_file(member))
            .env_remove("MD99_CONFIG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.members[place].child = Some(child);
        Ok(())
    }

    /// SIGKILL; the process is gone when this returns.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self, place: Place) -> Result<()> {
        let Some(mut child) = self.members[place].child.take() else { bail!("{} is down", self.name(place)) };
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGSTOP or SIGCONT.
    ///
    /// # Errors
    /// When it does not run.
    pub fn stop(&mut self, place: Place, stop: bool) -> Result<()> {
        let member = &self.members[place];
        let Some(child) = &member.child else { bail!("{} is down", member.name) };
        let signal = if stop { Signal::STOP } else { Signal::CONT };
        rustix::process::kill_process(Pid::from_child(child), signal)?;
        Ok(())
    }

    /// A member that ended by itself, and how.
    pub fn ended(&mut self) -> Option<String> {
        let logs: Vec<PathBuf> = (0..self.members.len()).map(|place| self.log_file(place)).collect();
        for (place, member) in self.members.iter_mut().enumerate() {
            if let Some(Ok(Some(status))) = member.child.as_mut().map(Child::try_wait) {
                member.child = None;
                let log = std::fs::read(&logs[place]).unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                let lines: Vec<&str> = log.lines().collect();
                let last = lines[lines.len().saturating_sub(8)..].join("\n    ");
                return Some(format!("{} ended by itself ({status}):\n    {last}", member.name));
            }
        }
        None
    }

    /// What a member said.
    pub fn log_file(&self, place: Place) -> PathBuf {
        self.home(&self.members[place]).join("log")
    }

    /// The most memory that a process of a member used, in KiB, while it runs.
    pub fn peak_kib(&self, place: Place) -> Option<u64> {
        let child = self.members[place].child.as_ref()?;
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }

    /// Nothing that `from` sends arrives at `to` any more.
    ///
    /// # Errors
    /// When a tool says no.
    pub fn cut(&mut self, from: Place, to: Place) -> Result<()> {
        let count = self.cuts.entry((from, to)).or_default();
        *count += 1;
        if *count > 1 {
            return Ok(());
        }
        self.nft(to, &format!("add element ip chaos drops {{ {} }}", self.addr(from)))
    }

    /// Takes one [`Self::cut`] back.
    ///
    /// # Errors
    /// When a tool says no.
    pub fn heal(&mut self, from: Place, to: Place) -> Result<()> {
        let Some(count) = self.cuts.get_mut(&(from, to)) else { return Ok(()) };
        *count -= 1;
        if *count > 0 {
            return Ok(());
        }
        self.cuts.remove(&(from, to));
        self.nft(to, &format!("delete element ip chaos drops {{ {} }}", self.addr(from)))
    }

    /// Resets the connections between two places that are in use.
    ///
    /// # Errors
    /// When a tool says no.
    pub fn reset(&self, a: Place, b: Place) -> Result<()> {
        let ways = [(a, b), (b, a)];
        for (from, to) in ways {
            self.nft(to, &format!("add element ip chaos resets {{ {} }}", self.addr(from)))?;
        }
        std::thread::sleep(RESETS_LAST);
        for (from, to) in ways {
            self.nft(to, &format!("delete element ip chaos resets {{ {} }}", self.addr(from)))?;
        }
        Ok(())
    }

    /// Fills a node's disk, and keeps it full.
    ///
    /// # Errors
    /// When no file can be made there.
    pub fn fill(&mut self, place: Place) -> Result<()> {
        ensure!(!self.fillers.contains_key(&place), "{} is being filled", self.name(place));
        let mut file = File::create(self.filler(place))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = std::thread::spawn(move || {
            let piece = vec![0x5a; 1 << 20];
            while !stopped.load(Ordering::Relaxed) {
                // Whatever a discard gives back is taken at once.
                if file.write_all(&piece).is_err() {
                    std::thread::sleep(FILL_AGAIN);
                }
            }
        });
        self.fillers.insert(place, Filler { stop, task });
        Ok(())
    }

    /// Frees what [`Self::fill`] took.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn unfill(&mut self, place: Place) -> Result<()> {
        let Some(filler) = self.fillers.remove(&place) else { return Ok(()) };
        filler.stop.store(true, Ordering::Relaxed);
        let _ = filler.task.join();
        std::fs::remove_file(self.filler(place))?;
        Ok(())
    }

    fn filler(&self, place: Place) -> PathBuf {
        self.home(&self.members[place]).join("disk/filler")
    }

    /// Copies the nodes' disks, which end with this process, beside the logs.
    pub fn keep_disks(&self) {
        for place in self.of(Kind::Node) {
            let home = self.home(&self.members[place]);
            let mut copy = Command::new("cp");
            copy.args(["-a", "--sparse=always"]).arg(home.join("disk")).arg(home.join("kept"));
            let _ = copy.status();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for filler in std::mem::take(&mut self.fillers).into_values() {
            filler.stop.store(true, Ordering::Relaxed);
            let _ = filler.task.join();
        }
        for member in &mut self.members {
            if let Some(mut child) = member.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
            if member.kind == Kind::Node {
                // Or its directory could not be removed.
                let disk = self.dir.join(&member.name).join("disk");
                let _ = tool(Command::new("umount").arg(disk));
            }
        }
    }
}
