//! The model as stateright takes it: what may happen in a state, what it leads to, and what must hold.

use stateright::{Model, Property};

use crate::config::{Config, Mutant};
use crate::gateway::Cx;
use crate::replica::{Taken, disk_writes};
use crate::state::*;

/// What happens. Gateways and replicas are counted from 0.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Action {
    /// An initiator asks for something.
    Write {
        g: usize,
        fua: bool,
    },
    Read {
        g: usize,
    },
    Flush {
        g: usize,
    },
    /// The owner has kept something for long, and flushes.
    Overdue {
        g: usize,
    },
    /// An operator closes the volume.
    Close {
        g: usize,
    },
    /// The region has been idle for a while.
    CleanDue {
        g: usize,
    },
    /// The read that waits is sent to this replica.
    ReadFrom {
        g: usize,
        slot: usize,
    },
    /// The base of the region that is equalised.
    Base {
        g: usize,
        slot: usize,
    },
    Attach {
        g: usize,
        slot: usize,
    },
    /// The attach is given up: a time-out, or its connection is lost.
    GiveUp {
        g: usize,
        slot: usize,
    },
    /// A replica answers that a newer session has it (`WhatNext::Stop`).
    Fenced {
        g: usize,
    },
    /// The opening goes on without these, which it can't reach.
    DecideWithout {
        g: usize,
        missing: Mask,
    },
    /// A replica takes a request from its connection.
    Take(Msg),
    /// Its disk has done it.
    Finish(Msg),
    /// The gateway hears the answer.
    Hear(Msg),
    /// Raft decides what a session proposed.
    Decide {
        epoch: u8,
    },
    /// The answer to that arrives.
    Decided {
        epoch: u8,
    },
    /// It is lost, and the second asking finds another version than it expected.
    AnswerLost {
        epoch: u8,
    },
    PowerCut {
        slot: usize,
        value: u8,
        dirty: bool,
        clean: u8,
    },
    /// Power is cut everywhere but where the gateways are.
    AllCut {
        values: [u8; N],
    },
    Kill {
        slot: usize,
        landed: bool,
    },
    /// A flush fails on the disk.
    Fault {
        slot: usize,
        value: u8,
    },
    TakeImage {
        slot: usize,
    },
    RestoreImage {
        slot: usize,
    },
    /// A gateway process ends.
    Die {
        g: usize,
    },
    /// A gateway opens a session.
    Open {
        g: usize,
    },
    /// The lease of a superseded owner ends.
    LeaseOver {
        g: usize,
    },
}

/// Properties, by name.
pub mod names {
    pub const FLUSHED: &str = "R9: every member's disk keeps every flushed write";
    pub const MEMBERS: &str = "R2: every member holds every acknowledged write";
    pub const READS: &str = "R3: no read goes back in time";
    pub const DIRTY: &str = "R6: where replicas may differ, one of them is dirty";
    pub const LAST: &str = "R9: what the last member acknowledged is on its disk";
    pub const KEPT: &str = "R9: what a living owner acknowledged is on every member's disk, or kept";
    pub const HELD: &str = "R8: nothing is given up while a member holds it";
    pub const CLOSED: &str = "R6: after a clean close all are equal and none is dirty";
    pub const METADATA: &str = "R8: no replica knows more than raft";
    pub const VERSIONS: &str = "R2: set versions rise";

    pub const ACKED: &str = "a write is acknowledged";
    pub const SHRUNK: &str = "a member is removed";
    pub const JOINED: &str = "a replica that left joins again";
    pub const ALONE: &str = "a write is acknowledged by the last member";
    pub const DOUBT: &str = "a commit whose answer was lost is found out";
    pub const TAKEN_OVER: &str = "a second session serves";
    pub const RESTARTED: &str = "a session goes on with restarted members only";
    pub const SOME_KEPT: &str = "a take-over keeps some members and not others";
    pub const BLOCKED: &str = "a suspect region waits for others";
    pub const RELEASED: &str = "a blocked region is released";
    pub const CLEANED: &str = "a clean is durable everywhere";
    pub const CLEAN_CLOSE: &str = "a session closes clean";
    pub const COPIED: &str = "a block is copied";
    pub const FENCED: &str = "an old owner is fenced while its lease lives";
    pub const OLD_IMAGE: &str = "an old image joins as new";
    pub const REPLAYED: &str = "what is kept is written again";
    pub const REPLAYED_AGAIN: &str = "caches are lost while something is written again";
    pub const LET_GO: &str = "what was written again is let go";
    pub const KILLED_ONLY: &str = "a session goes on with killed members only";
    pub const READ_BACK: &str = "a read returns the last write";
}

/// The state that everything begins with: a session that serves, with all that is in the set attached.
fn initial(cfg: &Config) -> State {
    let stale = |slot: usize| cfg.members & bit(slot) == 0;
    let all = cfg.members == cfg.all();
    let attach = |slot: usize| if stale(slot) { AttachId::NONE } else { AttachId::new(1, 1) };
    // A replica that is out has missed the write that the others have.
    let first = u8::from(!all);
    let r = std::array::from_fn(|slot| Replica {
        value: if stale(slot) { 0 } else { first },
        maybe: 1 << if stale(slot) { 0 } else { first },
        since: 0,
        flushing: None,
        dirty: first == 1 && !stale(slot),
        dirty_disk: first == 1 && !stale(slot),
        epoch: 1,
        kept_epoch: 1,
        version: if stale(slot) { 1 } else { 1 + first },
        clean: 0,
        clean_disk: 0,
        whole: true,
        newest: if stale(slot) { AttachId::new(1, 0) } else { attach(slot) },
        current: attach(slot),
        told: !stale(slot),
        kept: false,
        suspect: false,
        change: (first == 1 && !stale(slot) && cfg.cleans()).then_some(0),
        begun: u8::from(cfg.cleans()),
        completed: u8::from(cfg.cleans()),
        cut: stale(slot),
        imaged: false,
    });
    let g = Gateway {
        epoch: 1,
        phase: Phase::Serving,
        lease: true,
        version: 1 + first,
        members: cfg.members,
        slots: std::array::from_fn(|slot| match stale(slot) {
            true => Slot { attaches: 1, attached_before: true, ..Slot::EMPTY },
            false => Slot {
                attach: attach(slot).0,
                role: Role::Member,
                flushed: 1,
                attaches: 1,
                attached_before: true,
                ..Slot::EMPTY
            },
        }),
        flush_next: 2,
        replay: Replay::new(true),
        tracked: first == 1 && cfg.cleans(),
        covered: u8::from(first == 1 && cfg.cleans()),
        ..Gateway::OFF
    };
    State {
        r,
        g: [g, Gateway::OFF],
        wire: Wire::default(),
        raft: Raft { version: 1 + first, members: cfg.members, awaited: 0, epoch: 1, open: true },
        proposals: [None; 3],
        promise: Promise { submitted: first, acked: first, seen: 0, flushed: first, power_on_epoch: 0 },
        left: cfg.bounds,
        image: None,
        breach: None,
        cleans: cfg.cleans(),
    }
}

/// Takes one of what is left, if there is one.
fn spend(left: &mut u8) -> Option<()> {
    *left = left.checked_sub(1)?;
    Some(())
}

impl State {
    /// Lets gateway `g` do something, and then everything that follows at once.
    fn with<T>(&mut self, cfg: &Config, g: usize, f: impl FnOnce(&mut Cx<'_>) -> T) -> T {
        let old_lease_over = self.g.iter().enumerate().all(|(i, other)| i == g || !other.lease);
        let untouched = |r: &Replica| r.told && !r.suspect || r.kept;
        let untouched = (0..N).filter(|slot| untouched(&self.r[*slot])).map(bit).sum();
        let mut cx = Cx {
            cfg,
            g: &mut self.g[g],
            wire: &mut self.wire,
            proposals: &mut self.proposals,
            promise: &mut self.promise,
            kept: 0,
            untouched,
            breach: &mut self.breach,
            old_lease_over,
        };
        let result = f(&mut cx);
        cx.advance();
        let kept = cx.kept;
        if self.g[g].phase == Phase::Replaying {
            // Whatever is left there, something was lost; what is written again may be older than what is left.
            let lost = self.r.iter_mut().enumerate().filter(|(slot, _)| self.g[g].members & bit(*slot) != 0);
            lost.filter(|(_, r)| !r.told).for_each(|(_, r)| r.cut = true);
        }
        // Unless it has been lost since, which nobody knows yet.
        let here = |slot: &usize| self.r[*slot].current.0 == self.g[g].slots[*slot].attach;
        for slot in slots(kept).filter(here).collect::<Vec<_>>() {
            (self.r[slot].cut, self.r[slot].imaged) = (false, false);
        }
        result
    }

    /// Whether this attach has been asked for and not been taken.
    fn is_asked(&self, slot: usize, id: AttachId) -> bool {
        self.wire.all().iter().any(|m| (m.slot as usize, m.attach, m.what) == (slot, id, What::Attach))
    }

    /// Whether the replica, or its process, has ended this attach by itself, so that its owner must find out. Where a
    /// newer session has, it is told so, and stops; that it loses the connection instead is a partition.
    fn has_ended(&self, slot: usize, id: AttachId) -> bool {
        let r = &self.r[slot];
        let coming = self.is_asked(slot, id) && r.newest <= id;
        r.current != id && !coming && r.newest.epoch() <= id.epoch()
    }

    /// The gateway whose session this is, if it still runs.
    fn session(&self, epoch: u8) -> Option<usize> {
        self.g.iter().position(|g| g.epoch == epoch && !matches!(g.phase, Phase::Off | Phase::Stopped | Phase::Closed))
    }

    /// The gateway of an answer, and the slot that it is about, if it is believed there.
    fn listener(&mut self, cfg: &Config, msg: &Msg) -> Option<(usize, usize)> {
        let (slot, attach) = match msg.what {
            What::Copy { source, source_attach, .. } => (source as usize, AttachId(source_attach)),
            _ => (msg.slot as usize, msg.attach),
        };
        let g = self.session(attach.epoch())?;
        self.with(cfg, g, |cx| cx.believes(slot, attach)).then_some((g, slot))
    }

    fn take(&mut self, cfg: &Config, msg: Msg) {
        let slot = msg.slot as usize;
        match self.r[slot].take(cfg, &self.wire, &msg) {
            Taken::Waits => {}
            Taken::Gone => self.wire.remove(&msg),
            Taken::Begun => {
                self.set_stage(&msg, Stage::Begun);
                if cfg.flush_at_once && matches!(msg.what, What::Flush(_)) {
                    self.finish(cfg, Msg { stage: Stage::Begun, ..msg });
                }
            }
            Taken::Sent(copy) => {
                self.wire.remove(&msg);
                self.wire.push(copy);
            }
            Taken::Attached(stored) => {
                self.wire.remove(&msg);
                // Nothing older will be taken any more.
                if cfg.mutant != Some(Mutant::NoAttachCheck) {
                    let refused = |m: &Msg| m.slot == msg.slot && m.attach < msg.attach && m.stage == Stage::Sent;
                    self.wire.retain(|m| !refused(m));
                }
                if let Some((g, slot)) = self.listener(cfg, &msg) {
                    let r = self.r[slot];
                    self.with(cfg, g, |cx| cx.attached(slot, &r, stored));
                }
            }
            Taken::Listed { dirty, suspect } => {
                self.wire.remove(&msg);
                if let Some((g, slot)) = self.listener(cfg, &msg) {
                    self.with(cfg, g, |cx| cx.listed(slot, dirty, suspect));
                }
            }
            Taken::Answered(value) => {
                self.set_stage(&msg, Stage::Answered(value));
                let late = cfg.late && matches!(msg.what, What::Read);
                if !late {
                    self.hear(cfg, Msg { stage: Stage::Answered(value), ..msg });
                }
            }
        }
    }

    fn set_stage(&mut self, msg: &Msg, stage: Stage) {
        if let Some(found) = self.wire.all_mut().iter_mut().find(|m| *m == msg) {
            found.stage = stage;
        }
    }

    fn finish(&mut self, cfg: &Config, msg: Msg) {
        self.r[msg.slot as usize].finish(cfg, &msg);
        let answered = Msg { stage: Stage::Answered(0), ..msg };
        self.set_stage(&msg, answered.stage);
        let late = cfg.late && matches!(msg.what, What::Write { .. });
        if !late || self.listener(cfg, &answered).is_none() {
            self.hear(cfg, answered);
        }
    }

    /// Carries out what is answered at once, while its attach holds.
    fn answer_at_once(&mut self, cfg: &Config) {
        let at_once = |m: &Msg| match m.what {
            What::List | What::Hash | What::Settle { .. } | What::MarkDirty => true,
            What::StoreSet { .. } => cfg.store_at_once,
            What::Attach => false,
            What::Write { .. } | What::Read | What::Flush(_) | What::CopyTo { .. } => false,
            What::Copy { .. } | What::Clean { .. } => false,
        };
        while let Some(msg) = (self.wire.all().iter())
            .find(|m| m.stage == Stage::Sent && at_once(m) && self.r[m.slot as usize].current == m.attach)
        {
            self.take(cfg, *msg);
        }
    }

    /// The gateway takes an answer; nobody does if the session or the attach has ended.
    fn hear(&mut self, cfg: &Config, msg: Msg) {
        self.wire.remove(&msg);
        let Stage::Answered(value) = msg.stage else { unreachable!("{msg:?} is no answer") };
        let Some((g, slot)) = self.listener(cfg, &msg) else { return };
        self.with(cfg, g, |cx| match msg.what {
            What::Write { value, .. } => cx.written(slot, value),
            What::Read => cx.read(slot, value),
            What::Hash => cx.hashed(slot, value),
            What::Flush(no) => cx.flush_done(slot, no),
            What::Copy { .. } => cx.copied(msg.slot as usize),
            What::Clean { .. } => cx.cleaned(slot),
            What::StoreSet { .. } => cx.stored(slot),
            What::MarkDirty => cx.marked(slot),
            What::Attach | What::List | What::Settle { .. } | What::CopyTo { .. } => {
                unreachable!("{msg:?} is answered at once")
            }
        });
    }

    /// Raft's state machine: `change_set`, `owned`.
    fn decide(&mut self, cfg: &Config, at: usize) {
        let Some(proposal) = &mut self.proposals[at] else { return };
        let owner = proposal.epoch == self.raft.epoch && self.raft.open;
        proposal.decision = if !owner && cfg.mutant != Some(Mutant::StaleSession) {
            Decision::Superseded
        } else if proposal.expected != self.raft.version {
            Decision::Refused
        } else {
            self.raft.version = proposal.expected.max(self.raft.version) + 1;
            (self.raft.members, self.raft.awaited) = (proposal.members, proposal.awaited);
            Decision::Committed(self.raft.version)
        };
        let epoch = proposal.epoch;
        if self.session(epoch).is_none() {
            self.proposals[at] = None;
        }
    }

    /// What was on its way to a process that has ended, or on its disk.
    fn forget_process(&mut self, slot: usize) {
        self.wire.retain(|m| m.slot as usize != slot || matches!(m.stage, Stage::Answered(_)));
    }

    fn end_session(&mut self, g: usize) {
        let epoch = self.g[g].epoch;
        self.wire.retain(|m| m.attach.epoch() != epoch || !matches!(m.stage, Stage::Answered(_)));
        self.g[g].lease = false;
        for proposal in &mut self.proposals {
            *proposal = proposal.filter(|p| p.epoch != epoch || p.decision == Decision::Asked);
        }
    }

    /// A session that closed as clean must have left nothing (R6).
    fn check_close(&mut self, cfg: &Config, g: usize) {
        if self.g[g].phase != Phase::Closed || self.g[g].tracked {
            return;
        }
        let (r, first) = (&self.r[..cfg.replicas], &self.r[0]);
        let equal = r.iter().all(|r| r.value == first.value && r.maybe == 1 << first.value);
        if !equal || r.iter().any(|r| r.dirty_disk) {
            self.breach = Some(Breach::UncleanClose);
        }
    }
}

impl Config {
    fn gateway_actions(&self, s: &State, g: usize, out: &mut Vec<Action>) {
        let gw = &s.g[g];
        match gw.phase {
            Phase::Off | Phase::Closed | Phase::Stopped => {
                // Where sessions die at all, the next one begins when the last has ended.
                let alone = s.g.iter().all(|g| matches!(g.phase, Phase::Off | Phase::Closed | Phase::Stopped));
                if s.left.opens > 0 && (alone || self.bounds.deaths == 0) {
                    out.push(Action::Open { g });
                }
                if gw.phase == Phase::Stopped && gw.lease {
                    out.push(Action::LeaseOver { g });
                }
                return;
            }
            Phase::Opening | Phase::Replaying | Phase::Serving | Phase::Closing => {}
        }
        if s.left.overdue > 0
            && matches!(gw.phase, Phase::Replaying | Phase::Serving)
            && gw.flush_pending == 0
            && !gw.replay.is_empty()
        {
            out.push(Action::Overdue { g });
        }
        // What is asked for before waits: it might as well be asked for later.
        if gw.phase == Phase::Serving {
            if gw.op.is_none() && s.left.writes > 0 {
                out.push(Action::Write { g, fua: false });
            }
            if gw.op.is_none() && s.left.fuas > 0 {
                out.push(Action::Write { g, fua: true });
            }
            if gw.op.is_none() && s.left.reads > 0 {
                out.push(Action::Read { g });
            }
            if gw.flush_op.is_none() && s.left.flushes > 0 {
                out.push(Action::Flush { g });
            }
        }
        if gw.phase == Phase::Serving {
            if !gw.clean_due && gw.tracked && s.left.cleans > 0 {
                out.push(Action::CleanDue { g });
            }
            if s.left.closes > 0 {
                out.push(Action::Close { g });
            }
        }
        if s.left.deaths > 0 {
            out.push(Action::Die { g });
        }
        if gw.lease && gw.epoch < s.raft.epoch {
            out.push(Action::LeaseOver { g });
        }
        let mut probe = s.clone();
        let (readable, bases, without) = probe.with_quietly(self, g);
        out.extend(slots(readable).map(|slot| Action::ReadFrom { g, slot }));
        out.extend(bases.into_iter().map(|slot| Action::Base { g, slot }));
        if without != 0 && without.count_ones() as u8 <= s.left.unreached {
            let unfenced = gw.members & without != 0;
            let over = s.g.iter().enumerate().all(|(i, other)| i == g || !other.lease);
            if !unfenced || over || self.mutant == Some(Mutant::TakeOverUnderOldLease) {
                out.push(Action::DecideWithout { g, missing: without });
            }
        }
        if s.r.iter().any(|r| r.newest.epoch() > gw.epoch) {
            out.push(Action::Fenced { g });
        }
        for (slot, known) in gw.slots.iter().enumerate().take(self.replicas) {
            if known.attach == 0 {
                // One that a newer session has would only refuse it.
                if gw.phase != Phase::Closing && s.r[slot].newest.epoch() <= gw.epoch {
                    out.push(Action::Attach { g, slot });
                }
                continue;
            }
            let id = AttachId(known.attach);
            // What a replica has ended is found out sooner or later; anything else is a partition.
            if s.has_ended(slot, id) || s.left.losses > 0 {
                out.push(Action::GiveUp { g, slot });
            }
        }
    }

    fn replica_actions(&self, s: &State, slot: usize, out: &mut Vec<Action>) {
        let r = &s.r[slot];
        let dark = s.left.blackouts > 0 && s.g.iter().all(|g| matches!(g.phase, Phase::Off | Phase::Closed));
        if s.left.cuts > 0 || dark {
            let values = r.after_cut(&s.wire, slot);
            let cleaning = r.clean != r.clean_disk || r.dirty != r.dirty_disk;
            for value in (0..16).filter(|v| values >> v & 1 == 1) {
                for dirty in [true, false] {
                    if dirty != r.dirty_disk && !(cleaning && dirty == r.dirty) {
                        continue;
                    }
                    out.push(Action::PowerCut { slot, value, dirty, clean: r.clean_disk });
                    if r.clean != r.clean_disk {
                        out.push(Action::PowerCut { slot, value, dirty, clean: r.clean });
                    }
                }
            }
        }
        let flushes = |m: &Msg| m.slot as usize == slot && m.attach == r.current && matches!(m.what, What::Flush(_));
        if s.left.faults > 0 && s.wire.all().iter().any(flushes) {
            let values = r.after_cut(&s.wire, slot);
            out.extend((0..16).filter(|v| values >> v & 1 == 1).map(|value| Action::Fault { slot, value }));
        }
        if s.left.kills > 0 {
            out.push(Action::Kill { slot, landed: false });
            if disk_writes(&s.wire, slot).next().is_some() {
                out.push(Action::Kill { slot, landed: true });
            }
        }
        match s.image {
            None if s.left.images > 0 && r.maybe == 1 << r.value && r.dirty == r.dirty_disk => {
                out.push(Action::TakeImage { slot });
            }
            Some(image) if image.slot as usize == slot && r.clean_disk >= image.clean + self.image_cleans => {
                out.push(Action::RestoreImage { slot })
            }
            _ => {}
        }
    }

    fn all_cut(&self, s: &State, out: &mut Vec<Action>) {
        let mut left = vec![[0; N]];
        for slot in 0..self.replicas {
            let values = s.r[slot].after_cut(&s.wire, slot);
            let values = (0..16).filter(|v| values >> v & 1 == 1);
            left = values
                .flat_map(|value| {
                    left.iter().map(move |other| {
                        let mut values = *other;
                        values[slot] = value;
                        values
                    })
                })
                .collect();
        }
        out.extend(left.into_iter().map(|values| Action::AllCut { values }));
    }

    fn apply(&self, s: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Write { g, fua } => {
                spend(if fua { &mut s.left.fuas } else { &mut s.left.writes })?;
                s.promise.submitted += 1;
                let value = s.promise.submitted;
                s.with(self, g, |cx| cx.g.op = Some(Op { fua, ..Op::new(Some(value), 0) }));
            }
            Action::Read { g } => {
                spend(&mut s.left.reads)?;
                let known = s.promise.acked.max(s.promise.seen);
                s.with(self, g, |cx| cx.g.op = Some(Op::new(None, known)));
            }
            Action::Flush { g } => {
                spend(&mut s.left.flushes)?;
                let covers = s.promise.acked;
                s.with(self, g, |cx| cx.g.flush_op = Some(FlushOp { no: 0, covers }));
            }
            Action::Overdue { g } => {
                spend(&mut s.left.overdue)?;
                s.with(self, g, |cx| cx.g.flush_wanted = true);
            }
            Action::Close { g } => {
                spend(&mut s.left.closes)?;
                s.with(self, g, |cx| (cx.g.phase, cx.g.closing_flush) = (Phase::Closing, 0));
            }
            Action::CleanDue { g } => {
                spend(&mut s.left.cleans)?;
                s.with(self, g, |cx| cx.g.clean_due = true);
            }
            Action::ReadFrom { g, slot } => s.with(self, g, |cx| cx.read_from(slot)),
            Action::Base { g, slot } => s.with(self, g, |cx| cx.copy_from(slot)),
            Action::Attach { g, slot } => s.with(self, g, |cx| cx.attach(slot)),
            Action::GiveUp { g, slot } => {
                let id = AttachId(s.g[g].slots[slot].attach);
                if !s.has_ended(slot, id) {
                    spend(&mut s.left.losses)?;
                }
                s.with(self, g, |cx| cx.g.lost |= bit(slot));
            }
            Action::Fenced { g } => s.with(self, g, |cx| cx.stop()),
            Action::DecideWithout { g, missing } => {
                s.left.unreached = s.left.unreached.checked_sub(missing.count_ones() as u8)?;
                s.with(self, g, |cx| cx.decide(missing));
            }
            Action::Take(msg) => s.take(self, msg),
            Action::Finish(msg) => s.finish(self, msg),
            Action::Hear(msg) => s.hear(self, msg),
            Action::Decide { epoch } => {
                let at = s
                    .proposals
                    .iter()
                    .position(|p| p.is_some_and(|p| p.epoch == epoch && p.decision == Decision::Asked))?;
                s.decide(self, at);
            }
            Action::Decided { epoch } | Action::AnswerLost { epoch } => {
                let at = s
                    .proposals
                    .iter()
                    .position(|p| p.is_some_and(|p| p.epoch == epoch && p.decision != Decision::Asked))?;
                let mut proposal = s.proposals[at].take()?;
                if let Action::AnswerLost { .. } = action {
                    spend(&mut s.left.lost_answers)?;
                    proposal.decision = if s.raft.epoch == epoch { Decision::Refused } else { Decision::Superseded };
                }
                let raft = s.raft;
                let g = s.session(epoch)?;
                s.with(self, g, |cx| cx.decided(&proposal, &raft));
            }
            Action::PowerCut { slot, value, dirty, clean } => {
                if s.left.cuts > 0 {
                    spend(&mut s.left.cuts)?;
                } else {
                    spend(&mut s.left.blackouts)?;
                }
                s.r[slot].cut(self, value, dirty, clean);
                s.forget_process(slot);
            }
            Action::AllCut { values } => {
                spend(&mut s.left.all_cuts)?;
                for (slot, value) in values.into_iter().enumerate().take(self.replicas) {
                    let Replica { dirty_disk, clean_disk, .. } = s.r[slot];
                    s.r[slot].cut(self, value, dirty_disk, clean_disk);
                    s.forget_process(slot);
                }
            }
            Action::Fault { slot, value } => {
                spend(&mut s.left.faults)?;
                s.r[slot].fault(self, value);
                s.forget_process(slot);
            }
            Action::Kill { slot, landed } => {
                spend(&mut s.left.kills)?;
                let values: Vec<u8> = if landed { disk_writes(&s.wire, slot).collect() } else { Vec::new() };
                s.r[slot].kill(&values);
                s.forget_process(slot);
            }
            Action::TakeImage { slot } => {
                spend(&mut s.left.images)?;
                let r = &s.r[slot];
                s.image = Some(Image {
                    slot: slot as u8,
                    value: r.value,
                    dirty: r.dirty_disk,
                    epoch: r.epoch,
                    kept_epoch: r.kept_epoch,
                    version: r.version,
                    clean: r.clean_disk,
                });
            }
            Action::RestoreImage { slot } => {
                let image = s.image.take()?;
                s.r[slot].restore(&image);
                s.forget_process(slot);
            }
            Action::Die { g } => {
                spend(&mut s.left.deaths)?;
                s.end_session(g);
                s.g[g] = Gateway::OFF;
            }
            Action::Open { g } => {
                spend(&mut s.left.opens)?;
                s.raft.epoch += 1;
                s.raft.open = true;
                let Raft { version, members, awaited, epoch, .. } = s.raft;
                let (phase, lease) = (Phase::Opening, true);
                let early = self.mutant == Some(Mutant::CompleteTooEarly);
                let replay = Replay::new(early);
                let opened = Gateway { epoch, phase, lease, version, members, awaited, replay, ..Gateway::OFF };
                s.with(self, g, |cx| *cx.g = opened);
            }
            Action::LeaseOver { g } => s.g[g].lease = false,
        }
        Some(())
    }
}

impl State {
    /// What is open to the gateway's choice.
    fn with_quietly(&mut self, cfg: &Config, g: usize) -> (Mask, Vec<usize>, Mask) {
        let cx = Cx {
            cfg,
            g: &mut self.g[g],
            wire: &mut self.wire,
            proposals: &mut self.proposals,
            promise: &mut self.promise,
            kept: 0,
            untouched: 0,
            breach: &mut self.breach,
            old_lease_over: true,
        };
        let planning = cx.g.eq.is_some_and(|eq| eq.stage == EqStage::Planning);
        (cx.readable(), if planning { cx.bases() } else { Vec::new() }, cx.could_decide_without())
    }
}

impl Op {
    fn new(value: Option<u8>, floor: u8) -> Self {
        Self {
            value,
            floor,
            stage: OpStage::Gated,
            sent: 0,
            pending: 0,
            done: 0,
            fua: false,
            durable_by: None,
            answered: false,
        }
    }
}

impl Model for Config {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![initial(self)]
    }

    fn actions(&self, s: &State, out: &mut Vec<Action>) {
        if s.breach.is_some() {
            return;
        }
        for g in 0..G {
            self.gateway_actions(s, g, out);
        }
        for slot in 0..self.replicas {
            self.replica_actions(s, slot, out);
        }
        if s.left.all_cuts > 0 {
            self.all_cut(s, out);
        }
        for msg in s.wire.all() {
            out.push(match msg.stage {
                Stage::Sent => Action::Take(*msg),
                Stage::Begun => Action::Finish(*msg),
                Stage::Answered(_) => Action::Hear(*msg),
            });
        }
        for proposal in s.proposals.iter().flatten() {
            let epoch = proposal.epoch;
            if proposal.decision == Decision::Asked {
                out.push(Action::Decide { epoch });
            } else {
                out.push(Action::Decided { epoch });
                if matches!(proposal.decision, Decision::Committed(_)) && s.left.lost_answers > 0 {
                    out.push(Action::AnswerLost { epoch });
                }
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut s = last.clone();
        self.apply(&mut s, action)?;
        s.answer_at_once(self);
        for g in 0..G {
            if s.g[g].phase == Phase::Closed && last.g[g].phase != Phase::Closed {
                s.end_session(g);
                s.raft.open = s.raft.epoch != s.g[g].epoch;
                s.check_close(self, g);
            }
        }
        (s != *last).then_some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = always();
        all.extend(sometimes().into_iter().filter(|p| self.mutant.is_none() && self.reaches.contains(&p.name)));
        all
    }
}

fn always() -> Vec<Property<Config>> {
    vec![
        Property::always(names::FLUSHED, |_, s: &State| {
            slots(s.raft.members)
                .filter(|slot| !s.r[*slot].imaged)
                .all(|slot| s.r[slot].after_cut(&s.wire, slot).trailing_zeros() >= u32::from(s.promise.flushed))
        }),
        Property::always(names::MEMBERS, |_, s: &State| {
            slots(s.raft.members).map(|slot| &s.r[slot]).all(|r| r.cut || r.imaged || r.value >= s.promise.acked)
        }),
        Property::always(names::LAST, |_, s: &State| {
            let alone = s.raft.members.count_ones() == 1;
            let safe = |slot: usize| {
                let r = &s.r[slot];
                r.cut || r.imaged || r.after_cut(&s.wire, slot).trailing_zeros() >= u32::from(s.promise.acked)
            };
            !alone || slots(s.raft.members).all(safe)
        }),
        Property::always(names::HELD, |_, s: &State| s.breach != Some(Breach::GivenUpThoughHeld)),
        Property::always(names::KEPT, |_, s: &State| {
            let owner =
                s.g.iter().find(|g| g.replay.complete && s.session(g.epoch).is_some() && g.epoch == s.raft.epoch);
            let least = |slot: usize| s.r[slot].after_cut(&s.wire, slot).trailing_zeros() as u8;
            let safe = |g: &Gateway, slot: usize| {
                s.r[slot].imaged || g.replay.kept().last().map_or_else(|| least(slot), |k| k.value) >= s.promise.acked
            };
            owner.is_none_or(|g| slots(s.raft.members).all(|slot| safe(g, slot)))
        }),
        Property::always(names::DIRTY, |c, s: &State| {
            (0..c.replicas).all(|a| {
                (0..a).all(|b| {
                    let (x, y) = (&s.r[a], &s.r[b]);
                    let may = x.after_cut(&s.wire, a) | y.after_cut(&s.wire, b);
                    // A clean that is being written counts as done.
                    let dirty = |r: &Replica| r.dirty && r.dirty_disk;
                    may.is_power_of_two() || dirty(x) || dirty(y) || x.imaged || y.imaged
                })
            })
        }),
        Property::always(names::READS, |_, s: &State| !matches!(s.breach, Some(Breach::ReadWentBack { .. }))),
        Property::always(names::CLOSED, |_, s: &State| s.breach != Some(Breach::UncleanClose)),
        Property::always(names::METADATA, |_, s: &State| s.breach != Some(Breach::MetadataIsOld)),
        Property::always(names::VERSIONS, |_, s: &State| s.breach != Some(Breach::VersionFell)),
    ]
}

fn sometimes() -> Vec<Property<Config>> {
    vec![
        Property::sometimes(names::ACKED, |_, s: &State| s.promise.acked > 0),
        Property::sometimes(names::SHRUNK, |c, s: &State| s.raft.members != c.all() && s.raft.version > 1),
        Property::sometimes(names::JOINED, |c, s: &State| s.raft.members == c.all() && s.raft.version > 1),
        Property::sometimes(names::ALONE, |_, s: &State| {
            s.raft.members.count_ones() == 1 && s.promise.acked > 0 && s.promise.acked == s.promise.submitted
        }),
        Property::sometimes(names::DOUBT, |c, s: &State| {
            s.left.lost_answers < c.bounds.lost_answers
                && s.g.iter().any(|g| g.version == s.raft.version && g.change == Change::None && g.epoch > 0)
        }),
        Property::sometimes(names::TAKEN_OVER, |_, s: &State| {
            s.g.iter().any(|g| g.epoch > 1 && g.phase == Phase::Serving)
        }),
        Property::sometimes(names::RESTARTED, |_, s: &State| {
            s.g.iter().any(|g| g.power_on && g.phase == Phase::Serving)
        }),
        Property::sometimes(names::SOME_KEPT, |_, s: &State| {
            s.g.iter().any(|g| {
                let kept = slots(g.members).filter(|slot| g.slots[*slot].role == Role::Member).count() as u32;
                let joining = slots(g.members).filter(|slot| g.slots[*slot].join().is_some()).count();
                g.epoch > 1 && g.phase == Phase::Serving && kept > 0 && joining > 0
            })
        }),
        Property::sometimes(names::BLOCKED, |_, s: &State| s.g.iter().any(|g| g.settle == Settle::Blocked)),
        Property::sometimes(names::RELEASED, |_, s: &State| {
            s.g.iter().any(|g| g.released && g.settle == Settle::Done && g.phase == Phase::Serving)
        }),
        Property::sometimes(names::CLEANED, |_, s: &State| s.r.iter().all(|r| r.clean_disk > 0 && !r.dirty_disk)),
        Property::sometimes(names::CLEAN_CLOSE, |c, s: &State| {
            s.left.closes < c.bounds.closes && s.g.iter().any(|g| g.phase == Phase::Closed && !g.tracked)
        }),
        Property::sometimes(names::COPIED, |_, s: &State| {
            s.wire.all().iter().any(|m| matches!(m.what, What::Copy { .. }) && m.stage == Stage::Begun)
        }),
        Property::sometimes(names::FENCED, |_, s: &State| {
            let [a, b] = &s.g;
            a.lease && a.phase == Phase::Serving && b.phase == Phase::Serving && b.epoch > a.epoch
        }),
        Property::sometimes(names::OLD_IMAGE, |_, s: &State| {
            s.r.iter().any(|r| r.imaged)
                && s.g.iter().any(|g| g.slots.iter().any(|slot| slot.as_new && slot.join().is_some()))
        }),
        Property::sometimes(names::REPLAYED, |_, s: &State| s.g.iter().any(|g| g.phase == Phase::Replaying)),
        Property::sometimes(names::REPLAYED_AGAIN, |c, s: &State| {
            s.left.all_cuts + 2 <= c.bounds.all_cuts
                && s.g.iter().any(|g| g.phase == Phase::Replaying && g.replay.next > 0)
        }),
        Property::sometimes(names::LET_GO, |c, s: &State| {
            let lost = s.left.all_cuts < c.bounds.all_cuts;
            let [g, _] = &s.g;
            lost && s.promise.acked > 0 && g.phase == Phase::Serving && g.replay.is_empty() && !g.power_on
        }),
        Property::sometimes(names::KILLED_ONLY, |_, s: &State| {
            s.g.iter().any(|g| {
                let killed = |slot: usize| g.slots[slot].info_kept && g.slots[slot].restarted;
                g.epoch > 1 && g.phase == Phase::Serving && slots(g.members).all(killed)
            })
        }),
        Property::sometimes(names::READ_BACK, |_, s: &State| {
            s.promise.seen > 0 && s.promise.seen == s.promise.submitted
        }),
    ]
}
