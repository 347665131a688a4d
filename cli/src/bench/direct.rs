//! The load by the client library: this process opens the volume's session itself, as a gateway does, and asks the
//! volume without any iSCSI in between. What it measures is the replication alone.
//!
//! A session belongs to a gateway that the cluster knows; this one is opened in the name of one of them, which does not
//! serve the volume. Where that gateway, or another, is told to open the volume meanwhile, it fences this process off
//! (R1), and the measurement ends.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use client::block::{BlockDevice, BlockOutcome, BlockRequest, CompletionSink, SECTOR};
use client::clock::now_ms;
use client::control::ControlClient;
use client::gateway::{decide, session};
use client::initiator::lane::Io;
use client::volume::{Volume, VolumeCommand, VolumeConfig, VolumeEvent};
use proto::cluster::{OpenedSession, RenewalOutcome, SessionRenewal};
use proto::id::{Epoch, VolumeId};
use proto::limits::LEASE_RENEW_MS;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{JoinHandle, LocalSet};

use super::figures::Recorder;
use super::over_iscsi::{DRAIN, DRAIN_STOPPED, MAX_ERRORS, Plan, Slot, cpu_seconds};
use super::shape::{Requests, Shape};
use super::target::Round;
use crate::config::Cluster;
use crate::failure::{Failure, Outcome};
use crate::gateway;

/// How long one renewal of the lease is tried.
const RENEW: Duration = Duration::from_millis(1500);
/// After a request that was not answered.
const AGAIN: Duration = Duration::from_millis(100);
/// How long the volume may take to serve: an older session's lease may have to end first.
const OPEN_PATIENCE: Duration = Duration::from_secs(40);
/// How long it may take to close.
const CLOSE_PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at what is no completion.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What is written is cut out of so many bytes.
const PATTERN: usize = 16 << 20;
/// Where a cut may begin.
const CUT: usize = 64;

/// A round, for the volume's thread.
struct Job {
    shape: Shape,
    region: u64,
    time: Duration,
    limit: u64,
    seed: u64,
    interval: Duration,
    stop: Arc<AtomicBool>,
    done: oneshot::Sender<Outcome<Round>>,
}

/// An open volume.
pub struct Direct {
    name: String,
    /// Its size.
    pub device_bytes: u64,
    jobs: mpsc::UnboundedSender<Job>,
    commands: mpsc::UnboundedSender<VolumeCommand>,
    closed: Option<oneshot::Receiver<bool>>,
    control: ControlClient,
    volume: VolumeId,
    epoch: Epoch,
    tasks: Vec<JoinHandle<()>>,
}

impl Direct {
    /// Opens the volume and waits until it serves.
    ///
    /// # Errors
    /// A gateway that has it, a cluster that refuses, replicas that cannot be reached.
    pub async fn open(cluster: &Cluster, name: &str) -> Outcome<Self> {
        let status = cluster.status(false).await?;
        let info = status.view.volume_named(name).ok_or_else(|| {
            Failure::new(format!("there is no volume {name}")).next("`cluster list-volumes` shows what exists")
        })?;
        if let Some(owner) = info.export.as_deref().or(info.session.owner()) {
            return Err(Failure::new(format!("volume {name} is open on {owner}, and has one owner at a time")).next(
                format!(
                    "`cluster unexport-volume {name}` closes it there; `cluster export-volume {name}` serves it again"
                ),
            ));
        }
        let gateway = gateway::choose(&status, None)?;
        let attempt = format!("opening volume {name} in the name of {gateway}");
        let control = cluster.control.clone();
        let opened = async {
            let request = control.new_request().await?;
            control.open_session(request, info.id, &gateway, false).await
        };
        let opened = opened.await.map_err(|error| Failure::control(&attempt, &error))?;
        let lease_until = Arc::new(AtomicU64::new(0));
        let old_lease_until = decide::old_lease_until(now_ms(), opened.old_lease_ms);
        let name_of_ours = format!("bench-{}", std::process::id());
        let config =
            session::volume_config(name_of_ours, &status.view, &opened, old_lease_until, &lease_until, &Arc::default());
        let (event_sender, events) = mpsc::unbounded_channel();
        let (commands, command_receiver) = mpsc::unbounded_channel();
        let (jobs, job_receiver) = mpsc::unbounded_channel();
        let (closed_sender, closed) = oneshot::channel();
        thread::Builder::new()
            .name("volume".into())
            .spawn(move || live(config, event_sender, command_receiver, job_receiver))
            .map_err(|error| Failure::new(format!("{attempt}: cannot start a thread: {error}")))?;
        let tasks = vec![
            tokio::spawn(renew(control.clone(), gateway, info.id, opened.epoch, lease_until, commands.clone())),
            tokio::spawn(follow(control.clone(), opened.clone(), events, commands.clone(), closed_sender)),
        ];
        let direct = Self {
            name: name.to_owned(),
            device_bytes: info.size,
            jobs,
            commands,
            closed: Some(closed),
            control,
            volume: info.id,
            epoch: opened.epoch,
            tasks,
        };
        direct.wait_serving(&attempt).await?;
        Ok(direct)
    }

    /// Reads a block: answered once the volume serves.
    async fn wait_serving(&self, attempt: &str) -> Outcome {
        let never = Arc::new(AtomicBool::new(false));
        let shape = Shape::custom(4096, 100, true, 1, false);
        let one = self.job(&shape, 4096, Duration::from_secs(3600), 1, 1, LOOK_EVERY, never);
        match tokio::time::timeout(OPEN_PATIENCE, one).await {
            Ok(round) => round.map(drop).map_err(|failure| failure.while_doing(attempt)),
            Err(_) => Err(Failure::new(format!("{attempt}: it does not serve after {} s", OPEN_PATIENCE.as_secs()))
                .next("look at `cluster status`: which replicas are reached")),
        }
    }

    async fn job(
        &self,
        shape: &Shape,
        region: u64,
        time: Duration,
        limit: u64,
        seed: u64,
        interval: Duration,
        stop: Arc<AtomicBool>,
    ) -> Outcome<Round> {
        let (done, round) = oneshot::channel();
        let over = || Failure::new(format!("volume {}: its session has ended", self.name));
        let job = Job { shape: shape.clone(), region, time, limit, seed, interval, stop, done };
        self.jobs.send(job).map_err(|_| over())?;
        round.await.map_err(|_| over())?
    }

    /// One round.
    ///
    /// # Errors
    /// When the session has ended.
    pub async fn run(&self, plan: &Plan<'_>) -> Outcome<Round> {
        let stop = plan.stop.clone();
        let time = if plan.total.is_some() { Duration::from_secs(24 * 3600) } else { plan.time };
        self.job(plan.shape, plan.region, time, plan.limit(), plan.seed, plan.interval, stop).await
    }

    /// Closes the session, so that the next one has nothing to settle.
    pub async fn close(mut self) {
        let _ = self.commands.send(VolumeCommand::Close);
        let Some(closed) = self.closed.take() else { return };
        let clean = matches!(tokio::time::timeout(CLOSE_PATIENCE, closed).await, Ok(Ok(true)));
        let _ = self.commands.send(VolumeCommand::Supersede);
        let gone = async {
            let request = self.control.new_request().await?;
            self.control.close_session(request, self.volume, self.epoch, clean).await
        };
        if let Err(error) = gone.await {
            tracing::warn!(volume = self.name, %error, "session not closed");
        }
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Renews the session's lease until it is aborted (R3).
async fn renew(
    control: ControlClient,
    gateway: String,
    volume: VolumeId,
    epoch: Epoch,
    lease_until: Arc<AtomicU64>,
    commands: mpsc::UnboundedSender<VolumeCommand>,
) {
    loop {
        // The lease counts from before the request is sent.
        let sent = now_ms();
        let renewal = SessionRenewal { volume, epoch, report: None };
        let pause = match control.renew_leases(&gateway, vec![renewal], RENEW).await {
            Ok(answer) => {
                for result in answer.results.iter().filter(|result| result.volume == volume && result.epoch == epoch) {
                    match &result.outcome {
                        RenewalOutcome::Granted { lease_ms } => {
                            lease_until.fetch_max(decide::lease_until(sent, *lease_ms), Ordering::AcqRel);
                        }
                        RenewalOutcome::Refused { current } if decide::is_superseded(current.as_ref(), epoch) => {
                            let _ = commands.send(VolumeCommand::Supersede);
                        }
                        RenewalOutcome::Refused { .. } => {}
                    }
                }
                Duration::from_millis(LEASE_RENEW_MS)
            }
            Err(_) => AGAIN,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Carries out what the volume asks of the cluster, until it is over.
async fn follow(
    control: ControlClient,
    opened: OpenedSession,
    mut events: mpsc::UnboundedReceiver<VolumeEvent>,
    commands: mpsc::UnboundedSender<VolumeCommand>,
    closed: oneshot::Sender<bool>,
) {
    while let Some(event) = events.recv().await {
        match event {
            VolumeEvent::ProposeSet { mirror, version, members, awaited } => {
                session::propose_set(&control, &opened, mirror, version, members, awaited, &commands);
            }
            VolumeEvent::Stopped(reason) => {
                tracing::warn!(volume = %opened.volume.name, %reason, "session ended");
                let _ = commands.send(VolumeCommand::Supersede);
                return;
            }
            VolumeEvent::Closed { clean } => {
                let _ = closed.send(clean);
                return;
            }
        }
    }
}

/// The volume's thread: its links, its core, and the load.
fn live(
    config: VolumeConfig,
    events: mpsc::UnboundedSender<VolumeEvent>,
    commands: mpsc::UnboundedReceiver<VolumeCommand>,
    mut jobs: mpsc::UnboundedReceiver<Job>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "no runtime for the volume"),
    };
    LocalSet::new().block_on(&runtime, async move {
        let mut rng = crate::load::Rng::new(now_ms());
        let pattern: Bytes = (0..PATTERN / 8).flat_map(|_| rng.draw().to_le_bytes()).collect::<Vec<u8>>().into();
        let volume = Volume::new(config, events);
        let mut running = tokio::task::spawn_local(Rc::clone(&volume).run(commands));
        loop {
            let job = tokio::select! {
                _ = &mut running => return,
                job = jobs.recv() => job,
            };
            let Some(job) = job else { break };
            let round = drive(&volume, &pattern, &job).await;
            let _ = job.done.send(round);
        }
        // It ends once it is told to.
        let _ = running.await;
    });
}

#[derive(Default)]
struct Sink {
    ended: RefCell<Vec<(u64, BlockOutcome)>>,
    wake: Notify,
}

impl CompletionSink for Sink {
    fn complete(&self, tag: u64, outcome: BlockOutcome) {
        self.ended.borrow_mut().push((tag, outcome));
        self.wake.notify_one();
    }
}

async fn drive(volume: &Rc<Volume>, pattern: &Bytes, job: &Job) -> Outcome<Round> {
    let shape = &job.shape;
    let sink = Rc::new(Sink::default());
    let requests = sink.clone() as Rc<dyn CompletionSink>;
    let mut draws = Requests::new(shape, job.region, 0, 1, job.seed);
    let mut recorder = Recorder::new(job.interval);
    let (before, began) = (cpu_seconds(), Instant::now());
    let idle = Slot { io: Io::Flush, since: began, read: false, flushing: false };
    let mut slots = vec![idle; shape.queue_depth];
    let (mut left, mut under_way) = (job.limit, 0u64);
    let mut begin = |tag: usize, slot: &mut Slot, now: Instant| -> bool {
        if left == 0 {
            return false;
        }
        left -= 1;
        let (io, salt) = draws.draw();
        *slot = Slot { io, since: now, read: matches!(io, Io::Read { .. }), flushing: false };
        let request = match io {
            Io::Read { lba } => BlockRequest::Read { offset: lba * SECTOR, len: shape.block_size as u32 },
            Io::Write { lba, fua } => {
                let len = shape.block_size as usize;
                let at = salt as usize % ((PATTERN - len) / CUT) * CUT;
                BlockRequest::Write { offset: lba * SECTOR, data: pattern.slice(at..at + len), fua }
            }
            Io::Flush => BlockRequest::Flush,
        };
        volume.submit(&requests, tag as u64, request);
        true
    };
    for (tag, slot) in slots.iter_mut().enumerate() {
        under_way += u64::from(begin(tag, slot, Instant::now()));
    }
    let state = volume.watch();
    let mut look = tokio::time::interval(LOOK_EVERY);
    let mut stopped: Option<Instant> = None;
    let mut ended = Vec::new();
    while under_way > 0 {
        tokio::select! {
            () = sink.wake.notified() => {}
            _ = look.tick() => {}
        }
        let now = Instant::now();
        let asked_to_stop = job.stop.load(Ordering::Relaxed);
        if state.borrow().gone {
            recorder.failed(&"the volume's session has ended");
            recorder.gave_up(under_way);
            break;
        }
        if stopped.is_none() && (now - began >= job.time || asked_to_stop || recorder.counts().errors >= MAX_ERRORS) {
            stopped = Some(now);
        }
        std::mem::swap(&mut ended, &mut *sink.ended.borrow_mut());
        for (tag, outcome) in ended.drain(..) {
            let slot = &mut slots[tag as usize];
            match outcome {
                BlockOutcome::Done(_) if shape.flush && !slot.read && !slot.flushing => {
                    slot.flushing = true;
                    volume.submit(&requests, tag, BlockRequest::Flush);
                    continue;
                }
                BlockOutcome::Done(_) => recorder.answered(now, now - slot.since, shape.block_size, slot.read),
                other => recorder.failed(&format!("{other:?}")),
            }
            if stopped.is_some() || !begin(tag as usize, slot, now) {
                under_way -= 1;
            }
        }
        let patience = if asked_to_stop { DRAIN_STOPPED } else { DRAIN };
        if stopped.is_some_and(|stopped| now - stopped > patience) {
            recorder.gave_up(under_way);
            break;
        }
    }
    Ok(Round::new(recorder, Instant::now(), cpu_seconds() - before))
}
