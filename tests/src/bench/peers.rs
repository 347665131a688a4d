//! What is measured: clusters of processes, and tgtd.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cli::bench::target::Portal;
use cli::config::Cluster;
use cli::status::{self, Owner};
use proto::cluster::ReplicaCondition;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Room in each pool for other volumes than the first.
const SPARE_MIB: u64 = 1 << 20;
/// The name of each cluster's volume.
const VOLUME: &str = "bench";
/// No command takes longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// tgtd's data segments and bursts: its default would take 8 KiB at a time.
const SEGMENT: u32 = 256 << 10;
/// What its control socket's name ends with.
const CONTROL: &str = "1";

/// A process that ends with this value.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end; its standard output.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let described = format!("{command:?}");
    let mut child = Ends(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context(described.clone())?,
    );
    let until = Instant::now() + PATIENCE;
    let (mut out, mut err) = (child.0.stdout.take().expect("a pipe"), child.0.stderr.take().expect("a pipe"));
    // The daemons that a command starts have their own files: the pipes end with the command.
    let out = std::thread::spawn(move || std::io::read_to_string(&mut out));
    let err = std::thread::spawn(move || std::io::read_to_string(&mut err));
    let status = loop {
        if let Some(status) = child.0.try_wait()? {
            break status;
        }
        ensure!(Instant::now() < until, "{described}: did not end in {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(2));
    };
    let read = |thread: std::thread::JoinHandle<_>| thread.join().expect("reading does not panic");
    let (out, err) = (read(out)?, read(err)?);
    ensure!(status.success(), "{described}: {status}: {}", err.trim());
    Ok(out)
}

/// A cluster of processes, closed and removed with this value.
pub struct Md99 {
    program: PathBuf,
    dir: tempfile::TempDir,
    /// Its volume.
    pub portal: Portal,
}

impl Md99 {
    /// Three nodes, two witnesses, a gateway, and a volume of five mirrors of three replicas.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn start(program: &Path, under: &Path, size: u64, write_cache: bool) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("md99-bench-").tempdir_in(under)?;
        let portal = Portal { url: String::new(), addr: ([127, 0, 0, 1], 0).into(), target: String::new(), lun: 0 };
        let mut own = Self { program: program.to_owned(), dir, portal };
        let home = own.dir.path().display().to_string();
        // Files are sparse: what is never written takes nothing.
        let pool = format!("{}MiB", (size >> 20).max(64) + SPARE_MIB);
        own.command(&[
            "dev",
            "up",
            "--dir",
            &home,
            "--base-port",
            "0",
            "--portal",
            "127.0.0.1:0",
            "--pool-size",
            &pool,
        ])?;
        let cache = if write_cache { "on" } else { "off" };
        own.portal = own.volume(VOLUME, size, &["--write-cache", cache])?;
        Ok(own)
    }

    /// Makes another volume.
    ///
    /// # Errors
    /// When it is refused, as one without room is.
    pub fn volume(&self, name: &str, size: u64, options: &[&str]) -> anyhow::Result<Portal> {
        let size = format!("{}MiB", size >> 20);
        self.command(&[&["create-volume", name, "--size", &size], options].concat())?;
        let text = self.command(&["show-volume", name])?;
        let url = text.lines().find_map(|line| line.strip_prefix("URL")).context("the volume has no URL")?;
        Portal::parse(url.trim()).map_err(|failure| anyhow::anyhow!("{failure}"))
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("cluster.toml")
    }

    fn command(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(args).env("MD99_CONFIG", self.config()).env_remove("MD99_LOG");
        output(&mut command)
    }

    fn dev(&self, args: &[&str]) -> anyhow::Result<String> {
        let home = self.dir.path().display().to_string();
        self.command(&[&["dev"], args, &["--dir", &home]].concat())
    }

    /// Name and pid of each process that runs.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn processes(&self) -> anyhow::Result<Vec<(String, u32)>> {
        let parts: Value = serde_json::from_str(&self.dev(&["ps", "--json"])?)?;
        let each =
            parts.as_array().context("a list")?.iter().filter_map(|part| {
                Some((part["name"].as_str()?.to_owned(), u32::try_from(part["pid"].as_u64()?).ok()?))
            });
        Ok(each.collect())
    }

    /// Their pids.
    ///
    /// # Errors
    /// As [`Self::processes`].
    pub fn pids(&self) -> anyhow::Result<Vec<u32>> {
        Ok(self.processes()?.into_iter().map(|(_, pid)| pid).collect())
    }

    /// The pid of one process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self, name: &str) -> anyhow::Result<u32> {
        let found = self.processes()?.into_iter().find(|(other, _)| other == name);
        found.map(|(_, pid)| pid).with_context(|| format!("{name} does not run"))
    }

    /// Starts a process that was killed.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_part(&self, name: &str) -> anyhow::Result<()> {
        self.dev(&["start", name]).map(drop)
    }

    /// Waits until every replica is in sync, in the metadata and by the owner's word.
    ///
    /// # Errors
    /// When that takes longer than `patience`.
    pub async fn in_sync(&self, patience: Duration) -> anyhow::Result<()> {
        self.wait(patience, true).await
    }

    /// Waits until the metadata have every replica in the in-sync set: that is committed when a resync is done, and
    /// seen at once, where the owner's word comes once a second.
    ///
    /// # Errors
    /// When that takes longer than `patience`.
    pub async fn committed(&self, patience: Duration) -> anyhow::Result<()> {
        self.wait(patience, false).await
    }

    async fn wait(&self, patience: Duration, by_owner_too: bool) -> anyhow::Result<()> {
        let until = Instant::now() + patience;
        let cluster = Cluster::find(Some(&self.config())).map_err(|failure| anyhow::anyhow!("{failure}"))?;
        loop {
            if let Ok(status) = cluster.status(false).await
                && let Some(volume) = status.view.volume_named(VOLUME)
            {
                let committed = volume.mirrors.iter().all(|m| m.in_sync.members.len() == m.replicas.len());
                if committed && !by_owner_too {
                    return Ok(());
                }
                if committed
                    && let Owner::Heard(session) = status::owner(&status, volume)
                    && let mut replicas = session.report.mirrors.iter().flat_map(|mirror| &mirror.replicas)
                    && !session.report.mirrors.is_empty()
                    && replicas.all(|replica| replica.condition == ReplicaCondition::InSync)
                {
                    return Ok(());
                }
            }
            if Instant::now() >= until {
                bail!("not in sync after {} s", patience.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Md99 {
    fn drop(&mut self) {
        if let Err(error) = self.dev(&["down"]) {
            eprintln!("bench: {error:#}");
        }
        // What the command did not end would keep the directory's memory.
        for (name, pid) in self.processes().unwrap_or_default() {
            eprintln!("bench: {name}, process {pid}, is killed");
            signal(pid, Signal::KILL);
        }
    }
}

/// Sends a signal to a process of ours.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = kill_process(pid, signal);
    }
}

/// tgtd with one LUN in a file, ended with this value.
pub struct Tgtd {
    process: Ends,
    dir: tempfile::TempDir,
    /// Its LUN.
    pub portal: Portal,
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Tgtd {
    /// Starts it.
    ///
    /// # Errors
    /// When there is no tgtd, or it does not come up.
    pub fn start(under: &Path, size: u64) -> anyhow::Result<Self> {
        const IQN: &str = "iqn.2026-11.io.md99.bench:tgtd";
        let dir = tempfile::Builder::new().prefix("md99-tgtd-").tempdir_in(under)?;
        let port = free_port()?;
        let lun = dir.path().join("lun");
        std::fs::File::create(&lun)?.set_len(size)?;
        let log = std::fs::File::create(dir.path().join("log"))?;
        let child = Command::new("tgtd")
            .args(["-f", "-C", CONTROL, "--iscsi", &format!("portal=127.0.0.1:{port}")])
            .env("TGT_IPC_SOCKET", dir.path().join("socket"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start tgtd (Debian's package tgt)")?;
        let portal = Portal::parse(&format!("iscsi://127.0.0.1:{port}/{IQN}/1"))
            .map_err(|failure| anyhow::anyhow!("{failure}"))?;
        let own = Self { process: Ends(child), dir, portal };
        let until = Instant::now() + Duration::from_secs(10);
        while let Err(error) = own.admin("--mode sys --op show") {
            if Instant::now() >= until {
                let log = std::fs::read_to_string(own.dir.path().join("log")).unwrap_or_default();
                return Err(error.context(format!("tgtd does not answer: {log}")));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        own.admin(&format!("--mode target --op new --tid 1 -T {IQN}"))?;
        for key in ["MaxRecvDataSegmentLength", "MaxXmitDataSegmentLength", "MaxBurstLength", "FirstBurstLength"] {
            own.admin(&format!("--mode target --op update --tid 1 --name {key} --value {SEGMENT}"))?;
        }
        own.admin(&format!("--mode logicalunit --op new --tid 1 --lun 1 --bstype rdwr -b {}", lun.display()))?;
        own.admin("--mode target --op bind --tid 1 -I ALL")?;
        Ok(own)
    }

    fn admin(&self, words: &str) -> anyhow::Result<()> {
        let mut command = Command::new("tgtadm");
        command.args(["-C", CONTROL, "--lld", "iscsi"]).args(words.split(' '));
        output(command.env("TGT_IPC_SOCKET", self.dir.path().join("socket"))).map(drop)
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }
}
