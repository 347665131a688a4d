//! Copies to other nodes: one connection per peer and volume, made when there is something to send.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Buf;
use proto::frame::{Code, CopyTarget, FrameError, FrameReader, Kind, PeerRole, Reply, Request};
use proto::id::{AttachId, ClusterId, VolumeId};
use proto::limits::MAX_MIRRORS;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::shard::{ReplicaCell, Shard};
use crate::replica::{CopyError, CopyToken, MAX_COPIES_OUT};

/// How long a connection may take to be made and greeted.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a peer may take to answer a copy.
const ANSWER: Duration = Duration::from_secs(3);
/// A connection without anything to send is closed after this time.
const IDLE: Duration = Duration::from_secs(30);
/// Copies that wait or are on their way to one peer, for all mirrors of a volume; one more would be answered
/// "unreachable".
const MAX_COPIES: usize = MAX_MIRRORS * MAX_COPIES_OUT;

/// A copy, and who waits for its answer.
struct Copy {
    cell: Rc<ReplicaCell>,
    generation: u64,
    token: CopyToken,
    attach: AttachId,
    request: Request,
}

/// Who waits for the answer to a copy that has been sent.
struct Sent {
    cell: Rc<ReplicaCell>,
    generation: u64,
    token: CopyToken,
    until: Instant,
}

/// One peer, for one volume.
#[derive(Default)]
pub(super) struct Peer {
    queue: RefCell<VecDeque<Copy>>,
    sent: RefCell<BTreeMap<u64, Sent>>,
    next_tag: Cell<u64>,
    wake: Notify,
}

impl Peer {
    /// When the oldest copy that is on its way should have been answered. Their tags rise, and so do their times.
    fn oldest(&self) -> Option<Instant> {
        self.sent.borrow().first_key_value().map(|(_, sent)| sent.until)
    }

    fn is_heard(&self) -> Result<(), PeerError> {
        match self.oldest() {
            Some(until) if until <= Instant::now() => Err(PeerError::Silent),
            _ => Ok(()),
        }
    }
}

/// The peers of a shard.
#[derive(Default)]
pub(super) struct Peers {
    peers: BTreeMap<(String, VolumeId), Rc<Peer>>,
}

impl Peers {
    /// Queues a copy; false: there are too many already.
    pub(super) fn send(
        &mut self,
        shard: &Shard,
        cluster: ClusterId,
        volume: VolumeId,
        cell: &Rc<ReplicaCell>,
        generation: u64,
        to: CopyTarget,
        token: CopyToken,
        request: Request,
    ) -> bool {
        let key = (to.addr.clone(), volume);
        let peer = self.peers.entry(key.clone()).or_insert_with(|| {
            let peer = Rc::<Peer>::default();
            tokio::task::spawn_local(run(shard.clone(), cluster, key, peer.clone()));
            peer
        });
        if peer.queue.borrow().len() + peer.sent.borrow().len() >= MAX_COPIES {
            return false;
        }
        let copy = Copy { cell: cell.clone(), generation, token, attach: to.attach, request };
        peer.queue.borrow_mut().push_back(copy);
        peer.wake.notify_one();
        true
    }

    fn forget(&mut self, key: &(String, VolumeId)) {
        self.peers.remove(key);
    }
}

#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it sent something that is no frame: {0}")]
    Frame(#[from] FrameError),
    #[error("it could not be reached within {} s", CONNECT.as_secs())]
    Connect,
    #[error("it did not answer for {} s", ANSWER.as_secs())]
    Silent,
    #[error("it refused the connection: {0:?}")]
    Refused(Code),
    #[error("it closed the connection")]
    Closed,
}

/// Connects, sends until there is nothing left or something fails, and tells everyone who still waits.
async fn run(shard: Shard, cluster: ClusterId, key: (String, VolumeId), peer: Rc<Peer>) {
    let ended = async {
        let (mut stream, mut reader) = connect(cluster, &key).await?;
        serve(&shard, &mut stream, &mut reader, &peer).await
    }
    .await;
    if let Err(error) = ended {
        tracing::warn!(addr = %key.0, volume = %key.1, %error, "copies to this peer failed");
    }
    // From here on a new copy makes a new connection.
    shard.peers(|peers| peers.forget(&key));
    let mut lost: Vec<(Rc<ReplicaCell>, u64, CopyToken)> = Vec::new();
    lost.extend(std::mem::take(&mut *peer.sent.borrow_mut()).into_values().map(|s| (s.cell, s.generation, s.token)));
    lost.extend(peer.queue.borrow_mut().drain(..).map(|c| (c.cell, c.generation, c.token)));
    shard
        .copies_ended(lost.into_iter().map(|(cell, g, token)| (cell, g, token, Err(CopyError::Unreachable))).collect());
}

async fn connect(cluster: ClusterId, key: &(String, VolumeId)) -> Result<(TcpStream, FrameReader), PeerError> {
    let greeted = async {
        let mut stream = TcpStream::connect(&key.0).await?;
        proto::socket::tune(&stream)?;
        let hello = Request::Hello { role: PeerRole::Node, cluster, volume: key.1, name: "a node".to_owned() };
        stream.write_all(&hello.encode(0, AttachId::default(), 0).head).await?;
        let mut reader = FrameReader::default();
        loop {
            if stream.read_buf(&mut reader.space()).await? == 0 {
                return Err(PeerError::Closed);
            }
            match reader.reply()? {
                Some((_, Reply::Done(Kind::Hello))) => return Ok((stream, reader)),
                Some((_, Reply::Failed { code, .. })) => return Err(PeerError::Refused(code)),
                Some(_) => return Err(FrameError::Malformed("a greeting that is none").into()),
                None => {}
            }
        }
    };
    tokio::time::timeout(CONNECT, greeted).await.unwrap_or(Err(PeerError::Connect))
}

/// Returns when nothing has been sent for a while.
async fn serve(shard: &Shard, stream: &mut TcpStream, reader: &mut FrameReader, peer: &Peer) -> Result<(), PeerError> {
    let (mut incoming, mut outgoing) = stream.split();
    let mut used = Instant::now();
    loop {
        let until = peer.oldest();
        let idle = used + IDLE;
        if !peer.queue.borrow().is_empty() {
            used = Instant::now();
            // Reading goes on while the peer takes nothing more, or both sides could wait for each other.
            tokio::select! {
                sent = send_queued(&mut outgoing, peer) => sent?,
                failed = read_forever(shard, &mut incoming, reader, peer) => failed?,
            }
            continue;
        }
        tokio::select! {
            failed = read_forever(shard, &mut incoming, reader, peer) => failed?,
            () = peer.wake.notified() => {}
            () = tokio::time::sleep_until(until.unwrap_or(idle)) => {
                if peer.queue.borrow().is_empty() && peer.sent.borrow().is_empty() && Instant::now() >= idle {
                    return Ok(());
                }
                peer.is_heard()?;
            }
        }
    }
}

/// Sends what there is, and what comes meanwhile: where the network is the slowest part that may never end.
async fn send_queued(stream: &mut WriteHalf<'_>, peer: &Peer) -> Result<(), PeerError> {
    loop {
        peer.is_heard()?;
        let Some(copy) = peer.queue.borrow_mut().pop_front() else { return Ok(()) };
        let tag = peer.next_tag.get() + 1;
        peer.next_tag.set(tag);
        let frame = copy.request.encode(0, copy.attach, tag);
        let Copy { cell, generation, token, .. } = copy;
        peer.sent.borrow_mut().insert(tag, Sent { cell, generation, token, until: Instant::now() + ANSWER });
        let taken = tokio::time::timeout(ANSWER, stream.write_all_buf(&mut frame.head.chain(frame.payload))).await;
        taken.map_err(|_| PeerError::Silent)??;
    }
}

async fn read_forever(
    shard: &Shard,
    stream: &mut ReadHalf<'_>,
    reader: &mut FrameReader,
    peer: &Peer,
) -> Result<(), PeerError> {
    loop {
        if stream.read_buf(&mut reader.space()).await? == 0 {
            return Err(PeerError::Closed);
        }
        let mut ended = Vec::new();
        while let Some((header, reply)) = reader.reply()? {
            let Some(Sent { cell, generation, token, .. }) = peer.sent.borrow_mut().remove(&header.tag) else {
                return Err(FrameError::Malformed("an answer to nothing").into());
            };
            let result = match reply {
                Reply::Done(Kind::CopyWrite) => Ok(()),
                Reply::Failed { code, .. } => Err(CopyError::Refused(code)),
                _ => return Err(FrameError::Malformed("an answer of another kind").into()),
            };
            ended.push((cell, generation, token, result));
        }
        shard.copies_ended(ended);
    }
}
