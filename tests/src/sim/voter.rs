//! A member's vote: the driver of one control core, with its log's thread and its messages to the others.
//!
//! Checked here, from outside: members agree on what they have applied; epochs and set versions only rise (R1, R2).

use std::collections::{BTreeMap, VecDeque};

use node::control::core::{ControlCore, Input, Now, Output, Reply, Request};
use node::control::daemon::voters;
use node::raft::core::{CoreConfig, Persist, RaftCore};
use node::raft::log_store::{LogStore, MemoryStore};
use proto::cluster::{ClusterDefinition, Member as MemberInfo, Refusal, Role, VolumeInfo, VolumeState};
use proto::id::{NodeId, ReplicaId, VolumeId};
use proto::limits::MAX_REPLICAS;
use raft::eraftpb::MessageType;
use raft::prelude::Message;

use super::checker::Checker;
use super::net::Party;
use super::node::data_addr;
use super::world::{Event, MS, Setup, World, cluster_id};

/// One raft tick.
const TICK: u64 = 100 * MS;
/// Snapshots are taken early, so that members come to need them.
const SNAPSHOT_ENTRIES: u64 = 40;
const TAIL_ENTRIES: u64 = 10;
/// Applied states are compared at every so many entries: it is dear.
const COMPARE_EVERY: u64 = 16;
/// Persists that wait for a log (R11): more than raft's own windows can fill.
const MAX_PERSISTS: usize = 4096;

/// Who waits for an answer.
#[derive(Clone, Copy, Debug)]
enum Asker {
    /// A question from elsewhere, and which try of it.
    Ask { ask: u64, attempt: u32 },
    /// The node's own agent.
    Agent,
}

/// See the module.
#[derive(Default)]
pub struct Member {
    pub(super) core: Option<ControlCore>,
    /// What is durable.
    store: MemoryStore,
    /// Given to the log's thread.
    writing: VecDeque<Persist>,
    /// So many of them are being written, in one transaction.
    group: usize,
    /// Numbers the processes.
    pub life: u32,
    last_ticket: u64,
    askers: BTreeMap<u64, Asker>,
    /// A copy of the log for who restores it.
    image: Option<MemoryStore>,
}

impl Member {
    pub fn is_down(&self) -> bool {
        self.core.is_none()
    }
}

/// What the members have committed, as far as any of them has ever applied it.
#[derive(Debug, Default)]
pub struct Truth {
    pub applied: u64,
    pub volumes: BTreeMap<VolumeId, VolumeInfo>,
    pub gateways: usize,
    pub pools: usize,
}

impl Truth {
    /// The volume that is not being deleted.
    pub fn living(&self) -> Option<&VolumeInfo> {
        self.volumes.values().find(|v| v.state != VolumeState::Deleting)
    }
}

/// The cluster of this run: nodes first, then witnesses.
pub fn definition(setup: &Setup) -> ClusterDefinition {
    let members = (0..setup.nodes + setup.witnesses).map(|m| MemberInfo {
        id: NodeId(m as u64 + 1),
        name: format!("member-{m}"),
        role: if m < setup.nodes { Role::Node } else { Role::Witness },
        control_addr: control_addr(m),
        data_addr: if m < setup.nodes { data_addr(m) } else { String::new() },
    });
    ClusterDefinition { id: cluster_id(), name: "sim".into(), members: members.collect() }
}

pub fn control_addr(member: usize) -> String {
    format!("member-{member}:7300")
}

pub fn member_of(addr: &str) -> usize {
    addr.trim_start_matches("member-").trim_end_matches(":7300").parse().expect("an address of ours")
}

fn show(message: &Message) -> String {
    let Message { from, to, term, index, log_term, commit, reject, .. } = message;
    let kind = message.get_msg_type();
    let rejects = if *reject { " reject" } else { "" };
    let entries = message.entries.len();
    format!("{kind:?} {from}->{to} term {term} index {index}/{log_term} commit {commit}{rejects}, {entries} entries")
}

impl World {
    pub fn member_party(&self, member: usize) -> Party {
        if member < self.setup.nodes { Party::Node(member) } else { Party::Witness(member - self.setup.nodes) }
    }

    pub fn start_member(&mut self, member: usize) {
        let definition = self.definition.clone();
        let (ids, preferred) = voters(&definition);
        let mut config = CoreConfig::new(member as u64 + 1, ids.clone(), preferred);
        // raft-rs draws its jitter from the thread's random source: a range of one tick leaves it no choice.
        config.min_election_tick = self.rng.between(5, 9) as usize;
        config.max_election_tick = config.min_election_tick + 1;
        config.snapshot_entries = SNAPSHOT_ENTRIES;
        config.tail_entries = TAIL_ENTRIES;
        let nonce = self.rng.next();
        let m = &mut self.members[member];
        let log = m.store.load().expect("memory is readable").into_log(&ids).expect("the log fits together");
        let raft = RaftCore::new(config, log, nonce).expect("a configuration that makes sense");
        m.core = Some(ControlCore::new(NodeId(member as u64 + 1), definition, raft).expect("a readable snapshot"));
        m.life += 1;
        let life = m.life;
        let first = self.rng.below(TICK);
        self.after(first, Event::MemberTick { member, life });
    }

    /// The process is gone, and with it what it had not made durable: of what its log was writing all or nothing.
    pub fn kill_member(&mut self, member: usize) {
        let durable = self.rng.chance(500);
        let m = &mut self.members[member];
        if m.core.is_none() {
            return;
        }
        let group: Vec<Persist> = m.writing.drain(..).take(m.group).collect();
        if durable {
            m.store.write(&group).expect("memory is writable");
        }
        m.writing.clear();
        m.group = 0;
        m.core = None;
        m.life += 1;
        m.askers.clear();
    }

    /// A witness's process is gone; it has nothing else.
    pub fn kill_witness(&mut self, witness: usize) {
        self.log(|| format!("witness {witness} is killed"));
        self.unstop(Party::Witness(witness));
        self.kill_member(self.setup.nodes + witness);
    }

    /// Keeps a copy of the member's log.
    pub fn copy_log(&mut self, member: usize) {
        self.members[member].image = Some(self.members[member].store.clone());
    }

    /// Puts the copy back in place of the log; the process must be down.
    ///
    /// # Panics
    /// If it is not, or there is no copy.
    pub fn restore_log(&mut self, member: usize) {
        let m = &mut self.members[member];
        assert!(m.core.is_none(), "a log is restored under a running process");
        m.store = m.image.clone().expect("a copy was made");
        self.voters_restored = true;
    }

    /// Who thinks to lead.
    pub fn leaders(&self) -> Vec<usize> {
        let leads = |m: &usize| self.members[*m].core.as_ref().is_some_and(|core| core.raft().leads());
        (0..self.members.len()).filter(leads).collect()
    }

    pub(super) fn member_tick(&mut self, member: usize, life: u32) {
        if self.members[member].life != life {
            return;
        }
        self.after(TICK, Event::MemberTick { member, life });
        self.member_step(member, Input::Tick);
    }

    /// A question of somebody else's; it is answered once.
    pub(super) fn member_asked(&mut self, member: usize, ask: u64, attempt: u32, request: Request) {
        let m = &mut self.members[member];
        m.last_ticket += 1;
        let ticket = m.last_ticket;
        m.askers.insert(ticket, Asker::Ask { ask, attempt });
        self.member_step(member, Input::Request(ticket, request));
    }

    /// A wish of the node's own agent.
    pub(super) fn agent_asks(&mut self, member: usize, request: Request) {
        let m = &mut self.members[member];
        m.last_ticket += 1;
        let ticket = m.last_ticket;
        m.askers.insert(ticket, Asker::Agent);
        self.nodes[member].asked = Some(ticket);
        self.member_step(member, Input::Request(ticket, request));
    }

    pub(super) fn member_step(&mut self, member: usize, input: Input) {
        let boot_ms = self.clock(self.member_party(member));
        let now = Now { boot_ms, unix_ms: self.now / MS };
        let Some(core) = &mut self.members[member].core else { return };
        let before = core.machine().applied();
        let mut out = Vec::new();
        if let Err(error) = core.step(now, input, &mut out) {
            return self.fail(Checker::Raft, format!("member {member} must stop: {error}"));
        }
        if core.machine().applied() != before {
            self.applied(member);
        }
        for output in out {
            match output {
                Output::Send(messages) => self.send_raft(member, messages),
                Output::Persist(persist) => {
                    self.members[member].writing.push_back(*persist);
                    self.write_log(member);
                }
                Output::Answer(ticket, answer) => self.member_answers(member, ticket, answer),
                Output::Changed => {
                    if member < self.setup.nodes {
                        let process = self.nodes[member].process;
                        self.after(MS, Event::Agent { node: member, process });
                    }
                }
                // Whoever has lost acknowledged entries is told so by others' refusals; nobody else is.
                Output::BadMessage(bad) if self.voters_restored => self.log(|| format!("member {member}: {bad}")),
                Output::BadMessage(bad) => self.fail(Checker::Raft, format!("member {member}: {bad}")),
            }
        }
    }

    fn member_answers(&mut self, member: usize, ticket: u64, answer: Result<Reply, Refusal>) {
        match self.members[member].askers.remove(&ticket) {
            Some(Asker::Ask { ask, attempt }) => self.send_answer(member, ask, attempt, answer),
            Some(Asker::Agent) => self.agent_answered(member, ticket, answer),
            None => self.fail(Checker::Answered, format!("member {member} answers ticket {ticket} twice")),
        }
    }

    // ---- the log --------------------------------------------------------------------------------------------

    /// All that waits goes into one transaction.
    fn write_log(&mut self, member: usize) {
        let waiting = self.members[member].writing.len();
        if waiting > MAX_PERSISTS {
            return self.fail(Checker::Bounds, format!("R11: {waiting} writes wait for the log of member {member}"));
        }
        if self.members[member].group == 0 && waiting > 0 {
            self.members[member].group = waiting;
            let life = self.members[member].life;
            let micros = self.rng.tail(300, 20_000);
            self.after(micros, Event::LogWritten { member, life });
        }
    }

    pub(super) fn log_written(&mut self, member: usize, life: u32) {
        let m = &mut self.members[member];
        if m.life != life {
            return;
        }
        let group: Vec<Persist> = m.writing.drain(..m.group).collect();
        m.group = 0;
        m.store.write(&group).expect("memory is writable");
        let number = group.iter().map(|persist| persist.number).max().unwrap_or(0);
        let messages = group.into_iter().flat_map(|persist| persist.then_send).collect();
        self.send_raft(member, messages);
        self.member_step(member, Input::Persisted(number));
        self.write_log(member);
    }

    // ---- messages -------------------------------------------------------------------------------------------

    fn send_raft(&mut self, from: usize, messages: Vec<Message>) {
        for message in messages {
            let to = message.to as usize - 1;
            let (a, b) = (self.member_party(from), self.member_party(to));
            let faulty = self.faults_on;
            let lost = self.net.is_cut(a, b)
                || self.net.is_cut(a, Party::Control)
                || self.net.is_cut(Party::Control, b)
                || self.members[to].is_down()
                || faulty && self.rng.chance(10);
            self.fold(&(message.from, message.to, message.term, message.index, message.commit));
            self.log(|| format!("    {}{}", show(&message), if lost { " (lost)" } else { "" }));
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.after(5 * MS, Event::SnapshotSent { member: from, to: message.to, arrived: !lost });
            }
            if lost {
                if self.rng.chance(300) {
                    self.after(5 * MS, Event::Unreachable { member: from, to: message.to });
                }
                continue;
            }
            // Streams keep order, but they are broken off and begun again: raft is given what a datagram gives.
            let copies = if faulty && self.rng.chance(10) { 2 } else { 1 };
            for _ in 0..copies {
                let late = if faulty && self.rng.chance(10) { self.rng.below(800 * MS) } else { 0 };
                let delay = late + self.net.delay(a, b, &mut self.rng);
                self.next_message += 1;
                self.messages.insert(self.next_message, message.clone());
                let life = self.members[to].life;
                self.after(delay, Event::RaftArrives { message: self.next_message, to, life });
            }
        }
    }

    pub(super) fn raft_arrives(&mut self, message: u64, to: usize, life: u32) {
        let message = self.messages.remove(&message).expect("a message arrives once");
        if self.members[to].life == life {
            self.member_step(to, Input::Messages(vec![message]));
        }
    }

    // ---- what is committed ----------------------------------------------------------------------------------

    fn applied(&mut self, member: usize) {
        let core = self.members[member].core.as_ref().expect("it has stepped");
        let machine = core.machine();
        let applied = machine.applied();
        if applied.is_multiple_of(COMPARE_EVERY) && !self.voters_restored {
            let hash = machine.hash();
            let known = *self.hashes.entry(applied).or_insert(hash);
            if known != hash {
                return self
                    .fail(Checker::MembersAgree, format!("member {member} differs from another at index {applied}"));
            }
        }
        if applied <= self.truth.applied {
            return;
        }
        let truth = Truth {
            applied,
            volumes: machine.volumes().clone(),
            gateways: machine.gateways().len(),
            pools: (0..self.setup.nodes).filter(|n| machine.pools_of(NodeId(*n as u64 + 1)).next().is_some()).count(),
        };
        let before = std::mem::replace(&mut self.truth, truth);
        if !self.voters_restored
            && let Err((checker, what)) = check_progress(&before, &self.truth)
        {
            return self.fail(checker, what);
        }
        self.volumes_changed();
        for (volume, mirror, replica) in entered(&before, &self.truth) {
            self.check_entered(volume, mirror, replica);
        }
        for (volume, mirror) in shrunk(&before, &self.truth) {
            self.check_stayed(volume, mirror);
        }
    }

    /// When all has been healed: every member has the same, and not only where it happens to have been compared.
    pub(super) fn check_members_agree(&mut self) {
        let cores = self.members.iter().filter_map(|m| m.core.as_ref());
        let all: Vec<(u64, [u8; 32])> = cores.map(|c| (c.machine().applied(), c.machine().hash())).collect();
        let newest = all.iter().map(|(applied, _)| *applied).max().unwrap_or(0);
        let of_newest: Vec<[u8; 32]> = all.iter().filter(|(a, _)| *a == newest).map(|(_, hash)| *hash).collect();
        if of_newest.iter().any(|hash| *hash != of_newest[0]) {
            self.fail(Checker::MembersAgree, format!("members differ at index {newest}"));
        }
    }
}

/// The members of every set before and after.
fn members<'a>(
    before: &'a Truth,
    after: &'a Truth,
) -> impl Iterator<Item = (VolumeId, usize, &'a [ReplicaId], &'a [ReplicaId])> {
    let both = after.volumes.iter().filter_map(|(id, new)| Some((*id, before.volumes.get(id)?, new)));
    both.flat_map(|(id, old, new)| {
        let sets = old.mirrors.iter().zip(&new.mirrors).enumerate();
        sets.map(move |(i, (was, is))| (id, i, &was.in_sync.members[..], &is.in_sync.members[..]))
    })
}

/// Who has come into a set that had others before, and still has.
fn entered(before: &Truth, after: &Truth) -> Vec<(VolumeId, usize, ReplicaId)> {
    let lasting = members(before, after).filter(|(_, _, was, is)| is.iter().any(|r| was.contains(r)));
    lasting.flat_map(|(id, i, was, is)| is.iter().filter(|r| !was.contains(r)).map(move |r| (id, i, *r))).collect()
}

/// Sets that somebody has left, and that others stay in.
fn shrunk(before: &Truth, after: &Truth) -> Vec<(VolumeId, usize)> {
    let fewer = |was: &[ReplicaId], is: &[ReplicaId]| is.len() < was.len() && is.iter().all(|r| was.contains(r));
    members(before, after).filter(|(_, _, was, is)| fewer(was, is)).map(|(id, i, ..)| (id, i)).collect()
}

/// R1: epochs rise. R2: a set changes one version at a time, is never empty, and never leaves its definition.
fn check_progress(before: &Truth, after: &Truth) -> Result<(), (Checker, String)> {
    for (id, new) in &after.volumes {
        for mirror in &new.mirrors {
            let set = &mirror.in_sync;
            if set.version.0 > 0 && set.members.is_empty() && new.state != VolumeState::Deleting {
                return Err((Checker::SetVersions, format!("R2: the in-sync set of mirror {} is empty", mirror.id)));
            }
            if mirror.replicas.len() > MAX_REPLICAS {
                return Err((
                    Checker::Bounds,
                    format!("R11: mirror {} has {} replicas", mirror.id, mirror.replicas.len()),
                ));
            }
        }
        let Some(old) = before.volumes.get(id) else { continue };
        if new.session.epoch < old.session.epoch {
            return Err((Checker::Epochs, format!("R1: the epoch of {} went back to {}", new.name, new.session.epoch)));
        }
        for (was, is) in old.mirrors.iter().zip(&new.mirrors) {
            if is.in_sync.version < was.in_sync.version {
                return Err((
                    Checker::SetVersions,
                    format!("R2: the set of mirror {} went back to version {}", is.id, is.in_sync.version),
                ));
            }
            if is.in_sync.version == was.in_sync.version && is.in_sync != was.in_sync {
                return Err((
                    Checker::SetVersions,
                    format!("R2: the set of mirror {} changed within version {}", is.id, is.in_sync.version),
                ));
            }
        }
    }
    Ok(())
}
