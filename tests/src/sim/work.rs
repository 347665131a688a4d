//! Initiators: a number of clients, each with one request out, on whichever gateway serves the volume.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use client::block::{BlockOutcome, BlockRequest, SECTOR};
use client::volume::{Ended, SessionInput};
use proto::id::{Epoch, RegionIndex, VolumeId};
use proto::limits::{BLOCK_SIZE, REGION_BLOCKS};

use super::checker::Checker;
use super::history::{Asked, BLOCK_SECTORS, Told, Value, bytes_of, values_of};
use super::net::Party;
use super::world::{Event, MS, Setup, World};

/// Clients; they compete for the same blocks.
const CLIENTS: usize = 14;

/// A request that is out.
#[derive(Clone, Debug)]
pub(super) struct Out {
    pub number: Value,
    gateway: usize,
    volume: VolumeId,
    /// The session's number for it.
    id: u64,
    /// The blocks that it touches.
    blocks: std::ops::Range<u64>,
    /// What a write of whole blocks writes.
    data: Option<Bytes>,
    fua: bool,
    /// The sectors of which a read tells.
    first_sector: u64,
    /// More than one mirror's request: an abort may have found some of it done.
    split: bool,
    moment: u64,
    /// When it was asked for, by its gateway's clock.
    asked_ms: u64,
    /// What was acknowledged before a flush was asked for, and may not be asked for again meanwhile (R9).
    covers: Vec<Covered>,
}

/// A whole-block write that was acknowledged, and nothing has been asked for there since.
#[derive(Clone, Debug)]
pub(super) struct Covered {
    pub number: Value,
    pub block: u64,
    pub data: Bytes,
    moment: u64,
}

/// The initiators' side of a run.
#[derive(Debug)]
pub struct Work {
    pub(super) clients: Vec<Option<Out>>,
    pub issued: u64,
    /// No more requests.
    pub paused: bool,
    /// Initiators send no more than this.
    pub budget: u64,
    /// The last acknowledged writes, while nothing else is asked for where they are.
    settled: Vec<Covered>,
    /// And the last of those that a flush has covered.
    flushed: VecDeque<(VolumeId, Covered)>,
    think: u64,
}

/// Writes that are followed until a flush has covered them.
const MAX_SETTLED: usize = 12;

impl Work {
    pub fn new(setup: &Setup) -> Self {
        Self {
            clients: vec![None; CLIENTS],
            issued: 0,
            paused: false,
            budget: setup.ops,
            settled: Vec::new(),
            flushed: VecDeque::new(),
            think: [50, 300, 1000][(setup.seed % 3) as usize] * MS,
        }
    }

    /// Writes that the members of a volume's mirrors have, and whether durably.
    pub(super) fn acknowledged(&self, volume: VolumeId) -> Vec<(Covered, bool)> {
        let flushed = self.flushed.iter().filter(|(v, _)| *v == volume).map(|(_, c)| (c.clone(), true));
        self.settled.iter().map(|c| (c.clone(), false)).chain(flushed).collect()
    }

    /// What was not flushed may be lost, or even what was.
    pub(super) fn forget(&mut self, flushed_too: bool) {
        self.settled.clear();
        if flushed_too {
            self.flushed.clear();
        }
    }

    /// Nothing is out.
    pub fn is_idle(&self) -> bool {
        self.clients.iter().all(Option::is_none)
    }
}

impl World {
    pub(super) fn start_clients(&mut self) {
        for client in 0..CLIENTS {
            let at = self.rng.below(100 * MS);
            self.after(at, Event::Client { client });
        }
    }

    pub(super) fn client(&mut self, client: usize) {
        if self.work.clients[client].is_some() {
            return;
        }
        let ready = !self.volumes.is_empty() && !self.work.paused && self.work.issued < self.work.budget;
        let serving: Vec<usize> = (0..self.gateways.len()).filter(|g| ready && self.takes_requests(*g)).collect();
        if serving.is_empty() {
            self.after(50 * MS, Event::Client { client });
            return;
        }
        let gateway = self.rng.pick(&serving);
        self.work.issued += 1;
        self.ask_something(client, gateway);
    }

    fn ask_something(&mut self, client: usize, gateway: usize) {
        let blocks = self.current().blocks;
        let longest = self.rng.pick(&[1, 4, 16, 64]);
        let count = self.rng.between(1, longest).min(blocks);
        // Half of it goes to a few blocks, so that requests meet.
        let span = if self.rng.chance(500) { 24.max(count) } else { blocks };
        let hot = (self.setup.seed * 37) % (blocks - span.min(blocks) + 1);
        let first = if span == blocks { 0 } else { hot };
        let block = (first + self.rng.below(span - count + 1)).min(blocks - count);
        let fua = self.rng.chance(80);
        match self.rng.below(100) {
            0..36 => self.read(client, gateway, block, count),
            36..40 => {
                let (first, sectors) = self.odd_range(block, count);
                self.read_sectors(client, gateway, first, sectors);
            }
            40..74 => self.write(client, gateway, block, count, fua),
            74..86 => {
                let count = if self.rng.chance(500) { 1 } else { count };
                let (first, sectors) = self.odd_range(block, count);
                self.write_sectors(client, gateway, first, sectors, fua);
            }
            86..91 => {
                let discard = self.rng.chance(500);
                if self.rng.chance(700) {
                    self.zero(client, gateway, block, count, fua, discard);
                } else {
                    let (first, sectors) = self.odd_range(block, count);
                    self.zero_sectors(client, gateway, first, sectors, fua, discard);
                }
            }
            91..99 => self.flush(client, gateway),
            _ => {
                let repair = self.rng.chance(500);
                let (mirror, at) = self.current().place(block);
                self.compare(client, gateway, mirror, (at / REGION_BLOCKS) as u32, repair);
            }
        }
        if self.faults_on && self.rng.chance(30) {
            let number = self.work.clients[client].as_ref().map_or(0, |o| o.number);
            let after = self.rng.between(0, 500 * MS);
            self.after(after, Event::Abort { client, number });
        }
    }

    /// Sectors inside these blocks that begin and end anywhere.
    fn odd_range(&mut self, block: u64, count: u64) -> (u64, u64) {
        let all = count * BLOCK_SECTORS;
        let from = self.rng.below(BLOCK_SECTORS.min(all));
        let end = all - self.rng.below(BLOCK_SECTORS.min(all - from));
        (block * BLOCK_SECTORS + from, end - from)
    }

    /// Sends a request; its history entry has been made.
    fn submit(&mut self, client: usize, mut out: Out, input: impl FnOnce(u64) -> SessionInput) {
        let gateway = out.gateway;
        let volume = out.volume;
        let writes = out.data.is_some() || !out.blocks.is_empty() && out.first_sector == u64::MAX;
        if writes {
            self.work.settled.retain(|s| !out.blocks.contains(&s.block));
            self.work.flushed.retain(|(_, s)| !out.blocks.contains(&s.block));
            for other in self.work.clients.iter_mut().flatten() {
                other.covers.retain(|s| !out.blocks.contains(&s.block));
            }
        }
        let session = self.gateways[gateway].session_mut(volume).expect("the gateway serves");
        out.id = session.next_op;
        session.next_op += 1;
        session.ops.insert(out.id, client);
        let id = out.id;
        self.work.clients[client] = Some(out);
        self.session_step(gateway, volume, input(id));
    }

    fn out(&mut self, gateway: usize, number: Value, first: u64, sectors: u64) -> Out {
        let moment = self.moment();
        let volume = self.current();
        let blocks = first / BLOCK_SECTORS..(first + sectors).div_ceil(BLOCK_SECTORS);
        let pieces = volume.stripe.pieces(first * SECTOR, sectors * SECTOR).count();
        let odd = !first.is_multiple_of(BLOCK_SECTORS) || !sectors.is_multiple_of(BLOCK_SECTORS);
        Out {
            number,
            gateway,
            volume: volume.id,
            id: 0,
            blocks: if sectors == 0 { 0..0 } else { blocks },
            data: None,
            fua: false,
            first_sector: u64::MAX,
            split: pieces > 1 || odd,
            moment,
            asked_ms: self.clock(Party::Gateway(gateway)),
            covers: Vec::new(),
        }
    }

    fn asks(&mut self, asked: Asked, first: u64, sectors: u64, fua: bool) -> Value {
        let durable = fua || !self.current().write_cache;
        self.current_mut().history.ask(asked, first, sectors, durable)
    }

    pub fn read(&mut self, client: usize, gateway: usize, block: u64, count: u64) {
        self.read_sectors(client, gateway, block * BLOCK_SECTORS, count * BLOCK_SECTORS);
    }

    pub fn read_sectors(&mut self, client: usize, gateway: usize, first: u64, sectors: u64) {
        let number = self.asks(Asked::Read, first, sectors, false);
        self.log(|| format!("client {client} on gateway {gateway}: {number} read {}", show_range(first, sectors)));
        let mut out = self.out(gateway, number, first, sectors);
        out.first_sector = first;
        let request = BlockRequest::Read { offset: first * SECTOR, len: (sectors * SECTOR) as u32 };
        self.submit(client, out, |id| SessionInput::Submit { id, request });
    }

    pub fn write(&mut self, client: usize, gateway: usize, block: u64, count: u64, fua: bool) {
        self.write_sectors(client, gateway, block * BLOCK_SECTORS, count * BLOCK_SECTORS, fua);
    }

    /// A write of sectors of one block.
    pub fn merge(&mut self, client: usize, gateway: usize, block: u64, sector: u64, sectors: u64, fua: bool) {
        self.write_sectors(client, gateway, block * BLOCK_SECTORS + sector, sectors, fua);
    }

    pub fn write_sectors(&mut self, client: usize, gateway: usize, first: u64, sectors: u64, fua: bool) {
        let number = self.asks(Asked::Write, first, sectors, fua);
        self.log(|| {
            format!("client {client} on gateway {gateway}: {number} write {} fua {fua}", show_range(first, sectors))
        });
        let data = bytes_of(number, first, sectors, self.current().history.salt());
        let mut out = self.out(gateway, number, first, sectors);
        if first.is_multiple_of(BLOCK_SECTORS) && sectors.is_multiple_of(BLOCK_SECTORS) {
            out.data = Some(data.clone());
        }
        out.fua = fua || !self.current().write_cache;
        let request = BlockRequest::Write { offset: first * SECTOR, data, fua };
        self.submit(client, out, |id| SessionInput::Submit { id, request });
    }

    pub fn zero(&mut self, client: usize, gateway: usize, block: u64, count: u64, fua: bool, discard: bool) {
        self.zero_sectors(client, gateway, block * BLOCK_SECTORS, count * BLOCK_SECTORS, fua, discard);
    }

    pub fn zero_sectors(&mut self, client: usize, gateway: usize, first: u64, sectors: u64, fua: bool, discard: bool) {
        // A discard has no FUA: it is durable once flushed.
        let number = self.asks(Asked::Zero, first, sectors, fua && !discard);
        self.log(|| {
            format!(
                "client {client} on gateway {gateway}: {number} zero {} discard {discard} fua {fua}",
                show_range(first, sectors)
            )
        });
        let out = self.out(gateway, number, first, sectors);
        let (offset, len) = (first * SECTOR, sectors * SECTOR);
        let request = match discard {
            true => BlockRequest::Discard { offset, len },
            false => BlockRequest::WriteZeroes { offset, len, fua },
        };
        self.submit(client, out, |id| SessionInput::Submit { id, request });
    }

    pub fn flush(&mut self, client: usize, gateway: usize) {
        let number = self.asks(Asked::Flush, 0, 0, false);
        self.log(|| format!("client {client} on gateway {gateway}: {number} flush"));
        let mut out = self.out(gateway, number, 0, 0);
        out.covers = self.work.settled.clone();
        self.submit(client, out, |id| SessionInput::Submit { id, request: BlockRequest::Flush });
    }

    pub fn compare(&mut self, client: usize, gateway: usize, mirror: usize, region: u32, repair: bool) {
        // Nothing is claimed of it in the history: it has its place there for its number.
        let number = self.asks(Asked::Read, 0, 0, false);
        self.log(|| format!("client {client} on gateway {gateway}: {number} compare mirror {mirror} region {region}"));
        let out = self.out(gateway, number, 0, 0);
        let region = RegionIndex(region);
        self.submit(client, out, |id| SessionInput::Compare { id, mirror, region, repair });
    }

    pub(super) fn abort(&mut self, client: usize, number: u32) {
        let Some(out) = self.work.clients[client].as_ref().filter(|o| o.number == number) else { return };
        let (gateway, volume, id) = (out.gateway, out.volume, out.id);
        self.log(|| format!("client {client} aborts {number}"));
        // The initiator speaks to the session that it asked; if that is gone, so is the request.
        if self.gateways[gateway].session(volume).is_some_and(|s| s.ops.get(&id) == Some(&client)) {
            self.session_step(gateway, volume, SessionInput::Abort { id });
        }
    }

    /// A request's outcome reaches its initiator.
    pub(super) fn answered_by(&mut self, volume: VolumeId, epoch: Epoch, client: usize, ended: Ended) {
        let mut out = self.work.clients[client].take().expect("its client waits for it");
        let number = out.number;
        self.counters.completed += 1;
        let mut values = Vec::new();
        let mut show = String::new();
        let told = match ended {
            Ended::Compared(_) => Told::Done,
            Ended::Block(BlockOutcome::Done(pieces)) => {
                if out.first_sector != u64::MAX {
                    values = match self.read_values(volume, &out, &pieces) {
                        Ok(values) => values,
                        Err(what) => return self.fail(Checker::NobodyWrote, what),
                    };
                    show = if self.setup.trace { show_values(&values) } else { String::new() };
                    self.fold(&values);
                }
                self.check_done(volume, epoch, &mut out);
                Told::Done
            }
            // What is split may have been done in part before the abort found the rest of it waiting.
            Ended::Block(BlockOutcome::Aborted) => {
                self.counters.aborted += 1;
                if out.split { Told::Nothing } else { Told::Aborted }
            }
            Ended::Block(BlockOutcome::WriteFailed | BlockOutcome::NoSpace) => {
                self.counters.failed_writes += 1;
                Told::Nothing
            }
            Ended::Block(BlockOutcome::Medium { offset }) => {
                self.counters.medium += 1;
                let block = offset / BLOCK_SIZE;
                if !self.may_be_bad(out.gateway, volume, block, out.asked_ms) {
                    return self.fail(
                        Checker::Medium,
                        format!("R10: medium error at block {block}, where nothing was damaged"),
                    );
                }
                show = format!("medium error at block {block}");
                Told::Nothing
            }
        };
        self.fold(&(number, client));
        self.log(|| format!("client {client}: {number} {told:?} {show}"));
        self.has_ended(&out);
        // A read that found a bad block tells nothing, and a write that failed may have been done.
        let told =
            if told == Told::Done && values.is_empty() && out.first_sector != u64::MAX { Told::Nothing } else { told };
        self.history_of(volume).tell(number, told, values);
        // In bursts, so that requests for the same blocks are out at the same time.
        let longest = if self.rng.chance(400) { 300 } else { self.work.think };
        let wait = self.rng.below(longest + 1);
        self.after(wait, Event::Client { client });
    }

    /// What a read returned; empty if it covers a block of which nothing is claimed, and that holds nothing good.
    fn read_values(&mut self, volume: VolumeId, out: &Out, pieces: &[Bytes]) -> Result<Vec<Value>, String> {
        let mut data = BytesMut::new();
        let data = match pieces {
            [one] => one.clone(),
            many => {
                many.iter().for_each(|piece| data.put_slice(piece));
                data.freeze()
            }
        };
        let history = &self.volume(volume).history;
        match values_of(out.first_sector, &data, history.salt()) {
            Ok(values) => Ok(values),
            Err((sector, _)) if history.is_given_up(sector / BLOCK_SECTORS) => Ok(Vec::new()),
            Err((_, why)) => Err(format!("R10: read {} returned what nobody wrote: {why}", out.number)),
        }
    }

    fn has_ended(&mut self, out: &Out) {
        if out.first_sector == u64::MAX {
            let now = self.moment();
            let blocks = out.blocks.start as usize..out.blocks.end as usize;
            self.volume_mut(out.volume).ended_at[blocks].fill(now);
        }
    }

    /// R2 and R9, wherever nobody else is writing: the request is on the members' disks.
    fn check_done(&mut self, volume: VolumeId, epoch: Epoch, out: &mut Out) {
        let meets = |other: &Out| {
            other.volume == volume && other.blocks.start < out.blocks.end && out.blocks.start < other.blocks.end
        };
        if let Some(data) = out.data.take() {
            let blocks = out.blocks.start as usize..out.blocks.end as usize;
            let met = self.volume(volume).ended_at[blocks].iter().any(|at| *at > out.moment);
            let alone = !met && !self.work.clients.iter().flatten().any(|o| o.first_sector == u64::MAX && meets(o));
            if alone {
                self.check_acknowledged(volume, epoch, out.number, out.blocks.start, &data, out.moment, false);
                if out.fua {
                    self.check_acknowledged(volume, epoch, out.number, out.blocks.start, &data, out.moment, true);
                }
                if self.work.settled.len() < MAX_SETTLED && self.current().id == volume {
                    for (i, block) in out.blocks.clone().enumerate().take(2) {
                        let data = data.slice(i * BLOCK_SIZE as usize..(i + 1) * BLOCK_SIZE as usize);
                        self.work.settled.push(Covered { number: out.number, block, data, moment: out.moment });
                    }
                }
            }
        }
        for covered in std::mem::take(&mut out.covers) {
            let Covered { number, block, ref data, moment } = covered;
            self.check_acknowledged(volume, epoch, number, block, data, moment, true);
            self.work.settled.retain(|s| s.number != number);
            self.work.flushed.push_back((volume, covered));
            if self.work.flushed.len() > MAX_SETTLED {
                self.work.flushed.pop_front();
            }
        }
    }

    /// Sessions end without a word: their requests are never answered.
    pub(super) fn dropped(&mut self, volume: VolumeId, clients: impl Iterator<Item = usize>) {
        // What has been done of them may still come to pass.
        self.work.settled.clear();
        self.work.clients.iter_mut().flatten().for_each(|out| out.covers.clear());
        for client in clients {
            self.counters.unanswered += 1;
            if let Some(out) = self.work.clients[client].take() {
                self.has_ended(&out);
                self.history_of(volume).give_up(out.number);
            }
            let wait = self.rng.below(200 * MS);
            self.after(wait, Event::Client { client });
        }
    }

    /// More requests may be sent.
    pub fn allow(&mut self, ops: u64) {
        self.work.budget = self.work.issued + ops;
    }

    pub fn issued(&self) -> u64 {
        self.work.issued
    }

    pub fn spent(&self) -> bool {
        self.work.issued >= self.work.budget
    }

    pub fn idle(&self) -> bool {
        self.work.is_idle()
    }
}

fn show_range(first: u64, sectors: u64) -> String {
    if first.is_multiple_of(BLOCK_SECTORS) && sectors.is_multiple_of(BLOCK_SECTORS) {
        return format!("blocks {}+{}", first / BLOCK_SECTORS, sectors / BLOCK_SECTORS);
    }
    format!("block {} from sector {}, {sectors} sectors", first / BLOCK_SECTORS, first % BLOCK_SECTORS)
}

fn show_values(values: &[Value]) -> String {
    let mut runs: Vec<(Value, u32)> = Vec::new();
    for v in values {
        match runs.last_mut().filter(|(last, _)| last == v) {
            Some((_, n)) => *n += 1,
            None => runs.push((*v, 1)),
        }
    }
    let shown: Vec<String> = runs.iter().map(|(v, n)| format!("{n} sectors of {v}")).collect();
    shown.join(", ")
}
