//! The full-feature phase of one session (RFC 7143 §4, §11), as a core without I/O: PDUs and device outcomes come in,
//! PDUs and device requests go out.
//!
//! A command passes three gates. The *window* (§4.2.2.1): MaxCmdSN lets [`WINDOW`] commands be outstanding.
//! *Admission*: commands begin in order, as long as their data fits [`MEMORY`]; an ordered one waits until it is alone
//! (§11.3.1). *Write data*: what was not sent along is asked for with R2T, never more than was admitted. None of them
//! has a time-out: when the device waits, commands wait (R12).
//!
//! Aborting obeys R4: a command that the device has not been asked for is dropped; any other is awaited, and only then
//! is the function, logout or reinstatement that ended it answered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::buffer;

use super::login::{Agreed, Parameters};
use super::pdu::response::Body;
use super::pdu::wire::{Pdu, Sender};
use super::pdu::{Bhs, CmdSn, NO_TAG, Request, Response, request};
use super::task::{Phase, Task};
use super::text::{Incoming, Outgoing};
use crate::block::{BlockOutcome, BlockRequest, DeviceInfo, DeviceState};
use crate::scsi::sense::Sense;
use crate::scsi::unit::{self, Nexus, Reply, Start, Step};

/// Commands of a session that may be outstanding; MaxCmdSN closes at it.
pub const WINDOW: u32 = 128;
/// Immediate commands, which the window does not count, that may be outstanding; more are rejected (§4.2.2.1).
pub const MAX_IMMEDIATE: usize = 16;
/// Task management functions that may wait for aborted commands; more are answered "rejected".
pub const MAX_MANAGEMENT: usize = 16;
/// Bytes of read and write data that admitted commands of a session may have in memory. Unsolicited data of waiting
/// commands comes on top: at most FirstBurstLength for each command of the window.
pub const MEMORY: u64 = 32 << 20;
/// When nothing has been heard for so long, the initiator is pinged (§11.19).
pub const PING_AFTER: Duration = Duration::from_secs(15);
/// When nothing has been heard for so long after a ping, the connection is given up.
pub const PING_TIMEOUT: Duration = Duration::from_secs(30);

const _: () = assert!(MEMORY >= unit::MAX_TRANSFER_BLOCKS as u64 * crate::block::SECTOR);

/// Reject reasons (§11.17.1).
mod reject {
    pub const DATA_DIGEST: u8 = 0x02;
    pub const SNACK: u8 = 0x03;
    pub const PROTOCOL: u8 = 0x04;
    pub const NOT_SUPPORTED: u8 = 0x05;
    pub const IMMEDIATE: u8 = 0x06;
    pub const TASK_IN_PROGRESS: u8 = 0x07;
}

/// Task management response codes (§11.6.1).
mod managed {
    pub const COMPLETE: u8 = 0;
    pub const NO_TASK: u8 = 1;
    pub const NO_LUN: u8 = 2;
    pub const NO_REASSIGN: u8 = 4;
    pub const NOT_SUPPORTED: u8 = 5;
    pub const REJECTED: u8 = 255;
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The initiator logged out.
    Logout,
    /// The connection was closed or lost by the other side.
    Lost,
    /// The initiator broke the protocol.
    Protocol(&'static str),
    /// The stream cannot be understood.
    Wire(super::pdu::wire::WireError),
    /// Pings were not answered.
    Silent,
    /// The same initiator port logged in again (§6.3.5).
    Reinstated,
    /// The target was reset cold.
    ColdReset,
    /// The target closes.
    Closed,
    /// The device is gone (R1): nothing more may be sent.
    Gone,
}

/// What other sessions of the target have to do for a task management function of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Others {
    /// Comes back in [`Session::others_done`].
    pub id: u64,
    /// What to do there.
    pub clear: Clear,
}

/// How another session's function clears a session's tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// CLEAR TASK SET.
    TaskSet,
    /// LUN RESET or TARGET WARM RESET.
    Reset,
    /// TARGET COLD RESET: the session ends.
    Cold,
}

/// What is to be done, in the order of the fields.
pub struct Outputs {
    /// Requests to submit, with their tags.
    pub requests: Vec<(u64, BlockRequest)>,
    /// Tags of requests to abort.
    pub aborts: Vec<u64>,
    /// What to ask of all other sessions of the target.
    pub others: Vec<Others>,
    /// Barriers of other sessions whose tasks here have ended.
    pub cleared: Vec<u64>,
    /// Bytes for the initiator.
    pub wire: Sender,
    /// The connection is to be closed when `wire` is written.
    pub close: Option<End>,
}

struct Management {
    itt: u32,
    response: u8,
    tasks: BTreeSet<u64>,
    others: Option<u64>,
    cold: bool,
}

struct Barrier {
    id: u64,
    tasks: BTreeSet<u64>,
}

struct TextExchange {
    ttt: u32,
    incoming: Incoming,
    outgoing: Outgoing,
}

/// A command that waits for its turn, and the data that came with it.
type Early = (Request, Vec<u8>);

/// A session in full-feature phase.
pub struct IscsiSession {
    iqn: String,
    portal: String,
    cid: u16,
    info: DeviceInfo,
    parameters: Parameters,
    nexus: Nexus,
    exp_cmd_sn: CmdSn,
    stat_sn: u32,
    next_tag: u64,
    next_ttt: u32,
    tasks: BTreeMap<u64, Task>,
    by_itt: BTreeMap<u32, u64>,
    /// Commands that are not admitted yet.
    waiting: VecDeque<u64>,
    admitted: BTreeSet<u64>,
    /// Ordered commands among the admitted.
    ordered: u32,
    /// Outstanding commands that the window counts.
    counted: u32,
    memory: u64,
    /// Memory of answers that are not written yet: released when the wire has come to the mark.
    unwritten: VecDeque<(u64, u64)>,
    /// Commands that came before their turn; `None` for one that was aborted before it came.
    early: Vec<(CmdSn, Option<Early>)>,
    management: Vec<Management>,
    barriers: Vec<Barrier>,
    text: Option<TextExchange>,
    logout: Option<(u32, u8)>,
    closing: bool,
    heard: Instant,
    pinged: Option<Instant>,
}

impl IscsiSession {
    /// A session as it was agreed at login. `portal` is the address that the initiator connected to.
    pub fn new(agreed: &Agreed, iqn: &str, portal: String, info: DeviceInfo, state: DeviceState, now: Instant) -> Self {
        IscsiSession {
            iqn: iqn.to_owned(),
            portal,
            cid: agreed.identity.cid,
            info,
            parameters: agreed.parameters.clone(),
            nexus: Nexus::new(state),
            exp_cmd_sn: agreed.cmd_sn,
            stat_sn: agreed.stat_sn,
            next_tag: 1,
            next_ttt: 1,
            tasks: BTreeMap::new(),
            by_itt: BTreeMap::new(),
            waiting: VecDeque::new(),
            admitted: BTreeSet::new(),
            ordered: 0,
            counted: 0,
            memory: 0,
            unwritten: VecDeque::new(),
            early: Vec::new(),
            management: Vec::new(),
            barriers: Vec::new(),
            text: None,
            logout: None,
            closing: false,
            heard: now,
            pinged: None,
        }
    }

    /// The last command number that may be sent: never goes back, since what it gains from a new ExpCmdSN it loses to
    /// the outstanding command.
    fn max_cmd_sn(&self) -> CmdSn {
        self.exp_cmd_sn.plus(WINDOW - self.counted.min(WINDOW)).minus(1)
    }

    /// The window that the final login response announces.
    pub fn window(&self) -> (CmdSn, CmdSn) {
        (self.exp_cmd_sn, self.max_cmd_sn())
    }

    /// Whether no command, and no function that waits for one, is left.
    pub fn is_drained(&self) -> bool {
        self.tasks.is_empty() && self.management.is_empty() && self.barriers.is_empty()
    }

    /// Whether no command is with the device.
    pub fn is_idle(&self) -> bool {
        self.tasks.is_empty()
    }

    fn send(&mut self, body: Body, data: impl IntoIterator<Item = Bytes>, with_status: bool, out: &mut Outputs) {
        let response =
            Response { stat_sn: self.stat_sn, exp_cmd_sn: self.exp_cmd_sn, max_cmd_sn: self.max_cmd_sn(), body };
        if with_status {
            self.stat_sn = self.stat_sn.wrapping_add(1);
        }
        out.wire.push(response.encode(), data);
    }

    fn reject(&mut self, reason: u8, bhs: &Bhs, out: &mut Outputs) {
        self.send(Body::Reject { reason }, [Bytes::copy_from_slice(&bhs.0)], true, out);
    }

    /// The buffer that a PDU's data segment is to be received into (see [`Receiver::next`]
    /// (super::pdu::wire::Receiver::next)): a write's own one, wherever that is possible.
    pub fn place(&mut self, bhs: &Bhs) -> Vec<u8> {
        match Request::decode(bhs) {
            Ok(Request::Command(command)) => {
                // If all data will come unsolicited, room for all of it at once.
                let all = command.expected_len.min(self.parameters.first_burst) as usize;
                let len = bhs.data_len();
                buffer::take(if command.last { len } else { len.max(all) })
            }
            Ok(Request::DataOut(data)) => {
                let task = self.by_itt.get(&data.itt).and_then(|tag| self.tasks.get_mut(tag));
                match task {
                    Some(task)
                        if data.offset as usize == task.data.len()
                            && task.data.len() + bhs.data_len() <= task.wanted as usize
                            && !task.lent =>
                    {
                        task.lent = true;
                        std::mem::take(&mut task.data)
                    }
                    _ => Vec::new(),
                }
            }
            _ => Vec::new(),
        }
    }

    /// Takes a PDU.
    pub fn receive(&mut self, now: Instant, pdu: Pdu, out: &mut Outputs) {
        self.heard = now;
        self.pinged = None;
        if out.close.is_some() || self.closing {
            return;
        }
        if !pdu.digest_ok {
            // ErrorRecoveryLevel 0: told, and the session ends (§7.8).
            self.reject(reject::DATA_DIGEST, &pdu.bhs, out);
            out.close = Some(End::Protocol("data digest error"));
            return;
        }
        let bhs = pdu.bhs;
        let request = match Request::decode(&bhs) {
            Ok(request) => request,
            Err(_) => {
                self.reject(reject::NOT_SUPPORTED, &bhs, out);
                out.close = Some(End::Protocol("unknown opcode"));
                return;
            }
        };
        let (cmd_sn, immediate) = match &request {
            Request::DataOut(data) => return self.data_out(*data, pdu, out),
            Request::Snack { .. } => return self.reject(reject::SNACK, &bhs, out),
            Request::Login(_) => {
                self.reject(reject::PROTOCOL, &bhs, out);
                out.close = Some(End::Protocol("login in full-feature phase"));
                return;
            }
            Request::NopOut(p) => (p.cmd_sn, p.immediate),
            Request::Command(p) => (p.cmd_sn, p.immediate),
            Request::TaskManagement(p) => (p.cmd_sn, p.immediate),
            Request::Text(p) => (p.cmd_sn, p.immediate),
            Request::Logout(p) => (p.cmd_sn, p.immediate),
        };
        if immediate {
            self.perform(&bhs, request, pdu.data, out);
            return self.catch_up(out);
        }
        // §4.2.2.1: what is outside the window is ignored without a word.
        let Some(ahead) = cmd_sn.ahead_of(self.exp_cmd_sn) else { return };
        if self.max_cmd_sn().ahead_of(cmd_sn).is_none() {
            return;
        }
        if ahead > 0 {
            if self.early.iter().all(|(sn, _)| *sn != cmd_sn) {
                self.early.push((cmd_sn, Some((request, pdu.data))));
            }
            return;
        }
        self.exp_cmd_sn = self.exp_cmd_sn.plus(1);
        self.perform(&bhs, request, pdu.data, out);
        self.catch_up(out);
    }

    /// Performs the commands that came early and whose turn it is now.
    fn catch_up(&mut self, out: &mut Outputs) {
        while let Some(at) = self.early.iter().position(|(sn, _)| *sn == self.exp_cmd_sn) {
            self.exp_cmd_sn = self.exp_cmd_sn.plus(1);
            if let (_, Some((request, data))) = self.early.swap_remove(at) {
                self.perform(&request.encode(), request, data, out);
            }
        }
    }

    fn perform(&mut self, bhs: &Bhs, request: Request, data: Vec<u8>, out: &mut Outputs) {
        if self.logout.is_some() || out.close.is_some() {
            return;
        }
        match request {
            Request::Command(command) => self.command(bhs, command, data, out),
            Request::NopOut(nop) => {
                if nop.itt != NO_TAG {
                    let mut data = data;
                    data.truncate(self.parameters.max_send_segment as usize);
                    let body = Body::NopIn { lun: nop.lun, itt: nop.itt, ttt: NO_TAG };
                    self.send(body, [buffer::freeze(data)], true, out);
                }
            }
            Request::TaskManagement(function) => self.manage(function, out),
            Request::Text(text) => self.text(bhs, text, &data, out),
            Request::Logout(logout) => {
                let response = match logout.reason {
                    0 => 0,
                    1 if logout.cid == self.cid => 0,
                    1 => 1,
                    _ => 2,
                };
                if response == 0 {
                    self.logout = Some((logout.itt, 0));
                    self.abort_all(out);
                    self.settle(out);
                } else {
                    self.answer_logout(logout.itt, response, out);
                }
            }
            Request::Login(_) | Request::DataOut(_) | Request::Snack { .. } => unreachable!("handled before"),
        }
    }

    fn answer_logout(&mut self, itt: u32, response: u8, out: &mut Outputs) {
        let (time2wait, time2retain) = (self.parameters.time2wait, self.parameters.time2retain);
        self.send(Body::Logout { itt, response, time2wait, time2retain }, [], true, out);
    }

    // --- commands ---

    fn command(&mut self, bhs: &Bhs, command: request::Command, data: Vec<u8>, out: &mut Outputs) {
        if command.itt == NO_TAG || self.by_itt.contains_key(&command.itt) {
            self.reject(reject::TASK_IN_PROGRESS, bhs, out);
            out.close = Some(End::Protocol("a task tag that is in use"));
            return;
        }
        if command.immediate && self.tasks.len() >= self.counted as usize + MAX_IMMEDIATE {
            return self.reject(reject::IMMEDIATE, bhs, out);
        }
        let p = &self.parameters;
        let unsolicited = data.len() as u64;
        let allowed = u64::from(if command.write { command.expected_len.min(p.first_burst) } else { 0 });
        let unexpected = (unsolicited > 0 && !p.immediate_data)
            || unsolicited > allowed
            || (command.write && !command.last && p.initial_r2t);
        let start = if unexpected {
            Start::Reply(Reply::check(Sense::UNSOLICITED_DATA))
        } else if command.read && command.write {
            Start::Reply(Reply::check(Sense::in_cdb(0))) // bidirectional commands: we have none
        } else {
            unit::start(&command.cdb, command.lun, &mut self.nexus, &self.info, &self.iqn)
        };
        let start = match start {
            Start::Run(operation) if operation.is_exact() && command.expected_len > operation.data_out() => {
                Start::Reply(Reply::check(Sense::PARAMETER_LENGTH))
            }
            start => start,
        };
        let mut task = match start {
            Start::Reply(reply) => Task::new(command, None, Some(reply)),
            Start::Run(operation) => Task::new(command, Some(operation), None),
        };
        task.unsolicited = unsolicited as u32;
        if unexpected {
            task.more_unsolicited = false;
        } else if !data.is_empty() {
            // The segment was received into a buffer of its own: that is the command's buffer now.
            task.lent = true;
            task.take(data, 0);
        }
        let tag = self.next_tag;
        self.next_tag += 1;
        if !command.immediate {
            self.counted += 1;
        }
        self.by_itt.insert(command.itt, tag);
        let head = command.attribute == 3;
        self.tasks.insert(tag, task);
        if head {
            self.waiting.push_front(tag);
        } else {
            self.waiting.push_back(tag);
        }
        self.admit(out);
        // A command that has its answer already does not wait for admission.
        if self.tasks.get(&tag).is_some_and(|task| task.phase == Phase::Waiting && task.reply.is_some()) {
            self.advance(tag, out);
        }
    }

    /// Lets waiting commands begin, in order, as far as memory and ordered commands allow.
    fn admit(&mut self, out: &mut Outputs) {
        while let Some(&tag) = self.waiting.front() {
            let task = &self.tasks[&tag];
            let blocked = match task.command.attribute {
                3 => false,
                2 => !self.admitted.is_empty(),
                _ => self.ordered > 0,
            };
            let full = task.memory > 0 && self.memory > 0 && self.memory + task.memory > MEMORY;
            if blocked || full {
                return;
            }
            self.memory += task.memory;
            self.ordered += u32::from(task.command.attribute == 2);
            self.waiting.pop_front();
            self.admitted.insert(tag);
            self.tasks.get_mut(&tag).expect("looked at above").phase = Phase::Collecting;
            self.advance(tag, out);
        }
    }

    /// Does with a command whatever can be done now.
    fn advance(&mut self, tag: u64, out: &mut Outputs) {
        let Some(task) = self.tasks.get_mut(&tag) else { return };
        if task.more_unsolicited || task.lent {
            return;
        }
        if let Some(reply) = task.reply.take() {
            return self.finish(tag, reply, out);
        }
        if task.phase != Phase::Collecting {
            return;
        }
        if task.is_complete() {
            task.phase = Phase::Executing;
            let data = buffer::freeze(std::mem::take(&mut task.data));
            let operation = task.operation.as_mut().expect("without one there is a reply");
            let step = operation.start(data);
            return self.apply(tag, step, out);
        }
        loop {
            let ttt = self.next_ttt;
            let task = self.tasks.get_mut(&tag).expect("looked at above");
            let Some(body) = task.next_r2t(&self.parameters, ttt) else { return };
            self.next_ttt = match self.next_ttt.wrapping_add(1) {
                NO_TAG => 1,
                next => next,
            };
            self.send(body, [], false, out);
        }
    }

    fn apply(&mut self, tag: u64, step: Step, out: &mut Outputs) {
        match step {
            Step::Submit(request) => out.requests.push((tag, request)),
            Step::Finish(reply) => self.finish(tag, reply, out),
        }
    }

    /// Takes the outcome of a request.
    pub fn complete(&mut self, tag: u64, outcome: BlockOutcome, out: &mut Outputs) {
        let task = self.tasks.get_mut(&tag).expect("every request belongs to a task, and completes once");
        match task.phase {
            Phase::Executing => {
                let operation = task.operation.as_mut().expect("it submitted the request");
                let step = operation.outcome(outcome);
                self.apply(tag, step, out);
            }
            Phase::Aborting => {
                self.remove(tag);
                self.admit(out);
            }
            Phase::Waiting | Phase::Collecting => unreachable!("outcome for a task in {:?}", task.phase),
        }
        self.settle(out);
    }

    fn finish(&mut self, tag: u64, reply: Reply, out: &mut Outputs) {
        let memory = self.tasks[&tag].memory;
        let admitted = self.admitted.contains(&tag);
        let data = reply.len();
        let task = self.remove(tag);
        let parameters = self.parameters.clone();
        task.answer(reply, &parameters, |body, data, with_status| self.send(body, data, with_status, out));
        if admitted && data > 0 {
            // Its memory is in the wire now.
            self.memory += memory;
            self.unwritten.push_back((out.wire.queued(), memory));
        }
        self.admit(out);
    }

    /// Forgets a command that is answered, or will never be.
    fn remove(&mut self, tag: u64) -> Task {
        let task = self.tasks.remove(&tag).expect("a task is removed once");
        self.by_itt.remove(&task.command.itt);
        if self.admitted.remove(&tag) {
            self.memory -= task.memory;
            self.ordered -= u32::from(task.command.attribute == 2);
        } else {
            self.waiting.retain(|&waiting| waiting != tag);
        }
        if !task.command.immediate {
            self.counted -= 1;
        }
        for management in &mut self.management {
            management.tasks.remove(&tag);
        }
        for barrier in &mut self.barriers {
            barrier.tasks.remove(&tag);
        }
        task
    }

    /// Bytes were written: memory of answers may be free.
    pub fn written(&mut self, out: &mut Outputs) {
        let mut freed = false;
        while let Some(&(mark, memory)) = self.unwritten.front()
            && mark <= out.wire.written()
        {
            self.memory -= memory;
            self.unwritten.pop_front();
            freed = true;
        }
        if freed {
            self.admit(out);
        }
    }

    fn data_out(&mut self, data: request::DataOut, pdu: Pdu, out: &mut Outputs) {
        // For a command that is answered or aborted: the initiator could not know. Dropped.
        let Some(&tag) = self.by_itt.get(&data.itt) else { return };
        let task = self.tasks.get_mut(&tag).expect("indexed");
        let len = pdu.bhs.data_len() as u32;
        let checked = if data.ttt == NO_TAG {
            // §4.2.5.2: in order, within the first burst and the expected length.
            let limit = self.parameters.first_burst.min(task.command.expected_len);
            if !task.more_unsolicited {
                Err(Sense::UNSOLICITED_DATA)
            } else if data.offset != task.unsolicited || data.data_sn != task.data_sn {
                Err(Sense::DATA_LOST)
            } else if u64::from(task.unsolicited) + u64::from(len) > u64::from(limit) {
                Err(Sense::DATA_AMOUNT)
            } else {
                task.unsolicited += len;
                task.data_sn = task.data_sn.wrapping_add(1);
                task.more_unsolicited = !data.last;
                Ok(())
            }
        } else {
            match task.r2ts.front_mut() {
                Some(r2t) if r2t.ttt == data.ttt => {
                    let end = u64::from(r2t.received) + u64::from(len);
                    if data.offset != r2t.offset + r2t.received || data.data_sn != r2t.data_sn {
                        Err(Sense::DATA_LOST)
                    } else if end > u64::from(r2t.len) || data.last != (end == u64::from(r2t.len)) {
                        Err(Sense::DATA_AMOUNT)
                    } else {
                        r2t.received += len;
                        r2t.data_sn = r2t.data_sn.wrapping_add(1);
                        if data.last {
                            task.r2ts.pop_front();
                        }
                        Ok(())
                    }
                }
                _ => Err(Sense::UNSOLICITED_DATA),
            }
        };
        if let Err(sense) = checked {
            // §7.9: the command fails, and what else comes for it is dropped. One that has all its data, and is with
            // the device, goes on.
            if matches!(task.phase, Phase::Waiting | Phase::Collecting) {
                self.finish(tag, Reply::check(sense), out);
                self.settle(out);
            }
            return;
        }
        if pdu.bhs.data_len() > 0 {
            task.take(pdu.data, pdu.start);
        }
        self.advance(tag, out);
        self.settle(out);
    }

    // --- aborting ---

    /// Aborts a command: true if it must be awaited.
    fn abort(&mut self, tag: u64, out: &mut Outputs) -> bool {
        let task = self.tasks.get_mut(&tag).expect("looked up by the caller");
        match task.phase {
            Phase::Waiting | Phase::Collecting => {
                self.remove(tag);
                false
            }
            Phase::Executing => {
                task.phase = Phase::Aborting;
                out.aborts.push(tag);
                true
            }
            Phase::Aborting => true,
        }
    }

    fn abort_all(&mut self, out: &mut Outputs) -> BTreeSet<u64> {
        let tags: Vec<u64> = self.tasks.keys().copied().collect();
        self.waiting.clear();
        tags.into_iter().filter(|&tag| self.abort(tag, out)).collect()
    }

    fn manage(&mut self, p: request::TaskManagement, out: &mut Outputs) {
        use request::Function;
        let answer = |session: &mut Self, response, out: &mut Outputs| {
            session.send(Body::TaskManagement { itt: p.itt, response }, [], true, out);
        };
        if self.management.len() >= MAX_MANAGEMENT {
            return answer(self, managed::REJECTED, out);
        }
        let for_lun = !matches!(p.function, Function::TargetWarmReset | Function::TargetColdReset);
        if for_lun && !unit::is_lun_zero(p.lun) {
            return answer(self, managed::NO_LUN, out);
        }
        let mut waits = BTreeSet::new();
        let mut others = None;
        match p.function {
            Function::AbortTask => match self.by_itt.get(&p.referenced) {
                Some(&tag) => {
                    if self.abort(tag, out) {
                        waits.insert(tag);
                    }
                    self.admit(out);
                }
                None => {
                    // §11.5.1: a task still on its way counts as received and aborted; else it does not exist.
                    let coming = p.ref_cmd_sn.ahead_of(self.exp_cmd_sn).is_some()
                        && self.max_cmd_sn().ahead_of(p.ref_cmd_sn).is_some()
                        && p.cmd_sn.ahead_of(p.ref_cmd_sn).is_some_and(|d| d > 0);
                    if !coming {
                        return answer(self, managed::NO_TASK, out);
                    }
                    match self.early.iter_mut().find(|(sn, _)| *sn == p.ref_cmd_sn) {
                        Some((_, request)) => *request = None,
                        None => self.early.push((p.ref_cmd_sn, None)),
                    }
                }
            },
            Function::AbortTaskSet => waits = self.abort_all(out),
            Function::ClearTaskSet => {
                waits = self.abort_all(out);
                others = Some(Clear::TaskSet);
            }
            Function::LunReset | Function::TargetWarmReset | Function::TargetColdReset => {
                waits = self.abort_all(out);
                self.nexus.attention(Sense::RESET);
                let cold = p.function == Function::TargetColdReset;
                others = Some(if cold { Clear::Cold } else { Clear::Reset });
            }
            Function::TaskReassign => return answer(self, managed::NO_REASSIGN, out),
            Function::ClearAca | Function::Other(_) => return answer(self, managed::NOT_SUPPORTED, out),
        }
        let others = others.map(|clear| {
            let id = self.next_tag;
            self.next_tag += 1;
            out.others.push(Others { id, clear });
            id
        });
        self.management.push(Management {
            itt: p.itt,
            response: managed::COMPLETE,
            tasks: waits,
            others,
            cold: p.function == Function::TargetColdReset,
        });
        self.settle(out);
    }

    /// All other sessions have done what [`Others`] with this id asked for.
    pub fn others_done(&mut self, id: u64, out: &mut Outputs) {
        for management in &mut self.management {
            if management.others == Some(id) {
                management.others = None;
            }
        }
        self.settle(out);
    }

    /// Another session's function clears the tasks here; `id` leaves in [`Outputs::cleared`] when they have ended.
    pub fn clear(&mut self, id: u64, clear: Clear, out: &mut Outputs) {
        let had_tasks = !self.tasks.is_empty();
        let tasks = self.abort_all(out);
        match clear {
            Clear::TaskSet if had_tasks => self.nexus.attention(Sense::CLEARED),
            Clear::TaskSet => {}
            Clear::Reset => self.nexus.attention(Sense::RESET),
            Clear::Cold => out.close = out.close.or(Some(End::ColdReset)),
        }
        self.barriers.push(Barrier { id, tasks });
        self.settle(out);
    }

    /// Answers what waited for commands to end.
    fn settle(&mut self, out: &mut Outputs) {
        while let Some(at) = self.management.iter().position(|m| m.tasks.is_empty() && m.others.is_none()) {
            let done = self.management.remove(at);
            self.send(Body::TaskManagement { itt: done.itt, response: done.response }, [], true, out);
            if done.cold {
                out.close = out.close.or(Some(End::ColdReset));
            }
        }
        self.barriers.retain(|barrier| {
            if barrier.tasks.is_empty() {
                out.cleared.push(barrier.id);
            }
            !barrier.tasks.is_empty()
        });
        if let Some((itt, response)) = self.logout
            && self.tasks.is_empty()
            && out.close.is_none()
        {
            self.answer_logout(itt, response, out);
            out.close = Some(End::Logout);
        }
    }

    /// The connection has ended: nothing more is answered. Call [`is_drained`](Self::is_drained) to know when every
    /// command has.
    pub fn end(&mut self, out: &mut Outputs) {
        self.logout = None;
        self.management.clear();
        self.closing = true;
        self.abort_all(out);
        self.settle(out);
    }

    /// The target closes: no new command is taken, and those outstanding are finished (§11.9.1, event 2: the
    /// connection will be dropped).
    pub fn close(&mut self, out: &mut Outputs) {
        if !self.closing {
            self.closing = true;
            let parameters = [self.cid, self.parameters.time2wait, self.parameters.time2retain];
            self.send(Body::Async { event: 2, parameters }, [], true, out);
        }
        // Commands that have not begun will not; the initiator sends them again after it has reconnected.
        let unbegun: Vec<u64> = self
            .tasks
            .iter()
            .filter(|(_, task)| matches!(task.phase, Phase::Waiting | Phase::Collecting))
            .map(|(&tag, _)| tag)
            .collect();
        for tag in unbegun {
            self.remove(tag);
        }
        self.settle(out);
    }

    // --- the rest ---

    /// The device's state or size may have changed.
    pub fn update(&mut self, info: DeviceInfo, state: DeviceState) {
        self.info = info;
        self.nexus.update(state);
    }

    /// When [`tick`](Self::tick) is to be called next.
    pub fn deadline(&self) -> Instant {
        match self.pinged {
            Some(pinged) => pinged + PING_TIMEOUT,
            None => self.heard + PING_AFTER,
        }
    }

    /// Time has passed: pings an idle initiator. True says that a silent one is to be given up, whatever could still be
    /// written to it.
    #[must_use]
    pub fn tick(&mut self, now: Instant, out: &mut Outputs) -> bool {
        if now < self.deadline() {
            return false;
        }
        if self.pinged.is_some() {
            return true;
        }
        self.pinged = Some(now);
        if self.closing || out.close.is_some() {
            return false;
        }
        let ttt = self.next_ttt;
        self.next_ttt = match self.next_ttt.wrapping_add(1) {
            NO_TAG => 1,
            next => next,
        };
        self.send(Body::NopIn { lun: 0, itt: NO_TAG, ttt }, [], false, out);
        false
    }

    fn text(&mut self, bhs: &Bhs, text: request::Text, segment: &[u8], out: &mut Outputs) {
        let continues = self.text.as_ref().is_some_and(|exchange| exchange.ttt == text.ttt);
        if text.ttt != NO_TAG && !continues {
            return self.reject(reject::PROTOCOL, bhs, out);
        }
        if !continues {
            let ttt = self.next_ttt;
            self.next_ttt = match self.next_ttt.wrapping_add(1) {
                NO_TAG => 1,
                next => next,
            };
            self.text = Some(TextExchange { ttt, incoming: Incoming::default(), outgoing: Outgoing::default() });
        }
        let exchange = self.text.as_mut().expect("made above");
        if exchange.outgoing.is_empty() {
            let pairs = match exchange.incoming.push(segment, text.more) {
                Ok(pairs) => pairs.unwrap_or_default(),
                Err(_) => {
                    self.text = None;
                    return self.reject(reject::PROTOCOL, bhs, out);
                }
            };
            for (key, value) in pairs {
                match (key.as_str(), value.as_str()) {
                    // §6.3: in a normal session, the session's own target only.
                    ("SendTargets", name) if name.is_empty() || name.eq_ignore_ascii_case(&self.iqn) => {
                        send_target(&mut exchange.outgoing, &self.iqn, &self.portal);
                    }
                    ("SendTargets", _) => exchange.outgoing.pair("SendTargets", "Reject"),
                    ("MaxRecvDataSegmentLength", value) => {
                        // §13.12: may be declared anew.
                        match super::text::number(value) {
                            Some(n @ 512..=0xff_ffff) => self.parameters.max_send_segment = n as u32,
                            _ => exchange.outgoing.pair(&key, "Reject"),
                        }
                    }
                    (key, _) => exchange.outgoing.pair(key, "NotUnderstood"),
                }
            }
        }
        let (segment, more) = exchange.outgoing.segment(self.parameters.max_send_segment as usize);
        let last = !more && !text.more && text.last;
        let ttt = if last { NO_TAG } else { exchange.ttt };
        if last {
            self.text = None;
        }
        self.send(Body::Text { last, more, lun: text.lun, itt: text.itt, ttt }, [segment], true, out);
    }
}

/// A target's record in the answer to SendTargets (RFC 7143 Appendix C).
pub fn send_target(text: &mut Outgoing, iqn: &str, portal: &str) {
    text.pair("TargetName", iqn);
    text.pair("TargetAddress", &format!("{portal},{}", super::PORTAL_GROUP_TAG));
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use super::super::login::Identity;
    use super::super::pdu::BHS_LEN;
    use super::super::pdu::response::DataIn;
    use super::super::pdu::wire::{Digests, Receiver};
    use super::*;
    use proptest::prelude::*;

    struct Bench {
        session: IscsiSession,
        out: Outputs,
        now: Instant,
    }

    fn bench() -> Bench {
        let parameters = Parameters {
            initial_r2t: false,
            max_burst: 8192,
            first_burst: 4096,
            max_send_segment: 4096,
            max_outstanding_r2t: 2,
            ..Parameters::default()
        };
        let identity =
            Identity { initiator: "iqn.x:i".into(), alias: String::new(), isid: [0; 6], target: None, cid: 7 };
        let agreed = Agreed { identity, parameters, cmd_sn: CmdSn(0xffff_fff0), stat_sn: 10 };
        let info =
            DeviceInfo { id: uuid::Uuid::nil(), name: "t".into(), bytes: 1 << 30, chunk: 65536, write_cache: true };
        let state = DeviceState { power_on: 0, capacity: 0, gone: false };
        let now = Instant::now();
        let session = IscsiSession::new(&agreed, "iqn.t", "127.0.0.1:1".into(), info, state, now);
        let out = Outputs {
            requests: vec![],
            aborts: vec![],
            others: vec![],
            cleared: vec![],
            wire: Sender::new(Digests::default()),
            close: None,
        };
        let mut bench = Bench { session, out, now };
        // Take the unit attention of the new nexus.
        bench.command(CmdSn(0xffff_fff0), 0xff, &[0], 0, true);
        bench.sent();
        bench
    }

    impl Bench {
        fn give(&mut self, request: Request, data: &[u8]) {
            let mut bhs = request.encode();
            bhs.set_data_len(data.len());
            let mut wire = Sender::new(Digests::default());
            wire.push(bhs, [Bytes::copy_from_slice(data)]);
            let mut receiver = Receiver::new(bytes_of(&mut wire), Digests::default(), 1 << 20);
            let session = &mut self.session;
            let pdu = receiver.next(|bhs| session.place(bhs)).unwrap().unwrap();
            self.session.receive(self.now, pdu, &mut self.out);
        }

        fn command(&mut self, cmd_sn: CmdSn, itt: u32, cdb: &[u8], expected_len: u32, read: bool) {
            self.command_with(cmd_sn, itt, cdb, expected_len, read, &[], true);
        }

        fn command_with(
            &mut self,
            cmd_sn: CmdSn,
            itt: u32,
            cdb: &[u8],
            expected_len: u32,
            read: bool,
            data: &[u8],
            last: bool,
        ) {
            let mut padded = [0; 16];
            padded[..cdb.len()].copy_from_slice(cdb);
            let command = request::Command {
                immediate: false,
                last,
                read: read && expected_len > 0,
                write: !read,
                attribute: 1,
                lun: 0,
                itt,
                expected_len,
                cmd_sn,
                exp_stat_sn: 0,
                cdb: padded,
            };
            self.give(Request::Command(command), data);
        }

        fn data_out(&mut self, itt: u32, ttt: u32, data_sn: u32, offset: u32, data: &[u8], last: bool) {
            let request = request::DataOut { last, lun: 0, itt, ttt, exp_stat_sn: 0, data_sn, offset };
            self.give(Request::DataOut(request), data);
        }

        /// What was sent since the last call.
        fn sent(&mut self) -> Vec<Response> {
            let mut receiver = Receiver::new(bytes_of(&mut self.out.wire), Digests::default(), 1 << 20);
            let mut sent = Vec::new();
            while let Some(pdu) = receiver.next(|_| Vec::new()).unwrap() {
                sent.push(Response::decode(&pdu.bhs).unwrap());
            }
            self.session.written(&mut self.out);
            sent
        }
    }

    fn bytes_of(wire: &mut Sender) -> bytes::BytesMut {
        let mut all = bytes::BytesMut::new();
        while !wire.is_empty() {
            let mut slices = [IoSlice::new(&[]); 16];
            let n = wire.slices(&mut slices);
            let before = all.len();
            slices[..n].iter().for_each(|slice| all.extend_from_slice(slice));
            wire.advance(all.len() - before);
        }
        all
    }

    fn sn(n: u32) -> CmdSn {
        CmdSn(0xffff_fff1).plus(n)
    }

    const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];

    #[test]
    fn commands_run_in_order_of_cmd_sn_and_outside_the_window_not_at_all() {
        let mut b = bench();
        b.command(sn(1), 2, &READ, 512, true);
        assert!(b.out.requests.is_empty(), "it waits for the one before it");
        b.command(sn(0), 1, &READ, 512, true);
        assert_eq!(b.out.requests.len(), 2);
        b.command(sn(0), 3, &READ, 512, true);
        b.command(sn(WINDOW), 4, &READ, 512, true);
        assert_eq!(b.out.requests.len(), 2, "one is behind the window, one beyond it");
        let (exp, max) = b.session.window();
        assert_eq!((exp, max), (sn(2), sn(WINDOW - 1)));
        let tag = b.out.requests[0].0;
        b.session.complete(tag, BlockOutcome::Done(vec![vec![0; 512].into()]), &mut b.out);
        let sent = b.sent();
        assert_eq!(sent[0].max_cmd_sn, sn(WINDOW), "the answer itself opens the window");
    }

    #[test]
    fn the_window_is_closed_by_commands_that_wait_and_never_goes_back() {
        let mut b = bench();
        let (_, mut max) = b.session.window();
        for n in 0..WINDOW + 5 {
            b.command(sn(n), n, &READ, 512, true);
            let (_, now) = b.session.window();
            assert!(now.ahead_of(max).is_some());
            max = now;
        }
        assert_eq!(b.out.requests.len(), WINDOW as usize);
        let (exp, max) = b.session.window();
        assert_eq!(max, exp.minus(1), "closed");
    }

    #[test]
    fn read_data_is_cut_at_segments_and_bursts_and_the_last_carries_the_status() {
        let mut b = bench();
        let mut cdb = READ;
        cdb[8] = 20; // 10240 bytes
        b.command(sn(0), 1, &cdb, 10240, true);
        let tag = b.out.requests[0].0;
        let pieces = vec![Bytes::from(vec![1; 1000]), Bytes::from(vec![2; 9240])];
        b.session.complete(tag, BlockOutcome::Done(pieces), &mut b.out);
        let shape: Vec<(u32, bool, bool)> = b
            .sent()
            .iter()
            .map(|r| match r.body {
                Body::DataIn(DataIn { offset, last, status, .. }) => (offset, last, status.is_some()),
                body => panic!("{body:?}"),
            })
            .collect();
        assert_eq!(shape, [(0, false, false), (4096, true, false), (8192, true, true)]);
    }

    #[test]
    fn write_data_comes_immediate_unsolicited_and_by_r2t() {
        let mut b = bench();
        let cdb = [0x2a, 0, 0, 0, 0, 0, 0, 0, 48, 0]; // 24576 bytes
        b.command_with(sn(0), 1, &cdb, 24576, false, &[1; 1024], false);
        assert!(b.sent().is_empty(), "unsolicited data is still to come");
        b.data_out(1, NO_TAG, 0, 1024, &[1; 3072], true);
        let r2ts: Vec<(u32, u32, u32)> = b
            .sent()
            .iter()
            .map(|r| match r.body {
                Body::R2t { ttt, offset, len, .. } => (ttt, offset, len),
                body => panic!("{body:?}"),
            })
            .collect();
        assert_eq!(r2ts.iter().map(|r| (r.1, r.2)).collect::<Vec<_>>(), [(4096, 8192), (12288, 8192)]);
        b.data_out(1, r2ts[0].0, 0, 4096, &[2; 4096], false);
        b.data_out(1, r2ts[0].0, 1, 8192, &[3; 4096], true);
        let Body::R2t { ttt, offset: 20480, len: 4096, r2t_sn: 2, .. } = b.sent()[0].body else { panic!("no R2T") };
        b.data_out(1, r2ts[1].0, 0, 12288, &[4; 8192], true);
        b.data_out(1, ttt, 0, 20480, &[5; 4096], true);
        let Some((_, BlockRequest::Write { offset: 0, data, fua: false })) = b.out.requests.pop() else {
            panic!("no write")
        };
        let mut expected = vec![1; 4096];
        for byte in [2, 3, 4, 4, 5] {
            expected.extend(vec![byte; 4096]);
        }
        assert_eq!(data, expected);
    }

    #[test]
    fn write_data_out_of_order_fails_its_command_alone() {
        let mut b = bench();
        let cdb = [0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0];
        b.command_with(sn(0), 1, &cdb, 4096, false, &[], false);
        b.data_out(1, NO_TAG, 5, 0, &[0; 512], false);
        let sent = b.sent();
        assert!(matches!(sent[0].body, Body::Command { status: 2, .. }), "{sent:?}");
        b.data_out(1, NO_TAG, 6, 512, &[0; 512], true);
        assert!(b.sent().is_empty() && b.out.close.is_none() && b.session.is_drained());
    }

    #[test]
    fn an_unknown_opcode_is_rejected_and_ends_the_connection() {
        let mut b = bench();
        let mut bhs = Bhs::new(0x1f);
        bhs.0[16] = 9;
        let pdu = Pdu { bhs, ahs: Bytes::new(), data: Vec::new(), start: 0, digest_ok: true };
        b.session.receive(b.now, pdu, &mut b.out);
        assert!(matches!(b.sent()[0].body, Body::Reject { reason: 5 }));
        assert!(matches!(b.out.close, Some(End::Protocol(_))));
    }

    #[test]
    fn a_data_digest_error_is_told_and_ends_the_connection() {
        let mut b = bench();
        let nop = request::NopOut { immediate: true, lun: 0, itt: 1, ttt: NO_TAG, cmd_sn: sn(0), exp_stat_sn: 0 };
        let bhs = Request::NopOut(nop).encode();
        let pdu = Pdu { bhs, ahs: Bytes::new(), data: b"x".to_vec(), start: 0, digest_ok: false };
        b.session.receive(b.now, pdu, &mut b.out);
        assert!(matches!(b.sent()[..], [Response { body: Body::Reject { reason: 2 }, .. }]));
        assert!(b.out.close.is_some());
    }

    #[test]
    fn a_silent_initiator_is_pinged_and_then_given_up() {
        let mut b = bench();
        assert!(!b.session.tick(b.now + PING_AFTER / 2, &mut b.out));
        assert!(b.sent().is_empty());
        let pinged = b.now + PING_AFTER;
        assert!(!b.session.tick(pinged, &mut b.out));
        let Body::NopIn { itt: NO_TAG, ttt, .. } = b.sent()[0].body else { panic!("no ping") };
        let nop = request::NopOut { immediate: true, lun: 0, itt: NO_TAG, ttt, cmd_sn: sn(0), exp_stat_sn: 0 };
        b.now = pinged;
        b.give(Request::NopOut(nop), &[]);
        assert!(!b.session.tick(pinged + PING_TIMEOUT, &mut b.out), "it answered, so it is pinged anew");
        assert!(b.session.tick(pinged + PING_TIMEOUT + PING_TIMEOUT, &mut b.out));
    }

    #[test]
    fn a_logout_is_answered_after_the_commands_it_ends() {
        let mut b = bench();
        b.command(sn(0), 1, &READ, 512, true);
        let tag = b.out.requests[0].0;
        let logout = request::Logout { immediate: true, reason: 0, itt: 2, cid: 7, cmd_sn: sn(1), exp_stat_sn: 0 };
        b.give(Request::Logout(logout), &[]);
        assert_eq!(b.out.aborts, [tag]);
        assert!(b.sent().is_empty());
        b.session.complete(tag, BlockOutcome::Aborted, &mut b.out);
        assert!(matches!(b.sent()[..], [Response { body: Body::Logout { response: 0, .. }, .. }]));
        assert_eq!(b.out.close, Some(End::Logout));
    }

    proptest! {
        #[test]
        fn arbitrary_pdus_never_panic_and_every_request_is_accounted_for(
            pdus in proptest::collection::vec(
                (0usize..8, proptest::collection::vec(any::<u8>(), BHS_LEN), 0usize..3000, 0u32..4), 1..60)
        ) {
            let mut b = bench();
            let mut submitted = 0usize;
            let mut completed = 0usize;
            for (kind, bytes, len, near) in pdus {
                let mut bhs = Bhs([0; BHS_LEN]);
                bhs.0.copy_from_slice(&bytes);
                bhs.0[0] = [0x00, 0x01, 0x01, 0x01, 0x05, 0x02, 0x42, 0x04][kind];
                bhs.0[4] = 0;
                bhs.put_u32(16, near);
                bhs.put_u32(24, b.session.window().0.0);
                if kind < 4 && kind > 0 {
                    bhs.0[32] = [0x2a, 0x28, 0x2f, 0x93][near as usize];
                    bhs.0[33] = 0;
                    bhs.put(34, &[0, 0, 0, bytes[37], 0, 0, bytes[40] & 15, 0]);
                    bhs.put_u32(20, u32::from(bytes[21]) * 64);
                }
                bhs.set_data_len(len);
                let mut data = b.session.place(&bhs);
                let start = data.len();
                data.extend_from_slice(&vec![0; len]);
                let pdu = Pdu { bhs, ahs: Bytes::new(), data, start, digest_ok: true };
                b.session.receive(b.now, pdu, &mut b.out);
                b.sent();
                submitted += b.out.requests.len();
                for (i, (tag, request)) in std::mem::take(&mut b.out.requests).into_iter().enumerate() {
                    if i % 2 == 0 {
                        completed += 1;
                        let pieces = match request {
                            BlockRequest::Read { len, .. } => vec![Bytes::from(vec![0; len as usize])],
                            _ => vec![],
                        };
                        b.session.complete(tag, BlockOutcome::Done(pieces), &mut b.out);
                    }
                }
                if b.out.close.is_some() {
                    break;
                }
            }
            b.sent();
            prop_assert!(completed <= submitted);
        }
    }
}
