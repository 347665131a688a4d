//! The load over iSCSI: threads that each drive some sessions, without a runtime.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use client::initiator::Options;
use client::initiator::lane::{Ended, Io, Lane};
use rustix::time::{ClockId, clock_gettime};

use super::figures::Recorder;
use super::shape::{Requests, Shape};
use super::target::{Portal, Round, lock};
use crate::failure::{Failure, Outcome};

/// How long answers are waited for after the end.
pub const DRAIN: Duration = Duration::from_secs(60);
/// The same once the user has asked to stop.
pub const DRAIN_STOPPED: Duration = Duration::from_secs(2);
/// Errors at which a round ends.
pub const MAX_ERRORS: u64 = 1000;

/// How one round is to be.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// What is asked.
    pub shape: &'a Shape,
    /// Of the first so many bytes.
    pub region: u64,
    /// Sessions.
    pub sessions: usize,
    /// For how long.
    pub time: Duration,
    /// Until so many bytes have been asked for, however long that takes.
    pub total: Option<u64>,
    /// Decides what is random.
    pub seed: u64,
    /// Of the time series.
    pub interval: Duration,
    /// Set when the user asks to stop.
    pub stop: &'a Arc<AtomicBool>,
}

impl Plan<'_> {
    /// Requests that may be asked for in all.
    pub fn limit(&self) -> u64 {
        self.total.map_or(u64::MAX, |total| total.div_ceil(self.shape.block_size))
    }
}

/// Where a slot stands.
#[derive(Clone, Copy)]
pub struct Slot {
    /// What it asks.
    pub io: Io,
    /// Since when.
    pub since: Instant,
    /// Whether that reads.
    pub read: bool,
    /// The flush that belongs to a write is under way.
    pub flushing: bool,
}

/// Processor time of this thread until now.
pub fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// One round: logs in, loads, logs out.
///
/// # Errors
/// When it cannot log in.
pub async fn run(portal: &Portal, plan: &Plan<'_>) -> Outcome<Round> {
    let mut rng = crate::load::Rng::new(plan.seed);
    let pattern: Vec<u8> = (0..8192).flat_map(|_| rng.draw().to_le_bytes()).collect();
    let mut lanes = Vec::new();
    for session in 0..plan.sessions {
        let options = options(portal, session);
        let bytes = plan.shape.block_size as usize;
        let lane = Lane::connect(portal.addr, &options, portal.lun, plan.shape.queue_depth, bytes, &pattern);
        let (lane, _) = lane.await.map_err(|error| portal.failure(&error))?;
        lanes.push(lane);
    }
    let threads = thread::available_parallelism().map_or(1, usize::from).min(lanes.len());
    let mut shares: Vec<Vec<(usize, Lane)>> = (0..threads).map(|_| Vec::new()).collect();
    for (index, lane) in lanes.into_iter().enumerate() {
        shares[index % threads].push((index, lane));
    }
    let recorder = Mutex::new(Recorder::new(plan.interval));
    let cpu = tokio::task::block_in_place(|| {
        thread::scope(|scope| {
            let recorder = &recorder;
            let running: Vec<_> = shares
                .into_iter()
                .map(|share| {
                    scope.spawn(move || {
                        let before = cpu_seconds();
                        drive(share, plan, recorder);
                        cpu_seconds() - before
                    })
                })
                .collect();
            let cpu = running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            cpu.sum::<f64>()
        })
    });
    let recorder = recorder.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(Round::new(recorder, Instant::now(), cpu))
}

/// What a session logs in with.
pub fn options(portal: &Portal, session: usize) -> Options {
    let mut options = Options::new(&portal.target);
    options.initiator = "iqn.2026-11.io.md99:bench".into();
    // A session of its own for each, and for each process.
    let pid = std::process::id().to_be_bytes();
    options.isid = [0x80, pid[1], pid[2], pid[3], (session >> 8) as u8, session as u8];
    options
}

fn drive(share: Vec<(usize, Lane)>, plan: &Plan<'_>, recorder: &Mutex<Recorder>) {
    let shape = plan.shape;
    let sessions = plan.sessions as u64;
    let mut requests: Vec<Requests> =
        share.iter().map(|(index, _)| Requests::new(shape, plan.region, *index as u64, sessions, plan.seed)).collect();
    // Each session has its part of what is to be asked for.
    let mut left: Vec<u64> = share
        .iter()
        .map(|(index, _)| match plan.limit() {
            u64::MAX => u64::MAX,
            limit => limit / sessions + u64::from((*index as u64) < limit % sessions),
        })
        .collect();
    let mut lanes: Vec<Lane> = share.into_iter().map(|(_, lane)| lane).collect();
    let began = Instant::now();
    let end = match plan.total {
        None => began + plan.time,
        Some(_) => began + Duration::from_secs(24 * 3600),
    };
    let idle = Slot { io: Io::Flush, since: began, read: false, flushing: false };
    let mut slots = vec![vec![idle; shape.queue_depth]; lanes.len()];
    let mut under_way = 0;
    let mut begin = |lane: &mut Lane, which: usize, slot: usize, state: &mut Slot, now: Instant| {
        if left[which] == 0 {
            return false;
        }
        left[which] -= 1;
        let (io, salt) = requests[which].draw();
        let read = matches!(io, Io::Read { .. });
        if !read {
            lane.content(slot)[..8].copy_from_slice(&salt.to_le_bytes());
        }
        *state = Slot { io, since: now, read, flushing: false };
        lane.begin(slot, io);
        true
    };
    for (which, lane) in lanes.iter_mut().enumerate() {
        for (slot, state) in slots[which].iter_mut().enumerate() {
            under_way += u64::from(begin(lane, which, slot, state, Instant::now()));
        }
    }
    let mut ended: Vec<(usize, Ended)> = Vec::new();
    let mut stopped: Option<Instant> = None;
    while under_way > 0 {
        if let Err((_, error)) = Lane::turn_all(&mut lanes, &mut ended) {
            let mut recorder = lock(recorder);
            recorder.failed(&error);
            recorder.gave_up(under_way);
            return;
        }
        let now = Instant::now();
        let mut recorder = lock(recorder);
        if stopped.is_none()
            && (now >= end || plan.stop.load(Ordering::Relaxed) || recorder.counts().errors >= MAX_ERRORS)
        {
            stopped = Some(now);
        }
        for (which, one) in ended.drain(..) {
            let (lane, state) = (&mut lanes[which], &mut slots[which][one.slot]);
            if one.is_try_again() && stopped.is_none() {
                recorder.again();
                lane.begin(one.slot, state.io);
                continue;
            }
            if !one.is_good() {
                recorder.failed(&one.error());
            } else if shape.flush && !state.read && !state.flushing {
                state.flushing = true;
                state.io = Io::Flush;
                lane.begin(one.slot, Io::Flush);
                continue;
            } else {
                recorder.answered(now, now - state.since, shape.block_size, state.read);
            }
            if stopped.is_some() || !begin(lane, which, one.slot, state, now) {
                under_way -= 1;
            }
        }
        let patience = if plan.stop.load(Ordering::Relaxed) { DRAIN_STOPPED } else { DRAIN };
        if stopped.is_some_and(|stopped| now - stopped > patience) {
            recorder.gave_up(under_way);
            return;
        }
    }
    for lane in lanes {
        lane.log_out();
    }
}

/// What a failed attempt to reach a portal is called.
impl Portal {
    /// An error of a session with it.
    pub fn failure(&self, error: &client::initiator::Error) -> Failure {
        use client::initiator::Error;
        let failure = Failure::new(format!("{}: {error}", self.url));
        match error {
            Error::Connect { .. } | Error::LoginTimeout => {
                failure.next("check that something listens there: `cluster list-gateways` shows this cluster's portals")
            }
            Error::Login { .. } => failure.next(format!(
                "check the target's name: `iscsi-ls iscsi://{}` lists what the portal offers",
                self.addr
            )),
            Error::Status { .. } => failure.next("check the LUN, the last number of the URL"),
            _ => failure,
        }
    }
}
