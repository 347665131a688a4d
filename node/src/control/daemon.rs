//! Starts a member: locks its directory, listens, forms or joins up with its cluster, and runs until told to stop.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::cluster::{ClusterDefinition, Refusal, Role};
use proto::id::{ClusterId, NodeId};
use proto::pb::admin_server::AdminServer;
use proto::pb::control_server::ControlServer;
use proto::pb::raft_server::RaftServer;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use super::agent::{HostFuture, NodeAgent, ReplicaHost};
use super::config::{ConfigError, NodeConfig};
use super::core::ControlCore;
use super::service::{InitRequest, Services};
use crate::raft::core::{CoreConfig, RaftCore};
use crate::raft::driver::{self, ControlHandle, DriverError, Shown};
use crate::raft::log_store::{LogError, LogStore, RedbStore};
use crate::raft::transport::MAX_BATCH_BYTES;

/// Why a member could not start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The directory.
    #[error("{path}: {source}")]
    Dir {
        /// The file or directory.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// Another process uses the directory.
    #[error("{dir} is in use by another process: is {name} running already?")]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// The member.
        name: String,
    },
    /// The directory is another member's, or another cluster's.
    #[error(
        "{dir} belongs to member {found_member} of cluster {found}, \
         and this is member {member} of cluster {wanted}: use another directory"
    )]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        found: ClusterId,
        /// Whose it is.
        found_member: NodeId,
        /// Who we are.
        wanted: ClusterId,
        /// Who we are.
        member: NodeId,
    },
    /// The directory's identity file is damaged, or does not fit.
    #[error("{path}: {why}")]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// An address is taken.
    #[error("{name} cannot listen on {addr}: {source}")]
    Listen {
        /// The member.
        name: String,
        /// The address.
        addr: SocketAddr,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The core or its log.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The replica server.
    #[error("replicas: {0}")]
    Host(String),
    /// The gRPC server.
    #[error("gRPC server: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// What the replica server gets to start with.
pub struct HostContext {
    /// The daemon's configuration: pools, directory.
    pub config: Arc<NodeConfig>,
    /// The cluster.
    pub cluster: ClusterId,
    /// The metadata as applied here.
    pub shown: watch::Receiver<Shown>,
    /// Listens on `data_listen`; non-blocking.
    pub data_listener: TcpListener,
}

/// Starts the replica server, once the member has its cluster. The data plane meets the control plane here.
pub type StartHost = Box<dyn FnOnce(HostContext) -> HostFuture<Arc<dyn ReplicaHost>> + Send>;

/// What a member listens on.
pub struct Listeners {
    /// gRPC.
    pub control: TcpListener,
    /// The replica protocol; storage nodes only.
    pub data: Option<TcpListener>,
}

impl Listeners {
    /// Binds what the configuration says.
    ///
    /// # Errors
    /// [`DaemonError::Listen`] with the address that is taken.
    pub fn bind(config: &NodeConfig) -> Result<Self, DaemonError> {
        let bind = |addr: SocketAddr| {
            TcpListener::bind(addr).map_err(|source| DaemonError::Listen { name: config.name.clone(), addr, source })
        };
        Ok(Self { control: bind(config.control_listen)?, data: config.data_listen.map(bind).transpose()? })
    }
}

/// Runs a member until `shutdown` is ready. A storage node needs `start_host`, a witness has none.
///
/// # Errors
/// Why it could not start, or why it had to stop.
pub async fn run(
    config: NodeConfig,
    start_host: Option<StartHost>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), DaemonError> {
    config.check()?;
    let _lock = lock(&config)?;
    let listeners = Listeners::bind(&config)?;
    run_locked(config, listeners, start_host, shutdown).await
}

/// As [`run`], on listeners that are bound already.
///
/// # Errors
/// As [`run`].
pub async fn run_on(
    config: NodeConfig,
    listeners: Listeners,
    start_host: Option<StartHost>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), DaemonError> {
    config.check()?;
    let _lock = lock(&config)?;
    run_locked(config, listeners, start_host, shutdown).await
}

async fn run_locked(
    config: NodeConfig,
    listeners: Listeners,
    start_host: Option<StartHost>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), DaemonError> {
    let config = Arc::new(config);
    let known = identity(&config)?;
    let (init, mut inits) = mpsc::channel(1);
    let services = Services::new(config.clone(), init);
    let (close, closed) = oneshot::channel();
    let mut server = Abort(serve(&config, listeners.control, services.clone(), closed)?);
    tokio::pin!(shutdown);

    let (definition, tell) = match known {
        Some(definition) => (definition, None),
        None => {
            tracing::info!(member = %config.name, "waits for `cluster init`");
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                ended = &mut server.0 => return served(ended),
                (definition, tell) = first_definition(&config, &mut inits) => (definition, Some(tell)),
            }
        }
    };
    remember(&config, &definition)?;
    let (handle, mut task) = start_core(&config, &definition)?;
    services.formed(definition.id, handle.clone());
    if let Some(tell) = tell {
        let _ = tell.send(Ok(()));
    }
    tracing::info!(member = %config.name, cluster = %definition.id, addr = %config.control_listen, "runs");
    let work = serve_replicas(&config, &definition, &handle, listeners.data, start_host);
    let work = async {
        match work.await {
            Ok(agent) => {
                agent.run().await;
                Ok(())
            }
            Err(error) => Err(error),
        }
    };
    tokio::pin!(work);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            worked = &mut work => return worked,
            ended = &mut server.0 => return served(ended),
            ended = &mut task => return Ok(joined(ended)?),
            // A repeated `init` that came before this member knew itself formed.
            Some((other, tell)) = inits.recv() => {
                let same = other.id == definition.id;
                let refusal = Refusal::OtherCluster { ours: definition.id, theirs: other.id };
                let _ = tell.send(if same { Ok(()) } else { Err(refusal) });
            }
        }
    }
    handle.stop().await;
    // A log that hangs must not keep the process: whatever is not written was not promised to anybody.
    match tokio::time::timeout(Duration::from_secs(5), task).await {
        Ok(ended) => joined(ended)?,
        Err(_) => tracing::warn!(member = %config.name, "stops though its log is still being written"),
    }
    // Connections are told, so that nobody goes on asking a member that has ended.
    let _ = close.send(());
    let _ = tokio::time::timeout(Duration::from_millis(500), &mut server.0).await;
    Ok(())
}

async fn serve_replicas(
    config: &Arc<NodeConfig>,
    definition: &ClusterDefinition,
    handle: &ControlHandle,
    data_listener: Option<TcpListener>,
    start_host: Option<StartHost>,
) -> Result<NodeAgent, DaemonError> {
    let mut host = None;
    if let (Role::Node, Some(start), Some(data_listener)) = (config.role, start_host, data_listener) {
        data_listener.set_nonblocking(true).map_err(|source| DaemonError::Dir { path: config.dir.clone(), source })?;
        let (config, cluster, shown) = (config.clone(), definition.id, handle.shown());
        let context = HostContext { config, cluster, shown, data_listener };
        host = Some(start(context).await.map_err(DaemonError::Host)?);
    }
    Ok(NodeAgent::new(config.clone(), handle.clone(), host))
}

/// Ends a task with whoever waits for it.
struct Abort<T>(JoinHandle<T>);

impl<T> Drop for Abort<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

type Served = Result<(), tonic::transport::Error>;

fn served(ended: Result<Served, tokio::task::JoinError>) -> Result<(), DaemonError> {
    Ok(joined(ended)?)
}

fn joined<T>(ended: Result<T, tokio::task::JoinError>) -> T {
    match ended {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => panic!("a task of the daemon was ended from outside: {error}"),
        },
    }
}

fn serve(
    config: &NodeConfig,
    listener: TcpListener,
    services: Services,
    closed: oneshot::Receiver<()>,
) -> Result<JoinHandle<Served>, DaemonError> {
    let listen = |source| DaemonError::Listen { name: config.name.clone(), addr: config.control_listen, source };
    listener.set_nonblocking(true).map_err(listen)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(listen)?;
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .add_service(RaftServer::new(services.clone()).max_decoding_message_size(MAX_BATCH_BYTES))
        .add_service(ControlServer::new(services.clone()))
        .add_service(AdminServer::new(services))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async {
            let _ = closed.await;
        });
    Ok(tokio::spawn(server))
}

/// Waits for a definition that this member is part of; refuses others.
async fn first_definition(
    config: &NodeConfig,
    inits: &mut mpsc::Receiver<InitRequest>,
) -> (ClusterDefinition, oneshot::Sender<Result<(), Refusal>>) {
    loop {
        let Some((definition, tell)) = inits.recv().await else { return std::future::pending().await };
        match config.fits(&definition) {
            Ok(()) => return (definition, tell),
            Err(why) => {
                let _ = tell.send(Err(Refusal::invalid("definition", why)));
            }
        }
    }
}

fn start_core(
    config: &NodeConfig,
    definition: &ClusterDefinition,
) -> Result<(ControlHandle, JoinHandle<Result<(), DriverError>>), DaemonError> {
    let path = config.dir.join("raft.redb");
    let mut store = RedbStore::open(&path, definition.id, config.id)?;
    let (voters, preferred) = voters(definition);
    let log = store.load()?.into_log(&voters).map_err(|why| LogError::Damaged { path, why })?;
    let nonce = Uuid::new_v4().as_u64_pair().0;
    let raft = RaftCore::new(CoreConfig::new(config.id.0, voters, preferred), log, nonce)
        .map_err(|error| DriverError::Core(error.into()))?;
    let core = ControlCore::new(config.id, definition.clone(), raft).map_err(DriverError::Core)?;
    let peers: BTreeMap<u64, String> = definition
        .members
        .iter()
        .filter(|member| member.id != config.id)
        .map(|member| (member.id.0, member.control_addr.clone()))
        .collect();
    Ok(driver::start(core, store, peers))
}

/// The voters' ids, and of those the witnesses'.
pub fn voters(definition: &ClusterDefinition) -> (Vec<u64>, Vec<u64>) {
    let mut voters: Vec<u64> = definition.members.iter().map(|member| member.id.0).collect();
    voters.sort_unstable();
    let witnesses = definition.members.iter().filter(|member| member.role == Role::Witness);
    (voters, witnesses.map(|member| member.id.0).collect())
}

/// Locks the directory for as long as the file is open: the kernel lets go when the process ends, however it does.
fn lock(config: &NodeConfig) -> Result<File, DaemonError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| DaemonError::Dir { path, source }
    };
    std::fs::create_dir_all(&config.dir).map_err(at(&config.dir))?;
    let path = config.dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(DaemonError::Locked { dir: config.dir.clone(), name: config.name.clone() })
        }
        Err(errno) => Err(at(&path)(errno.into())),
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Identity {
    member: NodeId,
    definition: ClusterDefinition,
}

/// The cluster that the directory or the configuration names; both must agree.
fn identity(config: &NodeConfig) -> Result<Option<ClusterDefinition>, DaemonError> {
    let path = config.dir.join("member.json");
    let wrong = |why: String| DaemonError::Identity { path: path.clone(), why };
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(config.cluster.clone()),
        Err(source) => return Err(DaemonError::Dir { path, source }),
    };
    let found: Identity = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let wanted = config.cluster.as_ref().map_or(found.definition.id, |cluster| cluster.id);
    if found.member != config.id || found.definition.id != wanted {
        return Err(DaemonError::Foreign {
            dir: config.dir.clone(),
            found: found.definition.id,
            found_member: found.member,
            wanted,
            member: config.id,
        });
    }
    config.fits(&found.definition).map_err(wrong)?;
    match &config.cluster {
        // Addresses may have changed since; who votes may not.
        Some(new) if voters(new) == voters(&found.definition) => Ok(Some(new.clone())),
        Some(_) => Err(wrong("the configuration names other voters than the cluster was formed with".into())),
        None => Ok(Some(found.definition)),
    }
}

/// Makes the member's cluster durable before anything is done in its name.
fn remember(config: &NodeConfig, definition: &ClusterDefinition) -> Result<(), DaemonError> {
    let path = config.dir.join("member.json");
    let new = config.dir.join("member.json.new");
    let identity = Identity { member: config.id, definition: definition.clone() };
    let written = || {
        let text = serde_json::to_vec_pretty(&identity)?;
        std::fs::write(&new, text)?;
        File::open(&new)?.sync_all()?;
        std::fs::rename(&new, &path)?;
        File::open(&config.dir)?.sync_all()
    };
    written().map_err(|source: std::io::Error| DaemonError::Dir { path: path.clone(), source })
}
