//! An open volume on its thread.
//!
//! There is no task between an initiator's connection and the core: a request steps the core where it arrives, and
//! so does a batch of replies where it was read. What the core sends is queued on the links, whose tasks write it
//! once per wake-up.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::frame::{Header, Reply};
use proto::id::{ClusterId, Epoch, NodeId, RegionIndex, ReplicaId, SetVersion, VolumeId};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::session::{Ended, SessionInput, SessionOutput, VolumeSession};
use super::stripe::Stripe;
use crate::block::{BlockDevice, BlockRequest, CompletionSink, DeviceInfo, DeviceState};
use crate::clock::now_ms;
use crate::link::{self, LinkConfig, LinkEvents, LinkQueue};
use crate::mirror::{Comparison, Event, MirrorConfig, MirrorStatus, REST_TICK_MS, SetDecision, StopReason, TICK_MS};

/// How often the volume's status is published.
const STATUS_EVERY: u64 = 500;

/// What a volume is opened with.
#[derive(Clone, Debug)]
pub struct VolumeConfig {
    pub cluster: ClusterId,
    pub volume: VolumeId,
    pub epoch: Epoch,
    /// The gateway's name.
    pub gateway: String,
    pub device: DeviceInfo,
    pub stripe: Stripe,
    pub mirrors: Vec<MirrorConfig>,
    /// Until when the session's lease lives, on [`now_ms`]'s clock; written by whoever renews it.
    pub lease_until: Arc<AtomicU64>,
    /// Where the volume stands, published for reports.
    pub status: Arc<Mutex<Vec<MirrorStatus>>>,
}

/// What the gateway tells an open volume.
#[derive(Debug)]
pub enum VolumeCommand {
    SetDecided {
        mirror: usize,
        decision: SetDecision,
    },
    /// The session is superseded: drop everything unanswered (R1).
    Supersede,
    Recover,
    /// How many bytes a second a resync compares at most.
    LimitResync(Option<u64>),
    Close,
    Compare {
        mirror: usize,
        region: RegionIndex,
        repair: bool,
        answer: oneshot::Sender<Comparison>,
    },
}

/// What an open volume tells the gateway.
#[derive(Debug)]
pub enum VolumeEvent {
    ProposeSet { mirror: usize, version: SetVersion, members: Vec<ReplicaId>, awaited: Vec<ReplicaId> },
    Stopped(StopReason),
    Closed { clean: bool },
}

enum Waiter {
    Initiator { sink: Rc<dyn CompletionSink>, tag: u64 },
    Compare(oneshot::Sender<Comparison>),
}

struct Inner {
    session: VolumeSession,
    waiters: BTreeMap<u64, Waiter>,
    next_request: u64,
    outputs: Vec<SessionOutput>,
    /// Ended while a request was being submitted; told by the volume's task.
    deferred: Vec<(Waiter, Ended)>,
    status_at: u64,
}

/// An open volume; a [`BlockDevice`] for the iSCSI target on the same thread.
pub struct Volume {
    config: VolumeConfig,
    inner: RefCell<Inner>,
    links: BTreeMap<NodeId, Rc<LinkQueue>>,
    state: watch::Sender<DeviceState>,
    events: mpsc::UnboundedSender<VolumeEvent>,
    wake: Notify,
    /// The clock ticks slowly, until the next input.
    rests: Cell<bool>,
}

impl Volume {
    /// Opens the volume on this thread and starts its links; it ends when the last handle and [`Self::run`] do.
    pub fn new(config: VolumeConfig, events: mpsc::UnboundedSender<VolumeEvent>) -> Rc<Self> {
        let nodes = config.mirrors.iter().flat_map(|m| &m.replicas).map(|r| r.node);
        let links = nodes.map(|node| (node, Rc::default())).collect();
        let inner = Inner {
            session: VolumeSession::new(now_ms(), config.stripe, config.mirrors.clone()),
            waiters: BTreeMap::new(),
            next_request: 1,
            outputs: Vec::new(),
            deferred: Vec::new(),
            status_at: 0,
        };
        let state = watch::Sender::new(DeviceState { power_on: 0, capacity: 0, gone: false });
        Rc::new(Self {
            config,
            inner: RefCell::new(inner),
            links,
            state,
            events,
            wake: Notify::new(),
            rests: Cell::new(false),
        })
    }

    /// Runs the volume's links and clock and carries out commands until the session has ended.
    pub async fn run(self: Rc<Self>, mut commands: mpsc::UnboundedReceiver<VolumeCommand>) {
        // Ends with this function: the links hold the volume, not it them.
        let mut links = JoinSet::new();
        for (node, queue) in &self.links {
            let replicas = || self.config.mirrors.iter().flat_map(|m| &m.replicas);
            let addr = replicas().find(|r| r.node == *node).expect("links come from replicas").data_addr.clone();
            let config = LinkConfig {
                node: *node,
                addr,
                cluster: self.config.cluster,
                volume: self.config.volume,
                name: self.config.gateway.clone(),
            };
            let (volume, queue) = (self.clone(), queue.clone());
            links.spawn_local(async move { link::run(config, &queue, &*volume).await });
        }
        let mut tick = pin!(tokio::time::sleep(Duration::from_millis(TICK_MS)));
        while !self.state.borrow().gone {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                () = &mut tick => {
                    self.step(SessionInput::Tick, true);
                    self.publish_status();
                    let rests = self.inner.borrow().session.at_rest();
                    self.rests.set(rests);
                    let pause = Duration::from_millis(if rests { REST_TICK_MS } else { TICK_MS });
                    tick.as_mut().reset(Instant::now() + pause);
                }
                () = self.wake.notified() => {
                    self.tell_deferred();
                    if !self.rests.get() {
                        // Woken from a longer pause.
                        let soon = Instant::now() + Duration::from_millis(TICK_MS);
                        if tick.deadline() > soon {
                            tick.as_mut().reset(soon);
                        }
                    }
                }
            }
        }
        self.end();
    }

    /// Where the volume stands.
    pub fn status(&self) -> Vec<MirrorStatus> {
        self.inner.borrow().session.status()
    }

    fn publish_status(&self) {
        let now = now_ms();
        let mut inner = self.inner.borrow_mut();
        if now >= inner.status_at {
            inner.status_at = now + STATUS_EVERY;
            proto::buffer::release_idle();
            *self.config.status.lock().unwrap_or_else(PoisonError::into_inner) = inner.session.status();
        }
    }

    fn command(&self, command: VolumeCommand) {
        match command {
            VolumeCommand::SetDecided { mirror, decision } => {
                self.step(SessionInput::SetDecided { mirror, decision }, true);
            }
            VolumeCommand::Supersede => {
                let _ = self.events.send(VolumeEvent::Stopped(StopReason::Superseded));
                self.end();
            }
            VolumeCommand::LimitResync(limit) => self.step(SessionInput::LimitResync(limit), true),
            VolumeCommand::Recover => self.step(SessionInput::Recover, true),
            VolumeCommand::Close => self.step(SessionInput::Close, true),
            VolumeCommand::Compare { mirror, region, repair, answer } => {
                let id = self.enlist(Waiter::Compare(answer));
                self.step(SessionInput::Compare { id, mirror, region, repair }, true);
            }
        }
    }

    fn enlist(&self, waiter: Waiter) -> u64 {
        let mut inner = self.inner.borrow_mut();
        let id = inner.next_request;
        inner.next_request += 1;
        inner.waiters.insert(id, waiter);
        id
    }

    /// Everyone who serves the volume drops it, unanswered.
    fn end(&self) {
        self.state.send_modify(|s| s.gone = true);
        self.inner.borrow_mut().waiters.clear();
        self.wake.notify_one();
    }

    /// Steps the core and carries out what it says. Ends are told at once, or by the volume's task.
    fn step(&self, input: SessionInput, tell: bool) {
        let mut inner = self.inner.borrow_mut();
        self.step_inner(&mut inner, input);
        self.tell(inner, tell);
    }

    fn step_inner(&self, inner: &mut Inner, input: SessionInput) {
        if self.rests.replace(false) {
            self.wake.notify_one();
        }
        let mut outputs = std::mem::take(&mut inner.outputs);
        // One reading of the clock, taken after the input arrived (R3).
        let now = now_ms();
        inner.session.step(now, self.config.lease_until.load(Ordering::Acquire), input, &mut outputs);
        for output in outputs.drain(..) {
            match output {
                SessionOutput::Send { node, channel, attach, tag, request } => {
                    self.links[&node].push(request.encode(channel, attach, tag));
                }
                SessionOutput::Ended { id, ended } => {
                    if let Some(waiter) = inner.waiters.remove(&id) {
                        inner.deferred.push((waiter, ended));
                    }
                }
                SessionOutput::ProposeSet { mirror, version, members, awaited } => {
                    let _ = self.events.send(VolumeEvent::ProposeSet { mirror, version, members, awaited });
                }
                SessionOutput::PowerOn { .. } => self.state.send_modify(|s| s.power_on += 1),
                SessionOutput::Stop(reason) => {
                    tracing::error!(volume = %self.config.device.name, epoch = %self.config.epoch, %reason, "session ended");
                    inner.deferred.clear();
                    inner.waiters.clear();
                    self.state.send_modify(|s| s.gone = true);
                    let _ = self.events.send(VolumeEvent::Stopped(reason));
                    self.wake.notify_one();
                }
                SessionOutput::Closed { clean } => {
                    let _ = self.events.send(VolumeEvent::Closed { clean });
                }
                SessionOutput::Log { mirror, event } => self.log(mirror, &event),
            }
        }
        inner.outputs = outputs;
    }

    fn log(&self, mirror: usize, event: &Event) {
        let (volume, epoch) = (&self.config.device.name, self.config.epoch);
        match event {
            Event::Lost { .. } | Event::BadBlock { .. } | Event::Restamped { .. } | Event::Distrusted { .. } => {
                tracing::warn!(volume, %epoch, mirror, "{event}");
            }
            _ => tracing::info!(volume, %epoch, mirror, "{event}"),
        }
    }

    fn tell(&self, mut inner: std::cell::RefMut<'_, Inner>, now: bool) {
        if inner.deferred.is_empty() {
            return;
        }
        if !now {
            self.wake.notify_one();
            return;
        }
        let ended = std::mem::take(&mut inner.deferred);
        drop(inner);
        for (waiter, ended) in ended {
            match (waiter, ended) {
                (Waiter::Initiator { sink, tag }, Ended::Block(outcome)) => sink.complete(tag, outcome),
                (Waiter::Compare(answer), Ended::Compared(comparison)) => {
                    let _ = answer.send(comparison);
                }
                (Waiter::Compare(_), Ended::Block(_)) => {}
                (Waiter::Initiator { .. }, Ended::Compared(_)) => unreachable!("initiators do not compare"),
            }
        }
    }

    fn tell_deferred(&self) {
        self.tell(self.inner.borrow_mut(), true);
    }
}

impl LinkEvents for Volume {
    fn up(&self, node: NodeId) {
        self.step(SessionInput::LinkUp { node }, true);
    }

    fn down(&self, node: NodeId) {
        self.step(SessionInput::LinkDown { node }, true);
    }

    fn replies(&self, node: NodeId, replies: &mut Vec<(Header, Reply)>) {
        let mut inner = self.inner.borrow_mut();
        for (header, reply) in replies.drain(..) {
            let Header { channel, tag, attach, .. } = header;
            self.step_inner(&mut inner, SessionInput::Reply { node, channel, tag, attach, reply });
        }
        self.tell(inner, true);
    }
}

impl BlockDevice for Volume {
    fn info(&self) -> DeviceInfo {
        self.config.device.clone()
    }

    fn submit(&self, sink: &Rc<dyn CompletionSink>, tag: u64, request: BlockRequest) {
        if self.state.borrow().gone {
            return;
        }
        let id = self.enlist(Waiter::Initiator { sink: sink.clone(), tag });
        self.step(SessionInput::Submit { id, request }, false);
    }

    fn abort(&self, sink: &Rc<dyn CompletionSink>, tag: u64) {
        let found = self.inner.borrow().waiters.iter().find_map(|(id, waiter)| match waiter {
            Waiter::Initiator { sink: s, tag: t } if *t == tag && Rc::ptr_eq(s, sink) => Some(*id),
            _ => None,
        });
        if let Some(id) = found {
            self.step(SessionInput::Abort { id }, false);
        }
    }

    fn watch(&self) -> watch::Receiver<DeviceState> {
        self.state.subscribe()
    }
}
