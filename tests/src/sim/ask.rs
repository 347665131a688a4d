//! Questions to the members: who leads is found by asking, a try that is not answered is repeated elsewhere, under
//! one request id.

use node::control::core::{Reply, Request};
use proto::cluster::{Refusal, RequestId};
use proto::id::{Epoch, ReplicaId, SetVersion, VolumeId};
use uuid::Uuid;

use super::net::Party;
use super::voter::member_of;
use super::world::{Event, MS, SECOND, World};

/// How long one try at one member may take.
const TRY: u64 = 1_500 * MS;
/// Between a try that led nowhere and the next.
const BACK_OFF: u64 = 100 * MS;
/// How long a renewal is tried; the lease outlives several.
const RENEWAL: u64 = 1_500 * MS;

/// What a question was for.
#[derive(Clone, Debug)]
pub enum Purpose {
    Register,
    Open {
        volume: VolumeId,
    },
    Renew,
    Propose {
        volume: VolumeId,
        epoch: Epoch,
        mirror: usize,
        expected: SetVersion,
        members: Vec<ReplicaId>,
    },
    /// How a proposal ended whose answer is forgotten.
    Decided {
        volume: VolumeId,
        epoch: Epoch,
        mirror: usize,
        expected: SetVersion,
        members: Vec<ReplicaId>,
    },
    Close {
        volume: VolumeId,
    },
    FinishRecovery,
    Operator,
}

/// A question without a definite answer.
#[derive(Clone, Debug)]
pub struct Ask {
    pub from: Party,
    boot: u32,
    pub purpose: Purpose,
    request: Request,
    attempt: u32,
    pub(super) member: usize,
    /// When it was first sent, on the asker's clock and in truth.
    pub sent: u64,
    began: u64,
}

/// What somebody who asks knows of the members.
#[derive(Clone, Debug, Default)]
pub struct Contact {
    leader: Option<usize>,
    next: usize,
    /// The highest revision seen.
    pub revision: u64,
}

impl World {
    pub(super) fn new_request(&mut self, since: u64) -> RequestId {
        let id = u128::from(self.rng.next()) << 64 | u128::from(self.rng.next());
        RequestId { id: Uuid::from_u128(id), since }
    }

    fn contact(&mut self, party: Party) -> &mut Contact {
        match party {
            Party::Gateway(gateway) => &mut self.gateways[gateway].contact,
            _ => &mut self.operator.contact,
        }
    }

    fn boot_of(&self, party: Party) -> u32 {
        match party {
            Party::Gateway(gateway) => self.gateways[gateway].boot,
            _ => 0,
        }
    }

    /// Asks until there is a definite answer, or the asker is gone.
    pub(super) fn ask(&mut self, from: Party, purpose: Purpose, request: Request) -> u64 {
        self.next_ask += 1;
        let id = self.next_ask;
        let (sent, began, boot) = (self.clock(from), self.now, self.boot_of(from));
        self.fold(&(id, from, std::mem::discriminant(&purpose)));
        self.asks.insert(id, Ask { from, boot, purpose, request, attempt: 0, member: 0, sent, began });
        self.try_ask(id);
        id
    }

    fn try_ask(&mut self, id: u64) {
        let Some(from) = self.asks.get(&id).map(|a| a.from) else { return };
        let count = self.members.len();
        let contact = self.contact(from);
        let member = contact.leader.unwrap_or_else(|| {
            contact.next += 1;
            contact.next % count
        });
        let ask = self.asks.get_mut(&id).expect("found above");
        ask.attempt += 1;
        ask.member = member;
        let attempt = ask.attempt;
        let to = self.member_party(member);
        let lost = self.cut_from_control(from, to) || self.faults_on && self.rng.chance(20);
        if !lost {
            let delay = self.net.delay(from, to, &mut self.rng);
            self.after(delay, Event::AskArrives { ask: id, attempt });
        }
        self.after(TRY, Event::AskAgain { ask: id, attempt });
    }

    /// Whether what one says to the other about the control plane gets lost.
    pub(super) fn cut_from_control(&self, from: Party, to: Party) -> bool {
        let net = &self.net;
        net.is_cut(from, to) || net.is_cut(from, Party::Control) || net.is_cut(Party::Control, to)
    }

    pub(super) fn ask_arrives(&mut self, id: u64, attempt: u32) {
        let Some(ask) = self.asks.get(&id).filter(|a| a.attempt == attempt) else { return };
        let (member, request) = (ask.member, ask.request.clone());
        if self.members[member].is_down() {
            // Refused at once.
            return self.after(BACK_OFF, Event::AskAgain { ask: id, attempt });
        }
        self.member_asked(member, id, attempt, request);
    }

    pub(super) fn send_answer(&mut self, member: usize, id: u64, attempt: u32, answer: Result<Reply, Refusal>) {
        let Some(from) = self.asks.get(&id).filter(|a| a.attempt == attempt).map(|a| a.from) else { return };
        let party = self.member_party(member);
        if self.cut_from_control(party, from) || self.faults_on && self.rng.chance(20) {
            return;
        }
        let delay = self.net.delay(party, from, &mut self.rng);
        self.next_answer += 1;
        self.answers.insert(self.next_answer, answer);
        self.after(delay, Event::AnswerArrives { ask: id, attempt, answer: self.next_answer });
    }

    /// Nothing definite came of a try.
    pub(super) fn ask_again(&mut self, id: u64, attempt: u32) {
        let Some(ask) = self.asks.get(&id).filter(|a| a.attempt == attempt) else { return };
        let (from, boot, began) = (ask.from, ask.boot, ask.began);
        let renews = matches!(ask.purpose, Purpose::Renew);
        if self.boot_of(from) != boot || renews && self.now >= began + RENEWAL {
            let ask = self.asks.remove(&id).expect("found above");
            if self.boot_of(from) == boot {
                self.renewal_failed(ask);
            }
            return;
        }
        self.contact(from).leader = None;
        self.try_ask(id);
    }

    pub(super) fn answer_arrives(&mut self, id: u64, attempt: u32, answer: u64) {
        let answer = self.answers.remove(&answer).expect("an answer arrives once");
        let Some(ask) = self.asks.get(&id).filter(|a| a.attempt == attempt) else { return };
        let (from, boot, member) = (ask.from, ask.boot, ask.member);
        if self.boot_of(from) != boot {
            self.asks.remove(&id);
            return;
        }
        match answer {
            Err(Refusal::NotLeader { leader }) => {
                let leader = leader.map(|(_, addr)| member_of(&addr)).filter(|l| *l != member);
                self.contact(from).leader = leader;
                let micros = if leader.is_some() { 0 } else { BACK_OFF };
                self.after(micros, Event::TryElsewhere { ask: id, attempt });
            }
            Err(refusal) if refusal.may_retry() => self.after(BACK_OFF, Event::AskAgain { ask: id, attempt }),
            answer => {
                let ask = self.asks.remove(&id).expect("found above");
                self.contact(from).leader = Some(member);
                self.log(|| format!("{from:?} #{id} {:?}: {}", ask.purpose, show(&answer)));
                if let Ok(reply) = &answer {
                    let revision = revision_of(reply);
                    let contact = self.contact(from);
                    contact.revision = contact.revision.max(revision);
                }
                match from {
                    Party::Gateway(gateway) => self.gateway_answered(gateway, ask, answer),
                    _ => self.operator_answered(answer),
                }
            }
        }
    }

    pub(super) fn try_elsewhere(&mut self, id: u64, attempt: u32) {
        if self.asks.get(&id).is_some_and(|a| a.attempt == attempt) {
            self.try_ask(id);
        }
    }
}

fn revision_of(reply: &Reply) -> u64 {
    match reply {
        Reply::Done(revision) | Reply::Volume(_, revision) | Reply::Set(_, revision) => *revision,
        Reply::Opened(opened) => opened.revision,
        Reply::Renewed(renewals) => renewals.revision,
        Reply::Status(status) => status.view.revision,
    }
}

fn show(answer: &Result<Reply, Refusal>) -> String {
    match answer {
        Ok(Reply::Done(revision)) => format!("done by {revision}"),
        Ok(Reply::Volume(volume, _)) => format!("volume {} {}", volume.name, volume.state),
        Ok(Reply::Set(set, _)) => format!("set version {}", set.version),
        Ok(Reply::Opened(o)) => format!("epoch {}, an older lease lives {} ms", o.epoch, o.old_lease_ms),
        Ok(Reply::Renewed(renewals)) => {
            let all: Vec<String> =
                renewals.results.iter().map(|r| format!("epoch {} {:?}", r.epoch, r.outcome)).collect();
            all.join(", ")
        }
        Ok(Reply::Status(_)) => "status".to_owned(),
        Err(refusal) => format!("refused: {refusal}"),
    }
}

/// Kept here for who orders things about: long enough for a question.
pub const OPERATOR_TICK: u64 = SECOND / 10;
