//! Portals: accept connections, do their login, answer discovery, and hand logged-in connections to the thread of
//! their target. This may run on any thread; what it shares with the targets' threads is [`Registry`].

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};

use super::login::{Agreed, DEFAULT_SEGMENT, Login, Next, Targets, status};
use super::pdu::response::{self, Body};
use super::pdu::wire::{Digests, Pdu, Receiver, Sender};
use super::pdu::{CmdSn, NO_TAG, Request, Response};
use super::session::send_target;
use super::text::{Incoming, Outgoing};

/// How long a login may take.
pub const LOGIN_TIME: Duration = Duration::from_secs(15);
/// How long a discovery session may be silent.
pub const DISCOVERY_TIME: Duration = Duration::from_secs(60);
/// Connections of one portal in login or discovery; more wait in the listen queue.
pub const MAX_LOGINS: usize = 64;
/// Sessions of all targets together; logins beyond it are refused with "out of resources".
pub const MAX_ALL_SESSIONS: usize = 4096;
/// How long to wait after accept fails for want of something (file descriptors, memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection whose login was agreed, and whose last login response is still to be sent, by
/// [`Target::serve`](super::target::Target::serve).
pub struct LoggedIn {
    pub(super) stream: std::net::TcpStream,
    pub(super) response: Response,
    pub(super) text: Bytes,
    pub(super) agreed: Agreed,
    pub(super) leftover: BytesMut,
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) tsih: Tsih,
}

impl LoggedIn {
    /// Who logged in, and on what terms.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// Where it comes from.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }
}

#[derive(Default)]
struct State {
    targets: BTreeMap<String, mpsc::UnboundedSender<LoggedIn>>,
    sessions: BTreeSet<u16>,
    last_tsih: u16,
}

/// The targets that can be logged in to, and the handles of live sessions. Clones share.
#[derive(Clone)]
pub struct Registry {
    state: Arc<Mutex<State>>,
    portal_group_tag: u16,
}

/// A session handle (TSIH), free again when dropped.
pub(super) struct Tsih {
    registry: Registry,
    tsih: u16,
}

impl Tsih {
    pub(super) fn get(&self) -> u16 {
        self.tsih
    }
}

impl Drop for Tsih {
    fn drop(&mut self) {
        self.registry.state().sessions.remove(&self.tsih);
    }
}

impl Registry {
    /// An empty registry for portals of this group; use [`PORTAL_GROUP_TAG`](super::PORTAL_GROUP_TAG).
    pub fn new(portal_group_tag: u16) -> Self {
        Registry { state: Arc::default(), portal_group_tag }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held; the maps are whole anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a target; logged-in connections go to `sender`, whose receiver's thread passes each to
    /// [`Target::serve`](super::target::Target::serve). Replaces one of the same name. The queue is bounded by
    /// [`MAX_ALL_SESSIONS`].
    pub fn add(&self, iqn: &str, sender: mpsc::UnboundedSender<LoggedIn>) {
        self.state().targets.insert(iqn.to_lowercase(), sender);
    }

    /// Removes a target: no new logins. Its sessions go on; see [`Target::close`](super::target::Target::close).
    pub fn remove(&self, iqn: &str) {
        self.state().targets.remove(&iqn.to_lowercase());
    }

    fn names(&self) -> Vec<String> {
        self.state().targets.keys().cloned().collect()
    }

    fn tsih(&self) -> Option<Tsih> {
        let mut state = self.state();
        if state.sessions.len() >= MAX_ALL_SESSIONS {
            return None;
        }
        loop {
            state.last_tsih = state.last_tsih.wrapping_add(1);
            let tsih = state.last_tsih;
            if tsih != 0 && state.sessions.insert(tsih) {
                drop(state);
                return Some(Tsih { registry: self.clone(), tsih });
            }
        }
    }

    fn hand_over(&self, name: &str, login: LoggedIn) -> Result<(), Box<LoggedIn>> {
        let sender = self.state().targets.get(name).cloned();
        match sender {
            Some(sender) => sender.send(login).map_err(|e| Box::new(e.0)),
            None => Err(Box::new(login)),
        }
    }
}

impl Targets for Registry {
    fn has_target(&self, name: &str) -> bool {
        self.state().targets.contains_key(name)
    }

    fn has_session(&self, tsih: u16) -> bool {
        self.state().sessions.contains(&tsih)
    }
}

/// An address that initiators connect to.
pub struct Portal {
    listener: TcpListener,
    registry: Registry,
}

impl Portal {
    /// Listens. Needs a tokio runtime with I/O.
    ///
    /// # Errors
    /// What binding says, for example that the port is in use.
    pub fn bind(addr: SocketAddr, registry: Registry) -> io::Result<Portal> {
        let domain = socket2::Domain::for_address(addr);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
        // A restarted gateway binds again while connections of the old one linger.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        socket.listen(128)?;
        Ok(Portal { listener: TcpListener::from_std(socket.into())?, registry })
    }

    /// Where it listens; the port is the real one if 0 was asked for.
    ///
    /// # Errors
    /// What the socket says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts until `shutdown` is done. Logins and discoveries under way are then dropped; sessions are not touched.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let permits = Arc::new(Semaphore::new(MAX_LOGINS));
        let mut tasks = tokio::task::JoinSet::new();
        tokio::pin!(shutdown);
        loop {
            let accept = async {
                let permit = permits.clone().acquire_owned().await.expect("never closed");
                (self.listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                accepted = accept => accepted,
                Some(_) = tasks.join_next() => continue,
                () = &mut shutdown => return,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let registry = self.registry.clone();
                    tasks.spawn(async move {
                        let _permit = permit;
                        greet(stream, peer, registry).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Writes everything that is queued.
pub(super) async fn flush(stream: &mut TcpStream, wire: &mut Sender) -> io::Result<()> {
    while !wire.is_empty() {
        let mut slices = [IoSlice::new(&[]); 16];
        let n = wire.slices(&mut slices);
        match stream.write_vectored(&slices[..n]).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => wire.advance(written),
        }
    }
    Ok(())
}

/// Why a greeting came to nothing.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Wire(#[from] super::pdu::wire::WireError),
    #[error("{0}")]
    Refused(&'static str),
    #[error("connection closed before the login was finished")]
    Closed,
}

struct Greeting {
    stream: TcpStream,
    receiver: Receiver,
    wire: Sender,
}

impl Greeting {
    async fn next(&mut self) -> Result<Option<Pdu>, Failure> {
        loop {
            if let Some(pdu) = self.receiver.next(|_| Vec::new())? {
                return Ok(Some(pdu));
            }
            let mut space = self.receiver.space();
            if self.stream.read_buf(&mut space).await? == 0 {
                return Ok(None);
            }
        }
    }

    async fn send(&mut self, response: Response, text: Bytes) -> Result<(), Failure> {
        self.wire.push(response.encode(), [text]);
        Ok(flush(&mut self.stream, &mut self.wire).await?)
    }
}

async fn greet(stream: TcpStream, peer: SocketAddr, registry: Registry) {
    let result = match tokio::time::timeout(LOGIN_TIME, login(stream, peer, &registry)).await {
        Ok(Ok(Some((greeting, agreed, local)))) => discovery(greeting, *agreed, local, &registry).await,
        Ok(Ok(None)) => Ok(()),
        Ok(Err(failure)) => Err(failure),
        Err(_) => Err(Failure::Refused("the login took too long")),
    };
    match result {
        Ok(()) => {}
        // Port scanners and health checks connect and say nothing.
        Err(Failure::Closed) => tracing::debug!(%peer, "connection closed before the login was finished"),
        Err(failure) => tracing::warn!(%peer, %failure, "login failed"),
    }
}

/// Does the login. Gives a discovery session back; a normal one has been handed over.
async fn login(
    stream: TcpStream,
    peer: SocketAddr,
    registry: &Registry,
) -> Result<Option<(Greeting, Box<Agreed>, SocketAddr)>, Failure> {
    proto::socket::tune(&stream)?;
    let local = stream.local_addr()?;
    let receiver = Receiver::new(BytesMut::new(), Digests::default(), DEFAULT_SEGMENT as usize);
    let mut greeting = Greeting { stream, receiver, wire: Sender::new(Digests::default()) };
    let mut login = Login::new(registry.portal_group_tag);
    loop {
        let Some(pdu) = greeting.next().await? else { return Err(Failure::Closed) };
        let Ok(Request::Login(request)) = Request::decode(&pdu.bhs) else {
            return Err(Failure::Refused("the first PDUs are not a login"));
        };
        match login.step(&request, pdu.segment(), registry) {
            Next::Respond(response, text) => greeting.send(response, text).await?,
            Next::Refuse(response, reason) => {
                greeting.send(response, Bytes::new()).await?;
                return Err(Failure::Refused(reason));
            }
            Next::Agreed(mut response, text, agreed) => {
                let Body::Login(body) = &mut response.body else { unreachable!("a login answers so") };
                let Some(tsih) = registry.tsih() else {
                    refuse(body, status::OUT_OF_RESOURCES);
                    greeting.send(response, Bytes::new()).await?;
                    return Err(Failure::Refused("too many sessions"));
                };
                let Some(name) = agreed.identity.target.clone() else {
                    body.tsih = tsih.get();
                    response.max_cmd_sn = response.exp_cmd_sn.plus(DISCOVERY_WINDOW - 1);
                    greeting.send(response, text).await?;
                    let digests = agreed.parameters.digests;
                    greeting.receiver.set(digests, super::login::OUR_SEGMENT as usize);
                    greeting.wire.set(digests);
                    return Ok(Some((greeting, agreed, local)));
                };
                let login = LoggedIn {
                    stream: greeting.stream.into_std()?,
                    response,
                    text,
                    agreed: *agreed,
                    leftover: greeting.receiver.into_leftover(),
                    peer,
                    local,
                    tsih,
                };
                // The target went away since the name was looked up: close, the initiator asks again.
                return match registry.hand_over(&name, login) {
                    Ok(()) => Ok(None),
                    Err(_) => Err(Failure::Refused("the target is going away")),
                };
            }
        }
    }
}

fn refuse(body: &mut response::Login, status: u16) {
    body.status = status;
    body.transit = false;
}

/// Commands that a discovery session may send ahead.
const DISCOVERY_WINDOW: u32 = 8;

/// A discovery session: text, pings and logout (RFC 7143 §4.3).
async fn discovery(
    mut greeting: Greeting,
    agreed: Agreed,
    local: SocketAddr,
    registry: &Registry,
) -> Result<(), Failure> {
    let mut stat_sn = agreed.stat_sn;
    let mut exp_cmd_sn = agreed.cmd_sn;
    let segment = agreed.parameters.max_send_segment as usize;
    let (mut incoming, mut outgoing) = (Incoming::default(), Outgoing::default());
    loop {
        let next = tokio::time::timeout(DISCOVERY_TIME, greeting.next()).await;
        let pdu = match next {
            Ok(Ok(Some(pdu))) => pdu,
            Ok(Ok(None)) => return Ok(()),
            Ok(Err(failure)) => return Err(failure),
            Err(_) => return Err(Failure::Refused("a discovery session was silent for too long")),
        };
        let request = Request::decode(&pdu.bhs).map_err(|_| Failure::Refused("unknown opcode in discovery"))?;
        let mut step = |cmd_sn: CmdSn, immediate: bool| {
            if !immediate && cmd_sn == exp_cmd_sn {
                exp_cmd_sn = exp_cmd_sn.plus(1);
            }
        };
        let (body, data, end) = match request {
            Request::Text(text) if pdu.digest_ok => {
                step(text.cmd_sn, text.immediate);
                if outgoing.is_empty() {
                    let pairs = incoming
                        .push(pdu.segment(), text.more)
                        .map_err(|_| Failure::Refused("malformed text in discovery"))?;
                    for (key, value) in pairs.unwrap_or_default() {
                        if key != "SendTargets" {
                            outgoing.pair(&key, "NotUnderstood");
                            continue;
                        }
                        let wanted = value.to_lowercase();
                        for name in registry.names().iter().filter(|name| wanted == "all" || wanted == **name) {
                            send_target(&mut outgoing, name, &local.to_string());
                        }
                    }
                }
                let (data, more) = outgoing.segment(segment);
                let last = !more && !text.more && text.last;
                let ttt = if last { NO_TAG } else { 1 };
                (Body::Text { last, more, lun: text.lun, itt: text.itt, ttt }, data, false)
            }
            Request::NopOut(nop) => {
                step(nop.cmd_sn, nop.immediate);
                if nop.itt == NO_TAG {
                    continue;
                }
                let data = Bytes::copy_from_slice(&pdu.segment()[..pdu.segment().len().min(segment)]);
                (Body::NopIn { lun: nop.lun, itt: nop.itt, ttt: NO_TAG }, data, false)
            }
            Request::Logout(logout) => {
                step(logout.cmd_sn, logout.immediate);
                (Body::Logout { itt: logout.itt, response: 0, time2wait: 0, time2retain: 0 }, Bytes::new(), true)
            }
            // §11.17.1: not in a discovery session.
            _ => (Body::Reject { reason: 0x04 }, Bytes::copy_from_slice(&pdu.bhs.0), false),
        };
        let response = Response { stat_sn, exp_cmd_sn, max_cmd_sn: exp_cmd_sn.plus(DISCOVERY_WINDOW - 1), body };
        stat_sn = stat_sn.wrapping_add(1);
        greeting.send(response, data).await?;
        if end {
            return Ok(());
        }
    }
}
