//! The core of an open volume: requests split over the mirrors and joined again, and the lease (R3).

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use proto::frame::{Reply, Request};
use proto::id::{AttachId, BlockIndex, NodeId, RegionIndex, ReplicaId, SetVersion};
use proto::limits::{BLOCK_SIZE, MAX_DISCARD_BLOCKS, MAX_REQUEST_BLOCKS};
use proto::mutant::{self, Mutant};

use super::stripe::{Piece, Stripe};
use crate::block::{BlockOutcome, BlockRequest};
use crate::mirror::{
    Comparison, Event, Input, Mirror, MirrorConfig, MirrorOp, MirrorStatus, OpOutcome, Output, SetDecision, StopReason,
};

/// What happens to an open volume. Numbers of requests (`id`) are the caller's, none twice at a time.
#[derive(Clone, Debug)]
pub enum SessionInput {
    Submit {
        id: u64,
        request: BlockRequest,
    },
    Abort {
        id: u64,
    },
    /// Compares a region of a mirror over its replicas; with `repair`, makes it equal.
    Compare {
        id: u64,
        mirror: usize,
        region: RegionIndex,
        repair: bool,
    },
    LinkUp {
        node: NodeId,
    },
    LinkDown {
        node: NodeId,
    },
    Reply {
        node: NodeId,
        channel: u32,
        tag: u64,
        attach: AttachId,
        reply: Reply,
    },
    SetDecided {
        mirror: usize,
        decision: SetDecision,
    },
    Recover,
    /// How many bytes a second a resync of the volume compares at most.
    LimitResync(Option<u64>),
    Close,
    Tick,
}

/// What an open volume wants done.
#[derive(Clone, Debug)]
pub enum SessionOutput {
    Send {
        node: NodeId,
        channel: u32,
        attach: AttachId,
        tag: u64,
        request: Request,
    },
    /// The request has ended, under a live lease.
    Ended {
        id: u64,
        ended: Ended,
    },
    ProposeSet {
        mirror: usize,
        version: SetVersion,
        members: Vec<ReplicaId>,
        awaited: Vec<ReplicaId>,
    },
    /// Every cache of a mirror was lost (R8).
    PowerOn {
        mirror: usize,
    },
    Stop(StopReason),
    /// Close is done on every mirror.
    Closed {
        clean: bool,
    },
    Log {
        mirror: usize,
        event: Event,
    },
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    Block(BlockOutcome),
    Compared(Comparison),
}

/// A request whose parts are out.
#[derive(Debug)]
struct Pending {
    parts: usize,
    left: usize,
    /// What reads have brought, by part.
    data: Vec<Bytes>,
    outcome: Option<BlockOutcome>,
    compared: Option<Comparison>,
    ops: Vec<(usize, u64)>,
}

/// A mirror's request and what it is a part of.
#[derive(Debug)]
struct Part {
    request: u64,
    index: usize,
    mirror: usize,
    /// Of a read's blocks, the bytes that were asked for.
    skip: usize,
    take: usize,
}

/// See the module.
pub struct VolumeSession {
    stripe: Stripe,
    mirrors: Vec<Mirror>,
    /// Which replica of each mirror a node has.
    slots: Vec<BTreeMap<NodeId, usize>>,
    nodes: Vec<Vec<NodeId>>,
    requests: BTreeMap<u64, Pending>,
    parts: BTreeMap<u64, Part>,
    next_op: u64,
    /// Ended, but not to be told before the lease lives.
    held: VecDeque<(u64, Ended)>,
    closed: Vec<Option<bool>>,
    stopped: bool,
    scratch: Vec<Output>,
}

impl VolumeSession {
    /// A session that has just opened; tell it of links.
    pub fn new(now: u64, stripe: Stripe, mirrors: Vec<MirrorConfig>) -> Self {
        assert_eq!(mirrors.len() as u64, stripe.width, "one mirror a column of the stripe");
        let nodes: Vec<Vec<NodeId>> = mirrors.iter().map(|m| m.replicas.iter().map(|r| r.node).collect()).collect();
        let slots = nodes.iter().map(|n| n.iter().enumerate().map(|(i, node)| (*node, i)).collect()).collect();
        Self {
            stripe,
            closed: vec![None; mirrors.len()],
            mirrors: mirrors.into_iter().map(|config| Mirror::new(now, config)).collect(),
            slots,
            nodes,
            requests: BTreeMap::new(),
            parts: BTreeMap::new(),
            next_op: 1,
            held: VecDeque::new(),
            stopped: false,
            scratch: Vec::new(),
        }
    }

    /// Takes an input at `now`; the session's lease lives while `now < lease_until`. The clock must have been read
    /// after the input arrived (R3).
    pub fn step(&mut self, now: u64, lease_until: u64, input: SessionInput, out: &mut Vec<SessionOutput>) {
        if self.stopped {
            return;
        }
        match input {
            SessionInput::Submit { id, request } => self.submit(now, id, request, out),
            SessionInput::Abort { id } => {
                let ops = self.requests.get(&id).map(|r| r.ops.clone()).unwrap_or_default();
                if mutant::is(Mutant::AbortAtOnce) && !ops.is_empty() {
                    self.held.push_back((id, Ended::Block(BlockOutcome::Aborted)));
                }
                for (mirror, op) in ops {
                    self.mirror(now, mirror, Input::Abort { id: op }, out);
                }
            }
            SessionInput::Compare { id, mirror, region, repair } => {
                self.requests.insert(id, Pending::new(1));
                self.part(now, id, 0, mirror, MirrorOp::Compare { region, repair }, (0, 0), out);
            }
            SessionInput::LinkUp { node } => self.every(now, node, out, |slot| Input::LinkUp { slot }),
            SessionInput::LinkDown { node } => self.every(now, node, out, |slot| Input::LinkDown { slot }),
            SessionInput::Reply { node, channel, tag, attach, reply } => {
                let mirror = channel as usize;
                if let Some(slot) = self.slots.get(mirror).and_then(|s| s.get(&node)).copied() {
                    self.mirror(now, mirror, Input::Reply { slot, tag, attach, reply }, out);
                }
            }
            SessionInput::SetDecided { mirror, decision } => {
                self.mirror(now, mirror, Input::SetDecided(decision), out);
            }
            SessionInput::Recover => self.all(now, &Input::Recover, out),
            SessionInput::LimitResync(limit) => {
                // A node that was away is behind in every mirror: each has its share.
                let share = limit.map(|limit| (limit / self.mirrors.len() as u64).max(1));
                self.all(now, &Input::LimitResync(share), out);
            }
            SessionInput::Close => self.all(now, &Input::Close, out),
            SessionInput::Tick => {
                let busy = self.mirrors.iter().filter(|mirror| mirror.has_background()).count() as u64;
                self.mirrors.iter_mut().for_each(|mirror| mirror.rest_for(busy));
                self.all(now, &Input::Tick, out);
            }
        }
        if (now < lease_until || mutant::is(Mutant::ReplyAfterLease)) && !self.stopped {
            out.extend(self.held.drain(..).map(|(id, ended)| SessionOutput::Ended { id, ended }));
        }
    }

    /// Where every mirror stands, in stripe order.
    pub fn status(&self) -> Vec<MirrorStatus> {
        self.mirrors.iter().map(Mirror::status).collect()
    }

    /// Whether ticks may be as rare as [`REST_TICK_MS`](crate::mirror::REST_TICK_MS).
    pub fn at_rest(&self) -> bool {
        self.requests.is_empty() && self.held.is_empty() && self.mirrors.iter().all(Mirror::at_rest)
    }

    /// The mirrors, in stripe order, for whoever watches over them.
    pub fn mirrors(&self) -> &[Mirror] {
        &self.mirrors
    }

    fn all(&mut self, now: u64, input: &Input, out: &mut Vec<SessionOutput>) {
        for mirror in 0..self.mirrors.len() {
            self.mirror(now, mirror, input.clone(), out);
        }
    }

    fn every(&mut self, now: u64, node: NodeId, out: &mut Vec<SessionOutput>, input: impl Fn(usize) -> Input) {
        for mirror in 0..self.mirrors.len() {
            if let Some(slot) = self.slots[mirror].get(&node).copied() {
                self.mirror(now, mirror, input(slot), out);
            }
        }
    }

    fn mirror(&mut self, now: u64, mirror: usize, input: Input, out: &mut Vec<SessionOutput>) {
        let mut outputs = std::mem::take(&mut self.scratch);
        self.mirrors[mirror].step(now, input, &mut outputs);
        for output in outputs.drain(..) {
            match output {
                Output::Send { slot, attach, tag, request } => {
                    let node = self.nodes[mirror][slot];
                    out.push(SessionOutput::Send { node, channel: mirror as u32, attach, tag, request });
                }
                // Its answers carry its number, and the mirror ignores them.
                Output::GiveUp { .. } => {}
                Output::Complete { id, outcome } => self.part_ended(id, outcome),
                Output::ProposeSet { version, members, awaited } => {
                    out.push(SessionOutput::ProposeSet { mirror, version, members, awaited });
                }
                Output::PowerOn => out.push(SessionOutput::PowerOn { mirror }),
                Output::Stop(reason) => {
                    // Nothing is answered any more, not even what has ended (R1).
                    self.stopped = true;
                    self.held.clear();
                    out.push(SessionOutput::Stop(reason));
                }
                Output::Closed { clean } => {
                    self.closed[mirror] = Some(clean);
                    if self.closed.iter().all(Option::is_some) {
                        let clean = self.closed.iter().all(|c| *c == Some(true));
                        out.push(SessionOutput::Closed { clean });
                    }
                }
                Output::Log(event) => out.push(SessionOutput::Log { mirror, event }),
            }
        }
        self.scratch = outputs;
    }

    // ---- splitting ------------------------------------------------------------------------------------------

    fn submit(&mut self, now: u64, id: u64, request: BlockRequest, out: &mut Vec<SessionOutput>) {
        let mut ops: Vec<(usize, MirrorOp, (usize, usize))> = Vec::new();
        match request {
            BlockRequest::Read { offset, len } => {
                for piece in self.request_pieces(offset, len.into()) {
                    let block = piece.offset / BLOCK_SIZE;
                    let count = (piece.offset + piece.len).div_ceil(BLOCK_SIZE) - block;
                    let op = MirrorOp::Read { block: BlockIndex(block), count: count as u32 };
                    ops.push((piece.mirror, op, ((piece.offset % BLOCK_SIZE) as usize, piece.len as usize)));
                }
            }
            BlockRequest::Write { offset, data, fua } => {
                let mut at = 0;
                for piece in self.request_pieces(offset, data.len() as u64) {
                    let mut data = data.slice(at..at + piece.len as usize);
                    at += piece.len as usize;
                    for part in by_alignment(piece) {
                        let data = data.split_to(part.len as usize);
                        ops.push((part.mirror, write_op(part, data, fua), (0, 0)));
                    }
                }
            }
            BlockRequest::Discard { offset, len } => self.zero_ops(offset, len, false, true, &mut ops),
            BlockRequest::WriteZeroes { offset, len, fua } => self.zero_ops(offset, len, fua, false, &mut ops),
            BlockRequest::Flush => ops.extend((0..self.mirrors.len()).map(|m| (m, MirrorOp::Flush, (0, 0)))),
        }
        self.requests.insert(id, Pending::new(ops.len()));
        if ops.is_empty() {
            let request = self.requests.remove(&id).expect("inserted above");
            self.held.push_back((id, request.end()));
            return;
        }
        for (index, (mirror, op, bytes)) in ops.into_iter().enumerate() {
            self.part(now, id, index, mirror, op, bytes, out);
        }
    }

    /// The pieces of a range, each small enough for one request to a mirror.
    fn request_pieces(&self, offset: u64, len: u64) -> Vec<Piece> {
        let most = u64::from(MAX_REQUEST_BLOCKS) * BLOCK_SIZE;
        let mut pieces = Vec::new();
        for mut piece in self.stripe.pieces(offset, len) {
            while piece.len > 0 {
                // Up to the next boundary of whole requests, so that no piece covers more blocks than fit.
                let len = piece.len.min(most - piece.offset % BLOCK_SIZE);
                pieces.push(Piece { len, ..piece });
                piece.offset += len;
                piece.len -= len;
            }
        }
        pieces
    }

    fn zero_ops(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
        discard: bool,
        ops: &mut Vec<(usize, MirrorOp, (usize, usize))>,
    ) {
        for span in self.stripe.spans(offset, len) {
            for part in by_alignment(span) {
                if part.len < BLOCK_SIZE {
                    let zeroes = Bytes::from(vec![0; part.len as usize]);
                    ops.push((part.mirror, write_op(part, zeroes, fua), (0, 0)));
                    continue;
                }
                let (mut block, mut left) = (part.offset / BLOCK_SIZE, part.len / BLOCK_SIZE);
                while left > 0 {
                    let count = left.min(MAX_DISCARD_BLOCKS.into());
                    let op = MirrorOp::Zero { block: BlockIndex(block), count: count as u32, fua, discard };
                    ops.push((part.mirror, op, (0, 0)));
                    block += count;
                    left -= count;
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one call site's locals")]
    fn part(
        &mut self,
        now: u64,
        request: u64,
        index: usize,
        mirror: usize,
        op: MirrorOp,
        (skip, take): (usize, usize),
        out: &mut Vec<SessionOutput>,
    ) {
        let id = self.next_op;
        self.next_op += 1;
        self.parts.insert(id, Part { request, index, mirror, skip, take });
        self.requests.get_mut(&request).expect("the caller inserted it").ops.push((mirror, id));
        self.mirror(now, mirror, Input::Submit { id, op }, out);
    }

    // ---- joining --------------------------------------------------------------------------------------------

    fn part_ended(&mut self, op: u64, outcome: OpOutcome) {
        let part = self.parts.remove(&op).expect("every part ends once");
        let request = self.requests.get_mut(&part.request).expect("a request outlives its parts");
        request.left -= 1;
        match outcome {
            OpOutcome::Done => {}
            OpOutcome::Data(data) => {
                request.data.resize(request.parts, Bytes::new());
                request.data[part.index] = data.slice(part.skip..part.skip + part.take);
            }
            OpOutcome::Compared(comparison) => request.compared = Some(comparison),
            OpOutcome::Medium { block } => {
                let offset = self.stripe.volume_offset(part.mirror, block.0 * BLOCK_SIZE);
                request.failed(BlockOutcome::Medium { offset });
            }
            OpOutcome::WriteFailed => request.failed(BlockOutcome::WriteFailed),
            OpOutcome::NoSpace => request.failed(BlockOutcome::NoSpace),
            OpOutcome::Aborted => request.failed(BlockOutcome::Aborted),
        }
        if request.left == 0 {
            let request = self.requests.remove(&part.request).expect("found above");
            self.held.push_back((part.request, request.end()));
        }
    }
}

impl Pending {
    fn new(parts: usize) -> Self {
        Self { parts, left: parts, data: Vec::new(), outcome: None, compared: None, ops: Vec::with_capacity(parts) }
    }

    /// Keeps the first failure; an abort says less than any other.
    fn failed(&mut self, outcome: BlockOutcome) {
        if matches!(self.outcome, None | Some(BlockOutcome::Aborted)) {
            self.outcome = Some(outcome);
        }
    }

    fn end(self) -> Ended {
        match (self.compared, self.outcome) {
            (Some(comparison), _) => Ended::Compared(comparison),
            (None, Some(outcome)) => Ended::Block(outcome),
            (None, None) => Ended::Block(BlockOutcome::Done(self.data)),
        }
    }
}

/// Cuts a piece into a part of a block, whole blocks, and a part of a block, as far as they are there.
fn by_alignment(piece: Piece) -> impl Iterator<Item = Piece> {
    let end = piece.offset + piece.len;
    let head_end = piece.offset.next_multiple_of(BLOCK_SIZE).min(end);
    let tail = (end / BLOCK_SIZE * BLOCK_SIZE).max(head_end);
    [(piece.offset, head_end), (head_end, tail), (tail, end)]
        .into_iter()
        .filter(|(from, to)| to > from)
        .map(move |(from, to)| Piece { offset: from, len: to - from, ..piece })
}

fn write_op(part: Piece, data: Bytes, fua: bool) -> MirrorOp {
    let block = BlockIndex(part.offset / BLOCK_SIZE);
    let offset = (part.offset % BLOCK_SIZE) as u32;
    if offset == 0 && part.len.is_multiple_of(BLOCK_SIZE) {
        MirrorOp::Write { block, data, fua }
    } else {
        MirrorOp::Merge { block, offset, data, fua }
    }
}
