//! Runs chaos: `chaos [--minutes M] [--seed S]`. Also is the cluster's members, under the name `cluster`, so that
//! they never are an old build.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use tests::chaos::plan::Kind;
use tests::chaos::{Options, run};

const USAGE: &str = "usage: chaos [--minutes M] [--seed S] [--dir DIR] [--gateways 1|2] [--only KIND,KIND..] \
                     [--drills]";
/// Given by this program to itself, when it has the namespaces.
const INSIDE: &str = "--inside";

fn parse() -> Result<(Options, bool), String> {
    let mut options = Options {
        lasts: Duration::from_secs(180),
        seed: 1,
        dir: PathBuf::new(),
        gateways: 2,
        only: Vec::new(),
        drills: false,
    };
    let mut inside = false;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} wants a value\n{USAGE}"));
        let number = |text: String| text.parse::<f64>().map_err(|error| format!("{text}: {error}"));
        match word.as_str() {
            "--minutes" => options.lasts = Duration::from_secs_f64(number(value()?)?.clamp(0.0, 1e5) * 60.0),
            "--seed" => options.seed = value()?.parse().map_err(|error| format!("--seed: {error}"))?,
            "--dir" => options.dir = value()?.into(),
            "--gateways" => options.gateways = (number(value()?)? as usize).clamp(1, 2),
            "--only" => {
                for name in value()?.split(',') {
                    let kind = Kind::ALL.iter().find(|kind| kind.name() == name);
                    let names = || Kind::ALL.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
                    options.only.push(*kind.ok_or_else(|| format!("no fault {name}; there are {}", names()))?);
                }
            }
            "--drills" => options.drills = true,
            INSIDE => inside = true,
            _ => return Err(format!("unknown word {word}\n{USAGE}")),
        }
    }
    Ok((options, inside))
}

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name().is_some_and(|name| name == "cluster") {
        return cli::main();
    }
    match parse() {
        Ok((options, true)) => inside(options),
        Ok((_, false)) => {
            let error = enter();
            eprintln!("chaos: cannot make namespaces with unshare(1): {error}");
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::from(2)
        }
    }
}

/// Becomes the same program in namespaces that end with it: whatever it makes and starts ends with it too, however
/// it ends.
fn enter() -> std::io::Error {
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => return error,
    };
    Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(own)
        .args(std::env::args_os().skip(1))
        .arg(INSIDE)
        .exec()
}

fn inside(mut options: Options) -> ExitCode {
    let temporary = options.dir.as_os_str().is_empty();
    if temporary {
        match tempfile::Builder::new().prefix("md99-chaos-").tempdir() {
            Ok(dir) => options.dir = dir.keep(),
            Err(error) => {
                eprintln!("chaos: cannot make a directory: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("chaos: seed {}, {} s, in {}", options.seed, options.lasts.as_secs(), options.dir.display());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads start");
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = run::run(&options) => outcome,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        }
    });
    runtime.shutdown_background();
    match outcome {
        Ok(()) => {
            println!("verdict: nothing was lost, every replica is equal");
            if temporary {
                let _ = std::fs::remove_dir_all(&options.dir);
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("verdict: FAILED: {error:#}");
            println!("everything is kept: {}/*/log; repeat with --seed {}", options.dir.display(), options.seed);
            ExitCode::FAILURE
        }
    }
}
