//! A replica on files in memory: requests of a hostile peer, and meta files of a hostile disk.
//!
//! Both targets check, whatever came before, that a reply's data matches its sums. `meta` knows what it wrote: as long
//! as nothing forged a checksum, a block reads as what was written, or is refused; never as anything else (R10).

use std::cell::OnceCell;
use std::collections::BTreeMap;

use bytes::Bytes;
use node::replica::layout::{Layout, PAGE};
use node::replica::superblock::Superblock;
use node::replica::{
    Config, ConnId, CopyError, CopyToken, Create, DiskData, DiskError, DiskIo, FileKind, FileLengths, Input, OpId,
    OpenError, OpenReport, Output, ReplicaCore,
};
use proto::frame::{Code, Kind, Reply, Request, block_sums};
use proto::id::*;
use proto::limits::BLOCK_SIZE;

use super::frames::{self, MEND, attach, ids, set};
use super::source::{Seen, Source};
use crate::sim::rng::Rng;

/// Four regions, the last one short; two map pages.
const BLOCKS: u64 = 1000;
/// What replica, files and replies may hold together: replies of one attach are the most of it.
pub const MEMORY: usize = 64 << 20;
/// Disk operations of one input: a discard of everything, page by page, is far below.
const MAX_OPS: u32 = 200_000;

const B: usize = BLOCK_SIZE as usize;

/// Pages by number; zeroes where there is none.
#[derive(Clone, Debug, Default)]
struct Files {
    data: BTreeMap<u64, Bytes>,
    meta: BTreeMap<u64, Bytes>,
}

impl Files {
    fn file(&mut self, file: FileKind) -> &mut BTreeMap<u64, Bytes> {
        match file {
            FileKind::Data => &mut self.data,
            FileKind::Meta => &mut self.meta,
        }
    }

    fn carry_out(&mut self, io: &DiskIo) -> DiskData {
        let layout = Layout::new(BLOCKS);
        match io {
            DiskIo::Read { file, offset, len } => {
                let end = if *file == FileKind::Data { layout.data_len() } else { layout.meta_len() };
                assert!(offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE as u32) && *len > 0, "{io:?}");
                assert!(offset + u64::from(*len) <= end, "{io:?} past {end}");
                let mut bytes = vec![0; *len as usize];
                for (i, to) in (0..).zip(bytes.chunks_exact_mut(B)) {
                    if let Some(page) = self.file(*file).get(&(offset / PAGE + i)) {
                        to.copy_from_slice(page);
                    }
                }
                return DiskData::Read(bytes);
            }
            DiskIo::Write { file, offset, bytes } => {
                let end = if *file == FileKind::Data { layout.data_len() } else { layout.meta_len() };
                assert!(
                    offset.is_multiple_of(PAGE) && bytes.len().is_multiple_of(B) && !bytes.is_empty(),
                    "write at {offset}"
                );
                assert!(offset + bytes.len() as u64 <= end, "write of {} at {offset} past {end}", bytes.len());
                for i in 0..bytes.len() / B {
                    // A copy of its own: a slice would keep the whole of what it was cut from.
                    let page = Bytes::copy_from_slice(&bytes[i * B..(i + 1) * B]);
                    self.file(*file).insert(offset / PAGE + i as u64, page);
                }
            }
            DiskIo::Punch { offset, len } => {
                assert!(offset + len <= layout.data_len() && offset.is_multiple_of(PAGE), "{io:?}");
                let pages: Vec<u64> =
                    self.data.range(offset / PAGE..(offset + len) / PAGE).map(|(page, _)| *page).collect();
                pages.iter().for_each(|page| drop(self.data.remove(page)));
            }
            DiskIo::Sync { .. } => {}
        }
        DiskData::None
    }
}

struct Rig {
    core: ReplicaCore,
    files: Files,
    rng: Rng,
    /// Errors of the disk, in a thousand.
    errors: u64,
    now: u64,
    queue: Vec<(OpId, DiskIo)>,
    copies: Vec<CopyToken>,
    replies: Vec<((ConnId, u32, u64), Reply)>,
    closed: Vec<ConnId>,
    opened: Option<Result<OpenReport, OpenError>>,
    faulted: bool,
    ops: u32,
    tag: u64,
    attach: AttachId,
}

fn config(era: u8) -> Config {
    Config { ids: ids(), blocks: BLOCKS, incarnation: Incarnation(7), era: [era; 16], map_cache_pages: 1 }
}

impl Rig {
    fn new(core: ReplicaCore, files: Files, seed: u64, out: Vec<Output>) -> Self {
        let mut rig = Self {
            core,
            files,
            rng: Rng::new(seed),
            errors: 0,
            now: 1,
            queue: Vec::new(),
            copies: Vec::new(),
            replies: Vec::new(),
            closed: Vec::new(),
            opened: None,
            faulted: false,
            ops: 0,
            tag: 1 << 40,
            attach: attach(),
        };
        rig.take(out);
        rig.run();
        rig
    }

    fn create(create: Create) -> Self {
        let mut out = Vec::new();
        let core = ReplicaCore::create(config(1), create, &mut out);
        Self::new(core, Files::default(), 0, out)
    }

    fn open(files: Files, era: u8, seed: u64) -> Self {
        let layout = Layout::new(BLOCKS);
        let mut out = Vec::new();
        let lengths = FileLengths { data: layout.data_len(), meta: layout.meta_len() };
        let core = ReplicaCore::open(config(era), lengths, &mut out);
        Self::new(core, files, seed, out)
    }

    fn take(&mut self, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Reply { conn, channel, tag, reply, .. } => {
                    if let Reply::Read { sums, data, .. } = &reply {
                        assert_eq!(&block_sums(data), sums, "sums are of the data (R10)");
                    }
                    self.replies.push(((conn, channel, tag), reply));
                }
                Output::Disk { op, io } => self.queue.push((op, io)),
                Output::SendCopy { token, request, .. } => {
                    if let Request::CopyWrite { sums, data, .. } = &request {
                        assert_eq!(&block_sums(data), sums, "copies are of right blocks");
                    }
                    self.copies.push(token);
                }
                Output::CloseConnection { conn, .. } => self.closed.push(conn),
                Output::Opened(report) => self.opened = Some(Ok(report)),
                Output::OpenFailed(error) => self.opened = Some(Err(error)),
                Output::Faulted(_) => self.faulted = true,
                Output::Notice(_) => {}
            }
        }
    }

    fn step(&mut self, input: Input) {
        let mut out = Vec::new();
        self.core.step(self.now, input, &mut out);
        self.take(out);
    }

    /// Ends one disk operation, or answers one copy; false if there is none.
    fn end_one(&mut self) -> bool {
        self.ops += 1;
        assert!(self.ops < MAX_OPS, "one input leads to more than {MAX_OPS} disk operations");
        if !self.queue.is_empty() {
            let at = self.rng.below(self.queue.len().min(8) as u64) as usize;
            let (op, io) = self.queue.remove(at);
            let result = match self.rng.chance(self.errors) {
                true => Err(if self.rng.chance(500) { DiskError::NoSpace } else { DiskError::Io }),
                false => Ok(self.files.carry_out(&io)),
            };
            self.step(Input::DiskDone { op, result });
        } else if let Some(token) = self.copies.pop() {
            let result = match self.rng.below(8) {
                0 => Err(CopyError::Unreachable),
                1 => Err(CopyError::Refused(Code::Busy)),
                _ => Ok(()),
            };
            self.step(Input::CopySent { token, result });
        } else {
            return false;
        }
        true
    }

    fn run(&mut self) {
        while self.end_one() {}
    }

    /// Sends a request of our own and takes its answer.
    fn ask(&mut self, request: Request) -> Reply {
        self.tag += 1;
        let (tag, attach) = (self.tag, self.attach);
        self.step(Input::Request { conn: ConnId(1), channel: 1, tag, attach, request });
        self.run();
        let key = (ConnId(1), 1, tag);
        let at = self.replies.iter().position(|(of, _)| *of == key).expect("a request is answered");
        self.replies.swap_remove(at).1
    }

    fn attach_as(&mut self, attach: AttachId) -> Reply {
        self.attach = attach;
        self.ask(Request::Attach { replica: ids().replica, mirror: ids().mirror, lease_ms: 6000, set: set() })
    }
}

// --- requests ---

/// Flags, a seed for the pieces and the disk, the stream.
pub fn run_requests(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let (flags, seed) = (source.u8(), source.u8());
    let mut stream = source.rest().to_vec();
    if flags & MEND != 0 {
        frames::mend(&mut stream);
    }
    let mut requests = Vec::new();
    frames::frames(&stream, &mut Rng::new(seed.into()), seen, |header, frame| {
        if let Ok(request) = frame {
            requests.push((header, request));
        }
    });
    let mut rig = Rig::open(base(usize::from(flags >> 1 & 3)).files.clone(), 1, seed.into());
    rig.errors = if flags & 8 != 0 { 20 } else { 0 };
    let mut asked: BTreeMap<(ConnId, u32, u64), usize> = BTreeMap::new();
    for (header, request) in requests {
        // The driver greets, and closes what asks for more than it may.
        let conn = ConnId(1 + u64::from(header.channel & 1));
        if rig.closed.contains(&conn) || matches!(request, Request::Hello { .. }) {
            continue;
        }
        *asked.entry((conn, header.channel, header.tag)).or_default() += 1;
        let (channel, tag, attach) = (header.channel, header.tag, header.attach);
        rig.now += rig.rng.below(50);
        rig.step(Input::Request { conn, channel, tag, attach, request });
        for _ in 0..rig.rng.below(6) {
            rig.end_one();
        }
        if rig.rng.chance(10) {
            rig.step(Input::ConnectionLost { conn });
            rig.closed.push(conn);
        }
        if rig.rng.chance(20) {
            rig.now += rig.rng.tail(100, 20_000);
            rig.step(Input::Tick);
        }
    }
    rig.run();
    assert!(rig.core.is_quiet(), "disk operations that nobody began");
    let mut answered: BTreeMap<(ConnId, u32, u64), usize> = BTreeMap::new();
    for (key, reply) in &rig.replies {
        *answered.entry(*key).or_default() += 1;
        let code = if let Reply::Failed { code, .. } = reply { *code as u32 } else { 0 };
        seen.note((reply.kind() as u8, code));
    }
    seen.note(("faulted", rig.faulted));
    for (key, times) in &answered {
        let of = asked.get(key).copied().unwrap_or(0);
        assert!(*times <= of, "{key:?} was asked {of} times and answered {times} times");
    }
    let open = |key: &(ConnId, u32, u64)| !rig.closed.contains(&key.0);
    for (key, times) in asked.iter().filter(|(key, _)| open(key)) {
        let of = answered.get(key).copied().unwrap_or(0);
        assert!(of == *times || rig.faulted, "{key:?} was asked {times} times and answered {of} times");
    }
    if let Some(current) = rig.core.current_attach() {
        seen.note(("attached", current == attach()));
    }
}

pub fn request_seeds() -> Vec<Vec<u8>> {
    let numbered = || (1..).zip(frames::requests()).skip(1);
    let encode = |(tag, request): (u64, Request)| request.encode(1, attach(), tag);
    let mut seeds = Vec::new();
    for flags in [MEND, MEND | 2, MEND | 4, MEND | 8] {
        seeds.push(frames::input(&[flags, flags], numbered().map(encode)));
    }
    for wanted in 2..22 {
        let few = numbered().enumerate().filter(|(i, _)| *i == 0 || *i == wanted || *i == 7).map(|(_, n)| n);
        seeds.push(frames::input(&[MEND, wanted as u8], few.map(encode)));
    }
    seeds
}

// --- meta files ---

/// What a block must read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Truth {
    Zeroes,
    Pattern(u64),
    /// Written and not flushed: whatever a crash leaves.
    Unflushed(u64),
}

struct Base {
    files: Files,
    truth: Vec<Truth>,
    era: u8,
}

fn pattern(block: u64, seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed << 32 | block);
    (0..B / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

fn write(rig: &mut Rig, truth: &mut [Truth], block: u64, count: u64, seed: u64) {
    let data: Bytes = (block..block + count).flat_map(|b| pattern(b, seed)).collect::<Vec<_>>().into();
    let reply = rig.ask(Request::Write { block: BlockIndex(block), fua: false, sums: block_sums(&data), data });
    assert_eq!(reply, Reply::Done(Kind::Write));
    truth[block as usize..(block + count) as usize].fill(Truth::Unflushed(seed));
}

/// Replicas as they may lie on a disk: new; in use and flushed; in use and killed; the same after a power cut.
fn make_bases() -> [Base; 4] {
    let done = |reply: Reply| assert!(matches!(reply, Reply::Done(_)), "{reply:?}");
    let mut rig = Rig::create(Create::Clean);
    let mut truth = vec![Truth::Zeroes; BLOCKS as usize];
    let new = Base { files: rig.files.clone(), truth: truth.clone(), era: 1 };
    assert!(matches!(rig.attach_as(AttachId { epoch: Epoch(2), attach: AttachNo(1) }), Reply::Attached(_)));
    done(rig.ask(Request::StoreSet { set: set(), accounted: true }));
    for (block, count, seed) in [(0, 3, 1), (254, 4, 2), (700, 40, 3), (990, 10, 4)] {
        write(&mut rig, &mut truth, block, count, seed);
    }
    done(rig.ask(Request::Discard { block: BlockIndex(710), count: 5 }));
    truth[710..715].fill(Truth::Zeroes);
    done(rig.ask(Request::Flush { flush: FlushNo(1) }));
    done(rig.ask(Request::Flush { flush: FlushNo(2) }));
    let entry = proto::frame::CleanEntry { region: RegionIndex(0), flush: FlushNo(2) };
    done(rig.ask(Request::Clean { clean: CleanNo(2), entries: vec![entry] }));
    for block in &mut truth {
        if let Truth::Unflushed(seed) = *block {
            *block = Truth::Pattern(seed);
        }
    }
    let flushed = Base { files: rig.files.clone(), truth: truth.clone(), era: 1 };
    write(&mut rig, &mut truth, 300, 20, 5);
    write(&mut rig, &mut truth, 800, 2, 6);
    let killed = |era| Base { files: rig.files.clone(), truth: truth.clone(), era };
    [new, flushed, killed(1), killed(2)]
}

/// A base's files, made once for each thread.
fn base(n: usize) -> std::rc::Rc<Base> {
    thread_local! {
        static BASES: OnceCell<[std::rc::Rc<Base>; 4]> = const { OnceCell::new() };
    }
    BASES.with(|bases| bases.get_or_init(|| make_bases().map(std::rc::Rc::new))[n % 4].clone())
}

/// Makes the checksum of a page of the meta file right.
fn mend_page(number: u64, page: &mut [u8]) {
    if number < 2 {
        let crc = crc32fast::hash(&page[..B - 4]);
        page[B - 4..].copy_from_slice(&crc.to_le_bytes());
    } else {
        let crc = crc32fast::hash(&page[8..]);
        page[4..8].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Which base, a seed, then changes: what to do, where, with what.
pub fn run_meta(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let (flags, seed) = (source.u8(), source.u8());
    let base = base(usize::from(flags & 3));
    let mut files = base.files.clone();
    let pages = Layout::new(BLOCKS).meta_len() / PAGE;
    // A page that looks right and is not: what it says can't be told from the truth.
    let mut forged = false;
    let mut edits = 0;
    while !source.is_empty() && edits < 64 {
        edits += 1;
        let op = source.u8();
        let at = u64::from(source.u8()) % pages;
        let mut page = files.meta.get(&at).map_or_else(|| vec![0; B], |page| page.to_vec());
        match op & 7 {
            0 => {
                let offset = usize::from(source.u16()) % B;
                let len = usize::from(source.u8()).min(B - offset);
                let bytes = source.bytes(len);
                page[offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            1 => page.fill(0),
            2 => {
                let from = u64::from(source.u8()) % pages;
                page = files.meta.get(&from).map_or_else(|| vec![0; B], |page| page.to_vec());
            }
            3 => {
                let mut rng = Rng::new(source.u8().into());
                page.iter_mut().for_each(|byte| *byte = rng.next() as u8);
            }
            4 => {
                // Fields lie at multiples of four.
                let offset = usize::from(source.u16()) % (B / 4 - 1) * 4;
                let number = source.number().to_le_bytes();
                page[offset..offset + 8].copy_from_slice(&number);
            }
            5 => {
                let cut = usize::from(source.u8()) % 8 * 512;
                page[cut..].fill(0);
            }
            6 => {
                let other = self::base(usize::from(source.u8()));
                page = other.files.meta.get(&at).map_or_else(|| vec![0; B], |page| page.to_vec());
                forged = true;
            }
            _ => {
                let block = u64::from(source.u16()) % BLOCKS;
                if let Some(data) = files.data.get(&block) {
                    let mut data = data.to_vec();
                    data[usize::from(source.u8())] ^= source.u8();
                    files.data.insert(block, data.into());
                }
            }
        }
        if op & 0x80 != 0 {
            mend_page(at, &mut page);
            forged = true;
        }
        files.meta.insert(at, page.into());
    }
    let superblocks = (0..2).filter_map(|at| Superblock::decode(files.meta.get(&at)?).ok());
    let last = superblocks.map(|superblock| superblock.generation).max();
    let mut rig = Rig::open(files, base.era, seed.into());
    match rig.opened.clone().expect("opening ends") {
        Err(error) => {
            seen.words(&error.to_string());
            assert!(!matches!(error, OpenError::Disk { .. }), "{error}");
            return;
        }
        Ok(report) => {
            let marks = (report.repaired_superblock, report.bad_bitmap_pages, report.dirty, report.rebuilt);
            seen.note((marks, report.journal_blocks));
        }
    }
    let epoch = match rig.attach_as(AttachId { epoch: Epoch(3), attach: AttachNo(1) }) {
        Reply::Attached(_) => 3,
        Reply::Failed { code: Code::Superseded, block, .. } => {
            assert!(forged, "epoch {block} came from nowhere");
            let Some(next) = block.checked_add(1) else { return };
            let attached = rig.attach_as(AttachId { epoch: Epoch(next), attach: AttachNo(1) });
            assert!(matches!(attached, Reply::Attached(_)), "{attached:?}");
            next
        }
        other => panic!("{other:?}"),
    };
    let regions = rig.ask(Request::ListRegions { first: RegionIndex(0), count: 4 });
    let Reply::Regions(regions) = regions else { panic!("{regions:?}") };
    seen.note((&regions.dirty[..], &regions.suspect[..], &regions.allocated[..]));
    check_all(&mut rig, &base.truth, forged, seen);
    // What is found is hashed and settled as a session would, and then written over.
    for region in 0..4 {
        let (block, count) = (BlockIndex(region * 256), 32);
        let hashed = rig.ask(Request::Hashes { block, count, key: [1; 32] });
        assert!(matches!(hashed, Reply::Hashes(_)), "{hashed:?}");
        let restamped = rig.ask(Request::Restamp { block, blocks: [u64::MAX, 0, 0, 0] });
        seen.note(("restamped", std::mem::discriminant(&restamped)));
    }
    let mut truth = base.truth.clone();
    for block in [1, 255, 290, 705, 998] {
        write(&mut rig, &mut truth, block, 2, 9);
    }
    let flushed = rig.ask(Request::Flush { flush: FlushNo(1) });
    assert_eq!(flushed, Reply::Done(Kind::Flush));
    let files = std::mem::take(&mut rig.files);
    let mut rig = Rig::open(files, 9, seed.into());
    match &rig.opened {
        Some(Ok(_)) => {}
        // The next number was one too many; nobody counts so far.
        Some(Err(OpenError::NoSuperblock { .. })) if last.is_some_and(|n| n > u64::MAX / 2 - 8) => return,
        other => panic!("what could be opened can be opened again: {other:?}"),
    }
    let attached = rig.attach_as(AttachId { epoch: Epoch(epoch), attach: AttachNo(2) });
    assert!(matches!(attached, Reply::Attached(_)), "{attached:?}");
    for (block, truth) in (0..).zip(&truth) {
        if *truth == Truth::Unflushed(9) {
            let reply = rig.ask(Request::Read { block: BlockIndex(block), count: 1 });
            let Reply::Read { data, .. } = reply else { panic!("block {block}, written and flushed: {reply:?}") };
            assert!(data[..] == pattern(block, 9)[..], "block {block}, written and flushed");
        }
    }
}

fn check_all(rig: &mut Rig, truth: &[Truth], forged: bool, seen: &mut Seen) {
    let mut at = 0;
    while at < BLOCKS {
        let count = 50.min(BLOCKS - at);
        let reply = rig.ask(Request::Read { block: BlockIndex(at), count: count as u32 });
        if let Reply::Read { data, .. } = &reply {
            (at..at + count).zip(data.chunks_exact(B)).for_each(|(b, data)| check_block(b, data, truth, forged));
        } else {
            for block in at..at + count {
                match rig.ask(Request::Read { block: BlockIndex(block), count: 1 }) {
                    Reply::Read { data, .. } => check_block(block, &data, truth, forged),
                    Reply::Failed { code, .. } => {
                        assert!(matches!(code, Code::Checksum | Code::ReadFailed), "block {block}: {code:?}");
                        seen.note(("refused", code as u32, block / 50));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        at += count;
    }
}

fn check_block(block: u64, data: &[u8], truth: &[Truth], forged: bool) {
    let zeroes = || data.iter().all(|byte| *byte == 0);
    let is = |seed| data == &pattern(block, seed)[..];
    let right = match truth[block as usize] {
        Truth::Zeroes => zeroes(),
        Truth::Pattern(seed) => is(seed),
        Truth::Unflushed(seed) => is(seed) || zeroes(),
    };
    let known = || zeroes() || (1..=6).any(is);
    assert!(right || (forged && known()), "block {block} reads as something else than {:?}", truth[block as usize]);
}

pub fn meta_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for base in 0..4u8 {
        seeds.push(vec![base, 0]);
        // Each page lost, torn, misplaced, bent; forged in its first fields.
        for page in 0..22u8 {
            seeds.push(vec![base, page, 1, page]);
            seeds.push(vec![base, page, 5, page, 3]);
            seeds.push(vec![base, page, 2, page, page + 1]);
            seeds.push(vec![base, page, 0, page, 200, 0, 4, 1, 2, 3, 4]);
        }
        for field in 0..64u8 {
            seeds.push(vec![base, field, 0x84, field % 22, field, 0, 240 + field % 8, 7, 7, 7, 7, 7, 7, 7, 7]);
        }
        for field in (2..54).step_by(2) {
            // A superblock, and a page of the journal that may count: forged in every field.
            seeds.push(vec![base, field, 0x84, field / 2 % 2, field, 0, 242]);
            seeds.push(vec![base, field, 0x84, 4 + field / 2 % 4, 14 + field / 2, 0, 240 + field % 8]);
        }
        for page in 4..8 {
            seeds.push(vec![base, page, 0x84, page, 20, 0, 242, 0x84, page, 22, 0, 243]);
        }
        seeds.push(vec![base, 3, 1, 0, 5, 1, 2]);
        seeds.push(vec![base, 4, 6, 20, 0, 6, 21, 0]);
        seeds.push(vec![base, 5, 7, 0, 0xc2, 0x02, 5, 1]);
    }
    seeds
}

/// An input of `meta` has no records that its lengths tell: its changes are short.
pub fn meta_records(input: &[u8]) -> Vec<usize> {
    (2..input.len()).step_by(4).collect()
}
