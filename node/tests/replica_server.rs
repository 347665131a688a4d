//! The data plane as a whole: frames over TCP to replicas in files, through both disk engines.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use node::data::{DataConfig, DataPlane, PoolPlace, PoolSpec, ReplicaProblem, ReplicaSpec, ReplicaState};
use node::replica::layout::Layout;
use node::replica::{DiskError, DiskIo, FileKind, OpenError, block_hash};
use node::store::{EngineKind, FileProblem, MemPool};
use proto::frame::*;
use proto::id::*;
use uuid::Uuid;

const SIZE: u64 = 8 << 20;
const B: usize = 4096;

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn spec(replica: u128) -> ReplicaSpec {
    ReplicaSpec {
        cluster: ClusterId(id(1)),
        volume: VolumeId(id(2)),
        mirror: MirrorId(id(3)),
        replica: ReplicaId(id(replica)),
        pool: "p".to_owned(),
        size_bytes: SIZE,
        all_dirty: false,
    }
}

fn attach_id(epoch: u64, attach: u64) -> AttachId {
    AttachId { epoch: Epoch(epoch), attach: AttachNo(attach) }
}

async fn start_in(place: PoolPlace, engine: EngineKind, incarnation: u64) -> DataPlane {
    let config = DataConfig {
        listener: TcpListener::bind("127.0.0.1:0").unwrap(),
        cluster: ClusterId(id(1)),
        incarnation: Incarnation(incarnation),
        pools: vec![PoolSpec { name: "p".to_owned(), place, capacity: None }],
        threads: Some(2),
        engine,
    };
    DataPlane::start(config).await.unwrap()
}

async fn start(dir: &Path, engine: EngineKind) -> DataPlane {
    start_in(PoolPlace::Directory(dir.to_owned()), engine, 1).await
}

/// A gateway, or a node, on the wire.
struct Client {
    stream: TcpStream,
    tag: u64,
    attach: AttachId,
}

#[derive(Debug)]
struct Closed;

impl Client {
    fn raw(plane: &DataPlane) -> TcpStream {
        let stream = TcpStream::connect(plane.addr()).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn connect(plane: &DataPlane, role: PeerRole) -> Self {
        let mut client = Self { stream: Self::raw(plane), tag: 0, attach: AttachId::default() };
        let hello =
            Request::Hello { role, cluster: ClusterId(id(1)), volume: VolumeId(id(2)), name: "test".to_owned() };
        assert_eq!(client.ask(hello).unwrap(), Reply::Done(Kind::Hello));
        client
    }

    fn gateway(plane: &DataPlane) -> Self {
        Self::connect(plane, PeerRole::Gateway)
    }

    fn send(&mut self, request: &Request) -> u64 {
        self.tag += 1;
        let frame = request.encode(1, self.attach, self.tag);
        let mut bytes = frame.head.chain(frame.payload);
        let bytes = bytes.copy_to_bytes(bytes.remaining());
        self.stream.write_all(&bytes).unwrap();
        self.tag
    }

    fn receive(&mut self) -> Result<(u64, Reply), Closed> {
        let mut head = [0; HEADER_LEN];
        if let Err(e) = self.stream.read_exact(&mut head) {
            assert_ne!(e.kind(), ErrorKind::WouldBlock, "no answer");
            return Err(Closed);
        }
        let header = Header::decode(&head).unwrap();
        assert!(header.is_reply);
        let mut body = vec![0; header.body_len as usize];
        self.stream.read_exact(&mut body).unwrap();
        let mut payload = vec![0; header.payload_len as usize];
        self.stream.read_exact(&mut payload).unwrap();
        Ok((header.tag, Reply::decode(&header, &body, payload.into()).unwrap()))
    }

    fn ask(&mut self, request: Request) -> Result<Reply, Closed> {
        let tag = self.send(&request);
        let (answered, reply) = self.receive()?;
        assert_eq!(answered, tag);
        Ok(reply)
    }

    fn done(&mut self, request: Request) {
        let kind = request.kind();
        assert_eq!(self.ask(request).unwrap(), Reply::Done(kind));
    }

    fn attach(&mut self, replica: u128, attach: AttachId) -> Reply {
        self.attach = attach;
        let request = Request::Attach {
            replica: ReplicaId(id(replica)),
            mirror: MirrorId(id(3)),
            lease_ms: 60_000,
            set: SetView::default(),
        };
        self.ask(request).unwrap()
    }

    fn attached(plane: &DataPlane, replica: u128, attach: AttachId) -> (Self, AttachInfo) {
        let mut client = Self::gateway(plane);
        match client.attach(replica, attach) {
            Reply::Attached(info) => (client, info),
            other => panic!("{other:?}"),
        }
    }

    fn bytes(&mut self, block: u64, count: u32) -> Result<Bytes, Code> {
        match self.ask(Request::Read { block: BlockIndex(block), count }).unwrap() {
            Reply::Read { data, sums, .. } => {
                assert_eq!(block_sums(&data), sums);
                Ok(data)
            }
            Reply::Failed { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }
}

fn pattern(count: usize, seed: u64) -> Bytes {
    (0..count * B / 8).flat_map(|i| (seed << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

fn write(block: u64, data: &Bytes) -> Request {
    Request::Write { block: BlockIndex(block), fua: false, sums: block_sums(data), data: data.clone() }
}

fn code(reply: Reply) -> Code {
    match reply {
        Reply::Failed { code, .. } => code,
        other => panic!("{other:?}"),
    }
}

const ENGINES: [EngineKind; 2] = [EngineKind::Blocking, EngineKind::IoUring];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_keeps_what_was_written_over_a_restart() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let plane = start(dir.path(), engine).await;
        plane.create_replica(spec(10)).await.unwrap();
        plane.create_replica(spec(10)).await.expect("again is harmless");
        let (mut client, info) = Client::attached(&plane, 10, attach_id(1, 1));
        assert_eq!((info.dirty, info.blocks, info.rebuilt), (0, SIZE / B as u64, false));
        let (small, large) = (pattern(1, 1), pattern(256, 2));
        client.done(write(3, &small));
        client.done(write(512, &large));
        client.done(Request::Discard { block: BlockIndex(600), count: 10 });
        client.done(Request::Ping);
        client.done(Request::Flush { flush: FlushNo(1) });
        assert_eq!(client.bytes(3, 1).unwrap(), small);
        assert_eq!(client.bytes(512, 88).unwrap(), large[..88 * B]);
        assert!(client.bytes(600, 10).unwrap().iter().all(|b| *b == 0));
        let Reply::Hashes(hashes) =
            client.ask(Request::Hashes { block: BlockIndex(512), count: 256, key: [1; 32] }).unwrap()
        else {
            panic!()
        };
        assert_eq!(hashes[0].hash, block_hash(&[1; 32], &large[..B]));
        assert!(hashes.iter().all(|h| h.intact && h.readable));
        let entries = [0, 2].map(|r| CleanEntry { region: RegionIndex(r), flush: FlushNo(1) }).to_vec();
        client.done(Request::Clean { clean: CleanNo(1), entries });
        client.done(write(3, &pattern(1, 3)));
        plane.shutdown().await;
        assert!(client.receive().is_err(), "the connection is closed");

        let again = start_in(PoolPlace::Directory(dir.path().to_owned()), engine, 2).await;
        again.open_replica(spec(10), false).await.unwrap();
        let (mut client, info) = Client::attached(&again, 10, attach_id(1, 2));
        assert_eq!((info.held, info.incarnation), (AttachId::default(), Incarnation(2)), "it has restarted");
        assert_eq!((info.dirty, info.suspect, info.set.clean), (1, 1, CleanNo(1)));
        assert_eq!(client.bytes(512, 88).unwrap(), large[..88 * B]);
        // Written after the last flush: old, new, or flagged.
        let last = client.bytes(3, 1);
        assert!(matches!(&last, Ok(b) if *b == small || *b == pattern(1, 3)) || last == Err(Code::Checksum));
        // A block of the mirror lies at its place in the data file.
        let path = dir.path().join(format!("{}.data", id(10)));
        assert_eq!(std::fs::read(path).unwrap()[512 * B..600 * B], large[..88 * B]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_requests_are_all_answered() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let plane = start(dir.path(), engine).await;
        plane.create_replica(spec(10)).await.unwrap();
        let (mut client, _) = Client::attached(&plane, 10, attach_id(1, 1));
        let blocks: Vec<Bytes> = (0..200).map(|i| pattern(1, i)).collect();
        let mut waiting: Vec<u64> = (0..200).map(|i| client.send(&write(i * 10, &blocks[i as usize]))).collect();
        waiting.push(client.send(&write(2000, &pattern(40, 7))));
        waiting.push(client.send(&Request::Flush { flush: FlushNo(1) }));
        while !waiting.is_empty() {
            let (tag, reply) = client.receive().unwrap();
            assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
            waiting.retain(|t| *t != tag);
        }
        for i in 0..200 {
            assert_eq!(client.bytes(i * 10, 1).unwrap(), blocks[i as usize]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_go_from_node_to_node() {
    for engine in ENGINES {
        let (from_dir, to_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (from, to) = (start(from_dir.path(), engine).await, start(to_dir.path(), engine).await);
        from.create_replica(spec(10)).await.unwrap();
        to.create_replica(spec(11)).await.unwrap();
        let (mut source, _) = Client::attached(&from, 10, attach_id(1, 1));
        let (mut target, _) = Client::attached(&to, 11, attach_id(1, 2));
        let data = pattern(256, 5);
        source.done(write(256, &data));
        target.done(write(300, &pattern(10, 6)));
        source.done(Request::Discard { block: BlockIndex(300), count: 5 });
        let copy = |attach, addr: String| Request::CopyTo {
            block: BlockIndex(256),
            blocks: [u64::MAX, 0b11, 0, 0],
            target: CopyTarget { addr, replica: ReplicaId(id(11)), attach },
        };
        source.done(copy(attach_id(1, 2), to.addr().to_string()));
        assert_eq!(target.bytes(256, 44).unwrap(), data[..44 * B]);
        assert!(target.bytes(300, 5).unwrap().iter().all(|b| *b == 0));
        assert_eq!(target.bytes(305, 17).unwrap(), data[49 * B..66 * B]);
        assert!(target.bytes(322, 1).unwrap().iter().all(|b| *b == 0), "not named, not copied");
        // Under another attach than the destination's.
        assert_eq!(code(source.ask(copy(attach_id(1, 1), to.addr().to_string())).unwrap()), Code::PeerRefused);
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(code(source.ask(copy(attach_id(1, 2), nobody.to_string())).unwrap()), Code::PeerUnreachable);
        // The destination's process is gone, and comes back elsewhere.
        to.shutdown().await;
        assert_eq!(code(source.ask(copy(attach_id(1, 2), to.addr().to_string())).unwrap()), Code::PeerUnreachable);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_gateways_the_newer_attach_fences_the_older() {
    let dir = tempfile::tempdir().unwrap();
    let plane = start(dir.path(), EngineKind::Auto).await;
    plane.create_replica(spec(10)).await.unwrap();
    let (mut old, _) = Client::attached(&plane, 10, attach_id(1, 1));
    old.done(write(0, &pattern(1, 1)));
    let (mut new, info) = Client::attached(&plane, 10, attach_id(2, 1));
    assert_eq!((info.held, info.stored_epoch), (attach_id(1, 1), Epoch(1)));
    for request in [write(0, &pattern(1, 9)), Request::Read { block: BlockIndex(0), count: 1 }] {
        let kind = request.kind();
        let refused = Reply::Failed { kind, code: Code::Superseded, block: 2 };
        assert_eq!(old.ask(request).unwrap(), refused);
    }
    assert_eq!(code(old.attach(10, attach_id(1, 2))), Code::Superseded);
    assert_eq!(new.bytes(0, 1).unwrap(), pattern(1, 1));
    // Its connection ends: so does its attach.
    drop(new);
    let (mut third, info) = Client::attached(&plane, 10, attach_id(2, 2));
    assert_eq!(info.held, attach_id(2, 1));
    third.done(Request::Detach);
    assert_eq!(third.bytes(0, 1), Err(Code::NotAttached));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_frame_closes_its_connection_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let plane = start(dir.path(), EngineKind::Auto).await;
    plane.create_replica(spec(10)).await.unwrap();
    let (mut good, _) = Client::attached(&plane, 10, attach_id(1, 1));
    let hello = |cluster| Request::Hello {
        role: PeerRole::Gateway,
        cluster: ClusterId(id(cluster)),
        volume: VolumeId(id(2)),
        name: String::new(),
    };
    let encoded = |request: &Request| request.encode(1, attach_id(1, 1), 1).head.to_vec();
    let closes = |mut stream: TcpStream, bytes: &[u8]| {
        // It may be closed before all of it was taken.
        let _ = stream.write_all(bytes);
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest);
        assert!(!matches!(&ended, Err(e) if e.kind() == ErrorKind::WouldBlock), "still open");
        rest
    };
    // Before the greeting.
    let mut flipped = encoded(&hello(1));
    flipped[20] ^= 1;
    let mut spoiled = encoded(&hello(1));
    *spoiled.last_mut().unwrap() ^= 1;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n".repeat(8)[..], &flipped, &spoiled, &encoded(&Request::Ping)] {
        assert!(closes(Client::raw(&plane), bytes).is_empty());
    }
    let refused = closes(Client::raw(&plane), &encoded(&hello(5)));
    let header = Header::decode(refused[..HEADER_LEN].try_into().unwrap()).unwrap();
    assert_eq!((header.kind, header.code), (Kind::Hello, Code::UnknownReplica as u32));
    // After it.
    let mut too_long = Header {
        kind: Kind::Write,
        is_reply: false,
        flags: 0,
        channel: 1,
        code: 0,
        tag: 1,
        attach: attach_id(1, 1),
        block: 0,
        count: 1,
        body_len: 0,
        payload_len: u32::MAX,
    };
    let huge = too_long.encode();
    (too_long.payload_len, too_long.count) = (0, 300);
    let many = too_long.encode();
    for bytes in [&huge[..], &many[..], &flipped, &spoiled, &Reply::Done(Kind::Read).encode(1, attach_id(1, 1), 1).head]
    {
        let client = Client::gateway(&plane);
        assert!(closes(client.stream, bytes).is_empty());
    }
    // A request that makes no sense is only refused.
    let mut client = Client::gateway(&plane);
    assert_eq!(client.bytes(0, 1), Err(Code::NotAttached));
    assert_eq!(code(client.attach(99, attach_id(1, 1))), Code::UnknownReplica);
    assert_eq!(code(client.ask(hello(1)).unwrap()), Code::Invalid);
    let copy = Request::CopyWrite {
        replica: ReplicaId(id(10)),
        block: BlockIndex(0),
        count: 1,
        sums: vec![],
        data: Bytes::new(),
    };
    assert_eq!(code(client.ask(copy).unwrap()), Code::Invalid, "gateways send no copies");
    let mut peer = Client::connect(&plane, PeerRole::Node);
    assert_eq!(code(peer.attach(10, attach_id(9, 1))), Code::Invalid, "nodes don't attach");
    good.done(write(0, &pattern(1, 1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_allowed_close_the_connection() {
    let place = MemPool::default();
    let plane = start_in(PoolPlace::Memory(place.clone()), EngineKind::Blocking, 1).await;
    plane.create_replica(spec(10)).await.unwrap();
    let (mut client, _) = Client::attached(&plane, 10, attach_id(1, 1));
    // The page cache would answer as fast as requests come: let the gateway send them in one go, unread.
    let mut bytes = Vec::new();
    for tag in 0..=proto::limits::MAX_ATTACH_IN_FLIGHT as u64 {
        let copy = Request::CopyTo {
            block: BlockIndex(0),
            blocks: [1, 0, 0, 0],
            target: CopyTarget { addr: "192.0.2.1:9".to_owned(), replica: ReplicaId(id(1)), attach: attach_id(1, 1) },
        };
        bytes.extend_from_slice(&copy.encode(1, attach_id(1, 1), tag).head);
    }
    client.stream.write_all(&bytes).unwrap();
    while client.receive().is_ok() {}
    let (_, info) = Client::attached(&plane, 10, attach_id(1, 2));
    assert_eq!(info.held, attach_id(1, 1));
}

fn damage(dir: &Path, replica: u128, suffix: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let path = dir.join(format!("{}.{suffix}", id(replica)));
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
}

async fn made(dir: &Path) {
    let plane = start(dir, EngineKind::Auto).await;
    plane.create_replica(spec(10)).await.unwrap();
    let (mut client, _) = Client::attached(&plane, 10, attach_id(3, 1));
    client.done(write(0, &pattern(4, 1)));
    client.done(Request::Flush { flush: FlushNo(1) });
    plane.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_metadata_is_refused_until_the_cluster_says_that_the_replica_belongs_here() {
    type Change = fn(&mut Vec<u8>);
    let both_copies: Change = |b| [100, B + 100].into_iter().for_each(|at| b[at] ^= 1);
    let cut: Change = |b| b.truncate(3 * B);
    for (suffix, change) in [("meta", both_copies), ("meta", cut), ("data", cut)] {
        let dir = tempfile::tempdir().unwrap();
        made(dir.path()).await;
        damage(dir.path(), 10, suffix, change);
        let plane = start(dir.path(), EngineKind::Auto).await;
        let problem = plane.open_replica(spec(10), false).await.unwrap_err();
        assert!(matches!(
            problem,
            ReplicaProblem::Open { error: OpenError::NoSuperblock { .. } | OpenError::Truncated { .. }, .. }
        ));
        assert!(matches!(&plane.replicas().await[0].state, ReplicaState::Refused { .. }));
        assert_eq!(code(Client::gateway(&plane).attach(10, attach_id(4, 1))), Code::Faulted);
        plane.open_replica(spec(10), true).await.unwrap();
        let (mut client, info) = Client::attached(&plane, 10, attach_id(4, 1));
        assert_eq!((info.rebuilt, info.dirty, info.suspect), (true, 8, 8));
        assert_eq!(client.bytes(0, 1), Err(Code::Checksum), "kept, but not believed");
        let Reply::Hashes(hashes) =
            client.ask(Request::Hashes { block: BlockIndex(0), count: 1, key: [0; 32] }).unwrap()
        else {
            panic!()
        };
        assert!(!hashes[0].intact && hashes[0].readable);
        assert_eq!(hashes[0].hash, block_hash(&[0; 32], &pattern(4, 1)[..B]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_files_are_made_anew_only_when_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let plane = start(dir.path(), EngineKind::Auto).await;
    let problem = plane.open_replica(spec(10), false).await.unwrap_err();
    assert!(matches!(problem, ReplicaProblem::Files(FileProblem::Missing { .. })), "{problem}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made");
    plane.open_replica(spec(10), true).await.unwrap();
    let (mut client, info) = Client::attached(&plane, 10, attach_id(1, 1));
    assert_eq!((info.rebuilt, info.dirty), (true, 8));
    assert!(client.bytes(0, 1).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_files_are_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    made(dir.path()).await;
    let path = dir.path().join(format!("{}.meta", id(10)));
    let before = std::fs::read(&path).unwrap();
    let plane = start(dir.path(), EngineKind::Auto).await;
    let foreign = ReplicaSpec { mirror: MirrorId(id(77)), ..spec(10) };
    for problem in [
        plane.create_replica(foreign.clone()).await.unwrap_err(),
        plane.open_replica(foreign.clone(), true).await.unwrap_err(),
    ] {
        assert!(matches!(problem, ReplicaProblem::Open { error: OpenError::Foreign { .. }, .. }), "{problem}");
        let text = problem.to_string();
        assert!(text.contains(&id(77).to_string()) && text.contains(&id(3).to_string()), "{text}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let other_size = ReplicaSpec { size_bytes: SIZE * 2, ..spec(10) };
    let problem = plane.create_replica(other_size).await.unwrap_err();
    assert!(matches!(problem, ReplicaProblem::Open { error: OpenError::Size { .. }, .. }), "{problem}");
    for size_bytes in [0, 4095, u64::MAX] {
        let problem = plane.create_replica(ReplicaSpec { size_bytes, ..spec(10) }).await.unwrap_err();
        assert!(matches!(problem, ReplicaProblem::Size(_)), "{problem}");
    }
    let problem = plane.create_replica(ReplicaSpec { pool: "x".to_owned(), ..spec(10) }).await.unwrap_err();
    assert!(matches!(problem, ReplicaProblem::UnknownPool(_)), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_that_was_cut_short_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    made(dir.path()).await;
    // As if the superblocks had not been written: bitmaps are there, data is not.
    damage(dir.path(), 10, "meta", |b| b[..2 * B].fill(0));
    let data = dir.path().join(format!("{}.data", id(10)));
    let empty = std::fs::File::create(&data).unwrap();
    empty.set_len(SIZE + 3 * B as u64).unwrap();
    let plane = start(dir.path(), EngineKind::Auto).await;
    plane.create_replica(spec(10)).await.unwrap();
    let (mut client, info) = Client::attached(&plane, 10, attach_id(1, 1));
    assert_eq!((info.rebuilt, info.dirty), (false, 0));
    assert!(client.bytes(0, 4).unwrap().iter().all(|b| *b == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_does_not_get_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(dir.path(), EngineKind::Auto).await;
    first.create_replica(spec(10)).await.unwrap();
    let second = start(dir.path(), EngineKind::Auto).await;
    let problem = second.open_replica(spec(10), true).await.unwrap_err();
    assert!(matches!(problem, ReplicaProblem::Files(FileProblem::Locked { .. })), "{problem}");
    first.shutdown().await;
    second.open_replica(spec(10), true).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_replica_is_unknown_and_its_files_are_gone() {
    let dir = tempfile::tempdir().unwrap();
    let plane = start(dir.path(), EngineKind::Auto).await;
    plane.create_replica(spec(10)).await.unwrap();
    let (mut client, _) = Client::attached(&plane, 10, attach_id(1, 1));
    client.done(write(0, &pattern(256, 1)));
    assert!(plane.pool_usage().await.unwrap()[0].taken >= 1 << 20);
    plane.delete_replica(spec(10).volume, spec(10).replica, "p").await.unwrap();
    plane.delete_replica(spec(10).volume, spec(10).replica, "p").await.expect("again is harmless");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(client.receive().is_err());
    assert_eq!(code(Client::gateway(&plane).attach(10, attach_id(1, 2))), Code::UnknownReplica);
    assert!(plane.replicas().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_answered_and_spares_the_neighbours() {
    let pool = MemPool::default();
    let plane = start_in(PoolPlace::Memory(pool.clone()), EngineKind::Blocking, 1).await;
    plane.create_replica(spec(10)).await.unwrap();
    let (mut client, _) = Client::attached(&plane, 10, attach_id(1, 1));
    client.done(write(0, &pattern(1, 1)));
    let full = |io: &DiskIo| match io {
        DiskIo::Write { file: FileKind::Data, offset, .. } if *offset > 0 => Some(DiskError::NoSpace),
        _ => None,
    };
    pool.set_fault(Some(Arc::new(full)));
    assert_eq!(code(client.ask(write(9, &pattern(1, 2))).unwrap()), Code::NoSpace);
    client.done(write(0, &pattern(1, 3)));
    assert_eq!(client.bytes(0, 1).unwrap(), pattern(1, 3));
}

/// A real full file system, where we may mount one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_file_system_is_answered_with_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        std::process::Command::new("mount").args(args).arg(dir.path()).status().is_ok_and(|s| s.success())
    };
    if !mount(&["-t", "tmpfs", "-o", "size=2m", "tmpfs"]) {
        println!("may not mount a tmpfs here: nothing was shown");
        return;
    }
    for engine in ENGINES {
        let plane = start(dir.path(), engine).await;
        plane.create_replica(spec(10)).await.unwrap();
        let (mut client, _) = Client::attached(&plane, 10, attach_id(1, 1));
        let mut refused = 0;
        for region in 0..8 {
            match client.ask(write(region * 256, &pattern(256, region))).unwrap() {
                Reply::Done(_) => {}
                Reply::Failed { code: Code::NoSpace, .. } => refused += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!((1..8).contains(&refused), "{refused} writes were refused");
        assert_eq!(client.bytes(0, 256).unwrap(), pattern(256, 0));
        client.done(Request::Discard { block: BlockIndex(0), count: 2048 });
        client.done(write(0, &pattern(16, 5)));
        plane.delete_replica(spec(10).volume, spec(10).replica, "p").await.unwrap();
    }
    let unmounted = std::process::Command::new("umount").arg("-l").arg(dir.path()).status();
    assert!(unmounted.is_ok_and(|s| s.success()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_sync_failed_is_opened_again_as_a_restarted_one() {
    let pool = MemPool::default();
    let plane = start_in(PoolPlace::Memory(pool.clone()), EngineKind::Blocking, 1).await;
    plane.create_replica(spec(10)).await.unwrap();
    plane.create_replica(spec(11)).await.unwrap();
    let (mut client, _) = Client::attached(&plane, 10, attach_id(1, 1));
    client.done(write(0, &pattern(1, 1)));
    pool.set_fault(Some(Arc::new(|io| matches!(io, DiskIo::Sync { .. }).then_some(DiskError::Io))));
    assert_eq!(code(client.ask(Request::Flush { flush: FlushNo(1) }).unwrap()), Code::FlushFailed);
    pool.set_fault(None);
    assert_eq!(client.bytes(0, 1), Err(Code::Faulted));
    let state = plane.replica(spec(10).volume, spec(10).replica).await.unwrap().state;
    assert!(matches!(state, ReplicaState::Faulted { .. }), "{state:?}");
    let (_, other) = Client::attached(&plane, 11, attach_id(1, 1));
    assert_eq!(other.dirty, 0, "its neighbour is well");
    let until = Instant::now() + Duration::from_secs(10);
    let info = loop {
        assert!(Instant::now() < until, "it never came back");
        match Client::gateway(&plane).attach(10, attach_id(1, 2)) {
            Reply::Attached(info) => break info,
            Reply::Failed { code: Code::Faulted | Code::Busy, .. } => {
                tokio::time::sleep(Duration::from_millis(20)).await
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((info.held, info.dirty, info.suspect), (AttachId::default(), 1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_replica_costs_next_to_nothing_until_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let plane = start(dir.path(), EngineKind::Auto).await;
    let began = Instant::now();
    plane.create_replica(ReplicaSpec { size_bytes: 200 << 30, ..spec(10) }).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(plane.pool_usage().await.unwrap()[0].taken < 256 << 10);
    assert_eq!(Layout::new(200 << 18).meta_len() >> 20, 266);
    let (mut client, _) = Client::attached(&plane, 10, attach_id(1, 1));
    let last = (200u64 << 18) - 1;
    client.done(write(last, &pattern(1, 1)));
    assert_eq!(client.bytes(last, 1).unwrap(), pattern(1, 1));
}
