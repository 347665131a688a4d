//! A run: cluster up, faults under load, everything healed, everything read back, the verdict.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cli::config::Cluster;
use cli::load::meter::Slow;
use cli::load::{Load, LoadSpec, Measured};
use cli::{render, verify};
use client::block::SECTOR;
use client::control::ControlClient;
use client::iscsi::iqn;
use proto::cluster::VolumeSpec;
use proto::id::VolumeId;

use super::Options;
use super::lab::{Kind as Role, Lab, Place};
use super::plan::{Book, Deed, Draw, Kind, Plan};
use super::race::{self, Race};
use super::report::{self, Past};
use super::watch::{Seen, Watch};

const VOLUME: &str = "chaos";
const SIZE: u64 = 192 << 20;
const MIRRORS: u32 = 3;
const CHUNK: u32 = 64 << 10;
/// Bytes that the load works on; the rest stays zero but for the race's end.
const AREA: u64 = 48 << 20;
const SESSIONS: usize = 3;
const DEPTH: usize = 9;
const PAUSE: Duration = Duration::from_millis(4);
/// A gateway that answers no ping for so long is given up by the initiators.
const PING: Duration = Duration::from_secs(3);
/// How long the target may be away at a stretch.
const PATIENCE: Duration = Duration::from_secs(120);
/// Faults come in rounds; after each everything must come back.
const ROUND: Duration = Duration::from_secs(30);
/// How long that may take.
const CALM_PATIENCE: Duration = Duration::from_secs(180);
/// How long the cluster may take to come up.
const UP_PATIENCE: Duration = Duration::from_secs(60);
/// How long an export may be asked for.
const EXPORT_PATIENCE: Duration = Duration::from_secs(60);
/// How long one drill's fault lasts.
const DRILL: Duration = Duration::from_secs(30);
/// The cluster must be well for so long before a drill.
const DRILL_REST: Duration = Duration::from_secs(4);
/// Commands that the report names one by one, the longest first.
const LONGEST_TOLD: usize = 5;
const TICK: Duration = Duration::from_millis(10);

/// The time of day, as the members' logs have it.
pub(super) fn clock(at: SystemTime) -> String {
    let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let day = at.as_secs() % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}", day / 3600, day / 60 % 60, day % 60, at.subsec_millis())
}

fn say(text: impl std::fmt::Display) {
    render::line(format!("{} {text}", clock(SystemTime::now())));
}

/// A fault that is in force.
struct Active {
    kind: Kind,
    deed: Deed,
    from: Instant,
    until: Instant,
    what: String,
}

struct Chaos {
    lab: Lab,
    cluster: Cluster,
    volume: VolumeId,
    watch: Watch,
    load: Load,
    race: Race,
    book: Book,
    active: Vec<Active>,
    past: Vec<Past>,
    slow: Vec<Slow>,
    /// The load until now.
    sum: Measured,
    withheld: BTreeMap<&'static str, u64>,
    peak_kib: BTreeMap<Place, u64>,
    /// When the last fault ended.
    healed: Instant,
}

/// Runs it all. The process must be alone in its namespaces.
///
/// # Errors
/// When anything was lost, or did not come back.
pub async fn run(options: &Options) -> Result<()> {
    let mut chaos = up(options).await?;
    let began = Instant::now();
    let outcome = match options.drills {
        true => chaos.drills().await,
        false => chaos.rounds(options).await,
    };
    let outcome = match outcome {
        Ok(()) => chaos.end().await,
        Err(error) => Err(error),
    };
    chaos.report(began.elapsed());
    if outcome.is_err() {
        if let Some(seen) = chaos.watch.last() {
            say(format!("seen last, {:.1} s ago:\n{}", seen.asked.elapsed().as_secs_f64(), seen.table));
        }
        chaos.load.wrong().1.iter().for_each(say);
        chaos.lab.keep_disks();
    }
    outcome
}

async fn up(options: &Options) -> Result<Chaos> {
    let mut lab = Lab::set_up(&options.dir, options.gateways)?;
    let mut voters = lab.of(Role::Node);
    voters.extend(lab.of(Role::Witness));
    for place in &voters {
        lab.start(*place)?;
    }
    let until = Instant::now() + UP_PATIENCE;
    let failed = |lab: &mut Lab, what: String| match lab.ended() {
        Some(ended) => anyhow!("{ended}"),
        None => anyhow!("{what}"),
    };
    while let Err(error) = ControlClient::init(&lab.definition).await {
        if Instant::now() > until {
            return Err(failed(&mut lab, format!("forming the cluster: {error}")));
        }
        tokio::time::sleep(TICK).await;
    }
    for place in lab.of(Role::Gateway) {
        lab.start(place)?;
    }
    let patience = Duration::from_secs(3);
    let find = || Cluster::with_patience(Some(&lab.config_path()), patience).map_err(|failure| anyhow!("{failure}"));
    let (cluster, watched) = (find()?, find()?);
    let pools = lab.of(Role::Node).len() * 3;
    loop {
        let ready = cluster.status(false).await.is_ok_and(|status| {
            status.view.pools.len() == pools && status.view.gateways.len() == lab.of(Role::Gateway).len()
        });
        if ready {
            break;
        }
        if Instant::now() > until {
            return Err(failed(&mut lab, "the cluster did not become ready".into()));
        }
        tokio::time::sleep(TICK).await;
    }
    let first = lab.of(Role::Gateway)[0];
    let spec = VolumeSpec {
        name: VOLUME.into(),
        size: SIZE,
        replicas: 3,
        stripes: MIRRORS,
        chunk_size: CHUNK,
        min_in_sync: 1,
        write_cache: true,
        export: Some(lab.name(first).to_owned()),
    };
    cli::volume::make(&cluster, spec).await.map_err(|failure| anyhow!("{failure}"))?;
    let volume = cluster.control.volume_named(VOLUME).await?.id;
    let portals: Vec<_> = lab.of(Role::Gateway).iter().map(|place| lab.members[*place].portal()).collect();
    let spec = LoadSpec {
        depth: DEPTH,
        sessions: SESSIONS,
        other_portals: portals[1..].to_vec(),
        ping: Some(PING),
        area: Some(AREA),
        pause: PAUSE,
        patience: PATIENCE,
        ..LoadSpec::new(portals[0], iqn(VOLUME), options.seed)
    };
    let load = Load::start(spec).await?;
    let sectors = load.device_bytes() / SECTOR;
    let race = Race::start(&portals, &iqn(VOLUME), sectors, options.seed, PING, PATIENCE);
    let watch = Watch::start(watched, &lab, VOLUME);
    let book = Book::new(&lab);
    Ok(Chaos {
        cluster,
        volume,
        watch,
        load,
        race,
        book,
        active: Vec::new(),
        past: Vec::new(),
        slow: Vec::new(),
        sum: Measured::default(),
        withheld: BTreeMap::new(),
        peak_kib: BTreeMap::new(),
        healed: Instant::now(),
        lab,
    })
}

impl Chaos {
    async fn rounds(&mut self, options: &Options) -> Result<()> {
        let mut plan = Plan::new(options.seed, &options.only);
        let end = Instant::now() + options.lasts;
        self.calm().await?;
        let mut crowded = false;
        while Instant::now() < end {
            let round = end.min(Instant::now() + ROUND);
            while Instant::now() < round {
                let draw = plan.draw();
                self.wait(draw.gap).await?;
                self.try_it(&draw)?;
                // Every other round has one fault at a time, so that what each costs is seen.
                while !crowded && !self.active.is_empty() {
                    self.wait(TICK).await?;
                }
                if !crowded {
                    self.wait(report::AFTERMATH).await?;
                }
            }
            self.calm().await?;
            crowded = !crowded;
        }
        Ok(())
    }

    /// Each long fault alone, with how long the longest command took and how long the way back was.
    async fn drills(&mut self) -> Result<()> {
        let drill = |kind, picks| Draw::drill(kind, DRILL, picks);
        let drills = [
            ("a node is stopped", drill(Kind::StopNodeLong, [1, 0, 0])),
            ("the raft leader is stopped", drill(Kind::StopLeader, [0, 0, 0])),
            ("a node is cut off", drill(Kind::IsolateNode, [1, 0, 0])),
            ("cut, gateway to node", drill(Kind::CutGatewayNodeOneWay, [1, 0, 0])),
            ("cut, node to gateway", drill(Kind::CutGatewayNodeOneWay, [1, 0, 1])),
            ("the raft leader is cut off", drill(Kind::IsolateLeader, [0, 0, 0])),
            ("the gateway is stopped", drill(Kind::StopGatewayLong, [0, 0, 0])),
            ("the gateway is cut off from the cluster", drill(Kind::IsolateGateway, [0, 0, 0])),
            ("a node's disk is full", drill(Kind::FullDisk, [1, 0, 0])),
        ];
        let mut lines = Vec::new();
        for (name, draw) in drills {
            self.calm().await?;
            self.wait(DRILL_REST).await?;
            self.measure();
            ensure!(self.try_it(&draw)?, "the drill could not be done: {name}");
            self.wait(DRILL - Duration::from_millis(100)).await?;
            let during = self.measure();
            let in_sync = self.watch.last().map_or(0, |seen| seen.in_sync.len());
            while !self.active.is_empty() {
                self.wait(TICK).await?;
            }
            let (healed, nodes) = (self.healed, self.lab.of(Role::Node).len());
            while !self.watch.last().is_some_and(|seen| seen.asked > healed && seen.is_well(nodes)) {
                ensure!(healed.elapsed() < CALM_PATIENCE, "not in sync {CALM_PATIENCE:?} after: {name}");
                self.wait(TICK).await?;
            }
            let back = healed.elapsed();
            let after = self.calm().await?;
            lines.push([
                name.to_owned(),
                format!("{:.0} ms", during.longest_ms),
                during.commands.to_string(),
                in_sync.to_string(),
                format!("{:.0} ms", after.longest_ms),
                format!("{:.1} s", back.as_secs_f64()),
            ]);
            say(lines.last().expect("just added").join("  "));
        }
        let header =
            ["FAULT FOR 30 S", "LONGEST COMMAND", "ANSWERED", "NODES IN SYNC", "LONGEST AFTERWARDS", "IN SYNC AFTER"];
        render::line(format!("\n{}", render::table(header, lines)));
        Ok(())
    }

    /// Does a fault, if it makes sense now and the book allows it.
    fn try_it(&mut self, draw: &Draw) -> Result<bool> {
        let Some(seen) = self.watch.last() else { bail!("the cluster never said how it is") };
        let allowed = draw.resolve(&self.lab, &seen).and_then(|deed| {
            self.book.allows(&deed, &self.lab)?;
            Ok(deed)
        });
        let deed = match allowed {
            Ok(deed) => deed,
            Err(why) => {
                *self.withheld.entry(why).or_default() += 1;
                return Ok(false);
            }
        };
        self.begin(draw, deed)?;
        Ok(true)
    }

    fn begin(&mut self, draw: &Draw, deed: Deed) -> Result<()> {
        let from = Instant::now();
        let what = deed.describe(&self.lab);
        say(format!("{}: {what}, for {:.1} s", draw.kind.name(), draw.lasts.as_secs_f64()));
        self.book.begins(&deed, &self.lab);
        for place in deed.kill.iter().chain(&deed.stop) {
            self.note_memory(*place);
        }
        deed.kill.iter().try_for_each(|place| self.lab.kill(*place))?;
        deed.stop.iter().try_for_each(|place| self.lab.stop(*place, true))?;
        deed.cut.iter().try_for_each(|(from, to)| self.lab.cut(*from, *to))?;
        if let Some((a, b)) = deed.reset {
            tokio::task::block_in_place(|| self.lab.reset(a, b))?;
        }
        deed.fill.iter().try_for_each(|place| self.lab.fill(*place))?;
        if let Some(gateway) = deed.export {
            self.export(self.lab.name(gateway).to_owned());
        }
        let until = Instant::now() + draw.lasts;
        self.active.push(Active { kind: draw.kind, deed, from, until, what });
        Ok(())
    }

    fn export(&self, gateway: String) {
        let (control, volume) = (self.cluster.control.clone(), self.volume);
        tokio::spawn(async move {
            let until = Instant::now() + EXPORT_PATIENCE;
            loop {
                match control.export_volume(volume, Some(&gateway)).await {
                    Ok(_) => return,
                    Err(error) if Instant::now() > until => {
                        return say(format!("the volume could not be exported on {gateway}: {error}"));
                    }
                    Err(_) => tokio::time::sleep(TICK).await,
                }
            }
        });
    }

    fn undo(&mut self, active: Active) -> Result<()> {
        let Active { kind, deed, from, what, .. } = active;
        deed.cut.iter().try_for_each(|(from, to)| self.lab.heal(*from, *to))?;
        deed.stop.iter().try_for_each(|place| self.lab.stop(*place, false))?;
        deed.kill.iter().try_for_each(|place| self.lab.start(*place))?;
        deed.fill.iter().try_for_each(|place| tokio::task::block_in_place(|| self.lab.unfill(*place)))?;
        self.book.ended(&deed, &self.lab);
        self.past.push(Past { kind, from, to: Instant::now() });
        self.healed = Instant::now();
        if !deed.cut.is_empty() || !deed.stop.is_empty() || !deed.kill.is_empty() || deed.fill.is_some() {
            say(format!("  over: {}: {what}", kind.name()));
        }
        Ok(())
    }

    /// Lets time pass, ends the faults whose time has come, and looks whether all is right.
    async fn wait(&mut self, how_long: Duration) -> Result<()> {
        let until = Instant::now() + how_long;
        loop {
            let now = Instant::now();
            let over = |active: &Active| active.until <= now;
            while let Some(at) = self.active.iter().position(over) {
                let active = self.active.swap_remove(at);
                self.undo(active)?;
            }
            if let Some(ended) = self.lab.ended() {
                bail!("{ended}");
            }
            self.load.check()?;
            self.race.check()?;
            if let Some(seen) = self.watch.last() {
                self.book.saw(&seen);
            }
            if Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Waits until no fault is in force, every node is in sync, and commands are answered. Returns what the load did
    /// since it was measured last.
    async fn calm(&mut self) -> Result<Measured> {
        while !self.active.is_empty() {
            self.wait(TICK).await?;
        }
        let (began, before) = (Instant::now(), self.load.commands());
        let nodes = self.lab.of(Role::Node).len();
        let well = |seen: &Seen, healed: Instant| seen.asked > healed && seen.is_well(nodes);
        loop {
            self.wait(TICK).await?;
            let seen = self.watch.last();
            let calm = seen.as_ref().is_some_and(|seen| well(seen, self.healed)) && self.book.is_calm();
            if calm && self.load.commands() > before {
                break;
            }
            if began.elapsed() > CALM_PATIENCE {
                let answered = self.load.commands() - before;
                let seen = seen.map_or("nothing".into(), |seen| format!("{:?}\n{}", seen.in_sync, seen.table));
                bail!("{CALM_PATIENCE:?} after the last fault: {answered} commands answered; in sync: {seen}");
            }
        }
        let measured = self.measure();
        say(format!("  calm: everything is in sync {:.1} s after the last fault", self.healed.elapsed().as_secs_f64()));
        Ok(measured)
    }

    /// What the load did since the last call.
    fn measure(&mut self) -> Measured {
        self.slow.extend(self.load.take_slow());
        let measured = self.load.take();
        self.sum.commands += measured.commands;
        self.sum.reconnects += measured.reconnects;
        self.sum.longest_ms = self.sum.longest_ms.max(measured.longest_ms);
        measured
    }

    async fn end(&mut self) -> Result<()> {
        say("everything is read back");
        tokio::time::timeout(CALM_PATIENCE, self.load.stop()).await.context("the load's last commands")??;
        tokio::time::timeout(CALM_PATIENCE, self.race.finish()).await.context("the race's last requests")??;
        self.load.read_back(Some(SIZE - race::SECTORS * SECTOR)).await?;
        say("all replicas are compared");
        let found =
            verify::compare(&self.cluster, VOLUME, false, true).await.map_err(|failure| anyhow!("{failure}"))?;
        let (differences, skipped) = (found.differences, found.skipped.len());
        ensure!(differences == 0, "{differences} blocks differ between replicas");
        ensure!(skipped == 0, "{skipped} replicas could not be compared");
        for place in 0..self.lab.members.len() {
            self.note_memory(place);
            let log = std::fs::read(self.lab.log_file(place))?;
            let log = String::from_utf8_lossy(&log);
            if let Some(line) = log.lines().find(|line| line.contains("panicked at")) {
                bail!("{}: {line}", self.lab.name(place));
            }
        }
        Ok(())
    }

    fn note_memory(&mut self, place: Place) {
        if let Some(kib) = self.lab.peak_kib(place) {
            let peak = self.peak_kib.entry(place).or_default();
            *peak = (*peak).max(kib);
        }
    }

    fn report(&mut self, took: Duration) {
        self.measure();
        let measured = self.sum;
        let (raced, lost) = self.race.counts();
        let active = self.active.iter().map(|active| Past { kind: active.kind, from: active.from, to: Instant::now() });
        let past: Vec<Past> = self.past.iter().copied().chain(active).collect();
        let header = ["FAULT", "TIMES", "LONGEST COMMAND, ALONE", "WITH OTHERS"];
        render::line(format!("\n{}", render::table(header, report::stalls(&past, &self.slow))));
        self.slow.sort_by_key(|command| std::cmp::Reverse(command.took));
        for command in self.slow.iter().take(LONGEST_TOLD) {
            let issued = SystemTime::now() - command.issued.elapsed();
            render::line(format!("{} a command took {} ms", clock(issued), command.took.as_millis()));
        }
        for (why, times) in &self.withheld {
            render::line(format!("withheld {times} times: {why}"));
        }
        let sessions = self.watch.sessions();
        let moves = sessions.windows(2).filter(|pair| pair[0].1 != pair[1].1).count();
        render::line(format!(
            "{} faults in {} s; {} commands answered, {raced} of racing initiators ({lost} lost with their session); \
             {} sessions of the volume seen, {moves} moves to the other gateway; {} new logins; longest command {:.0} ms",
            past.len(),
            took.as_secs(),
            measured.commands,
            sessions.len(),
            measured.reconnects,
            measured.longest_ms,
        ));
        let peaks = self.peak_kib.iter().map(|(place, kib)| format!("{} {} MiB", self.lab.name(*place), kib >> 10));
        render::line(format!("most memory: {}", peaks.collect::<Vec<_>>().join(", ")));
    }
}
