//! Whoever gives orders to the cluster: creates the volume, says which gateway serves it, deletes and re-creates it,
//! recovers it. He looks at what is committed, but changes it only through the members, as anybody else.

use node::control::core::{Reply, Request};
use node::metadata::Command;
use proto::cluster::{Refusal, SessionState, VolumeSpec, VolumeState};

use super::ask::{Contact, OPERATOR_TICK, Purpose};
use super::gateway::Gateway;
use super::net::Party;
use super::world::{Event, SECOND, World};

/// A refused order is given again after this.
const AGAIN: u64 = SECOND;

/// How long a gateway has to close, or to open, a volume that is to be deleted.
const CLOSER_EVERY: u64 = 10 * SECOND;

/// See the module.
#[derive(Debug, Default)]
pub struct Operator {
    pub(super) contact: Contact,
    asking: bool,
    /// The gateway that is to serve the volume.
    pub(super) wanted: Option<usize>,
    /// The volume is to be deleted, and another one made of the same name on the same space.
    pub(super) recreate: bool,
    deleting: bool,
    open_since: Option<u64>,
    pub(super) recover: bool,
    not_before: u64,
}

impl World {
    pub(super) fn operator(&mut self) {
        self.after(OPERATOR_TICK, Event::Operator);
        if self.operator.asking || self.now < self.operator.not_before {
            return;
        }
        let since = self.truth.applied;
        let Some(volume) = self.truth.living().cloned() else {
            if self.truth.pools < self.setup.nodes || self.truth.gateways < self.gateways.len() {
                return;
            }
            self.operator.deleting = false;
            let request = self.new_request(since);
            return self.order(Request::Create(request, self.spec()));
        };
        if volume.state != VolumeState::Ready {
            return;
        }
        let id = volume.id;
        let open = matches!(volume.session.state, SessionState::Open { .. });
        let wanted = match self.operator.recreate {
            false => self.operator.wanted,
            true => self.closer(open),
        };
        let wanted = wanted.map(Gateway::name);
        let command = if volume.export != wanted {
            Command::ExportVolume { volume: id, gateway: wanted }
        } else if self.operator.recreate {
            if open {
                return;
            }
            self.operator.deleting = true;
            Command::DeleteVolume { volume: id }
        } else if std::mem::take(&mut self.operator.recover) {
            Command::RecoverVolume { volume: id, unix_ms: self.now / 1000 }
        } else {
            return;
        };
        let request = self.new_request(since);
        self.order(Request::Lead(request, command));
    }

    /// The gateway that is to open a volume only to close it: a session whose gateway has ended and is to serve the
    /// volume no more stays open for the metadata, and the volume can't be deleted.
    fn closer(&mut self, open: bool) -> Option<usize> {
        if !open {
            self.operator.open_since = None;
            return None;
        }
        let since = *self.operator.open_since.get_or_insert(self.now);
        let turn = (self.now - since) / CLOSER_EVERY;
        (turn % 2 == 1).then_some((turn / 2) as usize % self.gateways.len())
    }

    fn spec(&self) -> VolumeSpec {
        let setup = &self.setup;
        VolumeSpec {
            name: "tank".into(),
            size: setup.blocks * 4096,
            replicas: setup.replicas as u32,
            stripes: setup.stripes as u32,
            chunk_size: (setup.chunk_blocks * 4096) as u32,
            min_in_sync: setup.min_in_sync as u32,
            write_cache: setup.write_cache,
            export: None,
        }
    }

    fn order(&mut self, request: Request) {
        self.operator.asking = true;
        self.ask(Party::Operator, Purpose::Operator, request);
    }

    pub(super) fn operator_answered(&mut self, answer: Result<Reply, Refusal>) {
        self.operator.asking = false;
        match answer {
            Ok(_) if self.operator.deleting => {
                (self.operator.deleting, self.operator.recreate) = (false, false);
                self.counters.recreated += 1;
            }
            Ok(_) => {}
            // Still open, no space before the old one is gone, a gateway that has not registered: later.
            Err(_) => {
                self.operator.deleting = false;
                self.operator.not_before = self.now + AGAIN;
            }
        }
    }

    /// The volume is to be served here, and nowhere else.
    pub fn want_on(&mut self, gateway: usize, take_over: bool) {
        self.operator.wanted = Some(gateway);
        for (i, g) in self.gateways.iter_mut().enumerate() {
            g.take_over = take_over && i == gateway;
        }
    }

    /// Nobody is to serve it.
    pub fn want_nowhere(&mut self) {
        self.operator.wanted = None;
    }

    /// The volume is to be deleted, and made again on the same space.
    pub fn want_recreated(&mut self) {
        self.operator.recreate = true;
    }

    pub fn is_recreated(&self) -> bool {
        !self.operator.recreate && self.truth.living().is_some_and(|v| v.state == VolumeState::Ready)
    }
}
