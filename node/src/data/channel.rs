//! One connection: bytes in, requests out; replies in, bytes out.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::rc::Rc;

use bytes::{Buf, Bytes};
use proto::frame::{Encoded, FrameError, FrameReader, Header, PeerRole, Request};
use proto::id::VolumeId;
use tokio::io::AsyncReadExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use super::now_ms;
use super::shard::{ReplicaCell, Shard};
use crate::replica::ConnId;

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
    stream: OwnedWriteHalf,
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
    pub(super) fn new(id: ConnId, role: PeerRole, volume: VolumeId, name: String, stream: OwnedWriteHalf) -> Self {
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
        let might_read = self.may_read();
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
        self.wake_if(!might_read && self.may_read());
    }

    /// The task sleeps without reading at a limit: whoever takes the connection below it says so.
    fn wake_if(&self, due: bool) {
        if due {
            self.wake.notify_one();
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
        let might_read = self.may_read();
        if self.send().is_err() {
            self.close();
        }
        self.wake_if(self.out_bytes.get() > 0 || !might_read && self.may_read());
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

/// Serves a greeted connection until it ends. `reader` holds what came after the greeting.
pub(super) async fn serve(shard: Shard, conn: Rc<Conn>, incoming: OwnedReadHalf, reader: FrameReader) {
    let end = run(&shard, &conn, incoming, reader).await;
    let (volume, peer) = (conn.volume, &conn.name);
    match end {
        End::Frame(error) => tracing::warn!(%volume, peer, %error, "bad frame: connection closed"),
        other => tracing::debug!(%volume, peer, end = %other, "connection ended"),
    }
    shard.lost(&conn);
}

async fn run(shard: &Shard, conn: &Rc<Conn>, mut incoming: OwnedReadHalf, mut reader: FrameReader) -> End {
    let mut requests = Vec::new();
    let mut reads = 0;
    loop {
        // First of all what came behind the greeting.
        if let Err(end) = take_all(shard, conn, &mut reader, &mut requests) {
            return end;
        }
        reads += 1;
        if reads % READS_PER_TURN == 0 {
            // Others on this thread have their turn, their disks and sockets among them.
            tokio::task::yield_now().await;
        }
        loop {
            if conn.closing.get() {
                return End::Closing;
            }
            // A read that did not fill its space was the last for now, and knows it: no system call says so again.
            tokio::select! {
                biased;
                read = async { incoming.read_buf(&mut reader.space()).await }, if conn.may_read() => match read {
                    Ok(0) => return End::Closed,
                    Ok(_) => break,
                    Err(error) => return error.into(),
                },
                ready = conn.stream.writable(), if conn.out_bytes.get() > 0 => {
                    if let Err(error) = ready.and_then(|()| conn.send()) {
                        return error.into();
                    }
                }
                () = conn.wake.notified() => {}
            }
        }
    }
}

/// Hands every whole request that has come to the shard, in one batch. What came before a bad frame still counts.
fn take_all(
    shard: &Shard,
    conn: &Rc<Conn>,
    reader: &mut FrameReader,
    requests: &mut Vec<(Header, Request)>,
) -> Result<(), End> {
    let ended = loop {
        match reader.request() {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::frame::Reply;
    use proto::id::{AttachId, BlockIndex};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn whoever_takes_a_connection_below_its_limit_wakes_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, _far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (_incoming, outgoing) = near.unwrap().into_split();
        let conn = Conn::new(ConnId(1), PeerRole::Gateway, VolumeId::default(), "a gateway".into(), outgoing);
        let read = Request::Read { block: BlockIndex(0), count: 256 };
        for tag in 0..32 {
            let frame = read.encode(1, AttachId::default(), tag);
            conn.count(&Header::decode(frame.head.first_chunk().unwrap()).unwrap(), &read);
        }
        assert!(!conn.may_read());
        let refused = Reply::Failed { kind: proto::frame::Kind::Read, code: proto::frame::Code::Busy, block: 0 };
        conn.push((1, 0), refused.encode(1, AttachId::default(), 0));
        conn.flush();
        assert!(conn.may_read());
        tokio::time::timeout(Duration::from_secs(5), conn.wake.notified()).await.expect("it sleeps on");
    }
}
