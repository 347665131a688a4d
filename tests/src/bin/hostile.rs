//! Gives hostile bytes to the product for as long as one likes, or one input again; see `tests::hostile`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tests::hostile::{TARGETS, Target, Until, corpus_dir, drive, find, memory::Counting, replay};

#[global_allocator]
static COUNTING: Counting = Counting;

const USAGE: &str = "usage: hostile --target NAME|all [--seconds N | --inputs N] [--seed S]
       hostile --target NAME --replay FILE
       hostile --write-seeds    writes the inputs to begin with into tests/fuzz/corpus";

/// Files of one target that `--write-seeds` writes: some of its inputs, enough for cargo-fuzz to begin with.
const MAX_FILES: usize = 32;

struct Args {
    target: String,
    until: Until,
    seed: u64,
    replay: Option<PathBuf>,
    write_seeds: bool,
}

fn parse() -> Result<Args, String> {
    let until = Until::Time(Duration::from_secs(10));
    let mut args = Args { target: "all".into(), until, seed: 1, replay: None, write_seeds: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--write-seeds" {
            args.write_seeds = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word}: what comes after it is missing\n{USAGE}"))?;
        let number = || value.parse().map_err(|e| format!("{word} {value}: {e}"));
        match word.as_str() {
            "--target" => args.target = value,
            "--seconds" => args.until = Until::Time(Duration::from_secs(number()?)),
            "--inputs" => args.until = Until::Inputs(number()?),
            "--seed" => args.seed = number()?,
            "--replay" => args.replay = Some(value.into()),
            _ => return Err(format!("unknown flag {word}\n{USAGE}")),
        }
    }
    Ok(args)
}

fn write_seeds() -> std::io::Result<()> {
    for target in TARGETS {
        let dir = corpus_dir(target);
        std::fs::create_dir_all(&dir)?;
        let seeds = (target.seeds)();
        for (n, seed) in seeds.iter().enumerate().step_by(seeds.len().div_ceil(MAX_FILES)) {
            std::fs::write(dir.join(format!("seed-{n:03}")), seed)?;
        }
    }
    Ok(())
}

fn run(args: &Args) -> Result<ExitCode, String> {
    if args.write_seeds {
        write_seeds().map_err(|e| e.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let targets: Vec<&'static Target> = match args.target.as_str() {
        "all" => TARGETS.iter().collect(),
        name => {
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            vec![find(name).ok_or_else(|| format!("no target {name}; there are {}", names.join(", ")))?]
        }
    };
    let mut failed = false;
    for target in targets {
        let began = Instant::now();
        let outcome = match &args.replay {
            Some(file) => replay(target, file),
            None => drive(target, args.until, args.seed),
        };
        match outcome {
            Ok(report) => println!(
                "{:<9} {:>9} inputs, {:>7.0} a second, {:>5} outcomes, at most {:>6} KiB held of {} KiB: {}",
                target.name,
                report.inputs,
                report.inputs as f64 / began.elapsed().as_secs_f64(),
                report.features,
                report.most >> 10,
                target.memory >> 10,
                target.about
            ),
            Err(failure) => {
                println!("{:<9} FAILED: {}: {}", target.name, failure.file.display(), failure.why);
                failed = true;
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn main() -> ExitCode {
    parse().and_then(|args| run(&args)).unwrap_or_else(|why| {
        eprintln!("{why}");
        ExitCode::from(2)
    })
}
