//! The task that owns a link's socket: connects, greets, sends what is queued in batches, and hands on what comes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes};
use proto::frame::{Encoded, FrameError, FrameReader, Header, Kind, PeerRole, Reply, Request};
use proto::id::{AttachId, ClusterId, NodeId, VolumeId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::core::{Due, Liveness};
use crate::clock::now_ms;

/// How long a connection may take to be made and greeted.
const CONNECT: Duration = Duration::from_millis(1_500);
/// Between attempts to connect; doubles up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// Reads per wake-up before others have their turn.
const READS_PER_TURN: usize = 8;
/// Slices of one vectored write.
const MAX_SLICES: usize = 64;

/// Whom a link connects.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    pub node: NodeId,
    /// `host:port` of the node's data plane.
    pub addr: String,
    pub cluster: ClusterId,
    pub volume: VolumeId,
    /// The gateway's name, for the node's log.
    pub name: String,
}

/// Frames waiting to be sent. Bounded by what the mirrors may have in flight (R11).
#[derive(Debug, Default)]
pub struct LinkQueue {
    up: Cell<bool>,
    chunks: RefCell<VecDeque<Bytes>>,
    wake: Notify,
}

impl LinkQueue {
    /// Queues a frame; dropped while the link is down, as its owner has been told.
    pub fn push(&self, frame: Encoded) {
        if !self.up.get() {
            return;
        }
        let mut chunks = self.chunks.borrow_mut();
        chunks.push_back(frame.head);
        if !frame.payload.is_empty() {
            chunks.push_back(frame.payload);
        }
        self.wake.notify_one();
    }
}

/// Who hears of a link. Called from the link's task, on its volume's thread.
pub trait LinkEvents {
    /// Connected and greeted.
    fn up(&self, node: NodeId);
    /// Lost, or an attempt to connect failed.
    fn down(&self, node: NodeId);
    /// Replies that came in together, in order.
    fn replies(&self, node: NodeId, replies: &mut Vec<(Header, Reply)>);
}

#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it sent something that is no frame: {0}")]
    Frame(#[from] FrameError),
    #[error("it did not answer for {} ms", super::SILENT_MS)]
    Silent,
    #[error("it could not be reached within {} ms", CONNECT.as_millis())]
    Connect,
    #[error("it refused the connection: {0:?}")]
    Refused(proto::frame::Code),
    #[error("it closed the connection")]
    Closed,
}

/// Keeps the link up until the task is dropped.
pub async fn run(config: LinkConfig, queue: &LinkQueue, events: &dyn LinkEvents) {
    let mut pause = RETRY.0;
    let mut told = String::new();
    loop {
        match connect(&config).await {
            Ok((mut stream, reader)) => {
                pause = RETRY.0;
                told.clear();
                queue.chunks.borrow_mut().clear();
                queue.up.set(true);
                events.up(config.node);
                let error = serve(&config, &mut stream, reader, queue, events).await;
                queue.up.set(false);
                queue.chunks.borrow_mut().clear();
                tracing::warn!(node = %config.node, volume = %config.volume, %error, "link lost");
            }
            Err(error) => {
                let text = error.to_string();
                if text != told {
                    tracing::info!(node = %config.node, addr = %config.addr, %error, "node not reached");
                    told = text;
                }
            }
        }
        events.down(config.node);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn connect(config: &LinkConfig) -> Result<(TcpStream, FrameReader), LinkError> {
    let greeted = async {
        let mut stream = TcpStream::connect(&config.addr).await?;
        proto::socket::tune(&stream)?;
        let hello = Request::Hello {
            role: PeerRole::Gateway,
            cluster: config.cluster,
            volume: config.volume,
            name: config.name.clone(),
        };
        stream.write_all(&hello.encode(0, AttachId::default(), 0).head).await?;
        let mut reader = FrameReader::default();
        loop {
            if stream.read_buf(&mut reader.space()).await? == 0 {
                return Err(LinkError::Closed);
            }
            if let Some((header, reply)) = reader.reply()? {
                return match reply {
                    Reply::Done(Kind::Hello) => Ok((stream, reader)),
                    Reply::Failed { code, .. } => Err(LinkError::Refused(code)),
                    _ => Err(FrameError::Kind(header.kind as u8).into()),
                };
            }
        }
    };
    tokio::time::timeout(CONNECT, greeted).await.unwrap_or(Err(LinkError::Connect))
}

async fn serve(
    config: &LinkConfig,
    stream: &mut TcpStream,
    mut reader: FrameReader,
    queue: &LinkQueue,
    events: &dyn LinkEvents,
) -> LinkError {
    let mut live = Liveness::new(now_ms());
    let mut look = pin!(tokio::time::sleep(Duration::ZERO));
    let mut replies = Vec::new();
    let (mut incoming, outgoing) = stream.split();
    loop {
        let blocked = match send_queued(&outgoing, queue) {
            Ok(blocked) => blocked,
            Err(error) => return error.into(),
        };
        tokio::select! {
            biased;
            read = async { incoming.read_buf(&mut reader.space()).await } => match read {
                Ok(0) => return LinkError::Closed,
                Ok(_) => {}
                Err(error) => return error.into(),
            },
            () = queue.wake.notified() => continue,
            ready = outgoing.writable(), if blocked => match ready {
                Ok(()) => continue,
                Err(error) => return error.into(),
            },
            () = &mut look => {
                let now = now_ms();
                match live.look(now) {
                    Due::GiveUp => return LinkError::Silent,
                    Due::Ping => queue.push(Request::Ping.encode(0, AttachId::default(), 0)),
                    Due::Nothing => {}
                }
                look.as_mut().reset(Instant::now() + Duration::from_millis(live.next().saturating_sub(now).max(1)));
                continue;
            }
        }
        // What else has come: a read that filled its space is followed by another.
        let mut reads = READS_PER_TURN;
        let ended: Option<LinkError> = loop {
            let taken = loop {
                match reader.reply() {
                    Ok(Some(reply)) if reply.0.kind == Kind::Ping => {}
                    Ok(Some(reply)) => replies.push(reply),
                    Ok(None) => break None,
                    Err(error) => break Some(error.into()),
                }
            };
            reads -= 1;
            if taken.is_some() || reads == 0 {
                break taken;
            }
            let mut space = reader.space();
            match now_or_never(incoming.read_buf(&mut space)).await {
                None => break None,
                Some(Ok(0)) => break Some(LinkError::Closed),
                Some(Ok(_)) => {}
                Some(Err(error)) => break Some(error.into()),
            }
        };
        live.heard(now_ms());
        if !replies.is_empty() {
            // Also of a node that is gone now: what it has answered counts.
            events.replies(config.node, &mut replies);
            replies.clear();
        }
        if let Some(error) = ended {
            return error;
        }
    }
}

/// What the future gives at once, if it does.
async fn now_or_never<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Sends what is queued; true if the socket takes no more for now.
fn send_queued(stream: &WriteHalf<'_>, queue: &LinkQueue) -> io::Result<bool> {
    let mut chunks = queue.chunks.borrow_mut();
    while !chunks.is_empty() {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let n = chunks.len().min(MAX_SLICES);
        slices.iter_mut().zip(chunks.iter()).for_each(|(slice, bytes)| *slice = IoSlice::new(bytes));
        let mut sent = match stream.try_write_vectored(&slices[..n]) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(e) => return Err(e),
        };
        while sent > 0 {
            let front = chunks.front_mut().expect("no more was sent than was queued");
            if sent >= front.len() {
                sent -= front.len();
                chunks.pop_front();
            } else {
                front.advance(sent);
                sent = 0;
            }
        }
    }
    Ok(false)
}
