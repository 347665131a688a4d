//! The fence (R1): one attach at a time, a newer one ends and drains every older one.
//!
//! ```text
//! none ──Attach──► taking: draining ──► storing the epoch ──► current ──► none
//!                     │  a newer Attach takes its place          │ newer Attach, connection lost,
//!                     └─ connection lost: none                   │ lease over, Detach
//! ```

use proto::frame::{AttachInfo, Code, Kind, Reply};
use proto::id::{AttachId, Epoch, FlushNo, MirrorId, ReplicaId};
use proto::mutant::{self, Mutant};

use super::dirty_log::Waiter;
use super::interface::{AttachEnd, ConnId, Notice, Output};
use super::state::{Origin, Phase, ReplicaCore, reply};

/// Who may use the replica.
#[derive(Debug, Default)]
pub(super) struct AttachState {
    /// The newest that was ever asked for, as far as this process or the superblock knows.
    pub(super) newest: AttachId,
    /// The newest that this process has held.
    pub(super) held: AttachId,
    /// This process has been told the in-sync set.
    pub(super) told: bool,
    /// See [`AttachInfo::accounted`].
    pub(super) accounted: bool,
    /// Regions became suspect while a session was there, which did not count with them when it said that all is
    /// accounted for.
    pub(super) distrusted: bool,
    pub(super) current: Option<Current>,
    pub(super) taking: Option<Taking>,
    /// The current attach's requests in flight.
    pub(super) requests: usize,
    /// Copies from peers in flight, under the current attach.
    pub(super) copies: usize,
}

#[derive(Debug)]
pub(super) struct Current {
    pub(super) id: AttachId,
    conn: ConnId,
    channel: u32,
    lease_ms: u64,
    heard_ms: u64,
    /// The newest flush that it asked for.
    pub(super) last_flush: FlushNo,
    /// The tag of its last request.
    detaching: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Taking {
    pub(super) from: Origin,
    lease_ms: u64,
    heard_ms: u64,
    /// Drained; the epoch that was stored before is remembered while this one's is being stored.
    storing: Option<Epoch>,
}

impl ReplicaCore {
    pub(super) fn take_attach(
        &mut self,
        from: Origin,
        replica: ReplicaId,
        mirror: MirrorId,
        lease_ms: u32,
        out: &mut Vec<Output>,
    ) {
        let id = from.attach;
        if (replica, mirror) != (self.config.ids.replica, self.config.ids.mirror) {
            return self.refuse(from, Kind::Attach, Code::UnknownReplica, 0, out);
        }
        if id.epoch.0 == 0 || id.attach.0 == 0 || lease_ms == 0 {
            return self.refuse(from, Kind::Attach, Code::Invalid, 0, out);
        }
        if id <= self.attach.newest {
            return self.refuse(from, Kind::Attach, Code::Superseded, self.attach.newest.epoch.0, out);
        }
        self.attach.newest = id;
        self.end_attach(AttachEnd::Superseded(id), out);
        if let Some(older) = self.attach.taking.take() {
            self.refuse(older.from, Kind::Attach, Code::Superseded, id.epoch.0, out);
        }
        let heard_ms = self.now;
        self.attach.taking = Some(Taking { from, lease_ms: lease_ms.into(), heard_ms, storing: None });
    }

    /// Goes on with the attach that is being taken, once everything older has ended on the disk too.
    pub(super) fn continue_attach(&mut self, out: &mut Vec<Output>) {
        let Some(taking) = &mut self.attach.taking else { return };
        let idle = self.ops.is_empty() || mutant::is(Mutant::AttachWithoutDrain);
        let drained = idle && !self.passes.is_running() && !self.flush.is_running();
        if taking.storing.is_some() || !drained {
            return;
        }
        let id = taking.from.attach;
        let stored = self.superblock.epoch;
        taking.storing = Some(stored);
        // Flushes are numbered within an attach, and nothing has changed under this one yet.
        self.regions.forget_changes();
        self.flush.restart();
        if id.epoch > stored {
            self.superblock.epoch = id.epoch;
        }
        if id.epoch > stored && !mutant::is(Mutant::EpochNotStored) {
            self.store_superblock(Waiter::Attach(id));
        } else {
            self.attach_stored(id, out);
        }
    }

    /// The epoch is in both superblock copies: the attach holds.
    pub(super) fn attach_stored(&mut self, id: AttachId, out: &mut Vec<Output>) {
        let Some(taking) = self.attach.taking.take_if(|t| t.from.attach == id) else { return };
        assert!(self.superblock.epoch >= id.epoch, "attach {id} above the stored epoch {}", self.superblock.epoch);
        assert!(self.attach.current.is_none(), "two attaches at a time");
        assert_eq!((self.attach.requests, self.attach.copies), (0, 0), "requests of an older attach");
        let info = AttachInfo {
            incarnation: self.config.incarnation,
            held: std::mem::replace(&mut self.attach.held, id),
            stored_epoch: taking.storing.expect("drained before it was stored"),
            kept_epoch: self.superblock.kept_epoch,
            told: self.attach.told,
            accounted: self.attach.accounted,
            set: self.superblock.set.clone(),
            blocks: self.layout.blocks,
            dirty: self.regions.dirty.ones() as u32,
            suspect: self.regions.suspect.ones() as u32,
            kept: self.journal.opened_whole,
            rebuilt: self.superblock.rebuilt,
        };
        let Origin { conn, channel, .. } = taking.from;
        self.attach.current = Some(Current {
            id,
            conn,
            channel,
            lease_ms: taking.lease_ms,
            heard_ms: taking.heard_ms,
            last_flush: FlushNo(0),
            detaching: None,
        });
        out.push(Output::Notice(Notice::Attached(id)));
        out.push(reply(taking.from, Reply::Attached(info)));
    }

    /// Whether this is the current attach's request.
    pub(super) fn check_attach(&self, from: Origin) -> Result<(), (Code, u64)> {
        match &self.attach.current {
            Some(_) if mutant::is(Mutant::SkipAttachCheck) => Ok(()),
            Some(c) if (c.id, c.conn, c.channel) == (from.attach, from.conn, from.channel) && c.detaching.is_none() => {
                Ok(())
            }
            _ => Err(self.not_attached(from.attach)),
        }
    }

    /// Whether a peer's copy belongs to the current attach; it comes on the peer's own connection.
    pub(super) fn check_copy(&self, from: Origin, replica: ReplicaId) -> Result<(), (Code, u64)> {
        if replica != self.config.ids.replica {
            return Err((Code::UnknownReplica, 0));
        }
        match &self.attach.current {
            Some(_) if mutant::is(Mutant::SkipCopyCheck) => Ok(()),
            Some(c) if c.id == from.attach && c.detaching.is_none() => Ok(()),
            _ => Err(self.not_attached(from.attach)),
        }
    }

    fn not_attached(&self, id: AttachId) -> (Code, u64) {
        let newest = self.attach.newest.epoch;
        if id.epoch < newest { (Code::Superseded, newest.0) } else { (Code::NotAttached, 0) }
    }

    pub(super) fn heard(&mut self, conn: ConnId) {
        let now = self.now;
        if let Some(current) = self.attach.current.as_mut().filter(|c| c.conn == conn) {
            current.heard_ms = now;
        }
        if let Some(taking) = self.attach.taking.as_mut().filter(|t| t.from.conn == conn) {
            taking.heard_ms = now;
        }
    }

    pub(super) fn end_attach_when_lease_is_over(&mut self, out: &mut Vec<Output>) {
        if self.attach.current.as_ref().is_some_and(|c| self.now - c.heard_ms > c.lease_ms) {
            self.end_attach(AttachEnd::LeaseOver, out);
        }
    }

    pub(super) fn connection_lost(&mut self, conn: ConnId, out: &mut Vec<Output>) {
        self.attach.taking.take_if(|t| t.from.conn == conn);
        if self.attach.current.as_ref().is_some_and(|c| c.conn == conn) {
            self.end_attach(AttachEnd::ConnectionLost, out);
        }
    }

    pub(super) fn detach(&mut self, tag: u64) {
        let current = self.attach.current.as_mut().expect("checked");
        current.detaching = Some(tag);
    }

    /// Ends the attach that asked for it once its requests, and the copies that it ordered, have ended.
    pub(super) fn finish_detach(&mut self, out: &mut Vec<Output>) {
        if !self.ops.is_empty() {
            return;
        }
        let Some(current) = self.attach.current.as_ref() else { return };
        let Some(tag) = current.detaching else { return };
        let from = Origin { conn: current.conn, channel: current.channel, tag, attach: current.id };
        self.end_attach(AttachEnd::Detached, out);
        out.push(reply(from, Reply::Done(Kind::Detach)));
    }

    /// Nothing is accepted under the current attach any more. What has not reached the disk is dropped; what has,
    /// is awaited before the next attach is answered.
    fn end_attach(&mut self, why: AttachEnd, out: &mut Vec<Output>) {
        let Some(current) = self.attach.current.take() else { return };
        assert!(matches!(self.phase, Phase::Open), "attached while not open");
        out.push(Output::Notice(Notice::AttachEnded { attach: current.id, why }));
        let mut ids: Vec<u64> = self.ops.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            let mut op = self.ops.remove(&id).expect("listed");
            if !op.ended {
                let (code, block) = self.not_attached(op.from.attach);
                self.refuse(op.from, op.kind, code, block, out);
            }
            self.abandon(&mut op);
            if op.ios > 0 {
                self.ops.insert(id, op);
            } else {
                self.release(&mut op);
            }
        }
        if let Some(tag) = current.detaching.filter(|_| why != AttachEnd::Detached) {
            let from = Origin { conn: current.conn, channel: current.channel, tag, attach: current.id };
            let (code, block) = self.not_attached(current.id);
            self.refuse(from, Kind::Detach, code, block, out);
        }
        assert_eq!((self.attach.requests, self.attach.copies), (0, 0), "requests outlive their attach");
    }

    /// The request will not be answered any more.
    fn abandon(&mut self, op: &mut super::state::Op) {
        if op.ended {
            return;
        }
        op.ended = true;
        let count = if op.kind == Kind::CopyWrite { &mut self.attach.copies } else { &mut self.attach.requests };
        *count = count.checked_sub(1).expect("requests in flight are counted");
    }
}
