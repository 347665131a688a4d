//! What a request costs in the cores: a mirror of three replicas, all of them real ones over files in memory, in one
//! thread without sockets. `cargo bench -p node`. Each benchmark counts the steps of one kind of core only.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use client::mirror::{self, Mirror, MirrorConfig, MirrorOp, OpOutcome, ReplicaDef};
use criterion::{Criterion, criterion_group, criterion_main};
use node::replica::layout::Layout;
use node::replica::{Config, ConnId, Create, Input, Output, ReplicaCore, ReplicaIds};
use node::store::{MemFiles, MemPool};
use proto::frame::Reply;
use proto::id::*;
use uuid::Uuid;

const BLOCKS: u64 = 16_384;
const REPLICAS: usize = 3;
/// Milliseconds that pass with each request: so often do flushes and cleans come.
const STEP_MS: u64 = 1;
/// Requests between two ticks.
const TICK_EVERY: u64 = 25;

struct Replica {
    core: ReplicaCore,
    files: Arc<MemFiles>,
    outputs: Vec<Output>,
}

impl Replica {
    fn new(number: usize) -> Self {
        let replica = ReplicaId(Uuid::from_u128(100 + number as u128));
        let files = MemPool::default().open(replica, true).expect("it is made");
        files.size(&Layout::new(BLOCKS), true);
        let ids = ReplicaIds {
            cluster: ClusterId(Uuid::from_u128(1)),
            volume: VolumeId(Uuid::from_u128(2)),
            mirror: MirrorId(Uuid::from_u128(3)),
            replica,
        };
        let incarnation = Incarnation(7 + number as u64);
        let config = Config { ids, blocks: BLOCKS, incarnation, era: files.era(), map_cache_pages: 4096 };
        let mut outputs = Vec::new();
        let core = ReplicaCore::create(config, Create::Clean, &mut outputs);
        let mut own = Self { core, files, outputs };
        own.settle(0, &mut Duration::default(), &mut Vec::new());
        own
    }

    /// Does what the core asks for until it asks for nothing more.
    fn settle(&mut self, now: u64, spent: &mut Duration, replies: &mut Vec<(AttachId, u64, Reply)>) {
        while !self.outputs.is_empty() {
            for output in std::mem::take(&mut self.outputs) {
                match output {
                    Output::Disk { op, io } => {
                        let result = self.files.execute(&io);
                        let began = Instant::now();
                        self.core.step(now, Input::DiskDone { op, result }, &mut self.outputs);
                        *spent += began.elapsed();
                    }
                    Output::Reply { tag, attach, reply, .. } => replies.push((attach, tag, reply)),
                    Output::OpenFailed(error) => panic!("{error}"),
                    Output::Faulted(reason) => panic!("{reason}"),
                    _ => {}
                }
            }
        }
    }

    fn step(&mut self, now: u64, input: Input, spent: &mut Duration, replies: &mut Vec<(AttachId, u64, Reply)>) {
        let began = Instant::now();
        self.core.step(now, input, &mut self.outputs);
        *spent += began.elapsed();
        self.settle(now, spent, replies);
    }
}

/// What the steps of each kind of core took.
#[derive(Default)]
struct Spent {
    mirror: Duration,
    replicas: Duration,
}

struct Lab {
    mirror: Mirror,
    replicas: Vec<Replica>,
    outputs: Vec<mirror::Output>,
    now: u64,
    next: u64,
    spent: Spent,
}

impl Lab {
    fn new() -> Self {
        let replicas: Vec<Replica> = (0..REPLICAS).map(Replica::new).collect();
        let id = |replica: &Replica| replica.core.config().ids.replica;
        let defs = replicas.iter().enumerate().map(|(slot, replica)| ReplicaDef {
            replica: id(replica),
            node: NodeId(slot as u64 + 1),
            data_addr: String::new(),
        });
        let config = MirrorConfig {
            mirror: MirrorId(Uuid::from_u128(3)),
            epoch: Epoch(1),
            blocks: BLOCKS,
            chunk_blocks: 64,
            replicas: defs.collect(),
            version: SetVersion(1),
            members: replicas.iter().map(id).collect(),
            awaited: Vec::new(),
            min_in_sync: 1,
            write_cache: true,
            old_lease_until: 0,
            hash_seed: [5; 32],
        };
        let mirror = Mirror::new(0, config);
        let mut lab = Self { mirror, replicas, outputs: Vec::new(), now: 0, next: 1, spent: Spent::default() };
        for slot in 0..REPLICAS {
            lab.step(mirror::Input::LinkUp { slot });
        }
        for _ in 0..1000 {
            lab.now += mirror::TICK_MS;
            lab.step(mirror::Input::Tick);
            if lab.mirror.is_serving() && lab.mirror.is_settled() {
                return lab;
            }
        }
        panic!("the mirror does not serve: {:?}", lab.mirror.status());
    }

    /// One input, and everything that follows from it; how many requests ended.
    fn step(&mut self, input: mirror::Input) -> usize {
        let began = Instant::now();
        self.mirror.step(self.now, input, &mut self.outputs);
        self.spent.mirror += began.elapsed();
        let (mut ended, mut replies) = (0, Vec::new());
        while !self.outputs.is_empty() {
            for output in std::mem::take(&mut self.outputs) {
                match output {
                    mirror::Output::Send { slot, attach, tag, request } => {
                        let input = Input::Request { conn: ConnId(1), channel: 0, tag, attach, request };
                        self.replicas[slot].step(self.now, input, &mut self.spent.replicas, &mut replies);
                        for (attach, tag, reply) in replies.drain(..) {
                            let began = Instant::now();
                            let input = mirror::Input::Reply { slot, tag, attach, reply };
                            self.mirror.step(self.now, input, &mut self.outputs);
                            self.spent.mirror += began.elapsed();
                        }
                    }
                    mirror::Output::Complete { outcome, .. } => {
                        assert!(matches!(outcome, OpOutcome::Done | OpOutcome::Data(_)), "{outcome:?}");
                        ended += 1;
                    }
                    mirror::Output::Stop(reason) => panic!("{reason}"),
                    _ => {}
                }
            }
        }
        ended
    }

    /// One request from its arrival to its end.
    fn request(&mut self, op: MirrorOp) {
        let id = self.next;
        self.next += 1;
        self.now += STEP_MS;
        let mut ended = self.step(mirror::Input::Submit { id, op });
        if id.is_multiple_of(TICK_EVERY) {
            self.tick();
        }
        // A flush may have to end first.
        for _ in 0..100 {
            if ended > 0 {
                return;
            }
            ended += self.tick();
        }
        panic!("request {id} does not end");
    }

    fn tick(&mut self) -> usize {
        self.now += mirror::TICK_MS;
        let mut ignored = Vec::new();
        for replica in &mut self.replicas {
            replica.step(self.now, Input::Heard { conn: ConnId(1) }, &mut self.spent.replicas, &mut ignored);
            replica.step(self.now, Input::Tick, &mut self.spent.replicas, &mut ignored);
        }
        assert!(ignored.is_empty(), "an answer that comes by itself: {ignored:?}");
        self.step(mirror::Input::Tick)
    }
}

fn somewhere(n: u64, count: u64) -> BlockIndex {
    BlockIndex(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (BLOCKS / count) * count)
}

fn cores(c: &mut Criterion) {
    type Cost = fn(&Spent) -> Duration;
    let kinds: [(&str, Cost); 2] = [("mirror", |spent| spent.mirror), ("3 replicas", |spent| spent.replicas)];
    for (kind, cost) in kinds {
        let mut group = c.benchmark_group(kind);
        let data = |blocks: usize| Bytes::from(vec![9u8; blocks * 4096]);
        let (one, sixteen) = (data(1), data(16));
        let mut lab = Lab::new();
        let fill = data(256);
        for block in (0..BLOCKS).step_by(256) {
            lab.request(MirrorOp::Write { block: BlockIndex(block), data: fill.clone(), fua: false });
        }
        let mut run = |name: &str, op: &dyn Fn(u64) -> MirrorOp| {
            group.bench_function(name, |b| {
                b.iter_custom(|times| {
                    lab.spent = Spent::default();
                    for n in 0..times {
                        let op = op(n);
                        lab.request(op);
                    }
                    cost(&lab.spent)
                });
            });
        };
        run("write 4 KiB", &|n| MirrorOp::Write { block: somewhere(n, 1), data: one.clone(), fua: false });
        run("write 64 KiB", &|n| MirrorOp::Write { block: somewhere(n, 16), data: sixteen.clone(), fua: false });
        run("read 4 KiB", &|n| MirrorOp::Read { block: somewhere(n, 1), count: 1 });
        run("read 64 KiB", &|n| MirrorOp::Read { block: somewhere(n, 16), count: 16 });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500));
    targets = cores
}
criterion_main!(benches);
