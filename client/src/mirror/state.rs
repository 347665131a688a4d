//! The mirror's struct, its replicas' attaches, and the routing of answers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proto::frame::{AttachInfo, Code, Reply, Request, SetView, WhatNext};
use proto::id::{AttachId, AttachNo, CleanNo, Epoch, FlushNo, RegionIndex, ReplicaId, SetVersion};
use proto::limits::{LEASE_MS, REGION_BLOCKS};
use proto::mutant::{self, Mutant};

use super::clean::{Cleaning, DirtyTracker};
use super::equalise::{Background, Equalise};
use super::foreground::{Op, Stage};
use super::hedge::ReadPace;
use super::join::{Join, JoinStage};
use super::mask::Mask;
use super::membership::Change;
use super::range_lock::{LockOwner, RangeLocks};
use super::region_set::RegionSet;
use super::replay::Replay;
use super::take_over::Settling;
use super::types::*;

/// How often [`Input::Tick`] is due, in milliseconds; and how often while the mirror [is at rest](Mirror::at_rest).
pub const TICK_MS: u64 = 20;
pub const REST_TICK_MS: u64 = 200;

/// The mirror's limits (R11).
pub mod limits {
    /// Requests of the volume that are worked on at once; more wait in order of arrival. Together with the
    /// mirror's own requests this stays below what a replica takes in flight.
    pub const MAX_OPEN_OPS: usize = 128;
    /// Reads that are out at two replicas, or of which one answer is still to come that counts for nothing.
    pub const MAX_HEDGED: usize = 24;
    /// Regions equalised at once while nothing else is going on.
    pub const MAX_BACKGROUND_REGIONS: usize = 4;
    /// Regions equalised at once because a request waits for them.
    pub const MAX_DEMANDED_REGIONS: usize = 16;
    /// A request that a replica has not answered for so long, though its node answers pings, faults the replica.
    pub const REQUEST_TIMEOUT_MS: u64 = 8_000;
    /// The same for requests that wait for a disk's cache.
    pub const FLUSH_TIMEOUT_MS: u64 = 30_000;
    /// Acknowledged bytes that may be unflushed before the mirror flushes by itself (R9).
    pub const MAX_UNFLUSHED_BYTES: u64 = 8 << 20;
    /// And for how long, in milliseconds.
    pub const MAX_UNFLUSHED_MS: u64 = 500;
    /// Bytes of acknowledged writes that are kept until a flush; at more, writes wait for one (R9).
    pub const MAX_KEPT_BYTES: u64 = 2 * MAX_UNFLUSHED_BYTES;
    /// Of these, the writes that are out at once when they are written again.
    pub const MAX_REPLAYED: usize = 32;
    /// Regions that one clean names.
    pub const MAX_CLEAN_REGIONS: usize = 4096;

    const _: () =
        assert!(MAX_OPEN_OPS + MAX_HEDGED + 2 * MAX_DEMANDED_REGIONS + 64 < proto::limits::MAX_ATTACH_IN_FLIGHT);
}

/// How long after a fault a replica is attached again, when its node is there.
const REATTACH_MS: u64 = 500;
/// Doubled so often at most while it is refused.
const MAX_REATTACH_DOUBLINGS: u32 = 6;

/// The regions of a replica as it listed them.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub dirty: RegionSet,
    pub suspect: RegionSet,
    pub allocated: RegionSet,
    /// The next region to ask for; the mirror's region count when all are there.
    pub next: u32,
    /// The request that is out. An answer to another one is to a listing that was begun anew since, and too old.
    asked: u64,
}

/// What an attached replica is used for.
#[derive(Debug)]
pub(super) enum Role {
    /// Asked, not answered.
    Attaching,
    /// Answered; the opening has not decided yet.
    Standby,
    /// In the in-sync set, read and written.
    Member,
    /// Written, not read.
    Joining(Join),
}

/// An attach that is in use. Given up, it is dropped, and with it everything said under it.
#[derive(Debug)]
pub(super) struct Attach {
    pub id: AttachId,
    pub role: Role,
    pub info: Option<AttachInfo>,
    /// The newest flush that it answered.
    pub flushed: FlushNo,
    /// The state of its regions, when asked for.
    pub listed: Option<Listed>,
    /// Its suspect regions that are not settled yet (R1).
    pub suspect: RegionSet,
    /// Its process had no attach before this one: it restarted.
    pub restarted: bool,
    /// Not to be a base of anything: rebuilt, or an old image (R6).
    pub as_new: bool,
}

impl Attach {
    pub fn info(&self) -> &AttachInfo {
        self.info.as_ref().expect("an answered attach has its info")
    }
    pub fn listing_done(&self, regions: u32) -> bool {
        self.listed.as_ref().is_some_and(|l| l.next >= regions)
    }
}

/// One replica's place.
#[derive(Debug)]
pub(super) struct Slot {
    pub def: ReplicaDef,
    pub link: bool,
    /// An attempt to reach it has failed since the opening began.
    pub unreachable: bool,
    pub attach: Option<Attach>,
    pub fault: FaultReason,
    pub since: u64,
    pub retry_at: u64,
    /// Until then others are read.
    pub slow_until: u64,
    pub pace: ReadPace,
    /// How often in a row it was given up because of what it answered.
    pub refusals: u32,
    /// The newest clean that it acknowledged in this session (R6).
    pub clean_acked: CleanNo,
    /// It was attached before in this session, so its epoch must be stored (R6).
    pub attached_before: bool,
}

impl Slot {
    pub fn is_member(&self) -> bool {
        matches!(self.attach, Some(Attach { role: Role::Member, .. }))
    }
    pub fn join(&self) -> Option<&Join> {
        match &self.attach {
            Some(Attach { role: Role::Joining(join), .. }) => Some(join),
            _ => None,
        }
    }
    pub fn join_mut(&mut self) -> Option<&mut Join> {
        match &mut self.attach {
            Some(Attach { role: Role::Joining(join), .. }) => Some(join),
            _ => None,
        }
    }
    /// Takes part in writes.
    pub fn is_live(&self) -> bool {
        self.is_member() || self.join().is_some()
    }
    pub fn is_answered(&self) -> bool {
        self.attach.as_ref().is_some_and(|a| !matches!(a.role, Role::Attaching))
    }
}

/// What a request to a replica was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Attach,
    List,
    Op(u64),
    /// A read whose answer came from another replica meanwhile.
    Dropped,
    Replay(usize),
    Flush(FlushNo),
    Equalise(RegionIndex),
    Clean,
    Settle,
    StoreSet(SetVersion),
    MarkAllDirty,
    Detach,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub slot: usize,
    pub at: u64,
    pub what: What,
}

/// Where the mirror stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Attaching, to decide who is kept (R8).
    Opening {
        since: u64,
    },
    /// Writing what every member may have lost again (R9).
    Replaying,
    Serving,
    /// No more requests; flushing and cleaning.
    Closing,
    Closed,
    Stopped,
}

/// One mirror of an open volume. See the module.
pub struct Mirror {
    pub(super) cfg: MirrorConfig,
    pub(super) version: SetVersion,
    pub(super) members: Mask,
    pub(super) awaited: Mask,
    /// The newest clean that is durable everywhere.
    pub(super) clean: CleanNo,
    pub(super) slots: Vec<Slot>,
    pub(super) phase: Phase,
    pub(super) change: Option<Change>,
    pub(super) forced: bool,
    pub(super) next_attach: AttachNo,
    pub(super) next_tag: u64,
    pub(super) sent: BTreeMap<u64, Sent>,
    pub(super) lost: VecDeque<(usize, FaultReason)>,

    pub(super) ops: BTreeMap<u64, Op>,
    pub(super) last_op: u64,
    /// Requests past the limit, in order of arrival.
    pub(super) backlog: VecDeque<u64>,
    /// Requests that wait for the mirror's state rather than for a lock or an answer.
    pub(super) gated: BTreeSet<u64>,
    pub(super) admitted: usize,
    pub(super) locks: RangeLocks,
    pub(super) granted: Vec<LockOwner>,
    /// Membership changed: look at every request again.
    pub(super) recheck: bool,

    pub(super) flush_next: FlushNo,
    pub(super) flush_wanted: bool,
    pub(super) flush_pending: Mask,
    pub(super) unflushed_bytes: u64,
    pub(super) unflushed_since: Option<u64>,
    pub(super) replay: Replay,

    pub(super) dirty: DirtyTracker,
    pub(super) cleaning: Option<Cleaning>,
    pub(super) settling: Settling,
    pub(super) equalising: BTreeMap<RegionIndex, Equalise>,
    pub(super) background: Background,
    pub(super) clean_next: u64,
    /// To be closed once what is kept has been written again.
    pub(super) close_wanted: bool,
    pub(super) closing_flush: Option<FlushNo>,
    pub(super) hash_count: u64,
    /// When a request of the volume was last seen: background work yields to it.
    pub(super) foreground_at: u64,
    pub(super) background_next: u64,
    /// When the clock ticked last.
    pub(super) ticked_at: u64,

    pub(super) copied_bytes: u64,
    pub(super) compared_bytes: u64,
    pub(super) restamped_blocks: u64,
}

impl Mirror {
    /// A mirror whose session has just opened. Nothing is attached; tell it of links.
    ///
    /// # Panics
    /// If the definition is empty or names a member that is none of its replicas.
    pub fn new(now: u64, cfg: MirrorConfig) -> Self {
        assert!(!cfg.replicas.is_empty() && cfg.replicas.len() <= proto::limits::MAX_REPLICAS);
        let slots: Vec<Slot> = cfg
            .replicas
            .iter()
            .map(|def| Slot {
                def: def.clone(),
                link: false,
                unreachable: false,
                attach: None,
                fault: FaultReason::NeverSeen,
                since: now,
                retry_at: 0,
                slow_until: 0,
                pace: ReadPace::default(),
                refusals: 0,
                clean_acked: CleanNo(0),
                attached_before: false,
            })
            .collect();
        let mut mirror = Self {
            version: cfg.version,
            members: Mask::EMPTY,
            awaited: Mask::EMPTY,
            clean: CleanNo(0),
            slots,
            phase: Phase::Opening { since: now },
            change: None,
            forced: false,
            next_attach: AttachNo(1),
            next_tag: 1,
            sent: BTreeMap::new(),
            lost: VecDeque::new(),
            ops: BTreeMap::new(),
            last_op: 0,
            backlog: VecDeque::new(),
            gated: BTreeSet::new(),
            admitted: 0,
            locks: RangeLocks::default(),
            granted: Vec::new(),
            recheck: false,
            flush_next: FlushNo(1),
            flush_wanted: false,
            flush_pending: Mask::EMPTY,
            unflushed_bytes: 0,
            unflushed_since: None,
            replay: Replay::default(),
            dirty: DirtyTracker::default(),
            cleaning: None,
            settling: Settling::default(),
            equalising: BTreeMap::new(),
            background: Background::default(),
            clean_next: 0,
            close_wanted: false,
            closing_flush: None,
            hash_count: 0,
            foreground_at: 0,
            background_next: 0,
            ticked_at: 0,
            copied_bytes: 0,
            compared_bytes: 0,
            restamped_blocks: 0,
            cfg,
        };
        mirror.members = mirror.mask_of(&mirror.cfg.members);
        mirror.awaited = mirror.mask_of(&mirror.cfg.awaited);
        mirror
    }

    /// Takes an input at `now`, milliseconds of the session's clock, which never goes back.
    pub fn step(&mut self, now: u64, input: Input, out: &mut Vec<Output>) {
        if matches!(self.phase, Phase::Stopped | Phase::Closed) {
            return;
        }
        match input {
            Input::Submit { id, op } => self.submit(now, id, op, out),
            Input::Abort { id } => self.abort(id, out),
            Input::LinkUp { slot } => {
                self.slots[slot].link = true;
                self.slots[slot].retry_at = now;
            }
            Input::LinkDown { slot } => {
                self.slots[slot].link = false;
                self.slots[slot].unreachable = true;
                if self.slots[slot].attach.is_some() {
                    self.lost.push_back((slot, FaultReason::LinkLost));
                }
            }
            Input::Reply { slot, tag, attach, reply } => self.answered(now, slot, tag, attach, reply, out),
            Input::SetDecided(decision) => self.set_decided(now, decision, out),
            // Said once, for what waits now: kept any longer it would accept the loss of something else.
            Input::Recover => {
                self.forced = matches!(self.phase, Phase::Opening { .. }) || !self.settling.blocked.is_empty();
            }
            Input::LimitResync(limit) => self.background.set_limit(now, limit),
            Input::Close => {
                if !self.is_closing() {
                    self.begin_close(out);
                }
            }
            Input::Tick => {
                self.time_out(now);
                self.hedge_reads(now, out);
            }
        }
        self.advance(now, out);
    }

    /// Whether nothing is going on and no replica is missing: what is left to the clock can wait a while.
    pub fn at_rest(&self) -> bool {
        self.phase == Phase::Serving
            && self.ops.is_empty()
            && self.sent.is_empty()
            && self.equalising.is_empty()
            && self.change.is_none()
            && self.unflushed_since.is_none()
            && self.live_members() == self.all_slots()
    }

    /// Lets everything that can go on do so. Every part looks at the state and takes its next step.
    fn advance(&mut self, now: u64, out: &mut Vec<Output>) {
        loop {
            while let Some((slot, reason)) = self.lost.pop_front() {
                self.give_up(now, slot, reason, out);
            }
            if self.phase == Phase::Stopped {
                return;
            }
            self.attach_where_due(now, out);
            self.advance_opening(now, out);
            self.advance_replay(now, out);
            self.advance_membership(now, out);
            self.advance_settling(now, out);
            self.advance_joins(now, out);
            self.advance_equalise(now, out);
            self.advance_background(now, out);
            self.advance_granted(now, out);
            self.advance_kept();
            self.advance_ops(now, out);
            self.advance_flush(now, out);
            self.advance_clean(now, out);
            self.advance_close(now, out);
            if self.lost.is_empty() && self.granted.is_empty() && !self.recheck && !self.background.stirred {
                return;
            }
        }
    }

    // ---- replicas -------------------------------------------------------------------------------------------

    pub(super) fn regions(&self) -> u32 {
        u32::try_from(self.cfg.blocks.div_ceil(REGION_BLOCKS)).expect("MAX_MIRROR_SIZE bounds the regions")
    }

    pub(super) fn mask_of(&self, replicas: &[ReplicaId]) -> Mask {
        replicas
            .iter()
            .map(|id| {
                self.slots
                    .iter()
                    .position(|s| s.def.replica == *id)
                    .unwrap_or_else(|| panic!("replica {id} is not of mirror {}", self.cfg.mirror))
            })
            .collect()
    }

    pub(super) fn ids_of(&self, mask: Mask) -> Vec<ReplicaId> {
        let mut ids: Vec<_> = mask.iter().map(|s| self.slots[s].def.replica).collect();
        ids.sort();
        ids
    }

    fn slots_where(&self, pred: impl Fn(&Slot) -> bool) -> Mask {
        self.slots.iter().enumerate().filter(|(_, s)| pred(s)).map(|(i, _)| i).collect()
    }

    /// Members of the committed set whose attach stands: they may be read.
    pub(super) fn live_members(&self) -> Mask {
        self.slots_where(Slot::is_member) & self.members
    }

    /// Everything that takes part in writes.
    pub(super) fn live(&self) -> Mask {
        self.slots_where(Slot::is_live)
    }

    pub(super) fn all_slots(&self) -> Mask {
        (0..self.slots.len()).collect()
    }

    pub(super) fn set_view(&self) -> SetView {
        SetView { version: self.version, members: self.ids_of(self.members), clean: self.clean }
    }

    fn attach_where_due(&mut self, now: u64, out: &mut Vec<Output>) {
        if matches!(self.phase, Phase::Closing) {
            return;
        }
        for slot in 0..self.slots.len() {
            let s = &self.slots[slot];
            if !s.link || s.attach.is_some() || now < s.retry_at {
                continue;
            }
            let id = AttachId { epoch: self.cfg.epoch, attach: self.next_attach };
            self.next_attach = self.next_attach.next();
            self.slots[slot].attach = Some(Attach {
                id,
                role: Role::Attaching,
                info: None,
                flushed: FlushNo(0),
                listed: None,
                suspect: RegionSet::new(),
                restarted: false,
                as_new: false,
            });
            let request = Request::Attach {
                replica: self.slots[slot].def.replica,
                mirror: self.cfg.mirror,
                lease_ms: LEASE_MS as u32,
                set: self.set_view(),
            };
            self.send(now, slot, What::Attach, request, out);
        }
    }

    fn attached(&mut self, now: u64, slot: usize, mut info: AttachInfo, out: &mut Vec<Output>) {
        if mutant::is(Mutant::KeepRestarted) {
            (info.told, info.suspect) = (true, 0);
        }
        let s = &self.slots[slot];
        // A set version is newer than ours only if raft's history was rolled back; while a change of ours is in
        // doubt its version may be stored nowhere yet, so this holds then too (R8).
        if info.set.version > self.version || info.stored_epoch > self.cfg.epoch {
            let replica = s.def.replica;
            let (epoch, version) = (info.stored_epoch, info.set.version);
            self.stop(StopReason::MetadataIsOld { replica, epoch, version }, out);
            return;
        }
        if info.blocks != self.cfg.blocks {
            self.lost.push_back((slot, FaultReason::Nonsense));
            return;
        }
        // What this session knows of the replica that an old image of its disk cannot (R6).
        let old_image = info.set.clean < s.clean_acked || (s.attached_before && info.stored_epoch < self.cfg.epoch);
        let as_new = info.rebuilt || old_image && !mutant::is(Mutant::TrustOldImage);
        let slot_ref = &mut self.slots[slot];
        slot_ref.attached_before = true;
        let attach = slot_ref.attach.as_mut().expect("the caller checked the attach");
        attach.restarted = !info.told;
        attach.as_new = as_new;
        attach.info = Some(info);
        attach.role = Role::Standby;
        if matches!(self.phase, Phase::Opening { .. }) {
            self.request_list(now, slot, out);
        } else {
            self.start_join(now, slot, out);
        }
    }

    /// Asks a replica for all its regions; [`Attach::listing_done`] says when they are there.
    pub(super) fn request_list(&mut self, now: u64, slot: usize, out: &mut Vec<Output>) {
        let attach = self.slots[slot].attach.as_mut().expect("listed replicas are attached");
        attach.listed = Some(Listed::default());
        self.request_list_window(now, slot, out);
    }

    fn request_list_window(&mut self, now: u64, slot: usize, out: &mut Vec<Output>) {
        const WINDOW: u32 = 1 << 20;
        let attach = self.slots[slot].attach.as_ref().expect("listed replicas are attached");
        let next = attach.listed.as_ref().expect("a listing is under way").next;
        let count = (self.regions() - next).min(WINDOW);
        let tag = self.send(now, slot, What::List, Request::ListRegions { first: RegionIndex(next), count }, out);
        let attach = self.slots[slot].attach.as_mut().expect("listed replicas are attached");
        attach.listed.as_mut().expect("a listing is under way").asked = tag;
    }

    /// Gives an attach up: nothing is sent or believed under it again (R2, R4).
    fn give_up(&mut self, now: u64, slot: usize, reason: FaultReason, out: &mut Vec<Output>) {
        let Some(attach) = self.slots[slot].attach.take() else { return };
        out.push(Output::GiveUp { slot, attach: attach.id });
        let s = &mut self.slots[slot];
        if matches!(attach.role, Role::Member) || s.fault == FaultReason::NeverSeen {
            s.since = now;
        }
        s.fault = reason;
        s.unreachable = true;
        // A replica that refuses again and again, as on a full disk, is tried less and less often.
        let refused = matches!(reason, FaultReason::Refused(_) | FaultReason::TimedOut | FaultReason::Nonsense);
        s.refusals = if refused { (s.refusals + 1).min(MAX_REATTACH_DOUBLINGS) } else { 0 };
        s.retry_at = now + (REATTACH_MS << s.refusals);
        out.push(Output::Log(Event::Lost { replica: s.def.replica, reason }));
        self.flush_pending.remove(slot);
        let gone: Vec<u64> = self.sent.iter().filter(|(_, s)| s.slot == slot).map(|(tag, _)| *tag).collect();
        for tag in gone {
            let sent = self.sent.remove(&tag).expect("listed above");
            if let What::Equalise(region) = sent.what {
                self.equalise_lost(region, tag);
            }
        }
        // A clean or a stored set that this replica did not answer is not durable everywhere.
        self.clean_lost(slot);
        self.change_lost(slot);
        self.equalise_forget(slot);
        self.replay.forget(slot);
        self.extra_base_lost(slot);
        for op in self.ops.values_mut() {
            op.forget(slot);
        }
        self.recheck = true;
    }

    pub(super) fn stop(&mut self, reason: StopReason, out: &mut Vec<Output>) {
        self.phase = Phase::Stopped;
        out.push(Output::Stop(reason));
    }

    // ---- requests and answers -------------------------------------------------------------------------------

    pub(super) fn send(&mut self, now: u64, slot: usize, what: What, request: Request, out: &mut Vec<Output>) -> u64 {
        let attach = self.slots[slot].attach.as_ref().expect("only attached replicas are sent to").id;
        let tag = self.next_tag;
        self.next_tag += 1;
        self.sent.insert(tag, Sent { slot, at: now, what });
        out.push(Output::Send { slot, attach, tag, request });
        tag
    }

    fn answered(&mut self, now: u64, slot: usize, tag: u64, attach: AttachId, reply: Reply, out: &mut Vec<Output>) {
        // Answers count only within their attach (R1).
        if self.slots[slot].attach.as_ref().is_none_or(|a| a.id != attach) {
            return;
        }
        let Some(sent) = self.sent.remove(&tag) else { return };
        if sent.slot != slot {
            self.lost.push_back((slot, FaultReason::Nonsense));
            return;
        }
        if let Reply::Failed { code, block, .. } = &reply
            && code.what_next() == WhatNext::Stop
        {
            let (replica, epoch) = (self.slots[slot].def.replica, Epoch(*block));
            self.stop(StopReason::Fenced { replica, epoch }, out);
            return;
        }
        if matches!(reply, Reply::Read { .. }) {
            self.slots[slot].pace.answered(now.saturating_sub(sent.at));
        }
        match sent.what {
            What::Op(id) => self.op_answered(now, slot, id, reply, out),
            What::Dropped => self.dropped_answered(reply),
            What::Replay(index) => self.replay_answered(slot, index, reply),
            What::Equalise(region) => self.equalise_answered(now, slot, region, tag, reply, out),
            what => match reply {
                Reply::Failed { code, .. } => self.lost.push_back((slot, fault_of(code))),
                Reply::Attached(info) if what == What::Attach => self.attached(now, slot, info, out),
                Reply::Regions(window) if what == What::List => {
                    let attach = self.slots[slot].attach.as_mut().expect("checked above");
                    let Some(listed) = attach.listed.as_mut().filter(|l| l.asked == tag) else { return };
                    if window.first.0 != listed.next || window.count == 0 {
                        self.lost.push_back((slot, FaultReason::Nonsense));
                        return;
                    }
                    listed.dirty.insert_bits(window.first, window.count, &window.dirty);
                    if !mutant::is(Mutant::KeepRestarted) {
                        listed.suspect.insert_bits(window.first, window.count, &window.suspect);
                    }
                    listed.allocated.insert_bits(window.first, window.count, &window.allocated);
                    listed.next += window.count;
                    if listed.next < self.regions() {
                        self.request_list_window(now, slot, out);
                    }
                }
                Reply::Done(_) => match what {
                    What::Flush(no) => {
                        let attach = self.slots[slot].attach.as_mut().expect("checked above");
                        attach.flushed = attach.flushed.max(no);
                        self.flush_pending.remove(slot);
                        self.recheck = true;
                    }
                    What::Clean => self.clean_answered(slot),
                    What::StoreSet(version) => self.set_stored(slot, version),
                    What::MarkAllDirty => {
                        if let Some(join) = self.slots[slot].join_mut() {
                            join.stage = JoinStage::Barrier;
                        }
                    }
                    _ => {}
                },
                _ => self.lost.push_back((slot, FaultReason::Nonsense)),
            },
        }
    }

    fn time_out(&mut self, now: u64) {
        for sent in self.sent.values() {
            let limit = match sent.what {
                What::Flush(_) | What::Clean | What::StoreSet(_) | What::MarkAllDirty | What::Attach => {
                    limits::FLUSH_TIMEOUT_MS
                }
                _ => limits::REQUEST_TIMEOUT_MS,
            };
            if now.saturating_sub(sent.at) > limit && !self.lost.iter().any(|(s, _)| *s == sent.slot) {
                self.lost.push_back((sent.slot, FaultReason::TimedOut));
            }
        }
    }

    // ---- for operators --------------------------------------------------------------------------------------

    /// Where everything stands.
    pub fn status(&self) -> MirrorStatus {
        let replicas = self.slots.iter().enumerate().map(|(i, s)| {
            let standing = match &s.attach {
                Some(Attach { role: Role::Member, .. }) if self.members.contains(i) => Standing::InSync,
                Some(Attach { role: Role::Joining(join), .. }) => Standing::Joining {
                    todo: join.todo.len(),
                    total: join.total,
                    copied_bytes: join.copied_bytes,
                    started: join.started,
                },
                _ if self.members.contains(i) => Standing::Leaving(s.fault),
                _ => Standing::Missing(s.fault),
            };
            ReplicaStatus { replica: s.def.replica, node: s.def.node, standing, since: s.since }
        });
        MirrorStatus {
            mirror: self.cfg.mirror,
            set: self.set_view(),
            replicas: replicas.collect(),
            waits: self.waits(),
            in_flight: self.ops.len(),
            dirty_regions: self.dirty.len(),
            unsettled: self.settling.left(),
            copied_bytes: self.copied_bytes,
            compared_bytes: self.compared_bytes,
            restamped_blocks: self.restamped_blocks,
        }
    }

    /// Whether no new requests are taken.
    pub(super) fn is_closing(&self) -> bool {
        self.phase == Phase::Closing || self.close_wanted
    }

    /// Whether it serves, and nothing that the opening found is left to settle: from then on this session keeps all that
    /// it acknowledges (R9).
    pub fn is_settled(&self) -> bool {
        self.phase == Phase::Serving && self.settling.is_settled()
    }

    /// Whether the mirror serves requests.
    pub fn is_serving(&self) -> bool {
        self.phase == Phase::Serving
    }

    fn waits(&self) -> Option<String> {
        match self.phase {
            Phase::Opening { .. } => {
                let missing: Vec<_> = ((self.members | self.awaited).iter())
                    .filter(|s| !self.slots[*s].is_answered())
                    .map(|s| {
                        format!(
                            "{} on node {} ({})",
                            self.slots[s].def.replica, self.slots[s].def.node, self.slots[s].fault
                        )
                    })
                    .collect();
                Some(if missing.is_empty() {
                    "for its replicas' answers, or the previous owner's lease to end".to_owned()
                } else {
                    format!("for replica {}", missing.join(", "))
                })
            }
            Phase::Replaying => Some("writes that every replica's cache has lost are written again".to_owned()),
            Phase::Serving | Phase::Closing if self.change.is_some() && !self.live_members_complete() => {
                Some("writes wait for the in-sync set to be committed".to_owned())
            }
            Phase::Serving | Phase::Closing if !self.settling.blocked.is_empty() => Some(format!(
                "{} regions wait for replica {} or recover-volume --force",
                self.settling.blocked.len(),
                self.ids_of(self.awaited).iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            )),
            Phase::Serving | Phase::Closing if self.members.len() < self.cfg.min_in_sync => {
                Some(format!("writes wait: {} replicas in sync, {} wanted", self.members.len(), self.cfg.min_in_sync))
            }
            _ => None,
        }
    }

    fn live_members_complete(&self) -> bool {
        self.members.within(self.live_members())
    }

    pub(super) fn reset_ops(&mut self) {
        // Their locks and their attaches are gone: they begin again, as if they had arrived later. None of them
        // was answered; those that were only wait for stragglers that no attach can bring any more.
        self.locks = RangeLocks::default();
        self.granted.clear();
        self.dirty.settle_in_flight(self.flush_next);
        self.ops.retain(|_, op| !op.answered);
        self.admitted = self.ops.len() - self.backlog.len();
        self.gated.clear();
        for (id, op) in &mut self.ops {
            if !matches!(op.stage, Stage::Backlog) {
                op.restart();
                self.gated.insert(*id);
            }
        }
        self.admit();
    }
}

/// Why a replica that answered so is given up.
pub(super) fn fault_of(code: Code) -> FaultReason {
    match code {
        Code::NotAttached => FaultReason::Restarted,
        code => FaultReason::Refused(code),
    }
}
