//! `bench`: see `tests/bench/run`, which builds what it needs, and `tests::bench`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tests::bench::results::{About, record};
use tests::bench::{Options, run};

const USAGE: &str = "usage: tests/bench/run [--quick] [--only PART,PART..] [--rounds N] [--seconds S] [--kills N] \
                     [--also NAME=CLUSTER_PROGRAM] [--disk DIR] [--no-record]
parts: compare, rest, durable, stalls, resync, yield, scale";

struct Asked {
    options: Options,
    record: Option<PathBuf>,
}

fn parse() -> Result<Asked, String> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let quick = words.iter().any(|word| word == "--quick");
    words.retain(|word| word != "--quick");
    let beside = std::env::current_exe().map_err(|error| error.to_string())?;
    let beside = |name: &str| beside.with_file_name(name);
    let mut options = Options {
        program: beside("cluster"),
        fanout: beside("fanout"),
        also: Vec::new(),
        only: Vec::new(),
        quick,
        rounds: if quick { 1 } else { 5 },
        time: Duration::from_millis(if quick { 1500 } else { 4000 }),
        kills: if quick { 3 } else { 20 },
        hangs: if quick { 1 } else { 3 },
        region: if quick { 512 << 20 } else { 1 << 30 },
        missed: if quick { 64 << 20 } else { 256 << 20 },
        rest: Duration::from_secs(10),
        memory: "/dev/shm".into(),
        disk: std::env::temp_dir(),
    };
    // Short rounds are for a look, not for the record.
    let mut to = (!quick).then(|| PathBuf::from("tests/bench/RESULTS.md"));
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        if word == "--no-record" {
            to = None;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} wants a value\n{USAGE}"))?;
        let number = || value.parse::<f64>().map_err(|error| format!("{word} {value}: {error}"));
        match word.as_str() {
            "--only" => {
                for part in value.split(',') {
                    if !run::PARTS.contains(&part) {
                        return Err(format!("no part {part}\n{USAGE}"));
                    }
                    options.only.push(part.to_owned());
                }
                to = None;
            }
            "--rounds" => options.rounds = number()?.clamp(1.0, 100.0) as usize,
            "--seconds" => options.time = Duration::from_secs_f64(number()?.clamp(0.2, 600.0)),
            "--kills" => options.kills = number()?.clamp(0.0, 1000.0) as usize,
            "--disk" => options.disk = value.into(),
            "--also" => match value.split_once('=') {
                Some((name, program)) => options.also.push((name.to_owned(), program.into())),
                None => return Err(format!("--also {value}: write NAME=FILE\n{USAGE}")),
            },
            _ => return Err(format!("unknown word {word}\n{USAGE}")),
        }
    }
    Ok(Asked { options, record: to })
}

fn main() -> ExitCode {
    let asked = match parse() {
        Ok(asked) => asked,
        Err(usage) => {
            eprintln!("{usage}");
            return ExitCode::from(2);
        }
    };
    let options = &asked.options;
    let parameters = format!(
        "Three replicas, five mirrors, one session; {} rounds of {} s on {} MiB; replicas in {}, durable in {}.",
        options.rounds,
        options.time.as_secs_f64(),
        options.region >> 20,
        options.memory.display(),
        options.disk.display(),
    );
    let mut about = About::look(parameters);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads start");
    let outcome = runtime.block_on(async {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        // What was started ends with the future.
        tokio::select! {
            outcome = run::run(options) => outcome,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; what was started has been ended")),
            _ = term.recv() => Err(anyhow::anyhow!("told to end; what was started has been ended")),
        }
    });
    runtime.shutdown_background();
    about.after();
    let results = match outcome {
        Ok(results) => results,
        Err(error) => {
            eprintln!("bench: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    println!("{}\n{}\n", about.date, about.parameters);
    println!("{}", results.text());
    println!("\nload average before {}, after {}", about.machine.load_average, about.load_average_after);
    if let Some(path) = &asked.record {
        if let Err(error) = record(path, &results.markdown(&about)) {
            eprintln!("bench: cannot write {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        println!("recorded in {}", path.display());
    }
    ExitCode::SUCCESS
}
