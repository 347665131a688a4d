//! raft-rs as a state machine without clock and I/O.
//!
//! # Order
//!
//! Everything that has to happen leaves as a list of [`Output`]s, to be done in that order. A [`Persist`] carries
//! the messages that promise what it holds (votes, acknowledged entries): they are sent *after* it is durable,
//! and its number comes back through [`RaftCore::persisted`]. Messages in a plain [`Output::Send`] promise
//! nothing that is not durable yet (a leader may replicate what it is still writing). A crash between any two
//! outputs therefore forgets no promise.
//!
//! The commit index alone is not made durable for its own sake: it is found again by talking to the others.
//!
//! # Snapshots
//!
//! The applied state is never written by itself: after [`CoreConfig::snapshot_entries`] applied entries the
//! machine's snapshot is persisted and the log cut, but for a tail that spares a follower a little behind the
//! whole snapshot. A restart loads the snapshot and applies the log again as it is committed.

use proto::mutant::{self, Mutant};
use raft::prelude::*;
use raft::{StateRole, Storage};

use super::memory_log::MemoryLog;

/// Longest log entry that is accepted from a peer.
const MAX_ENTRY: usize = 1 << 20;
/// Most entries in one message that is accepted.
const MAX_MESSAGE_ENTRIES: usize = 16 << 10;
/// Proposals appended by a leader and not committed, in bytes: past it proposals are dropped, to be asked again.
const MAX_UNCOMMITTED: u64 = 16 << 20;
/// Bytes of entries after which a snapshot is taken, whatever their number.
const SNAPSHOT_BYTES: usize = 8 << 20;

/// What a voter needs to know.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Its own id.
    pub id: u64,
    /// All voters.
    pub voters: Vec<u64>,
    /// Voters that should lead, given a choice (witnesses).
    pub preferred: Vec<u64>,
    /// Ticks without a leader before an election, at least.
    pub min_election_tick: usize,
    /// And less than this; one more than the least pins it, for simulation.
    pub max_election_tick: usize,
    /// Ticks between a leader's heartbeats.
    pub heartbeat_tick: usize,
    /// Applied entries between snapshots.
    pub snapshot_entries: u64,
    /// Entries before a snapshot that are kept in the log.
    pub tail_entries: u64,
}

impl CoreConfig {
    /// With the usual times: a tick of 100 ms gives elections of 0.5 to 1 s (DESIGN §8).
    pub fn new(id: u64, voters: Vec<u64>, preferred: Vec<u64>) -> Self {
        Self {
            id,
            voters,
            preferred,
            min_election_tick: 5,
            max_election_tick: 10,
            heartbeat_tick: 2,
            snapshot_entries: 4096,
            tail_entries: 512,
        }
    }
}

/// Something to write, and what may be sent once it is durable.
#[derive(Clone, Debug, Default)]
pub struct Persist {
    /// Rises from one to the next; given back when this one and all before are durable. 0: not asked for.
    pub number: u64,
    /// A snapshot from the leader: it replaces the whole log, before `entries` are appended.
    pub install: Option<Snapshot>,
    /// Consecutive; they replace what the log has from the first one's index on.
    pub entries: Vec<Entry>,
    /// Term, vote and commit.
    pub hard_state: Option<HardState>,
    /// Our own snapshot, and the index and term up to which the log may then be forgotten.
    pub compact: Option<(Snapshot, (u64, u64))>,
    /// To be sent once all this is durable.
    pub then_send: Vec<Message>,
}

impl Persist {
    /// Whether there is anything to write at all, or only something to be sent in its turn.
    pub fn writes(&self) -> bool {
        self.install.is_some() || !self.entries.is_empty() || self.hard_state.is_some() || self.compact.is_some()
    }
}

/// A committed entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its index.
    pub index: u64,
    /// The term of the leader that appended it.
    pub term: u64,
    /// Empty for the entry with which a leader begins its term.
    pub data: Vec<u8>,
}

/// To be done, in order.
#[derive(Clone, Debug)]
pub enum Output {
    /// Send at once.
    Send(Vec<Message>),
    /// Write, make durable, send, report.
    Persist(Box<Persist>),
    /// The machine is replaced by this snapshot's.
    Restore(Vec<u8>),
    /// Apply, in order.
    Apply(Vec<Committed>),
    /// The read asked for under this number may be answered once this index is applied.
    Read {
        /// From [`RaftCore::read`].
        number: u64,
        /// The commit index that the quorum confirmed.
        index: u64,
    },
}

/// A message that is not given to raft-rs, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("raft message {kind} from {from} dropped: {why}")]
pub struct BadMessage {
    /// Its sender, as it says.
    pub from: u64,
    /// Its type.
    pub kind: String,
    /// What is wrong.
    pub why: String,
}

/// Why a proposal was not appended or passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotProposed {
    /// There is no leader, leadership is being handed over, or too much is uncommitted.
    #[error("no leader takes proposals at the moment")]
    Dropped,
}

/// One voter.
pub struct RaftCore {
    node: RawNode<MemoryLog>,
    config: CoreConfig,
    /// Persists given out and not reported.
    outstanding: u64,
    /// The persist with a snapshot from the leader that is not durable yet.
    installing: Option<u64>,
    applied: u64,
    last_read: u64,
    /// Distinguishes our read requests from those before a restart.
    nonce: u64,
    ticks_leading: u64,
    unwritten_commit: bool,
}

impl RaftCore {
    /// A voter with the log as it was loaded; the machine is as of the log's snapshot. `nonce` differs from one
    /// start to the next.
    ///
    /// # Errors
    /// raft-rs's own, for a configuration that makes no sense.
    pub fn new(config: CoreConfig, log: MemoryLog, nonce: u64) -> raft::Result<Self> {
        let applied = log.latest_snapshot().get_metadata().index;
        let settings = Config {
            id: config.id,
            election_tick: config.min_election_tick,
            min_election_tick: config.min_election_tick,
            max_election_tick: config.max_election_tick,
            heartbeat_tick: config.heartbeat_tick,
            applied,
            max_size_per_msg: 1 << 20,
            max_inflight_msgs: 64,
            check_quorum: true,
            pre_vote: true,
            priority: i64::from(config.preferred.contains(&config.id)),
            max_uncommitted_size: MAX_UNCOMMITTED,
            max_committed_size_per_ready: 4 << 20,
            ..Config::default()
        };
        let node = RawNode::new(&settings, log, &super::logger::logger())?;
        Ok(Self {
            node,
            config,
            outstanding: 0,
            installing: None,
            applied,
            last_read: 0,
            nonce,
            ticks_leading: 0,
            unwritten_commit: false,
        })
    }

    /// Whether this voter leads.
    pub fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }
    /// Who leads, as far as this voter knows.
    pub fn leader(&self) -> Option<u64> {
        Some(self.node.raft.leader_id).filter(|id| *id != 0)
    }
    /// The term.
    pub fn term(&self) -> u64 {
        self.node.raft.term
    }
    /// The last entry given out to be applied.
    pub fn applied(&self) -> u64 {
        self.applied
    }
    /// Whether an entry of the current term is committed: before that a leader knows less than its log.
    pub fn committed_in_term(&self) -> bool {
        self.node.raft.commit_to_current_term()
    }
    /// The term of this entry, where the log still knows it.
    pub fn term_of(&self, index: u64) -> Option<u64> {
        self.log().term(index).ok()
    }
    /// The voters, but for this one.
    pub fn peers(&self) -> impl Iterator<Item = u64> + '_ {
        self.config.voters.iter().copied().filter(|id| *id != self.config.id)
    }
    /// The last index known to be at this voter, if this one leads.
    pub fn matched(&self, id: u64) -> u64 {
        self.node.raft.prs().get(id).map_or(0, |progress| progress.matched)
    }
    /// The log.
    pub fn log(&self) -> &MemoryLog {
        self.node.store()
    }

    /// A tick has passed.
    pub fn tick(&mut self, heard_lately: impl Fn(u64) -> bool) {
        // To campaign raft-rs looks through the entries that are not applied, as it was told. Until a snapshot is
        // durable those are entries from before it, which are gone, and raft-rs panics.
        if self.installing.is_some() {
            return;
        }
        self.node.tick();
        self.prefer(heard_lately);
    }

    /// Hands leadership to a preferred voter that has caught up, after a while and not too often: the data nodes
    /// are those that get killed, and killing one should cost no election (DESIGN §8).
    fn prefer(&mut self, heard_lately: impl Fn(u64) -> bool) {
        const AFTER: u64 = 10;
        const AGAIN: u64 = 10;
        // What is on its way under load is sent first; proposals wait for it.
        const BEHIND: u64 = 16;
        self.ticks_leading = if self.leads() { self.ticks_leading + 1 } else { 0 };
        let turn = self.ticks_leading >= AFTER && (self.ticks_leading - AFTER).is_multiple_of(AGAIN);
        if !turn || self.config.preferred.contains(&self.config.id) || !self.committed_in_term() {
            return;
        }
        let last = self.node.raft.raft_log.last_index();
        let caught_up = |id: &&u64| heard_lately(**id) && self.matched(**id) + BEHIND >= last;
        if let Some(to) = self.config.preferred.iter().find(caught_up).copied() {
            self.node.transfer_leader(to);
        }
    }

    /// Appends a proposal, or passes it on to the leader. It may get lost: then it is proposed again under the
    /// same request id.
    ///
    /// # Errors
    /// When it certainly went nowhere.
    pub fn propose(&mut self, data: Vec<u8>) -> Result<(), NotProposed> {
        self.node.propose(Vec::new(), data).map_err(|_| NotProposed::Dropped)
    }

    /// Asks the quorum whether this voter still leads, by a round that begins now. Answered by [`Output::Read`],
    /// or never: ask again.
    pub fn read(&mut self) -> u64 {
        self.last_read += 1;
        if !self.leads() {
            return self.last_read;
        }
        let mut context = self.nonce.to_le_bytes().to_vec();
        context.extend_from_slice(&self.last_read.to_le_bytes());
        self.node.read_index(context);
        self.last_read
    }

    /// A message came. It is checked first: raft-rs panics on impossible ones.
    ///
    /// # Errors
    /// When it was dropped.
    pub fn message(&mut self, message: Message) -> Result<(), BadMessage> {
        if let Err(why) = self.check(&message) {
            let kind = format!("{:?}", message.get_msg_type());
            return Err(BadMessage { from: message.from, kind, why });
        }
        // A follower would pass these on under their first sender's name, and panics where they carry a term: that
        // they reached one is a loss on the way, and they are asked again.
        let for_leader = matches!(message.get_msg_type(), MessageType::MsgPropose | MessageType::MsgReadIndex);
        // For the same reason as in `tick` nobody campaigns now; whoever asked for it goes on without.
        let too_early = self.installing.is_some() && message.get_msg_type() == MessageType::MsgTimeoutNow;
        if too_early || for_leader && !self.leads() {
            return Ok(());
        }
        // What raft-rs refuses now (a proposal without a leader, say) is lost as if on the way.
        let _ = self.node.step(message);
        Ok(())
    }

    fn check(&self, m: &Message) -> Result<(), String> {
        use MessageType::*;
        let refuse = |why: String| Err(why);
        if m.to != self.config.id {
            return refuse(format!("is for {}", m.to));
        }
        if m.from == self.config.id || !self.config.voters.contains(&m.from) {
            return refuse("sender is not another voter".into());
        }
        if m.term > self.term().saturating_add(1 << 32) || m.index > u64::MAX / 2 || m.commit > u64::MAX / 2 {
            return refuse(format!("term {}, index {}, commit {}", m.term, m.index, m.commit));
        }
        if m.entries.len() > MAX_MESSAGE_ENTRIES || m.entries.iter().any(|e| e.data.len() > MAX_ENTRY) {
            return refuse(format!("{} entries, or one too long", m.entries.len()));
        }
        // Membership is fixed: nothing else is ever in the log.
        if m.entries.iter().any(|e| e.get_entry_type() != EntryType::EntryNormal) {
            return refuse("has an entry that changes membership".into());
        }
        // Term 0 marks what a voter says to itself, and what is passed on to the leader.
        if (m.term == 0) != matches!(m.get_msg_type(), MsgPropose | MsgReadIndex) {
            return refuse(format!("in term {}", m.term));
        }
        let last = self.node.raft.raft_log.last_index();
        match m.get_msg_type() {
            MsgPropose => {
                if m.entries.is_empty() || m.entries.iter().any(|e| e.data.is_empty()) {
                    return refuse("proposes nothing".into());
                }
            }
            MsgReadIndex | MsgReadIndexResp => {
                if m.entries.len() != 1 {
                    return refuse(format!("{} entries", m.entries.len()));
                }
            }
            MsgAppend => {
                if (m.index == 0) != (m.log_term == 0) {
                    return refuse(format!("after entry {} of term {}", m.index, m.log_term));
                }
                let mut before = (m.index, m.log_term);
                for entry in m.entries.iter() {
                    // No entry is of term 0, and raft-rs takes one behind the log's end for known.
                    let in_order = entry.term >= before.1.max(1) && entry.term <= m.term;
                    if entry.index != before.0 + 1 || !in_order {
                        return refuse(format!(
                            "entry {} of term {} after {} of term {}",
                            entry.index, entry.term, before.0, before.1
                        ));
                    }
                    before = (entry.index, entry.term);
                }
            }
            MsgHeartbeat => {
                // A leader never says more than we acknowledged to have: then we have lost acknowledged entries.
                if m.commit > last && m.term >= self.term() {
                    return refuse(format!(
                        "says {} are committed, our log ends at {last}: did it lose entries?",
                        m.commit
                    ));
                }
            }
            MsgAppendResponse => {
                if self.leads() && m.term == self.term() && !m.reject && m.index > last {
                    return refuse(format!("acknowledges {}, our log ends at {last}", m.index));
                }
            }
            MsgSnapshot => {
                let metadata = m.get_snapshot().get_metadata();
                let members = metadata.get_conf_state();
                let mut voters = members.voters.clone();
                voters.sort_unstable();
                let (index, term) = (metadata.index, metadata.term);
                if index == 0 || index > u64::MAX / 2 || term == 0 || term > m.term {
                    return refuse(format!("snapshot of {index} in term {term}"));
                }
                // raft-rs panics where these don't fit together.
                let only_voters = members.learners.is_empty()
                    && members.learners_next.is_empty()
                    && members.voters_outgoing.is_empty()
                    && !members.auto_leave;
                if voters != self.config.voters || !only_voters {
                    return refuse(format!("snapshot for members {members:?}"));
                }
            }
            MsgRequestVote
            | MsgRequestVoteResponse
            | MsgRequestPreVote
            | MsgRequestPreVoteResponse
            | MsgHeartbeatResponse
            | MsgTimeoutNow => {}
            MsgHup | MsgBeat | MsgUnreachable | MsgSnapStatus | MsgCheckQuorum | MsgTransferLeader => {
                return refuse("is never sent".into());
            }
        }
        Ok(())
    }

    /// Messages to this voter got lost.
    pub fn unreachable(&mut self, id: u64) {
        self.node.report_unreachable(id);
    }

    /// A snapshot sent to this voter arrived, or got lost.
    pub fn snapshot_sent(&mut self, id: u64, arrived: bool) {
        let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.node.report_snapshot(id, status);
    }

    /// The [`Persist`] of this number and all before it are durable.
    pub fn persisted(&mut self, number: u64) {
        if number != 0 {
            self.node.on_persist_ready(number);
            if number == self.outstanding {
                self.outstanding = 0;
            }
            if self.installing.is_some_and(|installing| installing <= number) {
                self.installing = None;
                self.tell_applied();
            }
        }
    }

    /// What has to be done now. Call it after every input, until nothing comes.
    pub fn outputs(&mut self, out: &mut Vec<Output>) {
        while self.node.has_ready() {
            self.one_ready(out);
        }
    }

    fn one_ready(&mut self, out: &mut Vec<Output>) {
        let mut ready = self.node.ready();
        let number = ready.number();
        let now = ready.take_messages();
        if !now.is_empty() {
            out.push(Output::Send(now));
        }
        for read in ready.take_read_states() {
            if let Some((nonce, number)) = read.request_ctx.split_first_chunk::<8>()
                && u64::from_le_bytes(*nonce) == self.nonce
                && let Ok(number) = number.try_into()
            {
                out.push(Output::Read { number: u64::from_le_bytes(number), index: read.index });
            }
        }
        let mut persist = Persist { number, then_send: ready.take_persisted_messages(), ..Persist::default() };
        if let Some(hard_state) = ready.hs() {
            self.node.mut_store().set_hard_state(hard_state.clone());
            self.unwritten_commit = true;
        }
        if !ready.snapshot().is_empty() {
            let snapshot = ready.snapshot().clone();
            self.applied = snapshot.get_metadata().index;
            self.node.mut_store().install(snapshot.clone());
            out.push(Output::Restore(snapshot.data.to_vec()));
            persist.install = Some(snapshot);
            self.installing = Some(number);
        }
        persist.entries = ready.take_entries();
        self.node.mut_store().append(&persist.entries);
        if ready.must_sync() {
            persist.hard_state = Some(self.log().hard_state().clone());
            self.unwritten_commit = false;
        }
        let committed = ready.take_committed_entries();
        if persist.writes() || !persist.then_send.is_empty() || self.outstanding != 0 {
            if !persist.writes() && self.outstanding == 0 {
                // Nothing to wait for.
                out.push(Output::Send(persist.then_send));
                self.node.advance_append_async(ready);
                self.node.on_persist_ready(number);
            } else {
                self.outstanding = number;
                if mutant::is(Mutant::SendBeforePersist) {
                    out.push(Output::Send(std::mem::take(&mut persist.then_send)));
                }
                out.push(Output::Persist(Box::new(persist)));
                self.node.advance_append_async(ready);
            }
        } else {
            self.node.advance_append_async(ready);
            self.node.on_persist_ready(number);
        }
        if let Some(last) = committed.last() {
            self.applied = last.index;
            let committed = committed.into_iter().map(|mut entry| Committed {
                index: entry.index,
                term: entry.term,
                data: entry.take_data().to_vec(),
            });
            out.push(Output::Apply(committed.collect()));
        }
        self.tell_applied();
    }

    /// raft-rs may be told that a snapshot was applied only once it is durable.
    fn tell_applied(&mut self) {
        if self.installing.is_none() {
            self.node.advance_apply_to(self.applied);
        }
    }

    /// Whether it is time for [`Self::compact`].
    pub fn wants_snapshot(&self) -> bool {
        if self.installing.is_some() || mutant::is(Mutant::LogNeverCut) {
            return false;
        }
        let since = self.applied - self.log().latest_snapshot().get_metadata().index;
        since >= self.config.snapshot_entries
            || (since > self.config.tail_entries && self.log().bytes() > SNAPSHOT_BYTES)
    }

    /// Takes the machine's snapshot as of [`Self::applied`] and cuts the log.
    pub fn compact(&mut self, data: Vec<u8>, out: &mut Vec<Output>) {
        let index = self.applied;
        let Ok(term) = self.log().term(index) else { return };
        let mut snapshot = Snapshot { data: data.into(), ..Snapshot::default() };
        let metadata = snapshot.mut_metadata();
        metadata.index = index;
        metadata.term = term;
        metadata.set_conf_state(self.log().conf_state().clone());
        let compact_to = index.saturating_sub(self.config.tail_entries).max(self.log().before().0);
        self.node.mut_store().compact(snapshot.clone(), compact_to);
        let before = self.log().before();
        // The snapshot is as good as its commit index: both go in one write.
        let mut hard_state = self.log().hard_state().clone();
        hard_state.commit = hard_state.commit.max(index);
        self.unwritten_commit = false;
        let compact = Some((snapshot, before));
        let persist = Persist { compact, hard_state: Some(hard_state), ..Persist::default() };
        out.push(Output::Persist(Box::new(persist)));
    }

    /// For a clean shutdown: the commit index, if it was not written yet, spares the next start a round.
    pub fn last_words(&mut self) -> Option<Persist> {
        std::mem::take(&mut self.unwritten_commit)
            .then(|| Persist { hard_state: Some(self.log().hard_state().clone()), ..Persist::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::log_store::{LogStore, MemoryStore};
    use super::*;
    use proptest::prelude::*;

    const KINDS: [MessageType; 19] = [
        MessageType::MsgHup,
        MessageType::MsgBeat,
        MessageType::MsgPropose,
        MessageType::MsgAppend,
        MessageType::MsgAppendResponse,
        MessageType::MsgRequestVote,
        MessageType::MsgRequestVoteResponse,
        MessageType::MsgSnapshot,
        MessageType::MsgHeartbeat,
        MessageType::MsgHeartbeatResponse,
        MessageType::MsgUnreachable,
        MessageType::MsgSnapStatus,
        MessageType::MsgCheckQuorum,
        MessageType::MsgTransferLeader,
        MessageType::MsgTimeoutNow,
        MessageType::MsgReadIndex,
        MessageType::MsgReadIndexResp,
        MessageType::MsgRequestPreVote,
        MessageType::MsgRequestPreVoteResponse,
    ];

    fn voter(preferred: &[u64]) -> (RaftCore, MemoryStore) {
        let mut store = MemoryStore::default();
        let log = store.load().unwrap().into_log(&[1, 2, 3]).unwrap();
        let mut config = CoreConfig::new(1, vec![1, 2, 3], preferred.to_vec());
        (config.min_election_tick, config.max_election_tick) = (5, 6);
        (RaftCore::new(config, log, 7).unwrap(), store)
    }

    /// Carries out everything at once; returns what was sent.
    fn settle(core: &mut RaftCore, store: &mut MemoryStore) -> Vec<Message> {
        let mut sent = Vec::new();
        loop {
            let mut out = Vec::new();
            core.outputs(&mut out);
            if out.is_empty() {
                return sent;
            }
            for output in out {
                match output {
                    Output::Send(messages) => sent.extend(messages),
                    Output::Persist(persist) => {
                        store.write(std::slice::from_ref(&persist)).unwrap();
                        core.persisted(persist.number);
                        sent.extend(persist.then_send);
                    }
                    _ => {}
                }
            }
        }
    }

    fn message(kind: MessageType, from: u64, term: u64) -> Message {
        let mut message = Message { from, to: 1, term, ..Message::default() };
        message.set_msg_type(kind);
        message
    }

    fn elect(core: &mut RaftCore, store: &mut MemoryStore) {
        for _ in 0..6 {
            core.tick(|_| true);
        }
        for kind in [MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse] {
            settle(core, store);
            core.message(message(kind, 2, 2)).unwrap();
        }
        settle(core, store);
        assert!(core.leads());
    }

    #[test]
    fn a_vote_is_sent_only_after_it_is_durable() {
        let (mut core, _) = voter(&[]);
        let mut request = message(MessageType::MsgRequestVote, 2, 5);
        request.log_term = 1;
        core.message(request).unwrap();
        let mut out = Vec::new();
        core.outputs(&mut out);
        let [Output::Persist(persist)] = &out[..] else { panic!("{out:?}") };
        let hard_state = persist.hard_state.as_ref().unwrap();
        assert_eq!((hard_state.term, hard_state.vote), (5, 2));
        assert_eq!(persist.then_send.len(), 1);
    }

    #[test]
    fn a_leader_that_is_not_preferred_hands_over_to_one_that_is() {
        let (mut core, mut store) = voter(&[3]);
        elect(&mut core, &mut store);
        let mut acknowledged = message(MessageType::MsgAppendResponse, 3, 2);
        acknowledged.index = 1;
        core.message(acknowledged).unwrap();
        settle(&mut core, &mut store);
        let handed = (0..30).any(|_| {
            core.tick(|id| id == 3);
            core.message(message(MessageType::MsgHeartbeatResponse, 3, 2)).unwrap();
            let sent = settle(&mut core, &mut store);
            sent.iter().any(|m| m.get_msg_type() == MessageType::MsgTimeoutNow && m.to == 3)
        });
        assert!(handed);
    }

    #[test]
    fn impossible_messages_are_refused() {
        let (mut core, mut store) = voter(&[]);
        elect(&mut core, &mut store);
        let stranger = message(MessageType::MsgHeartbeat, 9, 2);
        let own = message(MessageType::MsgHeartbeat, 1, 2);
        let mut elsewhere = message(MessageType::MsgHeartbeat, 2, 2);
        elsewhere.to = 3;
        let mut ahead = message(MessageType::MsgHeartbeat, 2, 3);
        ahead.commit = 99;
        let mut acknowledged = message(MessageType::MsgAppendResponse, 2, 2);
        acknowledged.index = 99;
        let empty = message(MessageType::MsgPropose, 2, 0);
        let local = message(MessageType::MsgHup, 2, 2);
        let mut learner = message(MessageType::MsgSnapshot, 2, 3);
        let metadata = learner.mut_snapshot().mut_metadata();
        (metadata.index, metadata.term) = (9, 2);
        metadata.mut_conf_state().voters = vec![1, 2, 3];
        let mut far = learner.clone();
        learner.mut_snapshot().mut_metadata().mut_conf_state().learners = vec![3];
        far.mut_snapshot().mut_metadata().index = u64::MAX;
        let mut timeless = message(MessageType::MsgAppend, 2, 3);
        timeless.commit = 1;
        timeless.entries.push(Entry { index: 1, ..Entry::default() });
        for bad in [stranger, own, elsewhere, ahead, acknowledged, empty, local, learner, far, timeless] {
            assert!(core.message(bad.clone()).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
        /// Whatever comes, raft-rs is not brought to panic, and what was committed stays.
        #[test]
        fn no_message_brings_a_voter_down(
            leads in any::<bool>(),
            fields in prop::collection::vec(
                (0..19usize, 0..4u64, 0..6u64, 0..8u64, 0..6u64, 0..9u64, 0..4usize, any::<bool>(), 0..12u64),
                1..60,
            ),
        ) {
            let (mut core, mut store) = voter(&[]);
            if leads {
                elect(&mut core, &mut store);
            }
            for (kind, from, term, index, log_term, commit, entries, reject, hint) in fields {
                let mut m = message(KINDS[kind], from, term);
                m.index = index;
                m.log_term = log_term;
                // What a leader says of commits is bounded by what we acknowledged: the check sees to no more.
                m.commit = commit;
                m.reject = reject;
                m.reject_hint = hint;
                for at in 0..entries as u64 {
                    let entry = Entry { index: index + 1 + at, term: log_term.max(1), data: vec![1].into(), ..Entry::default() };
                    m.entries.push(entry);
                }
                if KINDS[kind] == MessageType::MsgSnapshot {
                    let metadata = m.mut_snapshot().mut_metadata();
                    metadata.index = hint;
                    metadata.term = log_term;
                    metadata.mut_conf_state().voters = vec![1, 2, 3];
                }
                let _ = core.message(m);
                settle(&mut core, &mut store);
                core.tick(|_| true);
                settle(&mut core, &mut store);
            }
        }
    }
}
