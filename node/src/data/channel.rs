//! One connection: bytes in, requests out; replies in, bytes out.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::rc::Rc;

use bytes::{Buf, Bytes, BytesMut};
use proto::frame::{Encoded, FrameError, HEADER_LEN, Header, PeerRole, Request};
use proto::id::VolumeId;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::now_ms;
use super::shard::{ReplicaCell, Shard};
use crate::replica::ConnId;

/// Room made for each read from a socket.
const READ_ROOM: usize = 128 << 10;
/// Reads of one connection before others have their turn.
const READS_PER_TURN: usize = 4;
/// Slices of one vectored write.
const MAX_SLICES: usize = 64;
/// Bytes of replies that wait for a slow reader, and of block data that requests in flight bring or will bring.
/// At either, no more requests are read from the connection.
const MAX_QUEUED: usize = 32 << 20;
/// Block data below this isn't counted; 256 such requests per attach are 16 MiB.
const COUNTED: usize = 64 << 10;
/// Attaches of one connection; one more closes it.
pub(super) const MAX_CHANNELS: usize = 256;

/// A greeted connection, as its shard sees it.
pub(super) struct Conn {
    pub(super) id: ConnId,
    pub(super) role: PeerRole,
    pub(super) volume: VolumeId,
    pub(super) name: String,
    stream: TcpStream,
    out: RefCell<VecDeque<Bytes>>,
    out_bytes: Cell<usize>,
    /// Block data of large requests in flight.
    large: RefCell<BTreeMap<(u32, u64), usize>>,
    large_bytes: Cell<usize>,
    wake: Notify,
    closing: Cell<bool>,
    /// The replica behind each channel.
    pub(super) channels: RefCell<BTreeMap<u32, Rc<ReplicaCell>>>,
    /// When its replicas were last told that it lives.
    pub(super) told_ms: Cell<u64>,
}

impl Conn {
    pub(super) fn new(id: ConnId, role: PeerRole, volume: VolumeId, name: String, stream: TcpStream) -> Self {
        Self {
            id,
            role,
            volume,
            name,
            stream,
            out: RefCell::default(),
            out_bytes: Cell::new(0),
            large: RefCell::default(),
            large_bytes: Cell::new(0),
            wake: Notify::new(),
            closing: Cell::new(false),
            channels: RefCell::default(),
            told_ms: Cell::new(now_ms()),
        }
    }

    /// Queues a reply; [`flush`](Self::flush) sends it.
    pub(super) fn push(&self, header: (u32, u64), frame: Encoded) {
        if !self.large.borrow().is_empty()
            && let Some(bytes) = self.large.borrow_mut().remove(&header)
        {
            self.large_bytes.set(self.large_bytes.get() - bytes);
        }
        let mut out = self.out.borrow_mut();
        self.out_bytes.set(self.out_bytes.get() + frame.head.len() + frame.payload.len());
        out.push_back(frame.head);
        if !frame.payload.is_empty() {
            out.push_back(frame.payload);
        }
    }

    /// Counts the block data of a request that came in.
    fn count(&self, header: &Header, request: &Request) {
        let bytes = match request {
            Request::Read { count, .. } => *count as usize * proto::limits::BLOCK_SIZE as usize,
            _ => header.payload_len as usize,
        };
        if bytes >= COUNTED && self.large.borrow_mut().insert((header.channel, header.tag), bytes).is_none() {
            self.large_bytes.set(self.large_bytes.get() + bytes);
        }
    }

    /// Sends what the socket takes; the connection's task sends the rest.
    pub(super) fn flush(&self) {
        if self.send().is_err() {
            self.close();
        }
        if self.out_bytes.get() > 0 {
            self.wake.notify_one();
        }
    }

    /// Ends the connection's task.
    pub(super) fn close(&self) {
        self.closing.set(true);
        self.wake.notify_one();
    }

    fn send(&self) -> io::Result<()> {
        let mut out = self.out.borrow_mut();
        while !out.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let n = out.len().min(MAX_SLICES);
            slices.iter_mut().zip(out.iter()).for_each(|(slice, bytes)| *slice = IoSlice::new(bytes));
            let sent = match self.stream.try_write_vectored(&slices[..n]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => sent,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            self.out_bytes.set(self.out_bytes.get() - sent);
            let mut left = sent;
            while left > 0 {
                let first = out.front_mut().expect("what was sent was queued");
                if first.len() > left {
                    first.advance(left);
                    break;
                }
                left -= first.len();
                out.pop_front();
            }
        }
        if out.capacity() > 4096 {
            out.shrink_to(64);
        }
        Ok(())
    }

    fn may_read(&self) -> bool {
        self.out_bytes.get() < MAX_QUEUED && self.large_bytes.get() < MAX_QUEUED
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it sent something that is no frame: {0}")]
    Frame(#[from] FrameError),
    #[error("closed by the peer")]
    Closed,
    #[error("closed here")]
    Closing,
}

/// Takes one whole request off the front of the buffer, if it is there; its payload shares the buffer's memory.
///
/// # Errors
/// The connection is to be closed.
pub(super) fn take_request(buffer: &mut BytesMut) -> Result<Option<(Header, Request)>, FrameError> {
    let Some(header) = peek(buffer)? else { return Ok(None) };
    if header.is_reply {
        return Err(FrameError::Malformed("a reply where a request belongs"));
    }
    let Some((body, payload)) = take(buffer, &header) else { return Ok(None) };
    Ok(Some((header, Request::decode(&header, &body, payload)?)))
}

/// The header at the front of the buffer.
pub(super) fn peek(buffer: &BytesMut) -> Result<Option<Header>, FrameError> {
    buffer.first_chunk::<HEADER_LEN>().map(Header::decode).transpose()
}

/// Body and payload of the frame at the front, once all of it is there; otherwise makes room for the rest.
pub(super) fn take(buffer: &mut BytesMut, header: &Header) -> Option<(Bytes, Bytes)> {
    let (body, payload) = (header.body_len as usize, header.payload_len as usize);
    let whole = HEADER_LEN + body + payload;
    if buffer.len() < whole {
        buffer.reserve(whole - buffer.len());
        return None;
    }
    let mut frame = buffer.split_to(whole).freeze();
    let payload = frame.split_off(HEADER_LEN + body);
    Some((frame.split_off(HEADER_LEN), payload))
}

/// Serves a greeted connection until it ends. `buffer` holds what came after the greeting.
pub(super) async fn serve(shard: Shard, conn: Rc<Conn>, buffer: BytesMut) {
    let end = run(&shard, &conn, buffer).await;
    let (volume, peer) = (conn.volume, &conn.name);
    match end {
        End::Frame(error) => tracing::warn!(%volume, peer, %error, "bad frame: connection closed"),
        other => tracing::debug!(%volume, peer, end = %other, "connection ended"),
    }
    shard.lost(&conn);
}

async fn run(shard: &Shard, conn: &Rc<Conn>, mut buffer: BytesMut) -> End {
    let mut requests = Vec::new();
    // Pipelined behind the greeting.
    if let Err(end) = take_all(shard, conn, &mut buffer, &mut requests) {
        return end;
    }
    loop {
        if conn.closing.get() {
            return End::Closing;
        }
        let blocked = conn.out_bytes.get() > 0;
        let interest = match (conn.may_read(), blocked) {
            (true, false) => Interest::READABLE,
            (true, true) => Interest::READABLE | Interest::WRITABLE,
            (false, true) => Interest::WRITABLE,
            (false, false) => {
                conn.wake.notified().await;
                continue;
            }
        };
        let ready = tokio::select! {
            ready = conn.stream.ready(interest) => match ready {
                Ok(ready) => ready,
                Err(error) => return error.into(),
            },
            () = conn.wake.notified() => continue,
        };
        if ready.is_writable()
            && let Err(error) = conn.send()
        {
            return error.into();
        }
        if !ready.is_readable() && !ready.is_read_closed() {
            continue;
        }
        for _ in 0..READS_PER_TURN {
            if !conn.may_read() {
                break;
            }
            if buffer.capacity() - buffer.len() < READ_ROOM / 8 {
                buffer.reserve(READ_ROOM);
            }
            match conn.stream.try_read_buf(&mut buffer) {
                Ok(0) => return End::Closed,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return e.into(),
            }
            if let Err(end) = take_all(shard, conn, &mut buffer, &mut requests) {
                return end;
            }
        }
        // Others on this thread have their turn, their disks and sockets among them.
        tokio::task::yield_now().await;
    }
}

/// Hands every whole request in the buffer to the shard, in one batch. What came before a bad frame still counts.
fn take_all(
    shard: &Shard,
    conn: &Rc<Conn>,
    buffer: &mut BytesMut,
    requests: &mut Vec<(Header, Request)>,
) -> Result<(), End> {
    let ended = loop {
        match take_request(buffer) {
            Ok(Some((header, request))) => {
                conn.count(&header, &request);
                requests.push((header, request));
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error.into()),
        }
    };
    if !requests.is_empty() {
        shard.requests(conn, requests);
    }
    ended
}
