//! One SCSI command between its arrival and its status.

use std::collections::VecDeque;

use bytes::Bytes;

use super::login::Parameters;
use super::pdu::response::{Body, DataIn, Residual};
use super::pdu::{CmdSn, request};
use crate::scsi::status;
use crate::scsi::unit::{Operation, Reply};

/// A ready-to-transfer that has been sent and not been served.
#[derive(Debug)]
pub struct R2t {
    /// Its target transfer tag.
    pub ttt: u32,
    /// Where the data begins, in bytes.
    pub offset: u32,
    /// How much was asked for.
    pub len: u32,
    /// How much has come.
    pub received: u32,
    /// The next Data-Out's DataSN.
    pub data_sn: u32,
}

/// Where a command stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It waits for memory, or for an ordered command.
    Waiting,
    /// It gathers its write data.
    Collecting,
    /// A request of it is with the device.
    Executing,
    /// As executing, and nothing more is done or answered when the request ends (R4).
    Aborting,
}

/// A command.
#[derive(Debug)]
pub struct Task {
    /// The command as it came.
    pub command: request::Command,
    /// What it does; `None` if it was answered without.
    pub operation: Option<Operation>,
    /// The answer, while unsolicited data is still coming.
    pub reply: Option<Reply>,
    /// Where it stands.
    pub phase: Phase,
    /// Write data so far, without what nobody asked for.
    pub data: Vec<u8>,
    /// Whether `data` is with the receiver, which appends a segment to it.
    pub lent: bool,
    /// Bytes of write data that are used: the lesser of what the command needs and the initiator announced.
    pub wanted: u32,
    /// Bytes of write data that the command needs, whatever the initiator announced.
    pub needed: u32,
    /// Bytes of unsolicited data that have come, immediate data included.
    pub unsolicited: u32,
    /// Whether unsolicited Data-Outs are still to come.
    pub more_unsolicited: bool,
    /// The next unsolicited Data-Out's DataSN.
    pub data_sn: u32,
    /// The first byte that no R2T has asked for.
    pub solicited: u32,
    /// R2Ts in flight, in the order of their data.
    pub r2ts: VecDeque<R2t>,
    /// The next R2T's number.
    pub r2t_sn: u32,
    /// Bytes of memory that it counts for while it is admitted.
    pub memory: u64,
}

impl Task {
    /// A command that has just come.
    pub fn new(command: request::Command, operation: Option<Operation>, reply: Option<Reply>) -> Self {
        let out = operation.as_ref().map_or(0, Operation::data_out);
        let wanted = if command.write { out.min(command.expected_len) } else { 0 };
        let memory = u64::from(wanted).max(operation.as_ref().map_or(0, Operation::data_in).into());
        Task {
            command,
            operation,
            reply,
            phase: Phase::Waiting,
            data: Vec::new(),
            lent: false,
            wanted,
            needed: out,
            unsolicited: 0,
            more_unsolicited: command.write && !command.last,
            data_sn: 0,
            solicited: 0,
            r2ts: VecDeque::new(),
            r2t_sn: 0,
            memory,
        }
    }

    /// The CmdSN, for whoever refers to it.
    pub fn cmd_sn(&self) -> CmdSn {
        self.command.cmd_sn
    }

    /// Takes a segment of write data, checked before; what is more than wanted is dropped.
    pub fn take(&mut self, data: Vec<u8>, start: usize) {
        if self.lent {
            self.lent = false;
            self.data = data;
        } else if self.data.len() < self.wanted as usize {
            self.data.extend_from_slice(&data[start..]);
        }
        self.data.truncate(self.wanted as usize);
    }

    /// Whether all write data is there.
    pub fn is_complete(&self) -> bool {
        !self.more_unsolicited && !self.lent && self.data.len() == self.wanted as usize
    }

    /// The next R2T to send, if one may be.
    pub fn next_r2t(&mut self, parameters: &Parameters, ttt: u32) -> Option<Body> {
        self.solicited = self.solicited.max(self.unsolicited.min(self.wanted));
        let left = self.wanted - self.solicited;
        if self.more_unsolicited || left == 0 || self.r2ts.len() >= parameters.max_outstanding_r2t as usize {
            return None;
        }
        if !self.lent {
            proto::buffer::enlarge(&mut self.data, self.wanted as usize);
        }
        let len = left.min(parameters.max_burst);
        let offset = self.solicited;
        self.r2ts.push_back(R2t { ttt, offset, len, received: 0, data_sn: 0 });
        self.solicited += len;
        let r2t_sn = self.r2t_sn;
        self.r2t_sn += 1;
        let command = &self.command;
        Some(Body::R2t { lun: command.lun, itt: command.itt, ttt, r2t_sn, offset, len })
    }

    /// The bodies and data of the PDUs that answer it: Data-Ins, the last of them with the status if that is GOOD, or
    /// else a SCSI Response (RFC 7143 §11.4, §11.7). `emit` is told which of them carries the status.
    pub fn answer(&self, reply: Reply, parameters: &Parameters, mut emit: impl FnMut(Body, Vec<Bytes>, bool)) {
        let command = &self.command;
        let good = reply.status == status::GOOD;
        // §11.4.5: the residual compares what was expected with what the command had to transfer.
        let real = if good && self.needed > 0 {
            u64::from(self.needed)
        } else if !good && command.write {
            u64::from(self.unsolicited.max(self.solicited).min(command.expected_len))
        } else {
            reply.len()
        };
        let expected = if command.read || command.write { command.expected_len } else { 0 };
        let residual = Residual::of(expected, real);
        let itt = command.itt;
        let mut sn = 0;
        if good && command.read && command.expected_len > 0 && !reply.is_empty() {
            let total = reply.len().min(command.expected_len.into()) as u32;
            let mut pieces = reply.data.into_iter();
            let mut piece = Bytes::new();
            let mut at = 0;
            while at < total {
                let burst_left = parameters.max_burst - at % parameters.max_burst;
                let len = (total - at).min(parameters.max_send_segment).min(burst_left);
                let mut segment = Vec::with_capacity(1);
                let mut missing = len as usize;
                while missing > 0 {
                    if piece.is_empty() {
                        piece = pieces.next().expect("lengths were added up");
                        continue;
                    }
                    let part = piece.split_to(missing.min(piece.len()));
                    missing -= part.len();
                    segment.push(part);
                }
                let last = at + len == total;
                let body = DataIn {
                    last: last || len == burst_left,
                    status: last.then_some((status::GOOD, residual)),
                    lun: 0,
                    itt,
                    data_sn: sn,
                    offset: at,
                };
                emit(Body::DataIn(body), segment, last);
                sn += 1;
                at += len;
            }
            return;
        }
        let sense = reply.sense.map_or(vec![], |sense| {
            let fixed = sense.fixed();
            let mut segment = Vec::with_capacity(2 + fixed.len());
            segment.extend((fixed.len() as u16).to_be_bytes());
            segment.extend(fixed);
            vec![Bytes::from(segment)]
        });
        let body = Body::Command { itt, response: 0, status: reply.status, exp_data_sn: self.r2t_sn, residual };
        emit(body, sense, true);
    }
}
