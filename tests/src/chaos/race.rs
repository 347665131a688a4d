//! Initiators that write over one another in a small part of the volume. What they asked and were told is checked
//! for linearizability, sector by sector, by the simulation's checker: writes may overlap in time, and one whose
//! session was lost is not repeated, so that it may have happened or not.
//!
//! The history is checked and begun anew from time to time, so that it stays small. Each piece has a number that is
//! part of every value: what an earlier piece wrote must never be read again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use cli::load::Rng;
use cli::load::line::{Line, LineError};
use tokio::sync::{RwLock, watch};
use tokio::task::JoinSet;

use crate::sim::history::{Asked, History, SECTOR, Told, Value, bytes_of, values_of};

/// Sectors of the volume's end that are raced for.
pub const SECTORS: u64 = 2048;
const INITIATOR: &str = "iqn.2026-11.io.md99:racer";
const WORKERS: usize = 6;
/// Requests gather around these many places, so that they meet.
const SPOTS: u64 = 4;
/// Bits of a value that number the request; those above number the piece.
const NUMBER_BITS: u32 = 20;
/// How long a piece is.
const PIECE: Duration = Duration::from_secs(15);
/// Between two requests of a worker.
const PAUSE: Duration = Duration::from_millis(15);
/// Between two tries to reach the target.
const AGAIN: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Piece {
    number: u32,
    history: History,
    /// When each request was asked for, and by whom, for people.
    asked: Vec<(SystemTime, usize)>,
}

impl Piece {
    /// A request is asked for.
    fn ask(&mut self, worker: usize, asked: Asked, first: u64, count: u64, durable: bool) -> (Value, Value) {
        self.asked.push((SystemTime::now(), worker));
        (self.history.ask(asked, first, count, durable), self.number << NUMBER_BITS)
    }

    /// # Errors
    /// Tells what was asked of the sector that could not be so.
    fn check(&self) -> Result<(), String> {
        let Err(why) = self.history.check(SECTORS, |_| 0) else { return Ok(()) };
        let mut text = format!("piece {}: {why}; asked of it at its end:", self.number);
        let story = self.history.wrong_sector(SECTORS).map(|sector| self.history.story(sector)).unwrap_or_default();
        for (number, line) in &story {
            let (at, worker) = self.asked[*number as usize - 1];
            text += &format!("\n{} worker {worker} {line}", super::run::clock(at));
        }
        Err(text)
    }
}

struct Shared {
    lines: Vec<Line>,
    /// First sector of the part that is raced for.
    base: u64,
    seed: u64,
    patience: Duration,
    /// Held by each request; alone by whoever ends a piece.
    turn: RwLock<()>,
    piece: Mutex<Piece>,
    error: Mutex<Option<String>>,
    answered: std::sync::atomic::AtomicU64,
    unanswered: std::sync::atomic::AtomicU64,
}

/// A race that is on.
pub struct Race {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Race {
    /// Begins on the last [`SECTORS`] of a device of this size, which must read as zeroes.
    pub fn start(
        portals: &[std::net::SocketAddr],
        target: &str,
        device_sectors: u64,
        seed: u64,
        ping: Duration,
        patience: Duration,
    ) -> Self {
        let line = |number| Line::new(portals.to_vec(), target, INITIATOR, number, Some(ping));
        let shared = Arc::new(Shared {
            lines: (1..=WORKERS as u8).map(line).collect(),
            base: device_sectors - SECTORS,
            seed,
            patience,
            turn: RwLock::new(()),
            piece: Mutex::default(),
            error: Mutex::default(),
            answered: 0.into(),
            unanswered: 0.into(),
        });
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for worker in 0..WORKERS {
            let (shared, stopped) = (shared.clone(), stopped.clone());
            tasks.spawn(async move {
                let mut rng = Rng::new(shared.seed ^ (worker as u64 + 1) << 40);
                while !*stopped.borrow() && lock(&shared.error).is_none() {
                    let turn = shared.turn.read().await;
                    if let Err(error) = shared.one(worker, &mut rng).await {
                        shared.fail(error);
                    }
                    drop(turn);
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        let of_task = shared.clone();
        tasks.spawn(async move {
            let mut stopped = stopped;
            loop {
                let over = tokio::time::timeout(PIECE, stopped.wait_for(|stop| *stop)).await.is_ok();
                let turn = of_task.turn.write().await;
                if lock(&of_task.error).is_some() {
                    return;
                }
                if let Err(error) = of_task.end_piece().await {
                    of_task.fail(error);
                }
                drop(turn);
                if over {
                    return;
                }
            }
        });
        Self { shared, stop, tasks }
    }

    /// Fails if anything went wrong until now.
    ///
    /// # Errors
    /// The first thing that did.
    pub fn check(&self) -> anyhow::Result<()> {
        match &*lock(&self.shared.error) {
            Some(error) => anyhow::bail!("race: {error}"),
            None => Ok(()),
        }
    }

    /// Requests answered, and lost with their session.
    pub fn counts(&self) -> (u64, u64) {
        let load = |count: &std::sync::atomic::AtomicU64| count.load(std::sync::atomic::Ordering::Relaxed);
        (load(&self.shared.answered), load(&self.shared.unanswered))
    }

    /// Ends it, and checks the last piece.
    ///
    /// # Errors
    /// See [`Self::check`].
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        let _ = self.stop.send(true);
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                anyhow::bail!("race: {error}");
            }
        }
        for line in &self.shared.lines {
            line.log_out().await;
        }
        self.check()
    }
}

impl Shared {
    fn fail(&self, error: String) {
        lock(&self.error).get_or_insert(error);
    }

    /// A short range; all meet around a few places, most of which lie where chunks meet.
    fn pick(&self, rng: &mut Rng) -> (u64, u64) {
        let spot = (1 + rng.below(SPOTS)) * (SECTORS / (SPOTS + 1)) / 128 * 128;
        let (first, count) = match rng.below(4) {
            // Whole blocks, and any sectors.
            0..2 => (spot - 16 + 8 * rng.below(4), 8 * (1 + rng.below(2))),
            _ => (spot - 16 + rng.below(28), 1 + rng.below(20)),
        };
        (first, count)
    }

    async fn one(&self, worker: usize, rng: &mut Rng) -> Result<(), String> {
        let (first, count) = self.pick(rng);
        let (asked, durable) = match rng.below(100) {
            0..45 => (Asked::Read, false),
            45..87 => (Asked::Write, false),
            87..92 => (Asked::Write, true),
            92..96 => (Asked::Zero, false),
            _ => (Asked::Flush, false),
        };
        // A flush is of everything, and about no sector.
        let count = if asked == Asked::Flush { 0 } else { count };
        let (number, tag) = lock(&self.piece).ask(worker, asked, first, count, durable);
        self.request(worker, asked, first, count, durable, number, tag).await.map(drop)
    }

    /// Does it once; whether it was answered.
    async fn request(
        &self,
        worker: usize,
        asked: Asked,
        first: u64,
        count: u64,
        durable: bool,
        number: Value,
        tag: Value,
    ) -> Result<bool, String> {
        let at = self.base + first;
        let done = self.lines[worker].run(|session| async move {
            match asked {
                Asked::Read => session.read(at, count as u32).await,
                Asked::Write => {
                    session.write(at, bytes_of(tag | number, at, count, 0), durable).await.map(|()| bytes::Bytes::new())
                }
                Asked::Zero => session.write_zeroes(at, count as u32, true).await.map(|()| bytes::Bytes::new()),
                Asked::Flush => session.sync_cache().await.map(|()| bytes::Bytes::new()),
            }
        });
        let relaxed = std::sync::atomic::Ordering::Relaxed;
        match done.await {
            Ok(data) => {
                let values = if asked == Asked::Read { self.values(at, &data, tag)? } else { Vec::new() };
                lock(&self.piece).history.tell(number, Told::Done, values);
                self.answered.fetch_add(1, relaxed);
                Ok(true)
            }
            Err(LineError::Login(_)) => {
                // It was not sent.
                lock(&self.piece).history.tell(number, Told::Aborted, Vec::new());
                tokio::time::sleep(AGAIN).await;
                Ok(false)
            }
            Err(error) if error.means_away() => {
                lock(&self.piece).history.give_up(number);
                self.unanswered.fetch_add(1, relaxed);
                Ok(false)
            }
            Err(error) => Err(format!("{asked:?} of {count} sectors at {at}: {error}")),
        }
    }

    fn values(&self, at: u64, data: &[u8], tag: Value) -> Result<Vec<Value>, String> {
        let mut values = values_of(at, data, 0).map_err(|(_, why)| why)?;
        for (sector, value) in (at..).zip(&mut values) {
            if *value != 0 && *value >> NUMBER_BITS << NUMBER_BITS != tag {
                let (piece, current) = (*value >> NUMBER_BITS, tag >> NUMBER_BITS);
                return Err(format!("sector {sector} holds a write of piece {piece}, which ended; now is {current}"));
            }
            *value &= (1 << NUMBER_BITS) - 1;
        }
        Ok(values)
    }

    /// Reads everything, checks the piece, and begins the next one with zeroes. Nothing else is under way.
    async fn end_piece(&self) -> Result<(), String> {
        // What was sent over a session that was lost has happened or never will, once its initiator is back.
        for line in &self.lines {
            self.until_answered("TEST UNIT READY", || {
                line.run(|session| async move { session.test_unit_ready().await })
            })
            .await?;
        }
        self.until_done(Asked::Read).await?;
        let piece = std::mem::take(&mut *lock(&self.piece));
        let number = piece.number;
        let checked = tokio::task::spawn_blocking(move || piece.check());
        checked.await.map_err(|error| error.to_string())??;
        // The old piece's number still: nobody reads until the new one has begun.
        *lock(&self.piece) = Piece { number, ..Piece::default() };
        self.until_done(Asked::Zero).await?;
        *lock(&self.piece) = Piece { number: number + 1, ..Piece::default() };
        Ok(())
    }

    async fn until_done(&self, asked: Asked) -> Result<(), String> {
        let until = Instant::now() + self.patience;
        loop {
            let (number, tag) = lock(&self.piece).ask(0, asked, 0, SECTORS, false);
            if self.request(0, asked, 0, SECTORS, false, number, tag).await? {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("{asked:?} of everything was not answered for {:?}", self.patience));
            }
        }
    }

    async fn until_answered<T, F>(&self, what: &str, mut again: impl FnMut() -> F) -> Result<T, String>
    where
        F: Future<Output = Result<T, LineError>>,
    {
        let until = Instant::now() + self.patience;
        loop {
            match again().await {
                Ok(done) => return Ok(done),
                Err(error) if error.means_away() && Instant::now() < until => tokio::time::sleep(AGAIN).await,
                Err(error) => return Err(format!("{what}: {error}")),
            }
        }
    }
}

const _: () = assert!(SECTOR == client::block::SECTOR as usize);
