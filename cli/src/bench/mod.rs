//! `cluster bench`: how fast a volume is, or any iSCSI target, or several side by side.
//!
//! [`shape`] says what is asked, [`over_iscsi`] and [`direct`] ask it, [`figures`] is what is measured, [`pids`] what
//! the target's processes take, [`output`] how it is shown, [`report`] the page with plots.
//!
//! Where there are several targets each shape runs on every one in turn, round after round, so that whatever else
//! goes on on the machine falls on all alike: only ratios of one run count.

pub mod direct;
pub mod figures;
pub mod output;
pub mod over_iscsi;
pub mod pids;
pub mod report;
pub mod shape;
pub mod target;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{ArgGroup, Args};
use client::block::SECTOR;
use client::initiator::lane::Lane;
use proto::cluster::ClusterStatus;

use self::direct::Direct;
use self::output::{Machine, Measurement, Report};
use self::over_iscsi::Plan;
use self::shape::Shape;
use self::target::{Portal, Round};
use crate::config::Cluster;
use crate::daemon::StopSignals;
use crate::failure::{Failure, Outcome};
use crate::{render, size};

/// The unit of filling, and of regions.
const FILL_BLOCK: u64 = 1 << 20;
/// The longest request.
const MAX_BLOCK: u64 = 8 << 20;
/// Rounds where nothing is said and there are several targets.
const ROUNDS: u32 = 3;

/// `cluster bench`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("targets").args(["volume", "url", "list"]).required(true).multiple(true))]
#[command(group = ArgGroup::new("own").args(["block_size", "read_percent", "random", "sequential", "queue_depth", "fua"])
    .multiple(true).conflicts_with_all(["shape", "all"]))]
pub struct BenchArgs {
    /// The volume
    volume: Option<String>,
    /// Ask the volume by the client library in this process instead of over iSCSI; no gateway may have it open
    #[arg(long, requires = "volume", conflicts_with = "sessions")]
    direct: bool,
    /// A LUN of any iSCSI target, as iscsi://HOST:PORT/IQN/LUN; several times: they are compared
    #[arg(long, value_name = "URL")]
    url: Vec<String>,
    /// What the targets are called in the table, in their order
    #[arg(long, value_name = "NAME")]
    name: Vec<String>,
    /// Processes of the targets, in their order: their processor time and memory are shown; - for none
    #[arg(long, value_name = "PID,PID")]
    pids: Vec<String>,
    /// Shapes by name [default: the eight usual ones]; --list shows them
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',', conflicts_with = "all")]
    shape: Vec<String>,
    /// All named shapes
    #[arg(long)]
    all: bool,
    /// Show the named shapes and end
    #[arg(long, exclusive = true)]
    list: bool,
    /// A shape of your own: bytes of a request, like 4KiB or 512
    #[arg(long, value_name = "SIZE", value_parser = parse_block)]
    block_size: Option<u64>,
    /// How many of a hundred requests read [default: 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: Option<u8>,
    /// Anywhere in the region, the default
    #[arg(long, conflicts_with = "sequential")]
    random: bool,
    /// One after the other
    #[arg(long)]
    sequential: bool,
    /// Requests under way in each session [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    queue_depth: Option<u16>,
    /// Write with force unit access
    #[arg(long)]
    fua: bool,
    /// iSCSI sessions at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    sessions: u16,
    /// How long a round is
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86400))]
    seconds: u64,
    /// End a round after so many bytes instead
    #[arg(long, value_name = "SIZE", value_parser = parse_block, conflicts_with = "seconds")]
    total: Option<u64>,
    /// Only the first so many bytes of each target are touched
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size::parse_blocks)]
    region: u64,
    /// Rounds of each shape, of which the median is shown [default: 1, of several targets 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Do not write the region once before, so that reads may be of space that was never written
    #[arg(long)]
    no_fill: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a page with plots over time
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Overwrite without asking
    #[arg(long)]
    yes: bool,
}

/// Bytes with or without a unit.
fn parse_block(text: &str) -> Result<u64, String> {
    let bytes = match text.trim().parse::<u64>() {
        Ok(bytes) => bytes,
        Err(_) => size::parse(text).map_err(|bad| bad.to_string())?,
    };
    match bytes {
        0 => Err("a size of zero makes no sense".into()),
        bytes if !bytes.is_multiple_of(SECTOR) => Err(format!("{bytes} bytes is not a multiple of {SECTOR}")),
        bytes => Ok(bytes),
    }
}

/// A target, and how it is called.
struct Target {
    name: String,
    /// What is overwritten, for people.
    what: String,
    way: Way,
    pids: Vec<u32>,
    device_bytes: u64,
    region: u64,
}

/// How it is asked.
enum Way {
    Portal(Portal),
    Direct(Direct),
}

impl Target {
    async fn run(&self, plan: &Plan<'_>) -> Outcome<Round> {
        match &self.way {
            Way::Portal(portal) => over_iscsi::run(portal, plan).await,
            Way::Direct(direct) => direct.run(plan).await,
        }
    }
}

impl BenchArgs {
    fn shapes(&self) -> Outcome<Vec<Shape>> {
        let own = self.block_size.is_some()
            || self.read_percent.is_some()
            || self.random
            || self.sequential
            || self.queue_depth.is_some()
            || self.fua;
        if own {
            let block = self.block_size.unwrap_or(4 << 10);
            if block > MAX_BLOCK {
                return Err(Failure::usage(format!(
                    "--block-size {}: a request has at most {}",
                    size::show(block),
                    size::show(MAX_BLOCK)
                )));
            }
            let (percent, depth) = (self.read_percent.unwrap_or(100), self.queue_depth.unwrap_or(1));
            if self.fua && percent == 100 {
                return Err(Failure::usage("--fua is about writes, and every request is a read")
                    .next("give --read-percent 0, or less than 100"));
            }
            return Ok(vec![Shape::custom(block, percent, self.sequential, depth.into(), self.fua)]);
        }
        if self.all {
            return Ok(shape::named());
        }
        if self.shape.is_empty() {
            return Ok(shape::usual());
        }
        let named = shape::named();
        let find = |name: &String| {
            named.iter().find(|shape| shape.name == *name).cloned().ok_or_else(|| {
                let all: Vec<_> = named.iter().map(|shape| shape.name.as_str()).collect();
                Failure::usage(format!("--shape {name}: there is no such shape"))
                    .next(format!("choose of {}", all.join(", ")))
            })
        };
        self.shape.iter().map(find).collect()
    }

    fn rounds(&self, targets: usize) -> u32 {
        self.rounds.unwrap_or(if targets > 1 { ROUNDS } else { 1 })
    }
}

/// `cluster bench`.
///
/// # Errors
/// Wrong use, a target that cannot be reached, a no to the question, requests that failed.
pub async fn run(config: Option<&Path>, args: BenchArgs) -> Outcome {
    if args.list {
        let rows = shape::named().into_iter().map(|shape| [shape.name.clone(), shape.words()]);
        render::line(render::table(["SHAPE", "IS"], rows));
        return Ok(());
    }
    let shapes = args.shapes()?;
    let targets = find(config, &args).await?;
    let outcome = on(&args, &shapes, &targets).await;
    for target in targets {
        if let Way::Direct(direct) = target.way {
            direct.close().await;
        }
    }
    outcome
}

async fn on(args: &BenchArgs, shapes: &[Shape], targets: &[Target]) -> Outcome {
    for target in targets {
        for shape in shapes {
            if shape.slots(target.region) < u64::from(args.sessions) {
                return Err(Failure::usage(format!(
                    "{}: a region of {} is too small for shape {}",
                    target.name,
                    size::show(target.region),
                    shape.name
                ))
                .next("give a larger --region"));
            }
        }
    }
    let fill = may_write(args, shapes, targets)?;
    if let Some(path) = &args.report {
        // Better now than after an hour.
        std::fs::write(path, "").map_err(|error| Failure::path(path, "cannot write", error))?;
    }
    let stop = catch()?;
    let mut report = Report {
        machine: Machine::look(),
        version: env!("CARGO_PKG_VERSION"),
        began_unix_ms: unix_ms(),
        seconds: args.seconds,
        total: args.total,
        sessions: args.sessions,
        rounds: args.rounds(targets.len()),
        filled: fill,
        interrupted: false,
        load_average_after: String::new(),
        targets: targets.iter().map(Target::describe).collect(),
        measurements: Vec::new(),
    };
    let outcome = measure(args, shapes, targets, fill, &stop, &mut report).await;
    report.interrupted = stop.load(Ordering::Relaxed);
    report.load_average_after = output::load_average();
    report.measurements.retain(|measurement| !measurement.rounds.is_empty());
    report.judge();
    match args.json {
        true => render::json(&report),
        false => render::line(report.table()),
    }
    if let Some(path) = &args.report {
        std::fs::write(path, report::page(&report)).map_err(|error| Failure::path(path, "cannot write", error))?;
    }
    outcome?;
    if report.interrupted {
        return Err(Failure::new("interrupted: the figures are of what was measured until then"));
    }
    let mut failed = report.measurements.iter().filter_map(Measurement::complaint);
    match failed.next() {
        Some(first) => Err(Failure::new(first).next("the figures of that shape are not to be compared")),
        None => Ok(()),
    }
}

/// Set when the user wants to stop; a second signal ends the process at once.
fn catch() -> Outcome<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let signals = StopSignals::catch()?;
    let told = stop.clone();
    tokio::spawn(async move {
        signals.stop_by(|| told.store(true, Ordering::Relaxed)).await;
    });
    Ok(stop)
}

fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_millis() as u64)
}

async fn find(config: Option<&Path>, args: &BenchArgs) -> Outcome<Vec<Target>> {
    let portals = args.url.iter().map(|url| Portal::parse(url)).collect::<Outcome<Vec<_>>>()?;
    let number = portals.len() + usize::from(args.volume.is_some());
    let too_many = |what: &str, given: usize, targets: usize| {
        Failure::usage(format!("{what} is given {given} times, and there are {targets} targets"))
    };
    if args.name.len() > number {
        return Err(too_many("--name", args.name.len(), number));
    }
    if args.pids.len() > number {
        return Err(too_many("--pids", args.pids.len(), number));
    }
    let pids = args.pids.iter().map(|text| pids::parse(text)).collect::<Outcome<Vec<_>>>()?;
    let by_default = args.volume.iter().cloned().chain(portals.iter().map(|portal| portal.addr.to_string()));
    let names: Vec<String> =
        by_default.enumerate().map(|(index, name)| args.name.get(index).cloned().unwrap_or(name)).collect();
    if let Some(name) =
        (1..names.len()).find(|&index| names[..index].contains(&names[index])).map(|index| &names[index])
    {
        return Err(Failure::usage(format!("two targets are called {name}")).next("name them with --name"));
    }
    let mut found: Vec<(String, Way, u64)> = Vec::new();
    for portal in portals {
        let device_bytes = size_of(&portal).await?;
        found.push((portal.url.clone(), Way::Portal(portal), device_bytes));
    }
    if let Some(volume) = &args.volume {
        let cluster = Cluster::find(config)?;
        let (way, device_bytes) = match args.direct {
            true => {
                let direct = Direct::open(&cluster, volume).await?;
                let device_bytes = direct.device_bytes;
                (Way::Direct(direct), device_bytes)
            }
            false => {
                let portal = portal_of(&cluster.status(false).await?, volume)?;
                let device_bytes = size_of(&portal).await?;
                (Way::Portal(portal), device_bytes)
            }
        };
        found.insert(0, (format!("volume {volume}"), way, device_bytes));
    }
    let mut targets = Vec::new();
    for (index, (name, (what, way, device_bytes))) in names.into_iter().zip(found).enumerate() {
        let pids = pids.get(index).cloned().unwrap_or_default();
        let region = args.region.min(device_bytes) / FILL_BLOCK * FILL_BLOCK;
        targets.push(Target { name, what, way, pids, device_bytes, region });
    }
    Ok(targets)
}

/// Logs in and asks.
async fn size_of(portal: &Portal) -> Outcome<u64> {
    let options = over_iscsi::options(portal, 0);
    let (lane, capacity) = Lane::connect(portal.addr, &options, portal.lun, 1, SECTOR as usize, &[0])
        .await
        .map_err(|error| portal.failure(&error))?;
    tokio::task::block_in_place(|| lane.log_out());
    if u64::from(capacity.block_len) != SECTOR {
        return Err(Failure::new(format!(
            "{}: its sectors are of {} bytes, only {SECTOR} are supported",
            portal.url, capacity.block_len
        )));
    }
    Ok(capacity.blocks * SECTOR)
}

/// Where a volume is served.
fn portal_of(status: &ClusterStatus, name: &str) -> Outcome<Portal> {
    let volume = status.view.volume_named(name).ok_or_else(|| {
        Failure::new(format!("there is no volume {name}")).next("`cluster list-volumes` shows what exists")
    })?;
    let gateway = volume.export.as_ref().and_then(|gateway| status.view.gateway(gateway)).ok_or_else(|| {
        Failure::new(format!("volume {name} is not served"))
            .next(format!("`cluster export-volume {name}` serves it over iSCSI; or give --direct"))
    })?;
    Portal::parse(&crate::volume::url(&gateway.portal, name))
}

/// Asks before anything is overwritten; whether the regions are to be filled.
fn may_write(args: &BenchArgs, shapes: &[Shape], targets: &[Target]) -> Outcome<bool> {
    if !shapes.iter().any(Shape::writes) && (args.no_fill || !args.yes) {
        if !args.no_fill {
            eprintln!("only reading: what was never written may be read faster; --yes writes the region once before");
        }
        return Ok(false);
    }
    let each = targets.iter().map(|target| {
        format!("the first {} of {} ({})", size::show(target.region), target.what, size::show(target.device_bytes))
    });
    let lost = each.collect::<Vec<_>>().join(" and ");
    if !args.yes && !render::confirmed(&format!("Overwrite {lost}?")) {
        return Err(Failure::new(format!("this would overwrite {lost}; nothing was done"))
            .next("confirm with --yes, or ask for shapes that only read"));
    }
    Ok(!args.no_fill)
}

async fn measure(
    args: &BenchArgs,
    shapes: &[Shape],
    targets: &[Target],
    fill: bool,
    stop: &Arc<AtomicBool>,
    report: &mut Report,
) -> Outcome {
    let mut progress = render::Progress::new("bench:");
    let mut seed = crate::load::Rng::new(unix_ms());
    let time = Duration::from_secs(args.seconds);
    let interval = Duration::from_millis(if args.seconds <= 15 { 250 } else { 1000 });
    if fill {
        let shape = Shape::fill(FILL_BLOCK);
        for target in targets {
            progress.at(format!("writing {} of {} once", size::show(target.region), target.name));
            let total = Some(target.region);
            let seed = seed.draw();
            let plan = Plan { shape: &shape, region: target.region, sessions: 1, time, total, seed, interval, stop };
            let round = target.run(&plan).await?;
            if let Some(error) = &round.counts.first_error {
                return Err(Failure::new(format!("{}: filling it: {error}", target.name)));
            }
        }
    }
    let rounds = report.rounds;
    for (number, shape) in shapes.iter().enumerate() {
        let first = report.measurements.len();
        report.measurements.extend(targets.iter().map(|target| Measurement::new(shape, &target.name)));
        for round in 1..=rounds {
            for (index, target) in targets.iter().enumerate() {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                progress.at(format!(
                    "{} on {}, shape {} of {}, round {round} of {rounds}",
                    shape.name,
                    target.name,
                    number + 1,
                    shapes.len()
                ));
                let sessions = args.sessions.into();
                let (region, total, seed) = (target.region, args.total, seed.draw());
                let plan = Plan { shape, region, sessions, time, total, seed, interval, stop };
                let before = pids::Reading::take(&target.pids);
                let mut done: Round = target.run(&plan).await?;
                if !target.pids.is_empty() {
                    done.processes(&before, &pids::Reading::take(&target.pids));
                }
                report.measurements[first + index].rounds.push(done);
            }
        }
    }
    Ok(())
}

impl Target {
    fn describe(&self) -> output::TargetInfo {
        output::TargetInfo {
            name: self.name.clone(),
            url: match &self.way {
                Way::Portal(portal) => portal.url.clone(),
                Way::Direct(_) => format!("{}, by the client library", self.what),
            },
            pids: self.pids.clone(),
            device_bytes: self.device_bytes,
            region_bytes: self.region,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn args(words: &[&str]) -> Result<BenchArgs, clap::Error> {
        Only::try_parse_from([&["bench"], words].concat()).map(|only| only.args)
    }

    #[test]
    fn a_shape_is_named_or_described_never_both() {
        let own = args(&["tank", "--block-size", "512", "--read-percent", "30", "--queue-depth", "4", "--sequential"]);
        let shapes = own.unwrap().shapes().unwrap();
        assert_eq!(shapes.len(), 1);
        assert_eq!((shapes[0].block_size, shapes[0].read_percent, shapes[0].queue_depth), (512, 30, 4));
        assert_eq!(shapes[0].name, "seqrw30-512B-q4");
        assert_eq!(args(&["tank"]).unwrap().shapes().unwrap().len(), 8);
        assert!(args(&["tank", "--all"]).unwrap().shapes().unwrap().len() > 8);
        let two = args(&["tank", "--shape", "mixed,seqread"]).unwrap().shapes().unwrap();
        assert_eq!(two.iter().map(|shape| shape.name.as_str()).collect::<Vec<_>>(), ["mixed", "seqread"]);
        for wrong in [
            &["tank", "--shape", "mixed", "--queue-depth", "4"][..],
            &["tank", "--all", "--shape", "mixed"],
            &["tank", "--random", "--sequential"],
            &["tank", "--block-size", "513"],
            &["tank", "--block-size", "0"],
            &["tank", "--read-percent", "101"],
            &["tank", "--queue-depth", "0"],
            &["tank", "--seconds", "0"],
            &["tank", "--region", "10"],
            &[],
        ] {
            assert_eq!(args(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
        for wrong in [&["tank", "--shape", "fast"][..], &["tank", "--fua"], &["tank", "--block-size", "16MiB"]] {
            assert_eq!(args(wrong).unwrap().shapes().unwrap_err().status(), 2, "{wrong:?}");
        }
    }
}
