//! What is measured, part by part.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cli::bench::figures::{Figures, median};
use cli::bench::over_iscsi::{self, Plan};
use cli::bench::pids::Reading;
use cli::bench::shape::{self, Shape};
use cli::bench::target::{Portal, Round};
use rustix::process::Signal;

use super::Options;
use super::peers::{Md99, Tgtd, signal};
use super::results::{By, Line, Results, medians};

/// The parts of a run.
pub const PARTS: [&str; 7] = ["compare", "rest", "durable", "stalls", "resync", "yield", "scale"];
/// What is measured is called so; others by their names.
pub(super) const MD99: &str = "md99";
const TGTD: &str = "tgtd";
const FANOUT: &str = "fan-out";
/// Of time series: fine enough to tell what happened during a resync.
const INTERVAL: Duration = Duration::from_millis(100);
/// A load runs so long before something is done to it.
const BEFORE: Duration = Duration::from_millis(700);
/// A load under which a node is killed.
const KILL_LOAD: Duration = Duration::from_millis(2500);
/// How long a node is stopped, and the load on it.
const HANG: Duration = Duration::from_secs(5);
const HANG_LOAD: Duration = Duration::from_secs(8);
/// How long replicas may take to be in sync again.
const SYNC_PATIENCE: Duration = Duration::from_secs(300);
/// A resync that is slower, in MiB/s, yields too much to count.
const RESYNC_RATE: f64 = 20.0;
/// What is at rest after so long.
const SETTLE: Duration = Duration::from_secs(12);
/// Ceph 16.2 with three copies behind tgt on a machine of two processors: all in memory at depth 1 and 32, and durable
/// on a disk at depth 1.
const CEPH_MEMORY: (f64, f64) = (1094.0, 1886.0);
const CEPH_DURABLE: f64 = 439.0;
/// Of these the fan-out is the bound: bytes and depth.
const FANOUTS: [(&str, usize, usize); 4] =
    [("randwrite1", 4 << 10, 1), ("randwrite32", 4 << 10, 32), ("mixed", 64 << 10, 16), ("seqwrite", 1 << 20, 8)];

pub(super) struct Run<'a> {
    pub options: &'a Options,
    never: Arc<AtomicBool>,
    seed: u64,
    pub results: Results,
}

pub(super) fn say(text: &str) {
    eprintln!("bench: {text}");
}

/// One of the figures.
type Get = fn(&Figures) -> f64;

/// How long a load is.
#[derive(Clone, Copy)]
pub(super) enum Length {
    Time(Duration),
    Bytes(u64),
}

pub(super) fn shape(name: &str) -> Shape {
    shape::named().into_iter().find(|shape| shape.name == name).expect("a named shape")
}

/// Measures everything that the options ask for.
///
/// # Errors
/// When something does not come up, or requests fail where none may.
pub async fn run(options: &Options) -> anyhow::Result<Results> {
    let mut run = Run { options, never: Arc::default(), seed: 1, results: Results::default() };
    let wants = |part: &str| options.only.is_empty() || options.only.iter().any(|only| only == part);
    if ["compare", "rest", "stalls", "resync", "yield"].iter().any(|part| wants(part)) {
        say("starting three nodes, two witnesses and a gateway in memory");
        let size = options.region * 2;
        let md99 = Md99::start(&options.program, &options.memory, size, true)?;
        run.fill(&md99.portal).await?;
        if wants("compare") {
            run.compare(&md99).await?;
        }
        if wants("rest") {
            run.rest(&md99).await?;
        }
        if wants("stalls") {
            run.stalls(&md99).await?;
        }
        if wants("resync") {
            run.resync(&md99).await?;
        }
        if wants("yield") {
            run.yields(&md99).await?;
        }
    }
    if wants("durable") {
        run.durable().await?;
    }
    if wants("scale") {
        run.scale().await?;
    }
    Ok(run.results)
}

impl Run<'_> {
    pub async fn load(&mut self, portal: &Portal, shape: &Shape, region: u64, length: Length) -> anyhow::Result<Round> {
        self.seed += 1;
        self.sessions(portal, shape, region, length, 1, self.seed).await
    }

    /// A round, and what it takes of these processes.
    pub async fn watched(
        &mut self,
        portal: &Portal,
        pids: &[u32],
        shape: &Shape,
        region: u64,
    ) -> anyhow::Result<Round> {
        let before = Reading::take(pids);
        let mut round = self.load(portal, shape, region, Length::Time(self.options.time)).await?;
        round.processes(&before, &Reading::take(pids));
        Ok(round)
    }

    /// A load over so many sessions.
    pub async fn sessions(
        &self,
        portal: &Portal,
        shape: &Shape,
        region: u64,
        length: Length,
        sessions: usize,
        seed: u64,
    ) -> anyhow::Result<Round> {
        let (time, total) = match length {
            Length::Time(time) => (time, None),
            Length::Bytes(bytes) => (Duration::ZERO, Some(bytes)),
        };
        let plan = Plan { shape, region, sessions, time, total, seed, interval: INTERVAL, stop: &self.never };
        let round = over_iscsi::run(portal, &plan).await.map_err(|failure| anyhow::anyhow!("{failure}"))?;
        if let Some(error) = &round.counts.first_error {
            let failed = round.counts.errors + round.counts.unanswered;
            anyhow::bail!("{} at {}: {failed} requests failed, the first: {error}", shape.name, portal.url);
        }
        Ok(round)
    }

    /// Writes everything once, so that no figure is of unwritten space.
    async fn fill(&mut self, portal: &Portal) -> anyhow::Result<()> {
        let region = self.options.region;
        self.load(portal, &Shape::fill(1 << 20), region, Length::Bytes(region)).await.map(drop)
    }

    pub fn line(
        &mut self,
        figure: &'static str,
        by: By,
        value: f64,
        unit: &'static str,
        bound: Option<f64>,
        limits: (f64, f64),
    ) {
        let (floor, goal) = limits;
        self.results.lines.push(Line { figure, by, value, unit, bound, floor, goal, note: String::new() });
    }

    pub fn note(&mut self, note: String) {
        if let Some(line) = self.results.lines.last_mut() {
            line.note = note;
        }
    }

    /// The fan-out, as a process of its own.
    fn fanout(&self, bytes: usize, depth: usize, sync: bool) -> anyhow::Result<Figures> {
        let dir = if sync { &self.options.disk } else { &self.options.memory };
        let mut command = Command::new(&self.options.fanout);
        command.arg("--dir").arg(dir).args(["--bytes", &bytes.to_string(), "--depth", &depth.to_string()]);
        command.args(["--seconds", &self.options.time.as_secs_f64().to_string()]).args(sync.then_some("--sync"));
        let output = command.output().context("cannot start the fan-out")?;
        ensure!(output.status.success(), "the fan-out: {}", String::from_utf8_lossy(&output.stderr).trim());
        let found: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let get = |key: &str| found[key].as_f64().unwrap_or(0.0);
        Ok(Figures {
            iops: get("iops"),
            mb_per_s: get("mb_per_s"),
            p50_us: get("p50_us"),
            p99_us: get("p99_us"),
            p999_us: get("p999_us"),
            max_us: get("max_us"),
            load_us_per_io: get("sender_us_per_op"),
            target_us_per_io: Some(get("sender_us_per_op") + get("sinks_us_per_op")),
            ..Figures::default()
        })
    }

    async fn compare(&mut self, md99: &Md99) -> anyhow::Result<()> {
        let options = self.options;
        let tgtd = match Tgtd::start(&options.memory, options.region) {
            Ok(tgtd) => Some(tgtd),
            Err(error) => {
                say(&format!("no tgtd to compare reads with: {error:#}"));
                None
            }
        };
        let mut others = Vec::new();
        for (name, program) in &options.also {
            say(&format!("starting {name}: {}", program.display()));
            others.push((name.clone(), Md99::start(program, &options.memory, options.region * 2, true)?));
        }
        let mut targets: Vec<(String, Portal, Vec<u32>)> = vec![(MD99.into(), md99.portal.clone(), md99.pids()?)];
        for (name, other) in &others {
            targets.push((name.clone(), other.portal.clone(), other.pids()?));
        }
        targets.extend(tgtd.as_ref().map(|tgtd| (TGTD.into(), tgtd.portal.clone(), vec![tgtd.pid()])));
        for (_, portal, _) in &targets[1..] {
            self.fill(portal).await?;
        }
        let mut rounds = Vec::new();
        let mut memory: f64 = 0.0;
        for number in 1..=options.rounds {
            for shape in shape::usual() {
                say(&format!("round {number} of {}: {}", options.rounds, shape.name));
                for (name, portal, pids) in &targets {
                    let round = self.watched(portal, pids, &shape, options.region).await?;
                    if name == MD99 {
                        memory = memory.max(round.figures.target_resident_bytes.unwrap_or(0.0));
                    }
                    rounds.push((shape.name.clone(), name.clone(), round.figures, round.counts.errors));
                }
                if let Some((_, bytes, depth)) = FANOUTS.iter().find(|(name, _, _)| *name == shape.name) {
                    rounds.push((shape.name.clone(), FANOUT.into(), self.fanout(*bytes, *depth, false)?, 0));
                }
            }
        }
        self.results.measured.extend(medians(&rounds));
        let iops: Get = |figures| figures.iops;
        let mb: Get = |figures| figures.mb_per_s;
        for (figure, shape, target, unit, get, limits) in [
            ("4k random write QD1", "randwrite1", FANOUT, "IOPS", iops, (0.4, 0.6)),
            ("4k random write QD32", "randwrite32", FANOUT, "IOPS", iops, (0.5, 0.8)),
            ("4k random read QD1", "randread1", TGTD, "IOPS", iops, (0.45, 0.7)),
            ("4k random read QD32", "randread32", TGTD, "IOPS", iops, (0.6, 1.0)),
            ("64k 70/30 QD16", "mixed", FANOUT, "MB/s", mb, (0.7, 1.0)),
            ("1M sequential write QD8", "seqwrite", FANOUT, "MB/s", mb, (0.5, 0.8)),
            ("1M sequential read QD8", "seqread", TGTD, "MB/s", mb, (0.65, 1.0)),
        ] {
            let own = self.results.find(shape, MD99).map_or(0.0, get);
            let bound = self.results.find(shape, target).map(get);
            let by = if target == FANOUT { By::Fanout } else { By::Tgtd };
            self.line(figure, by, own, unit, bound, limits);
            if shape == "mixed" {
                self.note("the bound only writes".into());
            }
        }
        for (figure, shape, ceph, limits) in [
            ("4k random write QD1", "randwrite1", CEPH_MEMORY.0, (5.0, 8.0)),
            ("4k random write QD32", "randwrite32", CEPH_MEMORY.1, (7.0, 11.0)),
        ] {
            let own = self.results.find(shape, MD99).map_or(0.0, iops);
            self.line(figure, By::Anchor, own, "IOPS", Some(ceph), limits);
            self.note("another run, another day: a rough measure only".into());
        }
        let cpu = self.results.find("randwrite32", MD99).and_then(|figures| figures.target_us_per_io);
        self.line("CPU per 4k write QD32, all daemons", By::AtMost, cpu.unwrap_or(0.0), "us", None, (110.0, 70.0));
        self.line(
            "resident memory under load, all daemons",
            By::AtMost,
            memory / f64::from(1 << 20),
            "MiB",
            None,
            (400.0, 200.0),
        );
        Ok(())
    }

    async fn rest(&mut self, md99: &Md99) -> anyhow::Result<()> {
        say(&format!("at rest for {} s", (SETTLE + self.options.rest).as_secs()));
        tokio::time::sleep(SETTLE).await;
        let processes = md99.processes()?;
        let pids: Vec<u32> = processes.iter().map(|(_, pid)| *pid).collect();
        let before: Vec<Reading> = pids.iter().map(|pid| Reading::take(&[*pid])).collect();
        let began = Instant::now();
        tokio::time::sleep(self.options.rest).await;
        let seconds = began.elapsed().as_secs_f64();
        let after: Vec<Reading> = pids.iter().map(|pid| Reading::take(&[*pid])).collect();
        let percent: Vec<f64> = after
            .iter()
            .zip(&before)
            .map(|(after, before)| after.since(before).as_secs_f64() * 100.0 / seconds)
            .collect();
        self.line("CPU at rest, whole cluster", By::AtMost, percent.iter().sum(), "% of a core", None, (2.0, 0.5));
        let each = processes
            .iter()
            .zip(percent.iter().zip(&after))
            .map(|((name, _), (percent, after))| format!("{name} {percent:.2} % {} MiB", after.resident_bytes >> 20));
        let each = each.collect::<Vec<_>>().join(", ");
        self.results.notes.push(format!("At rest: {each}."));
        Ok(())
    }

    async fn stalls(&mut self, md99: &Md99) -> anyhow::Result<()> {
        let options = self.options;
        let writes = shape("randwrite1");
        let mut longest = Vec::new();
        for number in 0..options.kills {
            let name = format!("node-{}", number % 3 + 1);
            say(&format!("kill {} of {}: {name}", number + 1, options.kills));
            let pid = md99.pid(&name)?;
            let killer = thread::spawn(move || {
                thread::sleep(BEFORE);
                signal(pid, Signal::KILL);
            });
            let round = self.load(&md99.portal, &writes, options.region, Length::Time(KILL_LOAD)).await;
            killer.join().expect("it only sleeps and signals");
            longest.push(round?.figures.max_us / 1e3);
            md99.start_part(&name)?;
            md99.in_sync(SYNC_PATIENCE).await?;
        }
        self.stall("longest stall, node killed (median)", longest, (100.0, 50.0));
        let mut longest = Vec::new();
        for number in 0..options.hangs {
            let name = format!("node-{}", number % 3 + 1);
            say(&format!("hang {} of {}: {name}", number + 1, options.hangs));
            let pid = md99.pid(&name)?;
            let stopper = thread::spawn(move || {
                thread::sleep(BEFORE);
                signal(pid, Signal::STOP);
                thread::sleep(HANG);
                signal(pid, Signal::CONT);
            });
            let round = self.load(&md99.portal, &writes, options.region, Length::Time(HANG_LOAD)).await;
            stopper.join().expect("it only sleeps and signals");
            longest.push(round?.figures.max_us / 1e3);
            md99.in_sync(SYNC_PATIENCE).await?;
        }
        self.stall("longest stall, node hung (median)", longest, (2500.0, 1500.0));
        Ok(())
    }

    fn stall(&mut self, what: &'static str, longest: Vec<f64>, bounds: (f64, f64)) {
        if longest.is_empty() {
            return;
        }
        let (of, worst) = (longest.len(), longest.iter().copied().fold(0.0, f64::max));
        self.line(what, By::AtMost, median(longest), "ms", None, bounds);
        self.note(format!("of {of}, the worst {worst:.0} ms"));
    }

    /// Kills a node and lets it miss writes.
    async fn miss(&mut self, md99: &Md99, name: &str) -> anyhow::Result<()> {
        signal(md99.pid(name)?, Signal::KILL);
        let (region, missed) = (self.options.region, self.options.missed);
        self.load(&md99.portal, &shape("randwrite32"), region, Length::Bytes(missed)).await.map(drop)
    }

    /// Bytes of the region that so many random writes have changed.
    fn changed(&self) -> f64 {
        let (region, missed) = (self.options.region as f64, self.options.missed as f64);
        region * (1.0 - (-missed / region).exp())
    }

    async fn resync(&mut self, md99: &Md99) -> anyhow::Result<()> {
        let options = self.options;
        let mib = |bytes: u64| bytes >> 20;
        say(&format!("a node misses {} MiB of 4k random writes in {} MiB", mib(options.missed), mib(options.region)));
        self.miss(md99, "node-2").await?;
        let began = Instant::now();
        md99.start_part("node-2")?;
        md99.committed(SYNC_PATIENCE).await?;
        let seconds = began.elapsed().as_secs_f64();
        md99.in_sync(SYNC_PATIENCE).await?;
        self.line("resync, without other load", By::AtMost, seconds, "s", None, (5.0, 2.0));
        let rate = self.changed() / f64::from(1 << 20) / seconds;
        self.note(format!(
            "{} MiB of 4k writes missed in {} MiB; with the node's start; {rate:.0} MiB/s",
            mib(options.missed),
            mib(options.region)
        ));
        Ok(())
    }

    /// What a resync takes from a full load.
    async fn yields(&mut self, md99: &Md99) -> anyhow::Result<()> {
        let options = self.options;
        say("a resync under full load");
        let writes = shape("randwrite32");
        let alone = self.load(&md99.portal, &writes, options.region, Length::Time(options.time)).await?;
        self.miss(md99, "node-2").await?;
        // The load is long enough for any resync that fits its floor, and ends with it or with its time.
        let time = Duration::from_secs_f64((self.changed() / f64::from(1 << 20) / RESYNC_RATE).clamp(4.0, 30.0) + 3.0);
        thread::scope(|scope| -> anyhow::Result<()> {
            let resync = scope.spawn(|| -> anyhow::Result<(f64, f64)> {
                let began = Instant::now();
                md99.start_part("node-2")?;
                let joined = began.elapsed().as_secs_f64();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(md99.committed(SYNC_PATIENCE))?;
                Ok((joined, began.elapsed().as_secs_f64()))
            });
            let handle = tokio::runtime::Handle::current();
            let round = tokio::task::block_in_place(|| {
                handle.block_on(self.load(&md99.portal, &writes, options.region, Length::Time(time)))
            })?;
            let (joined, in_sync) = resync.join().expect("it does not panic")?;
            let during: Vec<f64> = (round.series.iter())
                .filter(|point| point.at_s >= joined && point.at_s + point.seconds <= in_sync)
                .map(|point| point.iops)
                .collect();
            let mean = during.iter().sum::<f64>() / during.len().max(1) as f64;
            // Before and after it: the machine is not as fast all the time.
            let again = tokio::task::block_in_place(|| {
                handle.block_on(async {
                    md99.in_sync(SYNC_PATIENCE).await?;
                    self.load(&md99.portal, &writes, options.region, Length::Time(options.time)).await
                })
            })?;
            let alone = f64::midpoint(alone.figures.iops, again.figures.iops);
            let loss = (1.0 - mean / alone) * 100.0;
            self.line("foreground loss while a resync runs", By::AtMost, loss, "%", None, (15.0, 5.0));
            let rate = self.changed() / f64::from(1 << 20) / (in_sync - joined).max(1e-3);
            let doubt = match () {
                () if during.len() < 5 => "; TOO SHORT to tell",
                () if rate < RESYNC_RATE => "; SLOWER than what counts",
                () => "",
            };
            self.note(format!(
                "{mean:.0} of {alone:.0} IOPS (4k writes QD32) for {:.1} s, {rate:.0} MiB/s{doubt}",
                in_sync - joined
            ));
            Ok(())
        })
    }

    async fn durable(&mut self) -> anyhow::Result<()> {
        let options = self.options;
        say(&format!("starting a cluster on the disk, in {}, with --write-cache off", options.disk.display()));
        let region = options.region.min(256 << 20);
        let md99 = Md99::start(&options.program, &options.disk, region * 2, false)?;
        self.load(&md99.portal, &Shape::fill(1 << 20), region, Length::Bytes(region)).await?;
        let pids = md99.pids()?;
        let mut rounds = Vec::new();
        for number in 1..=options.rounds {
            for (shape, depth) in [(shape("randwrite1"), 1), (shape("randwrite32"), 32)] {
                say(&format!("durable, round {number} of {}: {}", options.rounds, shape.name));
                let name = format!("{} durable", shape.name);
                let round = self.watched(&md99.portal, &pids, &shape, region).await?;
                rounds.push((name.clone(), MD99.into(), round.figures, round.counts.errors));
                rounds.push((name, FANOUT.into(), self.fanout(4 << 10, depth, true)?, 0));
            }
        }
        self.results.measured.extend(medians(&rounds));
        let one = "randwrite1 durable";
        let own = self.results.find(one, MD99).map_or(0.0, |figures| figures.iops);
        self.line("durable 4k write QD1", By::Anchor, own, "IOPS", Some(CEPH_DURABLE), (5.0, 8.0));
        let bound = self.results.find(one, FANOUT).map_or(0.0, |figures| figures.iops);
        let percent = own / bound.max(1e-9) * 100.0;
        self.note(format!("another disk; {percent:.0} % of a fan-out that syncs each message ({bound:.0} IOPS)"));
        Ok(())
    }
}
