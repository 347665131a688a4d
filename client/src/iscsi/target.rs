//! A target on its volume's thread: its sessions, who may have one, and what they ask of each other.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::connection::{Connection, Event, Inbox, Token};
use super::login::status;
use super::pdu::response::Body;
use super::pdu::wire::{Digests, Receiver, Sender};
use super::server::LoggedIn;
use super::session::{Clear, End, IscsiSession, Outputs};
use crate::block::BlockDevice;

/// Sessions of one target, those included that wait for an older one to end. A login beyond it is refused with "out
/// of resources".
pub const MAX_SESSIONS: usize = 256;

/// A session, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStatus {
    /// InitiatorName.
    pub initiator: String,
    /// InitiatorAlias, empty if none.
    pub alias: String,
    /// Where it comes from.
    pub peer: SocketAddr,
    /// Target session identifying handle.
    pub tsih: u16,
}

/// What makes two sessions the same to the initiator (RFC 7143 §6.3.5); target and portal group are ours.
type Key = (String, [u8; 6]);

struct Entry {
    key: Key,
    status: SessionStatus,
    inbox: Rc<Inbox>,
    /// It still waits for an older session of its key.
    waits: bool,
}

/// A target with one logical unit.
pub struct Target {
    iqn: String,
    device: Rc<dyn BlockDevice>,
    sessions: RefCell<BTreeMap<u64, Entry>>,
    next: Cell<u64>,
    changed: Notify,
    closed: Cell<bool>,
}

/// Takes the entry out when the session's future ends or is dropped.
struct Registered<'a>(&'a Target, u64);

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.0.sessions.borrow_mut().remove(&self.1);
        self.0.changed.notify_waiters();
    }
}

impl Target {
    /// A target of this name for this device. `iqn` is in lower case, as initiators' names are compared.
    pub fn new(iqn: impl Into<String>, device: Rc<dyn BlockDevice>) -> Rc<Self> {
        Rc::new(Target {
            iqn: iqn.into(),
            device,
            sessions: RefCell::default(),
            next: Cell::new(0),
            changed: Notify::new(),
            closed: Cell::new(false),
        })
    }

    /// The target's name.
    pub fn iqn(&self) -> &str {
        &self.iqn
    }

    /// Who is logged in.
    pub fn sessions(&self) -> Vec<SessionStatus> {
        self.sessions.borrow().values().map(|entry| entry.status.clone()).collect()
    }

    /// Serves a connection until its session has ended and every command that had an effect has too. Spawn it on the
    /// device's thread. Dropping it drops the connection; requests that are with the device are then not awaited, so
    /// do that only where the device is dropped too.
    ///
    /// An older session of the same initiator port is ended first, and its commands awaited, before the last login
    /// response is sent (RFC 7143 §6.3.5, R4).
    pub async fn serve(self: Rc<Self>, login: LoggedIn) {
        let LoggedIn { stream, mut response, text, agreed, leftover, peer, local, tsih } = login;
        let mut stream = match stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(target = %self.iqn, %peer, %error, "the connection cannot be served");
                return;
            }
        };
        let mut state = self.device.watch();
        if state.borrow_and_update().gone {
            return;
        }
        let Body::Login(body) = &mut response.body else { unreachable!("the server gives login responses") };
        if self.closed.get() || self.sessions.borrow().len() >= MAX_SESSIONS {
            body.status = if self.closed.get() { status::UNAVAILABLE } else { status::OUT_OF_RESOURCES };
            body.transit = false;
            let mut wire = Sender::new(Digests::default());
            wire.push(response.encode(), []);
            let _ = super::server::flush(&mut stream, &mut wire).await;
            tracing::warn!(target = %self.iqn, initiator = %agreed.identity.initiator, %peer, "login refused: too many sessions, or closing");
            return;
        }
        body.tsih = tsih.get();
        let key: Key = (agreed.identity.initiator.clone(), agreed.identity.isid);
        let inbox = Rc::new(Inbox::default());
        let id = self.next.get();
        self.next.set(id + 1);
        let status = SessionStatus {
            initiator: agreed.identity.initiator.clone(),
            alias: agreed.identity.alias.clone(),
            peer,
            tsih: tsih.get(),
        };
        self.sessions.borrow_mut().insert(id, Entry { key: key.clone(), status, inbox: inbox.clone(), waits: true });
        let registered = Registered(&self, id);
        for (_, older) in self.sessions.borrow().range(..id).filter(|(_, entry)| entry.key == key) {
            older.inbox.push(Event::End(End::Reinstated));
        }
        self.changed.notify_waiters();
        loop {
            let changed = self.changed.notified();
            let (older, newer) = {
                let sessions = self.sessions.borrow();
                let same = |(_, entry): &(&u64, &Entry)| entry.key == key;
                // An older one that only waits goes by itself when it sees this one.
                (sessions.range(..id).any(|e| same(&e)), sessions.range(id + 1..).any(|e| same(&e)))
            };
            if newer || self.closed.get() {
                return;
            }
            if !older {
                break;
            }
            tokio::select! {
                () = changed => {}
                gone = state.wait_for(|state| state.gone) => {
                    drop(gone);
                    return;
                }
            }
        }
        if let Some(entry) = self.sessions.borrow_mut().get_mut(&id) {
            entry.waits = false;
        }
        let session = IscsiSession::new(
            &agreed,
            &self.iqn,
            local.to_string(),
            self.device.info(),
            *state.borrow_and_update(),
            Instant::now(),
        );
        let (exp_cmd_sn, max_cmd_sn) = session.window();
        response.exp_cmd_sn = exp_cmd_sn;
        response.max_cmd_sn = max_cmd_sn;
        let mut wire = Sender::new(Digests::default());
        wire.push(response.encode(), [text]);
        wire.set(agreed.parameters.digests);
        let receiver = Receiver::new(
            leftover,
            agreed.parameters.digests,
            super::login::OUR_SEGMENT.max(agreed.parameters.max_recv_segment) as usize,
        );
        tracing::info!(target = %self.iqn, initiator = %agreed.identity.initiator, %peer, tsih = tsih.get(), "session begins");
        let others = |clear: Clear, token: Rc<Token>| {
            for (_, entry) in self.sessions.borrow().iter().filter(|(other, entry)| **other != id && !entry.waits) {
                entry.inbox.push(Event::Clear(clear, token.clone()));
            }
        };
        let out = Outputs { requests: vec![], aborts: vec![], others: vec![], cleared: vec![], wire, close: None };
        let device = self.device.clone();
        let connection = Connection { stream, receiver, session, out, inbox, device, state, others: &others };
        let end = connection.run().await;
        let initiator = &agreed.identity.initiator;
        match end {
            End::Protocol(_) | End::Wire(_) | End::Silent => {
                tracing::warn!(target = %self.iqn, %initiator, %peer, reason = ?end, "session ended");
            }
            _ => tracing::info!(target = %self.iqn, %initiator, %peer, reason = ?end, "session ends"),
        }
        drop(registered);
    }

    /// Closes the target: takes no more sessions, tells every initiator that its connection will be dropped, finishes
    /// the commands that have begun, and closes. Commands that a waiting device does not finish in `patience` are cut
    /// off unanswered (and still awaited by their session's future). Returns when all connections are closed, or when
    /// patience ends.
    pub async fn close(&self, patience: Duration) {
        self.closed.set(true);
        self.changed.notify_waiters();
        for entry in self.sessions.borrow().values() {
            entry.inbox.push(Event::Close);
        }
        let all_gone = async {
            loop {
                let changed = self.changed.notified();
                if self.sessions.borrow().is_empty() {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(patience, all_gone).await.is_err() {
            for entry in self.sessions.borrow().values() {
                entry.inbox.push(Event::End(End::Closed));
            }
        }
    }
}
