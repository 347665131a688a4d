//! The task that owns a session's connection: many commands in flight, one read and one write per wake-up.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::Bytes;
use proto::buffer;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::{Call, Command, Error, Response};
use crate::iscsi::pdu::request::{self, Function};
use crate::iscsi::pdu::response::{Body, Residual};
use crate::iscsi::pdu::wire::{Digests, Pdu, Receiver, Sender};
use crate::iscsi::pdu::{Bhs, CmdSn, NO_TAG, Request, response};

/// Reads per wake-up.
const READS_PER_TURN: usize = 16;
/// Bytes that wait to be written at which no further command is begun.
const MAX_UNWRITTEN: u64 = 8 << 20;
/// Tags of our own requests that are no commands have this bit.
const OWN_TAG: u32 = 1 << 31;

/// What the login agreed on.
pub(super) struct Terms {
    pub(super) digests: Digests,
    pub(super) max_send_segment: usize,
    pub(super) first_burst: u32,
    pub(super) initial_r2t: bool,
    pub(super) immediate_data: bool,
    pub(super) cmd_sn: CmdSn,
    pub(super) max_cmd_sn: CmdSn,
    pub(super) exp_stat_sn: u32,
}

struct Task {
    command: Command,
    cmd_sn: CmdSn,
    data: Vec<u8>,
    lent: bool,
    done: oneshot::Sender<Result<Response, Error>>,
}

enum Other {
    Manage { function: Function, referenced: u32, done: oneshot::Sender<Result<u8, Error>> },
    Nop { done: oneshot::Sender<Result<Bytes, Error>> },
    Logout { done: oneshot::Sender<Result<(), Error>> },
}

/// A logged-in connection.
pub(super) struct Driver {
    stream: TcpStream,
    receiver: Receiver,
    wire: Sender,
    terms: Terms,
    tasks: BTreeMap<u32, Task>,
    others: BTreeMap<u32, Other>,
    next_own: u32,
    finished: bool,
}

impl Driver {
    pub(super) fn new(stream: TcpStream, receiver: Receiver, wire: Sender, terms: Terms) -> Self {
        Driver {
            stream,
            receiver,
            wire,
            terms,
            tasks: BTreeMap::new(),
            others: BTreeMap::new(),
            next_own: OWN_TAG,
            finished: false,
        }
    }

    /// Serves calls until the connection or the last handle is gone. What is outstanding then fails as its sender is
    /// dropped.
    pub(super) async fn run(mut self, mut calls: mpsc::Receiver<Call>) {
        std::future::poll_fn(|cx| self.poll(cx, &mut calls)).await;
    }

    fn poll(&mut self, cx: &mut Context<'_>, calls: &mut mpsc::Receiver<Call>) -> Poll<()> {
        let mut readable = true;
        let mut callable = true;
        let mut reads = READS_PER_TURN;
        loop {
            let mut progress = false;
            while readable && reads > 0 {
                match self.read(cx) {
                    Poll::Ready(Ok(())) => progress = true,
                    Poll::Ready(Err(())) => return Poll::Ready(()),
                    Poll::Pending => readable = false,
                }
                reads -= 1;
            }
            while callable
                && self.wire.pending() < MAX_UNWRITTEN
                && self.terms.max_cmd_sn.ahead_of(self.terms.cmd_sn).is_some()
            {
                match calls.poll_recv(cx) {
                    Poll::Ready(Some(call)) => {
                        progress = true;
                        self.begin(call);
                    }
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => callable = false,
                }
            }
            while !self.wire.is_empty() {
                let mut slices = [IoSlice::new(&[]); 128];
                let n = self.wire.slices(&mut slices);
                match Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..n]) {
                    Poll::Ready(Ok(n)) if n > 0 => {
                        self.wire.advance(n);
                        progress = true;
                    }
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            if self.finished && self.wire.is_empty() {
                return Poll::Ready(());
            }
            if !progress {
                return Poll::Pending;
            }
            if readable && reads == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        let mut space = self.receiver.space();
        match pin!(self.stream.read_buf(&mut space)).poll(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Ok(n)) if n > 0 => {}
            Poll::Ready(_) => return Poll::Ready(Err(())),
        }
        loop {
            let tasks = &mut self.tasks;
            match self.receiver.next(|bhs| place(tasks, bhs)) {
                Ok(Some(pdu)) => {
                    if let Err(reason) = self.receive(pdu) {
                        tracing::warn!(reason, "the target broke the protocol");
                        return Poll::Ready(Err(()));
                    }
                }
                Ok(None) => return Poll::Ready(Ok(())),
                Err(error) => {
                    tracing::warn!(%error, "the target broke the protocol");
                    return Poll::Ready(Err(()));
                }
            }
        }
    }

    fn own_tag(&mut self) -> u32 {
        let tag = self.next_own;
        self.next_own = OWN_TAG | (tag.wrapping_add(1) & 0xffff);
        tag
    }

    fn begin(&mut self, call: Call) {
        let (cmd_sn, exp_stat_sn) = (self.terms.cmd_sn, self.terms.exp_stat_sn);
        match call {
            Call::Command { itt, command, done } => self.command(itt, command, done),
            Call::Manage { function, referenced, done } => {
                let itt = self.own_tag();
                let ref_cmd_sn = self.tasks.get(&referenced).map_or(CmdSn(0), |task| task.cmd_sn);
                let request = request::TaskManagement {
                    immediate: true,
                    function,
                    lun: 0,
                    itt,
                    referenced: if function == Function::AbortTask { referenced } else { NO_TAG },
                    cmd_sn,
                    exp_stat_sn,
                    ref_cmd_sn,
                };
                self.wire.push(Request::TaskManagement(request).encode(), []);
                self.others.insert(itt, Other::Manage { function, referenced, done });
            }
            Call::Nop { data, done } => {
                let itt = self.own_tag();
                let nop = request::NopOut { immediate: true, lun: 0, itt, ttt: NO_TAG, cmd_sn, exp_stat_sn };
                self.wire.push(Request::NopOut(nop).encode(), [data]);
                self.others.insert(itt, Other::Nop { done });
            }
            Call::Logout { done } => {
                let itt = self.own_tag();
                let logout = request::Logout { immediate: true, reason: 0, itt, cid: 0, cmd_sn, exp_stat_sn };
                self.wire.push(Request::Logout(logout).encode(), []);
                self.others.insert(itt, Other::Logout { done });
            }
        }
    }

    fn command(&mut self, itt: u32, command: Command, done: oneshot::Sender<Result<Response, Error>>) {
        let cmd_sn = self.terms.cmd_sn;
        self.terms.cmd_sn = cmd_sn.plus(1);
        let out = command.data_out.clone();
        let write = !out.is_empty();
        let first = (out.len() as u32).min(self.terms.first_burst) as usize;
        let immediate = if self.terms.immediate_data { first.min(self.terms.max_send_segment) } else { 0 };
        let unsolicited = if self.terms.initial_r2t { immediate } else { first };
        let request = request::Command {
            immediate: false,
            last: unsolicited == immediate,
            read: command.data_in > 0,
            write,
            attribute: if command.attribute == 0 { 1 } else { command.attribute },
            lun: command.lun,
            itt,
            expected_len: if write { out.len() as u32 } else { command.data_in },
            cmd_sn,
            exp_stat_sn: self.terms.exp_stat_sn,
            cdb: command.cdb,
        };
        self.wire.push(Request::Command(request).encode(), [out.slice(..immediate)]);
        self.data_out(itt, command.lun, NO_TAG, &out, immediate, unsolicited);
        self.tasks.insert(itt, Task { command, cmd_sn, data: Vec::new(), lent: false, done });
    }

    /// Sends `data[from..to]` as one sequence.
    fn data_out(&mut self, itt: u32, lun: u64, ttt: u32, data: &Bytes, mut from: usize, to: usize) {
        let mut data_sn = 0;
        while from < to {
            let len = (to - from).min(self.terms.max_send_segment);
            let request = request::DataOut {
                last: from + len == to,
                lun,
                itt,
                ttt,
                exp_stat_sn: self.terms.exp_stat_sn,
                data_sn,
                offset: from as u32,
            };
            self.wire.push(Request::DataOut(request).encode(), [data.slice(from..from + len)]);
            data_sn += 1;
            from += len;
        }
    }

    fn receive(&mut self, pdu: Pdu) -> Result<(), &'static str> {
        if !pdu.digest_ok {
            return Err("data digest error");
        }
        let response = response::Response::decode(&pdu.bhs).map_err(|_| "unknown opcode")?;
        if response.max_cmd_sn.ahead_of(self.terms.max_cmd_sn).is_some() {
            self.terms.max_cmd_sn = response.max_cmd_sn;
        }
        let carries_status = match &response.body {
            Body::R2t { .. } => false,
            Body::DataIn(data) => data.status.is_some(),
            Body::NopIn { itt, .. } => *itt != NO_TAG,
            _ => true,
        };
        if carries_status {
            if response.stat_sn != self.terms.exp_stat_sn {
                return Err("a status number is missing");
            }
            self.terms.exp_stat_sn = self.terms.exp_stat_sn.wrapping_add(1);
        }
        match response.body {
            Body::DataIn(data) => {
                let Some(task) = self.tasks.get_mut(&data.itt) else { return Ok(()) };
                let at = if task.lent { pdu.start } else { task.data.len() };
                if data.offset as usize != at {
                    return Err("read data out of order");
                }
                if at + pdu.bhs.data_len() > task.command.data_in as usize {
                    return Err("more read data than expected");
                }
                if task.lent {
                    task.lent = false;
                    task.data = pdu.data;
                } else {
                    task.data.extend_from_slice(pdu.segment());
                }
                if let Some((status, residual)) = data.status {
                    self.finish(data.itt, status, residual, Bytes::new());
                }
                Ok(())
            }
            Body::Command { itt, response, status, residual, .. } => {
                if response != 0 {
                    return Err("target failure");
                }
                let mut sense = buffer::freeze(pdu.data);
                if sense.len() >= 2 {
                    let len = usize::from(u16::from_be_bytes([sense[0], sense[1]]));
                    sense = sense.slice(2..(2 + len).min(sense.len()));
                }
                self.finish(itt, status, residual, sense);
                Ok(())
            }
            Body::R2t { itt, ttt, offset, len, lun, .. } => {
                let Some(task) = self.tasks.get(&itt) else { return Ok(()) };
                let data = task.command.data_out.clone();
                let (from, to) = (offset as usize, offset as usize + len as usize);
                if len == 0 || to > data.len() {
                    return Err("an R2T for data that there is not");
                }
                self.data_out(itt, lun, ttt, &data, from, to);
                Ok(())
            }
            Body::NopIn { itt: NO_TAG, ttt, lun } => {
                if ttt != NO_TAG {
                    let (cmd_sn, exp_stat_sn) = (self.terms.cmd_sn, self.terms.exp_stat_sn);
                    let nop = request::NopOut { immediate: true, lun, itt: NO_TAG, ttt, cmd_sn, exp_stat_sn };
                    self.wire.push(Request::NopOut(nop).encode(), []);
                }
                Ok(())
            }
            Body::NopIn { itt, .. } => {
                if let Some(Other::Nop { done }) = self.others.remove(&itt) {
                    let _ = done.send(Ok(buffer::freeze(pdu.data)));
                }
                Ok(())
            }
            Body::TaskManagement { itt, response } => {
                if let Some(Other::Manage { function, referenced, done }) = self.others.remove(&itt) {
                    if response == 0 {
                        self.forget(function, referenced);
                    }
                    let _ = done.send(Ok(response));
                }
                Ok(())
            }
            Body::Logout { itt, response, .. } => {
                if let Some(Other::Logout { done }) = self.others.remove(&itt) {
                    let result = if response == 0 { Ok(()) } else { Err(Error::Protocol("logout refused")) };
                    let _ = done.send(result);
                    self.finished = true;
                }
                Ok(())
            }
            // The target says that it will drop the connection, or asks for a logout: either way it is about to end,
            // and what is outstanding is still answered.
            Body::Async { .. } => Ok(()),
            Body::Reject { .. } => Err("the target rejected a PDU"),
            Body::Login(_) | Body::Text { .. } => Err("an answer that nobody asked for"),
        }
    }

    /// The tasks that a function has aborted are never answered.
    fn forget(&mut self, function: Function, referenced: u32) {
        let aborted: Vec<u32> = match function {
            Function::AbortTask => vec![referenced],
            _ => self.tasks.keys().copied().collect(),
        };
        for itt in aborted {
            if let Some(task) = self.tasks.remove(&itt) {
                let _ = task.done.send(Err(Error::Aborted));
            }
        }
    }

    fn finish(&mut self, itt: u32, status: u8, residual: Residual, sense: Bytes) {
        if let Some(task) = self.tasks.remove(&itt) {
            let _ = task.done.send(Ok(Response { status, sense, data: buffer::freeze(task.data), residual }));
        }
    }
}

/// Read data goes straight into its command's buffer.
fn place(tasks: &mut BTreeMap<u32, Task>, bhs: &Bhs) -> Vec<u8> {
    if bhs.opcode() != response::DATA_IN {
        return Vec::new();
    }
    let Some(task) = tasks.get_mut(&bhs.itt()) else { return Vec::new() };
    let missing = (task.command.data_in as usize).saturating_sub(task.data.len());
    if task.lent || bhs.data_len() > missing {
        return Vec::new();
    }
    task.lent = true;
    let mut data = std::mem::take(&mut task.data);
    let wanted = data.len() + missing;
    buffer::enlarge(&mut data, wanted);
    data
}
