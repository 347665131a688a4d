//! Carries raft messages: one gRPC stream to each peer, with a bounded queue before it. Nothing here ever makes
//! the core wait: what does not fit is dropped and reported, and raft sends it again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::id::{ClusterId, NodeId};
use proto::pb;
use proto::pb::raft_client::RaftClient;
use protobuf::Message as _;
use raft::prelude::{Message, MessageType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

/// Batches that wait for one peer; past it batches are dropped.
const QUEUE: usize = 256;
/// Messages in one batch that is accepted: past it the stream is ended.
pub const MAX_BATCH: usize = 4096;
/// Longest batch accepted, in bytes: a snapshot with every remembered answer stays far below.
pub const MAX_BATCH_BYTES: usize = 64 << 20;
/// Between one attempt to reach a peer and the next.
const RECONNECT_AFTER: Duration = Duration::from_millis(200);

/// What became of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Some to this peer got lost.
    Unreachable(u64),
    /// A snapshot to this peer is on its way, or got lost.
    Snapshot(u64, bool),
}

/// The peers' queues. Cheap to clone.
#[derive(Clone)]
pub struct Transport {
    queues: Arc<BTreeMap<u64, mpsc::Sender<Vec<Message>>>>,
    addresses: Arc<Mutex<BTreeMap<u64, String>>>,
}

impl Transport {
    /// Starts a task for each peer, given by id and address. `report` must not block.
    pub fn start(
        cluster: ClusterId,
        own: NodeId,
        peers: BTreeMap<u64, String>,
        report: impl Fn(Delivery) + Clone + Send + Sync + 'static,
    ) -> Self {
        let addresses = Arc::new(Mutex::new(peers.clone()));
        let queues = peers.into_keys().map(|to| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            let peer = Peer { cluster, own, to, addresses: addresses.clone(), report: report.clone() };
            tokio::spawn(peer.run(receiver));
            (to, sender)
        });
        Self { queues: Arc::new(queues.collect()), addresses }
    }

    /// Peers have said where they listen now; used when a connection is made anew.
    pub fn update(&self, addresses: impl IntoIterator<Item = (u64, String)>) {
        let mut known = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, addr) in addresses {
            if let Some(known) = known.get_mut(&id) {
                *known = addr;
            }
        }
    }

    /// Queues messages for their receivers. Never blocks; returns the receivers whose queue is full.
    pub fn send(&self, messages: Vec<Message>) -> Vec<u64> {
        let mut by_peer: BTreeMap<u64, Vec<Message>> = BTreeMap::new();
        for message in messages {
            by_peer.entry(message.to).or_default().push(message);
        }
        by_peer
            .into_iter()
            .filter_map(|(to, batch)| self.queues.get(&to)?.try_send(batch).is_err().then_some(to))
            .collect()
    }
}

struct Peer<F> {
    cluster: ClusterId,
    own: NodeId,
    to: u64,
    addresses: Arc<Mutex<BTreeMap<u64, String>>>,
    report: F,
}

impl<F: Fn(Delivery) + Clone + Send + Sync + 'static> Peer<F> {
    async fn run(self, mut queue: mpsc::Receiver<Vec<Message>>) {
        while let Some(first) = queue.recv().await {
            let addr = self.addresses.lock().unwrap_or_else(PoisonError::into_inner).get(&self.to).cloned();
            let why = match addr {
                Some(addr) => self.stream(&addr, first, &mut queue).await,
                None => return,
            };
            let Some(why) = why else { return };
            tracing::debug!(peer = self.to, %why, "raft stream ended");
            (self.report)(Delivery::Unreachable(self.to));
            tokio::time::sleep(RECONNECT_AFTER).await;
            // What waited meanwhile is old: raft sends it again if it still matters.
            while let Ok(lost) = queue.try_recv() {
                self.lost(&lost);
            }
        }
    }

    fn lost(&self, messages: &[Message]) {
        if messages.iter().any(|message| message.get_msg_type() == MessageType::MsgSnapshot) {
            (self.report)(Delivery::Snapshot(self.to, false));
        }
    }

    /// Streams until something fails, and says what; `None`: we are shutting down.
    async fn stream(
        &self,
        addr: &str,
        first: Vec<Message>,
        queue: &mut mpsc::Receiver<Vec<Message>>,
    ) -> Option<String> {
        let endpoint = match Endpoint::from_shared(format!("http://{addr}")) {
            Ok(endpoint) => endpoint
                .connect_timeout(Duration::from_secs(1))
                .tcp_nodelay(true)
                .http2_keep_alive_interval(Duration::from_secs(2))
                .keep_alive_timeout(Duration::from_secs(2)),
            Err(error) => return Some(format!("{addr}: {error}")),
        };
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => {
                self.lost(&first);
                return Some(format!("{addr}: {error:?}"));
            }
        };
        let (sender, receiver) = mpsc::channel(4);
        let mut client = RaftClient::new(channel).max_encoding_message_size(MAX_BATCH_BYTES);
        let call = client.messages(ReceiverStream::new(receiver));
        tokio::pin!(call);
        let mut batch = first;
        loop {
            let snapshot = batch.iter().any(|message| message.get_msg_type() == MessageType::MsgSnapshot);
            tokio::select! {
                ended = &mut call => {
                    self.lost(&batch);
                    return Some(format!("{addr}: {ended:?}"));
                }
                sent = sender.send(self.encode(&batch)) => if sent.is_err() {
                    self.lost(&batch);
                    return Some(format!("{addr}: the stream is closed"));
                }
            }
            if snapshot {
                (self.report)(Delivery::Snapshot(self.to, true));
            }
            tokio::select! {
                ended = &mut call => return Some(format!("{addr}: {ended:?}")),
                next = queue.recv() => batch = next?,
            }
            // Whatever has gathered goes in one batch.
            while batch.len() < MAX_BATCH / 2
                && let Ok(more) = queue.try_recv()
            {
                batch.extend(more);
            }
            batch.truncate(MAX_BATCH);
        }
    }

    fn encode(&self, batch: &[Message]) -> pb::RaftBatch {
        let encoded = batch.iter().filter_map(|message| message.write_to_bytes().ok());
        pb::RaftBatch {
            cluster: self.cluster.to_bytes().to_vec().into(),
            from: self.own.0,
            to: self.to,
            messages: encoded.map(Into::into).collect(),
        }
    }
}

/// Checks and decodes a batch that came for `own` in `cluster`.
///
/// # Errors
/// What is wrong with it: the stream is to be ended.
pub fn decode(cluster: ClusterId, own: NodeId, batch: &pb::RaftBatch) -> Result<Vec<Message>, String> {
    if batch.cluster[..] != cluster.to_bytes() {
        return Err(format!("this member belongs to cluster {cluster}"));
    }
    if batch.to != own.0 {
        return Err(format!("this is member {own}, the batch is for {}", batch.to));
    }
    if batch.messages.len() > MAX_BATCH {
        return Err(format!("{} messages, at most {MAX_BATCH} are allowed", batch.messages.len()));
    }
    let messages = batch.messages.iter().map(|bytes| {
        let message = Message::parse_from_bytes(bytes).map_err(|error| error.to_string())?;
        match message.from == batch.from {
            true => Ok(message),
            false => Err(format!("a message of {} in a batch of {}", message.from, batch.from)),
        }
    });
    messages.collect()
}
