//! `cargo run --release -p model -- [--config NAME] [--mutant NAME | --mutants] [--depth N] [--threads N]`
//!
//! Checks all configurations, or one, and prints what was seen; a counterexample is printed step by step. Ends with
//! status 1 if a property does not hold, or something that should be reached was not.

use std::process::ExitCode;

use ::model::{CONFIGS, Config, Mutant, Outcome, config, run};

const USAGE: &str = "usage: model [--config NAME] [--mutant NAME | --mutants] [--depth N] [--threads N] [--list]";

struct Args {
    configs: Vec<Config>,
    mutants: Vec<Mutant>,
    depth: Option<usize>,
    threads: usize,
}

fn parse() -> Result<Option<Args>, String> {
    let mut args = Args { configs: CONFIGS.to_vec(), mutants: Vec::new(), depth: None, threads: 2 };
    let mut given = std::env::args().skip(1);
    while let Some(arg) = given.next() {
        let mut value = || given.next().ok_or(format!("{arg} wants a value"));
        let number = |text: String| text.parse::<usize>().map_err(|_| format!("{text} is no number"));
        match arg.as_str() {
            "--config" => {
                let name = value()?;
                args.configs = vec![config(&name).ok_or(format!("no configuration {name}"))?];
            }
            "--mutant" => {
                let name = value()?;
                let named = |m: &&Mutant| format!("{m:?}").eq_ignore_ascii_case(&name);
                args.mutants.push(*Mutant::ALL.iter().find(named).ok_or(format!("no mutant {name}"))?);
            }
            "--mutants" => args.mutants = Mutant::ALL.to_vec(),
            "--depth" => args.depth = Some(number(value()?)?),
            "--threads" => args.threads = number(value()?)?.max(1),
            "--list" => {
                CONFIGS.iter().for_each(|c| println!("{:4} {}", c.name, c.about));
                Mutant::ALL.iter().for_each(|m| println!("{:26} {}", format!("{m:?}"), m.about()));
                return Ok(None);
            }
            _ => return Err(format!("unknown argument {arg}")),
        }
    }
    Ok(Some(args))
}

fn report(name: &str, outcome: &Outcome) {
    println!(
        "{name}: {} states ({} generated), depth {}, {:.1} s, {}",
        outcome.states,
        outcome.generated,
        outcome.depth,
        outcome.time.as_secs_f64(),
        if outcome.exhausted { "all seen" } else { "not all seen" },
    );
}

fn print_broken(outcome: &Outcome) {
    for (property, trace) in &outcome.broken {
        println!("  broken: {property}");
        for (i, action) in trace.actions.iter().enumerate() {
            println!("  {:3} {action:?}", i + 1);
        }
        println!("      {:?}", trace.last);
    }
    outcome.unreached.iter().for_each(|name| println!("  not reached: {name}"));
}

fn main() -> ExitCode {
    let args = match parse() {
        Ok(Some(args)) => args,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("model: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut good = true;
    if args.mutants.is_empty() {
        for config in &args.configs {
            let outcome = run(config, args.threads, args.depth);
            report(config.name, &outcome);
            print_broken(&outcome);
            good &= outcome.broken.is_empty() && outcome.unreached.is_empty();
        }
    }
    for mutant in &args.mutants {
        let mut found = false;
        for config in &args.configs {
            let config = Config { mutant: Some(*mutant), ..*config };
            let outcome = run(&config, args.threads, args.depth);
            let name = format!("{mutant:?} in {}", config.name);
            if outcome.broken.is_empty() && args.mutants.len() > 1 {
                continue;
            }
            report(&name, &outcome);
            if args.mutants.len() == 1 {
                print_broken(&outcome);
            } else {
                outcome
                    .broken
                    .iter()
                    .for_each(|(property, t)| println!("  {property}, after {} steps", t.actions.len()));
            }
            found |= !outcome.broken.is_empty();
            if found {
                break;
            }
        }
        if !found {
            println!("{mutant:?}: not found");
        }
        good &= found;
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
