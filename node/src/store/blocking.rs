//! Disk operations on threads that wait for them. The fallback where io_uring is not allowed.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::engine::Finished;
use super::{FilePair, describe, outcome};
use crate::replica::DiskIo;

/// Threads of one engine. More operations than that wait in a queue that the replicas' own limits bound.
const MAX_THREADS: usize = 8;
/// A thread with nothing to do ends after this time.
const IDLE: Duration = Duration::from_secs(10);

/// The data thread's end of the pool.
#[derive(Debug)]
pub struct BlockingEngine {
    pool: Arc<Pool>,
}

#[derive(Debug)]
struct Pool {
    state: Mutex<State>,
    work: Condvar,
    sink: Arc<Sink>,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<(u64, Arc<FilePair>, DiskIo)>,
    threads: usize,
    idle: usize,
    closed: bool,
}

/// Where what has ended gathers.
#[derive(Debug, Default)]
pub struct Sink {
    finished: Mutex<Vec<Finished>>,
    wake: Notify,
}

impl Sink {
    pub(super) async fn wait(&self) {
        self.wake.notified().await;
    }
}

impl BlockingEngine {
    pub(super) fn start() -> Self {
        let sink = Arc::default();
        Self { pool: Arc::new(Pool { state: Mutex::default(), work: Condvar::new(), sink }) }
    }

    pub(super) fn sink(&self) -> Arc<Sink> {
        self.pool.sink.clone()
    }

    pub(super) fn submit(&mut self, number: u64, files: Arc<FilePair>, io: DiskIo) {
        let mut state = self.pool.state.lock().expect("not poisoned");
        state.queue.push_back((number, files, io));
        if state.idle < state.queue.len() && state.threads < MAX_THREADS {
            let pool = self.pool.clone();
            match std::thread::Builder::new().name("md99-disk".into()).spawn(move || pool.work()) {
                Ok(_) => state.threads += 1,
                // A thread that runs takes it later; without any there is no way on.
                Err(error) => assert!(state.threads > 0, "no thread for disk I/O: {error}"),
            }
        }
        drop(state);
        self.pool.work.notify_one();
    }

    pub(super) fn reap(&mut self, into: &mut Vec<Finished>) {
        into.append(&mut self.pool.sink.finished.lock().expect("not poisoned"));
    }
}

impl Drop for BlockingEngine {
    fn drop(&mut self) {
        self.pool.state.lock().expect("not poisoned").closed = true;
        self.pool.work.notify_all();
    }
}

impl Pool {
    fn work(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        loop {
            if let Some((number, files, io)) = state.queue.pop_front() {
                drop(state);
                let (what, file, offset) = describe(&io);
                let result = outcome(&files, what, file, offset, files.execute(&io));
                drop((files, io));
                self.sink.finished.lock().expect("not poisoned").push((number, result));
                self.sink.wake.notify_one();
                state = self.state.lock().expect("not poisoned");
                continue;
            }
            if state.closed {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            let (again, waited) = self.work.wait_timeout(state, IDLE).expect("not poisoned");
            state = again;
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}
