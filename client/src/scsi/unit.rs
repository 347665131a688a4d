//! The logical unit: what each command does. [`start`] checks a command and answers it, or gives an [`Operation`] that
//! asks the device for one thing at a time. Every check comes before any effect.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::cdb::{self, COMMANDS, Check, Command, Extent};
use super::sense::{Key, Sense};
use super::{inquiry, mode, status};
use crate::block::{BlockOutcome, BlockRequest, DeviceInfo, DeviceState, SECTOR};

/// The most blocks that READ, WRITE, WRITE AND VERIFY and comparing VERIFY take: 4 MiB. Longer ones are refused
/// (VPD B0h tells initiators).
pub const MAX_TRANSFER_BLOCKS: u32 = 8192;
/// The most blocks that one UNMAP takes, all descriptors together: 512 MiB.
pub const MAX_UNMAP_BLOCKS: u32 = 1024 * 1024;
/// The most descriptors that one UNMAP takes.
pub const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// The most blocks that one WRITE SAME takes: not quite 32 MiB, since a pattern is written in full.
pub const MAX_WRITE_SAME_BLOCKS: u32 = 65_528;
/// Logical blocks in a physical one: the device works in 4 KiB.
pub const BLOCKS_PER_PHYSICAL: u32 = 8;
/// VERIFY reads, and WRITE SAME writes a pattern, in pieces of so many bytes.
pub const PIECE: u32 = 512 * 1024;
/// Unit attentions that wait for one nexus; further ones of the same kind are the same.
const MAX_ATTENTIONS: usize = 8;

const _: () = assert!(PIECE.is_multiple_of(4096) && MAX_TRANSFER_BLOCKS as u64 * SECTOR <= 4 << 20);

/// The answer to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// SCSI status.
    pub status: u8,
    /// With CHECK CONDITION.
    pub sense: Option<Sense>,
    /// Data for the initiator, in order.
    pub data: Vec<Bytes>,
}

impl Reply {
    /// GOOD, with data.
    pub fn good(data: Vec<Bytes>) -> Self {
        Reply { status: status::GOOD, sense: None, data }
    }

    /// CHECK CONDITION.
    pub fn check(sense: Sense) -> Self {
        Reply { status: status::CHECK_CONDITION, sense: Some(sense), data: vec![] }
    }

    fn bytes(mut data: Vec<u8>, allocation: u32) -> Self {
        data.truncate(allocation as usize);
        Reply::good(vec![data.into()])
    }

    /// Bytes of data.
    pub fn len(&self) -> u64 {
        self.data.iter().map(|piece| piece.len() as u64).sum()
    }

    /// Whether there is no data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Unit attentions of one I_T nexus (SAM-5 §5.14): each is told once, with the next command.
#[derive(Clone, Debug)]
pub struct Nexus {
    attentions: VecDeque<Sense>,
    seen: DeviceState,
}

impl Nexus {
    /// A nexus that begins now.
    pub fn new(state: DeviceState) -> Self {
        Nexus { attentions: VecDeque::from([Sense::NEW_NEXUS]), seen: state }
    }

    /// Something happened.
    pub fn attention(&mut self, sense: Sense) {
        if !self.attentions.contains(&sense) && self.attentions.len() < MAX_ATTENTIONS {
            self.attentions.push_back(sense);
        }
    }

    /// The device's state may have changed.
    pub fn update(&mut self, state: DeviceState) {
        if state.power_on != self.seen.power_on {
            // A power on swallows what was before it (SAM-5 §5.14.1).
            self.attentions.clear();
            self.attention(Sense::POWER_ON);
        }
        if state.capacity != self.seen.capacity {
            self.attention(Sense::CAPACITY_CHANGED);
        }
        self.seen = state;
    }
}

/// What a command leads to.
#[derive(Debug)]
pub enum Start {
    /// It is answered.
    Reply(Reply),
    /// It needs data from the initiator, or the device.
    Run(Operation),
}

/// What an operation wants next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// This done by the device; its outcome goes to [`Operation::outcome`].
    Submit(BlockRequest),
    /// Nothing more: this is the answer.
    Finish(Reply),
}

/// A command that is being carried out.
#[derive(Debug)]
pub struct Operation {
    kind: Kind,
    blocks: u64,
}

#[derive(Debug)]
enum Kind {
    Read(Extent),
    Write { extent: Extent, fua: bool, check: Option<Check>, written: Option<Bytes> },
    Verify { extent: Extent, check: Check, data: Bytes, done: u64 },
    Flush,
    Unmap { len: u32, rest: VecDeque<Extent> },
    WriteSame { extent: Extent, unmap: bool, no_data: bool, pattern: Bytes, done: u64 },
    ModeSelect { info: DeviceInfo, long: bool, len: u32 },
}

/// Whether a LUN in SAM's 8-byte form is ours: 0 by peripheral or by flat addressing (SAM-5 §4.7).
pub fn is_lun_zero(lun: u64) -> bool {
    lun == 0 || lun == 0x4000 << 48
}

/// Begins a command.
pub fn start(cdb: &[u8; 16], lun: u64, nexus: &mut Nexus, info: &DeviceInfo, iqn: &str) -> Start {
    let present = is_lun_zero(lun);
    let command = Command::parse(cdb);
    // SAM-5 §5.14.4: these three do not report a unit attention, and exist on every LUN.
    match &command {
        Ok(Command::Inquiry { page, allocation }) => {
            let data = match page {
                None => Some(inquiry::standard(present)),
                Some(page) => inquiry::vpd(*page, present, info, iqn),
            };
            return Start::Reply(match data {
                Some(data) => Reply::bytes(data, *allocation),
                None => Reply::check(Sense::in_cdb(2)),
            });
        }
        Ok(Command::ReportLuns { select, allocation }) => {
            let count = match select {
                0 | 2 => 1,
                1 => 0, // well-known ones: none
                _ => return Start::Reply(Reply::check(Sense::in_cdb(2))),
            };
            let mut data = vec![0; 8 + 8 * count];
            data[3] = 8 * count as u8;
            return Start::Reply(Reply::bytes(data, *allocation));
        }
        Ok(Command::RequestSense { descriptor, allocation }) => {
            let sense = if present { nexus.attentions.pop_front().unwrap_or(Sense::NONE) } else { Sense::NO_SUCH_LUN };
            let data = if *descriptor { sense.descriptor() } else { sense.fixed().to_vec() };
            return Start::Reply(Reply::bytes(data, *allocation));
        }
        _ => {}
    }
    if !present {
        return Start::Reply(Reply::check(Sense::NO_SUCH_LUN));
    }
    if let Some(sense) = nexus.attentions.pop_front() {
        return Start::Reply(Reply::check(sense));
    }
    match command.and_then(|command| begin(command, info)) {
        Ok(start) => start,
        Err(sense) => Start::Reply(Reply::check(sense)),
    }
}

fn begin(command: Command, info: &DeviceInfo) -> Result<Start, Sense> {
    let blocks = info.bytes / SECTOR;
    let within = |extent: Extent| {
        // An empty extent may begin at the end, and nowhere behind it.
        match extent.lba.checked_add(u64::from(extent.count)) {
            Some(end) if end <= blocks => Ok(()),
            _ => Err(Sense::LBA_OUT_OF_RANGE),
        }
    };
    let transfer = |extent: Extent| {
        within(extent)?;
        if extent.count > MAX_TRANSFER_BLOCKS { Err(Sense::in_cdb(length_at(&command))) } else { Ok(()) }
    };
    let run = |kind| Ok(Start::Run(Operation { kind, blocks }));
    let done = |data, allocation| Ok(Start::Reply(Reply::bytes(data, allocation)));
    match command {
        Command::Inquiry { .. } | Command::ReportLuns { .. } | Command::RequestSense { .. } => {
            unreachable!("answered before")
        }
        Command::TestUnitReady | Command::PreventRemoval => done(vec![], 0),
        Command::StartStop { load_eject, power_condition, start } => {
            // The medium cannot be ejected, and there are no power conditions. A stop leaves nothing in the cache.
            if load_eject || power_condition != 0 {
                Err(Sense::in_cdb(4))
            } else if start {
                done(vec![], 0)
            } else {
                run(Kind::Flush)
            }
        }
        Command::ModeSense { long, no_descriptor, long_lba, control, page, subpage, allocation } => {
            done(mode::sense(info, long, no_descriptor, long_lba, control, page, subpage)?, allocation)
        }
        Command::ModeSelect { save: true, .. } => Err(Sense::in_cdb(1)),
        Command::ModeSelect { long, len, .. } => run(Kind::ModeSelect { info: info.clone(), long, len }),
        Command::ReadCapacity10 => {
            let last = u32::try_from(blocks - 1).unwrap_or(u32::MAX);
            let mut data = last.to_be_bytes().to_vec();
            data.extend((SECTOR as u32).to_be_bytes());
            done(data, 8)
        }
        Command::ReadCapacity16 { allocation } => {
            let mut data = (blocks - 1).to_be_bytes().to_vec();
            data.extend((SECTOR as u32).to_be_bytes());
            // No protection; 2^3 logical blocks per physical; LBPME and LBPRZ; aligned at 0.
            data.extend([0, BLOCKS_PER_PHYSICAL.trailing_zeros() as u8, 0xc0, 0]);
            data.resize(32, 0);
            done(data, allocation)
        }
        Command::GetLbaStatus { lba, allocation } => {
            if lba >= blocks {
                return Err(Sense::LBA_OUT_OF_RANGE);
            }
            // One descriptor of "mapped, or unknown" (SBC-4 §5.7.2.2): the device is not asked what it has allocated.
            // qemu asks for this, and complains to its user where it is refused.
            let mut data = vec![0; 24];
            data[3] = 20;
            data[8..16].copy_from_slice(&lba.to_be_bytes());
            let count = u32::try_from(blocks - lba).unwrap_or(u32::MAX);
            data[16..20].copy_from_slice(&count.to_be_bytes());
            done(data, allocation)
        }
        Command::Read { extent } => {
            transfer(extent)?;
            run(Kind::Read(extent))
        }
        Command::Write { extent, fua } => {
            transfer(extent)?;
            run(Kind::Write { extent, fua, check: None, written: None })
        }
        Command::WriteVerify { extent, check } => {
            transfer(extent)?;
            // To verify the medium, the data must be on it.
            run(Kind::Write { extent, fua: true, check: Some(check), written: None })
        }
        Command::Verify { extent, check } => {
            if check == Check::Bytes { transfer(extent) } else { within(extent) }?;
            run(Kind::Verify { extent, check, data: Bytes::new(), done: 0 })
        }
        Command::SynchronizeCache { extent, immediate: _ } => {
            // Of an immediate one, too, the answer waits: later than allowed is never wrong.
            within(extent)?;
            run(Kind::Flush)
        }
        Command::Unmap { len } => run(Kind::Unmap { len, rest: VecDeque::new() }),
        Command::WriteSame { extent, unmap, no_data } => {
            within(extent)?;
            if extent.count == 0 || extent.count > MAX_WRITE_SAME_BLOCKS {
                return Err(Sense::in_cdb(length_at(&command)));
            }
            run(Kind::WriteSame { extent, unmap, no_data, pattern: Bytes::new(), done: 0 })
        }
        Command::ReportOpcodes { timeouts, options, opcode, action, allocation } => {
            done(report_opcodes(timeouts, options, opcode, action)?, allocation)
        }
        Command::ReportTaskManagement { long, allocation } => {
            // ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET.
            let mut data = vec![0xd8, 0, 0, 0];
            if long {
                data[3] = 12;
                data.resize(16, 0);
            }
            done(data, allocation)
        }
    }
}

/// Where a CDB's transfer length stands, for the field pointer; the larger forms are by far the more common.
fn length_at(command: &Command) -> u16 {
    match command {
        Command::Read { extent } | Command::Write { extent, .. } if extent.count <= u32::from(u16::MAX) => 7,
        _ => 10,
    }
}

fn report_opcodes(timeouts: bool, options: u8, opcode: u8, action: u16) -> Result<Vec<u8>, Sense> {
    const TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    if options == 0 {
        let mut data = vec![0; 4];
        for row in COMMANDS {
            let [high, low] = row.action.unwrap_or(0).to_be_bytes();
            let flags = u8::from(timeouts) << 1 | u8::from(row.action.is_some());
            data.extend([row.opcode, 0, high, low, 0, flags, 0, row.usage.len() as u8]);
            if timeouts {
                data.extend(TIMEOUTS);
            }
        }
        let len = (data.len() - 4) as u32;
        data[..4].copy_from_slice(&len.to_be_bytes());
        return Ok(data);
    }
    let has_actions = COMMANDS.iter().any(|row| row.opcode == opcode && row.action.is_some());
    let known = COMMANDS.iter().any(|row| row.opcode == opcode);
    let row = match options {
        1 if has_actions => return Err(Sense::in_cdb(2)),
        2 if known && !has_actions => return Err(Sense::in_cdb(2)),
        1 => cdb::find(opcode, 0),
        2 => cdb::find(opcode, action),
        3 if has_actions || action == 0 => cdb::find(opcode, action),
        3 => None,
        _ => return Err(Sense::in_cdb(2)),
    };
    let Some(row) = row else { return Ok(vec![0, 1, 0, 0]) };
    let mut data = vec![0, 3 | u8::from(timeouts) << 7, 0, row.usage.len() as u8];
    data.extend(row.usage);
    if timeouts {
        data.extend(TIMEOUTS);
    }
    Ok(data)
}

/// Status and sense of a request that the device did not do; `None` for one that it did. The one place where device
/// outcomes become SCSI.
pub fn failure(outcome: &BlockOutcome) -> Option<Reply> {
    let sense = match outcome {
        BlockOutcome::Done(_) => return None,
        BlockOutcome::Medium { offset } => Sense::medium(offset / SECTOR),
        BlockOutcome::WriteFailed => Sense::WRITE_FAILED,
        BlockOutcome::NoSpace => Sense::NO_SPACE,
        BlockOutcome::Aborted => Sense::new(Key::AbortedCommand, 0),
    };
    Some(Reply::check(sense))
}

impl Operation {
    /// Bytes that the initiator must send.
    pub fn data_out(&self) -> u32 {
        let bytes = |extent: &Extent| extent.count * SECTOR as u32;
        match &self.kind {
            Kind::Write { extent, .. } | Kind::Verify { extent, check: Check::Bytes, .. } => bytes(extent),
            Kind::Verify { extent, check: Check::OneBlock, .. } if extent.count > 0 => SECTOR as u32,
            Kind::Unmap { len, .. } | Kind::ModeSelect { len, .. } => *len,
            Kind::WriteSame { no_data: false, .. } => SECTOR as u32,
            _ => 0,
        }
    }

    /// Whether the initiator must announce exactly [`data_out`](Self::data_out) bytes. Others may announce more, which
    /// is a residual.
    pub fn is_exact(&self) -> bool {
        matches!(self.kind, Kind::WriteSame { .. })
    }

    /// Bytes that the initiator will be sent, if all goes well.
    pub fn data_in(&self) -> u32 {
        match &self.kind {
            Kind::Read(extent) => extent.count * SECTOR as u32,
            _ => 0,
        }
    }

    /// Begins, with the initiator's data. That may be less than [`data_out`](Self::data_out) if the initiator said so
    /// (an expected length that is too small): then whole blocks of what came are written, and the rest is not.
    pub fn start(&mut self, data: Bytes) -> Step {
        let complete = data.len() >= self.data_out() as usize;
        match &mut self.kind {
            Kind::Read(extent) if extent.count == 0 => Step::Finish(Reply::good(vec![])),
            Kind::Read(extent) => {
                Step::Submit(BlockRequest::Read { offset: extent.lba * SECTOR, len: extent.count * SECTOR as u32 })
            }
            Kind::Write { extent, fua, written, .. } => {
                let whole = data.len() - data.len() % SECTOR as usize;
                let data = data.slice(..whole);
                extent.count = (whole / SECTOR as usize) as u32;
                if whole == 0 {
                    return Step::Finish(Reply::good(vec![]));
                }
                *written = Some(data.clone());
                Step::Submit(BlockRequest::Write { offset: extent.lba * SECTOR, data, fua: *fua })
            }
            Kind::Verify { extent, check, data: expected, .. } => {
                if *check == Check::Bytes {
                    extent.count = extent.count.min((data.len() / SECTOR as usize) as u32);
                } else if !complete {
                    return Step::Finish(Reply::check(Sense::PARAMETER_LENGTH));
                }
                *expected = data;
                self.verify_next()
            }
            Kind::Flush => Step::Submit(BlockRequest::Flush),
            Kind::Unmap { rest, .. } => match unmap_list(&data, self.blocks) {
                Ok(list) => {
                    *rest = list;
                    self.unmap_next()
                }
                Err(sense) => Step::Finish(Reply::check(sense)),
            },
            Kind::WriteSame { extent, unmap, no_data, pattern, .. } => {
                if !complete {
                    return Step::Finish(Reply::check(Sense::PARAMETER_LENGTH));
                }
                let (offset, len) = (extent.lba * SECTOR, u64::from(extent.count) * SECTOR);
                if *no_data || data.iter().all(|&b| b == 0) {
                    return Step::Submit(match *unmap {
                        true => BlockRequest::Discard { offset, len },
                        false => BlockRequest::WriteZeroes { offset, len, fua: false },
                    });
                }
                // UNMAP with a pattern that unmapped blocks do not read as: the pattern is written (SBC-4 §5.50).
                let mut piece = BytesMut::with_capacity(len.min(u64::from(PIECE)) as usize);
                while (piece.len() as u64) < len.min(u64::from(PIECE)) {
                    piece.extend_from_slice(&data[..SECTOR as usize]);
                }
                *pattern = piece.freeze();
                self.pattern_next()
            }
            Kind::ModeSelect { info, long, .. } => {
                if !complete {
                    return Step::Finish(Reply::check(Sense::PARAMETER_LENGTH));
                }
                Step::Finish(match mode::select(info, *long, &data) {
                    Ok(()) => Reply::good(vec![]),
                    Err(sense) => Reply::check(sense),
                })
            }
        }
    }

    /// Goes on after what was submitted has ended.
    pub fn outcome(&mut self, outcome: BlockOutcome) -> Step {
        if let Some(reply) = failure(&outcome) {
            return Step::Finish(reply);
        }
        let BlockOutcome::Done(pieces) = outcome else { unreachable!("failures are told above") };
        match &mut self.kind {
            Kind::Read(extent) => {
                let got: u64 = pieces.iter().map(|p| p.len() as u64).sum();
                let asked = u64::from(extent.count) * SECTOR;
                assert_eq!(got, asked, "the device answered a read of {asked} bytes with {got}");
                Step::Finish(Reply::good(pieces))
            }
            Kind::Write { check: None, .. } | Kind::Flush | Kind::ModeSelect { .. } => {
                Step::Finish(Reply::good(vec![]))
            }
            Kind::Write { extent, check: Some(check), written, .. } => {
                let data = written.take().expect("kept when it was submitted");
                self.kind = Kind::Verify { extent: *extent, check: *check, data, done: 0 };
                self.verify_next()
            }
            Kind::Verify { extent, check, data, done } => {
                let from = *done;
                let mut at = from;
                for piece in &pieces {
                    let differs = match check {
                        Check::Medium => None,
                        Check::Bytes => first_difference(piece, &data[at as usize..]),
                        Check::OneBlock => piece
                            .iter()
                            .enumerate()
                            .find_map(|(i, b)| (*b != data[(at as usize + i) % SECTOR as usize]).then_some(i)),
                    };
                    if let Some(differs) = differs {
                        // SBC-4 §5.36: INFORMATION is the offset in the data-out buffer of the first difference.
                        let information = Some(at + differs as u64);
                        return Step::Finish(Reply::check(Sense { information, ..Sense::MISCOMPARE }));
                    }
                    at += piece.len() as u64;
                }
                let _ = extent;
                *done = at;
                assert!(at > from, "the device answered a read of a VERIFY with nothing");
                self.verify_next()
            }
            Kind::Unmap { .. } => self.unmap_next(),
            Kind::WriteSame { pattern, .. } if pattern.is_empty() => Step::Finish(Reply::good(vec![])),
            Kind::WriteSame { done, extent, .. } => {
                let all = u64::from(extent.count) * SECTOR;
                *done = (*done + u64::from(PIECE)).min(all);
                self.pattern_next()
            }
        }
    }

    fn verify_next(&mut self) -> Step {
        let Kind::Verify { extent, done, .. } = &self.kind else { unreachable!("verifying") };
        let left = u64::from(extent.count) * SECTOR - done;
        if left == 0 {
            return Step::Finish(Reply::good(vec![]));
        }
        let len = left.min(u64::from(PIECE)) as u32;
        Step::Submit(BlockRequest::Read { offset: extent.lba * SECTOR + done, len })
    }

    fn pattern_next(&mut self) -> Step {
        let Kind::WriteSame { extent, pattern, done, .. } = &self.kind else { unreachable!("writing a pattern") };
        let left = u64::from(extent.count) * SECTOR - done;
        if left == 0 {
            return Step::Finish(Reply::good(vec![]));
        }
        let data = pattern.slice(..left.min(u64::from(PIECE)) as usize);
        Step::Submit(BlockRequest::Write { offset: extent.lba * SECTOR + done, data, fua: false })
    }

    fn unmap_next(&mut self) -> Step {
        let Kind::Unmap { rest, .. } = &mut self.kind else { unreachable!("unmapping") };
        match rest.pop_front() {
            Some(extent) => Step::Submit(BlockRequest::Discard {
                offset: extent.lba * SECTOR,
                len: u64::from(extent.count) * SECTOR,
            }),
            None => Step::Finish(Reply::good(vec![])),
        }
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if b.len() >= a.len() && a == &b[..a.len()] {
        return None;
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// The extents of an UNMAP parameter list (SBC-4 §5.35.2), checked all together; empty ones are left out.
fn unmap_list(list: &[u8], blocks: u64) -> Result<VecDeque<Extent>, Sense> {
    if list.is_empty() {
        return Ok(VecDeque::new());
    }
    let Some(header) = list.get(..8) else { return Err(Sense::PARAMETER_LENGTH) };
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let descriptors = &list[8..(8 + len).min(list.len())];
    let mut extents = VecDeque::new();
    let mut total = 0_u64;
    for (i, d) in descriptors.chunks_exact(16).enumerate() {
        if i as u32 >= MAX_UNMAP_DESCRIPTORS {
            return Err(Sense::in_list(2));
        }
        let extent = Extent {
            lba: u64::from_be_bytes(d[..8].try_into().expect("8 bytes")),
            count: u32::from_be_bytes(d[8..12].try_into().expect("4 bytes")),
        };
        if extent.lba.checked_add(u64::from(extent.count)).is_none_or(|end| end > blocks) {
            return Err(Sense::LBA_OUT_OF_RANGE);
        }
        total += u64::from(extent.count);
        if total > u64::from(MAX_UNMAP_BLOCKS) {
            return Err(Sense::in_list(8 + 16 * i as u16 + 8));
        }
        if extent.count > 0 {
            extents.push_back(extent);
        }
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info() -> DeviceInfo {
        DeviceInfo {
            id: uuid::Uuid::from_u128(1),
            name: "tank".into(),
            bytes: 1 << 30,
            chunk: 256 * 1024,
            write_cache: true,
        }
    }

    const STATE: DeviceState = DeviceState { power_on: 0, capacity: 0, gone: false };

    fn nexus() -> Nexus {
        let mut nexus = Nexus::new(STATE);
        nexus.attentions.clear();
        nexus
    }

    fn cdb(bytes: &[u8]) -> [u8; 16] {
        let mut cdb = [0; 16];
        cdb[..bytes.len()].copy_from_slice(bytes);
        cdb
    }

    fn begin(bytes: &[u8]) -> Start {
        start(&cdb(bytes), 0, &mut nexus(), &info(), "iqn.x")
    }

    fn reply(bytes: &[u8]) -> Reply {
        match begin(bytes) {
            Start::Reply(reply) => reply,
            Start::Run(operation) => panic!("{operation:?}"),
        }
    }

    fn operation(bytes: &[u8]) -> Operation {
        match begin(bytes) {
            Start::Run(operation) => operation,
            Start::Reply(reply) => panic!("{reply:?}"),
        }
    }

    #[test]
    fn ranges_and_lengths_are_checked_before_any_effect() {
        let last = (1u32 << 21).to_be_bytes(); // one behind the last block
        let [a, b, c, d] = last;
        for (bytes, sense) in [
            (vec![0x28, 0, a, b, c, d, 0, 0, 1, 0], Sense::LBA_OUT_OF_RANGE),
            (vec![0x2a, 0, a, b, c, d, 0, 0, 1, 0], Sense::LBA_OUT_OF_RANGE),
            (vec![0x35, 0, a, b, c, d, 0, 0, 1, 0], Sense::LBA_OUT_OF_RANGE),
            (vec![0x41, 0, a, b, c, d, 0, 0, 1, 0], Sense::LBA_OUT_OF_RANGE),
            (vec![0x28, 0, 0, 0, 0, 0, 0, 0x20, 1, 0], Sense::in_cdb(7)),
            (vec![0x93, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], Sense::in_cdb(10)),
            (vec![0x88, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 0, 0], Sense::LBA_OUT_OF_RANGE),
        ] {
            assert_eq!(reply(&bytes), Reply::check(sense), "{bytes:02x?}");
        }
    }

    #[test]
    fn a_unit_attention_is_told_once_and_not_by_inquiry() {
        let mut nexus = Nexus::new(STATE);
        let ask = |bytes: &[u8], nexus: &mut Nexus| match start(&cdb(bytes), 0, nexus, &info(), "iqn.x") {
            Start::Reply(reply) => reply.sense,
            Start::Run(operation) => panic!("{operation:?}"),
        };
        assert_eq!(ask(&[0x12, 0, 0, 0, 96, 0], &mut nexus), None);
        assert_eq!(ask(&[0x00], &mut nexus), Some(Sense::NEW_NEXUS));
        assert_eq!(ask(&[0x00], &mut nexus), None);
        nexus.update(DeviceState { capacity: 1, ..STATE });
        nexus.update(DeviceState { capacity: 1, power_on: 1, gone: false });
        assert_eq!(ask(&[0x00], &mut nexus), Some(Sense::POWER_ON));
        assert_eq!(ask(&[0x00], &mut nexus), None);
        nexus.update(DeviceState { capacity: 2, power_on: 1, gone: false });
        assert_eq!(ask(&[0x00], &mut nexus), Some(Sense::CAPACITY_CHANGED));
    }

    #[test]
    fn another_lun_does_not_exist() {
        let ask = |bytes: &[u8]| match start(&cdb(bytes), 1 << 48, &mut nexus(), &info(), "iqn.x") {
            Start::Reply(reply) => reply,
            Start::Run(operation) => panic!("{operation:?}"),
        };
        assert_eq!(ask(&[0x00]).sense, Some(Sense::NO_SUCH_LUN));
        assert_eq!(ask(&[0x12, 0, 0, 0, 96, 0]).data[0][0], 0x7f);
        assert_eq!(ask(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).data[0].len(), 16);
        assert_eq!(ask(&[0x03, 0, 0, 0, 18, 0]).data[0][12], 0x25);
    }

    #[test]
    fn write_same_chooses_by_what_the_block_holds() {
        let sixteen = |flags| [0x93, flags, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 8, 0, 0, 0];
        let zero = Bytes::from(vec![0; 512]);
        let len = 2048 * 512;
        let mut plain = operation(&sixteen(0));
        assert_eq!(
            plain.start(zero.clone()),
            Step::Submit(BlockRequest::WriteZeroes { offset: 4096, len, fua: false })
        );
        assert_eq!(operation(&sixteen(8)).start(zero), Step::Submit(BlockRequest::Discard { offset: 4096, len }));
        assert_eq!(operation(&sixteen(9)).data_out(), 0);
        let mut pattern = operation(&sixteen(8));
        let mut step = pattern.start(Bytes::from(vec![7; 512]));
        let mut offsets = vec![];
        while let Step::Submit(BlockRequest::Write { offset, data, .. }) = step {
            assert!(data.len() as u32 <= PIECE && data.iter().all(|&b| b == 7));
            offsets.push((offset, data.len()));
            step = pattern.outcome(BlockOutcome::Done(vec![]));
        }
        assert_eq!(offsets, [(4096, 512 * 1024), (4096 + 512 * 1024, 512 * 1024)]);
        assert_eq!(step, Step::Finish(Reply::good(vec![])));
    }

    #[test]
    fn verify_compares_and_says_where() {
        let mut verify = operation(&[0x2f, 2, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(verify.data_out(), 1024);
        let step = verify.start(Bytes::from(vec![1; 1024]));
        assert_eq!(step, Step::Submit(BlockRequest::Read { offset: 0, len: 1024 }));
        let mut other = vec![1; 424];
        other[0] = 2;
        let step = verify.outcome(BlockOutcome::Done(vec![vec![1; 600].into(), other.into()]));
        assert_eq!(step, Step::Finish(Reply::check(Sense { information: Some(600), ..Sense::MISCOMPARE })));
    }

    #[test]
    fn outcomes_become_sense_in_one_place() {
        for (outcome, key, code) in [
            (BlockOutcome::Medium { offset: 4096 }, Key::MediumError, 0x1100),
            (BlockOutcome::WriteFailed, Key::HardwareError, 0x4400),
            (BlockOutcome::NoSpace, Key::DataProtect, 0x2707),
            (BlockOutcome::Aborted, Key::AbortedCommand, 0),
        ] {
            let sense = failure(&outcome).unwrap().sense.unwrap();
            assert_eq!((sense.key, sense.code), (key, code));
        }
        assert_eq!(failure(&BlockOutcome::Medium { offset: 4096 }).unwrap().sense.unwrap().information, Some(8));
    }

    #[test]
    fn unmap_checks_the_whole_list_first() {
        let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
        list.extend([0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0]);
        list.extend([0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 1, 0, 0, 0, 0]);
        let mut unmap = operation(&[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0]);
        assert_eq!(unmap.start(list.clone().into()), Step::Submit(BlockRequest::Discard { offset: 4096, len: 4096 }));
        assert_eq!(
            unmap.outcome(BlockOutcome::Done(vec![])),
            Step::Submit(BlockRequest::Discard { offset: 32768, len: 512 })
        );
        assert_eq!(unmap.outcome(BlockOutcome::Done(vec![])), Step::Finish(Reply::good(vec![])));
        list[24] = 0xff; // the second extent is out of range: the first must not be touched
        let mut unmap = operation(&[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0]);
        assert_eq!(unmap.start(list.into()), Step::Finish(Reply::check(Sense::LBA_OUT_OF_RANGE)));
    }

    proptest! {
        #[test]
        fn arbitrary_commands_stay_inside_the_device(
            bytes in proptest::array::uniform16(any::<u8>()),
            row in 0..COMMANDS.len(),
            data in proptest::collection::vec(any::<u8>(), 0..2048),
        ) {
            let mut bytes = bytes;
            for (byte, usage) in bytes.iter_mut().zip(COMMANDS[row].usage) {
                *byte &= usage;
            }
            bytes[0] = COMMANDS[row].opcode;
            if let Some(action) = COMMANDS[row].action {
                bytes[1] = action as u8;
            }
            if let Start::Run(mut operation) = start(&bytes, 0, &mut nexus(), &info(), "iqn.x") {
                let mut step = operation.start(data.into());
                for _ in 0..10 {
                    let Step::Submit(request) = step else { break };
                    let (offset, len) = match &request {
                        BlockRequest::Read { offset, len } => (*offset, u64::from(*len)),
                        BlockRequest::Write { offset, data, .. } => (*offset, data.len() as u64),
                        BlockRequest::Discard { offset, len } | BlockRequest::WriteZeroes { offset, len, .. } => (*offset, *len),
                        BlockRequest::Flush => (0, 0),
                    };
                    prop_assert!(offset.is_multiple_of(512) && len.is_multiple_of(512));
                    prop_assert!(offset + len <= 1 << 30);
                    let pieces = match request {
                        BlockRequest::Read { len, .. } => vec![Bytes::from(vec![0; len as usize])],
                        _ => vec![],
                    };
                    step = operation.outcome(BlockOutcome::Done(pieces));
                }
            }
        }
    }
}
