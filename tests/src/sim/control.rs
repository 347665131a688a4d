//! A stand-in for the control plane: the register machine that raft makes of its voters, with sessions, leases and
//! versioned in-sync sets. It is linearizable because it is one value; what raft does to it is in `raft`'s own tests.

use std::collections::BTreeMap;

use client::mirror::SetDecision;
use proto::id::{Epoch, ReplicaId, SetVersion};
use proto::limits::LEASE_MS;

/// What a gateway asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Open { take_over: bool },
    Renew { epoch: Epoch },
    Propose { epoch: Epoch, version: SetVersion, members: Vec<ReplicaId>, awaited: Vec<ReplicaId> },
    Close { epoch: Epoch },
}

/// What it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Opened {
        epoch: Epoch,
        old_lease_ms: u64,
        version: SetVersion,
        members: Vec<ReplicaId>,
        awaited: Vec<ReplicaId>,
    },
    /// Another gateway's lease may live.
    InUse,
    Renewed,
    Superseded,
    Decided(SetDecision),
    Closed,
}

/// See the module.
#[derive(Debug)]
pub struct Control {
    pub epoch: Epoch,
    owner: Option<usize>,
    /// On its own clock.
    lease_until: u64,
    pub version: SetVersion,
    pub members: Vec<ReplicaId>,
    pub awaited: Vec<ReplicaId>,
    /// Exactly once: what was answered to a request, for when it is asked again.
    answers: BTreeMap<(usize, u64), Answer>,
    /// No quorum.
    pub down: bool,
}

impl Control {
    pub fn new(members: Vec<ReplicaId>) -> Self {
        Self {
            epoch: Epoch(0),
            owner: None,
            lease_until: 0,
            version: SetVersion(1),
            members,
            awaited: Vec::new(),
            answers: BTreeMap::new(),
            down: false,
        }
    }

    /// Takes a request of a gateway; `None` while there is no quorum.
    pub fn ask(&mut self, now_ms: u64, gateway: usize, id: u64, ask: Ask) -> Option<Answer> {
        if self.down {
            return None;
        }
        if let Some(answer) = self.answers.get(&(gateway, id)) {
            return Some(answer.clone());
        }
        let renews = matches!(ask, Ask::Renew { .. });
        let answer = self.apply(now_ms, gateway, ask);
        // A lease is granted by a round that began after the request, each time anew.
        if !renews {
            self.answers.insert((gateway, id), answer.clone());
        }
        Some(answer)
    }

    fn apply(&mut self, now: u64, gateway: usize, ask: Ask) -> Answer {
        match ask {
            Ask::Open { take_over } => {
                let others = self.owner.is_some_and(|owner| owner != gateway);
                let lives = others && now < self.lease_until;
                if lives && !take_over {
                    return Answer::InUse;
                }
                let old_lease_ms = if lives { self.lease_until - now } else { 0 };
                self.epoch = self.epoch.next();
                self.owner = Some(gateway);
                self.lease_until = now + LEASE_MS;
                Answer::Opened {
                    epoch: self.epoch,
                    old_lease_ms,
                    version: self.version,
                    members: self.members.clone(),
                    awaited: self.awaited.clone(),
                }
            }
            Ask::Renew { epoch } if epoch == self.epoch && self.owner == Some(gateway) => {
                self.lease_until = now + LEASE_MS;
                Answer::Renewed
            }
            Ask::Renew { .. } => Answer::Superseded,
            Ask::Propose { epoch, .. } if epoch != self.epoch => Answer::Decided(SetDecision::Superseded),
            Ask::Propose { version, members, awaited, .. } => Answer::Decided(if version == self.version {
                assert!(!members.is_empty(), "R2: an empty set was proposed");
                self.version = self.version.next();
                (self.members, self.awaited) = (members, awaited);
                SetDecision::Committed(self.version)
            } else {
                SetDecision::Refused {
                    version: self.version,
                    members: self.members.clone(),
                    awaited: self.awaited.clone(),
                }
            }),
            Ask::Close { epoch } => {
                if epoch == self.epoch {
                    self.owner = None;
                    self.lease_until = 0;
                }
                Answer::Closed
            }
        }
    }
}
