//! PDUs from initiator to target (RFC 7143 §11.3, §11.5, §11.7, §11.10, §11.12, §11.14, §11.16, §11.18).

use super::{Bhs, CmdSn, PduError};

/// Opcode of NOP-Out.
pub const NOP_OUT: u8 = 0x00;
/// Opcode of SCSI Command.
pub const SCSI_COMMAND: u8 = 0x01;
/// Opcode of Task Management Function Request.
pub const TASK_MANAGEMENT: u8 = 0x02;
/// Opcode of Login Request.
pub const LOGIN: u8 = 0x03;
/// Opcode of Text Request.
pub const TEXT: u8 = 0x04;
/// Opcode of SCSI Data-Out.
pub const DATA_OUT: u8 = 0x05;
/// Opcode of Logout Request.
pub const LOGOUT: u8 = 0x06;
/// Opcode of SNACK Request.
pub const SNACK: u8 = 0x10;

/// Any PDU that an initiator sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A ping, or the answer to one.
    NopOut(NopOut),
    /// A SCSI command.
    Command(Command),
    /// A task management function.
    TaskManagement(TaskManagement),
    /// One step of the login.
    Login(Login),
    /// Text negotiation in full-feature phase, which is SendTargets.
    Text(Text),
    /// Write data.
    DataOut(DataOut),
    /// The end of a connection or session.
    Logout(Logout),
    /// A request for retransmission, which exists above ErrorRecoveryLevel 0 only.
    Snack {
        /// Initiator task tag.
        itt: u32,
    },
}

/// NOP-Out (RFC 7143 §11.18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NopOut {
    /// Delivered outside CmdSN order.
    pub immediate: bool,
    /// The LUN, raw, echoed with a target's tag.
    pub lun: u64,
    /// [`super::NO_TAG`] if no answer is wanted.
    pub itt: u32,
    /// The target's tag if this answers its ping, else [`super::NO_TAG`].
    pub ttt: u32,
    /// Command sequence number.
    pub cmd_sn: CmdSn,
    /// Next status number that the initiator expects.
    pub exp_stat_sn: u32,
}

/// SCSI Command (RFC 7143 §11.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Delivered outside CmdSN order.
    pub immediate: bool,
    /// F: no unsolicited Data-Out follows.
    pub last: bool,
    /// R: data is expected in.
    pub read: bool,
    /// W: data goes out.
    pub write: bool,
    /// Task attribute: 0 untagged, 1 simple, 2 ordered, 3 head of queue, 4 ACA (§11.3.1).
    pub attribute: u8,
    /// The LUN in SAM's 8-byte form.
    pub lun: u64,
    /// Initiator task tag.
    pub itt: u32,
    /// Expected data transfer length in bytes.
    pub expected_len: u32,
    /// Command sequence number.
    pub cmd_sn: CmdSn,
    /// Next status number that the initiator expects.
    pub exp_stat_sn: u32,
    /// The command descriptor block, padded with zeroes.
    pub cdb: [u8; 16],
}

/// Functions of task management (RFC 7143 §11.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    /// One task of this session.
    AbortTask,
    /// All tasks of this session on the logical unit.
    AbortTaskSet,
    /// Clears an auto contingent allegiance, which we never have.
    ClearAca,
    /// All tasks of all sessions on the logical unit.
    ClearTaskSet,
    /// Resets the logical unit.
    LunReset,
    /// Resets all logical units.
    TargetWarmReset,
    /// As the warm reset, and ends all sessions.
    TargetColdReset,
    /// Moves a task to another connection: above ErrorRecoveryLevel 1 only.
    TaskReassign,
    /// One that RFC 7143 does not define.
    Other(u8),
}

impl Function {
    /// The code on the wire.
    pub fn code(self) -> u8 {
        match self {
            Function::AbortTask => 1,
            Function::AbortTaskSet => 2,
            Function::ClearAca => 3,
            Function::ClearTaskSet => 4,
            Function::LunReset => 5,
            Function::TargetWarmReset => 6,
            Function::TargetColdReset => 7,
            Function::TaskReassign => 8,
            Function::Other(code) => code & 0x7f,
        }
    }

    fn from_code(code: u8) -> Self {
        match code {
            1 => Function::AbortTask,
            2 => Function::AbortTaskSet,
            3 => Function::ClearAca,
            4 => Function::ClearTaskSet,
            5 => Function::LunReset,
            6 => Function::TargetWarmReset,
            7 => Function::TargetColdReset,
            8 => Function::TaskReassign,
            code => Function::Other(code),
        }
    }
}

/// Task Management Function Request (RFC 7143 §11.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskManagement {
    /// Delivered outside CmdSN order.
    pub immediate: bool,
    /// What to do.
    pub function: Function,
    /// The LUN in SAM's 8-byte form.
    pub lun: u64,
    /// Initiator task tag of this request.
    pub itt: u32,
    /// Initiator task tag of the task to abort.
    pub referenced: u32,
    /// Command sequence number.
    pub cmd_sn: CmdSn,
    /// Next status number that the initiator expects.
    pub exp_stat_sn: u32,
    /// CmdSN of the task to abort.
    pub ref_cmd_sn: CmdSn,
}

/// Login Request (RFC 7143 §11.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Login {
    /// T: the initiator is ready to go to the next stage.
    pub transit: bool,
    /// C: the text goes on in the next request.
    pub more: bool,
    /// CSG: the stage that this belongs to (0 security, 1 operational).
    pub stage: u8,
    /// NSG: the stage to go to (1 operational, 3 full feature), if `transit`.
    pub next_stage: u8,
    /// The highest version supported.
    pub version_max: u8,
    /// The lowest version supported.
    pub version_min: u8,
    /// Initiator part of the session id.
    pub isid: [u8; 6],
    /// Target part of the session id; 0 for a new session.
    pub tsih: u16,
    /// Initiator task tag.
    pub itt: u32,
    /// Connection id.
    pub cid: u16,
    /// Command sequence number that the session begins with.
    pub cmd_sn: CmdSn,
    /// Next status number that the initiator expects.
    pub exp_stat_sn: u32,
}

/// Text Request (RFC 7143 §11.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Delivered outside CmdSN order.
    pub immediate: bool,
    /// F: the initiator has said all it had to say.
    pub last: bool,
    /// C: the text goes on in the next request.
    pub more: bool,
    /// LUN, echoed with the tag.
    pub lun: u64,
    /// Initiator task tag.
    pub itt: u32,
    /// The target's tag if this goes on with a negotiation, else [`super::NO_TAG`].
    pub ttt: u32,
    /// Command sequence number.
    pub cmd_sn: CmdSn,
    /// Next status number that the initiator expects.
    pub exp_stat_sn: u32,
}

/// SCSI Data-Out (RFC 7143 §11.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataOut {
    /// F: the last of its sequence.
    pub last: bool,
    /// LUN, echoed with the tag.
    pub lun: u64,
    /// Initiator task tag of the command.
    pub itt: u32,
    /// The R2T's tag, or [`super::NO_TAG`] for unsolicited data.
    pub ttt: u32,
    /// Next status number that the initiator expects.
    pub exp_stat_sn: u32,
    /// Number within its sequence, from 0.
    pub data_sn: u32,
    /// Offset in bytes from the start of the command's data.
    pub offset: u32,
}

/// Logout Request (RFC 7143 §11.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logout {
    /// Delivered outside CmdSN order.
    pub immediate: bool,
    /// 0 close the session, 1 close the connection, 2 remove the connection for recovery.
    pub reason: u8,
    /// Initiator task tag.
    pub itt: u32,
    /// The connection meant.
    pub cid: u16,
    /// Command sequence number.
    pub cmd_sn: CmdSn,
    /// Next status number that the initiator expects.
    pub exp_stat_sn: u32,
}

impl Request {
    /// Gives a header's fields their names.
    ///
    /// # Errors
    /// The opcode is not an initiator's.
    pub fn decode(bhs: &Bhs) -> Result<Self, PduError> {
        let flags = bhs.0[1];
        let last = flags & 0x80 != 0;
        let (lun, itt) = (bhs.u64(8), bhs.itt());
        let (cmd_sn, exp_stat_sn) = (CmdSn(bhs.u32(24)), bhs.u32(28));
        let immediate = bhs.immediate();
        Ok(match bhs.opcode() {
            NOP_OUT => Request::NopOut(NopOut { immediate, lun, itt, ttt: bhs.u32(20), cmd_sn, exp_stat_sn }),
            SCSI_COMMAND => {
                let mut cdb = [0; 16];
                cdb.copy_from_slice(&bhs.0[32..48]);
                Request::Command(Command {
                    immediate,
                    last,
                    read: flags & 0x40 != 0,
                    write: flags & 0x20 != 0,
                    attribute: flags & 7,
                    lun,
                    itt,
                    expected_len: bhs.u32(20),
                    cmd_sn,
                    exp_stat_sn,
                    cdb,
                })
            }
            TASK_MANAGEMENT => Request::TaskManagement(TaskManagement {
                immediate,
                function: Function::from_code(flags & 0x7f),
                lun,
                itt,
                referenced: bhs.u32(20),
                cmd_sn,
                exp_stat_sn,
                ref_cmd_sn: CmdSn(bhs.u32(32)),
            }),
            LOGIN => {
                let mut isid = [0; 6];
                isid.copy_from_slice(&bhs.0[8..14]);
                Request::Login(Login {
                    transit: last,
                    more: flags & 0x40 != 0,
                    stage: flags >> 2 & 3,
                    next_stage: flags & 3,
                    version_max: bhs.0[2],
                    version_min: bhs.0[3],
                    isid,
                    tsih: bhs.u16(14),
                    itt,
                    cid: bhs.u16(20),
                    cmd_sn,
                    exp_stat_sn,
                })
            }
            TEXT => Request::Text(Text {
                immediate,
                last,
                more: flags & 0x40 != 0,
                lun,
                itt,
                ttt: bhs.u32(20),
                cmd_sn,
                exp_stat_sn,
            }),
            DATA_OUT => Request::DataOut(DataOut {
                last,
                lun,
                itt,
                ttt: bhs.u32(20),
                exp_stat_sn,
                data_sn: bhs.u32(36),
                offset: bhs.u32(40),
            }),
            LOGOUT => {
                Request::Logout(Logout { immediate, reason: flags & 0x7f, itt, cid: bhs.u16(20), cmd_sn, exp_stat_sn })
            }
            SNACK => Request::Snack { itt },
            opcode => return Err(PduError::Opcode { opcode }),
        })
    }

    /// The header for these fields; lengths are still zero (the wire layer knows them).
    pub fn encode(&self) -> Bhs {
        fn begin(opcode: u8, immediate: bool, flags: u8, itt: u32) -> Bhs {
            let mut bhs = Bhs::new(opcode | u8::from(immediate) << 6);
            bhs.0[1] = flags;
            bhs.put_u32(16, itt);
            bhs
        }
        fn sns(mut bhs: Bhs, cmd_sn: CmdSn, exp_stat_sn: u32) -> Bhs {
            bhs.put_u32(24, cmd_sn.0);
            bhs.put_u32(28, exp_stat_sn);
            bhs
        }
        match *self {
            Request::NopOut(p) => {
                let mut bhs = begin(NOP_OUT, p.immediate, 0x80, p.itt);
                bhs.put_u64(8, p.lun);
                bhs.put_u32(20, p.ttt);
                sns(bhs, p.cmd_sn, p.exp_stat_sn)
            }
            Request::Command(p) => {
                let flags = u8::from(p.last) << 7 | u8::from(p.read) << 6 | u8::from(p.write) << 5 | p.attribute & 7;
                let mut bhs = begin(SCSI_COMMAND, p.immediate, flags, p.itt);
                bhs.put_u64(8, p.lun);
                bhs.put_u32(20, p.expected_len);
                bhs.put(32, &p.cdb);
                sns(bhs, p.cmd_sn, p.exp_stat_sn)
            }
            Request::TaskManagement(p) => {
                let mut bhs = begin(TASK_MANAGEMENT, p.immediate, 0x80 | p.function.code(), p.itt);
                bhs.put_u64(8, p.lun);
                bhs.put_u32(20, p.referenced);
                bhs.put_u32(32, p.ref_cmd_sn.0);
                sns(bhs, p.cmd_sn, p.exp_stat_sn)
            }
            Request::Login(p) => {
                let flags = u8::from(p.transit) << 7 | u8::from(p.more) << 6 | (p.stage & 3) << 2 | p.next_stage & 3;
                let mut bhs = begin(LOGIN, true, flags, p.itt);
                bhs.0[2] = p.version_max;
                bhs.0[3] = p.version_min;
                bhs.put(8, &p.isid);
                bhs.put_u16(14, p.tsih);
                bhs.put_u16(20, p.cid);
                sns(bhs, p.cmd_sn, p.exp_stat_sn)
            }
            Request::Text(p) => {
                let mut bhs = begin(TEXT, p.immediate, u8::from(p.last) << 7 | u8::from(p.more) << 6, p.itt);
                bhs.put_u64(8, p.lun);
                bhs.put_u32(20, p.ttt);
                sns(bhs, p.cmd_sn, p.exp_stat_sn)
            }
            Request::DataOut(p) => {
                let mut bhs = begin(DATA_OUT, false, u8::from(p.last) << 7, p.itt);
                bhs.put_u64(8, p.lun);
                bhs.put_u32(20, p.ttt);
                bhs.put_u32(28, p.exp_stat_sn);
                bhs.put_u32(36, p.data_sn);
                bhs.put_u32(40, p.offset);
                bhs
            }
            Request::Logout(p) => {
                let mut bhs = begin(LOGOUT, p.immediate, 0x80 | p.reason & 0x7f, p.itt);
                bhs.put_u16(20, p.cid);
                sns(bhs, p.cmd_sn, p.exp_stat_sn)
            }
            Request::Snack { itt } => begin(SNACK, false, 0x80, itt),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn every_request_has_its_golden_header_and_comes_back() {
        let table = [
            (
                Request::NopOut(NopOut {
                    immediate: true,
                    lun: 0x0001_0000_0000_0000,
                    itt: 0x01020304,
                    ttt: 0xffffffff,
                    cmd_sn: CmdSn(0x11121314),
                    exp_stat_sn: 0x21222324,
                }),
                "40800000000000000001000000000000\
                 01020304ffffffff1112131421222324\
                 00000000000000000000000000000000",
            ),
            (
                Request::Command(Command {
                    immediate: false,
                    last: true,
                    read: true,
                    write: false,
                    attribute: 1,
                    lun: 0,
                    itt: 0x01020304,
                    expected_len: 4096,
                    cmd_sn: CmdSn(5),
                    exp_stat_sn: 6,
                    cdb: [0x28, 0, 0, 0, 0, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0],
                }),
                "01c10000000000000000000000000000\
                 01020304000010000000000500000006\
                 28000000000100000800000000000000",
            ),
            (
                Request::TaskManagement(TaskManagement {
                    immediate: true,
                    function: Function::AbortTask,
                    lun: 0,
                    itt: 1,
                    referenced: 2,
                    cmd_sn: CmdSn(3),
                    exp_stat_sn: 4,
                    ref_cmd_sn: CmdSn(5),
                }),
                "42810000000000000000000000000000\
                 00000001000000020000000300000004\
                 00000005000000000000000000000000",
            ),
            (
                Request::Login(Login {
                    transit: true,
                    more: false,
                    stage: 1,
                    next_stage: 3,
                    version_max: 0,
                    version_min: 0,
                    isid: [0x80, 1, 2, 3, 4, 5],
                    tsih: 0x0607,
                    itt: 8,
                    cid: 9,
                    cmd_sn: CmdSn(10),
                    exp_stat_sn: 11,
                }),
                "43870000000000008001020304050607\
                 00000008000900000000000a0000000b\
                 00000000000000000000000000000000",
            ),
            (
                Request::Text(Text {
                    immediate: false,
                    last: true,
                    more: false,
                    lun: 0,
                    itt: 1,
                    ttt: 0xffffffff,
                    cmd_sn: CmdSn(2),
                    exp_stat_sn: 3,
                }),
                "04800000000000000000000000000000\
                 00000001ffffffff0000000200000003\
                 00000000000000000000000000000000",
            ),
            (
                Request::DataOut(DataOut {
                    last: true,
                    lun: 0,
                    itt: 1,
                    ttt: 2,
                    exp_stat_sn: 3,
                    data_sn: 4,
                    offset: 0x10000,
                }),
                "05800000000000000000000000000000\
                 00000001000000020000000000000003\
                 00000000000000040001000000000000",
            ),
            (
                Request::Logout(Logout {
                    immediate: true,
                    reason: 1,
                    itt: 1,
                    cid: 2,
                    cmd_sn: CmdSn(3),
                    exp_stat_sn: 4,
                }),
                "46810000000000000000000000000000\
                 00000001000200000000000300000004\
                 00000000000000000000000000000000",
            ),
        ];
        for (request, golden) in table {
            let bhs = request.encode();
            assert_eq!(hex(&bhs.0), golden, "{request:?}");
            assert_eq!(Request::decode(&bhs), Ok(request));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic(bytes in proptest::array::uniform32(any::<u8>()), tail in proptest::array::uniform16(any::<u8>())) {
            let mut all = [0; 48];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            let bhs = Bhs(all);
            if let Ok(request) = Request::decode(&bhs) {
                let again = Request::decode(&request.encode()).unwrap();
                prop_assert_eq!(again.encode(), request.encode());
            }
        }
    }
}
