//! The task that owns a link's socket: connects, greets, sends what is queued in batches, and hands on what comes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use proto::frame::{Encoded, FrameError, HEADER_LEN, Header, Kind, PeerRole, Reply, Request};
use proto::id::{AttachId, ClusterId, NodeId, VolumeId};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::core::{Due, Liveness};
use crate::clock::now_ms;

/// How long a connection may take to be made and greeted.
const CONNECT: Duration = Duration::from_millis(1_500);
/// Between attempts to connect; doubles up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// How often liveness is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Room made for each read.
const READ_ROOM: usize = 256 << 10;
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
            Ok((stream, rest)) => {
                pause = RETRY.0;
                told.clear();
                queue.chunks.borrow_mut().clear();
                queue.up.set(true);
                events.up(config.node);
                let error = serve(&config, &stream, rest, queue, events).await;
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

async fn connect(config: &LinkConfig) -> Result<(TcpStream, BytesMut), LinkError> {
    let greeted = async {
        let stream = TcpStream::connect(&config.addr).await?;
        stream.set_nodelay(true)?;
        let hello = Request::Hello {
            role: PeerRole::Gateway,
            cluster: config.cluster,
            volume: config.volume,
            name: config.name.clone(),
        };
        let mut frame = hello.encode(0, AttachId::default(), 0).head;
        while frame.has_remaining() {
            stream.writable().await?;
            match stream.try_write(&frame) {
                Ok(n) => frame.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        let mut buffer = BytesMut::with_capacity(READ_ROOM);
        loop {
            stream.readable().await?;
            match stream.try_read_buf(&mut buffer) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e.into()),
            }
            if let Some((header, reply)) = take_reply(&mut buffer)? {
                return match reply {
                    Reply::Done(Kind::Hello) => Ok((stream, buffer)),
                    Reply::Failed { code, .. } => Err(LinkError::Refused(code)),
                    _ => Err(FrameError::Kind(header.kind as u8).into()),
                };
            }
        }
    };
    tokio::time::timeout(CONNECT, greeted).await.unwrap_or(Err(LinkError::Connect))
}

/// Takes one whole reply off the front of the buffer, if it is there; its payload shares the buffer's memory.
fn take_reply(buffer: &mut BytesMut) -> Result<Option<(Header, Reply)>, FrameError> {
    let Some(head) = buffer.first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let header = Header::decode(head)?;
    if !header.is_reply {
        return Err(FrameError::Malformed("a request where a reply belongs"));
    }
    let (body, payload) = (header.body_len as usize, header.payload_len as usize);
    let whole = HEADER_LEN + body + payload;
    if buffer.len() < whole {
        buffer.reserve(whole - buffer.len());
        return Ok(None);
    }
    let mut frame = buffer.split_to(whole).freeze();
    let payload = frame.split_off(HEADER_LEN + body);
    let reply = Reply::decode(&header, &frame[HEADER_LEN..], payload)?;
    Ok(Some((header, reply)))
}

async fn serve(
    config: &LinkConfig,
    stream: &TcpStream,
    mut buffer: BytesMut,
    queue: &LinkQueue,
    events: &dyn LinkEvents,
) -> LinkError {
    let mut live = Liveness::new(now_ms());
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut replies = Vec::new();
    loop {
        let blocked = match send_queued(stream, queue) {
            Ok(blocked) => blocked,
            Err(error) => return error.into(),
        };
        let interest = if blocked { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        tokio::select! {
            ready = stream.ready(interest) => {
                if let Err(error) = ready {
                    return error.into();
                }
                for _ in 0..READS_PER_TURN {
                    if buffer.capacity() - buffer.len() < READ_ROOM / 4 {
                        buffer.reserve(READ_ROOM);
                    }
                    match stream.try_read_buf(&mut buffer) {
                        Ok(0) => return LinkError::Closed,
                        Ok(_) => {}
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                        Err(e) => return e.into(),
                    }
                    loop {
                        match take_reply(&mut buffer) {
                            Ok(Some(reply)) if reply.0.kind == Kind::Ping => {}
                            Ok(Some(reply)) => replies.push(reply),
                            Ok(None) => break,
                            Err(error) => return error.into(),
                        }
                    }
                    live.heard(now_ms());
                    if !replies.is_empty() {
                        events.replies(config.node, &mut replies);
                        replies.clear();
                    }
                }
            }
            () = queue.wake.notified() => {}
            _ = look.tick() => match live.look(now_ms()) {
                Due::GiveUp => return LinkError::Silent,
                Due::Ping => queue.push(Request::Ping.encode(0, AttachId::default(), 0)),
                Due::Nothing => {}
            }
        }
    }
}

/// Sends what is queued; true if the socket takes no more for now.
fn send_queued(stream: &TcpStream, queue: &LinkQueue) -> io::Result<bool> {
    let mut chunks = queue.chunks.borrow_mut();
    while !chunks.is_empty() {
        let slices: Vec<IoSlice<'_>> = chunks.iter().take(MAX_SLICES).map(|c| IoSlice::new(c)).collect();
        let mut sent = match stream.try_write_vectored(&slices) {
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
