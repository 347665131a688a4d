//! Starts and stops the data plane, and makes, opens and deletes replicas.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread::JoinHandle;

use proto::id::{ClusterId, Incarnation, MirrorId, ReplicaId, VolumeId};
use proto::limits::{BLOCK_SIZE, MAX_MIRROR_SIZE};
use tokio::sync::{mpsc, oneshot, watch};

use super::shard::{self, Command, Failed, How, ShardConfig};
use super::{server, thread_of};
use crate::replica::layout::Layout;
use crate::replica::{Create, OpenError};
use crate::store::{EngineKind, FilePair, FileProblem, Found, MemPool, ReplicaFiles, file};

/// Threads that serve volumes, unless the configuration says otherwise.
const MAX_THREADS: usize = 4;
/// Commands and connections that wait for a data thread; whoever sends one more waits.
const COMMANDS: usize = 64;

/// What the data plane starts with.
#[derive(Debug)]
pub struct DataConfig {
    /// Where the replica protocol is served.
    pub listener: TcpListener,
    pub cluster: ClusterId,
    /// Drawn anew by every process (R1).
    pub incarnation: Incarnation,
    pub pools: Vec<PoolSpec>,
    /// Data threads; `None`: as many as cores, at most [`MAX_THREADS`].
    pub threads: Option<usize>,
    pub engine: EngineKind,
}

/// A pool.
#[derive(Clone, Debug)]
pub struct PoolSpec {
    pub name: String,
    pub place: PoolPlace,
    /// Bytes that replicas may take together; `None`: what the file system has.
    pub capacity: Option<u64>,
}

/// Where a pool keeps its replicas.
#[derive(Clone, Debug)]
pub enum PoolPlace {
    Directory(PathBuf),
    /// For tests.
    Memory(MemPool),
}

/// A pool as it is, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStat {
    pub name: String,
    /// What replicas may take together.
    pub capacity: u64,
    /// What is left of it, and on the medium.
    pub free: u64,
    /// What replicas take.
    pub taken: u64,
}

/// A replica as the metadata has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaSpec {
    pub cluster: ClusterId,
    pub volume: VolumeId,
    pub mirror: MirrorId,
    pub replica: ReplicaId,
    /// Its pool's name on this node.
    pub pool: String,
    /// A multiple of the block size.
    pub size_bytes: u64,
    /// It is added to a mirror that has data: made with every region dirty (R7).
    pub all_dirty: bool,
}

impl ReplicaSpec {
    /// Its size in blocks.
    pub fn blocks(&self) -> u64 {
        self.size_bytes / BLOCK_SIZE
    }

    fn is_same(&self, other: &Self) -> bool {
        let ids = |s: &Self| (s.cluster, s.volume, s.mirror, s.replica, s.size_bytes);
        ids(self) == ids(other)
    }
}

/// Where a replica stands on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaState {
    Opening,
    Open,
    /// It met an error of its disk; it is opened again after a while.
    Faulted {
        reason: String,
    },
    /// It can't be opened.
    Refused {
        reason: String,
    },
}

/// A replica on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    pub spec: ReplicaSpec,
    pub state: ReplicaState,
    pub dirty_regions: u64,
    pub suspect_regions: u64,
}

/// Why the data plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("listener: {0}")]
    Listener(io::Error),
    #[error("pool {name}: {path}: {source}")]
    Pool { name: String, path: PathBuf, source: io::Error },
    #[error("data thread: {0}")]
    Thread(io::Error),
    #[error("disk engine: {0}")]
    Engine(io::Error),
}

/// Why a replica could not be made, opened or deleted.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaProblem {
    #[error("this node has no pool {0}")]
    UnknownPool(String),
    #[error("a size of {0} bytes is no multiple of the block size, or out of bounds")]
    Size(u64),
    #[error("replica {replica} is here, but not as asked for: {found:?}")]
    Other { replica: ReplicaId, found: Box<ReplicaSpec> },
    #[error(transparent)]
    Files(#[from] FileProblem),
    #[error("replica {replica} in pool {pool}: {error}")]
    Open { replica: ReplicaId, pool: String, error: OpenError },
    #[error("the data plane is stopping")]
    Stopping,
}

/// The data plane of a storage node. Dropping it stops it, as [`shutdown`](Self::shutdown) does, but blocks.
#[derive(Debug)]
pub struct DataPlane {
    cluster: ClusterId,
    addr: SocketAddr,
    pools: BTreeMap<String, PoolSpec>,
    threads: Vec<mpsc::Sender<Command>>,
    stop: watch::Sender<bool>,
    handles: Mutex<Vec<JoinHandle<()>>>,
    /// One replica is made, opened or deleted at a time.
    changing: tokio::sync::Mutex<()>,
}

impl DataPlane {
    /// Starts the data threads and listens. Replicas are opened by [`open_replica`](Self::open_replica); until then
    /// they are unknown.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(config: DataConfig) -> Result<Self, StartError> {
        for pool in &config.pools {
            if let PoolPlace::Directory(path) = &pool.place {
                let made = std::fs::create_dir_all(path);
                made.map_err(|source| StartError::Pool { name: pool.name.clone(), path: path.clone(), source })?;
            }
        }
        config.listener.set_nonblocking(true).map_err(StartError::Listener)?;
        let addr = config.listener.local_addr().map_err(StartError::Listener)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let n = config.threads.unwrap_or(cores.min(MAX_THREADS)).max(1);
        let (stop, stopped) = watch::channel(false);
        let shard_config =
            ShardConfig { cluster: config.cluster, incarnation: config.incarnation, engine: config.engine, threads: n };
        let (threads, mut commands): (Vec<_>, Vec<_>) = (0..n).map(|_| mpsc::channel(COMMANDS)).unzip();
        let mut listener = Some((config.listener, threads.clone()));
        let plane = Self {
            cluster: config.cluster,
            addr,
            pools: config.pools.into_iter().map(|pool| (pool.name.clone(), pool)).collect(),
            threads,
            stop,
            handles: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        };
        for (i, commands) in commands.drain(..).enumerate() {
            let (started, start) = oneshot::channel();
            let (config, stopped, listener) = (shard_config.clone(), stopped.clone(), listener.take());
            let work = move || run_thread(config, commands, stopped, listener, started);
            let thread = std::thread::Builder::new().name(format!("md99-data-{i}")).spawn(work);
            plane.handles.lock().expect("not poisoned").push(thread.map_err(StartError::Thread)?);
            match start.await {
                Ok(started) => started?,
                Err(_) => return Err(StartError::Thread(io::ErrorKind::Other.into())),
            }
        }
        Ok(plane)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The cluster it serves.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Makes a replica and opens it; durable when this returns. What is there already, whole, is left as it is and
    /// opened; what was begun and cut short is begun anew.
    ///
    /// # Errors
    /// [`ReplicaProblem`]; another's files are never touched.
    pub async fn create_replica(&self, spec: ReplicaSpec) -> Result<(), ReplicaProblem> {
        let _one = self.changing.lock().await;
        if self.is_here(&spec).await? {
            return Ok(());
        }
        let (files, found) = self.files(&spec, true).await?;
        let new = if spec.all_dirty { Create::AllDirty } else { Create::Clean };
        let create = made_as(found, new);
        if !found.meta {
            return self.make(&spec, files, create).await;
        }
        match self.open(&spec, files.clone(), How::Open).await {
            Err(ReplicaProblem::Open { error, .. }) if is_unmade(&error) => self.make(&spec, files, create).await,
            other => other,
        }
    }

    /// Opens a replica that has been made before. With `may_rebuild`, one whose metadata or files are lost is made
    /// anew, every region dirty, and says so to whoever attaches: only for a replica that the cluster's current
    /// metadata says is here. Where it can't be opened its requests are refused.
    ///
    /// # Errors
    /// [`ReplicaProblem`].
    pub async fn open_replica(&self, spec: ReplicaSpec, may_rebuild: bool) -> Result<(), ReplicaProblem> {
        let _one = self.changing.lock().await;
        if self.is_here(&spec).await? {
            return Ok(());
        }
        let opened = self.open_or_rebuild(&spec, may_rebuild).await;
        if let Err(problem) = &opened {
            let refuse = Command::Refuse { spec: spec.clone(), reason: problem.to_string() };
            self.thread(spec.volume).send(refuse).await.map_err(|_| ReplicaProblem::Stopping)?;
        }
        opened
    }

    async fn open_or_rebuild(&self, spec: &ReplicaSpec, may_rebuild: bool) -> Result<(), ReplicaProblem> {
        let (files, found) = match self.files(spec, false).await {
            Err(ReplicaProblem::Files(FileProblem::Missing { path })) if may_rebuild => {
                tracing::error!(replica = %spec.replica, pool = %spec.pool, path = %path.display(),
                    "replica is lost: made anew, to be resynchronised");
                self.files(spec, true).await?
            }
            other => other?,
        };
        let create = made_as(found, Create::Lost);
        let error = match found.meta {
            false => OpenError::NoSuperblock { empty: true },
            true => match self.open(spec, files.clone(), How::Open).await {
                Err(ReplicaProblem::Open { error, .. }) => error,
                other => return other,
            },
        };
        match error {
            error if may_rebuild && is_unmade(&error) => {
                tracing::error!(replica = %spec.replica, pool = %spec.pool, %error,
                    "replica's metadata is lost: made anew, to be resynchronised");
                self.make(spec, files, create).await
            }
            error => Err(ReplicaProblem::Open { replica: spec.replica, pool: spec.pool.clone(), error }),
        }
    }

    /// Deletes a replica; durable when this returns. What is gone is gone.
    ///
    /// # Errors
    /// [`ReplicaProblem`].
    pub async fn delete_replica(&self, volume: VolumeId, replica: ReplicaId, pool: &str) -> Result<(), ReplicaProblem> {
        let _one = self.changing.lock().await;
        let place = self.place(pool)?;
        self.ask(volume, |done| Command::Close { replica, done }).await?;
        match place {
            PoolPlace::Memory(pool) => pool.delete(replica),
            PoolPlace::Directory(dir) => {
                let dir = dir.clone();
                blocking(move || file::delete(&dir, replica)).await?;
            }
        }
        Ok(())
    }

    /// The pools as they are.
    ///
    /// # Errors
    /// The system's, with the directory.
    pub async fn pool_usage(&self) -> Result<Vec<PoolStat>, (PathBuf, io::Error)> {
        let mut stats = Vec::new();
        for pool in self.pools.values() {
            let (size, free, taken) = match &pool.place {
                PoolPlace::Memory(_) => (u64::MAX, u64::MAX, 0),
                PoolPlace::Directory(dir) => {
                    let path = dir.clone();
                    let usage = tokio::task::spawn_blocking(move || file::usage(&path)).await;
                    usage.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(|e| (dir.clone(), e))?
                }
            };
            let capacity = pool.capacity.unwrap_or(size);
            let free = free.min(capacity.saturating_sub(taken));
            stats.push(PoolStat { name: pool.name.clone(), capacity, free, taken });
        }
        Ok(stats)
    }

    /// The directory of a pool, for messages.
    pub fn pool_path(&self, name: &str) -> Option<&Path> {
        match &self.pools.get(name)?.place {
            PoolPlace::Directory(path) => Some(path),
            PoolPlace::Memory(_) => None,
        }
    }

    /// What is known of a replica; `None`: it is not here.
    pub async fn replica(&self, volume: VolumeId, replica: ReplicaId) -> Option<ReplicaStatus> {
        self.ask(volume, |done| Command::Status { replica, done }).await.ok().flatten()
    }

    /// Every replica of this node, as far as its threads still run.
    pub async fn replicas(&self) -> Vec<ReplicaStatus> {
        let mut all = Vec::new();
        for thread in &self.threads {
            let (done, answer) = oneshot::channel();
            if thread.send(Command::List { done }).await.is_ok() {
                all.extend(answer.await.unwrap_or_default());
            }
        }
        all.sort_by_key(|status| status.spec.replica);
        all
    }

    /// Takes no more requests, lets those in flight end, syncs and closes every replica.
    pub async fn shutdown(&self) {
        let _ = self.stop.send(true);
        let handles = std::mem::take(&mut *self.handles.lock().expect("not poisoned"));
        let joined = tokio::task::spawn_blocking(move || handles.into_iter().for_each(join));
        if let Err(error) = joined.await {
            tracing::error!(%error, "data threads");
        }
    }

    /// As [`shutdown`](Self::shutdown), but blocks.
    pub fn stop_and_wait(&self) {
        // Threads that have ended already listen no more.
        let _ = self.stop.send(true);
        std::mem::take(&mut *self.handles.lock().expect("not poisoned")).into_iter().for_each(join);
    }

    fn place(&self, pool: &str) -> Result<&PoolPlace, ReplicaProblem> {
        let known = self.pools.get(pool).map(|pool| &pool.place);
        known.ok_or_else(|| ReplicaProblem::UnknownPool(pool.to_owned()))
    }

    fn thread(&self, volume: VolumeId) -> &mpsc::Sender<Command> {
        &self.threads[thread_of(volume, self.threads.len())]
    }

    async fn ask<T>(
        &self,
        volume: VolumeId,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, ReplicaProblem> {
        let (done, answer) = oneshot::channel();
        self.thread(volume).send(command(done)).await.map_err(|_| ReplicaProblem::Stopping)?;
        answer.await.map_err(|_| ReplicaProblem::Stopping)
    }

    /// Whether the replica is open, or will be again by itself.
    async fn is_here(&self, spec: &ReplicaSpec) -> Result<bool, ReplicaProblem> {
        let size = spec.size_bytes;
        if size == 0 || !size.is_multiple_of(BLOCK_SIZE) || size > MAX_MIRROR_SIZE {
            return Err(ReplicaProblem::Size(size));
        }
        self.place(&spec.pool)?;
        let replica = spec.replica;
        let Some(status) = self.ask(spec.volume, |done| Command::Status { replica, done }).await? else {
            return Ok(false);
        };
        match status.state {
            ReplicaState::Refused { .. } => Ok(false),
            _ if status.spec.is_same(spec) => Ok(true),
            _ => Err(ReplicaProblem::Other { replica, found: Box::new(status.spec) }),
        }
    }

    async fn files(&self, spec: &ReplicaSpec, create: bool) -> Result<(ReplicaFiles, Found), ReplicaProblem> {
        let replica = spec.replica;
        match self.place(&spec.pool)? {
            PoolPlace::Directory(dir) => {
                let (dir, layout) = (dir.clone(), Layout::new(spec.blocks()));
                let (files, found) = blocking(move || FilePair::open(&dir, replica, layout, create)).await?;
                Ok((ReplicaFiles::File(files.into()), found))
            }
            PoolPlace::Memory(pool) => {
                let missing = || FileProblem::Missing { path: replica.to_string().into() };
                let known = pool.open(replica, false);
                let found = known.as_ref().map_or(Found { data: false, meta: false }, |files| {
                    let lengths = files.lengths();
                    Found { data: lengths.data > 0, meta: lengths.meta > 0 }
                });
                let files = pool.open(replica, create).ok_or_else(missing)?;
                Ok((ReplicaFiles::Mem(files), found))
            }
        }
    }

    /// Empty metadata is durable before the superblock, and the names before that (§6).
    async fn make(&self, spec: &ReplicaSpec, files: ReplicaFiles, create: Create) -> Result<(), ReplicaProblem> {
        let layout = Layout::new(spec.blocks());
        match &files {
            ReplicaFiles::Mem(files) => files.size(&layout, true),
            ReplicaFiles::File(files) => {
                let files = files.clone();
                blocking(move || files.size()).await?;
            }
        }
        self.open(spec, files, How::Create(create)).await
    }

    async fn open(&self, spec: &ReplicaSpec, files: ReplicaFiles, how: How) -> Result<(), ReplicaProblem> {
        let asked = spec.clone();
        let opened = self.ask(spec.volume, |done| Command::Open { spec: asked, files, how, done }).await?;
        opened.map_err(|failed| match failed {
            Failed::Open(error) => ReplicaProblem::Open { replica: spec.replica, pool: spec.pool.clone(), error },
            Failed::Closed => ReplicaProblem::Stopping,
        })
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.stop_and_wait();
    }
}

/// As what a replica without metadata is made. Data without metadata was somebody's: it is kept, and nobody trusts it.
pub fn made_as(found: Found, otherwise: Create) -> Create {
    if found.data { Create::Rebuilt } else { otherwise }
}

/// Whether there is no replica in the files, or no more of one than can be thrown away.
pub fn is_unmade(error: &OpenError) -> bool {
    matches!(error, OpenError::NoSuperblock { .. } | OpenError::Truncated { .. })
}

fn join(handle: JoinHandle<()>) {
    if handle.join().is_err() {
        tracing::error!("a data thread panicked");
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileProblem> + Send + 'static,
) -> Result<T, ReplicaProblem> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ReplicaProblem::Stopping),
    }
}

type Accepting = Option<(TcpListener, Vec<mpsc::Sender<Command>>)>;

fn run_thread(
    config: ShardConfig,
    commands: mpsc::Receiver<Command>,
    stopped: watch::Receiver<bool>,
    listener: Accepting,
    started: oneshot::Sender<Result<(), StartError>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            // Whoever starts us tells of it.
            let _ = started.send(Err(StartError::Thread(error)));
            return;
        }
    };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        if let Some((listener, threads)) = listener {
            match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => {
                    tokio::task::spawn_local(server::accept(listener, config.cluster, threads));
                }
                Err(error) => {
                    let _ = started.send(Err(StartError::Listener(error)));
                    return;
                }
            }
        }
        shard::run(config, commands, stopped, started).await;
    });
    drop(local);
    // A disk that hangs must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
}
