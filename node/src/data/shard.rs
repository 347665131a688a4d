//! One data thread: the replicas of its volumes, their connections, their disks.
//!
//! Everything is done in batches: the requests that one read from a socket brings, or the disk operations that
//! have ended, are given to the cores; what the cores want is carried out; disk operations that were begun start
//! with one system call, and the replies of each connection leave with one more.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use proto::frame::{Code, FrameReader, Header, Kind, PeerRole, Reply, Request};
use proto::id::{AttachId, ClusterId, Incarnation, ReplicaId, VolumeId};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};

use super::channel::{self, Conn, MAX_CHANNELS};
use super::now_ms;
use super::peer::Peers;
use super::plane::{ReplicaSpec, ReplicaState, ReplicaStatus, StartError};
use crate::replica::{
    Config, ConnId, CopyError, CopyToken, Create, DiskData, DiskError, DiskIo, FaultReason, FileLengths, Input, Notice,
    OpId, OpenError, OpenReport, Output, ReplicaCore, ReplicaIds,
};
use crate::store::{Engine, EngineKind, Finished, ReplicaFiles};

/// How often cores are told the time.
const TICK: Duration = Duration::from_millis(200);
/// Buffers that were not needed for so many ticks are freed.
const RELEASE_TICKS: u32 = 5;
/// A connection's replicas are told at most this often that it lives, beyond what they see themselves.
const TELL_MS: u64 = 400;
/// Pages of the block map that all replicas of the process keep in memory together: about 34 MiB.
const MAP_CACHE_PAGES: usize = 8192;
/// Between a fault and the first attempt to open the replica again; doubles up to the second.
const REOPEN_MS: (u64, u64) = (500, 30_000);
/// After this time without a fault the pause is short again.
const FORGET_MS: u64 = 120_000;
/// At the end, requests in flight and the last syncs are waited for this long.
const LAST_IO: Duration = Duration::from_secs(5);
/// Connections of one data thread; one more is closed.
const MAX_CONNS: usize = 1024;

/// What a data thread is told by others.
pub(super) enum Command {
    /// A connection that has sent its greeting.
    Adopt { stream: std::net::TcpStream, hello: Hello, rest: FrameReader },
    /// A replica's files are ready: it is made or opened.
    Open { spec: ReplicaSpec, files: ReplicaFiles, how: How, done: oneshot::Sender<Result<(), Failed>> },
    /// What is known of a replica; `None`: it is not here.
    Status { replica: ReplicaId, done: oneshot::Sender<Option<ReplicaStatus>> },
    /// All replicas.
    List { done: oneshot::Sender<Vec<ReplicaStatus>> },
    /// The replica can't be used; its requests are refused with a reason.
    Refuse { spec: ReplicaSpec, reason: String },
    /// Closes the replica; answers when its last disk operation has ended.
    Close { replica: ReplicaId, done: oneshot::Sender<()> },
}

/// A greeting.
#[derive(Clone, Debug)]
pub(super) struct Hello {
    pub(super) role: PeerRole,
    pub(super) volume: VolumeId,
    pub(super) name: String,
    pub(super) tag: u64,
}

/// How a replica comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Create(Create),
    Open,
}

/// Why a replica did not open.
#[derive(Clone, Debug)]
pub(super) enum Failed {
    Open(OpenError),
    /// It was closed meanwhile.
    Closed,
}

/// What a data thread starts with.
#[derive(Clone, Debug)]
pub(super) struct ShardConfig {
    pub(super) cluster: ClusterId,
    pub(super) incarnation: Incarnation,
    pub(super) engine: EngineKind,
    pub(super) threads: usize,
}

/// A replica that this thread keeps, and whoever has a channel to it.
pub(super) struct ReplicaCell {
    spec: ReplicaSpec,
    inner: RefCell<Inner>,
}

struct Inner {
    state: State,
    files: Option<ReplicaFiles>,
    /// Disk operations that have not ended.
    in_flight: u32,
    /// Counts the cores: answers to an older core's copies mean nothing to a newer one.
    generation: u64,
    waiters: Vec<oneshot::Sender<Result<(), Failed>>>,
    closed: Option<oneshot::Sender<()>>,
    reopen_pause_ms: u64,
    faulted_at_ms: u64,
}

enum State {
    Opening(Box<ReplicaCore>),
    Open(Box<ReplicaCore>),
    Faulted {
        core: Box<ReplicaCore>,
        reason: FaultReason,
        reopen_at_ms: u64,
    },
    Refused(String),
    /// Deleted, or the thread ends.
    Closed,
}

impl State {
    fn core(&mut self) -> Option<&mut ReplicaCore> {
        match self {
            Self::Opening(core) | Self::Open(core) | Self::Faulted { core, .. } => Some(core),
            Self::Refused(_) | Self::Closed => None,
        }
    }
}

/// The end of a copy: whose, of which core of it, which, and how it ended.
pub(super) type CopyEnded = (Rc<ReplicaCell>, u64, CopyToken, Result<(), CopyError>);

/// A handle to the thread's state; not shared with other threads.
#[derive(Clone)]
pub(super) struct Shard(Rc<RefCell<Thread>>);

struct Thread {
    me: std::rc::Weak<RefCell<Thread>>,
    config: ShardConfig,
    engine: Engine,
    replicas: BTreeMap<ReplicaId, Rc<ReplicaCell>>,
    conns: BTreeMap<ConnId, Rc<Conn>>,
    next_conn: u64,
    /// Disk operations in the engine.
    running: HashMap<u64, (Rc<ReplicaCell>, OpId)>,
    next_running: u64,
    /// Ended in place; the cores are still to be told.
    ended: VecDeque<(Rc<ReplicaCell>, OpId, Result<DiskData, DiskError>)>,
    finished: Vec<Finished>,
    /// Connections with new replies.
    replied: Vec<Rc<Conn>>,
    peers: Peers,
    out: Vec<Output>,
    ticks: u32,
}

/// Runs a data thread until it is told to end; inside a `LocalSet`.
pub(super) async fn run(
    config: ShardConfig,
    mut commands: mpsc::Receiver<Command>,
    mut stopped: watch::Receiver<bool>,
    started: oneshot::Sender<Result<(), StartError>>,
) {
    let engine = match Engine::start(config.engine) {
        Ok(engine) => engine,
        Err(error) => {
            // Whoever starts us tells of it.
            let _ = started.send(Err(StartError::Engine(error)));
            return;
        }
    };
    let waiter = engine.waiter();
    let shard = Shard(Rc::new_cyclic(|me| {
        RefCell::new(Thread {
            me: me.clone(),
            config,
            engine,
            replicas: BTreeMap::new(),
            conns: BTreeMap::new(),
            next_conn: 0,
            running: HashMap::new(),
            next_running: 0,
            ended: VecDeque::new(),
            finished: Vec::new(),
            replied: Vec::new(),
            peers: Peers::default(),
            out: Vec::new(),
            ticks: 0,
        })
    }));
    let disks = shard.clone();
    tokio::task::spawn_local(async move {
        loop {
            if let Err(error) = waiter.wait().await {
                tracing::error!(%error, "disk completions can't be waited for");
                tokio::time::sleep(TICK).await;
            }
            disks.with(|thread| thread.pump());
        }
    });
    let _ = started.send(Ok(()));
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(command) => shard.command(command),
                None => return shard.shutdown().await,
            },
            _ = stopped.changed() => return shard.shutdown().await,
            _ = tick.tick(), if !shard.with(|thread| thread.replicas.is_empty()) => shard.with(Thread::tick),
        }
    }
}

impl Shard {
    fn with<T>(&self, f: impl FnOnce(&mut Thread) -> T) -> T {
        f(&mut self.0.borrow_mut())
    }

    pub(super) fn peers<T>(&self, f: impl FnOnce(&mut Peers) -> T) -> T {
        self.with(|thread| f(&mut thread.peers))
    }

    /// Requests that came together on one connection, in order.
    pub(super) fn requests(&self, conn: &Rc<Conn>, requests: &mut Vec<(Header, Request)>) {
        self.with(|thread| {
            let now = now_ms();
            let stale = now.saturating_sub(conn.told_ms.get()) >= TELL_MS;
            if stale || requests.iter().any(|(_, r)| matches!(r, Request::Ping)) {
                conn.told_ms.set(now);
                thread.heard(conn);
            }
            requests.drain(..).for_each(|(header, request)| thread.request(conn, &header, request));
            thread.pump();
        });
    }

    /// A connection has ended.
    pub(super) fn lost(&self, conn: &Rc<Conn>) {
        self.with(|thread| {
            thread.conns.remove(&conn.id);
            let cells: Vec<_> = std::mem::take(&mut *conn.channels.borrow_mut()).into_values().collect();
            cells.iter().for_each(|cell| thread.input(cell, Input::ConnectionLost { conn: conn.id }));
            thread.pump();
        });
    }

    /// Peers have answered, or could not be reached.
    pub(super) fn copies_ended(&self, ended: Vec<CopyEnded>) {
        if ended.is_empty() {
            return;
        }
        self.with(|thread| {
            for (cell, generation, token, result) in ended {
                if cell.inner.borrow().generation == generation {
                    thread.input(&cell, Input::CopySent { token, result });
                }
            }
            thread.pump();
        });
    }

    fn command(&self, command: Command) {
        match command {
            Command::Adopt { stream, hello, rest } => self.adopt(stream, hello, rest),
            other => self.with(|thread| {
                thread.command(other);
                thread.pump();
            }),
        }
    }

    fn adopt(&self, stream: std::net::TcpStream, hello: Hello, rest: FrameReader) {
        let stream = match TcpStream::from_std(stream) {
            Ok(stream) => stream,
            Err(error) => return tracing::warn!(%error, "connection lost on its way to its thread"),
        };
        let (incoming, outgoing) = stream.into_split();
        let conn = self.with(|thread| {
            thread.next_conn += 1;
            let id = ConnId(thread.next_conn);
            let conn = Rc::new(Conn::new(id, hello.role, hello.volume, hello.name, outgoing));
            if thread.conns.len() >= MAX_CONNS {
                tracing::warn!(limit = MAX_CONNS, "too many connections: one more is closed");
                return None;
            }
            thread.conns.insert(id, conn.clone());
            thread.answer(&conn, 0, hello.tag, AttachId::default(), &Reply::Done(Kind::Hello));
            thread.pump();
            Some(conn)
        });
        if let Some(conn) = conn {
            tokio::task::spawn_local(channel::serve(self.clone(), conn, incoming, rest));
        }
    }

    /// Takes no more requests, lets those in flight end, and syncs every replica.
    async fn shutdown(&self) {
        let ended = async {
            let quiet = |thread: &mut Thread| thread.running.is_empty() && thread.ended.is_empty();
            self.with(|thread| {
                let conns: Vec<_> = thread.conns.values().cloned().collect();
                for conn in conns {
                    let cells: Vec<_> = std::mem::take(&mut *conn.channels.borrow_mut()).into_values().collect();
                    cells.iter().for_each(|cell| thread.input(cell, Input::ConnectionLost { conn: conn.id }));
                    conn.close();
                }
                thread.pump();
            });
            while !self.with(quiet) {
                tokio::time::sleep(Duration::from_millis(5)).await;
                self.with(Thread::pump);
            }
            // Not needed for what was promised, which has been flushed; it spares the next start a surprise.
            let files: Vec<ReplicaFiles> = self
                .with(|thread| thread.replicas.values().filter_map(|cell| cell.inner.borrow().files.clone()).collect());
            let synced = tokio::task::spawn_blocking(move || {
                for files in files {
                    if let ReplicaFiles::File(files) = files {
                        for file in [crate::replica::FileKind::Data, crate::replica::FileKind::Meta] {
                            if let Err(error) = files.execute(&DiskIo::Sync { file, map: true }) {
                                tracing::warn!(path = %files.path(file).display(), %error, "last sync failed");
                            }
                        }
                    }
                }
            });
            // It only fails when it panics, which has been reported by then.
            let _ = synced.await;
        };
        if tokio::time::timeout(LAST_IO, ended).await.is_err() {
            tracing::warn!("disks did not become quiet: ending all the same");
        }
        self.with(|thread| {
            let cells = std::mem::take(&mut thread.replicas);
            cells.values().for_each(|cell| {
                let mut inner = cell.inner.borrow_mut();
                inner.state = State::Closed;
                inner.files = None;
            });
        });
    }
}

impl Thread {
    fn shard(&self) -> Shard {
        Shard(self.me.upgrade().expect("called through it"))
    }

    /// Carries on until there is nothing to do at once.
    fn pump(&mut self) {
        loop {
            let mut finished = std::mem::take(&mut self.finished);
            self.engine.reap(&mut finished);
            if self.ended.is_empty() && finished.is_empty() {
                self.engine.kick();
                self.replied.drain(..).for_each(|conn| conn.flush());
                self.engine.sync_here(&mut finished);
            }
            for (number, result) in finished.drain(..) {
                let (cell, op) = self.running.remove(&number).expect("an operation that ends has begun");
                self.ended.push_back((cell, op, result));
            }
            self.finished = finished;
            if self.ended.is_empty() {
                return;
            }
            while let Some((cell, op, result)) = self.ended.pop_front() {
                cell.inner.borrow_mut().in_flight -= 1;
                self.input(&cell, Input::DiskDone { op, result });
                self.maybe_closed(&cell);
            }
        }
    }

    fn tick(&mut self) {
        let now = now_ms();
        let cells: Vec<_> = self.replicas.values().cloned().collect();
        for cell in cells {
            let reopen = {
                let inner = cell.inner.borrow();
                matches!(&inner.state, State::Faulted { reopen_at_ms, .. } if *reopen_at_ms <= now)
                    && inner.in_flight == 0
            };
            if reopen {
                self.reopen(&cell);
            } else {
                self.input(&cell, Input::Tick);
            }
        }
        self.pump();
        self.ticks = self.ticks.wrapping_add(1);
        if self.ticks.is_multiple_of(RELEASE_TICKS) {
            proto::buffer::release_idle();
        }
    }

    fn heard(&mut self, conn: &Rc<Conn>) {
        let cells: Vec<_> = conn.channels.borrow().values().cloned().collect();
        cells.iter().for_each(|cell| self.input(cell, Input::Heard { conn: conn.id }));
    }

    fn answer(&mut self, conn: &Rc<Conn>, channel: u32, tag: u64, attach: AttachId, reply: &Reply) {
        conn.push((channel, tag), reply.encode(channel, attach, tag));
        if !self.replied.iter().any(|known| known.id == conn.id) {
            self.replied.push(conn.clone());
        }
    }

    fn request(&mut self, conn: &Rc<Conn>, header: &Header, request: Request) {
        let (channel, tag, attach) = (header.channel, header.tag, header.attach);
        let kind = request.kind();
        let code = match (&request, conn.role) {
            (Request::Ping, _) => {
                return self.answer(conn, channel, tag, attach, &Reply::Done(Kind::Ping));
            }
            (Request::Hello { .. }, _) => Err(Code::Invalid),
            (Request::Attach { replica, .. }, PeerRole::Gateway) => self.channel_for(conn, channel, *replica),
            (Request::CopyWrite { replica, .. }, PeerRole::Node) => {
                let here = self.replicas.get(replica).filter(|cell| cell.spec.volume == conn.volume);
                here.cloned().ok_or(Code::UnknownReplica)
            }
            (Request::CopyWrite { .. }, _) | (_, PeerRole::Node) => Err(Code::Invalid),
            (_, PeerRole::Gateway) => conn.channels.borrow().get(&channel).cloned().ok_or(Code::NotAttached),
        };
        let cell = match code {
            Ok(cell) => cell,
            Err(code) => {
                return self.answer(conn, channel, tag, attach, &Reply::Failed { kind, code, block: 0 });
            }
        };
        let refused = match &cell.inner.borrow().state {
            State::Refused(_) => Some(Code::Faulted),
            State::Closed => Some(Code::UnknownReplica),
            _ => None,
        };
        if let Some(code) = refused {
            return self.answer(conn, channel, tag, attach, &Reply::Failed { kind, code, block: 0 });
        }
        self.input(&cell, Input::Request { conn: conn.id, channel, tag, attach, request });
    }

    /// The replica that an attach names, and which the channel stands for from here on.
    fn channel_for(&self, conn: &Rc<Conn>, channel: u32, replica: ReplicaId) -> Result<Rc<ReplicaCell>, Code> {
        let cell = self.replicas.get(&replica).filter(|cell| cell.spec.volume == conn.volume);
        let cell = cell.ok_or(Code::UnknownReplica)?;
        let mut channels = conn.channels.borrow_mut();
        match channels.get(&channel) {
            Some(known) if Rc::ptr_eq(known, cell) => {}
            // One of a replica that has been closed since.
            Some(known) if matches!(known.inner.borrow().state, State::Closed) => {
                channels.insert(channel, cell.clone());
            }
            Some(_) => return Err(Code::Invalid),
            None if channels.len() >= MAX_CHANNELS => return Err(Code::Busy),
            None => {
                channels.insert(channel, cell.clone());
            }
        }
        Ok(cell.clone())
    }

    fn input(&mut self, cell: &Rc<ReplicaCell>, input: Input) {
        let mut out = std::mem::take(&mut self.out);
        {
            let mut inner = cell.inner.borrow_mut();
            if let Some(core) = inner.state.core() {
                core.step(now_ms(), input, &mut out);
            }
        }
        self.carry_out(cell, &mut out);
        self.out = out;
    }

    fn carry_out(&mut self, cell: &Rc<ReplicaCell>, out: &mut Vec<Output>) {
        for output in out.drain(..) {
            match output {
                Output::Reply { conn, channel, tag, attach, reply } => {
                    if let Some(conn) = self.conns.get(&conn).cloned() {
                        self.answer(&conn, channel, tag, attach, &reply);
                    }
                }
                Output::Disk { op, io } => self.disk(cell, op, io),
                Output::SendCopy { to, token, request } => {
                    let (cluster, volume) = (self.config.cluster, cell.spec.volume);
                    let generation = cell.inner.borrow().generation;
                    let (shard, copy) = (self.shard(), token);
                    if !self.peers.send(&shard, cluster, volume, cell, generation, to, token, request) {
                        let cell = cell.clone();
                        tokio::task::spawn_local(async move {
                            shard.copies_ended(vec![(cell, generation, copy, Err(CopyError::Unreachable))]);
                        });
                    }
                }
                Output::CloseConnection { conn, reason } => {
                    if let Some(conn) = self.conns.get(&conn) {
                        let spec = &cell.spec;
                        tracing::warn!(volume = %spec.volume, replica = %spec.replica, peer = %conn.name, %reason,
                            "connection closed");
                        conn.close();
                    }
                }
                Output::Opened(report) => self.opened(cell, &report),
                Output::OpenFailed(error) => self.open_failed(cell, error),
                Output::Faulted(reason) => self.faulted(cell, reason),
                Output::Notice(notice) => log(&cell.spec, notice),
            }
        }
    }

    fn disk(&mut self, cell: &Rc<ReplicaCell>, op: OpId, io: DiskIo) {
        let mut inner = cell.inner.borrow_mut();
        inner.in_flight += 1;
        let files = inner.files.as_ref().expect("a replica with a core has its files");
        if let Some(result) = self.engine.in_place(files, &io) {
            self.ended.push_back((cell.clone(), op, result));
            return;
        }
        let ReplicaFiles::File(files) = files else { unreachable!("memory is always in place") };
        self.next_running += 1;
        self.running.insert(self.next_running, (cell.clone(), op));
        self.engine.submit(self.next_running, files, io);
    }

    fn opened(&mut self, cell: &Rc<ReplicaCell>, report: &OpenReport) {
        let spec = &cell.spec;
        if let Some(copy) = report.repaired_superblock {
            tracing::warn!(volume = %spec.volume, replica = %spec.replica, copy, "superblock copy repaired");
        }
        if report.bad_bitmap_pages > 0 {
            let pages = report.bad_bitmap_pages;
            tracing::warn!(volume = %spec.volume, replica = %spec.replica, pages, "bad bitmap pages: all dirty");
        }
        tracing::info!(volume = %spec.volume, replica = %spec.replica, epoch = %report.epoch, dirty = report.dirty,
            rebuilt = report.rebuilt, journal_blocks = report.journal_blocks, "replica is open");
        let mut inner = cell.inner.borrow_mut();
        let State::Opening(core) = std::mem::replace(&mut inner.state, State::Closed) else {
            panic!("a replica opened that was not opening");
        };
        inner.state = State::Open(core);
        for waiter in inner.waiters.drain(..) {
            // Whoever asked may have given up.
            let _ = waiter.send(Ok(()));
        }
    }

    fn open_failed(&mut self, cell: &Rc<ReplicaCell>, error: OpenError) {
        let spec = &cell.spec;
        tracing::warn!(volume = %spec.volume, replica = %spec.replica, pool = %spec.pool, %error,
            "replica can't be opened");
        let mut inner = cell.inner.borrow_mut();
        // A sync that fails drops what it should have written.
        if matches!(error, OpenError::Disk { .. }) {
            inner.files.as_ref().expect("they were being opened").end_era();
        }
        inner.state = State::Refused(error.to_string());
        // So that the next attempt finds them unlocked.
        inner.files = None;
        for waiter in inner.waiters.drain(..) {
            let _ = waiter.send(Err(Failed::Open(error.clone())));
        }
    }

    fn faulted(&mut self, cell: &Rc<ReplicaCell>, reason: FaultReason) {
        let mut inner = cell.inner.borrow_mut();
        let now = now_ms();
        if now - inner.faulted_at_ms > FORGET_MS {
            inner.reopen_pause_ms = REOPEN_MS.0;
        }
        inner.faulted_at_ms = now;
        inner.files.as_ref().expect("a replica with a core has its files").end_era();
        let pause = inner.reopen_pause_ms;
        inner.reopen_pause_ms = (pause * 2).min(REOPEN_MS.1);
        let spec = &cell.spec;
        tracing::error!(volume = %spec.volume, replica = %spec.replica, pool = %spec.pool, %reason,
            reopen_in_ms = pause, "replica faulted");
        let (State::Open(core) | State::Opening(core)) = std::mem::replace(&mut inner.state, State::Closed) else {
            panic!("a replica faulted that was not open");
        };
        inner.state = State::Faulted { core, reason, reopen_at_ms: now + pause };
    }

    /// Begins anew with what is on the disk, as a restarted replica.
    fn reopen(&mut self, cell: &Rc<ReplicaCell>) {
        let files = cell.inner.borrow().files.clone().expect("a faulted replica keeps its files");
        files.drop_cache();
        match files.lengths() {
            Ok(lengths) => self.start(cell, How::Open, lengths),
            Err(error) => {
                tracing::warn!(replica = %cell.spec.replica, %error, "can't look at the files");
                let mut inner = cell.inner.borrow_mut();
                let pause = inner.reopen_pause_ms;
                if let State::Faulted { reopen_at_ms, .. } = &mut inner.state {
                    *reopen_at_ms = now_ms() + pause;
                }
            }
        }
    }

    fn start(&mut self, cell: &Rc<ReplicaCell>, how: How, lengths: FileLengths) {
        let spec = &cell.spec;
        let config = Config {
            ids: ReplicaIds { cluster: spec.cluster, volume: spec.volume, mirror: spec.mirror, replica: spec.replica },
            blocks: spec.blocks(),
            incarnation: self.config.incarnation,
            era: cell.inner.borrow().files.as_ref().expect("they are there to be opened").era(),
            map_cache_pages: self.cache_share(),
        };
        let mut out = Vec::new();
        let core = match how {
            How::Create(create) => ReplicaCore::create(config, create, &mut out),
            How::Open => ReplicaCore::open(config, lengths, &mut out),
        };
        {
            let mut inner = cell.inner.borrow_mut();
            assert_eq!(inner.in_flight, 0, "a replica begins anew with disk operations in flight");
            inner.generation += 1;
            inner.state = State::Opening(Box::new(core));
        }
        self.carry_out(cell, &mut out);
    }

    fn cache_share(&self) -> usize {
        MAP_CACHE_PAGES / self.config.threads / self.replicas.len().max(1)
    }

    fn share_cache(&mut self) {
        let share = self.cache_share();
        for cell in self.replicas.values() {
            if let Some(core) = cell.inner.borrow_mut().state.core() {
                core.set_cache_limit(share);
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Adopt { .. } => unreachable!("handled by the thread's loop"),
            Command::Open { spec, files, how, done } => {
                let cell = self.cell(spec);
                // A process that was killed after a failed sync, and before it could reopen the replica, has left
                // pages behind that look as if they were on the disk. No later sync would write them.
                files.drop_cache();
                let lengths = match files.lengths() {
                    Ok(lengths) => lengths,
                    Err(error) => {
                        cell.inner.borrow_mut().state = State::Refused(error.to_string());
                        let _ = done.send(Err(Failed::Closed));
                        return;
                    }
                };
                {
                    let mut inner = cell.inner.borrow_mut();
                    assert!(matches!(inner.state, State::Refused(_)), "a replica opened twice");
                    inner.files = Some(files);
                    inner.waiters.push(done);
                }
                self.start(&cell, how, lengths);
                self.share_cache();
            }
            Command::Refuse { spec, reason } => {
                let cell = self.cell(spec);
                let mut inner = cell.inner.borrow_mut();
                if let State::Refused(known) = &mut inner.state {
                    *known = reason;
                }
            }
            Command::Status { replica, done } => {
                let _ = done.send(self.replicas.get(&replica).map(|cell| cell.status()));
            }
            Command::List { done } => {
                let _ = done.send(self.replicas.values().map(|cell| cell.status()).collect());
            }
            Command::Close { replica, done } => {
                let Some(cell) = self.replicas.remove(&replica) else {
                    let _ = done.send(());
                    return;
                };
                {
                    let mut inner = cell.inner.borrow_mut();
                    inner.state = State::Closed;
                    inner.closed = Some(done);
                    for waiter in inner.waiters.drain(..) {
                        let _ = waiter.send(Err(Failed::Closed));
                    }
                }
                // Requests that were in flight get no answer: their connections go.
                for conn in self.conns.values() {
                    if conn.channels.borrow().values().any(|known| Rc::ptr_eq(known, &cell)) {
                        conn.close();
                    }
                }
                self.maybe_closed(&cell);
                self.share_cache();
            }
        }
    }

    /// The replica's cell; a new one refuses everything until it is opened. One that was refused as something else
    /// makes way.
    fn cell(&mut self, spec: ReplicaSpec) -> Rc<ReplicaCell> {
        if let Some(known) = self.replicas.get(&spec.replica) {
            let mut inner = known.inner.borrow_mut();
            if known.spec == spec || !matches!(inner.state, State::Refused(_)) {
                return known.clone();
            }
            inner.state = State::Closed;
        }
        let inner = Inner {
            state: State::Refused("it has not been opened".to_owned()),
            files: None,
            in_flight: 0,
            generation: 0,
            waiters: Vec::new(),
            closed: None,
            reopen_pause_ms: REOPEN_MS.0,
            faulted_at_ms: 0,
        };
        let cell = Rc::new(ReplicaCell { spec, inner: RefCell::new(inner) });
        self.replicas.insert(cell.spec.replica, cell.clone());
        cell
    }

    /// Lets the files of a closed replica go once nothing is in flight.
    fn maybe_closed(&mut self, cell: &Rc<ReplicaCell>) {
        let mut inner = cell.inner.borrow_mut();
        if inner.in_flight == 0
            && let Some(done) = inner.closed.take()
        {
            inner.files = None;
            let _ = done.send(());
        }
    }
}

impl ReplicaCell {
    fn status(&self) -> ReplicaStatus {
        let mut inner = self.inner.borrow_mut();
        let (dirty, suspect) = inner.state.core().map_or((0, 0), |core| core.dirty_regions());
        let state = match &inner.state {
            State::Opening(_) => ReplicaState::Opening,
            State::Open(_) => ReplicaState::Open,
            State::Faulted { reason, .. } => ReplicaState::Faulted { reason: reason.to_string() },
            State::Refused(reason) => ReplicaState::Refused { reason: reason.clone() },
            State::Closed => ReplicaState::Refused { reason: "closed".to_owned() },
        };
        ReplicaStatus { spec: self.spec.clone(), state, dirty_regions: dirty, suspect_regions: suspect }
    }
}

fn log(spec: &ReplicaSpec, notice: Notice) {
    let (volume, replica) = (spec.volume, spec.replica);
    match notice {
        Notice::Attached(attach) => tracing::info!(%volume, %replica, %attach, "attached"),
        Notice::AttachEnded { attach, why } => tracing::info!(%volume, %replica, %attach, ?why, "attach ended"),
        Notice::BadMap { region } => {
            tracing::warn!(%volume, %replica, %region, "the block map is bad: the region is dirty and suspect");
        }
        Notice::ChecksumMismatch { block } => {
            tracing::warn!(%volume, %replica, %block, "a block does not match its checksum");
        }
        Notice::ReadFailed { block } => tracing::warn!(%volume, %replica, %block, "read failed"),
        Notice::WriteFailed { block, error } => tracing::warn!(%volume, %replica, %block, %error, "write failed"),
        Notice::PunchFailed { block } => tracing::debug!(%volume, %replica, %block, "space not freed"),
        Notice::CopyFailed { block, error } => tracing::warn!(%volume, %replica, %block, %error, "copy failed"),
    }
}
