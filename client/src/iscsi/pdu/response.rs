//! PDUs from target to initiator (RFC 7143 §11.4, §11.6, §11.7, §11.8, §11.9, §11.11, §11.13, §11.15, §11.17, §11.19).

use super::{Bhs, CmdSn, PduError};

/// Opcode of NOP-In.
pub const NOP_IN: u8 = 0x20;
/// Opcode of SCSI Response.
pub const SCSI_RESPONSE: u8 = 0x21;
/// Opcode of Task Management Function Response.
pub const TASK_MANAGEMENT: u8 = 0x22;
/// Opcode of Login Response.
pub const LOGIN: u8 = 0x23;
/// Opcode of Text Response.
pub const TEXT: u8 = 0x24;
/// Opcode of SCSI Data-In.
pub const DATA_IN: u8 = 0x25;
/// Opcode of Logout Response.
pub const LOGOUT: u8 = 0x26;
/// Opcode of Ready To Transfer.
pub const R2T: u8 = 0x31;
/// Opcode of Asynchronous Message.
pub const ASYNC: u8 = 0x32;
/// Opcode of Reject.
pub const REJECT: u8 = 0x3f;

/// Any PDU that a target sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// StatSN: of this status, or the next one where the PDU carries none.
    pub stat_sn: u32,
    /// Next command number that the target expects.
    pub exp_cmd_sn: CmdSn,
    /// Last command number that the target takes now.
    pub max_cmd_sn: CmdSn,
    /// What it says.
    pub body: Body,
}

/// What a target's PDU says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// A ping, or the answer to one (§11.19).
    NopIn {
        /// LUN, echoed with the tag.
        lun: u64,
        /// The initiator's tag if this answers its ping, else [`super::NO_TAG`].
        itt: u32,
        /// The target's tag if an answer is wanted, else [`super::NO_TAG`].
        ttt: u32,
    },
    /// Status of a command (§11.4); sense is in the data segment.
    Command {
        /// Initiator task tag.
        itt: u32,
        /// iSCSI response: 0 completed, 1 target failure.
        response: u8,
        /// SCSI status.
        status: u8,
        /// Data-In and R2T PDUs that were sent for the command.
        exp_data_sn: u32,
        /// Difference between expected and real length.
        residual: Residual,
    },
    /// Outcome of a task management function (§11.6).
    TaskManagement {
        /// Initiator task tag.
        itt: u32,
        /// Response code (§11.6.1).
        response: u8,
    },
    /// One step of the login (§11.13).
    Login(Login),
    /// Answer to a Text Request (§11.11).
    Text {
        /// F: nothing more will come.
        last: bool,
        /// C: the text goes on in the next response.
        more: bool,
        /// LUN, echoed with the tag.
        lun: u64,
        /// Initiator task tag.
        itt: u32,
        /// Tag to go on with, or [`super::NO_TAG`].
        ttt: u32,
    },
    /// Read data (§11.7).
    DataIn(DataIn),
    /// Answer to a logout (§11.15).
    Logout {
        /// Initiator task tag.
        itt: u32,
        /// 0 closed, 1 no such connection, 2 recovery not supported, 3 clean-up failed.
        response: u8,
        /// Seconds to wait before reconnecting.
        time2wait: u16,
        /// Seconds after which tasks are gone.
        time2retain: u16,
    },
    /// The target is ready for write data (§11.8).
    R2t {
        /// LUN of the command.
        lun: u64,
        /// Initiator task tag of the command.
        itt: u32,
        /// Tag that the data must carry.
        ttt: u32,
        /// Number within the command, from 0.
        r2t_sn: u32,
        /// Offset in bytes.
        offset: u32,
        /// Bytes wanted.
        len: u32,
    },
    /// News that nobody asked for (§11.9).
    Async {
        /// AsyncEvent: 1 logout requested, 2 connection will be dropped, 3 all connections will be dropped.
        event: u8,
        /// Parameter1..3.
        parameters: [u16; 3],
    },
    /// A PDU that is not accepted (§11.17); its header is in the data segment.
    Reject {
        /// Reason (§11.17.1).
        reason: u8,
    },
}

/// Login Response (RFC 7143 §11.13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Login {
    /// T: the target goes to the next stage.
    pub transit: bool,
    /// C: the text goes on in the next response.
    pub more: bool,
    /// CSG.
    pub stage: u8,
    /// NSG, if `transit`.
    pub next_stage: u8,
    /// ISID as the initiator gave it.
    pub isid: [u8; 6],
    /// TSIH: zero until the last response.
    pub tsih: u16,
    /// Initiator task tag.
    pub itt: u32,
    /// Status-Class and Status-Detail as one number, for example 0x0203 "not found".
    pub status: u16,
}

/// SCSI Data-In (RFC 7143 §11.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataIn {
    /// F: the last of its sequence.
    pub last: bool,
    /// S: the status, if this PDU carries it, with the residual.
    pub status: Option<(u8, Residual)>,
    /// LUN of the command, with a valid tag only.
    pub lun: u64,
    /// Initiator task tag.
    pub itt: u32,
    /// Number within the command, from 0.
    pub data_sn: u32,
    /// Offset in bytes.
    pub offset: u32,
}

/// How the expected data transfer length and the real one differ (RFC 7143 §11.4.1, §11.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residual {
    /// They do not.
    #[default]
    None,
    /// So many bytes expected were not transferred.
    Underflow(u32),
    /// So many bytes were not transferred because they were not expected.
    Overflow(u32),
}

impl Residual {
    /// The residual of a command that had `real` bytes to transfer where the initiator expected `expected`.
    pub fn of(expected: u32, real: u64) -> Self {
        match real.cmp(&u64::from(expected)) {
            std::cmp::Ordering::Equal => Residual::None,
            std::cmp::Ordering::Less => Residual::Underflow((u64::from(expected) - real) as u32),
            std::cmp::Ordering::Greater => {
                Residual::Overflow(u32::try_from(real - u64::from(expected)).unwrap_or(u32::MAX))
            }
        }
    }

    fn flags(self) -> u8 {
        match self {
            Residual::None => 0,
            Residual::Underflow(_) => 2,
            Residual::Overflow(_) => 4,
        }
    }

    fn count(self) -> u32 {
        match self {
            Residual::None => 0,
            Residual::Underflow(n) | Residual::Overflow(n) => n,
        }
    }

    fn from_wire(flags: u8, count: u32) -> Self {
        match flags & 6 {
            2 => Residual::Underflow(count),
            4 => Residual::Overflow(count),
            _ => Residual::None,
        }
    }
}

impl Response {
    /// Gives a header's fields their names.
    ///
    /// # Errors
    /// The opcode is not a target's.
    pub fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        let flags = bhs.0[1];
        let last = flags & 0x80 != 0;
        let (lun, itt, ttt) = (bhs.u64(8), bhs.itt(), bhs.u32(20));
        let body = match bhs.opcode() {
            NOP_IN => Body::NopIn { lun, itt, ttt },
            SCSI_RESPONSE => Body::Command {
                itt,
                response: bhs.0[2],
                status: bhs.0[3],
                exp_data_sn: bhs.u32(36),
                residual: Residual::from_wire(flags, bhs.u32(44)),
            },
            TASK_MANAGEMENT => Body::TaskManagement { itt, response: bhs.0[2] },
            LOGIN => {
                let mut isid = [0; 6];
                isid.copy_from_slice(&bhs.0[8..14]);
                Body::Login(Login {
                    transit: last,
                    more: flags & 0x40 != 0,
                    stage: flags >> 2 & 3,
                    next_stage: flags & 3,
                    isid,
                    tsih: bhs.u16(14),
                    itt,
                    status: bhs.u16(36),
                })
            }
            TEXT => Body::Text { last, more: flags & 0x40 != 0, lun, itt, ttt },
            DATA_IN => Body::DataIn(DataIn {
                last,
                status: (flags & 1 != 0).then(|| (bhs.0[3], Residual::from_wire(flags, bhs.u32(44)))),
                lun,
                itt,
                data_sn: bhs.u32(36),
                offset: bhs.u32(40),
            }),
            LOGOUT => Body::Logout { itt, response: bhs.0[2], time2wait: bhs.u16(40), time2retain: bhs.u16(42) },
            R2T => Body::R2t { lun, itt, ttt, r2t_sn: bhs.u32(36), offset: bhs.u32(40), len: bhs.u32(44) },
            ASYNC => Body::Async { event: bhs.0[36], parameters: [bhs.u16(38), bhs.u16(40), bhs.u16(42)] },
            REJECT => Body::Reject { reason: bhs.0[2] },
            opcode => return Err(PduError::Opcode { opcode }),
        };
        Ok(Response { stat_sn: bhs.u32(24), exp_cmd_sn: CmdSn(bhs.u32(28)), max_cmd_sn: CmdSn(bhs.u32(32)), body })
    }

    /// The header for these fields; lengths are still zero (the wire layer knows them).
    pub fn encode(&self) -> Bhs {
        fn begin(opcode: u8, flags: u8, itt: u32) -> Bhs {
            let mut bhs = Bhs::new(opcode);
            bhs.0[1] = flags;
            bhs.put_u32(16, itt);
            bhs
        }
        let mut bhs = match self.body {
            Body::NopIn { lun, itt, ttt } => {
                let mut bhs = begin(NOP_IN, 0x80, itt);
                bhs.put_u64(8, lun);
                bhs.put_u32(20, ttt);
                bhs
            }
            Body::Command { itt, response, status, exp_data_sn, residual } => {
                let mut bhs = begin(SCSI_RESPONSE, 0x80 | residual.flags(), itt);
                bhs.0[2] = response;
                bhs.0[3] = status;
                bhs.put_u32(36, exp_data_sn);
                bhs.put_u32(44, residual.count());
                bhs
            }
            Body::TaskManagement { itt, response } => {
                let mut bhs = begin(TASK_MANAGEMENT, 0x80, itt);
                bhs.0[2] = response;
                bhs
            }
            Body::Login(p) => {
                let next = if p.transit { p.next_stage & 3 } else { 0 };
                let flags = u8::from(p.transit) << 7 | u8::from(p.more) << 6 | (p.stage & 3) << 2 | next;
                let mut bhs = begin(LOGIN, flags, p.itt);
                bhs.put(8, &p.isid);
                bhs.put_u16(14, p.tsih);
                bhs.put_u16(36, p.status);
                bhs
            }
            Body::Text { last, more, lun, itt, ttt } => {
                let mut bhs = begin(TEXT, u8::from(last) << 7 | u8::from(more) << 6, itt);
                bhs.put_u64(8, lun);
                bhs.put_u32(20, ttt);
                bhs
            }
            Body::DataIn(p) => {
                let mut bhs = begin(DATA_IN, u8::from(p.last) << 7, p.itt);
                if let Some((status, residual)) = p.status {
                    bhs.0[1] |= 1 | residual.flags();
                    bhs.0[3] = status;
                    bhs.put_u32(44, residual.count());
                }
                bhs.put_u64(8, p.lun);
                bhs.put_u32(20, super::NO_TAG);
                bhs.put_u32(36, p.data_sn);
                bhs.put_u32(40, p.offset);
                bhs
            }
            Body::Logout { itt, response, time2wait, time2retain } => {
                let mut bhs = begin(LOGOUT, 0x80, itt);
                bhs.0[2] = response;
                bhs.put_u16(40, time2wait);
                bhs.put_u16(42, time2retain);
                bhs
            }
            Body::R2t { lun, itt, ttt, r2t_sn, offset, len } => {
                let mut bhs = begin(R2T, 0x80, itt);
                bhs.put_u64(8, lun);
                bhs.put_u32(20, ttt);
                bhs.put_u32(36, r2t_sn);
                bhs.put_u32(40, offset);
                bhs.put_u32(44, len);
                bhs
            }
            Body::Async { event, parameters } => {
                let mut bhs = begin(ASYNC, 0x80, super::NO_TAG);
                bhs.0[36] = event;
                for (i, parameter) in parameters.into_iter().enumerate() {
                    bhs.put_u16(38 + 2 * i, parameter);
                }
                bhs
            }
            Body::Reject { reason } => {
                let mut bhs = begin(REJECT, 0x80, super::NO_TAG);
                bhs.0[2] = reason;
                bhs
            }
        };
        bhs.put_u32(24, self.stat_sn);
        bhs.put_u32(28, self.exp_cmd_sn.0);
        bhs.put_u32(32, self.max_cmd_sn.0);
        bhs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_response_has_its_golden_header_and_comes_back() {
        let table = [
            (
                Body::NopIn { lun: 0, itt: 1, ttt: 0xffffffff },
                "20800000000000000000000000000000\
                 00000001ffffffff0000000a0000000b\
                 0000000c000000000000000000000000",
            ),
            (
                Body::Command { itt: 1, response: 0, status: 2, exp_data_sn: 3, residual: Residual::Underflow(0x200) },
                "21820002000000000000000000000000\
                 00000001000000000000000a0000000b\
                 0000000c000000030000000000000200",
            ),
            (
                Body::TaskManagement { itt: 1, response: 5 },
                "22800500000000000000000000000000\
                 00000001000000000000000a0000000b\
                 0000000c000000000000000000000000",
            ),
            (
                Body::Login(Login {
                    transit: true,
                    more: false,
                    stage: 1,
                    next_stage: 3,
                    isid: [1, 2, 3, 4, 5, 6],
                    tsih: 7,
                    itt: 8,
                    status: 0x0203,
                }),
                "23870000000000000102030405060007\
                 00000008000000000000000a0000000b\
                 0000000c020300000000000000000000",
            ),
            (
                Body::Text { last: true, more: false, lun: 0, itt: 1, ttt: 0xffffffff },
                "24800000000000000000000000000000\
                 00000001ffffffff0000000a0000000b\
                 0000000c000000000000000000000000",
            ),
            (
                Body::DataIn(DataIn {
                    last: true,
                    status: Some((0, Residual::Overflow(16))),
                    lun: 0,
                    itt: 1,
                    data_sn: 2,
                    offset: 0x1000,
                }),
                "25850000000000000000000000000000\
                 00000001ffffffff0000000a0000000b\
                 0000000c000000020000100000000010",
            ),
            (
                Body::Logout { itt: 1, response: 0, time2wait: 2, time2retain: 3 },
                "26800000000000000000000000000000\
                 00000001000000000000000a0000000b\
                 0000000c000000000002000300000000",
            ),
            (
                Body::R2t { lun: 0, itt: 1, ttt: 2, r2t_sn: 3, offset: 4, len: 5 },
                "31800000000000000000000000000000\
                 00000001000000020000000a0000000b\
                 0000000c000000030000000400000005",
            ),
            (
                Body::Async { event: 1, parameters: [0, 0, 5] },
                "32800000000000000000000000000000\
                 ffffffff000000000000000a0000000b\
                 0000000c010000000000000500000000",
            ),
            (
                Body::Reject { reason: 4 },
                "3f800400000000000000000000000000\
                 ffffffff000000000000000a0000000b\
                 0000000c000000000000000000000000",
            ),
        ];
        for (body, golden) in table {
            let response = Response { stat_sn: 10, exp_cmd_sn: CmdSn(11), max_cmd_sn: CmdSn(12), body };
            let bhs = response.encode();
            let hex: String = bhs.0.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, golden, "{body:?}");
            assert_eq!(Response::decode(&bhs), Ok(response));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic(bytes in proptest::collection::vec(any::<u8>(), 48)) {
            let mut all = [0; 48];
            all.copy_from_slice(&bytes);
            if let Ok(response) = Response::decode(&Bhs(all)) {
                prop_assert_eq!(Response::decode(&response.encode()).unwrap().encode(), response.encode());
            }
        }
    }
}
