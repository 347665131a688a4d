//! Accepts connections and greets them: the first frame says whose it is, and the volume's thread takes it over.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::frame::{Code, FrameError, FrameReader, Kind, Reply, Request};
use proto::id::{AttachId, ClusterId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};

use super::shard::{Command, Hello};
use super::thread_of;

/// How long a connection may take to send its greeting.
const GREETING: Duration = Duration::from_secs(5);
/// Connections that have not sent their greeting; more wait to be accepted.
const MAX_GREETINGS: usize = 64;
/// Bytes that a greeting can't exceed: header, names.
const MAX_GREETING: usize = 1024;
/// After an accept that failed, such as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
enum GreetingError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it sent something that is no frame: {0}")]
    Frame(#[from] FrameError),
    #[error("it sent {0:?} before a greeting")]
    NotHello(Kind),
    #[error("it belongs to cluster {0}")]
    OtherCluster(ClusterId),
    #[error("it sent no greeting within {} s", GREETING.as_secs())]
    Late,
    #[error("it closed the connection")]
    Closed,
}

/// Accepts until dropped. Runs inside a `LocalSet`.
pub(super) async fn accept(listener: TcpListener, cluster: ClusterId, threads: Vec<mpsc::Sender<Command>>) {
    let threads = Arc::new(threads);
    let places = Arc::new(Semaphore::new(MAX_GREETINGS));
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let threads = threads.clone();
        tokio::task::spawn_local(async move {
            let greeted = tokio::time::timeout(GREETING, greet(stream, cluster, &threads)).await;
            if let Err(error) = greeted.unwrap_or(Err(GreetingError::Late)) {
                log(peer, &error);
            }
            drop(place);
        });
    }
}

fn log(peer: SocketAddr, error: &GreetingError) {
    match error {
        // Someone looked whether the port is open.
        GreetingError::Closed => tracing::debug!(%peer, %error, "connection without a greeting"),
        _ => tracing::warn!(%peer, %error, "connection refused"),
    }
}

async fn greet(
    mut stream: TcpStream,
    cluster: ClusterId,
    threads: &[mpsc::Sender<Command>],
) -> Result<(), GreetingError> {
    proto::socket::tune(&stream)?;
    let mut reader = FrameReader::default();
    let (header, request) = loop {
        if stream.read_buf(&mut reader.space()).await? == 0 {
            return Err(GreetingError::Closed);
        }
        if let Some(header) = reader.peek()? {
            if header.kind != Kind::Hello || header.is_reply {
                return Err(GreetingError::NotHello(header.kind));
            }
            if header.body_len as usize + header.payload_len as usize > MAX_GREETING {
                return Err(FrameError::Malformed("greeting").into());
            }
        }
        if let Some(request) = reader.request()? {
            break request;
        }
    };
    let Request::Hello { role, cluster: theirs, volume, name } = request else {
        return Err(GreetingError::NotHello(header.kind));
    };
    if theirs != cluster {
        let refusal = Reply::Failed { kind: Kind::Hello, code: Code::UnknownReplica, block: 0 };
        stream.write_all(&refusal.encode(header.channel, AttachId::default(), header.tag).head).await?;
        return Err(GreetingError::OtherCluster(theirs));
    }
    let thread = &threads[thread_of(volume, threads.len())];
    let hello = Hello { role, volume, name, tag: header.tag };
    let adopt = Command::Adopt { stream: stream.into_std()?, hello, rest: reader };
    thread.send(adopt).await.map_err(|_| GreetingError::Closed)
}
