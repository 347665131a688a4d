//! What a state of the model is made of, and its hash, which is the same for states that differ only in how the
//! replicas are numbered.

use std::fmt;
use std::hash::{Hash, Hasher};

use crate::config::Bounds;

/// Replicas of the mirror.
pub const N: usize = 3;
/// Gateways.
pub const G: usize = 2;
/// Acknowledged writes that an owner keeps.
pub const KEPT: usize = 3;
/// Requests on their way at a time.
const WIRE: usize = 18;

/// A set of replicas.
pub type Mask = u8;
/// A flush that has not been given a number: none covers it.
pub const NEVER: u8 = u8::MAX;

/// The replicas of a set.
pub fn slots(mask: Mask) -> impl Iterator<Item = usize> {
    (0..N).filter(move |slot| mask >> slot & 1 == 1)
}

pub fn bit(slot: usize) -> Mask {
    1 << slot
}

/// (epoch, attach); 0: none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct AttachId(pub u8);

impl AttachId {
    pub const NONE: Self = Self(0);
    pub fn new(epoch: u8, number: u8) -> Self {
        assert!(number < 16 && epoch < 16);
        Self(epoch << 4 | number)
    }
    pub fn epoch(self) -> u8 {
        self.0 >> 4
    }
    pub fn is_some(self) -> bool {
        self.0 != 0
    }
}

impl fmt::Debug for AttachId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch(), self.0 & 15)
    }
}

/// A replica: its disk, what its process knows, and what only the checker knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Replica {
    /// What a read of the block returns.
    pub value: u8,
    /// What a power cut may leave of it, a bit each.
    pub maybe: u16,
    /// What has landed since the running flush began.
    pub since: u16,
    /// What the running flush makes durable.
    pub flushing: Option<u8>,
    /// The region's dirty bit in memory, and on the disk.
    pub dirty: bool,
    pub dirty_disk: bool,
    pub epoch: u8,
    pub kept_epoch: u8,
    pub version: u8,
    /// The clean that it was last told, in memory and on the disk.
    pub clean: u8,
    pub clean_disk: u8,
    /// Nothing that it ever answered has been lost.
    pub whole: bool,
    // The process.
    pub newest: AttachId,
    pub current: AttachId,
    pub told: bool,
    pub kept: bool,
    pub suspect: bool,
    /// The newest flush that had begun when the region's last change under this attach was complete.
    pub change: Option<u8>,
    pub begun: u8,
    pub completed: u8,
    /// Has lost what it held since it was last kept or added. For the checker.
    pub cut: bool,
    /// Runs on an older image of its disk. For the checker.
    pub imaged: bool,
}

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum What {
    Attach,
    List,
    Write {
        value: u8,
        fua: bool,
    },
    Read,
    Flush(u8),
    Hash,
    /// To be read at the source, under its attach.
    CopyTo {
        target: u8,
        target_attach: u8,
    },
    /// On its way to the target, under the target's attach.
    Copy {
        value: u8,
        source: u8,
        source_attach: u8,
    },
    Clean {
        no: u8,
        flush: u8,
    },
    Settle {
        flush: u8,
    },
    StoreSet {
        version: u8,
        clean: u8,
    },
    MarkDirty,
}

/// How far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Stage {
    Sent,
    /// The replica has given it to its disk.
    Begun,
    /// The answer is on its way; of a read, with this value.
    Answered(u8),
}

/// A request and its answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Msg {
    pub slot: u8,
    pub attach: AttachId,
    pub what: What,
    pub stage: Stage,
}

impl fmt::Debug for Msg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}/{:?}:{:?}", self.slot, self.attach, self.what)?;
        match self.stage {
            Stage::Sent => Ok(()),
            stage => write!(f, " {stage:?}"),
        }
    }
}

/// All requests and answers on their way. In no order: answers overtake each other, requests too.
#[derive(Clone, Copy)]
pub struct Wire {
    len: u8,
    msgs: [Msg; WIRE],
}

const NOTHING: Msg = Msg { slot: 0, attach: AttachId::NONE, what: What::List, stage: Stage::Sent };

impl Default for Wire {
    fn default() -> Self {
        Self { len: 0, msgs: [NOTHING; WIRE] }
    }
}

impl Wire {
    pub fn all(&self) -> &[Msg] {
        &self.msgs[..self.len as usize]
    }
    pub fn all_mut(&mut self) -> &mut [Msg] {
        &mut self.msgs[..self.len as usize]
    }
    pub fn push(&mut self, msg: Msg) {
        assert!((self.len as usize) < WIRE, "more requests than the model has room for: {:?}", self.all());
        self.msgs[self.len as usize] = msg;
        self.len += 1;
    }
    pub fn remove(&mut self, msg: &Msg) {
        if let Some(at) = self.all().iter().position(|m| m == msg) {
            self.msgs.copy_within(at + 1..self.len as usize, at);
            self.len -= 1;
        }
    }
    pub fn retain(&mut self, keep: impl Fn(&Msg) -> bool) {
        let mut len = 0;
        for i in 0..self.len as usize {
            if keep(&self.msgs[i]) {
                self.msgs[len] = self.msgs[i];
                len += 1;
            }
        }
        self.len = len as u8;
    }
}

impl PartialEq for Wire {
    fn eq(&self, other: &Self) -> bool {
        self.all() == other.all()
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all()).finish()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    Off,
    Opening,
    Replaying,
    Serving,
    Closing,
    Closed,
    Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum JoinStage {
    Marking,
    Barrier,
    Listing,
    Equalising {
        todo: bool,
    },
    /// Writes up to this one were sent before it counted.
    Draining(u8),
    Flushing(u8),
    Proposing,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    None,
    Attaching,
    Standby,
    Member,
    Joining(JoinStage),
}

/// What a gateway knows of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Slot {
    pub attach: u8,
    pub role: Role,
    pub restarted: bool,
    pub as_new: bool,
    /// What it said when it was attached: its suspect regions, whether it kept its cache, clean, epoch and version.
    pub info_suspect: bool,
    pub info_kept: bool,
    pub info_told: bool,
    pub info_clean: u8,
    pub info_epoch: u8,
    pub info_version: u8,
    /// The region is suspect there and not settled.
    pub suspect: bool,
    /// Dirty and suspect, as it listed its region; `asked` while it has not.
    pub listed: Option<(bool, bool)>,
    pub asked: bool,
    pub flushed: u8,
    pub clean_acked: u8,
    /// How often it was attached in this session.
    pub attaches: u8,
    /// One of them was answered.
    pub attached_before: bool,
}

impl Slot {
    pub const EMPTY: Self = Self {
        attach: 0,
        role: Role::None,
        restarted: false,
        as_new: false,
        info_suspect: false,
        info_kept: false,
        info_told: false,
        info_clean: 0,
        info_epoch: 0,
        info_version: 0,
        suspect: false,
        listed: None,
        asked: false,
        flushed: 0,
        clean_acked: 0,
        attaches: 0,
        attached_before: false,
    };
    /// What it said of itself has been judged.
    pub fn forget_info(&mut self) {
        (self.info_suspect, self.info_told) = (false, false);
        (self.info_clean, self.info_epoch, self.info_version) = (0, 0, 0);
    }
    pub fn join(&self) -> Option<JoinStage> {
        match self.role {
            Role::Joining(stage) => Some(stage),
            _ => None,
        }
    }
    pub fn is_live(&self) -> bool {
        matches!(self.role, Role::Member | Role::Joining(_))
    }
    pub fn is_answered(&self) -> bool {
        !matches!(self.role, Role::None | Role::Attaching)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    None,
    Flushing { members: Mask, no: u8 },
    Proposed { members: Mask, awaited: Mask },
    Storing { pending: Mask },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Settle {
    Done,
    Unsettled,
    Equalised,
    Flushing(u8),
    Blocked,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum OpStage {
    Gated,
    Locking,
    Writing,
    Reading(u8),
    /// Nobody to read from.
    Stranded,
}

/// The one read or write of the volume that is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Op {
    /// Of a write, its number and value; a read has none.
    pub value: Option<u8>,
    /// No read may return less than this.
    pub floor: u8,
    pub stage: OpStage,
    pub sent: Mask,
    pub pending: Mask,
    pub done: Mask,
    pub fua: bool,
    pub durable_by: Option<u8>,
    pub answered: bool,
}

/// A flush that an initiator asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlushOp {
    /// 0: it waits for the mirror.
    pub no: u8,
    /// What was acknowledged before.
    pub covers: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cleaning {
    pub pending: Mask,
    pub failed: bool,
    pub was: u8,
    /// It clears nothing: it says that the next one will.
    pub announces: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EqStage {
    Locking,
    Hashing {
        pending: Mask,
    },
    /// All hashes are there and differ: a base is to be chosen.
    Planning,
    Copying {
        base: u8,
        pending: Mask,
    },
}

/// The region being equalised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Equalise {
    pub stage: EqStage,
    pub participants: Mask,
    pub values: [u8; N],
    pub failed: bool,
}

/// An acknowledged write, until every member has answered this flush or a later one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    pub value: u8,
    pub covered_by: u8,
}

/// What the owner keeps, and how far it has come in writing it again. All of it is the same block, so one write is out
/// at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Replay {
    len: u8,
    kept: [Kept; KEPT],
    /// What is acknowledged is durable on every member, or kept.
    pub complete: bool,
    /// The next to be written again.
    pub next: u8,
    /// One is out, and these have not answered.
    pub writing: bool,
    pub out: Mask,
}

impl Replay {
    pub const fn new(complete: bool) -> Self {
        let kept = [Kept { value: 0, covered_by: 0 }; KEPT];
        Self { len: 0, kept, complete, next: 0, writing: false, out: 0 }
    }
    pub fn kept(&self) -> &[Kept] {
        &self.kept[..self.len as usize]
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    pub fn keep(&mut self, value: u8, covered_by: u8) {
        self.kept[self.len as usize] = Kept { value, covered_by };
        self.len += 1;
    }
    /// Every member has answered flush `no`.
    pub fn flushed(&mut self, no: u8) {
        while self.len > 0 && self.kept[0].covered_by <= no {
            self.kept.rotate_left(1);
            self.len -= 1;
            self.kept[self.len as usize] = Kept::default();
        }
    }
    pub fn forget(&mut self) {
        (self.kept, self.len) = ([Kept::default(); KEPT], 0);
    }
    /// All of it waits for this flush.
    pub fn cover(&mut self, no: u8) {
        self.kept[..self.len as usize].iter_mut().for_each(|kept| kept.covered_by = no);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gateway {
    pub epoch: u8,
    pub phase: Phase,
    /// Its lease may live.
    pub lease: bool,
    pub version: u8,
    pub members: Mask,
    pub awaited: Mask,
    pub clean: u8,
    pub change: Change,
    pub slots: [Slot; N],
    pub lost: Mask,
    pub flush_next: u8,
    pub flush_wanted: bool,
    pub flush_pending: Mask,
    /// The region may be dirty somewhere; something that changes it is in flight; a flush that covers it all.
    pub tracked: bool,
    pub writing: u8,
    pub covered: u8,
    pub cleaning: Option<Cleaning>,
    pub clean_due: bool,
    /// The last clean has announced the next one, which clears the region as it is.
    pub announced: bool,
    pub settle: Settle,
    pub settle_ended: bool,
    pub released: bool,
    pub left_behind: Mask,
    pub extra_bases: Mask,
    pub awaited_before: bool,
    pub op: Option<Op>,
    pub flush_op: Option<FlushOp>,
    pub eq: Option<Equalise>,
    pub closing_flush: u8,
    /// To be closed once what is kept has been written again.
    pub close_wanted: bool,
    pub replay: Replay,
    /// It went on though every cache was lost.
    pub power_on: bool,
}

impl Gateway {
    pub const OFF: Self = Self {
        epoch: 0,
        phase: Phase::Off,
        lease: false,
        version: 0,
        members: 0,
        awaited: 0,
        clean: 0,
        change: Change::None,
        slots: [Slot::EMPTY; N],
        lost: 0,
        flush_next: 1,
        flush_wanted: false,
        flush_pending: 0,
        tracked: false,
        writing: 0,
        covered: 0,
        cleaning: None,
        clean_due: false,
        announced: false,
        settle: Settle::Done,
        settle_ended: true,
        released: false,
        left_behind: 0,
        extra_bases: 0,
        awaited_before: false,
        op: None,
        flush_op: None,
        eq: None,
        closing_flush: 0,
        close_wanted: false,
        replay: Replay::new(false),
        power_on: false,
    };
}

/// The in-sync set and the session, as raft has committed them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Raft {
    pub version: u8,
    pub members: Mask,
    pub awaited: Mask,
    pub epoch: u8,
    pub open: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Decision {
    /// Raft has not decided.
    Asked,
    Committed(u8),
    /// The set is another one.
    Refused,
    Superseded,
}

/// A proposal, or the answer to it, on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proposal {
    pub epoch: u8,
    pub expected: u8,
    pub members: Mask,
    pub awaited: Mask,
    pub decision: Decision,
}

/// An older image of a replica's disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Image {
    pub slot: u8,
    pub value: u8,
    pub dirty: bool,
    pub epoch: u8,
    pub kept_epoch: u8,
    pub version: u8,
    pub clean: u8,
}

/// What initiators know, kept to check what they are told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Promise {
    pub submitted: u8,
    /// The newest acknowledged write, and the newest that a read has returned: nothing older may be read.
    pub acked: u8,
    pub seen: u8,
    pub flushed: u8,
    /// The last session that told initiators of lost caches.
    pub power_on_epoch: u8,
}

/// What must never happen and is seen at the moment it does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Breach {
    /// A read returned an older value than one that was known.
    ReadWentBack { got: u8, known: u8 },
    /// A replica knows a newer set or epoch than raft.
    MetadataIsOld,
    /// A set was committed that is no newer.
    VersionFell,
    /// Initiators were told that every cache was lost, while a member held its own.
    GivenUpThoughHeld,
    /// A session closed as clean with a dirty bit, or with replicas that differ.
    UncleanClose,
}

#[derive(Clone, PartialEq)]
pub struct State {
    pub r: [Replica; N],
    pub g: [Gateway; G],
    pub wire: Wire,
    pub raft: Raft,
    pub proposals: [Option<Proposal>; 3],
    pub promise: Promise,
    /// What is left of what may happen.
    pub left: Bounds,
    pub image: Option<Image>,
    pub breach: Option<Breach>,
    /// Whether anything is ever cleaned: see `Config::cleans`.
    pub cleans: bool,
}

// ---- hashing --------------------------------------------------------------------------------------------------

/// Where each replica goes.
#[derive(Clone, Copy)]
struct Perm {
    to: [u8; N],
    from: [u8; N],
    mask: [u8; 1 << N],
}

const fn perm(from: [u8; N]) -> Perm {
    let mut to = [0; N];
    let mut i = 0;
    while i < N {
        to[from[i] as usize] = i as u8;
        i += 1;
    }
    let mut mask = [0; 1 << N];
    let mut m = 0;
    while m < 1 << N {
        let mut s = 0;
        while s < N {
            if m >> s & 1 == 1 {
                mask[m] |= 1 << to[s];
            }
            s += 1;
        }
        m += 1;
    }
    Perm { to, from, mask }
}

const PERMS: [Perm; 6] =
    [perm([0, 1, 2]), perm([0, 2, 1]), perm([1, 0, 2]), perm([1, 2, 0]), perm([2, 0, 1]), perm([2, 1, 0])];

/// A hash over bytes, eight at a time.
struct Mix {
    state: u64,
    buffer: u64,
    filled: u32,
}

impl Mix {
    fn new() -> Self {
        Self { state: 0x243f_6a88_85a3_08d3, buffer: 0, filled: 0 }
    }
    fn word(&mut self, word: u64) {
        let wide = u128::from(self.state ^ word) * 0x9e37_79b9_7f4a_7c15;
        self.state = (wide as u64) ^ ((wide >> 64) as u64).rotate_left(23) ^ word.rotate_left(41);
    }
    fn byte(&mut self, byte: u8) {
        self.buffer |= u64::from(byte) << self.filled;
        self.filled += 8;
        if self.filled == 64 {
            let word = std::mem::take(&mut self.buffer);
            self.filled = 0;
            self.word(word);
        }
    }
    fn bytes<const L: usize>(&mut self, bytes: [u8; L]) {
        bytes.into_iter().for_each(|b| self.byte(b));
    }
    fn end(mut self) -> u64 {
        let last = self.buffer;
        self.word(last ^ (u64::from(self.filled) << 56));
        let mut x = self.state;
        x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        x = (x ^ (x >> 29)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        x ^ (x >> 32)
    }
}

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        Self { ..*self }.end()
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.byte(*b));
    }
    fn write_u8(&mut self, i: u8) {
        self.byte(i);
    }
    fn write_u16(&mut self, i: u16) {
        self.bytes(i.to_le_bytes());
    }
    fn write_isize(&mut self, i: isize) {
        // Discriminants of enums.
        self.byte(i as u8);
    }
}

fn flags(bits: &[bool]) -> u8 {
    bits.iter().enumerate().fold(0, |byte, (i, b)| byte | u8::from(*b) << i)
}

/// `None` and numbers, as one byte: none of ours reaches the last.
fn opt(number: Option<u8>) -> u8 {
    number.unwrap_or(NEVER - 1)
}

impl Replica {
    fn digest(&self) -> u64 {
        let mut h = Mix::new();
        let [m0, m1] = self.maybe.to_le_bytes();
        let [s0, s1] = self.since.to_le_bytes();
        let f = flags(&[self.dirty, self.dirty_disk, self.whole, self.told, self.kept, self.suspect, self.cut]);
        h.bytes([self.value, m0, m1, s0, s1, opt(self.flushing), f, self.epoch, self.kept_epoch, self.version]);
        h.bytes([self.clean, self.clean_disk, self.newest.0, self.current.0, opt(self.change), self.begun]);
        h.bytes([self.completed, u8::from(self.imaged)]);
        h.end()
    }
}

/// The numbers of a gateway's flushes, as far as they make a difference: which flushes are waited for, a bit each.
/// Two states are the same if every flush is before and after the same ones of these.
#[derive(Clone, Copy)]
struct Ranks(Option<u64>);

impl Ranks {
    /// Where replicas keep numbers, for cleans, they are taken as they are.
    fn new(g: &Gateway, cleans: bool) -> Self {
        if cleans {
            return Self(None);
        }
        let change = match g.change {
            Change::Flushing { no, .. } => no,
            _ => 0,
        };
        let settle = match g.settle {
            Settle::Flushing(no) => no,
            _ => 0,
        };
        let op = g.op.and_then(|op| op.durable_by).unwrap_or(0);
        let flush = g.flush_op.map_or(0, |flush| flush.no);
        let joins = g.slots.iter().map(|s| match s.join() {
            Some(JoinStage::Flushing(no)) => no,
            _ => 0,
        });
        let kept = g.replay.kept().iter().map(|kept| kept.covered_by);
        let waited = [change, settle, op, flush, g.closing_flush].into_iter().chain(joins).chain(kept);
        Self(Some(waited.filter(|no| *no > 0).fold(0, |mask, no| mask | 1 << no)))
    }
    fn rank(self, no: u8) -> u8 {
        match self.0 {
            None => no,
            Some(waited) => (waited & ((2 << no) - 1)).count_ones() as u8,
        }
    }
}

impl Slot {
    fn digest(&self, ranks: Ranks) -> u64 {
        let mut h = Mix::new();
        let role = match self.role {
            Role::Joining(JoinStage::Flushing(no)) => Role::Joining(JoinStage::Flushing(ranks.rank(no))),
            role => role,
        };
        Self { flushed: ranks.rank(self.flushed), role, ..*self }.hash(&mut h);
        h.end()
    }
}

impl Gateway {
    fn digest(&self, slots: &[u64; N], ranks: Ranks, p: &Perm) -> u64 {
        let mut h = Mix::new();
        let m = |mask: Mask| p.mask[mask as usize];
        if self.phase == Phase::Off || self.phase == Phase::Stopped || self.phase == Phase::Closed {
            // Nothing else of it matters any more.
            h.bytes([self.epoch, self.phase as u8, u8::from(self.lease)]);
            return h.end();
        }
        for from in p.from {
            h.word(slots[from as usize]);
        }
        let f = flags(&[self.lease, self.flush_wanted, self.tracked, self.clean_due, self.settle_ended, self.released]);
        let Replay { complete, writing, .. } = self.replay;
        let f2 = flags(&[self.awaited_before, self.power_on, complete, writing, self.close_wanted, self.announced]);
        h.bytes([self.replay.len, self.replay.next, m(self.replay.out)]);
        for kept in self.replay.kept() {
            h.bytes([kept.value, ranks.rank(kept.covered_by)]);
        }
        h.bytes([f, f2, self.epoch, self.phase as u8, self.version, m(self.members), m(self.awaited), self.clean]);
        h.bytes([
            m(self.lost),
            ranks.rank(self.flush_next - 1),
            ranks.rank(self.flush_next),
            m(self.flush_pending),
            self.writing,
            self.covered,
        ]);
        h.bytes([m(self.left_behind), m(self.extra_bases), ranks.rank(self.closing_flush)]);
        match self.settle {
            Settle::Flushing(no) => Settle::Flushing(ranks.rank(no)).hash(&mut h),
            settle => settle.hash(&mut h),
        }
        self.flush_op.map(|flush| FlushOp { no: ranks.rank(flush.no), ..flush }).hash(&mut h);
        match self.change {
            Change::None => h.byte(0),
            Change::Flushing { members, no } => h.bytes([1, m(members), ranks.rank(no)]),
            Change::Proposed { members, awaited } => h.bytes([2, m(members), m(awaited)]),
            Change::Storing { pending } => h.bytes([3, m(pending)]),
        }
        match self.cleaning {
            None => h.byte(0),
            Some(c) => h.bytes([1, m(c.pending), u8::from(c.failed), c.was, u8::from(c.announces)]),
        }
        match self.op {
            None => h.byte(0),
            Some(op) => {
                let stage = match op.stage {
                    OpStage::Gated => 0,
                    OpStage::Locking => 1,
                    OpStage::Writing => 2,
                    OpStage::Stranded => 3,
                    OpStage::Reading(slot) => 4 + p.to[slot as usize],
                };
                h.bytes([1, opt(op.value), op.floor, stage, m(op.sent), m(op.pending), m(op.done)]);
                h.byte(opt(op.durable_by.map(|no| ranks.rank(no))));
                h.byte(flags(&[op.fua, op.answered]));
            }
        }
        match self.eq {
            None => h.byte(0),
            Some(eq) => {
                h.bytes([1, m(eq.participants), u8::from(eq.failed)]);
                for from in p.from {
                    h.byte(eq.values[from as usize]);
                }
                match eq.stage {
                    EqStage::Locking => h.byte(0),
                    EqStage::Hashing { pending } => h.bytes([1, m(pending)]),
                    EqStage::Planning => h.byte(2),
                    EqStage::Copying { base, pending } => h.bytes([3, p.to[base as usize], m(pending)]),
                }
            }
        }
        h.end()
    }
}

impl Msg {
    fn digest(&self, ranks: Ranks, p: &Perm) -> u64 {
        let mut h = Mix::new();
        h.bytes([p.to[self.slot as usize], self.attach.0]);
        let what = match self.what {
            What::Flush(no) => What::Flush(ranks.rank(no)),
            What::CopyTo { target, target_attach } => What::CopyTo { target: p.to[target as usize], target_attach },
            What::Copy { value, source, source_attach } => {
                What::Copy { value, source: p.to[source as usize], source_attach }
            }
            what => what,
        };
        what.hash(&mut h);
        self.stage.hash(&mut h);
        h.end()
    }
}

impl State {
    fn digest(&self, replicas: &[u64; N], slots: &[[u64; N]; G], ranks: &[Ranks; G], p: &Perm) -> u64 {
        let mut h = Mix::new();
        let m = |mask: Mask| p.mask[mask as usize];
        for from in p.from {
            h.word(replicas[from as usize]);
        }
        for (i, g) in self.g.iter().enumerate() {
            h.word(g.digest(&slots[i], ranks[i], p));
        }
        let of = |msg: &Msg| self.g.iter().position(|g| g.epoch == msg.attach.epoch()).unwrap_or(0);
        let msgs = self.wire.all().iter();
        h.word(msgs.fold(0, |sum: u64, msg| sum.wrapping_add(msg.digest(ranks[of(msg)], p))));
        let raft = &self.raft;
        h.bytes([raft.version, m(raft.members), m(raft.awaited), raft.epoch, u8::from(raft.open)]);
        let proposals = self.proposals.iter().flatten().fold(0, |sum: u64, proposal| {
            let mut h = Mix::new();
            h.bytes([proposal.epoch, proposal.expected, m(proposal.members), m(proposal.awaited)]);
            proposal.decision.hash(&mut h);
            sum.wrapping_add(h.end())
        });
        h.word(proposals);
        self.promise.hash(&mut h);
        self.left.hash(&mut h);
        if let Some(i) = self.image {
            h.bytes([p.to[i.slot as usize], i.value, u8::from(i.dirty), i.epoch, i.kept_epoch, i.version, i.clean]);
        }
        h.byte(u8::from(self.breach.is_some()));
        h.end()
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let replicas = self.r.map(|r| r.digest());
        let ranks = self.g.map(|g| Ranks::new(&g, self.cleans));
        let slots = std::array::from_fn(|i| self.g[i].slots.map(|s| s.digest(ranks[i])));
        let least = PERMS.iter().map(|p| self.digest(&replicas, &slots, &ranks, p)).min().expect("there are six");
        state.write_u64(least);
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, r) in self.r.iter().enumerate() {
            write!(f, "r{i} {}", r.value)?;
            if r.maybe != 1 << r.value {
                let maybe: Vec<_> = (0..16).filter(|v| r.maybe >> v & 1 == 1).collect();
                write!(f, " (after a cut {maybe:?})")?;
            }
            let marks = [
                (r.dirty_disk, "dirty"),
                (r.suspect, "suspect"),
                (!r.told, "untold"),
                (r.cut, "cut"),
                (r.imaged, "old image"),
            ];
            marks.iter().filter(|(on, _)| *on).try_for_each(|(_, mark)| write!(f, " {mark}"))?;
            write!(f, " clean {} v{} attach {:?}; ", r.clean_disk, r.version, r.current)?;
        }
        let raft = &self.raft;
        write!(f, "raft e{} v{} {:03b} awaited {:03b}; ", raft.epoch, raft.version, raft.members, raft.awaited)?;
        for (i, g) in self.g.iter().enumerate().filter(|(_, g)| g.phase != Phase::Off) {
            write!(f, "g{} {:?} v{} {:03b} {:?} ", i + 1, g.phase, g.version, g.members, g.settle)?;
            let roles = g.slots.map(|s| s.role);
            write!(f, "{roles:?} {:?} {:?} keeps", g.change, g.op)?;
            g.replay.kept().iter().try_for_each(|kept| write!(f, " {}", kept.value))?;
            write!(f, "; ")?;
        }
        write!(f, "wire {:?}; {:?} {:?}", self.wire, self.promise, self.breach)
    }
}
