//! A small device in memory, whose requests end when and how an input says; and SCSI commands against it.

use std::collections::BTreeMap;

use bytes::Bytes;
use client::block::{BlockOutcome, BlockRequest, DeviceInfo, DeviceState, SECTOR};
use client::scsi::cdb::COMMANDS;
use client::scsi::sense::Key;
use client::scsi::status;
use client::scsi::unit::{self, Nexus, Reply, Start, Step};

use super::source::{Seen, Source};
use crate::sim::rng::Rng;

/// Bytes of the device: more than the longest transfer.
pub const BYTES: u64 = 6 << 20;
/// What one command and the device may hold: its data, what it compares with, and the device's pages.
pub const MEMORY: usize = (BYTES as usize) + (8 << 20);
const PAGE: u64 = 64 << 10;
/// Requests that one command may lead to: UNMAP's descriptors, and pieces of everything.
const MAX_STEPS: usize = 600;

pub fn info() -> DeviceInfo {
    let id = uuid::Uuid::from_u128(7);
    DeviceInfo { id, name: "tank".into(), bytes: BYTES, chunk: 256 << 10, write_cache: true }
}

pub fn state() -> DeviceState {
    DeviceState { power_on: 0, capacity: 0, gone: false }
}

/// See the module.
#[derive(Default)]
pub struct Unit {
    pages: BTreeMap<u64, Box<[u8]>>,
    /// Shared by all pieces that read as zeroes.
    zeroes: Bytes,
}

impl Unit {
    pub fn new() -> Self {
        Self { pages: BTreeMap::new(), zeroes: vec![0; PAGE as usize].into() }
    }

    /// Carries a request out.
    ///
    /// # Panics
    /// When the request breaks what `client::block` promises.
    pub fn perform(&mut self, request: &BlockRequest) -> BlockOutcome {
        let (offset, len) = match request {
            BlockRequest::Read { offset, len } => (*offset, u64::from(*len)),
            BlockRequest::Write { offset, data, .. } => (*offset, data.len() as u64),
            BlockRequest::Discard { offset, len } | BlockRequest::WriteZeroes { offset, len, .. } => (*offset, *len),
            BlockRequest::Flush => return BlockOutcome::Done(vec![]),
        };
        assert!(offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR), "{offset}, {len}: no whole sectors");
        assert!(offset.checked_add(len).is_some_and(|end| end <= BYTES), "{offset}, {len}: past the end");
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let (page, from) = (at / PAGE, (at % PAGE) as usize);
            let part = (PAGE - at % PAGE).min(offset + len - at);
            let to = from + part as usize;
            match request {
                BlockRequest::Read { .. } => pieces.push(match self.pages.get(&page) {
                    Some(page) => Bytes::copy_from_slice(&page[from..to]),
                    None => self.zeroes.slice(from..to),
                }),
                BlockRequest::Write { data, .. } => {
                    let done = (at - offset) as usize;
                    let page = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
                    page[from..to].copy_from_slice(&data[done..done + part as usize]);
                }
                _ => {
                    if let Some(page) = self.pages.get_mut(&page) {
                        page[from..to].fill(0);
                    }
                }
            }
            at += part;
        }
        BlockOutcome::Done(pieces)
    }

    /// As [`Self::perform`], but now and then the device fails.
    pub fn perhaps(&mut self, rng: &mut Rng, request: &BlockRequest) -> BlockOutcome {
        let offset = match request {
            BlockRequest::Read { offset, .. } | BlockRequest::Write { offset, .. } => *offset,
            _ => 0,
        };
        match rng.below(100) {
            0 => BlockOutcome::Medium { offset },
            1 if !matches!(request, BlockRequest::Read { .. }) => BlockOutcome::WriteFailed,
            2 if !matches!(request, BlockRequest::Read { .. }) => BlockOutcome::NoSpace,
            _ => self.perform(request),
        }
    }
}

/// What holds for every answer.
pub fn check_reply(reply: &Reply, data_in: u32) {
    assert_eq!(reply.status == status::CHECK_CONDITION, reply.sense.is_some(), "{reply:?}");
    let most = u64::from(data_in).max(u64::from(u16::MAX));
    assert!(reply.len() <= most, "{} bytes, at most {most}", reply.len());
    if let Some(sense) = &reply.sense {
        assert!(reply.is_empty() && sense.fixed().len() == 18 && sense.descriptor().len() <= 252);
    }
}

/// A seed for the device, then commands: LUN, CDB, data with its length. A first byte of the CDB above the known ones
/// stands for a row of the table, so that few inputs end at the operation code.
pub fn run(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let mut rng = Rng::new(source.u8().into());
    let mut unit = Unit::new();
    let mut nexus = Nexus::new(state());
    let mut commands = 0;
    while !source.is_empty() && commands < 64 {
        commands += 1;
        let flags = source.u8();
        let lun = match flags & 7 {
            0 => u64::from(source.u8()) << 48,
            1 => 0x4000 << 48,
            2 => source.u64(),
            _ => 0,
        };
        let mut cdb: [u8; 16] = source.array();
        if cdb[0] >= 0xc0 {
            let row = &COMMANDS[usize::from(cdb[0]) % COMMANDS.len()];
            cdb[0] = row.opcode;
            if let Some(action) = row.action {
                cdb[1] = action as u8;
            }
            if flags & 8 != 0 {
                cdb.iter_mut().zip(row.usage).for_each(|(byte, usage)| *byte &= usage);
            }
        }
        let data = source.item();
        if flags & 16 != 0 {
            nexus.update(DeviceState { power_on: u64::from(flags >> 5), ..state() });
        }
        let reply = match unit::start(&cdb, lun, &mut nexus, &info(), "iqn.2026-11.io.md99:tank") {
            Start::Reply(reply) => {
                check_reply(&reply, 0);
                reply
            }
            Start::Run(mut operation) => {
                let (wanted, data_in) = (operation.data_out() as usize, operation.data_in());
                assert!(wanted <= 4 << 20 && data_in <= 4 << 20, "{wanted} and {data_in} bytes");
                // As much as there is, or all that is wanted, repeated: both happen.
                let data: Bytes = match flags & 0x80 {
                    0 => Bytes::copy_from_slice(&data[..data.len().min(wanted)]),
                    _ if data.is_empty() => vec![0; wanted].into(),
                    _ => data.iter().copied().cycle().take(wanted).collect::<Vec<_>>().into(),
                };
                let mut step = operation.start(data);
                let mut steps = 0;
                loop {
                    match step {
                        Step::Submit(request) => {
                            steps += 1;
                            assert!(steps <= MAX_STEPS, "{cdb:02x?} leads to more than {MAX_STEPS} requests");
                            seen.note((cdb[0], std::mem::discriminant(&request)));
                            step = operation.outcome(unit.perhaps(&mut rng, &request));
                        }
                        Step::Finish(reply) => {
                            check_reply(&reply, data_in);
                            let illegal = reply.sense.is_some_and(|sense| sense.key == Key::IllegalRequest);
                            assert!(!illegal || steps == 0, "{cdb:02x?}: refused after it had an effect");
                            break reply;
                        }
                    }
                }
            }
        };
        seen.note((
            cdb[0],
            cdb[1] & 0x1f,
            reply.status,
            reply.sense.map(|s| (s.key as u8, s.code, s.field.map(|f| f.byte))),
        ));
    }
}

/// One command of an input.
fn command(cdb: &[u8], data: &[u8]) -> Vec<u8> {
    let mut item = vec![0x87];
    item.extend_from_slice(cdb);
    item.resize(17, 0);
    item.extend_from_slice(&(data.len() as u16).to_le_bytes());
    item.extend_from_slice(data);
    item
}

/// CDBs with their data, for here and for iSCSI.
pub fn examples() -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
    list.extend([0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0]);
    list.extend([0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 1, 0, 0, 0, 0]);
    let caching = [&[0, 0, 0, 0, 0x08, 0x12, 0x04][..], &[0; 17]].concat();
    let caching_long = [&[0, 0, 0, 0, 0, 0, 0, 8][..], &[0; 8], &[0x08, 0x12, 0x04], &[0; 17]].concat();
    let mut examples = vec![
        (vec![0x2a, 0, 0, 0, 0, 8, 0, 0, 2, 0], vec![7; 1024]),
        (vec![0x2f, 2, 0, 0, 0, 8, 0, 0, 2, 0], vec![7; 1024]),
        (vec![0xaf, 6, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0], vec![7; 512]),
        (vec![0x2e, 2, 0, 0, 0, 0, 0, 0, 1, 0], vec![9; 512]),
        (vec![0x41, 0, 0, 0, 0, 0, 0, 0x10, 0, 0], vec![3; 512]),
        (vec![0x93, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0], vec![0; 512]),
        (vec![0x93, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0], vec![]),
        (vec![0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], list),
        (vec![0x15, 0x10, 0, 0, caching.len() as u8, 0], caching),
        (vec![0x55, 0x10, 0, 0, 0, 0, 0, 0, caching_long.len() as u8, 0], caching_long),
        (vec![0x12, 1, 0xb0, 0, 64, 0], vec![]),
        (vec![0x12, 1, 0x83, 1, 0, 0], vec![]),
        (vec![0x1a, 0, 0x3f, 0, 0xff, 0], vec![]),
        (vec![0x5a, 0x10, 0x3f, 0xff, 0, 0, 0, 1, 0, 0], vec![]),
        (vec![0x88, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0x20, 0, 0, 0], vec![]),
        (vec![0x8f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0], vec![]),
    ];
    examples.extend(COMMANDS.iter().map(|row| {
        let mut cdb = vec![0; row.usage.len()];
        cdb[0] = row.opcode;
        if let Some(action) = row.action {
            cdb[1] = action as u8;
        }
        let allocation = row.usage.len() - 3;
        if row.opcode & 0xe0 != 0x80 || row.action.is_some() {
            cdb[allocation] = row.usage[allocation];
        }
        (cdb, vec![])
    }));
    examples
}

pub fn seeds() -> Vec<Vec<u8>> {
    let ready = command(&[0], &[]);
    let one = |(cdb, data): &(Vec<u8>, Vec<u8>)| [vec![1], ready.clone(), command(cdb, data)].concat();
    let mut seeds: Vec<Vec<u8>> = examples().iter().map(one).collect();
    let all = examples().iter().flat_map(|(cdb, data)| command(cdb, data)).collect::<Vec<_>>();
    seeds.push([vec![2], all].concat());
    seeds
}

pub fn records(input: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 1;
    while at < input.len() {
        starts.push(at);
        let lun = match input[at] & 7 {
            0 => 1,
            2 => 8,
            _ => 0,
        };
        let len = at + 1 + lun + 16;
        let Some(bytes) = input.get(len..len + 2) else { break };
        at = len + 2 + usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    }
    starts
}
