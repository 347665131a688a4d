//! The cuts, and what must hold after each.
//!
//! Every cut comes at a random moment of the load, from a cluster that is in sync, or while the machines that were cut
//! last come back. Where a node goes on, so does the load. Nothing that was acknowledged may be lost, unless all nodes
//! are cut and the gateway dies with them: then what was not flushed may be gone. After each cut all replicas must be
//! in sync again and the whole volume is read back; at the end they are compared block by block.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use cli::load::run::LoadError;
use cli::load::{Load, LoadSpec, Mix, Rng, UnderWay};
use tokio::time::Instant;

use super::Args;
use super::machine::HOST;
use super::setup::{LOGS, LOOK_EVERY, NODES, PATIENCE, Setup, VOLUME};

/// Requests under way.
const DEPTH: usize = 6;
/// The load stands still, once every node is away, when nothing was answered for so long.
const STILL: Duration = Duration::from_secs(1);
/// How long regions may take to become clean, in a rest.
const REST: Duration = Duration::from_secs(15);
/// The load goes on when it got so many more answers.
const GOES_ON: u64 = 20;

/// What is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    One,
    Two,
    All,
    Mixed,
}

impl Mode {
    /// From the command line.
    pub fn parse(word: &str) -> Result<Self> {
        Ok(match word {
            "one" => Self::One,
            "two" => Self::Two,
            "all" => Self::All,
            "mixed" => Self::Mixed,
            _ => bail!("is none of one, two, all and mixed"),
        })
    }
}

/// What is cut at the same moment.
#[derive(Clone, Debug)]
struct Victims {
    /// Places among the machines, in the order of their ends.
    machines: Vec<usize>,
    gateway: bool,
}

impl Victims {
    fn all(&self) -> bool {
        self.machines.len() == NODES as usize
    }

    fn words(&self) -> String {
        let nodes = self.machines.iter().map(|at| format!("node-{}", at + 1));
        nodes.chain(self.gateway.then(|| "gateway-1".into())).collect::<Vec<_>>().join(" ")
    }
}

fn shuffle<T>(rng: &mut Rng, list: &mut [T]) {
    for at in (1..list.len()).rev() {
        list.swap(at, rng.below(at as u64 + 1) as usize);
    }
}

struct Run {
    setup: Setup,
    load: Load,
    rng: Rng,
    mode: Mode,
    /// Mixed: how many nodes the next cuts take.
    next: Vec<usize>,
    began: Instant,
    done: usize,
    reported: u64,
}

/// Cuts as told, and judges.
pub async fn run(dir: &Path, args: &Args) -> Result<()> {
    let began = Instant::now();
    let mut rng = Rng::new(args.seed);
    println!("seed {}, mode {:?}, in {}", args.seed, args.mode, dir.display());
    let setup = Setup::new(dir, std::array::from_fn(|_| rng.below(2) == 0)).await?;
    println!("three machines and a cluster after {:.1} s", began.elapsed().as_secs_f64());
    let portal = format!("{HOST}:3260").parse()?;
    let load = LoadSpec {
        depth: DEPTH,
        mix: Mix { flush: 4, ..Mix::default() },
        patience: PATIENCE,
        ..LoadSpec::new(portal, client::iscsi::iqn(VOLUME), rng.draw())
    };
    let load = Load::start(load).await?;
    let (mode, next) = (args.mode, Vec::new());
    let mut run = Run { setup, load, rng, mode, next, began, done: 0, reported: 0 };
    let outcome = run.cuts(args.cuts).await;
    // Wrong bytes explain whatever else went wrong.
    if let Err(wrong @ LoadError::Wrong { .. }) = run.load.check() {
        run.load.wrong().1.iter().for_each(|line| println!("  {line}"));
        return Err(wrong.into());
    }
    outcome?;
    let Run { mut load, setup, done, .. } = run;
    load.stop().await?;
    let bytes = load.read_back(None).await?;
    load.log_out().await;
    let blocks = setup.compare().await?;
    for name in LOGS {
        let text = std::fs::read(dir.join(name)).with_context(|| name.to_owned())?;
        ensure!(!String::from_utf8_lossy(&text).contains("panicked"), "{name} tells of a panic");
    }
    println!("\n{bytes} bytes read back, {blocks} blocks of all replicas are equal");
    println!("verdict: {done} cuts, every byte was right ({:.0} s)", began.elapsed().as_secs_f64());
    Ok(())
}

impl Run {
    async fn cuts(&mut self, cuts: usize) -> Result<()> {
        self.in_sync().await?;
        for _ in 0..cuts {
            let mut victims = self.choose();
            let mut from = self.prepare().await?;
            while !self.setup.in_sync_without(&victims.machines).await {
                from = self.prepare().await?;
            }
            loop {
                self.cut(&victims, from).await?;
                // Now and then once more, while they boot, join or equalise. The others are left alone: they may be
                // all that have what the first cut took away, and must still be members.
                if self.rng.below(4) != 0 {
                    break;
                }
                self.pass(9_000).await?;
                if !self.setup.in_sync_without(&victims.machines).await {
                    break;
                }
                victims.gateway = victims.all() && self.takes_gateway();
                from = "while they came back";
            }
            self.recovered().await?;
        }
        Ok(())
    }

    fn choose(&mut self) -> Victims {
        if self.next.is_empty() {
            self.next = match self.mode {
                Mode::One => vec![1],
                Mode::Two => vec![2],
                Mode::All => vec![3],
                Mode::Mixed => vec![1, 2, 3],
            };
            shuffle(&mut self.rng, &mut self.next);
        }
        let count = self.next.pop().expect("it was filled");
        let mut machines: Vec<usize> = (0..NODES as usize).collect();
        shuffle(&mut self.rng, &mut machines);
        machines.truncate(count);
        let gateway = count == NODES as usize && self.takes_gateway();
        Victims { machines, gateway }
    }

    /// Whether the gateway dies with all nodes.
    fn takes_gateway(&mut self) -> bool {
        self.rng.below(3) == 0
    }

    /// A load of some time; in half of the cases after a rest, so that it begins in clean regions (R5, R6).
    async fn prepare(&mut self) -> Result<&'static str> {
        if self.rng.below(2) == 0 {
            self.load.set_active(DEPTH);
            self.pass(4_000).await?;
            self.in_sync().await?;
            return Ok("in sync");
        }
        self.load.set_active(0);
        let until = Instant::now() + REST;
        while self.setup.dirty().await != Some(0) && Instant::now() < until {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.in_sync().await?;
        self.load.set_active(DEPTH);
        self.pass(1_500).await?;
        Ok("in sync, after a rest")
    }

    /// Some time under load, up to so many milliseconds.
    async fn pass(&mut self, most: u64) -> Result<()> {
        tokio::time::sleep(Duration::from_millis(self.rng.below(most))).await;
        self.check()
    }

    fn check(&mut self) -> Result<()> {
        self.setup.check()?;
        Ok(self.load.check()?)
    }

    /// Waits until all replicas are in sync.
    async fn in_sync(&mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let Some(why) = self.setup.out_of_sync().await? else { return Ok(()) };
            self.check()?;
            ensure!(Instant::now() < until, "not in sync after {PATIENCE:?}:\n{why}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Cuts, shows that the others go on or that all stands still, and switches on again.
    async fn cut(&mut self, victims: &Victims, from: &str) -> Result<()> {
        let at = Instant::now();
        let UnderWay { reads, writes, unflushed } = self.load.under_way();
        // Only where acknowledged writes may be lost.
        self.load.let_flushes_fail(victims.gateway);
        for machine in &victims.machines {
            self.setup.machines[*machine].cut()?;
        }
        if victims.gateway {
            self.setup.gateway.kill()?;
        }
        for machine in &victims.machines {
            self.setup.machines[*machine].collect()?;
        }
        self.done += 1;
        println!(
            "{:4.0} s  cut {}: {}, {from}; {writes} writes and {reads} reads under way, {unflushed} writes not flushed",
            (at - self.began).as_secs_f64(),
            self.done,
            victims.words(),
        );
        if victims.all() {
            self.still().await?;
            if victims.gateway {
                self.load.caches_lost();
            }
            println!("        all stands still");
        } else {
            self.goes_on().await?;
            println!("        the load went on after {:.1} s", at.elapsed().as_secs_f64());
        }
        self.pass(2_000).await?;
        if victims.gateway {
            self.setup.gateway.start()?;
        }
        let mut order = victims.machines.clone();
        shuffle(&mut self.rng, &mut order);
        for machine in order {
            let lazy = self.rng.below(2) == 0;
            self.setup.machines[machine].boot(&self.setup.image, lazy)?;
            tokio::time::sleep(Duration::from_millis(self.rng.below(500))).await;
        }
        Ok(())
    }

    /// What was answered before the cut has been heard.
    async fn still(&mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let (mut seen, mut since) = (self.load.commands(), Instant::now());
        while since.elapsed() < STILL {
            self.check()?;
            ensure!(Instant::now() < until, "commands are answered while all nodes are away");
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.load.commands();
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
        }
        Ok(())
    }

    async fn goes_on(&mut self) -> Result<()> {
        let (until, goal) = (Instant::now() + PATIENCE, self.load.commands() + GOES_ON);
        while self.load.commands() < goal {
            self.check()?;
            ensure!(Instant::now() < until, "the load did not go on in {PATIENCE:?}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// All is as it was, and every byte is right.
    async fn recovered(&mut self) -> Result<()> {
        let began = Instant::now();
        // Some load, and time for the machines to do what they are watched at.
        self.load.set_active(DEPTH / 3);
        self.in_sync().await?;
        self.load.let_flushes_fail(false);
        let synced = began.elapsed();
        self.load.read_back(None).await.map_err(|error| anyhow!(error).context("reading everything back"))?;
        self.check()?;
        let answered = self.load.commands();
        let more = answered - std::mem::replace(&mut self.reported, answered);
        println!(
            "        in sync {:.1} s after it was switched on, all of it right after {:.1} s; {more} commands",
            synced.as_secs_f64(),
            began.elapsed().as_secs_f64()
        );
        Ok(())
    }
}
