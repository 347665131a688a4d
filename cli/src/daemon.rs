//! What the daemons share: how they are told to stop. The first SIGTERM or Ctrl-C closes cleanly, the second ends
//! the process at once.

use std::process::exit;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{Failure, Outcome};

/// Both signals, caught from now on.
pub struct StopSignals {
    term: Signal,
    int: Signal,
}

impl StopSignals {
    /// Catches them. Call before anything is begun that must be closed.
    ///
    /// # Errors
    /// When the system allows no handler.
    pub fn catch() -> Outcome<Self> {
        let catch = |kind| signal(kind).map_err(|error| Failure::new(format!("cannot catch signals: {error}")));
        Ok(Self { term: catch(SignalKind::terminate())?, int: catch(SignalKind::interrupt())? })
    }

    /// Waits for one of them, and names it.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }

    /// Ends when the process should close. A second signal ends the process with status 1, whatever is going on.
    pub async fn stop(mut self) {
        let first = self.next().await;
        tracing::info!(signal = first, "closing; a second signal ends the process at once");
        self.end_at_next();
    }

    /// For commands that show what they have when they are stopped: calls `begin_to_end` at the first signal. A second
    /// one ends the process with status 1.
    pub async fn stop_by(mut self, begin_to_end: impl FnOnce()) {
        self.next().await;
        begin_to_end();
        self.end_at_next();
    }

    fn end_at_next(mut self) {
        tokio::spawn(async move {
            let second = self.next().await;
            tracing::warn!(signal = second, "ended before everything was closed");
            exit(1);
        });
    }
}

/// Begins a session of its own, so that the terminal that started the process does not end it.
pub fn detach() {
    // Fails only where the process leads its group already, which is as good.
    let _ = rustix::process::setsid();
}
