//! A cluster under test, and the command line.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cli::load::{Load, LoadSpec};
use rustix::process::Signal;
use serde_json::Value;

/// No command of a test takes longer.
const COMMAND_PATIENCE: Duration = Duration::from_secs(120);
/// No wait of a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(90);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_cluster-under-test");

static TURN: Mutex<()> = Mutex::new(());

/// A command of the program, without this machine's own configuration.
pub fn program(args: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(args).env_remove("MD99_CONFIG").env_remove("MD99_LOG").stdin(Stdio::null());
    command
}

/// Runs a command to its end.
///
/// # Panics
/// When it takes too long.
pub fn output(mut command: Command) -> Output {
    let described = format!("{command:?}");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    let (pid, (done, ended)) = (child.id(), std::sync::mpsc::channel());
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match ended.recv_timeout(COMMAND_PATIENCE) {
        Ok(output) => output.expect("its output is read"),
        Err(_) => {
            let pid = rustix::process::Pid::from_raw(pid as i32).expect("a pid");
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            panic!("{described} did not end in {COMMAND_PATIENCE:?}");
        }
    }
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Expects this exit status; returns what was said on standard error.
pub fn fails(command: Command, status: i32) -> String {
    let described = format!("{command:?}");
    let output = output(command);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{described}: {}{said}", stdout(&output));
    said
}

/// Waits until `done` gives something.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < until, "waited {PATIENCE:?} in vain for: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits for a child.
///
/// # Panics
/// When it does not end within `patience`.
pub fn wait_child(child: &mut Child, patience: Duration) -> std::process::ExitStatus {
    let until = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().expect("a child of ours") {
            return status;
        }
        if Instant::now() >= until {
            let _ = child.kill();
            panic!("process {} did not end in {patience:?}", child.id());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A loopback port that somebody else listens on.
pub fn taken_port() -> (TcpListener, u16) {
    let base = cli::dev::ports::free_run(1).expect("a free port");
    let listener = TcpListener::bind(("127.0.0.1", base)).expect("it is free");
    (listener, base)
}

/// A cluster of processes in a directory of its own.
pub struct TestCluster {
    home: PathBuf,
    temporary: Option<tempfile::TempDir>,
    _turn: Option<MutexGuard<'static, ()>>,
}

impl TestCluster {
    /// Three nodes with five pools, two witnesses, a gateway, and whatever else is asked for.
    pub fn up(args: &[&str]) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let temporary = tempfile::Builder::new().prefix("md99-test-").tempdir().expect("a temporary directory");
        let home = temporary.path().join("dev");
        let cluster = Self { home, temporary: Some(temporary), _turn: Some(turn) };
        cluster.dev_up(args);
        cluster
    }

    /// `dev up`: for the first time, or again.
    pub fn dev_up(&self, args: &[&str]) {
        let dir = self.home.to_str().expect("a plain path");
        let mut all = vec!["dev", "up", "--dir", dir];
        if !self.home.exists() {
            all.extend(["--base-port", "0", "--portal", "127.0.0.1:0"]);
        }
        all.extend(args);
        let output = output(program(&all));
        assert!(output.status.success(), "dev up: {}", stderr(&output));
        assert_eq!(stdout(&output).trim(), format!("export MD99_CONFIG={dir}/cluster.toml"));
    }

    /// The directory of `dev`.
    pub fn dir(&self) -> &Path {
        &self.home
    }

    /// Where a part keeps everything.
    pub fn home(&self, part: &str) -> PathBuf {
        self.home.join(part)
    }

    /// A command on this cluster.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = program(args);
        command.env("MD99_CONFIG", self.home.join("cluster.toml"));
        command
    }

    /// Runs a command that must succeed; returns its output.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = output(self.command(args));
        assert!(output.status.success(), "cluster {}: {}{}", args.join(" "), stdout(&output), stderr(&output));
        stdout(&output)
    }

    /// Runs a command that must fail in this way; returns what it said.
    pub fn fails(&self, args: &[&str], status: i32) -> String {
        fails(self.command(args), status)
    }

    /// What a command prints as JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(args);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("cluster {}: {error}: {text}", args.join(" ")))
    }

    fn dev(&self, args: &[&str]) {
        let mut all = vec!["dev"];
        all.extend(args);
        all.extend(["--dir", self.home.to_str().expect("a plain path")]);
        self.ok(&all);
    }

    /// Sends a signal.
    pub fn signal(&self, part: &str, signal: &str) {
        self.dev(&["kill", part, "--signal", signal]);
    }

    /// kill -9.
    pub fn kill(&self, part: &str) {
        self.signal(part, "KILL");
    }

    /// Starts a part that is down.
    pub fn start(&self, part: &str) {
        self.dev(&["start", part]);
    }

    /// Closes everything cleanly.
    pub fn down(&self) {
        self.dev(&["down"]);
    }

    /// SIGTERM, and waits until the part has ended by itself.
    pub fn terminate(&self, part: &str) {
        self.signal(part, "TERM");
        self.wait_down(part);
    }

    /// Waits until a part has ended.
    pub fn wait_down(&self, part: &str) {
        wait_for(&format!("{part} to end"), || (self.part(part)["state"] == "down").then_some(()));
    }

    /// What `dev ps` knows of a part.
    pub fn part(&self, name: &str) -> Value {
        let dir = self.home.to_str().expect("a plain path");
        let parts = self.json(&["dev", "ps", "--json", "--dir", dir]);
        let parts = parts.as_array().expect("a list");
        parts.iter().find(|part| part["name"] == name).unwrap_or_else(|| panic!("no part {name}")).clone()
    }

    /// Where a gateway listens for initiators.
    pub fn portal(&self, gateway: &str) -> SocketAddr {
        self.part(gateway)["portal"].as_str().expect("a portal").parse().expect("an address")
    }

    /// Creates a volume of five mirrors and returns its URL.
    pub fn create(&self, name: &str, size: &str) -> String {
        let said = self.ok(&["create-volume", name, "--size", size, "--gateway", "gateway-1"]);
        let url = said.lines().find_map(|line| line.strip_prefix("URL")).expect("a URL is printed");
        url.trim().to_owned()
    }

    /// What `show-volume` knows.
    pub fn volume(&self, name: &str) -> Value {
        self.json(&["show-volume", name, "--json"])
    }

    /// Conditions of a volume's replicas, as its owner reports them: mirror by mirror, (node, condition).
    pub fn conditions(&self, name: &str) -> Vec<(u64, String)> {
        let volume = self.volume(name);
        let mut nodes = std::collections::BTreeMap::new();
        for replica in
            volume["mirrors"].as_array().into_iter().flatten().flat_map(|m| m["replicas"].as_array()).flatten()
        {
            nodes.insert(replica["id"].to_string(), replica["node"].as_u64().expect("a node"));
        }
        let reports = volume["report"]["mirrors"].as_array().cloned().unwrap_or_default();
        let replicas = reports.iter().flat_map(|m| m["replicas"].as_array()).flatten();
        replicas
            .map(|r| (nodes[&r["replica"].to_string()], r["condition"].as_str().unwrap_or_default().to_owned()))
            .collect()
    }

    /// Waits until every replica is in sync, in the metadata and by the word of an owner that is heard.
    pub fn wait_in_sync(&self, name: &str) {
        let mut last = Value::Null;
        let until = Instant::now() + PATIENCE;
        loop {
            let output = output(self.command(&["show-volume", name, "--json"]));
            if let Ok(volume) = serde_json::from_slice::<Value>(&output.stdout) {
                if in_sync(&volume) {
                    return;
                }
                last = volume;
            }
            assert!(Instant::now() < until, "volume {name} is not in sync after {PATIENCE:?}: {last:#}");
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Compares all replicas; they must be equal.
    pub fn verify(&self, name: &str) {
        let found = self.json(&["verify-volume", name, "--json"]);
        assert_eq!(found["differences"], 0, "{found:#}");
        assert_eq!(found["equal"], true, "{found:#}");
    }

    /// What a part has logged.
    pub fn log(&self, part: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.home(part).join("log")).unwrap_or_default()).into_owned()
    }

    /// A load on a volume of gateway-1.
    pub fn load_spec(&self, volume: &str, seed: u64) -> LoadSpec {
        LoadSpec::new(self.portal("gateway-1"), client::iscsi::iqn(volume), seed)
    }

    /// Bytes that gateway-1's session of the volume has copied between replicas, once that rises no more: the
    /// gateway publishes its figures twice a second.
    pub async fn copied(&self, volume: &str) -> u64 {
        let until = Instant::now() + PATIENCE;
        let mut last = self.copied_now(volume).await;
        loop {
            tokio::time::sleep(Duration::from_millis(1_200)).await;
            let now = self.copied_now(volume).await;
            if now == last {
                return now;
            }
            assert!(Instant::now() < until, "still copying after {PATIENCE:?}");
            last = now;
        }
    }

    async fn copied_now(&self, volume: &str) -> u64 {
        let id = self.volume(volume)["id"].as_str().expect("an id").to_owned();
        let id: proto::id::VolumeId = id.parse().expect("a UUID");
        let addr = self.part("gateway-1")["control"].as_str().expect("an address").to_owned();
        let mut gateway =
            proto::pb::gateway_client::GatewayClient::connect(format!("http://{addr}")).await.expect("it runs");
        let stats = gateway.stats(proto::pb::StatsRequest {}).await.expect("it answers").into_inner();
        let id: Vec<u8> = id.into();
        let found = stats.volumes.iter().find(|stats| stats.volume == id).expect("it has the volume open");
        found.resync_bytes + found.reconcile_bytes
    }
}

fn in_sync(volume: &Value) -> bool {
    let all = |list: &Value, test: &dyn Fn(&Value) -> bool| {
        list.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(test))
    };
    let committed = all(&volume["mirrors"], &|mirror| {
        mirror["in_sync"]["members"].as_array().map(Vec::len) == mirror["replicas"].as_array().map(Vec::len)
    });
    let reported = all(&volume["report"]["mirrors"], &|mirror| {
        mirror["waiting"].is_null() && all(&mirror["replicas"], &|replica| replica["condition"] == "in-sync")
    });
    volume["owner_heard"] == true && committed && reported
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Some(temporary) = self.temporary.take() {
                eprintln!("kept: {}", temporary.keep().display());
            }
            let status = output(self.command(&["status"]));
            eprintln!("{}{}", stdout(&status), stderr(&status));
        }
        if let Ok(dev) = cli::dev::Dev::open(&self.home) {
            for part in dev.parts() {
                if let Some(process) = dev.process(part) {
                    let _ = process.signal(Signal::KILL);
                    process.wait_down(Duration::from_secs(10));
                }
                if std::thread::panicking() {
                    let log = self.log(&part.name);
                    let lines: Vec<&str> = log.lines().collect();
                    eprintln!("--- {}\n{}", part.name, lines[lines.len().saturating_sub(25)..].join("\n"));
                }
            }
        }
    }
}

/// Runs the load until so many more commands were answered.
pub async fn answered(load: &Load, more: u64) {
    let (until, goal) = (Instant::now() + PATIENCE, load.commands() + more);
    while load.commands() < goal {
        load.check().unwrap_or_else(|error| panic!("{error}"));
        assert!(Instant::now() < until, "only {} of {goal} commands were answered in {PATIENCE:?}", load.commands());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Ends the load, reads everything back, and checks every byte.
pub async fn finish(mut load: Load) {
    load.stop().await.unwrap_or_else(|error| panic!("{error}"));
    load.read_back(None).await.unwrap_or_else(|error| panic!("{error}"));
    load.log_out().await;
}

/// Whether a tool of the system is there. In CI its absence fails the test.
pub fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        assert!(std::env::var_os("MD99_TESTS_NEED_TOOLS").is_none(), "{tool} is not installed");
        eprintln!("skipped: {tool} is not installed; tests/run installs it");
    }
    found
}
