//! Runs the simulation: `sim --seeds N [--from S] [--ops K]`, or one seed with `--replay S [--trace]`.

use std::process::ExitCode;
use std::time::Instant;

use tests::sim::{Counters, Setup, run_seed};

const USAGE: &str = "usage: sim [--seeds N] [--from SEED] [--ops K] [--replay SEED [--trace]]";

struct Args {
    seeds: u64,
    from: u64,
    ops: u64,
    replay: Option<u64>,
    trace: bool,
}

fn parse() -> Result<Args, String> {
    let mut args = Args { seeds: 100, from: 1, ops: 1000, replay: None, trace: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let text = words.next().ok_or_else(|| format!("{word} wants a number"))?;
            text.parse().map_err(|e| format!("{word} {text}: {e}"))
        };
        match word.as_str() {
            "--seeds" => args.seeds = number()?,
            "--from" => args.from = number()?,
            "--ops" => args.ops = number()?,
            "--replay" => args.replay = Some(number()?),
            "--trace" => args.trace = true,
            _ => return Err(format!("unknown flag {word}\n{USAGE}")),
        }
    }
    Ok(args)
}

fn main() -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let seeds = args.replay.map_or(args.from..args.from + args.seeds, |seed| seed..seed + 1);
    let one = seeds.end - seeds.start == 1;
    let began = Instant::now();
    let (mut failed, mut seconds, mut total) = (Vec::new(), 0, Counters::default());
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let setup = Setup { trace: args.trace, ..Setup::of_seed(seed, args.ops) };
        if one {
            println!("{setup:?}");
        }
        match run_seed(setup) {
            Ok(outcome) => {
                seconds += outcome.seconds;
                total.add(&outcome.counters);
                if one {
                    println!("seed {seed}: digest {:016x}, {} s", outcome.digest, outcome.seconds);
                }
            }
            Err(failure) => {
                println!("{failure}\n");
                failed.push(seed);
            }
        }
    }
    let took = began.elapsed().as_secs_f64();
    println!("{total:#?}");
    println!(
        "{count} seeds of {} requests in {took:.1} s: {seconds} s simulated, {:.0} s a second; {} failed {failed:?}",
        args.ops,
        seconds as f64 / took,
        failed.len()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
