//! `fanout --dir DIR [--sinks 3] [--bytes 4096] [--depth 1] [--seconds 4] [--sync]`: see `tests::bench::fanout`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tests::bench::fanout::{Fanout, SINK, send, sink};

const USAGE: &str = "usage: fanout --dir DIR [--sinks 3] [--bytes 4096] [--depth 1] [--seconds 4] [--sync]";

fn parse() -> Result<Fanout, String> {
    let mut how =
        Fanout { dir: PathBuf::new(), sinks: 3, bytes: 4096, depth: 1, sync: false, time: Duration::from_secs(4) };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--sync" {
            how.sync = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} wants a value\n{USAGE}"))?;
        let number = || value.parse::<f64>().map_err(|error| format!("{word} {value}: {error}"));
        match word.as_str() {
            "--dir" => how.dir = value.into(),
            "--sinks" => how.sinks = number()?.clamp(1.0, 16.0) as usize,
            "--bytes" => how.bytes = number()?.clamp(1.0, 8e6) as usize,
            "--depth" => how.depth = number()?.clamp(1.0, 1024.0) as usize,
            "--seconds" => how.time = Duration::from_secs_f64(number()?.clamp(0.1, 3600.0)),
            _ => return Err(format!("unknown word {word}\n{USAGE}")),
        }
    }
    if how.dir.as_os_str().is_empty() { Err(USAGE.into()) } else { Ok(how) }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let outcome = match words.get(1).map(String::as_str) {
        Some(SINK) => match (words.get(2), words.get(3).and_then(|n| n.parse().ok()), words.get(4)) {
            (Some(path), Some(bytes), sync) => sink(path.as_ref(), bytes, sync.is_some_and(|word| word == "true")),
            _ => Err(anyhow::anyhow!("{USAGE}")),
        },
        _ => match parse() {
            Ok(how) => send(&how).map(|figures| println!("{figures}")),
            Err(usage) => {
                eprintln!("{usage}");
                return ExitCode::from(2);
            }
        },
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fanout: {error:#}");
            ExitCode::FAILURE
        }
    }
}
