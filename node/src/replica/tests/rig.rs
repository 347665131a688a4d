//! A core, its disk, and somebody who sends requests.

use std::collections::BTreeMap;

use bytes::Bytes;
use proto::frame::{Code, Reply, Request, SetView, block_sums};
use proto::id::*;
use uuid::Uuid;

use super::super::layout::Layout;
use super::super::*;

/// Seven regions, the last one not whole: three map pages.
pub const BLOCKS: u64 = 7 * 256 - 64;
pub const B: usize = 4096;

/// splitmix64: the same numbers from the same seed, everywhere.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Debug)]
struct Change {
    offset: usize,
    /// `None`: a punch.
    bytes: Option<Bytes>,
    len: usize,
    ended: bool,
    op: OpId,
    /// The syncs that began after it had ended.
    syncs: Vec<OpId>,
}

impl Change {
    fn apply(&self, to: &mut [u8], from: usize, len: usize) {
        let at = self.offset + from;
        match &self.bytes {
            Some(bytes) => to[at..at + len].copy_from_slice(&bytes[from..from + len]),
            None => to[at..at + len].fill(0),
        }
    }
}

#[derive(Clone, Debug)]
pub struct SimFile {
    /// What a crash leaves for certain.
    pub durable: Vec<u8>,
    /// What reads see.
    pub current: Vec<u8>,
    unsynced: Vec<Change>,
}

impl SimFile {
    fn new(len: u64) -> Self {
        Self { durable: vec![0; len as usize], current: vec![0; len as usize], unsynced: Vec::new() }
    }
    /// Each page of each un-synced write is lost, kept or torn.
    fn crash(&mut self, rng: &mut Rng) {
        for change in std::mem::take(&mut self.unsynced) {
            for from in (0..change.len).step_by(B) {
                match rng.below(4) {
                    0 | 1 => change.apply(&mut self.durable, from, B),
                    2 => {}
                    _ => change.apply(&mut self.durable, from, 512 * (1 + rng.below(7) as usize)),
                }
            }
        }
        self.current = self.durable.clone();
    }
    /// What has not ended never happens.
    pub fn forget_unfinished(&mut self) {
        self.unsynced.retain(|c| c.ended);
    }
    /// The process dies, the page cache lives on.
    fn keep(&mut self) {
        for change in self.unsynced.iter_mut().filter(|c| !c.ended) {
            change.apply(&mut self.current, 0, change.len);
            change.ended = true;
        }
    }
}

/// Decides which operations fail.
pub type Fault = Box<dyn Fn(&DiskIo) -> Option<DiskError>>;

pub struct Rig {
    pub core: ReplicaCore,
    pub data: SimFile,
    pub meta: SimFile,
    pub now: u64,
    /// Disk operations that have not ended.
    pub queue: Vec<(OpId, DiskIo)>,
    pub replies: BTreeMap<u64, Reply>,
    pub sent: Vec<(CopyToken, Request)>,
    pub closed: Vec<ConnId>,
    pub faulted: Option<FaultReason>,
    pub opened: Option<Result<OpenReport, OpenError>>,
    pub notices: Vec<Notice>,
    /// Answers disk operations with an error.
    pub fail: Fault,
    pub trace: Vec<DiskIo>,
    next_tag: u64,
    pub attach: AttachId,
    pub conn: ConnId,
    incarnation: u64,
    /// Counts the power cuts.
    pub era: u8,
    /// Map pages in memory after the next opening.
    pub cache_pages: usize,
}

pub fn ids() -> ReplicaIds {
    ReplicaIds {
        cluster: ClusterId(Uuid::from_u128(1)),
        volume: VolumeId(Uuid::from_u128(2)),
        mirror: MirrorId(Uuid::from_u128(3)),
        replica: ReplicaId(Uuid::from_u128(4)),
    }
}

pub fn config(incarnation: u64) -> Config {
    Config { ids: ids(), blocks: BLOCKS, incarnation: Incarnation(incarnation), era: [1; 16], map_cache_pages: 64 }
}

pub fn attach_id(epoch: u64, attach: u64) -> AttachId {
    AttachId { epoch: Epoch(epoch), attach: AttachNo(attach) }
}

/// Blocks whose bytes tell `seed` and their number.
pub fn pattern(block: u64, count: u64, seed: u64) -> Bytes {
    let mut bytes = Vec::with_capacity(count as usize * B);
    for b in block..block + count {
        let mut rng = Rng(seed << 32 | b);
        for _ in 0..B / 8 {
            bytes.extend_from_slice(&rng.next().to_le_bytes());
        }
    }
    bytes.into()
}

pub fn write(block: u64, count: u64, seed: u64) -> Request {
    let data = pattern(block, count, seed);
    Request::Write { block: BlockIndex(block), fua: false, sums: block_sums(&data), data }
}

/// A write to the allocation journal.
pub fn is_journal(io: &DiskIo) -> bool {
    let layout = Layout::new(BLOCKS);
    matches!(io, DiskIo::Write { file: FileKind::Meta, offset, .. }
        if (layout.journal(0)..layout.dirty(0)).contains(offset))
}

pub fn read(block: u64, count: u32) -> Request {
    Request::Read { block: BlockIndex(block), count }
}

pub fn failed(reply: &Reply) -> Code {
    match reply {
        Reply::Failed { code, .. } => *code,
        other => panic!("expected a failure, got {other:?}"),
    }
}

impl Rig {
    pub fn create(create: Create) -> Self {
        let layout = Layout::new(BLOCKS);
        let mut out = Vec::new();
        let core = ReplicaCore::create(config(1), create, &mut out);
        let mut rig = Self {
            core,
            data: SimFile::new(layout.data_len()),
            meta: SimFile::new(layout.meta_len()),
            now: 0,
            queue: Vec::new(),
            replies: BTreeMap::new(),
            sent: Vec::new(),
            closed: Vec::new(),
            faulted: None,
            opened: None,
            notices: Vec::new(),
            fail: Box::new(|_| None),
            trace: Vec::new(),
            next_tag: 0,
            attach: attach_id(0, 0),
            conn: ConnId(1),
            incarnation: 1,
            era: 1,
            cache_pages: 64,
        };
        rig.take(out);
        rig.run();
        assert!(matches!(rig.opened, Some(Ok(_))), "{:?}", rig.opened);
        rig
    }

    /// A new replica with an attach.
    pub fn attached() -> Self {
        let mut rig = Self::create(Create::Clean);
        rig.attach(1, 1);
        rig
    }

    pub fn reopen(&mut self) -> &Result<OpenReport, OpenError> {
        self.queue.clear();
        self.incarnation += 1;
        self.faulted = None;
        self.opened = None;
        let mut out = Vec::new();
        let lengths = FileLengths { data: self.data.current.len() as u64, meta: self.meta.current.len() as u64 };
        let config = Config { map_cache_pages: self.cache_pages, era: [self.era; 16], ..config(self.incarnation) };
        self.core = ReplicaCore::open(config, lengths, &mut out);
        self.take(out);
        self.run();
        self.opened.as_ref().expect("opening ends")
    }

    /// Power is cut; the replica is opened again.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        self.data.crash(rng);
        self.meta.crash(rng);
        self.era += 1;
        self.reopen();
    }

    /// The process is killed; the page cache keeps what it was given.
    pub fn kill(&mut self) {
        self.data.keep();
        self.meta.keep();
        self.reopen();
    }

    /// Power is cut when everything that was written, and not synced, happens to be on the disk.
    pub fn power_cut_that_kept_everything(&mut self) {
        self.era += 1;
        self.kill();
    }

    pub fn step(&mut self, input: Input) {
        let mut out = Vec::new();
        self.core.step(self.now, input, &mut out);
        self.take(out);
    }

    fn file(&mut self, file: FileKind) -> &mut SimFile {
        match file {
            FileKind::Data => &mut self.data,
            FileKind::Meta => &mut self.meta,
        }
    }

    fn take(&mut self, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Reply { tag, reply, .. } => {
                    assert!(self.replies.insert(tag, reply).is_none(), "request {tag} answered twice");
                }
                Output::Disk { op, io } => {
                    self.check_dirty_before_data(&io);
                    self.check_data_before_allocation(&io);
                    self.trace.push(io.clone());
                    match &io {
                        DiskIo::Write { file, offset, bytes } => {
                            let (offset, len) = (*offset as usize, bytes.len());
                            let change =
                                Change { offset, bytes: Some(bytes.clone()), len, ended: false, op, syncs: Vec::new() };
                            self.file(*file).unsynced.push(change);
                        }
                        DiskIo::Punch { offset, len } => {
                            let (offset, len) = (*offset as usize, *len as usize);
                            self.data.unsynced.push(Change {
                                offset,
                                bytes: None,
                                len,
                                ended: false,
                                op,
                                syncs: Vec::new(),
                            });
                        }
                        DiskIo::Sync { file, map } => {
                            let map_at = Layout::new(BLOCKS).map(0) as usize;
                            let covered = |c: &Change| *file == FileKind::Data || *map || c.offset < map_at;
                            for change in self.file(*file).unsynced.iter_mut().filter(|c| c.ended && covered(c)) {
                                change.syncs.push(op);
                            }
                        }
                        DiskIo::Read { .. } => {}
                    }
                    self.queue.push((op, io));
                }
                Output::SendCopy { token, request, .. } => self.sent.push((token, request)),
                Output::CloseConnection { conn, .. } => self.closed.push(conn),
                Output::Opened(report) => self.opened = Some(Ok(report)),
                Output::OpenFailed(error) => self.opened = Some(Err(error)),
                Output::Faulted(reason) => self.faulted = Some(reason),
                Output::Notice(notice) => self.notices.push(notice),
            }
        }
    }

    /// R5, whatever a test is about: nothing changes the data file in a region that isn't durably dirty.
    fn check_dirty_before_data(&self, io: &DiskIo) {
        let (offset, len) = match io {
            DiskIo::Write { file: FileKind::Data, offset, bytes } => (*offset, bytes.len() as u64),
            DiskIo::Punch { offset, len } => (*offset, *len),
            _ => return,
        };
        let at = Layout::new(BLOCKS).dirty(0) as usize;
        let page = &self.meta.durable[at..at + B];
        // A bad page counts as all dirty.
        let Some(mut words) = layout::decode_bitmap(page, layout::PageKind::Dirty, 0, ids().replica) else { return };
        let word = words.next().expect("a page has words");
        for region in offset >> 20..=(offset + len - 1) >> 20 {
            assert!(word & (1 << region) != 0, "R5: region {region} is not durably dirty: {io:?}");
        }
    }

    /// R10, whatever a test is about: a map page that allocates a block is written when the block's data is durable.
    fn check_data_before_allocation(&self, io: &DiskIo) {
        let layout = Layout::new(BLOCKS);
        let DiskIo::Write { file: FileKind::Meta, offset, bytes } = io else { return };
        let Some(first) = offset.checked_sub(layout.map(0)).map(|at| at / B as u64) else { return };
        for (page, new) in (first..).zip(bytes.chunks_exact(B)) {
            let (new, bad) = layout::decode_map(new, page, ids().replica);
            let at = layout.map(page) as usize;
            let (old, was_bad) = layout::decode_map(&self.meta.current[at..at + B], page, ids().replica);
            assert!((0..3).all(|r| !bad[r] || was_bad[r]), "what is bad was so");
            let verified = |map: &layout::MapPage, i| map.is_allocated(i) && !map.is_unverified(i);
            for i in (0..768).filter(|i| verified(&new, *i) && !verified(&old, *i)) {
                let at = (page as usize * 768 + i) * B;
                let sum = proto::frame::block_sum(&self.data.durable[at..at + B]);
                assert_eq!(sum, new.sums[i], "R10: block {i} of map page {page} is allocated before its data");
            }
        }
    }

    /// Ends the disk operation at `at` of the queue.
    pub fn end_one(&mut self, at: usize) {
        let (op, io) = self.queue.remove(at);
        let result = match (self.fail)(&io) {
            Some(error) => Err(error),
            None => Ok(self.carry_out(op, &io)),
        };
        self.step(Input::DiskDone { op, result });
    }

    fn carry_out(&mut self, op: OpId, io: &DiskIo) -> DiskData {
        match io {
            DiskIo::Read { file, offset, len } => {
                let at = *offset as usize;
                return DiskData::Read(self.file(*file).current[at..at + *len as usize].to_vec());
            }
            DiskIo::Write { file, offset, bytes } => {
                let file = self.file(*file);
                let at = *offset as usize;
                file.current[at..at + bytes.len()].copy_from_slice(bytes);
                file.unsynced.iter_mut().find(|c| c.op == op).expect("was begun").ended = true;
            }
            DiskIo::Punch { offset, len } => {
                let (at, len) = (*offset as usize, *len as usize);
                self.data.current[at..at + len].fill(0);
                self.data.unsynced.iter_mut().find(|c| c.op == op).expect("was begun").ended = true;
            }
            DiskIo::Sync { file, .. } => {
                // What had ended when the sync began is durable now; the rest may be lost yet.
                let file = self.file(*file);
                for change in file.unsynced.extract_if(.., |c| c.syncs.contains(&op)) {
                    change.apply(&mut file.durable, 0, change.len);
                }
            }
        }
        DiskData::None
    }

    /// Ends disk operations in order until there is none.
    pub fn run(&mut self) {
        while !self.queue.is_empty() {
            self.end_one(0);
        }
    }

    /// Ends every disk operation that `wanted` names, and what follows from them, until none is left.
    pub fn run_only(&mut self, wanted: impl Fn(&DiskIo) -> bool) {
        while let Some(at) = self.queue.iter().position(|(_, io)| wanted(io)) {
            self.end_one(at);
        }
    }

    pub fn send_as(&mut self, conn: ConnId, attach: AttachId, request: Request) -> u64 {
        self.next_tag += 1;
        let tag = self.next_tag;
        self.step(Input::Request { conn, channel: 0, tag, attach, request });
        tag
    }

    pub fn send(&mut self, request: Request) -> u64 {
        self.send_as(self.conn, self.attach, request)
    }

    pub fn reply(&self, tag: u64) -> Option<&Reply> {
        self.replies.get(&tag)
    }

    /// Sends a request, runs the disk, and takes the answer.
    pub fn ask(&mut self, request: Request) -> Reply {
        let tag = self.send(request);
        self.run();
        self.replies.remove(&tag).expect("answered once the disk is quiet")
    }

    pub fn done(&mut self, request: Request) {
        let kind = request.kind();
        assert_eq!(self.ask(request), Reply::Done(kind));
    }

    pub fn attach_request() -> Request {
        Request::Attach { replica: ids().replica, mirror: ids().mirror, lease_ms: 6000, set: SetView::default() }
    }

    /// Attaches, and makes that the attach of later requests.
    pub fn attach(&mut self, epoch: u64, attach: u64) -> proto::frame::AttachInfo {
        self.attach = attach_id(epoch, attach);
        match self.ask(Self::attach_request()) {
            Reply::Attached(info) => info,
            other => panic!("{other:?}"),
        }
    }

    pub fn flush(&mut self, n: u64) {
        self.done(Request::Flush { flush: FlushNo(n) });
    }

    /// The bytes of blocks, or the code.
    pub fn bytes(&mut self, block: u64, count: u32) -> Result<Bytes, Code> {
        match self.ask(read(block, count)) {
            Reply::Read { data, sums, .. } => {
                assert_eq!(block_sums(&data), sums, "sums are of the data");
                Ok(data)
            }
            Reply::Failed { code, .. } => Err(code),
            other => panic!("{other:?}"),
        }
    }

    /// (dirty, suspect, allocated) as bits.
    pub fn regions(&mut self) -> (u8, u8, u8) {
        match self.ask(Request::ListRegions { first: RegionIndex(0), count: 7 }) {
            Reply::Regions(w) => (w.dirty[0], w.suspect[0], w.allocated[0]),
            other => panic!("{other:?}"),
        }
    }

    pub fn clean(&mut self, clean: u64, regions: &[(u32, u64)]) {
        let entries = regions
            .iter()
            .map(|(r, f)| proto::frame::CleanEntry { region: RegionIndex(*r), flush: FlushNo(*f) })
            .collect();
        self.done(Request::Clean { clean: CleanNo(clean), entries });
    }
}
