//! Runs the simulation: `sim --seeds N [--from S] [--ops K]`, or one seed with `--replay S [--trace]`. With
//! `--mutants`, if it was built with that feature, it looks for faults that are planted in the code.

use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use tests::sim::{Counters, Outcome, Setup, run_seed};

const USAGE: &str = "usage: sim [--seeds N] [--from SEED] [--ops K] [--threads T] [--replay SEED [--trace]] \
                     [--mutants | --mutant NAME [--replay SEED [--healthy]]]";
#[cfg(not(feature = "mutants"))]
const NO_MUTANTS: &str = "no faults are planted in this program; build and run one that has them:\n  \
                          cargo run --release -p tests --features mutants --bin sim -- --mutants";

struct Args {
    seeds: u64,
    from: u64,
    ops: u64,
    threads: usize,
    replay: Option<u64>,
    trace: bool,
    mutants: bool,
    /// Of these only one.
    mutant: Option<String>,
    /// Its seed, but without it.
    healthy: bool,
}

fn parse() -> Result<Args, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut seeds, mut ops) = (None, None);
    let (replay, mutant) = (None, None);
    let mut args =
        Args { seeds: 0, from: 1, ops: 0, threads, replay, trace: false, mutants: false, mutant, healthy: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--mutant" {
            args.mutant = Some(words.next().ok_or_else(|| format!("{word} wants a name"))?);
            args.mutants = true;
            continue;
        }
        let mut number = || {
            let text = words.next().ok_or_else(|| format!("{word} wants a number"))?;
            text.parse().map_err(|e| format!("{word} {text}: {e}"))
        };
        match word.as_str() {
            "--seeds" => seeds = Some(number()?),
            "--from" => args.from = number()?,
            "--ops" => ops = Some(number()?),
            "--threads" => args.threads = (number()? as usize).max(1),
            "--replay" => args.replay = Some(number()?),
            "--trace" => args.trace = true,
            "--mutants" => args.mutants = true,
            "--healthy" => args.healthy = true,
            _ => return Err(format!("unknown flag {word}\n{USAGE}")),
        }
    }
    args.seeds = seeds.unwrap_or(if args.mutants { 1000 } else { 100 });
    args.ops = ops.unwrap_or(if args.mutants { 1000 } else { 5000 });
    Ok(args)
}

#[cfg(not(feature = "mutants"))]
fn look_for_mutants(_: &Args) -> ExitCode {
    eprintln!("{NO_MUTANTS}");
    ExitCode::from(2)
}

/// One after the other, each until it is caught.
#[cfg(feature = "mutants")]
fn look_for_mutants(args: &Args) -> ExitCode {
    use proto::mutant::Mutant;
    use std::collections::BTreeSet;
    use tests::sim::Checker;
    use tests::sim::mutants::{Plan, hunt, plan, run_healthy, run_planted, setup_for};

    let named = |m: &&Mutant| args.mutant.as_ref().is_none_or(|name| format!("{m:?}").eq_ignore_ascii_case(name));
    let chosen: Vec<Mutant> = Mutant::ALL.iter().filter(named).copied().collect();
    if chosen.is_empty() {
        Mutant::ALL.iter().for_each(|m| eprintln!("{:22} {:4} {}", format!("{m:?}"), m.rule(), m.about()));
        return ExitCode::from(2);
    }
    if let (Some(seed), [mutant]) = (args.replay, &chosen[..]) {
        let setup = Setup { trace: args.trace, ..setup_for(*mutant, seed, args.ops) };
        let ran = if args.healthy { run_healthy(*mutant, setup) } else { run_planted(*mutant, setup) };
        return match ran {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                println!("{failure}");
                ExitCode::FAILURE
            }
        };
    }
    let began = Instant::now();
    println!(
        "{:22} {:4} {:>5}  {:16} {:44} found before, by others",
        "mutant", "rule", "seeds", "caught by", "faults added"
    );
    let (mut escaped, mut used) = (Vec::new(), BTreeSet::new());
    for mutant in chosen {
        let hunt = hunt(mutant, args.from, args.seeds, args.ops, args.threads);
        let Plan { wants, only, often, story, .. } = plan(mutant);
        let mut wants: Vec<&str> = wants.iter().map(|fault| fault.name()).collect();
        let more = [only.then_some("nothing else"), often.then_some("often"), story.map(|_| "a story of its own")];
        wants.extend(more.iter().flatten());
        let others: Vec<String> = hunt.others.iter().map(|(by, n)| format!("{by:?} {n}")).collect();
        let (seeds, by) = match hunt.caught {
            Some((seed, by)) => ((seed - args.from + 1).to_string(), format!("{by:?}")),
            None => ("-".to_owned(), "nobody".to_owned()),
        };
        used.extend(hunt.others.keys().copied().chain(hunt.caught.map(|(_, by)| by)));
        if hunt.caught.is_none() {
            escaped.push(mutant);
        }
        let unsound = match &hunt.unsound[..] {
            [] => String::new(),
            seeds => format!("; fails without it too: {seeds:?}"),
        };
        let (name, rule) = (format!("{mutant:?}"), mutant.rule());
        println!("{name:22} {rule:4} {seeds:>5}  {by:16} {:44} {}{unsound}", wants.join(", "), others.join(", "));
    }
    let took = began.elapsed().as_secs_f64();
    println!("{} mutants of {} requests a seed, in {took:.0} s; not caught: {escaped:?}", Mutant::ALL.len(), args.ops);
    if args.mutant.is_none() {
        let unused: Vec<&Checker> = Checker::ALL.iter().filter(|c| !used.contains(c)).collect();
        println!("checkers that found none: {unused:?}");
    }
    if escaped.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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
    if args.mutants {
        return look_for_mutants(&args);
    }
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
