//! Drives the load: workers that share iSCSI sessions, and a way back when a connection is lost.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use client::block::SECTOR;
use client::initiator::{Error, Session};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::history::{History, Sectors, UnderWay, Writing};
use super::line::Line;
use super::meter::{Meter, Slow};
use super::{Measured, Rng};

/// The initiator's name.
const INITIATOR: &str = "iqn.2026-11.io.md99:initiator";
/// Between two tries to log in.
const LOGIN_AGAIN: Duration = Duration::from_millis(20);
/// Wrong sectors that are told; the rest is counted.
const MAX_TOLD: usize = 20;
/// Sectors of the longest request.
const LONGEST: u64 = (1 << 20) / SECTOR;
/// Tries to find a range that nobody writes to.
const PICKS: usize = 32;
/// Sense of a command that the target could not carry out.
const HARDWARE_ERROR: u8 = 4;
const TARGET_FAILURE: u16 = 0x4400;
/// Requests under way when everything is read back.
const READ_BACK_DEPTH: usize = 8;

/// How often each kind of request comes, in parts of their sum.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Reads.
    pub read: u64,
    /// Writes of data.
    pub write: u64,
    /// SYNCHRONIZE CACHE.
    pub flush: u64,
    /// UNMAP.
    pub discard: u64,
    /// WRITE SAME of zeroes.
    pub zeroes: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Self { read: 46, write: 46, flush: 2, discard: 3, zeroes: 3 }
    }
}

/// What is to be loaded, and how.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    /// Where to log in.
    pub portal: SocketAddr,
    /// Where else the target may be found; tried in turn when it is not where it was.
    pub other_portals: Vec<SocketAddr>,
    /// iSCSI sessions that the workers share.
    pub sessions: usize,
    /// Asks so often whether a session is alive, and gives it up when no answer comes for as long. `None`: a
    /// session is lost only when its connection is.
    pub ping: Option<Duration>,
    /// The target's name.
    pub target: String,
    /// Decides every choice and content.
    pub seed: u64,
    /// Requests under way.
    pub depth: usize,
    /// What kinds.
    pub mix: Mix,
    /// Only the first so many bytes; `None`: the whole device.
    pub area: Option<u64>,
    /// Waits so long between two requests of a worker.
    pub pause: Duration,
    /// How long the target may be away before the load fails.
    pub patience: Duration,
}

impl LoadSpec {
    /// Mixed load at depth 8 over one session on the whole device.
    pub fn new(portal: SocketAddr, target: impl Into<String>, seed: u64) -> Self {
        Self {
            portal,
            other_portals: Vec::new(),
            sessions: 1,
            ping: None,
            target: target.into(),
            seed,
            depth: 8,
            mix: Mix::default(),
            area: None,
            pause: Duration::ZERO,
            patience: Duration::from_secs(60),
        }
    }
}

/// Why a load is over before its time.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The target could not be reached for longer than the load's patience.
    #[error("the target {target} at {portal} could not be reached for {seconds} s: {last}")]
    Away {
        /// The target.
        target: String,
        /// Its portal.
        portal: SocketAddr,
        /// For how long.
        seconds: u64,
        /// What the last try met.
        last: Error,
    },
    /// A command failed.
    #[error("{what} of {bytes} bytes at byte {offset}: {source}")]
    Command {
        /// Which.
        what: &'static str,
        /// Where.
        offset: u64,
        /// How long.
        bytes: u64,
        /// How it failed.
        source: Error,
    },
    /// Bytes are not what they must be.
    #[error("{count} sectors hold wrong bytes, the first: {first}")]
    Wrong {
        /// How many.
        count: u64,
        /// The first of them.
        first: String,
    },
}

#[derive(Default)]
struct Faults {
    wrong: u64,
    told: Vec<String>,
    error: Option<LoadError>,
}

struct Shared {
    spec: LoadSpec,
    history: Mutex<History>,
    meter: Meter,
    faults: Mutex<Faults>,
    lines: Vec<Line>,
    /// A flush may fail: see [`Load::let_flushes_fail`].
    flushes_may_fail: AtomicBool,
    /// Workers with a higher number rest.
    active: AtomicUsize,
    wake: Notify,
    stop: AtomicBool,
}

/// A running load.
pub struct Load {
    shared: Arc<Shared>,
    workers: JoinSet<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Load {
    /// Logs in, asks for the size, and begins. The device must read as zeroes.
    ///
    /// # Errors
    /// When the target cannot be reached.
    pub async fn start(spec: LoadSpec) -> Result<Self, LoadError> {
        let mut load = Self::idle(spec).await?;
        let shared = &load.shared;
        for worker in 0..shared.spec.depth {
            load.workers.spawn(work(shared.clone(), worker));
        }
        Ok(load)
    }

    /// The same without workers: for [`Self::write`] and [`Self::read_back`].
    ///
    /// # Errors
    /// When the target cannot be reached.
    pub async fn idle(spec: LoadSpec) -> Result<Self, LoadError> {
        let portals: Vec<SocketAddr> = [spec.portal].into_iter().chain(spec.other_portals.iter().copied()).collect();
        let line = |number| Line::new(portals.clone(), &spec.target, INITIATOR, number as u8, spec.ping);
        let shared = Shared {
            lines: (1..=spec.sessions.max(1)).map(line).collect(),
            history: Mutex::new(History::new(spec.seed, 0)),
            meter: Meter::default(),
            faults: Mutex::default(),
            flushes_may_fail: AtomicBool::new(false),
            active: AtomicUsize::new(spec.depth),
            wake: Notify::new(),
            stop: AtomicBool::new(false),
            spec,
        };
        let capacity =
            shared.again(0, "READ CAPACITY", &(0..0), |session| async move { session.read_capacity16().await }).await?;
        let sectors = capacity.blocks * u64::from(capacity.block_len) / SECTOR;
        *lock(&shared.history) = History::new(shared.spec.seed, sectors);
        shared.meter.take();
        Ok(Self { shared: Arc::new(shared), workers: JoinSet::new() })
    }

    /// Bytes of the device.
    pub fn device_bytes(&self) -> u64 {
        lock(&self.shared.history).sectors() * SECTOR
    }

    /// How many workers are to be at work; 0: the load rests. Those that wait for an answer go on waiting.
    pub fn set_active(&self, workers: usize) {
        self.shared.active.store(workers, Ordering::Relaxed);
        self.shared.wake.notify_waiters();
    }

    /// What was measured since the last call.
    pub fn take(&self) -> Measured {
        let reconnects = self.shared.lines.iter().map(Line::take_reconnects).sum();
        Measured { reconnects, ..self.shared.meter.take() }
    }

    /// The commands that took long, of those that were answered since the last call.
    pub fn take_slow(&self) -> Vec<Slow> {
        self.shared.meter.take_slow()
    }

    /// Commands answered since the last [`Self::take`].
    pub fn commands(&self) -> u64 {
        self.shared.meter.commands()
    }

    /// Fails if anything went wrong until now.
    ///
    /// # Errors
    /// The first thing that did.
    pub fn check(&self) -> Result<(), LoadError> {
        let mut faults = lock(&self.shared.faults);
        if let Some(error) = faults.error.take() {
            return Err(error);
        }
        match faults.told.first() {
            Some(first) => Err(LoadError::Wrong { count: faults.wrong, first: first.clone() }),
            None => Ok(()),
        }
    }

    /// The wrong sectors found, as far as they are told, and their number.
    pub fn wrong(&self) -> (u64, Vec<String>) {
        let faults = lock(&self.shared.faults);
        (faults.wrong, faults.told.clone())
    }

    /// What is under way now.
    pub fn under_way(&self) -> UnderWay {
        lock(&self.shared.history).under_way()
    }

    /// Every node lost power, and the gateway went with them: writes that no flush covered may be gone (R9). Call while
    /// all of them are down.
    pub fn caches_lost(&self) {
        lock(&self.shared.history).caches_lost();
    }

    /// Whether flushes may fail from now on, or those that are under way. Where every cache was lost, a flush that was
    /// asked for before the target knew it does, since what it should have covered may be gone (R9). Such a flush
    /// covers nothing.
    pub fn let_flushes_fail(&self, may: bool) {
        self.shared.flushes_may_fail.store(may, Ordering::Relaxed);
    }

    /// Ends the workers once what they have under way is answered.
    ///
    /// # Errors
    /// See [`Self::check`].
    pub async fn stop(&mut self) -> Result<(), LoadError> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake.notify_waiters();
        while let Some(ended) = self.workers.join_next().await {
            if let Err(error) = ended
                && let Ok(panic) = error.try_into_panic()
            {
                std::panic::resume_unwind(panic);
            }
        }
        self.check()
    }

    /// Writes these bytes of the device from one end to the other, in requests of 1 MiB, then flushes. Not while
    /// workers are at work.
    ///
    /// # Errors
    /// When a command fails, or the target is away too long.
    pub async fn write(&self, bytes: std::ops::Range<u64>) -> Result<(), LoadError> {
        let shared = &self.shared;
        let mut at = bytes.start / SECTOR;
        let end = bytes.end / SECTOR;
        while at < end {
            let range = at..(at + LONGEST).min(end);
            at = range.end;
            let writing = lock(&shared.history).begin_write(range);
            write(shared, 0, writing, false).await?;
        }
        flush(shared, 0).await
    }

    /// Reads the whole device, or its first `limit` bytes, and checks every byte.
    ///
    /// # Errors
    /// See [`Self::check`].
    pub async fn read_back(&self, limit: Option<u64>) -> Result<u64, LoadError> {
        let sectors = lock(&self.shared.history).sectors();
        let end = limit.map_or(sectors, |limit| (limit / SECTOR).min(sectors));
        let mut starts = (0..end).step_by(LONGEST as usize);
        let mut readers = JoinSet::new();
        loop {
            while readers.len() < READ_BACK_DEPTH {
                let Some(start) = starts.next() else { break };
                let shared = self.shared.clone();
                let line = (start / LONGEST) as usize;
                readers.spawn(async move { read(&shared, line, start..(start + LONGEST).min(end)).await });
            }
            match readers.join_next().await {
                None => break,
                Some(read) => read.expect("a reader does not panic")?,
            }
        }
        self.check()?;
        Ok(end * SECTOR)
    }

    /// Logs out; the connections are closed either way.
    pub async fn log_out(self) {
        for line in &self.shared.lines {
            line.log_out().await;
        }
    }
}

impl Shared {
    /// Does a command until it is answered: after a lost connection it logs in and repeats it.
    async fn again<T, F>(
        &self,
        line: usize,
        what: &'static str,
        range: &Sectors,
        command: impl Fn(Session) -> F,
    ) -> Result<T, LoadError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut away: Option<Instant> = None;
        loop {
            let error = match self.lines[line % self.lines.len()].run(&command).await {
                Ok(done) => return Ok(done),
                Err(error) if error.means_away() => error.into(),
                Err(error) => {
                    let (offset, bytes) = (range.start * SECTOR, (range.end - range.start) * SECTOR);
                    return Err(LoadError::Command { what, offset, bytes, source: error.into() });
                }
            };
            let since = *away.get_or_insert_with(Instant::now);
            if since.elapsed() > self.spec.patience {
                let (target, portal) = (self.spec.target.clone(), self.spec.portal);
                return Err(LoadError::Away { target, portal, seconds: since.elapsed().as_secs(), last: error });
            }
            tokio::time::sleep(LOGIN_AGAIN).await;
        }
    }

    fn fail(&self, error: LoadError) {
        lock(&self.faults).error.get_or_insert(error);
        self.stop.store(true, Ordering::Relaxed);
        self.wake.notify_waiters();
    }

    async fn rest(&self, worker: usize) -> bool {
        loop {
            let woken = self.wake.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            if self.stop.load(Ordering::Relaxed) {
                return false;
            }
            if worker < self.active.load(Ordering::Relaxed) {
                return true;
            }
            woken.await;
        }
    }
}

async fn work(shared: Arc<Shared>, worker: usize) {
    let mut rng = Rng::new(shared.spec.seed ^ (worker as u64 + 1) << 48);
    while shared.rest(worker).await {
        if let Err(error) = one(&shared, worker, &mut rng).await {
            return shared.fail(error);
        }
        if !shared.spec.pause.is_zero() {
            tokio::time::sleep(shared.spec.pause).await;
        }
    }
}

async fn one(shared: &Shared, line: usize, rng: &mut Rng) -> Result<(), LoadError> {
    let mix = shared.spec.mix;
    let mut draw = rng.below(mix.read + mix.write + mix.flush + mix.discard + mix.zeroes);
    let mut is = |part: u64| {
        let hit = draw < part;
        draw = draw.wrapping_sub(part);
        hit
    };
    if is(mix.read) {
        let range = pick(shared, rng);
        return read(shared, line, range).await;
    }
    if is(mix.flush) {
        return flush(shared, line).await;
    }
    let discard = is(mix.discard);
    let zeroes = discard || is(mix.zeroes);
    let Some(writing) = begin_somewhere(shared, rng, zeroes) else {
        // Everything is being written; the others' answers come first.
        tokio::task::yield_now().await;
        return Ok(());
    };
    match zeroes {
        true => zero(shared, line, writing, discard).await,
        false => write(shared, line, writing, rng.below(20) == 0).await,
    }
}

fn begin_somewhere(shared: &Shared, rng: &mut Rng, zeroes: bool) -> Option<Writing> {
    for _ in 0..PICKS {
        let range = pick(shared, rng);
        let mut history = lock(&shared.history);
        if !history.is_being_written(&range) {
            return Some(if zeroes { history.begin_zeroes(range) } else { history.begin_write(range) });
        }
    }
    None
}

/// Short and long, aligned and not: what file systems and databases send, and what crosses chunks.
fn pick(shared: &Shared, rng: &mut Rng) -> Sectors {
    let device = lock(&shared.history).sectors();
    let area = shared.spec.area.map_or(device, |area| (area / SECTOR).min(device));
    let (len, align) = match rng.below(100) {
        0..20 => (1 + rng.below(7), 1),
        20..60 => (8, 8),
        60..80 => (128, 8),
        80..90 => (1 + rng.below(256), 1),
        90..97 => (512, 8),
        _ => (LONGEST, 1),
    };
    let len = len.min(area);
    let start = rng.below(area - len + 1) / align * align;
    start..start + len
}

async fn read(shared: &Shared, line: usize, range: Sectors) -> Result<(), LoadError> {
    let issued = Instant::now();
    let (start, sectors) = (range.start, (range.end - range.start) as u32);
    let reading = lock(&shared.history).begin_read(range.clone());
    let data = shared.again(line, "READ", &range, |session| async move { session.read(start, sectors).await }).await;
    let data = match data {
        Ok(data) => data,
        Err(error) => {
            lock(&shared.history).drop_read(reading);
            return Err(error);
        }
    };
    shared.meter.answered(issued, data.len() as u64);
    let wrong = lock(&shared.history).end_read(reading, &data);
    if !wrong.is_empty() {
        let mut faults = lock(&shared.faults);
        faults.wrong += wrong.len() as u64;
        let room = MAX_TOLD.saturating_sub(faults.told.len());
        faults.told.extend(wrong.iter().take(room).map(ToString::to_string));
    }
    Ok(())
}

async fn write(shared: &Shared, line: usize, writing: Writing, fua: bool) -> Result<(), LoadError> {
    let issued = Instant::now();
    let range = writing.range();
    let data = Bytes::from(writing.content(shared.spec.seed));
    let bytes = data.len() as u64;
    let start = range.start;
    let written = shared.again(line, "WRITE", &range, |session| {
        let data = data.clone();
        async move { session.write(start, data, fua).await }
    });
    written.await?;
    shared.meter.answered(issued, bytes);
    lock(&shared.history).end_write(writing, fua);
    Ok(())
}

async fn zero(shared: &Shared, line: usize, writing: Writing, discard: bool) -> Result<(), LoadError> {
    let issued = Instant::now();
    let range = writing.range();
    let (start, sectors) = (range.start, (range.end - range.start) as u32);
    let what = if discard { "UNMAP" } else { "WRITE SAME" };
    let zeroed = shared.again(line, what, &range, |session| async move {
        match discard {
            true => session.unmap(start, sectors).await,
            false => session.write_zeroes(start, sectors, true).await,
        }
    });
    zeroed.await?;
    shared.meter.answered(issued, u64::from(sectors) * SECTOR);
    lock(&shared.history).end_write(writing, false);
    Ok(())
}

async fn flush(shared: &Shared, line: usize) -> Result<(), LoadError> {
    let issued = Instant::now();
    let may_fail = || shared.flushes_may_fail.load(Ordering::Relaxed);
    let might_fail = may_fail();
    let flushing = lock(&shared.history).begin_flush();
    let sync = |session: Session| async move { session.sync_cache().await };
    let flushed = shared.again(line, "SYNCHRONIZE CACHE", &(0..0), sync).await;
    shared.meter.answered(issued, 0);
    match flushed {
        Ok(()) => lock(&shared.history).end_flush(flushing),
        Err(LoadError::Command { source: Error::Status { key: HARDWARE_ERROR, code: TARGET_FAILURE, .. }, .. })
            if might_fail || may_fail() => {}
        Err(error) => return Err(error),
    }
    Ok(())
}
