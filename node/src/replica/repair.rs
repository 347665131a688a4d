//! What equalising needs of a replica (R7): hashes of what is on the disk, copies to a peer, restamps, and doubt.
//!
//! At most [`MAX_REPAIRS`] of these run at a time; the rest wait in order, counted among the requests in flight of
//! their attach. Each works in pieces that end as separate disk operations, so that foreground requests come between
//! them where a disk is waited for; of what the page cache has, a region takes a fraction of a millisecond.

use std::collections::VecDeque;

use highway::{HighwayHash, HighwayHasher, Key};
use proto::buffer;
use proto::frame::{BlockHash, Code, CopyTarget, Reply, Request, block_sum, block_sums};
use proto::id::BlockIndex;
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

use super::dirty_log::{Waiter, regions_of};
use super::interface::{CopyError, CopyToken, DiskData, DiskError, DiskIo, FileKind, Notice, Output};
use super::io::body;
use super::map::{Snapshot, place};
use super::state::{Body, ById, Changing, Io, Op, ReplicaCore};

/// Hashes, copies and restamps that one replica works on at a time.
const MAX_REPAIRS: usize = 4;
/// Blocks that are read and hashed, or copied, in one piece: it stays in the processor's own cache meanwhile.
const PIECE_BLOCKS: u64 = 16;
/// Pieces of one request that are being read to be hashed.
const MAX_HASH_WINDOW: u32 = 4;
/// Pieces of one copy that are being read or are on their way: of blocks written here and there, most have one block.
const MAX_COPY_WINDOW: u32 = 32;
/// Copies that one replica has on their way.
pub(crate) const MAX_COPIES_OUT: usize = MAX_REPAIRS * MAX_COPY_WINDOW as usize;

#[derive(Debug, Default)]
pub(super) struct RepairState {
    running: usize,
    queue: VecDeque<u64>,
    /// Copies on their way: the request and its piece.
    sent: ById<u64, (u64, u32)>,
}

/// Consecutive blocks that are treated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    /// First block, counted from the request's.
    at: u64,
    count: u64,
    /// They must be read; otherwise they are known to be zeroes.
    on_disk: bool,
}

#[derive(Debug)]
pub(super) struct HashOp {
    block: BlockIndex,
    count: u32,
    key: [u8; 32],
    pieces: Vec<Piece>,
    /// The next piece to be read.
    next: usize,
    map: Option<Snapshot>,
    hashes: Vec<BlockHash>,
}

#[derive(Debug)]
pub(super) struct CopyOp {
    block: BlockIndex,
    mask: [u64; 4],
    target: CopyTarget,
    pieces: Vec<Piece>,
    /// Taken when it starts.
    map: Option<Snapshot>,
    /// Pieces that have been begun, and how many of them have not ended.
    next: usize,
    in_flight: u32,
    failed: Option<(Code, u64)>,
}

#[derive(Debug)]
pub(super) struct RestampOp {
    block: BlockIndex,
    mask: [u64; 4],
    /// The blocks are not to be believed instead.
    distrust: bool,
    pieces: Vec<Piece>,
    failed: Option<u64>,
}

impl HashOp {
    pub(super) fn new(block: BlockIndex, count: u32, key: [u8; 32]) -> Self {
        Self { block, count, key, pieces: Vec::new(), next: 0, map: None, hashes: Vec::new() }
    }
}

impl CopyOp {
    pub(super) fn new(block: BlockIndex, mask: [u64; 4], target: CopyTarget) -> Self {
        Self { block, mask, target, pieces: Vec::new(), map: None, next: 0, in_flight: 0, failed: None }
    }
}

impl RestampOp {
    pub(super) fn new(block: BlockIndex, mask: [u64; 4], distrust: bool) -> Self {
        Self { block, mask, distrust, pieces: Vec::new(), failed: None }
    }
}

fn is_named(mask: &[u64; 4], i: u64) -> bool {
    mask[(i / 64) as usize] & (1 << (i % 64)) != 0
}

/// One past the last named block; 0: none is named.
fn named_len(mask: &[u64; 4]) -> u64 {
    (0..4).rev().find(|w| mask[*w] != 0).map_or(0, |w| w as u64 * 64 + 64 - u64::from(mask[w].leading_zeros()))
}

/// Cuts the blocks `0..count` that `wanted` names into pieces.
fn pieces(count: u64, wanted: impl Fn(u64) -> bool, map: &Snapshot) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for at in (0..count).filter(|i| wanted(*i)) {
        let on_disk = map.allocated(at as usize) || map.unverified(at as usize);
        match pieces.last_mut() {
            Some(p) if p.at + p.count == at && p.on_disk == on_disk && (!on_disk || p.count < PIECE_BLOCKS) => {
                p.count += 1;
            }
            _ => pieces.push(Piece { at, count: 1, on_disk }),
        }
    }
    pieces
}

/// The hash of a block that replicas are compared by (R7): HighwayHash-128. Its key is secret and used once, so that
/// whoever wrote the blocks could not choose two that collide; a hash that withstands more costs three times as much.
pub fn block_hash(key: &[u8; 32], block: &[u8]) -> [u8; 16] {
    let word = |i: usize| u64::from_le_bytes(key[i * 8..][..8].try_into().expect("eight bytes"));
    let hash = HighwayHasher::new(Key([word(0), word(1), word(2), word(3)])).hash128(block);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&hash[0].to_le_bytes());
    bytes[8..].copy_from_slice(&hash[1].to_le_bytes());
    bytes
}

impl ReplicaCore {
    pub(super) fn repair_request(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let (block, count) = match &op.body {
            Body::Hash(h) => (h.block, u64::from(h.count)),
            Body::Copy(c) => (c.block, named_len(&c.mask)),
            Body::Restamp(r) => (r.block, named_len(&r.mask)),
            other => unreachable!("{other:?}"),
        };
        let one_region = !matches!(op.body, Body::Hash(_)) || {
            count <= REGION_BLOCKS && block.0 % REGION_BLOCKS + count <= REGION_BLOCKS
        };
        if !self.in_range(block, count) || !one_region {
            return self.fail(op, Code::Invalid, 0, out);
        }
        if let Body::Restamp(_) = op.body {
            let (first, last) = regions_of(block, count);
            (first..=last).for_each(|region| self.regions.begin_change(region));
            op.changing = Changing::Span(first, last);
        }
        self.ops.insert(id, op);
        self.repair.queue.push_back(id);
        self.start_repairs();
    }

    fn start_repairs(&mut self) {
        while self.repair.running < MAX_REPAIRS {
            let Some(id) = self.repair.queue.pop_front() else { return };
            let Some(op) = self.ops.get_mut(&id).filter(|op| !op.ended) else { continue };
            op.repairing = true;
            self.repair.running += 1;
            self.ready.push_back(id);
        }
    }

    pub(super) fn repair_place_free(&mut self) {
        self.repair.running -= 1;
        self.start_repairs();
    }

    pub(super) fn advance_repair(&mut self, id: u64, op: Op, out: &mut Vec<Output>) {
        if !op.repairing {
            self.ops.insert(id, op);
            return;
        }
        match &op.body {
            Body::Hash(_) => self.advance_hash(id, op, out),
            Body::Copy(_) => self.advance_copy(id, op, out),
            Body::Restamp(_) => self.advance_restamp(id, op, out),
            other => unreachable!("{other:?}"),
        }
    }

    pub(super) fn repair_done(
        &mut self,
        id: u64,
        mut op: Op,
        piece: u32,
        result: Result<DiskData, DiskError>,
        out: &mut Vec<Output>,
    ) {
        let bytes = match result {
            Ok(DiskData::Read(bytes)) => Some(bytes),
            _ => None,
        };
        if op.ended {
            if op.ios > 0 {
                self.ops.insert(id, op);
            } else {
                self.release(&mut op);
            }
            return;
        }
        match &op.body {
            Body::Hash(_) => self.hash_piece(id, op, piece, bytes, out),
            Body::Copy(_) => self.copy_piece(id, op, piece, bytes, out),
            Body::Restamp(_) => self.restamp_piece(id, op, piece, bytes, out),
            other => unreachable!("{other:?}"),
        }
    }

    fn read_piece(&mut self, id: u64, block: BlockIndex, index: usize, piece: Piece, out: &mut Vec<Output>) {
        let offset = (block.0 + piece.at) * BLOCK_SIZE;
        let len = (piece.count * BLOCK_SIZE) as u32;
        let read = DiskIo::Read { file: FileKind::Data, offset, len };
        self.disk(Io::Op { op: id, piece: index as u32 }, read, out);
    }

    fn advance_hash(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let job = body!(op, Hash);
        let (block, count) = (job.block, u64::from(job.count));
        if op.ios > 0 {
            self.ops.insert(id, op);
            return;
        }
        if !self.map_or_wait(block, count, id, out) {
            self.ops.insert(id, op);
            return;
        }
        let map = self.snapshot(block, count);
        let zero = block_hash(&job.key, &[0; BLOCK_SIZE as usize]);
        job.hashes = vec![BlockHash { hash: zero, intact: true, readable: true, allocated: false }; count as usize];
        job.pieces = pieces(count, |_| true, &map).into_iter().filter(|p| p.on_disk).collect();
        job.map = Some(map);
        self.continue_hash(id, op, out);
    }

    /// Reads as many pieces as the window takes; answers when the last one is hashed.
    fn continue_hash(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let job = body!(op, Hash);
        let block = job.block;
        let window = (MAX_HASH_WINDOW - op.ios.min(MAX_HASH_WINDOW)) as usize;
        let todo: Vec<(usize, Piece)> = job.pieces.iter().copied().enumerate().skip(job.next).take(window).collect();
        job.next += todo.len();
        op.ios += todo.len() as u32;
        if op.ios == 0 {
            let hashes = std::mem::take(&mut job.hashes);
            return self.finish(op, Reply::Hashes(hashes), out);
        }
        self.ops.insert(id, op);
        for (index, piece) in todo {
            self.read_piece(id, block, index, piece, out);
        }
    }

    fn hash_piece(&mut self, id: u64, mut op: Op, index: u32, bytes: Option<Vec<u8>>, out: &mut Vec<Output>) {
        let job = body!(op, Hash);
        let piece = job.pieces[index as usize];
        let map = job.map.as_ref().expect("taken before the disk was asked");
        match bytes {
            Some(bytes) => {
                assert_eq!(bytes.len() as u64, piece.count * BLOCK_SIZE, "the disk read another length");
                for (i, bytes) in (piece.at as usize..).zip(bytes.chunks_exact(BLOCK_SIZE as usize)) {
                    if mutant::is(Mutant::CompareSums) && !map.unverified(i) {
                        let hash = block_hash(&job.key, &map.sums[i].to_le_bytes());
                        job.hashes[i] = BlockHash { hash, intact: true, readable: true, allocated: true };
                        continue;
                    }
                    job.hashes[i] = BlockHash {
                        hash: block_hash(&job.key, bytes),
                        intact: !map.unverified(i) && block_sum(bytes) == map.sums[i],
                        readable: !map.disowned(i) || mutant::is(Mutant::DistrustedTaken),
                        allocated: true,
                    };
                }
                drop(buffer::freeze(bytes));
            }
            None if piece.count == 1 => {
                let unreadable = BlockHash { hash: [0; 16], intact: false, readable: false, allocated: true };
                job.hashes[piece.at as usize] = unreadable;
                out.push(Output::Notice(Notice::ReadFailed { block: BlockIndex(job.block.0 + piece.at) }));
            }
            None => {
                // One bad block must not hide its neighbours.
                let alone = (piece.at..piece.at + piece.count).map(|at| Piece { at, count: 1, on_disk: true });
                job.pieces.extend(alone);
            }
        }
        self.continue_hash(id, op, out);
    }

    fn advance_copy(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let job = body!(op, Copy);
        if job.map.is_none() {
            let (block, count) = (job.block, named_len(&job.mask));
            if !self.map_or_wait(block, count, id, out) {
                self.ops.insert(id, op);
                return;
            }
            let map = self.snapshot(block, count);
            job.pieces = pieces(count, |i| is_named(&job.mask, i), &map);
            job.map = Some(map);
        }
        self.continue_copy(id, op, out);
    }

    /// Begins as many pieces as the window takes; answers when the last one has ended.
    fn continue_copy(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let mut reads = Vec::new();
        let job = body!(op, Copy);
        while job.failed.is_none() && job.in_flight < MAX_COPY_WINDOW && job.next < job.pieces.len() {
            let (index, piece) = (job.next, job.pieces[job.next]);
            job.next += 1;
            job.in_flight += 1;
            if piece.on_disk {
                reads.push((index, piece));
            } else {
                let token = self.number();
                self.repair.sent.insert(token, (id, index as u32));
                let request = Request::CopyWrite {
                    replica: job.target.replica,
                    block: BlockIndex(job.block.0 + piece.at),
                    count: piece.count as u32,
                    sums: Vec::new(),
                    data: bytes::Bytes::new(),
                };
                out.push(Output::SendCopy { to: job.target.clone(), token: CopyToken(token), request });
            }
        }
        if job.in_flight == 0 {
            return match job.failed {
                Some((code, block)) => self.fail(op, code, block, out),
                None => {
                    let done = Reply::Done(op.kind);
                    self.finish(op, done, out);
                }
            };
        }
        let block = job.block;
        op.ios += reads.len() as u32;
        self.ops.insert(id, op);
        for (index, piece) in reads {
            self.read_piece(id, block, index, piece, out);
        }
    }

    /// A piece has been read, and is sent if it is what was written there: the gateway has chosen this base by its
    /// sums, or had them made anew, and a disk may have changed it since.
    fn copy_piece(&mut self, id: u64, mut op: Op, index: u32, bytes: Option<Vec<u8>>, out: &mut Vec<Output>) {
        let job = body!(op, Copy);
        let piece = job.pieces[index as usize];
        let block = BlockIndex(job.block.0 + piece.at);
        match bytes {
            Some(bytes) if job.failed.is_none() => {
                assert_eq!(bytes.len() as u64, piece.count * BLOCK_SIZE, "the disk read another length");
                let map = job.map.as_ref().expect("taken before the disk was asked");
                let sums = block_sums(&bytes);
                let bad = |at: &usize| map.unverified(*at) || sums[at - piece.at as usize] != map.sums[*at];
                if let Some(at) = (piece.at as usize..).take(piece.count as usize).find(bad) {
                    let block = BlockIndex(job.block.0 + at as u64);
                    out.push(Output::Notice(Notice::ChecksumMismatch { block }));
                    job.failed = Some((Code::Checksum, block.0));
                    job.in_flight -= 1;
                    return self.continue_copy(id, op, out);
                }
                let token = self.number();
                self.repair.sent.insert(token, (id, index));
                let request = Request::CopyWrite {
                    replica: job.target.replica,
                    block,
                    count: piece.count as u32,
                    sums,
                    data: buffer::freeze(bytes),
                };
                out.push(Output::SendCopy { to: job.target.clone(), token: CopyToken(token), request });
                self.ops.insert(id, op);
            }
            Some(_) => {
                job.in_flight -= 1;
                self.continue_copy(id, op, out);
            }
            None => {
                out.push(Output::Notice(Notice::ReadFailed { block }));
                job.failed.get_or_insert((Code::ReadFailed, block.0));
                job.in_flight -= 1;
                self.continue_copy(id, op, out);
            }
        }
    }

    pub(super) fn copy_sent(&mut self, token: CopyToken, result: Result<(), CopyError>, out: &mut Vec<Output>) {
        // The request may be gone with its attach.
        let Some((id, index)) = self.repair.sent.remove(&token.0) else { return };
        let Some(mut op) = self.ops.remove(&id) else { return };
        if op.ended {
            self.ops.insert(id, op);
            return;
        }
        let job = body!(op, Copy);
        job.in_flight -= 1;
        if let Err(error) = result {
            let block = BlockIndex(job.block.0 + job.pieces[index as usize].at);
            out.push(Output::Notice(Notice::CopyFailed { block, error }));
            let code = match error {
                CopyError::Unreachable => Code::PeerUnreachable,
                CopyError::Refused(_) => Code::PeerRefused,
            };
            job.failed.get_or_insert((code, block.0));
        }
        self.continue_copy(id, op, out);
    }

    fn advance_restamp(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        if op.touched {
            self.ops.insert(id, op);
            return;
        }
        let job = body!(op, Restamp);
        let (block, count) = (job.block, named_len(&job.mask));
        let (first, last) = regions_of(block, count);
        // Where there is no map page there is nothing to restamp, and no page is to be made.
        let distrust = job.distrust;
        let wanted = |r: &u64| distrust || self.regions.present.get(*r / super::layout::MAP_REGIONS);
        let regions: Vec<u64> = (u64::from(first)..=u64::from(last)).filter(wanted).collect();
        if !self.may_change_or_wait(regions.into_iter(), false, Waiter::Op(id))
            || !self.map_or_wait(block, count, id, out)
        {
            self.ops.insert(id, op);
            return;
        }
        if distrust {
            for (page, at) in (0..count).filter(|i| is_named(&job.mask, *i)).map(|i| place(block.0 + i)) {
                self.map.modify(page).disown(at);
            }
            let done = Reply::Done(op.kind);
            return self.finish(op, done, out);
        }
        let map = self.snapshot(block, count);
        job.pieces = pieces(count, |i| is_named(&job.mask, i), &map).into_iter().filter(|p| p.on_disk).collect();
        if job.pieces.is_empty() {
            let done = Reply::Done(op.kind);
            return self.finish(op, done, out);
        }
        let pages: Vec<u64> =
            job.pieces.iter().flat_map(|p| [p.at, p.at + p.count - 1]).map(|at| place(block.0 + at).0).collect();
        let (low, high) = (pages[0], pages[pages.len() - 1]);
        (low..=high).for_each(|page| self.map.pin(page));
        op.pinned = Some((low, high));
        op.touched = true;
        let todo = job.pieces.clone();
        op.ios = todo.len() as u32;
        self.ops.insert(id, op);
        for (i, piece) in todo.into_iter().enumerate() {
            self.read_piece(id, block, i, piece, out);
        }
    }

    fn restamp_piece(&mut self, id: u64, mut op: Op, index: u32, bytes: Option<Vec<u8>>, out: &mut Vec<Output>) {
        let job = body!(op, Restamp);
        let piece = job.pieces[index as usize];
        let block = job.block.0 + piece.at;
        match bytes {
            Some(bytes) => {
                for (block, bytes) in (block..).zip(bytes.chunks_exact(BLOCK_SIZE as usize)) {
                    let (page, at) = place(block);
                    if bytes.iter().all(|b| *b == 0) {
                        self.map.modify(page).clear(at);
                    } else {
                        // What it does not know to be allocated was unverified: a kill leaves it so, or freed.
                        self.map.set_sums(page, at, &[block_sum(bytes)], &mut Vec::new());
                    }
                }
                drop(buffer::freeze(bytes));
            }
            None => {
                out.push(Output::Notice(Notice::ReadFailed { block: BlockIndex(block) }));
                job.failed.get_or_insert(block);
            }
        }
        if op.ios > 0 {
            self.ops.insert(id, op);
            return;
        }
        match job.failed {
            Some(block) => self.fail(op, Code::ReadFailed, block, out),
            None => {
                let done = Reply::Done(op.kind);
                self.finish(op, done, out);
            }
        }
    }
}
