//! The core's state, and the way of a request through it.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use proto::frame::{Code, Kind, Reply, Request};
use proto::id::{AttachId, BlockIndex};
use proto::limits::{MAX_ATTACH_IN_FLIGHT, MAX_REPLICAS};

use super::attach::AttachState;
use super::dirty_log::{MetaPasses, PassWrite, Regions};
use super::flush::FlushState;
use super::interface::{
    CloseReason, Config, ConnId, DiskData, DiskError, DiskIo, FaultReason, FileKind, Input, OpId, Output,
};
use super::io::{ReadOp, WriteOp, ZeroOp};
use super::journal::Journal;
use super::layout::Layout;
use super::map::MapCache;
use super::open::Opening;
use super::repair::{CopyOp, HashOp, MAX_COPIES_OUT, RepairState, RestampOp};
use super::superblock::Superblock;

/// Copies from peers that one replica works on at a time; one more is answered `Busy`.
pub(super) const MAX_INCOMING_COPIES: usize = (MAX_REPLICAS - 1) * MAX_COPIES_OUT;

/// A hash map over our own consecutive numbers; nothing ever depends on its order.
pub(super) type ById<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// Spreads small integers; not for keys that an adversary chooses.
#[derive(Default, Clone, Copy)]
pub(super) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }
    fn write_u32(&mut self, n: u32) {
        self.write_u64(n.into());
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

/// One replica. See [`super`].
pub struct ReplicaCore {
    pub(super) config: Config,
    pub(super) layout: Layout,
    pub(super) phase: Phase,
    /// Monotonic milliseconds; never falls.
    pub(super) now: u64,
    /// When the last request came, for giving memory back.
    pub(super) busy_at: u64,
    /// What the superblock says, or will once the running pass has ended.
    pub(super) superblock: Superblock,
    pub(super) regions: Regions,
    pub(super) passes: MetaPasses,
    pub(super) map: MapCache,
    pub(super) attach: AttachState,
    pub(super) flush: FlushState,
    pub(super) journal: Journal,
    pub(super) repair: RepairState,
    pub(super) ops: ById<u64, Op>,
    ios: ById<u64, Io>,
    /// Requests that may go on.
    pub(super) ready: VecDeque<u64>,
    next: u64,
}

/// Where a replica stands.
#[derive(Debug)]
pub(super) enum Phase {
    Opening(Box<Opening>),
    Open,
    /// It could not be opened.
    Unopened,
    Faulted,
}

/// Where a request came from and where its answer goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) conn: ConnId,
    pub(super) channel: u32,
    pub(super) tag: u64,
    pub(super) attach: AttachId,
}

/// The regions that a request counts as in flight in (R6).
#[derive(Debug)]
pub(super) enum Changing {
    Nothing,
    Span(u32, u32),
    List(Vec<u32>),
}

impl Changing {
    fn regions(self) -> impl Iterator<Item = u32> {
        let (span, list) = match self {
            Self::Nothing => (None, Vec::new()),
            Self::Span(first, last) => (Some(first..=last), Vec::new()),
            Self::List(list) => (None, list),
        };
        span.into_iter().flatten().chain(list)
    }
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) from: Origin,
    pub(super) kind: Kind,
    /// Disk operations in flight.
    pub(super) ios: u32,
    /// Its attach has ended and it has been answered: it only waits for its disk operations.
    pub(super) ended: bool,
    pub(super) changing: Changing,
    /// It gave the disk, or the map, a change.
    pub(super) touched: bool,
    /// Map pages that may not leave the memory, first and last.
    pub(super) pinned: Option<(u64, u64)>,
    /// It holds one of the places for repair work.
    pub(super) repairing: bool,
    pub(super) body: Body,
}

#[derive(Debug)]
pub(super) enum Body {
    Write(WriteOp),
    Read(ReadOp),
    Zero(ZeroOp),
    /// Waits for a flush pass.
    Flush,
    /// Waits for a metadata pass; `cleaned`: the regions that it clears.
    Meta {
        cleaned: Vec<u32>,
    },
    Hash(HashOp),
    Copy(CopyOp),
    Restamp(RestampOp),
}

/// What a disk operation is for.
#[derive(Debug)]
pub(super) enum Io {
    Open(u32),
    Op { op: u64, piece: u32 },
    PassWrite(PassWrite),
    PassSync,
    MapLoad { page: u64 },
    MapWrite { first: u64, count: u64, flush: bool },
    Sweep { page: u64, at: u64, count: u64 },
    FlushSync(FileKind),
    Journal,
}

impl ReplicaCore {
    pub(super) fn new(config: Config, superblock: Superblock, opening: Opening) -> Self {
        let layout = Layout::new(config.blocks);
        assert!(config.blocks > 0, "a replica has blocks");
        Self {
            config,
            layout,
            phase: Phase::Opening(Box::new(opening)),
            now: 0,
            busy_at: 0,
            superblock,
            regions: Regions::new(&layout),
            passes: MetaPasses::default(),
            map: MapCache::new(config.map_cache_pages, layout.map_pages),
            attach: AttachState::default(),
            flush: FlushState::default(),
            journal: Journal::default(),
            repair: RepairState::default(),
            ops: ById::default(),
            ios: ById::default(),
            ready: VecDeque::new(),
            next: 1,
        }
    }

    /// Whose replica this is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether no disk operation is outstanding.
    pub fn is_quiet(&self) -> bool {
        self.ios.is_empty()
    }

    /// Dirty and suspect regions.
    pub fn dirty_regions(&self) -> (u64, u64) {
        (self.regions.dirty.ones(), self.regions.suspect.ones())
    }

    /// The attach that may use the replica.
    pub fn current_attach(&self) -> Option<AttachId> {
        self.attach.current.as_ref().map(|c| c.id)
    }

    /// Bounds the map pages in memory anew; takes effect as pages come and go.
    pub fn set_cache_limit(&mut self, pages: usize) {
        self.map.set_limit(pages);
    }

    /// Takes one input at a time; what is to be done is appended to `out`. `now_ms` is of a monotonic clock.
    pub fn step(&mut self, now_ms: u64, input: Input, out: &mut Vec<Output>) {
        self.now = self.now.max(now_ms);
        self.end_attach_when_lease_is_over(out);
        match input {
            Input::Request { conn, channel, tag, attach, request } => {
                self.request(Origin { conn, channel, tag, attach }, request, out);
            }
            Input::Heard { conn } => self.heard(conn),
            Input::ConnectionLost { conn } => self.connection_lost(conn, out),
            Input::DiskDone { op, result } => self.disk_done(op, result, out),
            Input::CopySent { token, result } => self.copy_sent(token, result, out),
            Input::Tick => self.trim_map(out),
        }
        self.settle_down(out);
    }

    /// Lets everything go on that can.
    fn settle_down(&mut self, out: &mut Vec<Output>) {
        loop {
            while let Some(id) = self.ready.pop_front() {
                self.advance(id, out);
            }
            if !self.is_open() {
                return;
            }
            self.make_room(out);
            self.start_journal_write(out);
            self.start_flush_pass(out);
            self.start_meta_pass(out);
            self.continue_attach(out);
            self.finish_detach(out);
            if self.ready.is_empty() && !self.passes.can_start() {
                return;
            }
        }
    }

    fn request(&mut self, from: Origin, request: Request, out: &mut Vec<Output>) {
        let kind = request.kind();
        match self.phase {
            Phase::Opening(_) => return self.refuse(from, kind, Code::Busy, 0, out),
            Phase::Unopened | Phase::Faulted => return self.refuse(from, kind, Code::Faulted, 0, out),
            Phase::Open => {}
        }
        self.busy_at = self.now;
        self.heard(from.conn);
        match request {
            Request::Attach { replica, mirror, lease_ms, .. } => {
                return self.take_attach(from, replica, mirror, lease_ms, out);
            }
            Request::Ping => return out.push(reply(from, Reply::Done(Kind::Ping))),
            Request::Hello { .. } => return self.refuse(from, kind, Code::Invalid, 0, out),
            Request::CopyWrite { replica, .. } => {
                if let Err((code, block)) = self.check_copy(from, replica) {
                    return self.refuse(from, kind, code, block, out);
                }
                if self.attach.copies >= MAX_INCOMING_COPIES {
                    return self.refuse(from, kind, Code::Busy, 0, out);
                }
                self.attach.copies += 1;
            }
            _ => {
                if let Err((code, block)) = self.check_attach(from) {
                    return self.refuse(from, kind, code, block, out);
                }
                if self.attach.requests >= MAX_ATTACH_IN_FLIGHT {
                    let reason = CloseReason::TooManyRequests { limit: MAX_ATTACH_IN_FLIGHT };
                    out.push(Output::CloseConnection { conn: from.conn, reason });
                    return self.connection_lost(from.conn, out);
                }
                if let Request::Detach = request {
                    return self.detach(from.tag);
                }
                self.attach.requests += 1;
            }
        }
        let op = |body| Op {
            from,
            kind,
            ios: 0,
            ended: false,
            changing: Changing::Nothing,
            touched: false,
            pinned: None,
            repairing: false,
            body,
        };
        let id = self.number();
        match request {
            Request::Read { block, count } => self.read(id, op(Body::Read(ReadOp::new(block, count))), out),
            Request::Write { block, fua, sums, data } => {
                self.write(id, op(Body::Write(WriteOp::new(block, fua, sums, data))), out);
            }
            Request::CopyWrite { block, count, sums, data, .. } if sums.is_empty() && data.is_empty() => {
                self.zero(id, op(Body::Zero(ZeroOp::new(block, count, false))), out);
            }
            Request::CopyWrite { block, sums, data, .. } => {
                self.write(id, op(Body::Write(WriteOp::new(block, false, sums, data))), out);
            }
            Request::WriteZeroes { block, count, fua } => {
                self.zero(id, op(Body::Zero(ZeroOp::new(block, count, fua))), out);
            }
            Request::Discard { block, count } => {
                self.zero(id, op(Body::Zero(ZeroOp::new(block, count, false))), out);
            }
            Request::Flush { flush } => self.flush_request(id, op(Body::Flush), flush, out),
            Request::ListRegions { first, count } => {
                let reply = self.list_regions(first, count);
                self.finish(op(Body::Flush), reply, out);
            }
            Request::Clean { clean, entries } => {
                self.clean(id, op(Body::Meta { cleaned: Vec::new() }), clean, &entries, out);
            }
            Request::Settle { entries } => {
                self.settle(&entries);
                self.finish(op(Body::Flush), Reply::Done(kind), out);
            }
            Request::MarkAllDirty => self.mark_all_dirty(id, op(Body::Meta { cleaned: Vec::new() })),
            Request::StoreSet { set, accounted } => {
                self.store_set(id, op(Body::Meta { cleaned: Vec::new() }), set, accounted, out);
            }
            Request::Hashes { block, count, key } => {
                self.repair_request(id, op(Body::Hash(HashOp::new(block, count, key))), out);
            }
            Request::CopyTo { block, blocks, target } => {
                self.repair_request(id, op(Body::Copy(CopyOp::new(block, blocks, target))), out);
            }
            Request::Restamp { block, blocks } => {
                self.repair_request(id, op(Body::Restamp(RestampOp::new(block, blocks, false))), out);
            }
            Request::Distrust { block, blocks } => {
                self.repair_request(id, op(Body::Restamp(RestampOp::new(block, blocks, true))), out);
            }
            Request::Hello { .. } | Request::Attach { .. } | Request::Ping | Request::Detach => {
                unreachable!("answered above")
            }
        }
    }

    /// Takes an op that waited on.
    fn advance(&mut self, id: u64, out: &mut Vec<Output>) {
        let Some(op) = self.ops.remove(&id) else { return };
        if op.ended {
            self.ops.insert(id, op);
            return;
        }
        match &op.body {
            Body::Write(_) => self.advance_write(id, op, out),
            Body::Read(_) => self.advance_read(id, op, out),
            Body::Zero(_) => self.advance_zero(id, op, out),
            Body::Hash(_) | Body::Copy(_) | Body::Restamp(_) => self.advance_repair(id, op, out),
            Body::Flush | Body::Meta { .. } => unreachable!("passes answer these themselves"),
        }
    }

    fn disk_done(&mut self, op: OpId, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        let io = self.ios.remove(&op.0).unwrap_or_else(|| panic!("unknown disk operation {op:?} ended"));
        if let Phase::Faulted | Phase::Unopened = self.phase {
            return;
        }
        match io {
            Io::Open(piece) => self.opening_done(piece, result, out),
            Io::Op { op: id, piece } => self.op_done(id, piece, result, out),
            Io::PassWrite(write) => self.pass_write_done(write, result, out),
            Io::PassSync => self.pass_sync_done(result, out),
            Io::MapLoad { page } => self.map_loaded(page, result, out),
            Io::MapWrite { first, count, flush } => self.map_written(first, count, flush, result, out),
            Io::Sweep { page, at, count } => self.swept(page, at, count, result.is_err(), out),
            Io::Journal => self.journal_written(result, out),
            Io::FlushSync(file) => self.flush_synced(file, result, out),
        }
    }

    fn op_done(&mut self, id: u64, piece: u32, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        let mut op = self.ops.remove(&id).expect("a request outlives its disk operations");
        assert!(op.ios > 0, "more disk operations ended than were begun");
        op.ios -= 1;
        match &op.body {
            Body::Write(_) => self.write_done(id, op, piece, result, out),
            Body::Read(_) => self.read_done(op, result, out),
            Body::Zero(_) => self.punch_done(id, op, piece, result, out),
            Body::Hash(_) | Body::Copy(_) | Body::Restamp(_) => self.repair_done(id, op, piece, result, out),
            Body::Flush | Body::Meta { .. } => unreachable!("has no disk operations of its own"),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn disk(&mut self, io: Io, what: DiskIo, out: &mut Vec<Output>) {
        let op = self.number();
        self.ios.insert(op, io);
        out.push(Output::Disk { op: OpId(op), io: what });
    }

    /// Whether `count` blocks from `block` lie inside the replica, and are at least one.
    pub(super) fn in_range(&self, block: BlockIndex, count: u64) -> bool {
        count > 0 && block.0.checked_add(count).is_some_and(|end| end <= self.layout.blocks)
    }

    pub(super) fn refuse(&self, from: Origin, kind: Kind, code: Code, block: u64, out: &mut Vec<Output>) {
        out.push(reply(from, Reply::Failed { kind, code, block }));
    }

    /// Answers a request with a code and forgets it.
    pub(super) fn fail(&mut self, op: Op, code: Code, block: u64, out: &mut Vec<Output>) {
        let kind = op.kind;
        self.finish(op, Reply::Failed { kind, code, block }, out);
    }

    /// Answers a request, unless its attach has ended, and forgets it.
    pub(super) fn finish(&mut self, mut op: Op, answer: Reply, out: &mut Vec<Output>) {
        assert_eq!(op.ios, 0, "{:?} answered with disk operations in flight", op.kind);
        if !op.ended {
            out.push(reply(op.from, answer));
        }
        self.release(&mut op);
    }

    /// Gives back what a request holds.
    pub(super) fn release(&mut self, op: &mut Op) {
        self.end_changes(op);
        if let Some((first, last)) = op.pinned.take() {
            (first..=last).for_each(|page| self.map.unpin(page));
        }
        if std::mem::take(&mut op.repairing) {
            self.repair_place_free();
        }
        if !op.ended {
            op.ended = true;
            let count = if op.kind == Kind::CopyWrite { &mut self.attach.copies } else { &mut self.attach.requests };
            *count = count.checked_sub(1).expect("requests in flight are counted");
        }
    }

    /// The request changes its regions no more (R6).
    pub(super) fn end_changes(&mut self, op: &mut Op) {
        let changing = std::mem::replace(&mut op.changing, Changing::Nothing);
        for region in changing.regions() {
            self.regions.end_change(region, op.touched, self.flush.begun);
        }
    }

    /// The replica no longer knows what it holds: everything is refused from here on (R2: never flush again and
    /// hope).
    pub(super) fn fault(&mut self, reason: FaultReason, out: &mut Vec<Output>) {
        if !self.is_open() {
            return;
        }
        self.phase = Phase::Faulted;
        let mut ids: Vec<u64> = self.ops.keys().copied().collect();
        ids.sort_unstable();
        let ops: Vec<Op> = ids.iter().filter_map(|id| self.ops.remove(id)).filter(|op| !op.ended).collect();
        for op in ops {
            let code = if op.kind == Kind::Flush { Code::FlushFailed } else { Code::Faulted };
            self.refuse(op.from, op.kind, code, 0, out);
        }
        self.ready.clear();
        if let Some(taking) = self.attach.taking.take() {
            self.refuse(taking.from, Kind::Attach, Code::Faulted, 0, out);
        }
        self.attach.current = None;
        out.push(Output::Faulted(reason));
    }
}

pub(super) fn reply(from: Origin, reply: Reply) -> Output {
    let Origin { conn, channel, tag, attach } = from;
    Output::Reply { conn, channel, tag, attach, reply }
}
