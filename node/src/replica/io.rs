//! Reads, writes and zeroes.

use bytes::Bytes;
use proto::frame::{Code, Reply, block_sum, zero_block_sum};
use proto::id::BlockIndex;
use proto::limits::{BLOCK_SIZE, MAX_DISCARD_BLOCKS, MAX_REQUEST_BLOCKS};
use proto::mutant::{self, Mutant};

use super::dirty_log::{Waiter, regions_of, runs};
use super::interface::{DiskData, DiskError, DiskIo, FileKind, Notice, Output};
use super::layout::{MAP_BLOCKS, MAP_REGIONS};
use super::map::{Snapshot, place};
use super::state::{Changing, Io, Op, ReplicaCore};

/// What unallocated blocks read as.
static ZEROES: [u8; MAX_REQUEST_BLOCKS as usize * BLOCK_SIZE as usize] =
    [0; MAX_REQUEST_BLOCKS as usize * BLOCK_SIZE as usize];
/// Bytes that one punch frees at most, so that a large discard is no single long disk operation.
const MAX_PUNCH_BLOCKS: u64 = (64 << 20) / BLOCK_SIZE;

#[derive(Debug)]
pub(super) struct ReadOp {
    block: BlockIndex,
    count: u32,
    /// What the map said when the disk was asked.
    map: Option<Snapshot>,
}

#[derive(Debug)]
pub(super) struct WriteOp {
    block: BlockIndex,
    fua: bool,
    sums: Vec<u32>,
    data: Bytes,
    /// It goes on where another write ended.
    sequential: bool,
    /// The disk refused it. Blocks that held nothing are being punched, in these runs.
    failed: Option<(Code, Vec<(u64, u64)>)>,
}

#[derive(Debug)]
pub(super) struct ZeroOp {
    block: BlockIndex,
    count: u32,
    fua: bool,
    /// The regions that have something to zero are known, and counted as changing.
    begun: bool,
    /// How many blocks have been dealt with in the map.
    done: u64,
    /// Blocks that are to be punched, from and up to.
    punch: (u64, u64),
    /// Those that have been given to the disk.
    punched: Vec<(u64, u64)>,
    /// What could not be punched could not be overwritten with zeroes either.
    failed: Option<Code>,
}

/// Stands for a write of zeroes among a zero request's disk operations; others are its punches by number.
const ZERO_WRITE: u32 = u32::MAX;

impl ReadOp {
    pub(super) fn new(block: BlockIndex, count: u32) -> Self {
        Self { block, count, map: None }
    }
}

impl WriteOp {
    pub(super) fn new(block: BlockIndex, fua: bool, sums: Vec<u32>, data: Bytes) -> Self {
        Self { block, fua, sums, data, sequential: false, failed: None }
    }
    fn count(&self) -> u64 {
        self.sums.len() as u64
    }
}

impl ZeroOp {
    pub(super) fn new(block: BlockIndex, count: u32, fua: bool) -> Self {
        Self { block, count, fua, begun: false, done: 0, punch: (0, 0), punched: Vec::new(), failed: None }
    }
}

/// Notes that these blocks are to be punched; tells how many disk operations that takes.
fn begin_punch(zero: &mut ZeroOp, from: u64, to: u64) -> u32 {
    if from < to {
        zero.punched.push((from, to));
    }
    u32::from(from < to)
}

macro_rules! body {
    ($op:expr, $variant:ident) => {
        match &mut $op.body {
            super::state::Body::$variant(body) => body,
            other => unreachable!("{other:?}"),
        }
    };
}
pub(super) use body;

impl ReplicaCore {
    pub(super) fn read(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let read = body!(op, Read);
        if !self.in_range(read.block, read.count.into()) || read.count > MAX_REQUEST_BLOCKS {
            return self.fail(op, Code::Invalid, 0, out);
        }
        self.advance_read(id, op, out);
    }

    pub(super) fn advance_read(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        if op.ios > 0 {
            self.ops.insert(id, op);
            return;
        }
        let read = body!(op, Read);
        let (block, count) = (read.block, u64::from(read.count));
        if !self.map_or_wait(block, count, id, out) {
            self.ops.insert(id, op);
            return;
        }
        let map = self.snapshot(block, count);
        if let Some(i) = (0..count as usize).find(|i| map.unverified(*i)) {
            return self.fail(op, Code::Checksum, block.0 + i as u64, out);
        }
        if !(0..count as usize).any(|i| map.allocated(i)) {
            let sums = vec![zero_block_sum(); count as usize];
            let data = Bytes::from_static(&ZEROES[..(count * BLOCK_SIZE) as usize]);
            return self.finish(op, Reply::Read { block, sums, data }, out);
        }
        read.map = Some(map);
        op.ios = 1;
        self.ops.insert(id, op);
        let (offset, len) = (block.0 * BLOCK_SIZE, (count * BLOCK_SIZE) as u32);
        self.disk(Io::Op { op: id, piece: 0 }, DiskIo::Read { file: FileKind::Data, offset, len }, out);
    }

    pub(super) fn read_done(&mut self, mut op: Op, result: Result<DiskData, DiskError>, out: &mut Vec<Output>) {
        if op.ended {
            return self.release(&mut op);
        }
        let read = body!(op, Read);
        let block = read.block;
        let mut bytes = match result {
            Ok(DiskData::Read(bytes)) => bytes,
            other => {
                assert!(other.is_err(), "a read that brings nothing");
                out.push(Output::Notice(Notice::ReadFailed { block }));
                return self.fail(op, Code::ReadFailed, block.0, out);
            }
        };
        assert_eq!(bytes.len() as u64, u64::from(read.count) * BLOCK_SIZE, "the disk read another length");
        let mut map = read.map.take().expect("taken before the disk was asked");
        for (i, bytes) in bytes.chunks_exact_mut(BLOCK_SIZE as usize).enumerate() {
            if !map.allocated(i) {
                bytes.fill(0);
                map.sums[i] = zero_block_sum();
            } else if block_sum(bytes) != map.sums[i] && !mutant::is(Mutant::SumsUnchecked) {
                let block = BlockIndex(block.0 + i as u64);
                out.push(Output::Notice(Notice::ChecksumMismatch { block }));
                return self.fail(op, Code::Checksum, block.0, out);
            }
        }
        self.finish(op, Reply::Read { block, sums: map.sums, data: proto::buffer::freeze(bytes) }, out);
    }

    pub(super) fn write(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let write = body!(op, Write);
        let (block, count) = (write.block, write.count());
        if !self.in_range(block, count)
            || count > u64::from(MAX_REQUEST_BLOCKS)
            || write.data.len() as u64 != count * BLOCK_SIZE
        {
            return self.fail(op, Code::Invalid, 0, out);
        }
        let blocks = write.data.chunks_exact(BLOCK_SIZE as usize);
        if let Some(i) = blocks.zip(&write.sums).position(|(bytes, sum)| block_sum(bytes) != *sum) {
            return self.fail(op, Code::BadData, block.0 + i as u64, out);
        }
        let (first, last) = regions_of(block, count);
        (first..=last).for_each(|region| self.regions.begin_change(region));
        op.changing = Changing::Span(first, last);
        write.sequential = self.regions.follow_stream(block, block.0 + count);
        self.advance_write(id, op, out);
    }

    pub(super) fn advance_write(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        if op.touched {
            self.ops.insert(id, op);
            return;
        }
        let write = body!(op, Write);
        let (block, count) = (write.block, write.count());
        let (first, last) = regions_of(block, count);
        // R5: durably dirty before anything changes. The map pages come meanwhile.
        let pages = (place(block.0).0, place(block.0 + count - 1).0);
        if !self.may_change_or_wait(u64::from(first)..=u64::from(last), write.sequential, Waiter::Op(id)) {
            for page in (pages.0..=pages.1).filter(|page| self.regions.present.get(*page)).collect::<Vec<_>>() {
                self.load_map(page, out);
            }
            self.ops.insert(id, op);
            return;
        }
        if !self.map_or_wait(block, count, id, out) {
            self.ops.insert(id, op);
            return;
        }
        let durable = (first..=last).all(|region| self.regions.durable.get(region.into()));
        assert!(durable, "R5: write to block {block} of a region that is not durably dirty");
        (pages.0..=pages.1).for_each(|page| self.map.pin(page));
        op.pinned = Some(pages);
        op.touched = true;
        op.ios = 1;
        let bytes = write.data.clone();
        self.ops.insert(id, op);
        let write = DiskIo::Write { file: FileKind::Data, offset: block.0 * BLOCK_SIZE, bytes };
        self.disk(Io::Op { op: id, piece: 0 }, write, out);
    }

    pub(super) fn write_done(
        &mut self,
        id: u64,
        mut op: Op,
        piece: u32,
        result: Result<DiskData, DiskError>,
        out: &mut Vec<Output>,
    ) {
        let write = body!(op, Write);
        let block = write.block;
        self.flush.data_written = true;
        if write.failed.is_some() {
            return self.failed_write_punched(id, op, piece, result.is_err(), out);
        }
        if let Err(error) = result {
            out.push(Output::Notice(Notice::WriteFailed { block, error }));
            let code = if error == DiskError::NoSpace { Code::NoSpace } else { Code::WriteFailed };
            // Part of it may be there. Blocks that held nothing must stay that way on the disk too (see `map`).
            let map = self.snapshot(block, write.count());
            let held_nothing = (0..write.count()).filter(|i| !map.allocated(*i as usize));
            let pieces = runs(held_nothing.map(|i| block.0 + i));
            if pieces.is_empty() {
                return self.fail(op, code, block.0, out);
            }
            write.failed = Some((code, pieces.clone()));
            op.ios = pieces.len() as u32;
            self.ops.insert(id, op);
            for (i, (first, count)) in pieces.into_iter().enumerate() {
                self.punch(id, i as u32, first, first + count, out);
            }
            return;
        }
        let mut fresh = Vec::new();
        let mut at = 0;
        while at < write.sums.len() {
            let (page, i) = place(block.0 + at as u64);
            let n = (write.sums.len() - at).min(MAP_BLOCKS as usize - i);
            write.fua |= self.map.set_sums(page, i, &write.sums[at..at + n], &mut fresh);
            at += n;
        }
        write.data = Bytes::new();
        if fresh.is_empty() || !self.journals() {
            return self.written(id, op, out);
        }
        self.journal(id, op, fresh);
    }

    /// A write's data is on the disk, and so is what a killed process would leave of its allocations.
    pub(super) fn written(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let write = body!(op, Write);
        if write.fua && !op.ended && !mutant::is(Mutant::FuaIgnored) {
            // The change is complete; what is left is an ordinary flush.
            self.end_changes(&mut op);
            return self.flush_write(id, op);
        }
        let done = Reply::Done(op.kind);
        self.finish(op, done, out);
    }

    fn failed_write_punched(&mut self, id: u64, mut op: Op, piece: u32, failed: bool, out: &mut Vec<Output>) {
        let write = body!(op, Write);
        let (code, pieces) = write.failed.as_ref().expect("the write has failed");
        let (code, block) = (*code, write.block);
        if failed {
            let (first, count) = pieces[piece as usize];
            for (page, at) in (first..first + count).map(place) {
                self.map.modify(page).distrust(at);
            }
        }
        if op.ios > 0 {
            self.ops.insert(id, op);
        } else {
            self.fail(op, code, block.0, out);
        }
    }

    pub(super) fn zero(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let zero = body!(op, Zero);
        if !self.in_range(zero.block, zero.count.into()) || zero.count > MAX_DISCARD_BLOCKS {
            return self.fail(op, Code::Invalid, 0, out);
        }
        // Where there is no map page nothing is allocated, and nothing changes.
        let (first, last) = regions_of(zero.block, zero.count.into());
        let regions: Vec<u32> =
            (first..=last).filter(|r| self.regions.present.get(u64::from(*r) / MAP_REGIONS)).collect();
        regions.iter().for_each(|region| self.regions.begin_change(*region));
        op.changing = Changing::List(regions);
        self.advance_zero(id, op, out);
    }

    pub(super) fn advance_zero(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let Changing::List(regions) = &op.changing else {
            // It only waits for its flush.
            self.ops.insert(id, op);
            return;
        };
        if op.ios > 0 {
            self.ops.insert(id, op);
            return;
        }
        let regions: Vec<u64> = regions.iter().map(|r| u64::from(*r)).collect();
        let zero = body!(op, Zero);
        if !zero.begun {
            if !self.may_change_or_wait(regions.iter().copied(), false, Waiter::Op(id)) {
                self.ops.insert(id, op);
                return;
            }
            zero.begun = true;
        }
        let begun = zero.punched.len();
        while zero.done < u64::from(zero.count) {
            let block = zero.block.0 + zero.done;
            let (page, at) = place(block);
            let n = (u64::from(zero.count) - zero.done).min(MAP_BLOCKS - at as u64);
            let counted = regions.binary_search_by(|r| (*r / MAP_REGIONS).cmp(&page)).is_ok();
            if !counted {
                // It had no map page when this began, so it holds nothing that is to be zeroed.
                zero.done += n;
                continue;
            }
            if !self.map_or_wait(BlockIndex(block), n, id, out) {
                // Whatever comes meanwhile, what the map has for zeroes is on its way to be freed.
                let (from, to) = std::mem::take(&mut zero.punch);
                op.ios += begin_punch(zero, from, to);
                return self.punch_begun(id, op, begun, out);
            }
            let map = self.map.get(page).expect("the map page is in memory");
            let in_use = |i: &usize| map.is_allocated(*i) || map.is_unverified(*i);
            if (at..at + n as usize).any(|i| in_use(&i)) {
                zero.fua |= (at..at + n as usize).any(|i| map.is_disowned(i));
                // From here on the blocks read as zeroes; the punch only frees their space.
                let map = self.map.modify(page);
                (at..at + n as usize).for_each(|i| map.clear(i));
                op.touched = true;
                let (from, to) = zero.punch;
                if to == block && block + n - from <= MAX_PUNCH_BLOCKS {
                    zero.punch = (from, block + n);
                } else {
                    zero.punch = (block, block + n);
                    op.ios += begin_punch(zero, from, to);
                }
            }
            zero.done += n;
        }
        let (from, to) = std::mem::take(&mut zero.punch);
        op.ios += begin_punch(zero, from, to);
        if op.ios > 0 {
            self.punch_begun(id, op, begun, out);
        } else {
            self.zeroed(id, op, out);
        }
    }

    /// Gives the punches that were begun, from number `begun` on, to the disk.
    fn punch_begun(&mut self, id: u64, mut op: Op, begun: usize, out: &mut Vec<Output>) {
        let punches = body!(op, Zero).punched[begun..].to_vec();
        self.ops.insert(id, op);
        for (i, (from, to)) in (begun..).zip(punches) {
            self.punch(id, i as u32, from, to, out);
        }
    }

    /// Frees the blocks `from..to`.
    fn punch(&mut self, id: u64, piece: u32, from: u64, to: u64, out: &mut Vec<Output>) {
        let punch = DiskIo::Punch { offset: from * BLOCK_SIZE, len: (to - from) * BLOCK_SIZE };
        self.disk(Io::Op { op: id, piece }, punch, out);
    }

    pub(super) fn punch_done(
        &mut self,
        id: u64,
        mut op: Op,
        piece: u32,
        result: Result<DiskData, DiskError>,
        out: &mut Vec<Output>,
    ) {
        let zero = body!(op, Zero);
        self.flush.data_written = true;
        match result {
            Ok(_) => {}
            Err(error) if piece == ZERO_WRITE => {
                let code = if error == DiskError::NoSpace { Code::NoSpace } else { Code::WriteFailed };
                zero.failed.get_or_insert(code);
                out.push(Output::Notice(Notice::WriteFailed { block: zero.block, error }));
            }
            Err(_) => {
                // The space stays taken. The old bytes must go all the same (see `map`).
                let (from, to) = zero.punched[piece as usize];
                out.push(Output::Notice(Notice::PunchFailed { block: BlockIndex(from) }));
                for from in (from..to).step_by(MAX_REQUEST_BLOCKS as usize) {
                    let count = (to - from).min(MAX_REQUEST_BLOCKS.into());
                    let bytes = Bytes::from_static(&ZEROES[..(count * BLOCK_SIZE) as usize]);
                    let write = DiskIo::Write { file: FileKind::Data, offset: from * BLOCK_SIZE, bytes };
                    self.disk(Io::Op { op: id, piece: ZERO_WRITE }, write, out);
                    op.ios += 1;
                }
            }
        }
        let zero = body!(op, Zero);
        if op.ios > 0 {
            self.ops.insert(id, op);
        } else if op.ended {
            self.release(&mut op);
        } else if zero.done < u64::from(zero.count) {
            self.advance_zero(id, op, out);
        } else {
            self.zeroed(id, op, out);
        }
    }

    fn zeroed(&mut self, id: u64, mut op: Op, out: &mut Vec<Output>) {
        let zero = body!(op, Zero);
        if let Some(code) = zero.failed {
            let block = zero.block.0;
            return self.fail(op, code, block, out);
        }
        // Also where nothing was in use any more: what freed it may not be durable.
        if zero.fua {
            self.end_changes(&mut op);
            return self.flush_write(id, op);
        }
        let done = Reply::Done(op.kind);
        self.finish(op, done, out);
    }
}
