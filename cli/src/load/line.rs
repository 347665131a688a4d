//! An initiator's session with one target, made again when it is lost.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use client::initiator::{Error, Options, Session};
use tokio::sync::{Mutex, watch};
use tokio::task::AbortHandle;

/// How long a login may take.
const LOGIN_PATIENCE: Duration = Duration::from_secs(5);
/// How long the first command after it may: a target that vanished in between is given up.
const FIRST_COMMAND_PATIENCE: Duration = Duration::from_secs(5);
/// How long a logout may.
const LOGOUT_PATIENCE: Duration = Duration::from_secs(2);

/// A session that is made when it is needed. Commands that were out when it was lost fail; only their sender knows
/// what that means.
pub struct Line {
    portals: Vec<SocketAddr>,
    options: Options,
    ping: Option<Duration>,
    current: Mutex<Current>,
    reconnects: AtomicU64,
}

#[derive(Default)]
struct Current {
    held: Option<Held>,
    /// The portal to try next.
    portal: usize,
    made_before: bool,
}

#[derive(Clone)]
struct Held {
    session: Session,
    pings: Option<Arc<Pings>>,
}

/// The task that asks whether the target is alive; it ends when it is not.
struct Pings {
    task: AbortHandle,
    ended: watch::Receiver<()>,
}

impl Drop for Pings {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Held {
    fn new(session: Session, ping: Option<Duration>) -> Self {
        let pings = ping.map(|every| {
            let (alive, ended) = watch::channel(());
            let session = session.clone();
            let task = tokio::spawn(async move {
                let _alive = alive;
                loop {
                    tokio::time::sleep(every).await;
                    match tokio::time::timeout(every, session.ping(bytes::Bytes::new())).await {
                        Ok(Ok(_)) => {}
                        Ok(Err(_)) | Err(_) => return,
                    }
                }
            });
            Arc::new(Pings { task: task.abort_handle(), ended })
        });
        Self { session, pings }
    }

    fn is_over(&self) -> bool {
        self.session.is_closed() || self.pings.as_ref().is_some_and(|pings| pings.ended.has_changed().is_err())
    }

    async fn over(&self) {
        match &self.pings {
            Some(pings) => {
                let mut ended = pings.ended.clone();
                while ended.changed().await.is_ok() {}
            }
            None => std::future::pending().await,
        }
    }
}

impl Line {
    /// A line to the target at one of these portals. `number` tells an initiator's lines from one another. For
    /// `ping` see [`super::LoadSpec::ping`].
    pub fn new(portals: Vec<SocketAddr>, target: &str, initiator: &str, number: u8, ping: Option<Duration>) -> Self {
        let mut options = Options::new(target);
        options.initiator = initiator.to_owned();
        options.isid[5] = number;
        options.login_timeout = LOGIN_PATIENCE;
        Self { portals, options, ping, current: Mutex::default(), reconnects: AtomicU64::new(0) }
    }

    /// Does a command once, after a login where that is needed.
    ///
    /// # Errors
    /// The command's; [`Error::ConnectionLost`] where it may or may not have happened.
    pub async fn run<T, F>(&self, command: impl FnOnce(Session) -> F) -> Result<T, LineError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let held = self.held().await.map_err(LineError::Login)?;
        tokio::select! {
            done = command(held.session.clone()) => done.map_err(LineError::Command),
            () = held.over() => Err(LineError::Command(Error::ConnectionLost)),
        }
    }

    /// Logins after a lost session since the last call.
    pub fn take_reconnects(&self) -> u64 {
        self.reconnects.swap(0, Ordering::Relaxed)
    }

    async fn held(&self) -> Result<Held, Error> {
        let mut current = self.current.lock().await;
        if let Some(held) = current.held.as_ref().filter(|held| !held.is_over()) {
            return Ok(held.clone());
        }
        current.held = None;
        let portal = self.portals[current.portal % self.portals.len()];
        let patience = LOGIN_PATIENCE + FIRST_COMMAND_PATIENCE;
        let made = tokio::time::timeout(patience, Session::connect(portal, &self.options)).await;
        match made.unwrap_or(Err(Error::LoginTimeout)) {
            Ok(session) => {
                if std::mem::replace(&mut current.made_before, true) {
                    self.reconnects.fetch_add(1, Ordering::Relaxed);
                }
                let held = Held::new(session, self.ping);
                current.held = Some(held.clone());
                Ok(held)
            }
            Err(error) => {
                current.portal += 1;
                Err(error)
            }
        }
    }

    /// Logs out; the connection is closed either way.
    pub async fn log_out(&self) {
        if let Some(held) = self.current.lock().await.held.take() {
            let _ = tokio::time::timeout(LOGOUT_PATIENCE, held.session.logout()).await;
        }
    }
}

/// Where a command failed.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// Before it was sent.
    #[error("{0}")]
    Login(Error),
    /// It was sent.
    #[error("{0}")]
    Command(Error),
}

impl LineError {
    /// Whether the same again may succeed, once the target is back.
    pub fn means_away(&self) -> bool {
        match self {
            Self::Login(_) => true,
            Self::Command(error) => {
                matches!(error, Error::ConnectionLost | Error::Connect { .. } | Error::LoginTimeout)
            }
        }
    }
}

impl From<LineError> for Error {
    fn from(error: LineError) -> Self {
        match error {
            LineError::Login(error) | LineError::Command(error) => error,
        }
    }
}
