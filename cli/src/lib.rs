//! The `cluster` command: every role and every administration verb of md99. One module for each noun, [`render`]
//! for how things look, [`failure`] for what is said when something fails. [`load`] and [`dev`] also serve tests.

pub mod bench;
pub mod cluster;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod dev;
pub mod failure;
pub mod gateway;
pub mod load;
pub mod node;
pub mod render;
pub mod size;
pub mod status;
pub mod verify;
pub mod volume;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use failure::{Failure, Outcome};

/// md99: replicated block volumes from ordinary servers, over iSCSI.
#[derive(Debug, Parser)]
#[command(name = "cluster", version, about, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    /// File that names the cluster [default: /etc/md99/cluster.toml]; for `node` and `gateway`: their own file
    #[arg(long, global = true, env = "MD99_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// What is logged to standard error, like info or client=debug [default: info for daemons, warn for commands]
    #[arg(long, global = true, env = "MD99_LOG", value_name = "FILTER")]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the main job on this machine, end to end: kill nodes under load, bring them back, verify every byte
    Demo(demo::DemoArgs),
    /// Run a whole cluster as separate processes on this machine
    Dev(dev::DevArgs),
    /// Run a storage node or witness (a daemon)
    Node(node::DaemonArgs),
    /// Run a gateway (a daemon)
    Gateway(gateway::DaemonArgs),
    /// Form a cluster of nodes and witnesses that run
    Init(cluster::InitArgs),
    /// Show how the cluster is
    Status(status::StatusArgs),
    /// List nodes and witnesses
    ListNodes(node::ListArgs),
    /// Show one node: its pools and replicas
    ShowNode(node::ShowArgs),
    /// List gateways
    ListGateways(gateway::ListArgs),
    /// Create a volume and serve it
    CreateVolume(volume::CreateArgs),
    /// List volumes
    ListVolumes(volume::ListArgs),
    /// Show one volume: its mirrors and replicas
    ShowVolume(volume::ShowArgs),
    /// Delete a volume and everything in it
    DeleteVolume(volume::DeleteArgs),
    /// Serve a volume to initiators
    ExportVolume(volume::ExportArgs),
    /// Stop serving a volume, and close it
    UnexportVolume(volume::UnexportArgs),
    /// Change a setting of a volume while it is served
    SetVolume(volume::SetArgs),
    /// Go on without replicas that cannot be reached, and say what may be lost
    RecoverVolume(volume::RecoverArgs),
    /// Compare all replicas of a volume block by block; exit 1 where they differ
    VerifyVolume(verify::VerifyArgs),
    /// Measure how fast a volume is, or any iSCSI target, or several side by side
    Bench(Box<bench::BenchArgs>),
    /// Read everything of a volume, verify every checksum, compare replicas and repair
    ScrubVolume(verify::ScrubArgs),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // Usage errors end here with status 2, `--help` and `--version` with 0.
    let cli = Cli::parse();
    let daemon = matches!(cli.command, Command::Node(_) | Command::Gateway(_));
    let outcome = log_to_stderr(cli.log.as_deref(), daemon).and_then(|()| {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        if daemon {
            // Block data has threads of its own; for raft and gRPC a second one would only be woken along with the first.
            runtime.worker_threads(1);
        }
        let runtime = runtime.enable_all().build();
        let runtime = runtime.map_err(|error| Failure::new(format!("cannot start threads: {error}")))?;
        let outcome = runtime.block_on(run(cli));
        // Nothing that is still running is waited for: what had to be closed has been.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::from(failure.status())
        }
    }
}

fn log_to_stderr(filter: Option<&str>, daemon: bool) -> Outcome {
    let filter = filter.unwrap_or(if daemon { "info" } else { "warn" });
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| Failure::usage(format!("--log {filter}: {error}")).next("use for example --log info"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .init();
    Ok(())
}

async fn run(cli: Cli) -> Outcome {
    let config: Option<&Path> = cli.config.as_deref();
    match cli.command {
        Command::Demo(args) => demo::run(args).await,
        Command::Dev(args) => dev::run(args).await,
        Command::Node(args) => node::daemon(config, args).await,
        Command::Gateway(args) => gateway::daemon(config, args).await,
        Command::Init(args) => cluster::init(config, args).await,
        Command::Status(args) => status::run(config, args).await,
        Command::ListNodes(args) => node::list(config, args).await,
        Command::ShowNode(args) => node::show(config, args).await,
        Command::ListGateways(args) => gateway::list(config, args).await,
        Command::CreateVolume(args) => volume::create(config, args).await,
        Command::ListVolumes(args) => volume::list(config, args).await,
        Command::ShowVolume(args) => volume::show(config, args).await,
        Command::DeleteVolume(args) => volume::delete(config, args).await,
        Command::ExportVolume(args) => volume::export(config, args).await,
        Command::UnexportVolume(args) => volume::unexport(config, args).await,
        Command::SetVolume(args) => volume::set(config, args).await,
        Command::RecoverVolume(args) => volume::recover(config, args).await,
        Command::VerifyVolume(args) => verify::verify(config, args).await,
        Command::Bench(args) => bench::run(config, *args).await,
        Command::ScrubVolume(args) => verify::scrub(config, args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_use_is_told_from_failure() {
        for wrong in [
            &["cluster", "create-volume", "tank", "--size", "0GiB"][..],
            &["cluster", "create-volume", "tank", "--size", "1.5GiB"],
            &["cluster", "create-volume", "tank", "--size", "6KiB"],
            &["cluster", "create-volume", "tank", "--size", "1GiB", "--replicas", "0"],
            &["cluster", "create-volume", "tank", "--size", "1GiB", "--chunk-size", "12KiB"],
            &["cluster", "create-volume", "tank", "--size", "1GiB", "--speed", "9"],
            &["cluster", "create-volume", "--size", "1GiB"],
            &["cluster", "status", "--bogus"],
            &["cluster", "frobnicate"],
        ] {
            assert_eq!(Cli::try_parse_from(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
