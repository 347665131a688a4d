//! The cluster around the machines: two witnesses and a gateway on the host, one volume.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use cli::config::Cluster;
use cli::status::{self, Owner};
use cli::verify;
use proto::cluster::{ClusterStatus, ReplicaCondition, VolumeInfo};
use proto::id::NodeId;
use tokio::time::Instant;

use super::machine::{FileSystem, HOST, Image, Machine, has_ended, have, network, run};

/// Storage nodes, each in a machine.
pub const NODES: u32 = 3;
/// The volume.
pub const VOLUME: &str = "tank";
/// Its size, small enough that all of it is read back after every cut.
const SIZE: &str = "32MiB";
const STRIPES: &str = "2";
/// What everybody said, in the run's directory.
pub const LOGS: [&str; 9] = [
    "node-1.console",
    "node-1.log",
    "node-2.console",
    "node-2.log",
    "node-3.console",
    "node-3.log",
    "witness-1.log",
    "witness-2.log",
    "gateway-1.log",
];
/// No wait takes longer. Much, since machines are emulated and others may use the host as well.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks.
pub const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A daemon on the host.
pub struct Daemon {
    name: &'static str,
    role: &'static str,
    dir: PathBuf,
    process: Option<Child>,
}

impl Daemon {
    fn new(dir: &Path, name: &'static str, role: &'static str) -> Self {
        Self { name, role, dir: dir.to_owned(), process: None }
    }

    /// Starts it.
    pub fn start(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.dir.join(format!("{}.log", self.name)))?;
        let mut command = Command::new(program()?);
        command.args(["--log", "info", self.role, "--config"]).arg(self.dir.join(format!("{}.toml", self.name)));
        self.process = Some(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        ensure!(!has_ended(process)?, "{} has ended by itself", self.name);
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// The program under test, beside this one.
fn program() -> Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("cluster-under-test");
    ensure!(program.exists(), "{} is not built: cargo build --release -p tests --bins", program.display());
    Ok(program)
}

/// Everything that runs.
pub struct Setup {
    pub image: Image,
    pub machines: Vec<Machine>,
    pub gateway: Daemon,
    witnesses: [Daemon; 2],
    config: PathBuf,
}

impl Setup {
    /// Makes the network, the machines and the cluster, and a volume that is served.
    pub async fn new(dir: &Path, lazy: [bool; NODES as usize]) -> Result<Self> {
        network(NODES)?;
        let last = if have("mkfs.xfs") { FileSystem::Xfs } else { FileSystem::Ext4 };
        let systems = [FileSystem::Ext4, FileSystem::Ext4, last];
        let machines = (1..).zip(systems).map(|(number, system)| Machine::new(dir, number, system));
        let machines: Vec<Machine> = machines.collect::<Result<_>>()?;
        let image = image(dir, &machines)?;
        configure_host(dir)?;
        let witnesses = ["witness-1", "witness-2"].map(|name| Daemon::new(dir, name, "node"));
        let gateway = Daemon::new(dir, "gateway-1", "gateway");
        let mut setup = Self { image, machines, gateway, witnesses, config: dir.join("cluster.toml") };
        setup.begin(lazy).await?;
        Ok(setup)
    }

    async fn begin(&mut self, lazy: [bool; NODES as usize]) -> Result<()> {
        for (machine, lazy) in self.machines.iter_mut().zip(lazy) {
            machine.boot(&self.image, lazy)?;
        }
        for witness in &mut self.witnesses {
            witness.start()?;
        }
        let nodes = self.machines.iter().map(|machine| (machine.name(), machine.address()));
        let nodes: Vec<String> = nodes.map(|(name, at)| format!("{name}={at}:7400,{at}:7401")).collect();
        for node in &nodes {
            let control = node.split(['=', ',']).nth(1).expect("as it was made").to_owned();
            self.wait(&format!("{control} to answer"), async || {
                Ok(tokio::net::TcpStream::connect(&control).await.is_ok().then_some(()))
            })
            .await?;
        }
        let mut words = vec!["init"];
        words.extend(nodes.iter().flat_map(|node| ["--node", node.as_str()]));
        let witnesses = [1, 2].map(|number| format!("witness-{number}={HOST}:74{number}0"));
        words.extend(witnesses.iter().flat_map(|witness| ["--witness", witness.as_str()]));
        self.cluster(&words)?;
        self.gateway.start()?;
        self.wait("the nodes' pools and the gateway", async || {
            let Ok(status) = self.status().await else { return Ok(None) };
            let ready = status.view.pools.len() == 2 * NODES as usize && cli::gateway::is_up(&status, "gateway-1");
            Ok(ready.then_some(()))
        })
        .await?;
        self.cluster(&["create-volume", VOLUME, "--size", SIZE, "--stripes", STRIPES])?;
        Ok(())
    }

    /// Runs a command on this cluster.
    pub fn cluster(&self, words: &[&str]) -> Result<String> {
        let config = self.config.to_str().context("a plain path")?;
        run(program()?, &[&["--config", config], words].concat())
    }

    /// The cluster's state, by a quorum's word.
    pub async fn status(&self) -> Result<ClusterStatus> {
        let cluster = Cluster::with_patience(Some(&self.config), Duration::from_secs(2));
        let cluster = cluster.map_err(|failure| anyhow!("{failure}"))?;
        cluster.status(false).await.map_err(|failure| anyhow!("{failure}"))
    }

    /// Why the volume's replicas are not all in sync, in the metadata and by the owner's word; `None`: they are.
    pub async fn out_of_sync(&self) -> Result<Option<String>> {
        let status = match self.status().await {
            Ok(status) => status,
            Err(error) => return Ok(Some(format!("{error:#}"))),
        };
        let Some(volume) = status.view.volume_named(VOLUME) else { bail!("volume {VOLUME} is gone") };
        Ok((!in_sync(&status, volume)).then(|| status::mirror_table(&status, volume)))
    }

    /// Whether all replicas elsewhere than on these machines are in sync, so that nothing is lost with them. An
    /// emulated machine that is slow may have been given up at any moment: ask right before it matters.
    pub async fn in_sync_without(&self, machines: &[usize]) -> bool {
        if machines.len() == NODES as usize {
            return true;
        }
        let Ok(status) = self.status().await else { return false };
        let Some(volume) = status.view.volume_named(VOLUME) else { return false };
        let Owner::Heard(session) = status::owner(&status, volume) else { return false };
        let is_cut = |node: NodeId| machines.iter().any(|at| *at as u64 + 1 == node.0);
        let reports: Vec<_> = session.report.mirrors.iter().flat_map(|mirror| &mirror.replicas).collect();
        volume.mirrors.iter().all(|mirror| {
            mirror.replicas.iter().filter(|replica| !is_cut(replica.node)).all(|replica| {
                let report = reports.iter().find(|report| report.replica == replica.id);
                mirror.in_sync.members.contains(&replica.id)
                    && report.is_some_and(|report| report.condition == ReplicaCondition::InSync)
            })
        })
    }

    /// Regions that are dirty, by the owner's word; `None`: nobody knows.
    pub async fn dirty(&self) -> Option<u64> {
        let status = self.status().await.ok()?;
        let volume = status.view.volume_named(VOLUME)?;
        let Owner::Heard(session) = status::owner(&status, volume) else { return None };
        Some(session.report.mirrors.iter().map(|mirror| mirror.dirty_regions).sum())
    }

    /// Compares all replicas block by block. Not under load: machines that are emulated may fall silent for longer
    /// than the gateway waits, and must come back then.
    pub async fn compare(&self) -> Result<u64> {
        const TRIES: usize = 6;
        let mut skipped = Vec::new();
        for _ in 0..TRIES {
            let cluster = Cluster::find(Some(&self.config)).map_err(|failure| anyhow!("{failure}"))?;
            let found = verify::compare(&cluster, VOLUME, false, false).await;
            let found = found.map_err(|failure| anyhow!("{failure}"))?;
            let told: Vec<String> = found.told.iter().map(ToString::to_string).collect();
            ensure!(found.differences == 0, "{} blocks differ: {}", found.differences, told.join("\n"));
            if found.skipped.is_empty() {
                return Ok(found.compared);
            }
            skipped = found.skipped;
            self.wait("all replicas to be in sync", async || Ok(self.out_of_sync().await?.is_none().then_some(())))
                .await?;
        }
        bail!("{TRIES} times replicas could not be compared, at last {skipped:?}")
    }

    /// Waits until `done` gives something; fails when anything ends by itself meanwhile.
    pub async fn wait<T>(&self, what: &str, mut done: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = done().await? {
                return Ok(value);
            }
            self.check()?;
            ensure!(Instant::now() < until, "waited {PATIENCE:?} in vain for {what}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Fails if anything has ended by itself.
    pub fn check(&self) -> Result<()> {
        self.machines.iter().try_for_each(Machine::check)?;
        self.witnesses.iter().try_for_each(Daemon::check)?;
        self.gateway.check()
    }
}

fn in_sync(status: &ClusterStatus, volume: &VolumeInfo) -> bool {
    let committed = volume.mirrors.iter().all(|mirror| mirror.in_sync.members.len() == mirror.replicas.len());
    let Owner::Heard(session) = status::owner(status, volume) else { return false };
    let mirrors = &session.report.mirrors;
    let reported = mirrors.iter().all(|mirror| {
        mirror.waiting.is_none() && mirror.replicas.iter().all(|replica| replica.condition == ReplicaCondition::InSync)
    });
    committed && reported && mirrors.len() == volume.mirrors.len()
}

/// The kernel, and an initramfs with the program and every node's configuration.
fn image(dir: &Path, machines: &[Machine]) -> Result<Image> {
    let etc = dir.join("etc");
    std::fs::create_dir_all(&etc)?;
    for machine in machines {
        let Machine { number, .. } = machine;
        let (name, address) = (machine.name(), machine.address());
        let pools = [1, 2].map(|n| format!("[[pools]]\nname = \"pool-{n}\"\npath = \"/srv/pools/pool-{n}\"\n"));
        let text = format!(
            "id = {number}\nname = \"{name}\"\nrole = \"node\"\ndir = \"/srv/state\"\ninsecure = true\n\
             control_listen = \"{address}:7400\"\ndata_listen = \"{address}:7401\"\n{}",
            pools.concat()
        );
        std::fs::write(etc.join(format!("{name}.toml")), text)?;
    }
    let initrd = dir.join("initrd.img");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/guest");
    let program = program()?;
    let words = ["--initrd", text(&program)?, text(&initrd)?, text(&etc)?];
    let base = run(&script, &words)?;
    Ok(Image { kernel: Path::new(base.trim()).join("vmlinux"), initrd })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a plain path")
}

fn configure_host(dir: &Path) -> Result<()> {
    for number in [1, 2] {
        let state = dir.join(format!("witness-{number}"));
        let text = format!(
            "id = {}\nname = \"witness-{number}\"\nrole = \"witness\"\ndir = {state:?}\ninsecure = true\n\
             control_listen = \"{HOST}:74{number}0\"\n",
            NODES + number,
        );
        std::fs::write(dir.join(format!("witness-{number}.toml")), text)?;
    }
    let nodes = (1..=NODES).map(|number| format!("10.99.0.1{number}:7400"));
    let members: Vec<String> = nodes.chain([1, 2].map(|number| format!("{HOST}:74{number}0"))).collect();
    let text = format!(
        "name = \"gateway-1\"\nmembers = {members:?}\nlisten = \"{HOST}:7500\"\nportal = \"{HOST}:3260\"\n\
         insecure = true\n"
    );
    std::fs::write(dir.join("gateway-1.toml"), text)?;
    Ok(())
}
