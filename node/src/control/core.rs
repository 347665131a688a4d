//! One member's control plane as a state machine: raft, the metadata it replicates, and, while the member leads,
//! the lease table and what gateways report. No clock, no I/O: [`ControlCore::step`] gets the time and an input,
//! and says what has to be done.
//!
//! Requests are tickets: each is answered exactly once, at the latest when [`REQUEST_MS`] have passed.

use std::collections::{BTreeMap, BTreeSet};

use proto::cluster::*;
use proto::id::*;
use proto::limits::LEASE_MS;
use proto::mutant::{self, Mutant};
use raft::prelude::Message;
use uuid::Uuid;

use super::lease::{BootMs, LeaseTable};
use crate::metadata::command::{LeaseVerdict, PlannedMirror, PlannedReplica};
use crate::metadata::placement::place;
use crate::metadata::{Answer, Command, Metadata, Proposal};
use crate::raft::core::{Committed, Output as RaftOutput, Persist, RaftCore};

/// A request unanswered for so long is answered [`Refusal::Unavailable`]; it may still be carried out.
pub const REQUEST_MS: u64 = 4_000;
/// A quorum round that was not answered is asked again after this (a leader without a commit in its own term drops
/// them).
const READ_AGAIN_MS: u64 = 300;
/// Requests that wait at one member: past it they are refused as unavailable.
pub const MAX_WAITING: usize = 4096;
/// A member not heard for so long is down.
const DOWN_AFTER_MS: u64 = 1_500;
/// Mirrors and replicas in reports that are kept: what a volume can have.
const MAX_REPORT_MIRRORS: usize = proto::limits::MAX_MIRRORS;

/// Both clocks of this member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// CLOCK_BOOTTIME: what leases are judged by.
    pub boot_ms: BootMs,
    /// The wall clock: only ever shown.
    pub unix_ms: u64,
}

/// Names a request until it is answered.
pub type Ticket = u64;

/// What a request wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Carry out a command; only the leader does.
    Lead(RequestId, Command),
    /// Carry out a command; passed on to the leader.
    Forward(RequestId, Command),
    /// Plan and create a volume; only the leader does.
    Create(RequestId, VolumeSpec),
    /// Judge and open a session; only the leader does.
    Open {
        /// The request.
        request: RequestId,
        /// The volume.
        volume: VolumeId,
        /// For whom.
        gateway: String,
        /// Though another's lease may live.
        take_over: bool,
    },
    /// Renew leases; only the leader does.
    Renew {
        /// For whom.
        gateway: String,
        /// Its sessions.
        sessions: Vec<SessionRenewal>,
    },
    /// Everything, through a quorum round; only the leader does.
    Status,
    /// What this member knows, without asking anybody.
    StaleStatus,
}

/// What a request got.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Done, by this revision.
    Done(u64),
    /// The volume as it is now.
    Volume(VolumeInfo, u64),
    /// A session.
    Opened(OpenedSession),
    /// The in-sync set as changed.
    Set(InSyncSet, u64),
    /// Leases.
    Renewed(Renewals),
    /// Everything.
    Status(Box<ClusterStatus>),
}

/// Something happened.
#[derive(Debug)]
pub enum Input {
    /// 100 ms have passed.
    Tick,
    /// Messages from other members, not checked yet.
    Messages(Vec<Message>),
    /// This persist and all before it are durable.
    Persisted(u64),
    /// Somebody wants something.
    Request(Ticket, Request),
    /// Messages to this member got lost.
    Unreachable(u64),
    /// A snapshot to this member was sent, or got lost.
    SnapshotSent(u64, bool),
}

/// Something to do, in order.
#[derive(Debug)]
pub enum Output {
    /// Send at once.
    Send(Vec<Message>),
    /// Write, make durable, send what it carries, report.
    Persist(Box<Persist>),
    /// Answer.
    Answer(Ticket, Result<Reply, Refusal>),
    /// The metadata's revision has changed, or who leads, or [`ControlCore::is_confirmed`].
    Changed,
    /// A peer sent what cannot be: to be logged.
    BadMessage(crate::raft::core::BadMessage),
}

/// The log holds what this program cannot understand: the member stops rather than differ from the others.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// An entry.
    #[error("log entry {index}: {source}")]
    Entry {
        /// Which.
        index: u64,
        /// What is wrong.
        source: crate::metadata::command::BadProposal,
    },
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] crate::metadata::snapshot::BadSnapshot),
    /// raft-rs did not accept the configuration.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
}

enum Waiting {
    /// For a command's answer.
    Applied(Uuid),
    /// For a quorum round: which, and since when it has been asked for.
    Round { read: u64, asked: BootMs, then: AfterRound },
}

#[derive(Clone)]
enum AfterRound {
    Renew { gateway: String, sessions: Vec<(VolumeId, Epoch)> },
    Status,
}

struct Heard {
    at: BootMs,
    up: bool,
    since_unix_ms: Option<u64>,
}

struct Report {
    epoch: Epoch,
    heard_unix_ms: u64,
    report: SessionReport,
}

/// One member.
pub struct ControlCore {
    id: NodeId,
    definition: ClusterDefinition,
    raft: RaftCore,
    machine: Metadata,
    leases: LeaseTable,
    waiting: BTreeMap<Ticket, (BootMs, Waiting)>,
    by_request: BTreeMap<Uuid, BTreeSet<Ticket>>,
    heard: BTreeMap<u64, Heard>,
    gateways_heard: BTreeMap<String, u64>,
    reports: BTreeMap<VolumeId, Report>,
    leading_since_unix_ms: Option<u64>,
    proposed_init: Option<u64>,
    /// A command that was asked for here has been applied here: what is applied is no older than this process.
    is_confirmed: bool,
    shown: (u64, Option<u64>, bool),
    /// Quorum rounds that ended, and the index to be applied before they may be answered.
    confirmed: Vec<(u64, u64)>,
}

impl ControlCore {
    /// A member whose log was loaded into `raft`.
    ///
    /// # Errors
    /// When the log's snapshot is not readable.
    pub fn new(id: NodeId, definition: ClusterDefinition, raft: RaftCore) -> Result<Self, CoreError> {
        let snapshot = raft.log().latest_snapshot();
        let machine = match snapshot.is_empty() {
            true => Metadata::default(),
            false => Metadata::decode(&snapshot.data)?,
        };
        assert!(machine.applied() == raft.applied(), "snapshot of {} at {}", machine.applied(), raft.applied());
        Ok(Self {
            id,
            definition,
            raft,
            machine,
            leases: LeaseTable::default(),
            waiting: BTreeMap::new(),
            by_request: BTreeMap::new(),
            heard: BTreeMap::new(),
            gateways_heard: BTreeMap::new(),
            reports: BTreeMap::new(),
            leading_since_unix_ms: None,
            proposed_init: None,
            is_confirmed: false,
            shown: (0, None, false),
            confirmed: Vec::new(),
        })
    }

    /// The metadata as applied here.
    pub fn machine(&self) -> &Metadata {
        &self.machine
    }
    /// The raft voter.
    pub fn raft(&self) -> &RaftCore {
        &self.raft
    }
    /// This member.
    pub fn id(&self) -> NodeId {
        self.id
    }
    /// Whether what is applied is at least as new as the start of this process. A member begins with what its log's
    /// snapshot says, and may know a leader long before it knows what was committed since.
    pub fn is_confirmed(&self) -> bool {
        self.is_confirmed || mutant::is(Mutant::ActOnOldNews)
    }
    /// The cluster as it was formed.
    pub fn definition(&self) -> &ClusterDefinition {
        &self.definition
    }
    /// Messages to this member got lost, as far as the queue to it tells.
    pub fn unreachable(&mut self, id: u64) {
        self.raft.unreachable(id);
    }
    /// For a clean shutdown.
    pub fn last_words(&mut self) -> Option<Persist> {
        self.raft.last_words()
    }
    /// Who leads, and where it is reached, as far as known here.
    pub fn leader(&self) -> Option<(NodeId, String)> {
        let id = NodeId(self.raft.leader()?);
        let known = self.machine.members().get(&id);
        let member = known.or_else(|| self.definition.members.iter().find(|member| member.id == id))?;
        Some((id, member.control_addr.clone()))
    }

    /// Takes one input.
    ///
    /// # Errors
    /// When the member must stop: see [`CoreError`].
    pub fn step(&mut self, now: Now, input: Input, out: &mut Vec<Output>) -> Result<(), CoreError> {
        match input {
            Input::Tick => self.tick(now, out),
            Input::Messages(messages) => {
                for message in messages {
                    self.message(now, message, out);
                }
            }
            Input::Persisted(number) => self.raft.persisted(number),
            Input::Request(ticket, request) => self.request(now, ticket, request, out),
            Input::Unreachable(id) => self.raft.unreachable(id),
            Input::SnapshotSent(id, arrived) => self.raft.snapshot_sent(id, arrived),
        }
        self.carry_on(now, out)
    }

    fn tick(&mut self, now: Now, out: &mut Vec<Output>) {
        let heard = &self.heard;
        self.raft.tick(|id| heard.get(&id).is_some_and(|heard| heard.up));
        self.leases.tick(now.boot_ms);
        for heard in self.heard.values_mut() {
            if heard.up && now.boot_ms.saturating_sub(heard.at) > DOWN_AFTER_MS {
                heard.up = false;
                heard.since_unix_ms = Some(now.unix_ms);
            }
        }
        let late: Vec<Ticket> =
            self.waiting.iter().filter(|(_, (until, _))| *until <= now.boot_ms).map(|(ticket, _)| *ticket).collect();
        for ticket in late {
            let why = match self.raft.leader() {
                Some(_) => "no quorum confirmed the request in time",
                None => "there is no leader",
            };
            self.answer(ticket, Err(Refusal::unavailable(why)), out);
        }
        self.ask_rounds_again(now);
    }

    fn message(&mut self, now: Now, message: Message, out: &mut Vec<Output>) {
        use raft::eraftpb::MessageType::{MsgPropose, MsgSnapshot};
        let kind = message.get_msg_type();
        let unreadable = match kind {
            // A proposal that this program could not read must not get into the log.
            MsgPropose => message
                .entries
                .iter()
                .any(|entry| Proposal::decode(&entry.data).is_err())
                .then(|| "proposes what cannot be read".to_owned()),
            // Once raft-rs has taken it there is no way back: it must be the machine as of its index.
            MsgSnapshot => {
                let snapshot = message.get_snapshot();
                let index = snapshot.get_metadata().index;
                match Metadata::decode(&snapshot.data) {
                    Ok(machine) if machine.applied() == index => None,
                    Ok(machine) => Some(format!("a machine as of {} in a snapshot of {index}", machine.applied())),
                    Err(bad) => Some(bad.to_string()),
                }
            }
            _ => None,
        };
        let from = message.from;
        let checked = match unreadable {
            Some(why) => Err(crate::raft::core::BadMessage { from, kind: format!("{kind:?}"), why }),
            None => self.raft.message(message),
        };
        match checked {
            Err(bad) => out.push(Output::BadMessage(bad)),
            Ok(()) => {
                let heard = self.heard.entry(from).or_insert(Heard { at: 0, up: false, since_unix_ms: None });
                heard.at = now.boot_ms;
                if !heard.up {
                    heard.up = true;
                    heard.since_unix_ms = Some(now.unix_ms);
                }
            }
        }
    }

    fn request(&mut self, now: Now, ticket: Ticket, request: Request, out: &mut Vec<Output>) {
        if self.waiting.len() >= MAX_WAITING {
            let why = format!("{MAX_WAITING} requests wait at this member already");
            return out.push(Output::Answer(ticket, Err(Refusal::unavailable(why))));
        }
        if request == Request::StaleStatus {
            let status = self.status(now, true);
            return out.push(Output::Answer(ticket, Ok(Reply::Status(Box::new(status)))));
        }
        let id = match &request {
            Request::Lead(id, _) | Request::Forward(id, _) | Request::Create(id, _) => Some(*id),
            Request::Open { request, .. } => Some(*request),
            _ => None,
        };
        // An answer once applied is definite, wherever it is read.
        if let Some(answer) = id.and_then(|id| self.machine.answer(id)).cloned() {
            let reply = self.reply(now, answer);
            // Passed on by nobody but this process itself, whose request is no older than it.
            self.is_confirmed |= matches!(request, Request::Forward(..));
            return out.push(Output::Answer(ticket, reply));
        }
        if !matches!(request, Request::Forward(..)) {
            if !self.raft.leads() {
                let leader = self.leader().filter(|(id, _)| *id != self.id);
                return out.push(Output::Answer(ticket, Err(Refusal::NotLeader { leader })));
            }
            // Until an entry of its term is applied a leader may know less than was committed.
            if self.leases.leading_since().is_none() {
                return out.push(Output::Answer(ticket, Err(Refusal::unavailable("the leader has just been elected"))));
            }
        }
        let outcome = match request {
            Request::Lead(id, command) | Request::Forward(id, command) => self.propose(now, ticket, id, command),
            Request::Create(id, spec) => {
                self.plan(now, id, spec).and_then(|command| self.propose(now, ticket, id, command))
            }
            Request::Open { request, volume, gateway, take_over } => {
                self.open(now, ticket, request, volume, gateway, take_over)
            }
            Request::Renew { gateway, sessions } => {
                self.renew(now, ticket, gateway, sessions);
                Ok(())
            }
            Request::Status => {
                self.ask_round(now, ticket, AfterRound::Status);
                Ok(())
            }
            Request::StaleStatus => unreachable!("answered above"),
        };
        if let Err(refusal) = outcome {
            out.push(Output::Answer(ticket, Err(refusal)));
        }
    }

    fn propose(&mut self, now: Now, ticket: Ticket, request: RequestId, command: Command) -> Result<(), Refusal> {
        let proposal = Proposal { request, command };
        let bytes = proposal.encode().map_err(|bad| Refusal::invalid("request", bad))?;
        self.raft.propose(bytes).map_err(Refusal::unavailable)?;
        self.waiting.insert(ticket, (now.boot_ms + REQUEST_MS, Waiting::Applied(request.id)));
        self.by_request.entry(request.id).or_default().insert(ticket);
        Ok(())
    }

    /// Plans by the applied state. The ids follow from the request's, so a request tried at two leaders makes one
    /// volume whichever plan is carried out.
    fn plan(&self, now: Now, request: RequestId, spec: VolumeSpec) -> Result<Command, Refusal> {
        let id = |kind: &str, a: usize, b: usize| Uuid::new_v5(&request.id, format!("{kind} {a} {b}").as_bytes());
        let plans = place(&spec, &self.machine.space())?;
        let mirrors = plans.into_iter().enumerate().map(|(m, plan)| PlannedMirror {
            id: MirrorId(id("mirror", m, 0)),
            size: plan.size,
            replicas: plan
                .places
                .into_iter()
                .enumerate()
                .map(|(r, (node, pool))| PlannedReplica { id: ReplicaId(id("replica", m, r)), node, pool })
                .collect(),
        });
        let volume = VolumeId(id("volume", 0, 0));
        Ok(Command::CreateVolume { volume, mirrors: mirrors.collect(), spec, unix_ms: now.unix_ms })
    }

    /// Judges and proposes in one step: nothing happens between (see [`super::lease`]).
    fn open(
        &mut self,
        now: Now,
        ticket: Ticket,
        request: RequestId,
        volume: VolumeId,
        gateway: String,
        take_over: bool,
    ) -> Result<(), Refusal> {
        let known = self.machine.volumes().get(&volume);
        let session = &known.ok_or_else(|| Refusal::not_found(ObjectKind::Volume, volume))?.session;
        let epoch = session.epoch;
        let ended = self.leases.ended(volume, session, now.boot_ms);
        let verdict = LeaseVerdict { term: self.raft.term(), epoch, ended };
        self.leases.opening(volume, request.id, epoch);
        let command = Command::OpenSession { volume, gateway, take_over, verdict };
        let proposed = self.propose(now, ticket, request, command);
        if proposed.is_err() {
            self.leases.opened(volume, request.id);
        }
        proposed
    }

    fn renew(&mut self, now: Now, ticket: Ticket, gateway: String, sessions: Vec<SessionRenewal>) {
        if self.machine.gateways().contains_key(&gateway) {
            self.gateways_heard.insert(gateway.clone(), now.unix_ms);
        }
        let mut asked = Vec::new();
        for renewal in sessions {
            let SessionRenewal { volume, epoch, report } = renewal;
            asked.push((volume, epoch));
            let Some(known) = self.machine.volumes().get(&volume) else { continue };
            // The applied state never runs ahead: what is older than it is superseded for good.
            if epoch < known.session.epoch {
                continue;
            }
            if !mutant::is(Mutant::GrantNotNoted) {
                self.leases.received(volume, epoch, now.boot_ms);
            }
            if let Some(mut report) = report.filter(|_| epoch == known.session.epoch) {
                report.mirrors.truncate(MAX_REPORT_MIRRORS);
                self.reports.insert(volume, Report { epoch, heard_unix_ms: now.unix_ms, report });
            }
        }
        self.ask_round(now, ticket, AfterRound::Renew { gateway, sessions: asked });
    }

    fn ask_round(&mut self, now: Now, ticket: Ticket, then: AfterRound) {
        let read = self.raft.read();
        let round = Waiting::Round { read, asked: now.boot_ms, then };
        self.waiting.insert(ticket, (now.boot_ms + REQUEST_MS, round));
    }

    fn ask_rounds_again(&mut self, now: Now) {
        for (_, waiting) in self.waiting.values_mut() {
            if let Waiting::Round { read, asked, .. } = waiting
                && now.boot_ms.saturating_sub(*asked) >= READ_AGAIN_MS
            {
                *read = self.raft.read();
                *asked = now.boot_ms;
            }
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<Reply, Refusal>, out: &mut Vec<Output>) {
        if let Some((_, Waiting::Applied(request))) = self.waiting.remove(&ticket)
            && let Some(tickets) = self.by_request.get_mut(&request)
        {
            tickets.remove(&ticket);
            if tickets.is_empty() {
                self.by_request.remove(&request);
            }
        }
        out.push(Output::Answer(ticket, answer));
    }

    /// Does what raft asks for, until it asks for nothing more.
    fn carry_on(&mut self, now: Now, out: &mut Vec<Output>) -> Result<(), CoreError> {
        loop {
            let mut asked = Vec::new();
            self.raft.outputs(&mut asked);
            if asked.is_empty() {
                break;
            }
            for output in asked {
                match output {
                    RaftOutput::Send(messages) => out.push(Output::Send(messages)),
                    RaftOutput::Persist(persist) => out.push(Output::Persist(persist)),
                    RaftOutput::Restore(bytes) => self.restore(&bytes)?,
                    RaftOutput::Apply(entries) => {
                        self.lead_or_follow(now, out);
                        for entry in entries {
                            self.apply(now, entry, out)?;
                        }
                    }
                    RaftOutput::Read { number, index } => self.confirmed.push((number, index)),
                }
            }
            self.lead_or_follow(now, out);
            // A leader learns that entries are committed, by the others' disks, before its own has them: they are
            // applied here only after that, and reads wait for it.
            let applied = self.machine.applied();
            for (number, index) in self.confirmed.extract_if(.., |(_, index)| *index <= applied).collect::<Vec<_>>() {
                self.round_over(now, number, index, out);
            }
            if self.raft.wants_snapshot() {
                let mut compacted = Vec::new();
                self.raft.compact(self.machine.encode(), &mut compacted);
                out.extend(compacted.into_iter().filter_map(|output| match output {
                    RaftOutput::Persist(persist) => Some(Output::Persist(persist)),
                    _ => None,
                }));
            }
        }
        let shows = (self.machine.revision(), self.raft.leader(), self.is_confirmed);
        if self.shown != shows {
            self.shown = shows;
            out.push(Output::Changed);
        }
        Ok(())
    }

    fn lead_or_follow(&mut self, now: Now, out: &mut Vec<Output>) {
        if !self.raft.leads() {
            if self.leases.leading_since().is_some() {
                self.leases.follow();
                self.gateways_heard.clear();
                self.reports.clear();
                self.leading_since_unix_ms = None;
            }
            self.confirmed.clear();
            // Rounds end with leadership; commands may still be carried out, and wait for their answers.
            let rounds = self.waiting.iter().filter(|(_, (_, w))| matches!(w, Waiting::Round { .. }));
            let rounds: Vec<Ticket> = rounds.map(|(ticket, _)| *ticket).collect();
            for ticket in rounds {
                let leader = self.leader().filter(|(id, _)| *id != self.id);
                self.answer(ticket, Err(Refusal::NotLeader { leader }), out);
            }
            return;
        }
        // Only with an entry of its own term applied does a leader know all that was committed before.
        if self.raft.term_of(self.machine.applied()) != Some(self.raft.term()) {
            return;
        }
        if self.leases.leading_since().is_none() {
            self.leading_since_unix_ms = Some(now.unix_ms);
        }
        self.leases.lead(self.raft.term(), now.boot_ms);
        if self.machine.cluster().is_none() && self.proposed_init != Some(self.raft.term()) {
            let command = Command::Init { definition: self.definition.clone() };
            // The same request from every leader: it is carried out once.
            let request = RequestId { id: Uuid::new_v5(&self.definition.id.0, b"init"), since: 0 };
            let proposed = Proposal { request, command }.encode().map(|bytes| self.raft.propose(bytes));
            if matches!(proposed, Ok(Ok(()))) {
                self.proposed_init = Some(self.raft.term());
            }
        }
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), CoreError> {
        self.machine = Metadata::decode(bytes)?;
        Ok(())
    }

    fn apply(&mut self, now: Now, entry: Committed, out: &mut Vec<Output>) -> Result<(), CoreError> {
        let Committed { index, term, data } = entry;
        if data.is_empty() {
            self.machine.apply_empty(index);
            return Ok(());
        }
        let proposal = Proposal::decode(&data).map_err(|source| CoreError::Entry { index, source })?;
        let request = proposal.request.id;
        let (opening, closing) = match &proposal.command {
            Command::OpenSession { volume, .. } => (Some(*volume), None),
            Command::CloseSession { volume, epoch, .. } => (None, Some((*volume, *epoch))),
            _ => (None, None),
        };
        let answer = self.machine.apply(index, term, proposal);
        if let Some(volume) = opening {
            self.leases.opened(volume, request);
        }
        if let Some((volume, epoch)) = closing.filter(|_| answer == Answer::Done) {
            self.leases.closed(volume, epoch);
        }
        for ticket in self.by_request.remove(&request).unwrap_or_default() {
            self.is_confirmed = true;
            let reply = self.reply(now, answer.clone());
            self.answer(ticket, reply, out);
        }
        Ok(())
    }

    /// What a remembered answer says now.
    fn reply(&self, now: Now, answer: Answer) -> Result<Reply, Refusal> {
        let revision = self.machine.revision();
        let volume = |id: VolumeId| {
            let found = self.machine.volumes().get(&id).cloned();
            found.ok_or_else(|| Refusal::not_found(ObjectKind::Volume, id))
        };
        match answer {
            Answer::Done => Ok(Reply::Done(revision)),
            Answer::Volume(id) => Ok(Reply::Volume(volume(id)?, revision)),
            Answer::Set(set) => Ok(Reply::Set(set, revision)),
            Answer::Opened { volume: id, epoch, previous, old_ended } => {
                let old_lease_ms = match old_ended {
                    true => 0,
                    false => self.leases.older_lease_ms(id, epoch, false, now.boot_ms),
                };
                let volume = volume(id)?;
                // Asked again after another session, or the volume's deletion: what it is now is not what was opened.
                if volume.session.epoch != epoch || volume.session.owner().is_none() {
                    let gateway = volume.session.owner().unwrap_or_default().to_owned();
                    return Err(Refusal::Superseded { volume: volume.name, gateway, epoch: volume.session.epoch });
                }
                Ok(Reply::Opened(OpenedSession { epoch, volume, old_lease_ms, previous, revision }))
            }
            Answer::Refused(refusal) => Err(refusal),
        }
    }

    fn round_over(&mut self, now: Now, number: u64, index: u64, out: &mut Vec<Output>) {
        assert!(
            self.machine.applied() >= index,
            "the quorum confirmed {index}, applied is {}: a read would be older",
            self.machine.applied()
        );
        if self.leases.leading_since().is_none() {
            return;
        }
        let answered = self.waiting.iter().filter_map(|(ticket, (_, waiting))| match waiting {
            Waiting::Round { read, then, .. } if *read == number => Some((*ticket, then.clone())),
            _ => None,
        });
        for (ticket, then) in answered.collect::<Vec<_>>() {
            let reply = match then {
                AfterRound::Status => Reply::Status(Box::new(self.status(now, false))),
                AfterRound::Renew { gateway, sessions } => Reply::Renewed(self.renewals(&gateway, sessions)),
            };
            self.answer(ticket, Ok(reply), out);
        }
    }

    fn renewals(&self, gateway: &str, sessions: Vec<(VolumeId, Epoch)>) -> Renewals {
        let results = sessions.into_iter().map(|(volume, epoch)| {
            let current = self.machine.volumes().get(&volume).map(|volume| &volume.session);
            let granted = current.is_some_and(|current| self.leases.may_grant(volume, epoch, gateway, current));
            let outcome = match granted {
                true => RenewalOutcome::Granted { lease_ms: LEASE_MS },
                false => RenewalOutcome::Refused { current: current.cloned() },
            };
            RenewalResult { volume, epoch, outcome }
        });
        Renewals { results: results.collect(), revision: self.machine.revision() }
    }

    fn status(&self, now: Now, stale: bool) -> ClusterStatus {
        let leads = self.leases.leading_since().is_some();
        let members =
            self.machine.members().values().map(|member| match (member.id == self.id, self.heard.get(&member.id.0)) {
                (true, _) => {
                    MemberStatus { id: member.id, up: true, since_unix_ms: None, matched: self.raft.log().last() }
                }
                (false, heard) => MemberStatus {
                    id: member.id,
                    up: heard.is_some_and(|heard| heard.up),
                    since_unix_ms: heard.and_then(|heard| heard.since_unix_ms),
                    matched: self.raft.matched(member.id.0),
                },
            });
        let gateways = self
            .machine
            .gateways()
            .keys()
            .map(|name| GatewayStatus { name: name.clone(), heard_unix_ms: self.gateways_heard.get(name).copied() });
        let sessions = self.reports.iter().map(|(volume, report)| SessionStatus {
            volume: *volume,
            epoch: report.epoch,
            heard_unix_ms: report.heard_unix_ms,
            report: report.report.clone(),
        });
        ClusterStatus {
            view: self.machine.view(stale),
            stale,
            leader: self.raft.leader().map(NodeId),
            leader_since_unix_ms: self.leading_since_unix_ms,
            term: self.raft.term(),
            applied: self.machine.applied(),
            members: if leads { members.collect() } else { Vec::new() },
            gateways: if leads { gateways.collect() } else { Vec::new() },
            sessions: sessions.collect(),
            answered_by: self.id,
            now_unix_ms: now.unix_ms,
        }
    }
}
