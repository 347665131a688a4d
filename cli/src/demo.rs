//! `cluster demo`: the main job on this machine, end to end. Separate processes on loopback, a volume of five
//! 3-way mirrors, a load that knows what it wrote; nodes and the gateway are killed under it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use client::iscsi::iqn;
use proto::cluster::{ReplicaCondition, VolumeInfo, VolumeSpec};
use proto::pb;
use proto::pb::gateway_client::GatewayClient;
use rustix::process::Signal;
use tokio::time::Instant;

use crate::config::Cluster;
use crate::daemon::StopSignals;
use crate::dev::commands::{self, EndOnDrop, Up};
use crate::dev::layout::{Dev, Kind, Part};
use crate::failure::{Failure, Outcome};
use crate::load::{Load, LoadSpec, Measured};
use crate::status::Owner;
use crate::{render, size, status, verify};

const VOLUME: &str = "demo";
const STRIPES: u32 = 5;
const REPLICAS: u32 = 3;
/// How much of the volume the load works on.
const AREA: u64 = 256 << 20;
/// Requests under way.
const DEPTH: usize = 4;
/// How long the replicas may take to be in sync again.
const SYNC_PATIENCE: Duration = Duration::from_secs(120);
/// How long a gateway that was started may take to serve.
const SERVE_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a killed gateway stays away.
const GATEWAY_AWAY: Duration = Duration::from_millis(500);

/// `cluster demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Keep everything in this directory, also after success [default: a temporary one]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Size of the volume
    #[arg(long, default_value = "1GiB", value_parser = size::parse_blocks)]
    size: u64,
    /// Seconds of each phase of load
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Repeats the choices of an earlier run
    #[arg(long)]
    seed: Option<u64>,
}

/// One line of the table.
struct Phase {
    name: &'static str,
    measured: Measured,
    resynced: Option<u64>,
    verdict: String,
}

struct Demo {
    running: EndOnDrop,
    cluster: Cluster,
    phases: Vec<Phase>,
    /// What the owner's session had copied when the phase began, and its epoch.
    copied: (u64, u64),
    size: u64,
    seconds: u64,
}

/// `cluster demo`.
///
/// # Errors
/// When any byte was wrong, or anything did not come up again; the directory is then kept.
pub async fn run(args: DemoArgs) -> Outcome {
    let temporary = match &args.dir {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new()
                .prefix("md99-demo-")
                .tempdir()
                .map_err(|error| Failure::new(format!("cannot make a temporary directory: {error}")))?,
        ),
    };
    let dir = match (&args.dir, &temporary) {
        (Some(dir), _) => dir.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of them is there"),
    };
    let mut stop = StopSignals::catch()?;
    let seed = args.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    let outcome = tokio::select! {
        outcome = all(&dir, &args, seed) => outcome,
        signal = stop.next() => {
            // The processes ended with the future.
            return Err(Failure::new(format!("interrupted by {signal}")));
        }
    };
    match (outcome, temporary) {
        (Ok(()), _) => Ok(()),
        (Err(failure), temporary) => {
            if let Some(temporary) = temporary {
                let _ = temporary.keep();
            }
            Err(failure
                .next(format!("everything is kept: logs are {}/*/log; repeat with --seed {seed}", dir.display())))
        }
    }
}

fn say(text: impl std::fmt::Display) {
    render::line(text);
}

async fn all(dir: &Path, args: &DemoArgs, seed: u64) -> Outcome {
    let began = Instant::now();
    say("starting three storage nodes, two witnesses and a gateway, each a process of its own");
    let running = EndOnDrop::new(commands::up(&Up::on_free_ports(dir)).await?);
    let cluster = Cluster::find(Some(&running.get().config_path()))?;
    say(format!("creating volume {VOLUME}: {}, {STRIPES} mirrors of {REPLICAS} replicas", size::show(args.size)));
    let gateway = part(running.get(), "gateway-1");
    let spec = VolumeSpec {
        name: VOLUME.into(),
        size: args.size,
        replicas: REPLICAS,
        stripes: STRIPES,
        chunk_size: 256 << 10,
        min_in_sync: 1,
        write_cache: true,
        export: Some(gateway.name.clone()),
    };
    crate::volume::make(&cluster, spec).await?;
    let portal: SocketAddr = gateway.data.expect("a gateway has a portal");
    let load = LoadSpec { depth: DEPTH, area: Some(AREA), ..LoadSpec::new(portal, iqn(VOLUME), seed) };
    say(format!("logging in at {portal}; the load works on {}, seed {seed}", size::show(AREA.min(args.size))));
    let mut load = Load::start(load).await.map_err(|error| Failure::new(error.to_string()))?;
    let (size, seconds) = (args.size, args.seconds);
    let mut demo = Demo { running, cluster, phases: Vec::new(), copied: (0, 0), size, seconds };
    let outcome = demo.phases(&mut load).await;
    demo.print_table();
    let outcome = outcome.and_then(|()| load.check().map_err(|error| Failure::new(error.to_string())));
    if let Err(failure) = outcome {
        load.wrong().1.iter().for_each(say);
        say("\nverdict: FAILED");
        return Err(failure);
    }
    load.log_out().await;
    let report = tokio::task::block_in_place(|| commands::down(demo.running.get()))?;
    if let Some(line) = report.first() {
        return Err(Failure::new(format!("not closed cleanly: {line}")));
    }
    say(format!(
        "\nverdict: every byte was right, all replicas are equal, everything closed cleanly ({} s)",
        began.elapsed().as_secs()
    ));
    Ok(())
}

fn part(dev: &Dev, name: &str) -> Part {
    dev.part(name).expect("the demo's cluster has it").clone()
}

impl Demo {
    async fn phases(&mut self, load: &mut Load) -> Outcome {
        self.begin(load).await?;
        say("phase 1: load on a healthy volume");
        self.under_load(load).await?;
        self.end("healthy", load).await?;

        say("phase 2: node-2 is killed (SIGKILL)");
        self.kill("node-2")?;
        self.under_load(load).await?;
        self.end("node-2 killed", load).await?;

        say("phase 3: node-3 is killed too: one of three copies is left");
        self.kill("node-3")?;
        self.under_load(load).await?;
        self.end("node-3 killed too", load).await?;

        say("phase 4: both are started again; what they missed is copied under load");
        for name in ["node-2", "node-3"] {
            commands::start(self.running.get(), &part(self.running.get(), name)).await?;
        }
        self.wait_in_sync(load).await?;
        self.end("both back, resync", load).await?;

        say("phase 5: the gateway is killed and started again; the initiator logs in anew and repeats");
        self.kill("gateway-1")?;
        tokio::time::sleep(GATEWAY_AWAY).await;
        commands::start(self.running.get(), &part(self.running.get(), "gateway-1")).await?;
        self.wait_answered(load).await?;
        self.under_load(load).await?;
        self.wait_in_sync(load).await?;
        self.end("gateway killed, restarted", load).await?;

        say(format!("phase 6: everything is read back ({})", size::show(self.size)));
        load.stop().await.map_err(|error| Failure::new(error.to_string()))?;
        load.take();
        load.read_back(None).await.map_err(|error| Failure::new(error.to_string()))?;
        self.end("everything read back", load).await?;

        say("phase 7: all replicas are compared block by block");
        let began = Instant::now();
        let found = verify::compare(&self.cluster, VOLUME, false, true).await?;
        let seconds = began.elapsed().as_secs_f64();
        let verdict = match (found.differences, found.skipped.len()) {
            (0, 0) => format!("{} blocks of {REPLICAS} replicas are equal", found.compared),
            (0, skipped) => format!("{skipped} replicas could not be compared"),
            (differ, _) => format!("{differ} BLOCKS DIFFER"),
        };
        let measured = Measured { seconds, ..Measured::default() };
        self.phases.push(Phase { name: "replicas compared", measured, resynced: None, verdict: verdict.clone() });
        match (found.differences, found.skipped.len()) {
            (0, 0) => Ok(()),
            _ => Err(Failure::new(format!("comparing all replicas: {verdict}"))),
        }
    }

    fn kill(&self, name: &str) -> Outcome {
        let part = part(self.running.get(), name);
        tokio::task::block_in_place(|| commands::kill(self.running.get(), &part, Signal::KILL))
    }

    async fn begin(&mut self, load: &Load) -> Outcome {
        load.take();
        self.copied = self.session_copied().await?;
        Ok(())
    }

    async fn end(&mut self, name: &'static str, load: &Load) -> Outcome {
        let measured = load.take();
        let (before, after) = (self.copied, self.session_copied().await?);
        self.copied = after;
        // A new session counts from nothing.
        let resynced = if before.0 == after.0 { after.1.saturating_sub(before.1) } else { after.1 };
        let (wrong, _) = load.wrong();
        let verdict = if wrong == 0 { "right".to_owned() } else { format!("{wrong} SECTORS WRONG") };
        self.phases.push(Phase { name, measured, resynced: Some(resynced), verdict });
        load.check().map_err(|error| Failure::new(format!("{name}: {error}")))
    }

    /// Load for as long as a phase lasts.
    async fn under_load(&self, load: &Load) -> Outcome {
        let until = Instant::now() + Duration::from_secs(self.seconds);
        let before = load.commands();
        while Instant::now() < until {
            tokio::time::sleep(LOOK_EVERY).await;
            load.check().map_err(|error| Failure::new(error.to_string()))?;
        }
        match load.commands() > before {
            true => Ok(()),
            false => Err(Failure::new(format!("nothing was answered for {} s", self.seconds))),
        }
    }

    /// Waits until the load gets answers again.
    async fn wait_answered(&self, load: &Load) -> Outcome {
        let until = Instant::now() + SERVE_PATIENCE;
        let before = load.commands();
        while load.commands() == before {
            load.check().map_err(|error| Failure::new(error.to_string()))?;
            if Instant::now() >= until {
                return Err(Failure::new(format!("nothing was answered for {} s", SERVE_PATIENCE.as_secs())));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    async fn volume(&self) -> Outcome<(proto::cluster::ClusterStatus, VolumeInfo)> {
        let status = self.cluster.status(false).await?;
        match status.view.volume_named(VOLUME).cloned() {
            Some(volume) => Ok((status, volume)),
            None => Err(Failure::new(format!("volume {VOLUME} is gone"))),
        }
    }

    /// Waits until every replica is in sync, in the metadata and by the owner's word.
    async fn wait_in_sync(&self, load: &Load) -> Outcome {
        let until = Instant::now() + SYNC_PATIENCE;
        let mut progress = render::Progress::new("resync:");
        loop {
            load.check().map_err(|error| Failure::new(error.to_string()))?;
            let (status, volume) = self.volume().await?;
            let committed = volume.mirrors.iter().all(|mirror| mirror.in_sync.members.len() == mirror.replicas.len());
            let mut left = 0;
            let mut reported = false;
            if let Owner::Heard(session) = status::owner(&status, &volume) {
                let replicas = session.report.mirrors.iter().flat_map(|mirror| &mirror.replicas);
                let out = replicas.clone().filter(|replica| replica.condition != ReplicaCondition::InSync).count();
                left = replicas.map(|replica| replica.regions_todo).sum::<u64>();
                reported = out == 0 && !session.report.mirrors.is_empty();
            }
            if committed && reported {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(Failure::new(format!(
                    "not in sync after {} s:\n{}",
                    SYNC_PATIENCE.as_secs(),
                    status::mirror_table(&status, &volume)
                )));
            }
            progress.at(format!("{left} regions left"));
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// The owner's session, and the bytes that it has copied from replica to replica.
    async fn session_copied(&self) -> Outcome<(u64, u64)> {
        let (_, volume) = self.volume().await?;
        let gateway = self.running.get().of(Kind::Gateway).next().expect("the demo has a gateway");
        let silent = |error: String| Failure::new(format!("{}: cannot be asked: {error}", gateway.name));
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", gateway.control))
            .map_err(|error| silent(error.to_string()))?
            .connect()
            .await
            .map_err(|error| silent(error.to_string()))?;
        let stats = GatewayClient::new(channel).stats(pb::StatsRequest {}).await;
        let stats = stats.map_err(|status| silent(status.message().to_owned()))?.into_inner();
        let id: Vec<u8> = volume.id.into();
        let found = stats.volumes.iter().find(|stats| stats.volume == id);
        Ok(found.map_or((volume.session.epoch.0, 0), |stats| (stats.epoch, stats.resync_bytes + stats.reconcile_bytes)))
    }

    fn print_table(&self) {
        if self.phases.is_empty() {
            return;
        }
        let rows = self.phases.iter().map(|phase| {
            let measured = &phase.measured;
            let loaded = measured.commands > 0;
            let number = |text: String| if loaded { text } else { "-".into() };
            [
                phase.name.to_owned(),
                format!("{:.1}", measured.seconds),
                number(format!("{:.0}", measured.iops())),
                number(format!("{:.1}", measured.megabytes_per_second())),
                number(format!("{:.0} ms", measured.longest_ms)),
                phase
                    .resynced
                    .map_or("-".into(), |bytes| format!("{} of {}", size::show(bytes), size::show(self.size))),
                phase.verdict.clone(),
            ]
        });
        let header = ["PHASE", "SECONDS", "IOPS", "MB/S", "LONGEST STALL", "RESYNCHRONISED", "BYTES READ"];
        say(format!("\n{}", render::table(header, rows)));
    }
}
