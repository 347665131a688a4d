//! The verbs of `cluster dev`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use client::control::{ControlClient, ControlConfig, ControlError};
use proto::cluster::{ClusterStatus, Role};
use rustix::process::Signal;
use serde_json::json;
use tokio::time::Instant;

use super::layout::{Dev, Kind, Part, Shape, addresses};
use super::ports;
use super::process::State;
use crate::daemon::StopSignals;
use crate::failure::{Failure, Outcome};
use crate::{render, size};

/// How long a new cluster may take until it is ready.
const READY_PATIENCE: Duration = Duration::from_secs(40);
/// How long a gateway may take to close its sessions: longer than it allows itself.
const GATEWAY_PATIENCE: Duration = Duration::from_secs(30);
/// How long a node or witness may take to close.
const MEMBER_PATIENCE: Duration = Duration::from_secs(15);
/// How long a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long a node that was elected first is given to hand leadership to a witness. It does so in time; a cluster
/// where it does not is as ready.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(4);
/// Between two looks at what is coming up.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// `cluster dev`.
#[derive(Debug, Args)]
pub struct DevArgs {
    #[command(subcommand)]
    command: DevCommand,
}

#[derive(Debug, Subcommand)]
enum DevCommand {
    /// Start a cluster of separate processes on loopback, file-backed; or start the one in DIR again
    Up(Up),
    /// Close everything cleanly: gateways first, then nodes and witnesses
    Down(Dir),
    /// Send a signal to one process
    Kill {
        /// node-1, witness-1, gateway-1, ...
        name: String,
        /// Which signal
        #[arg(long, value_enum, default_value = "KILL", ignore_case = true)]
        signal: SignalName,
        #[command(flatten)]
        dir: Dir,
    },
    /// Start one process that is down
    Start {
        /// node-1, witness-1, gateway-1, ...
        name: String,
        #[command(flatten)]
        dir: Dir,
    },
    /// Show the processes
    Ps {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        dir: Dir,
    },
}

#[derive(Debug, Args)]
struct Dir {
    /// The cluster's directory
    #[arg(long)]
    dir: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "UPPER")]
enum SignalName {
    Kill,
    Term,
    Int,
    Stop,
    Cont,
}

impl SignalName {
    fn signal(self) -> Signal {
        match self {
            Self::Kill => Signal::KILL,
            Self::Term => Signal::TERM,
            Self::Int => Signal::INT,
            Self::Stop => Signal::STOP,
            Self::Cont => Signal::CONT,
        }
    }
}

/// `cluster dev up`.
#[derive(Clone, Debug, Args)]
pub struct Up {
    /// The cluster's directory: new, empty, or of a dev cluster that is down
    #[arg(long)]
    pub dir: PathBuf,
    /// Storage nodes [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=5))]
    pub nodes: Option<u32>,
    /// Witnesses [default: what makes the voters an odd number that survives the loss of two, at most 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=4))]
    pub witnesses: Option<u32>,
    /// Pools of each node [default: 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub pools: Option<u32>,
    /// Size of each pool, like 10GiB [default: its share of the free space]
    #[arg(long, value_parser = size::parse_blocks)]
    pub pool_size: Option<u64>,
    /// Gateways [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=8))]
    pub gateways: Option<u32>,
    /// First of the ports of the nodes, witnesses and gateways' control services; 0: any free ones [default: 7400]
    #[arg(long)]
    pub base_port: Option<u16>,
    /// Where gateway-1 listens for initiators, further gateways on the next ports; port 0: any free one
    /// [default: 127.0.0.1:3260]
    #[arg(long)]
    pub portal: Option<SocketAddr>,
}

impl Up {
    /// A new cluster in this directory, on any free ports.
    pub fn on_free_ports(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            nodes: None,
            witnesses: None,
            pools: None,
            pool_size: None,
            gateways: None,
            base_port: Some(0),
            portal: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        }
    }

    fn shape(&self) -> Outcome<Shape> {
        let nodes = self.nodes.unwrap_or(3);
        let witnesses = self.witnesses.unwrap_or(match nodes {
            1 => 0,
            2 => 1,
            3 => 2,
            4 => 1,
            _ => 0,
        });
        if nodes + witnesses > 5 {
            return Err(Failure::usage(format!("{nodes} nodes and {witnesses} witnesses are more than five voters"))
                .next("give fewer with --nodes or --witnesses"));
        }
        let portal = self.portal.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3260)));
        if !portal.ip().is_loopback() {
            return Err(Failure::usage(format!("--portal {portal}: a dev cluster listens on loopback only"))
                .next("use 127.0.0.1, or run `cluster gateway` with a configuration of its own"));
        }
        Ok(Shape {
            nodes,
            witnesses,
            gateways: self.gateways.unwrap_or(1),
            pools: self.pools.unwrap_or(5),
            pool_size: self.pool_size,
            base_port: self.base_port.unwrap_or(7400),
            portal,
        })
    }

    /// Whether what was asked for is what the directory holds.
    fn fits(&self, dev: &Dev) -> Outcome {
        let count = |kind| dev.of(kind).count() as u64;
        let first = dev.parts().first().map_or(0, |part| part.control.port());
        let portal = dev.of(Kind::Gateway).next().and_then(|part| part.data);
        let asked = [
            ("--nodes", self.nodes.map(u64::from), count(Kind::Node)),
            ("--witnesses", self.witnesses.map(u64::from), count(Kind::Witness)),
            ("--gateways", self.gateways.map(u64::from), count(Kind::Gateway)),
            ("--pools", self.pools.map(u64::from), u64::from(dev.pools())),
            ("--pool-size", self.pool_size, dev.pool_size()),
            ("--base-port", self.base_port.filter(|port| *port != 0).map(u64::from), u64::from(first)),
        ];
        for (flag, asked, has) in asked {
            if let Some(asked) = asked.filter(|asked| *asked != has) {
                return Err(differs(dev, flag, &asked.to_string(), &has.to_string()));
            }
        }
        match (self.portal.filter(|portal| portal.port() != 0), portal) {
            (Some(asked), Some(has)) if asked != has => {
                Err(differs(dev, "--portal", &asked.to_string(), &has.to_string()))
            }
            _ => Ok(()),
        }
    }
}

fn differs(dev: &Dev, flag: &str, asked: &str, has: &str) -> Failure {
    Failure::new(format!("{} holds a cluster with {flag} {has}, not {asked}", dev.dir().display()))
        .next(format!("leave {flag} out to start it as it is, or give another --dir"))
}

/// `cluster dev`.
///
/// # Errors
/// See the verbs.
pub async fn run(args: DevArgs) -> Outcome {
    match args.command {
        DevCommand::Up(args) => {
            let mut stop = StopSignals::catch()?;
            let dev = tokio::select! {
                dev = up(&args) => dev?,
                signal = stop.next() => {
                    return Err(Failure::new(format!("interrupted by {signal}; what was started has been ended")));
                }
            };
            for part in dev.of(Kind::Gateway) {
                let portal = part.data.expect("a gateway has a portal");
                eprintln!("{} serves initiators at {portal}", part.name);
            }
            render::line(format!("export MD99_CONFIG={}", shell_word(&dev.config_path().display().to_string())));
            Ok(())
        }
        DevCommand::Down(args) => {
            let dev = Dev::open(&args.dir)?;
            let report = tokio::task::spawn_blocking(move || down(&dev)).await.expect("down does not panic")?;
            report.iter().for_each(|line| eprintln!("{line}"));
            Ok(())
        }
        DevCommand::Kill { name, signal, dir } => {
            let dev = Dev::open(&dir.dir)?;
            kill(&dev, dev.part(&name)?, signal.signal())
        }
        DevCommand::Start { name, dir } => {
            let dev = Dev::open(&dir.dir)?;
            start(&dev, dev.part(&name)?).await
        }
        DevCommand::Ps { json, dir } => {
            ps(&Dev::open(&dir.dir)?, json);
            Ok(())
        }
    }
}

fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// Starts what the directory holds, or a new cluster in it, and waits until it is ready.
///
/// # Errors
/// A directory of something else, something running in it already, ports in use, a process that ends at once, or a
/// cluster that does not become ready.
pub async fn up(args: &Up) -> Outcome<Dev> {
    let shape = args.shape()?;
    let dev = match Dev::exists(&args.dir)? {
        false => Dev::create(&args.dir, &shape)?,
        true => {
            let dev = Dev::open(&args.dir)?;
            args.fits(&dev)?;
            let running: Vec<&str> =
                dev.parts().iter().filter(|part| dev.process(part).is_some()).map(|part| part.name.as_str()).collect();
            if !running.is_empty() {
                let next = if running.len() == dev.parts().len() {
                    format!("`cluster dev down --dir {}` ends it", args.dir.display())
                } else {
                    format!("`cluster dev start NAME --dir {}` starts what is down", args.dir.display())
                };
                return Err(
                    Failure::new(format!("{} is running: {}", args.dir.display(), running.join(", "))).next(next)
                );
            }
            for (addr, purpose) in dev.parts().iter().flat_map(addresses) {
                ports::check_free(addr, &purpose)?;
            }
            dev
        }
    };
    let dev = EndOnDrop(Some(dev));
    bring_up(dev.get()).await?;
    Ok(dev.keep())
}

/// A cluster whose processes end with this value, on every way out, also when a future is dropped.
pub struct EndOnDrop(Option<Dev>);

impl EndOnDrop {
    /// Its processes are to end with this value.
    pub fn new(dev: Dev) -> Self {
        Self(Some(dev))
    }
    /// The cluster.
    pub fn get(&self) -> &Dev {
        self.0.as_ref().expect("there until kept")
    }
    /// Its processes are to live on.
    pub fn keep(mut self) -> Dev {
        self.0.take().expect("there until kept")
    }
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        // After a clean end nothing runs any more and this finds nothing.
        let Some(dev) = &self.0 else { return };
        let running: Vec<_> = dev.parts().iter().filter_map(|part| dev.process(part)).collect();
        for process in &running {
            let _ = process.signal(Signal::KILL);
        }
        for process in &running {
            process.wait_down(KILL_PATIENCE);
        }
    }
}

async fn bring_up(dev: &Dev) -> Outcome {
    let until = Instant::now() + READY_PATIENCE;
    let mut progress = render::Progress::new("starting:");
    let members: Vec<&Part> = dev.parts().iter().filter(|part| part.kind != Kind::Gateway).collect();
    for part in &members {
        dev.start(part)?;
    }
    progress.at("nodes and witnesses");
    for part in &members {
        answers(dev, part, until).await?;
    }
    ControlClient::init(&dev.definition()).await.map_err(|error| Failure::control("forming the cluster", &error))?;
    let gateways: Vec<&Part> = dev.of(Kind::Gateway).collect();
    for part in &gateways {
        dev.start(part)?;
    }
    progress.at("leader, pools and gateways");
    ready(dev, until).await
}

fn still_there(dev: &Dev, part: &Part) -> Outcome {
    match dev.process(part) {
        Some(_) => Ok(()),
        None => Err(Failure::new(format!("{} ended at once:{}", part.name, dev.log_tail(part)))
            .next(format!("its log is {}", dev.log_file(part).display()))),
    }
}

/// Waits until a member's control service answers.
async fn answers(dev: &Dev, part: &Part, until: Instant) -> Outcome {
    loop {
        still_there(dev, part)?;
        let answer = tokio::net::TcpStream::connect(part.control).await;
        match answer {
            Ok(_) => return Ok(()),
            Err(_) if Instant::now() < until => tokio::time::sleep(LOOK_EVERY).await,
            Err(error) => {
                return Err(Failure::new(format!("{} does not answer at {}: {error}", part.name, part.control))
                    .next(format!("its log is {}", dev.log_file(part).display())));
            }
        }
    }
}

/// Waits until somebody leads, every node's pools are known and every gateway was heard.
async fn ready(dev: &Dev, until: Instant) -> Outcome {
    let mut config = ControlConfig::new(dev.cluster_config().members);
    config.deadline = Duration::from_secs(2);
    let client = ControlClient::new(config);
    let hand_over = Instant::now() + HAND_OVER_PATIENCE;
    loop {
        for part in dev.parts() {
            still_there(dev, part)?;
        }
        let missing = match client.status(false).await {
            Ok(status) => match missing(dev, &status) {
                None if Instant::now() < hand_over && !witness_leads(&status) => Some("a witness is to lead".into()),
                missing => missing,
            },
            Err(ControlError::NoAnswer { last, .. }) => Some(format!("nobody leads yet ({last})")),
            Err(error) => return Err(Failure::control("waiting for the cluster", &error)),
        };
        match missing {
            None => return Ok(()),
            Some(_) if Instant::now() < until => tokio::time::sleep(LOOK_EVERY).await,
            Some(missing) => {
                return Err(Failure::new(format!("the cluster did not become ready: {missing}"))
                    .next(format!("look at the logs: {}/*/log", dev.dir().display())));
            }
        }
    }
}

/// Whether a witness leads, where there is one: then killing a node costs no election (DESIGN §8).
fn witness_leads(status: &ClusterStatus) -> bool {
    let mut witnesses = status.view.members.iter().filter(|member| member.role == Role::Witness).peekable();
    witnesses.peek().is_none() || witnesses.any(|witness| status.leader == Some(witness.id))
}

fn missing(dev: &Dev, status: &ClusterStatus) -> Option<String> {
    for member in &status.members {
        if !member.up {
            return Some(format!("{} is not heard", crate::status::name(&status.view, member.id)));
        }
    }
    for part in dev.of(Kind::Node) {
        let Some(member) = status.view.members.iter().find(|member| member.name == part.name) else {
            return Some(format!("{} is no member yet", part.name));
        };
        let pools = status.view.pools.iter().filter(|pool| pool.node == member.id).count();
        if pools < dev.pools() as usize {
            return Some(format!("{} has told of {pools} of its {} pools", part.name, dev.pools()));
        }
    }
    for part in dev.of(Kind::Gateway) {
        let heard = status.gateways.iter().find(|gateway| gateway.name == part.name);
        // Registered and heard in this run of the cluster.
        if heard.and_then(|gateway| gateway.heard_unix_ms).is_none() {
            return Some(format!("{} has not registered", part.name));
        }
    }
    None
}

/// Starts one part and waits until it answers.
///
/// # Errors
/// When it runs already, its port is taken, or it ends at once.
pub async fn start(dev: &Dev, part: &Part) -> Outcome {
    if let Some(process) = dev.process(part) {
        return Err(Failure::new(format!("{} is {} already, process {}", part.name, process.state(), process.pid)));
    }
    dev.start(part)?;
    answers(dev, part, Instant::now() + READY_PATIENCE).await
}

/// Sends a signal; after one that ends a process at once, waits until it is gone.
///
/// # Errors
/// When the process is down, or does not go.
pub fn kill(dev: &Dev, part: &Part, signal: Signal) -> Outcome {
    let down = || {
        Failure::new(format!("{} is down", part.name)).next(format!(
            "`cluster dev start {} --dir {}` starts it",
            part.name,
            dev.dir().display()
        ))
    };
    let process = dev.process(part).ok_or_else(down)?;
    if !process.signal(signal)? {
        return Err(down());
    }
    if signal == Signal::KILL && !process.wait_down(KILL_PATIENCE) {
        return Err(Failure::new(format!("{} (process {}) was killed and is still there", part.name, process.pid)));
    }
    Ok(())
}

/// Ends everything: gateways first, so that they close their sessions while the nodes still answer. What does not
/// end in time is killed, and told of. Nothing running is no error.
///
/// # Errors
/// When a process cannot be signalled, or does not even go when killed.
pub fn down(dev: &Dev) -> Outcome<Vec<String>> {
    let mut report = Vec::new();
    for (gateways, patience) in [(true, GATEWAY_PATIENCE), (false, MEMBER_PATIENCE)] {
        let parts = dev.parts().iter().filter(|part| (part.kind == Kind::Gateway) == gateways);
        let running: Vec<_> = parts.filter_map(|part| dev.process(part).map(|process| (part, process))).collect();
        for (_, process) in &running {
            process.signal(Signal::TERM)?;
            // A stopped one would never see it.
            process.signal(Signal::CONT)?;
        }
        let until = std::time::Instant::now() + patience;
        for (part, process) in &running {
            if !process.wait_down(until.saturating_duration_since(std::time::Instant::now())) {
                process.signal(Signal::KILL)?;
                if !process.wait_down(KILL_PATIENCE) {
                    return Err(Failure::new(format!("{} (process {}) does not end", part.name, process.pid)));
                }
                report.push(format!("{} did not close in {} s and was killed", part.name, patience.as_secs()));
            }
        }
    }
    for part in dev.parts() {
        let _ = std::fs::remove_file(dev.pid_file(part));
    }
    Ok(report)
}

fn ps(dev: &Dev, json: bool) {
    let look = |part: &Part| {
        let process = dev.process(part);
        let state = process.as_ref().map_or(State::Down, super::process::Identity::state);
        (process.filter(|_| state != State::Down), state)
    };
    if json {
        let parts: Vec<_> = dev
            .parts()
            .iter()
            .map(|part| {
                let (process, state) = look(part);
                json!({
                    "name": part.name,
                    "role": part.kind,
                    "state": state,
                    "pid": process.as_ref().map(|process| process.pid),
                    "resident_bytes": process.as_ref().map(|process| process.resident_bytes()),
                    "control": part.control,
                    "data": if part.kind == Kind::Node { part.data } else { None },
                    "portal": if part.kind == Kind::Gateway { part.data } else { None },
                    "config": dev.config_file(part),
                    "log": dev.log_file(part),
                })
            })
            .collect();
        return render::json(&parts);
    }
    let rows = dev.parts().iter().map(|part| {
        let (process, state) = look(part);
        [
            part.name.clone(),
            part.kind.word().into(),
            state.to_string(),
            process.as_ref().map_or("-".into(), |process| process.pid.to_string()),
            process.as_ref().map_or("-".into(), |process| size::show(process.resident_bytes())),
            part.control.to_string(),
            part.data.map_or("-".into(), |addr| addr.to_string()),
            dev.log_file(part).display().to_string(),
        ]
    });
    render::line(render::table(["NAME", "ROLE", "STATE", "PID", "RESIDENT", "CONTROL", "DATA/PORTAL", "LOG"], rows));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_for_the_shell_where_they_must_be() {
        assert_eq!(shell_word("/tmp/d-1/cluster.toml"), "/tmp/d-1/cluster.toml");
        assert_eq!(shell_word("/tmp/a b/it's"), r"'/tmp/a b/it'\''s'");
    }

    #[test]
    fn a_dev_cluster_stays_on_loopback_and_within_five_voters() {
        let mut up = Up::on_free_ports(Path::new("/nowhere"));
        assert_eq!(up.shape().unwrap().witnesses, 2);
        up.witnesses = Some(4);
        assert_eq!(up.shape().unwrap_err().status(), 2);
        up.witnesses = None;
        up.portal = Some("0.0.0.0:3260".parse().unwrap());
        assert_eq!(up.shape().unwrap_err().status(), 2);
    }
}
