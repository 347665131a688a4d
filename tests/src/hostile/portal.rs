//! A portal with one target, as the gateway runs it, behind a real socket: what `iscsi` leaves out (the drivers'
//! loops, discovery) is in the way here. Slower, and not the same run every time: the kernel cuts the stream.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use client::block::{BlockDevice, BlockRequest, CompletionSink, DeviceInfo, DeviceState};
use client::iscsi::server::{LoggedIn, Portal, Registry};
use client::iscsi::target::Target;
use client::iscsi::{PORTAL_GROUP_TAG, iqn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::{LocalSet, spawn_local};

use super::iscsi;
use super::source::{Seen, Source};
use super::unit::{self, Unit};
use crate::sim::rng::Rng;

/// A session, and the sockets' buffers.
pub const MEMORY: usize = iscsi::MEMORY + (4 << 20);
/// Bytes that are read of the answer: an initiator that asks for more goes away.
const MOST_ANSWERED: usize = 16 << 20;
/// A connection that does not end by itself when its initiator has gone. Long: the machine may do something else.
const STUCK: Duration = Duration::from_secs(100);

struct Device {
    unit: Rc<RefCell<Unit>>,
    state: watch::Sender<DeviceState>,
}

impl BlockDevice for Device {
    fn info(&self) -> DeviceInfo {
        unit::info()
    }
    fn submit(&self, sink: &Rc<dyn CompletionSink>, tag: u64, request: BlockRequest) {
        let (sink, unit) = (sink.clone(), self.unit.clone());
        spawn_local(async move {
            let outcome = unit.borrow_mut().perform(&request);
            sink.complete(tag, outcome);
        });
    }
    fn abort(&self, _: &Rc<dyn CompletionSink>, _: u64) {}
    fn watch(&self) -> watch::Receiver<DeviceState> {
        self.state.subscribe()
    }
}

async fn converse(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let mut rng = Rng::new(source.u8().into());
    let stream = source.rest();
    let device = Device { unit: Rc::new(RefCell::new(Unit::new())), state: watch::Sender::new(unit::state()) };
    let target = Target::new(iqn("tank"), Rc::new(device));
    let registry = Registry::new(PORTAL_GROUP_TAG);
    let (sender, mut logins) = mpsc::unbounded_channel::<LoggedIn>();
    registry.add(&iqn("tank"), sender);
    let portal = Portal::bind("127.0.0.1:0".parse().expect("an address"), registry).expect("loopback has ports");
    let addr = portal.local_addr().expect("bound");
    let portal = spawn_local(portal.run(std::future::pending()));
    let serving = {
        let target = target.clone();
        spawn_local(async move {
            while let Some(login) = logins.recv().await {
                spawn_local(target.clone().serve(login));
            }
        })
    };
    let mut socket = TcpStream::connect(addr).await.expect("loopback connects");
    // Ended by a reset: thousands of closed connections would take up all ports.
    socket.set_zero_linger().expect("a socket option");
    let mut answer = 0;
    let mut rest = stream;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rng.between(1, rest.len() as u64) as usize);
        rest = after;
        let mut buffer = [0; 4096];
        if socket.write_all(piece).await.is_err() {
            break;
        }
        while let Ok(n @ 1..) = socket.try_read(&mut buffer) {
            answer += n;
        }
        tokio::task::yield_now().await;
    }
    let _ = socket.shutdown().await;
    let mut buffer = vec![0; 64 << 10];
    while answer < MOST_ANSWERED
        && let Ok(n @ 1..) = socket.read(&mut buffer).await
    {
        if answer < 48 {
            seen.note(&buffer[..n.min(2)]);
        }
        answer += n;
    }
    seen.note(answer.min(4096));
    drop(socket);
    // Until the session has ended; what its device was asked for is done by then.
    while !target.sessions().is_empty() {
        tokio::task::yield_now().await;
    }
    portal.abort();
    serving.abort();
}

/// A seed for the pieces, the stream.
pub fn run(input: &[u8], seen: &mut Seen) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let ended = LocalSet::new().block_on(&runtime, async { tokio::time::timeout(STUCK, converse(input, seen)).await });
    assert!(ended.is_ok(), "the connection does not end");
}

/// Streams that begin with a login, of which the numbers are right.
pub fn seeds() -> Vec<Vec<u8>> {
    iscsi::whole_streams().into_iter().zip(0..).map(|(stream, cuts)| [vec![cuts], stream].concat()).collect()
}

pub fn records(input: &[u8]) -> Vec<usize> {
    iscsi::starts(input.get(1..).unwrap_or_default()).into_iter().map(|at| at + 1).collect()
}
