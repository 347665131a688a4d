//! Initiators: a number of clients, each with one request out, on whichever gateway serves the volume.

use bytes::Bytes;
use client::mirror::{Input, MirrorOp, OpOutcome};
use proto::id::BlockIndex;
use proto::limits::REGION_BLOCKS;

use super::history::{Asked, BLOCK_SECTORS, Told, Value, bytes_of, values_of};
use super::world::{Event, MS, Setup, World};

/// Clients; they compete for the same blocks.
const CLIENTS: usize = 14;

/// A request that is out.
#[derive(Clone, Debug)]
pub(super) struct Out {
    pub number: Value,
    gateway: usize,
    /// The mirror's number for it.
    id: u64,
    block: u64,
    /// What a write of whole blocks writes.
    data: Option<Bytes>,
    /// The sectors of which a read tells.
    first_sector: u64,
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
    /// Blocks that a disk may have been unable to keep: a medium error is believed there.
    suspect_blocks: Vec<bool>,
    think: u64,
}

impl Work {
    pub fn new(setup: &Setup) -> Self {
        Self {
            clients: vec![None; CLIENTS],
            issued: 0,
            paused: false,
            budget: setup.ops,
            suspect_blocks: vec![false; setup.blocks as usize],
            think: [50, 300, 1000][(setup.seed % 3) as usize] * MS,
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
        let serving: Vec<usize> = (0..self.gateways.len()).filter(|g| self.gateways[*g].takes_requests()).collect();
        if self.work.paused || self.work.issued >= self.work.budget || serving.is_empty() {
            self.after(50 * MS, Event::Client { client });
            return;
        }
        let gateway = self.rng.pick(&serving);
        self.work.issued += 1;
        self.ask_something(client, gateway);
    }

    fn ask_something(&mut self, client: usize, gateway: usize) {
        let blocks = self.setup.blocks;
        let longest = self.rng.pick(&[1, 4, 16, 64]);
        let count = self.rng.between(1, longest).min(blocks);
        // Half of it goes to a few blocks, so that requests meet.
        let span = if self.rng.chance(500) { 24.max(count) } else { blocks };
        let hot = (self.setup.seed * 37) % (blocks - span.min(blocks) + 1);
        let first = if span == blocks { 0 } else { hot };
        let block = (first + self.rng.below(span - count + 1)).min(blocks - count);
        let fua = self.rng.chance(80);
        match self.rng.below(100) {
            0..40 => self.read(client, gateway, block, count),
            40..78 => self.write(client, gateway, block, count, fua),
            78..86 => {
                let sector = self.rng.below(BLOCK_SECTORS);
                let sectors = self.rng.between(1, BLOCK_SECTORS - sector);
                self.merge(client, gateway, block, sector, sectors, fua);
            }
            86..91 => {
                let discard = self.rng.chance(500);
                self.zero(client, gateway, block, count, fua, discard);
            }
            91..99 => self.flush(client, gateway),
            _ => {
                let region = (block / REGION_BLOCKS) as u32;
                let repair = self.rng.chance(500);
                self.compare(client, gateway, region, repair);
            }
        }
        if self.faults_on && self.rng.chance(30) {
            let number = self.work.clients[client].as_ref().map_or(0, |o| o.number);
            let after = self.rng.between(0, 500 * MS);
            self.after(after, Event::Abort { client, number });
        }
    }

    /// Sends a request; its history entry has been made.
    fn submit(&mut self, client: usize, gateway: usize, mut out: Out, op: MirrorOp) {
        let session = self.gateways[gateway].session.as_mut().expect("the gateway serves");
        out.id = session.next_op;
        session.next_op += 1;
        session.ops.insert(out.id, client);
        let id = out.id;
        self.work.clients[client] = Some(out);
        self.gateway_step(gateway, Input::Submit { id, op });
    }

    fn out(&mut self, gateway: usize, number: Value, block: u64, data: Option<Bytes>) -> Out {
        let moment = self.moment();
        Out { number, gateway, id: 0, block, data, first_sector: block * BLOCK_SECTORS, moment }
    }

    pub fn read(&mut self, client: usize, gateway: usize, block: u64, count: u64) {
        let number = self.history.ask(Asked::Read, block * BLOCK_SECTORS, count * BLOCK_SECTORS, false);
        self.log(|| format!("client {client} on gateway {gateway}: {number} read {block}+{count}"));
        let out = self.out(gateway, number, block, None);
        self.submit(client, gateway, out, MirrorOp::Read { block: BlockIndex(block), count: count as u32 });
    }

    pub fn write(&mut self, client: usize, gateway: usize, block: u64, count: u64, fua: bool) {
        let (first, sectors) = (block * BLOCK_SECTORS, count * BLOCK_SECTORS);
        let number = self.history.ask(Asked::Write, first, sectors, fua || !self.setup.write_cache);
        self.log(|| format!("client {client} on gateway {gateway}: {number} write {block}+{count} fua {fua}"));
        let data = bytes_of(number, first, sectors);
        let out = self.out(gateway, number, block, Some(data.clone()));
        self.submit(client, gateway, out, MirrorOp::Write { block: BlockIndex(block), data, fua });
    }

    pub fn merge(&mut self, client: usize, gateway: usize, block: u64, sector: u64, sectors: u64, fua: bool) {
        let first = block * BLOCK_SECTORS + sector;
        let number = self.history.ask(Asked::Write, first, sectors, fua || !self.setup.write_cache);
        self.log(|| format!("client {client} on gateway {gateway}: {number} merge {block}.{sector}+{sectors}"));
        let data = bytes_of(number, first, sectors);
        let out = self.out(gateway, number, block, None);
        let op = MirrorOp::Merge { block: BlockIndex(block), offset: sector as u32 * 512, data, fua };
        self.submit(client, gateway, out, op);
    }

    pub fn zero(&mut self, client: usize, gateway: usize, block: u64, count: u64, fua: bool, discard: bool) {
        let (first, sectors) = (block * BLOCK_SECTORS, count * BLOCK_SECTORS);
        let number = self.history.ask(Asked::Zero, first, sectors, fua || !self.setup.write_cache);
        self.log(|| format!("client {client} on gateway {gateway}: {number} zero {block}+{count} discard {discard}"));
        let out = self.out(gateway, number, block, None);
        self.submit(
            client,
            gateway,
            out,
            MirrorOp::Zero { block: BlockIndex(block), count: count as u32, fua, discard },
        );
    }

    pub fn flush(&mut self, client: usize, gateway: usize) {
        let number = self.history.ask(Asked::Flush, 0, 0, false);
        self.log(|| format!("client {client} on gateway {gateway}: {number} flush"));
        let out = self.out(gateway, number, 0, None);
        self.submit(client, gateway, out, MirrorOp::Flush);
    }

    pub fn compare(&mut self, client: usize, gateway: usize, region: u32, repair: bool) {
        // Nothing is claimed of it in the history: it has its place there for its number.
        let number = self.history.ask(Asked::Read, 0, 0, false);
        self.log(|| format!("client {client} on gateway {gateway}: {number} compare region {region}"));
        let out = self.out(gateway, number, 0, None);
        self.submit(client, gateway, out, MirrorOp::Compare { region: proto::id::RegionIndex(region), repair });
    }

    pub(super) fn abort(&mut self, client: usize, number: u32) {
        let Some(out) = self.work.clients[client].as_ref().filter(|o| o.number == number) else { return };
        let (gateway, id) = (out.gateway, out.id);
        self.log(|| format!("client {client} aborts {number}"));
        // The initiator speaks to the session that it asked; if that is gone, so is the request.
        if self.gateways[gateway].session.as_ref().is_some_and(|s| s.ops.get(&id) == Some(&client)) {
            self.gateway_step(gateway, Input::Abort { id });
        }
    }

    /// The mirror acknowledges a request, which is still under its locks; the lease may hold the reply up.
    pub(super) fn acknowledged(&mut self, gateway: usize, id: u64) {
        let Some(session) = &self.gateways[gateway].session else { return };
        let Some(client) = session.ops.get(&id).copied() else { return };
        // Nothing that a superseded session says is passed on.
        if session.epoch == self.control.epoch
            && let Some(Out { number, block, data: Some(data), moment, .. }) = self.work.clients[client].clone()
        {
            self.check_acknowledged(number, block, &data, moment);
        }
    }

    /// A request's outcome reaches its initiator.
    pub(super) fn reply(&mut self, gateway: usize, id: u64, outcome: OpOutcome) {
        let session = self.gateways[gateway].session.as_mut().expect("a session replies");
        let Some(client) = session.ops.remove(&id) else {
            return self.fail(format!("gateway {gateway} answers request {id}, which is not open"));
        };
        let out = self.work.clients[client].take().expect("its client waits for it");
        let number = out.number;
        self.fold(&(number, std::mem::discriminant(&outcome)));
        self.counters.completed += 1;
        let mut values = Vec::new();
        let told = match &outcome {
            OpOutcome::Done => Told::Done,
            OpOutcome::Data(data) => {
                match values_of(out.first_sector, data) {
                    Ok(read) => values = read,
                    Err(why) => return self.fail(format!("read {number} returned what nobody wrote: {why}")),
                }
                self.fold(&values);
                Told::Done
            }
            OpOutcome::Compared(_) => Told::Done,
            OpOutcome::Aborted => {
                self.counters.aborted += 1;
                Told::Aborted
            }
            OpOutcome::WriteFailed | OpOutcome::NoSpace => {
                self.counters.failed_writes += 1;
                Told::Nothing
            }
            OpOutcome::Medium { block } => {
                self.counters.medium += 1;
                if !self.work.suspect_blocks[block.0 as usize] {
                    return self.fail(format!("R10: medium error at block {block}, where nothing was damaged"));
                }
                Told::Nothing
            }
        };
        self.log(|| match &outcome {
            OpOutcome::Data(_) => {
                let mut runs: Vec<(Value, u32)> = Vec::new();
                for v in &values {
                    match runs.last_mut().filter(|(last, _)| last == v) {
                        Some((_, n)) => *n += 1,
                        None => runs.push((*v, 1)),
                    }
                }
                format!("client {client}: {number} read {runs:?}")
            }
            other => format!("client {client}: {number} {other:?}"),
        });
        self.history.tell(number, told, values);
        // In bursts, so that requests for the same blocks are out at the same time.
        let longest = if self.rng.chance(400) { 300 } else { self.work.think };
        let wait = self.rng.below(longest + 1);
        self.after(wait, Event::Client { client });
    }

    /// A disk could not write there: what the blocks hold on it is open.
    pub(super) fn distrust(&mut self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            self.work.suspect_blocks[block as usize] = true;
        }
    }

    pub(super) fn damaged_blocks(&self) -> Vec<u64> {
        let damaged = self.work.suspect_blocks.iter().enumerate().filter(|(_, damaged)| **damaged);
        damaged.map(|(block, _)| block as u64).collect()
    }

    /// Disks failed reads: any block may have been unreadable everywhere for a while.
    pub(super) fn distrust_all(&mut self) {
        self.work.suspect_blocks.fill(true);
    }

    /// Sessions end without a word: their requests are never answered.
    pub(super) fn dropped(&mut self, clients: impl Iterator<Item = usize>) {
        for client in clients {
            self.counters.unanswered += 1;
            if let Some(out) = self.work.clients[client].take() {
                self.history.give_up(out.number);
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
