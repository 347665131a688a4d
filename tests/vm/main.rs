//! Power cuts on the real thing. Three storage nodes run in virtual machines, each with a kernel and a file system of
//! its own; witnesses, gateway and a load that knows what it wrote run on the host. A cut is a SIGKILL of qemu: the
//! node's process, its page cache and whatever its kernel had not given to the disk are gone; to everybody else the
//! machine falls silent. It is started again, and every byte is checked against what the load was promised.
//!
//! What a cut takes away: everything that the guest's kernel has not written. What it leaves: what the guest's kernel
//! has written and not flushed is in the host's page cache (a disk that loses its own volatile cache is the
//! simulator's); so the order in which the kernel writes back decides what is there, and half of the machines write
//! nothing back unless a flush makes them.
//!
//! [`machine`] is a node's virtual machine and the network, [`setup`] the cluster around them, [`cuts`] what is done
//! to it and what must hold.

mod cuts;
mod machine;
mod setup;

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
Cuts the power of storage nodes under a load that checks every byte.

usage: tests/vm/power-cuts [--cuts N] [--seed S] [--mode one|two|all|mixed] [--dir DIR]

  --cuts N   so many cuts, not counting those that hit the same machines again while they come back [default: 10]
  --seed S   repeats the choices of an earlier run, as far as machines repeat anything
  --mode M   one: one node, the others go on: nothing that was acknowledged may be lost
             two: two nodes at the same moment: the same
             all: all nodes at once, and the gateway: nothing that was flushed may be lost
             mixed: in every three cuts one of each [default]
  --dir DIR  keep everything there, also after success [default: a temporary directory]

Needs root (a network namespace, a bridge, and /dev/net/tun), qemu-system-x86_64, and what tests/vm/guest needs.";

/// Says to the process that it is in its own namespaces by now.
const INSIDE: &str = "--inside";

/// How the run is to be.
pub struct Args {
    cuts: usize,
    seed: u64,
    mode: cuts::Mode,
    dir: Option<std::path::PathBuf>,
}

fn parse(words: &[String]) -> Result<Args> {
    let mut args = Args { cuts: 10, seed: uuid::Uuid::new_v4().as_u64_pair().0, mode: cuts::Mode::Mixed, dir: None };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == INSIDE {
            continue;
        }
        let value = words.next().with_context(|| format!("{word}: unknown, or wants a value"))?;
        match word.as_str() {
            "--cuts" => args.cuts = value.parse().with_context(|| format!("{word} {value}"))?,
            "--seed" => args.seed = value.parse().with_context(|| format!("{word} {value}"))?,
            "--mode" => args.mode = cuts::Mode::parse(value).with_context(|| format!("{word} {value}"))?,
            "--dir" => args.dir = Some(value.into()),
            _ => bail!("{word} is unknown"),
        }
    }
    Ok(args)
}

/// Starts this program again where it has a network of its own, and where the end of it ends all that it started.
fn in_namespaces(words: &[String]) -> Result<ExitCode> {
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        // Root of its own network, where the system allows everybody to be that, and to open /dev/net/tun.
        unshare.args(["--user", "--map-root-user"]);
    }
    unshare.args(["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    let error = unshare.arg(std::env::current_exe()?).arg(INSIDE).args(words).exec();
    Err(error).context("cannot run unshare (util-linux)")
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.iter().any(|word| word == "--help" || word == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let args = match parse(&words) {
        Ok(args) => args,
        Err(error) => {
            eprintln!("{error:#}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let outcome = match words.first().is_some_and(|word| word == INSIDE) {
        false => in_namespaces(&words),
        true => run(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode> {
    let temporary = match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
            None
        }
        None => Some(tempfile::Builder::new().prefix("md99-power-cuts-").tempdir()?),
    };
    let dir = temporary.as_ref().map_or_else(|| args.dir.as_deref().expect("given"), |dir| dir.path()).to_owned();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        // The first process of a namespace is killed by no signal that it does not catch.
        tokio::select! {
            outcome = cuts::run(&dir, args) => outcome,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            _ = term.recv() => bail!("interrupted"),
        }
    });
    // What is still running ends with this process and its namespace.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            println!("\nverdict: FAILED: {error:#}");
            println!("everything is kept in {}; repeat with --seed {}", dir.display(), args.seed);
            if let Some(temporary) = temporary {
                let _ = temporary.keep();
            }
            tell_logs(&dir);
            Ok(ExitCode::FAILURE)
        }
    }
}

/// The last words of everybody.
fn tell_logs(dir: &Path) {
    const LINES: usize = 25;
    for name in setup::LOGS {
        let text = std::fs::read(dir.join(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        println!("--- {name}\n{}", lines[lines.len().saturating_sub(LINES)..].join("\n"));
    }
}
