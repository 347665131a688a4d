//! Runs the simulation: `sim --seeds N [--from S] [--ops K]`, or one seed with `--replay S [--trace]`.

use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use tests::sim::{Counters, Outcome, Setup, run_seed};

const USAGE: &str = "usage: sim [--seeds N] [--from SEED] [--ops K] [--threads T] [--replay SEED [--trace]]";

struct Args {
    seeds: u64,
    from: u64,
    ops: u64,
    threads: usize,
    replay: Option<u64>,
    trace: bool,
}

fn parse() -> Result<Args, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut args = Args { seeds: 100, from: 1, ops: 5000, threads, replay: None, trace: false };
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
            "--threads" => args.threads = (number()? as usize).max(1),
            "--replay" => args.replay = Some(number()?),
            "--trace" => args.trace = true,
            _ => return Err(format!("unknown flag {word}\n{USAGE}")),
        }
    }
    Ok(args)
}

/// What one seed came to.
enum Ran {
    Well(Box<Outcome>),
    Failed(String),
}

/// Runs the seeds, each in one thread, as many at a time as there are threads; tells each as it ends.
fn run_all(args: &Args, seeds: Range<u64>, mut tell: impl FnMut(u64, Ran)) {
    let next = AtomicU64::new(seeds.start);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            let (sender, next, seeds) = (sender.clone(), &next, seeds.clone());
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let setup = Setup { trace: args.trace, ..Setup::of_seed(seed, args.ops) };
                    if seeds.end - seeds.start == 1 {
                        println!("{setup:?}");
                    }
                    let ran = match run_seed(setup) {
                        Ok(outcome) => Ran::Well(Box::new(outcome)),
                        Err(failure) => Ran::Failed(failure.to_string()),
                    };
                    if sender.send((seed, ran)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (seed, ran) in receiver {
            tell(seed, ran);
        }
    });
}

fn main() -> ExitCode {
    let args = match parse() {
        Ok(args) => args,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    // A seed that panics says so in its line.
    std::panic::set_hook(Box::new(|_| ()));
    let seeds = args.replay.map_or(args.from..args.from + args.seeds, |seed| seed..seed + 1);
    let count = seeds.end - seeds.start;
    let began = Instant::now();
    let (mut failed, mut seconds, mut total) = (Vec::new(), 0, Counters::default());
    run_all(&args, seeds, |seed, ran| match ran {
        Ran::Well(outcome) => {
            seconds += outcome.seconds;
            total.add(&outcome.counters);
            if count == 1 {
                println!("seed {seed}: digest {:016x}, {} s", outcome.digest, outcome.seconds);
            }
        }
        Ran::Failed(failure) => {
            println!("{failure}\n");
            failed.push(seed);
        }
    });
    failed.sort_unstable();
    let took = began.elapsed().as_secs_f64();
    let hours = seconds as f64 / 3600.0;
    println!("{total:#?}");
    println!(
        "{count} seeds of {} requests in {took:.1} s on {} threads ({:.0} a minute): {hours:.1} h simulated, \
         {:.2} h a second; {} failed {failed:?}",
        args.ops,
        args.threads,
        count as f64 * 60.0 / took,
        hours / took,
        failed.len()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
