//! The task around a member's [`ControlCore`]: it owns the core, ticks it, carries out what it says. The log is
//! written by a thread of its own, which takes all that waits for it in one transaction (group commit), and then
//! sends what was to be sent after it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::cluster::{ClusterView, Refusal, RequestId};
use proto::id::NodeId;
use raft::prelude::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;

use super::core::Persist;
use super::log_store::{LogError, LogStore};
use super::transport::{Delivery, Transport};
use crate::control::core::{ControlCore, CoreError, Input, Now, Output, Reply, Request, Ticket};
use crate::metadata::Command;

/// Events that wait for the core: past it requests and messages wait where they come from.
const QUEUE: usize = 1024;
/// Persists that are written in one transaction.
const MAX_GROUP: usize = 256;
/// One raft tick.
pub const TICK: Duration = Duration::from_millis(100);

/// Why a member stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The log cannot be written or read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The log cannot be understood.
    #[error(transparent)]
    Core(#[from] CoreError),
}

enum Event {
    Messages(Vec<Message>),
    Request(Request, oneshot::Sender<Result<Reply, Refusal>>),
    Delivery(Delivery),
    Persisted(u64),
    LogFailed(LogError),
    Stop,
}

/// What a member shows of its metadata.
#[derive(Clone, Debug)]
pub struct Shown {
    /// As applied here; stale where no leader is known.
    pub view: Arc<ClusterView>,
    /// Who leads.
    pub leader: Option<(NodeId, String)>,
    /// The view is at least as new as the start of this process.
    pub confirmed: bool,
}

/// Speaks to the driver. Cheap to clone.
#[derive(Clone)]
pub struct ControlHandle {
    events: mpsc::Sender<Event>,
    shown: watch::Receiver<Shown>,
}

impl ControlHandle {
    /// Asks the core. Cancelling it does not withdraw the request.
    ///
    /// # Errors
    /// The refusal; [`Refusal::Unavailable`] when the member is shutting down.
    pub async fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        let (sender, answer) = oneshot::channel();
        let down = || Refusal::unavailable("the member is shutting down");
        self.events.send(Event::Request(request, sender)).await.map_err(|_| down())?;
        answer.await.map_err(|_| down())?
    }

    /// Carries out a command through whoever leads, under one request id, until there is a definite answer.
    ///
    /// # Errors
    /// Definite refusals only.
    pub async fn carry_out(&self, command: Command) -> Result<Reply, Refusal> {
        let since = self.shown.borrow().view.revision;
        let request = RequestId { id: uuid::Uuid::new_v4(), since };
        loop {
            match self.ask(Request::Forward(request, command.clone())).await {
                Err(refusal) if refusal.may_retry() && !self.events.is_closed() => {
                    tokio::time::sleep(TICK * 2).await;
                }
                answer => return answer,
            }
        }
    }

    /// Raft messages came. Waits while the core is behind; says whether there is still one.
    pub async fn messages(&self, messages: Vec<Message>) -> bool {
        self.events.send(Event::Messages(messages)).await.is_ok()
    }

    /// Follows what this member has applied.
    pub fn shown(&self) -> watch::Receiver<Shown> {
        self.shown.clone()
    }

    /// Ends the driver; it writes its last words first.
    pub async fn stop(&self) {
        let _ = self.events.send(Event::Stop).await;
    }
}

/// Both clocks.
pub fn now() -> Now {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let boot_ms = boot.tv_sec as u64 * 1000 + boot.tv_nsec as u64 / 1_000_000;
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    Now { boot_ms, unix_ms }
}

/// Starts the driver of `core`, whose log is kept in `store`; `peers` are the other voters' addresses. The task
/// ends after [`ControlHandle::stop`], or with an error.
pub fn start(
    core: ControlCore,
    store: impl LogStore,
    peers: BTreeMap<u64, String>,
) -> (ControlHandle, tokio::task::JoinHandle<Result<(), DriverError>>) {
    let (events, receiver) = mpsc::channel(QUEUE);
    let (show, shown) = watch::channel(show(&core));
    let reports = events.clone();
    let transport = {
        let machine = core.definition();
        let own = core.id();
        // A report that finds the queue full is dropped: raft's own time-outs find out too.
        Transport::start(machine.id, own, peers, move |delivery| {
            let _ = reports.try_send(Event::Delivery(delivery));
        })
    };
    let (persists, to_write) = std::sync::mpsc::channel();
    let writer = {
        let (transport, events) = (transport.clone(), events.clone());
        std::thread::Builder::new()
            .name("raft-log".into())
            .spawn(move || write(store, to_write, transport, events))
            .expect("a thread can be started")
    };
    let driver = Driver {
        core,
        receiver,
        transport,
        persists: Some(persists),
        show,
        answers: BTreeMap::new(),
        last_ticket: 0,
        outputs: Vec::new(),
    };
    let task = tokio::spawn(async move {
        let ended = driver.run().await;
        // The queue to the writer is closed: it ends when all is written. Then the file may be opened again.
        let _ = tokio::task::spawn_blocking(move || writer.join()).await;
        ended
    });
    (ControlHandle { events, shown }, task)
}

fn show(core: &ControlCore) -> Shown {
    let leader = core.leader();
    Shown { view: Arc::new(core.machine().view(leader.is_none())), leader, confirmed: core.is_confirmed() }
}

/// The log's thread.
fn write(
    mut store: impl LogStore,
    to_write: std::sync::mpsc::Receiver<Persist>,
    transport: Transport,
    events: mpsc::Sender<Event>,
) {
    while let Ok(first) = to_write.recv() {
        let mut group = vec![first];
        while group.len() < MAX_GROUP
            && let Ok(next) = to_write.try_recv()
        {
            group.push(next);
        }
        if let Err(error) = store.write(&group) {
            let _ = events.blocking_send(Event::LogFailed(error));
            return;
        }
        let number = group.iter().map(|persist| persist.number).max().unwrap_or(0);
        let messages: Vec<Message> = group.into_iter().flat_map(|persist| persist.then_send).collect();
        for lost in transport.send(messages) {
            let _ = events.try_send(Event::Delivery(Delivery::Unreachable(lost)));
        }
        // Fails only once the driver has ended.
        let _ = events.blocking_send(Event::Persisted(number));
    }
}

struct Driver {
    core: ControlCore,
    receiver: mpsc::Receiver<Event>,
    transport: Transport,
    /// Not bounded by itself: raft bounds what a leader appends before it is committed, and followers answer only
    /// what is written.
    persists: Option<std::sync::mpsc::Sender<Persist>>,
    show: watch::Sender<Shown>,
    answers: BTreeMap<Ticket, oneshot::Sender<Result<Reply, Refusal>>>,
    last_ticket: Ticket,
    outputs: Vec<Output>,
}

impl Driver {
    async fn run(mut self) -> Result<(), DriverError> {
        let mut ticks = tokio::time::interval(TICK);
        // A process that was stopped for a while must not take that for silence of the others.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.receiver.recv() => {
                    let Some(event) = event else { return Ok(()) };
                    let input = match event {
                        Event::Messages(messages) => Input::Messages(messages),
                        Event::Request(request, answer) => {
                            self.last_ticket += 1;
                            self.answers.insert(self.last_ticket, answer);
                            Input::Request(self.last_ticket, request)
                        }
                        Event::Delivery(Delivery::Unreachable(id)) => Input::Unreachable(id),
                        Event::Delivery(Delivery::Snapshot(id, arrived)) => Input::SnapshotSent(id, arrived),
                        Event::Persisted(number) => Input::Persisted(number),
                        Event::LogFailed(error) => return Err(error.into()),
                        Event::Stop => {
                            if let (Some(words), Some(persists)) = (self.core.last_words(), &self.persists) {
                                let _ = persists.send(words);
                            }
                            self.persists = None;
                            return Ok(());
                        }
                    };
                    self.step(input)?;
                }
                _ = ticks.tick() => self.step(Input::Tick)?,
            }
        }
    }

    fn step(&mut self, input: Input) -> Result<(), DriverError> {
        let mut outputs = std::mem::take(&mut self.outputs);
        let stepped = self.core.step(now(), input, &mut outputs);
        let mut changed = false;
        for output in outputs.drain(..) {
            match output {
                Output::Send(messages) => self.send(messages),
                Output::Persist(persist) => {
                    // The thread ends before us only with an error, which is on its way here.
                    if let Some(persists) = &self.persists {
                        let _ = persists.send(*persist);
                    }
                }
                Output::Answer(ticket, answer) => {
                    // Whoever asked may have gone.
                    if let Some(sender) = self.answers.remove(&ticket) {
                        let _ = sender.send(answer);
                    }
                }
                Output::Changed => changed = true,
                Output::BadMessage(bad) => tracing::warn!(member = %self.core.id(), "{bad}"),
            }
        }
        self.outputs = outputs;
        if changed {
            let members = self.core.machine().members().values();
            self.transport.update(members.map(|member| (member.id.0, member.control_addr.clone())));
            self.show.send_replace(show(&self.core));
        }
        Ok(stepped?)
    }

    fn send(&mut self, messages: Vec<Message>) {
        for lost in self.transport.send(messages) {
            self.core.unreachable(lost);
        }
    }
}
