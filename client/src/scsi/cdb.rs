//! Command descriptor blocks: which commands there are, which of their bits may be set, and their fields by name.
//!
//! [`COMMANDS`] is the one list: it refuses what we do not have, refuses reserved bits with a pointer to the byte, and
//! answers REPORT SUPPORTED OPERATION CODES.

use super::sense::Sense;

/// A row of the command table.
#[derive(Debug)]
pub struct Row {
    /// Operation code.
    pub opcode: u8,
    /// Service action, for operation codes that have one in byte 1.
    pub action: Option<u16>,
    /// CDB usage data (SPC-5 §6.34.3): the bits that are looked at; others must be zero. Its length is the CDB's.
    pub usage: &'static [u8],
}

const fn row(opcode: u8, usage: &'static [u8]) -> Row {
    Row { opcode, action: None, usage }
}

const fn action(opcode: u8, action: u16, usage: &'static [u8]) -> Row {
    Row { opcode, action: Some(action), usage }
}

const F: u8 = 0xff;

/// Every command that the unit carries out.
pub const COMMANDS: &[Row] = &[
    row(0x00, &[0x00, 0, 0, 0, 0, 0]),                   // TEST UNIT READY
    row(0x03, &[0x03, 1, 0, 0, F, 0]),                   // REQUEST SENSE
    row(0x08, &[0x08, 0x1f, F, F, F, 0]),                // READ (6)
    row(0x0a, &[0x0a, 0x1f, F, F, F, 0]),                // WRITE (6)
    row(0x12, &[0x12, 0x01, F, F, F, 0]),                // INQUIRY
    row(0x15, &[0x15, 0x11, 0, 0, F, 0]),                // MODE SELECT (6)
    row(0x1a, &[0x1a, 0x08, F, F, F, 0]),                // MODE SENSE (6)
    row(0x1b, &[0x1b, 0x01, 0, 0x0f, 0xf7, 0]),          // START STOP UNIT
    row(0x1e, &[0x1e, 0, 0, 0, 0x03, 0]),                // PREVENT ALLOW MEDIUM REMOVAL
    row(0x25, &[0x25, 0x01, F, F, F, F, 0, 0, 0x01, 0]), // READ CAPACITY (10)
    row(0x28, &[0x28, 0x1a, F, F, F, F, 0x3f, F, F, 0]), // READ (10)
    row(0x2a, &[0x2a, 0x1a, F, F, F, F, 0x3f, F, F, 0]), // WRITE (10)
    row(0x2e, &[0x2e, 0x16, F, F, F, F, 0x3f, F, F, 0]), // WRITE AND VERIFY (10)
    row(0x2f, &[0x2f, 0x16, F, F, F, F, 0x3f, F, F, 0]), // VERIFY (10)
    row(0x35, &[0x35, 0x06, F, F, F, F, 0x3f, F, F, 0]), // SYNCHRONIZE CACHE (10)
    row(0x41, &[0x41, 0x1e, F, F, F, F, 0x3f, F, F, 0]), // WRITE SAME (10)
    row(0x42, &[0x42, 0x01, 0, 0, 0, 0, 0x3f, F, F, 0]), // UNMAP
    row(0x55, &[0x55, 0x11, 0, 0, 0, 0, 0, F, F, 0]),    // MODE SELECT (10)
    row(0x5a, &[0x5a, 0x18, F, F, 0, 0, 0, F, F, 0]),    // MODE SENSE (10)
    row(0x88, &[0x88, 0x1a, F, F, F, F, F, F, F, F, F, F, F, F, 0x3f, 0]), // READ (16)
    row(0x8a, &[0x8a, 0x1a, F, F, F, F, F, F, F, F, F, F, F, F, 0x3f, 0]), // WRITE (16)
    row(0x8e, &[0x8e, 0x16, F, F, F, F, F, F, F, F, F, F, F, F, 0x3f, 0]), // WRITE AND VERIFY (16)
    row(0x8f, &[0x8f, 0x16, F, F, F, F, F, F, F, F, F, F, F, F, 0x3f, 0]), // VERIFY (16)
    row(0x91, &[0x91, 0x06, F, F, F, F, F, F, F, F, F, F, F, F, 0x3f, 0]), // SYNCHRONIZE CACHE (16)
    row(0x93, &[0x93, 0x1f, F, F, F, F, F, F, F, F, F, F, F, F, 0x3f, 0]), // WRITE SAME (16)
    action(0x9e, 0x12, &[0x9e, 0x12, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]), // GET LBA STATUS
    action(0x9e, 0x10, &[0x9e, 0x10, F, F, F, F, F, F, F, F, F, F, F, F, 0x01, 0]), // READ CAPACITY (16)
    row(0xa0, &[0xa0, 0, F, 0, 0, 0, F, F, F, F, 0, 0]), // REPORT LUNS
    action(0xa3, 0x0c, &[0xa3, 0x0c, 0x87, F, F, F, F, F, F, F, 0, 0]), // REPORT SUPPORTED OPERATION CODES
    action(0xa3, 0x0d, &[0xa3, 0x0d, 0x80, 0, 0, 0, F, F, F, F, 0, 0]), // REPORT SUPPORTED TASK MANAGEMENT
    row(0xa8, &[0xa8, 0x1a, F, F, F, F, F, F, F, F, 0x3f, 0]), // READ (12)
    row(0xaa, &[0xaa, 0x1a, F, F, F, F, F, F, F, F, 0x3f, 0]), // WRITE (12)
    row(0xae, &[0xae, 0x16, F, F, F, F, F, F, F, F, 0x3f, 0]), // WRITE AND VERIFY (12)
    row(0xaf, &[0xaf, 0x16, F, F, F, F, F, F, F, F, 0x3f, 0]), // VERIFY (12)
];

/// A run of logical blocks: `count` may be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first.
    pub lba: u64,
    /// How many.
    pub count: u32,
}

/// What VERIFY compares with (SBC-4 §5.36, BYTCHK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// 00b: only that the blocks can be read.
    Medium,
    /// 01b: each byte with the data-out buffer.
    Bytes,
    /// 11b: every block with the one block in the data-out buffer.
    OneBlock,
}

/// A command with its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// TEST UNIT READY.
    TestUnitReady,
    /// REQUEST SENSE.
    RequestSense { descriptor: bool, allocation: u32 },
    /// INQUIRY; `page` if EVPD.
    Inquiry { page: Option<u8>, allocation: u32 },
    /// MODE SENSE; `long` is the 10-byte form.
    ModeSense { long: bool, no_descriptor: bool, long_lba: bool, control: u8, page: u8, subpage: u8, allocation: u32 },
    /// MODE SELECT; `long` is the 10-byte form.
    ModeSelect { long: bool, page_format: bool, save: bool, len: u32 },
    /// START STOP UNIT.
    StartStop { start: bool, load_eject: bool, power_condition: u8 },
    /// PREVENT ALLOW MEDIUM REMOVAL.
    PreventRemoval,
    /// READ CAPACITY (10).
    ReadCapacity10,
    /// READ CAPACITY (16).
    ReadCapacity16 { allocation: u32 },
    /// GET LBA STATUS.
    GetLbaStatus { lba: u64, allocation: u32 },
    /// READ.
    Read { extent: Extent },
    /// WRITE.
    Write { extent: Extent, fua: bool },
    /// WRITE AND VERIFY.
    WriteVerify { extent: Extent, check: Check },
    /// VERIFY.
    Verify { extent: Extent, check: Check },
    /// SYNCHRONIZE CACHE.
    SynchronizeCache { extent: Extent, immediate: bool },
    /// UNMAP.
    Unmap { len: u32 },
    /// WRITE SAME.
    WriteSame { extent: Extent, unmap: bool, no_data: bool },
    /// REPORT LUNS.
    ReportLuns { select: u8, allocation: u32 },
    /// REPORT SUPPORTED OPERATION CODES.
    ReportOpcodes { timeouts: bool, options: u8, opcode: u8, action: u16, allocation: u32 },
    /// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS.
    ReportTaskManagement { long: bool, allocation: u32 },
}

fn be(cdb: &[u8], at: usize, len: usize) -> u64 {
    cdb[at..at + len].iter().fold(0, |n, &b| n << 8 | u64::from(b))
}

/// The row of a CDB's operation code and service action.
pub fn find(opcode: u8, service_action: u16) -> Option<&'static Row> {
    COMMANDS.iter().find(|row| row.opcode == opcode && row.action.is_none_or(|a| a == service_action))
}

impl Command {
    /// Understands a CDB.
    ///
    /// # Errors
    /// The sense that says what is wrong: no such operation code, or a bit or value that is not defined.
    pub fn parse(cdb: &[u8; 16]) -> Result<Command, Sense> {
        let opcode = cdb[0];
        let row = match find(opcode, u16::from(cdb[1] & 0x1f)) {
            Some(row) => row,
            // A known operation code with an unknown service action (SPC-5 §6.34.2).
            None if COMMANDS.iter().any(|row| row.opcode == opcode) => return Err(Sense::in_cdb(1)),
            None => return Err(Sense::INVALID_OPCODE),
        };
        for (at, (&byte, &usage)) in cdb.iter().zip(row.usage).enumerate().skip(1) {
            if byte & !usage != 0 {
                return Err(Sense::in_cdb(at as u16));
            }
        }
        let short = |at: usize| u32::from(cdb[at]);
        let u16_at = |at| be(cdb, at, 2) as u32;
        let u32_at = |at| be(cdb, at, 4) as u32;
        // Where LBA and count are, by the size of the CDB.
        let extent = match row.usage.len() {
            6 => Extent { lba: be(cdb, 1, 3) & 0x1f_ffff, count: if cdb[4] == 0 { 256 } else { short(4) } },
            10 => Extent { lba: be(cdb, 2, 4), count: u16_at(7) },
            12 => Extent { lba: be(cdb, 2, 4), count: u32_at(6) },
            _ => Extent { lba: be(cdb, 2, 8), count: u32_at(10) },
        };
        let check = match cdb[1] >> 1 & 3 {
            0 => Ok(Check::Medium),
            1 => Ok(Check::Bytes),
            3 => Ok(Check::OneBlock),
            _ => Err(Sense::in_cdb(1)),
        };
        Ok(match opcode {
            0x00 => Command::TestUnitReady,
            0x03 => Command::RequestSense { descriptor: cdb[1] & 1 != 0, allocation: short(4) },
            0x08 | 0x28 | 0x88 | 0xa8 => Command::Read { extent },
            0x0a => Command::Write { extent, fua: false },
            0x2a | 0x8a | 0xaa => Command::Write { extent, fua: cdb[1] & 8 != 0 },
            0x2e | 0x8e | 0xae => Command::WriteVerify {
                extent,
                check: check.and_then(|c| if c == Check::OneBlock { Err(Sense::in_cdb(1)) } else { Ok(c) })?,
            },
            0x2f | 0x8f | 0xaf => Command::Verify { extent, check: check? },
            0x12 => {
                let page = (cdb[1] & 1 != 0).then_some(cdb[2]);
                if page.is_none() && cdb[2] != 0 {
                    return Err(Sense::in_cdb(2));
                }
                Command::Inquiry { page, allocation: u16_at(3) }
            }
            0x15 | 0x55 => Command::ModeSelect {
                long: opcode == 0x55,
                page_format: cdb[1] & 0x10 != 0,
                save: cdb[1] & 1 != 0,
                len: if opcode == 0x55 { u16_at(7) } else { short(4) },
            },
            0x1a | 0x5a => Command::ModeSense {
                long: opcode == 0x5a,
                no_descriptor: cdb[1] & 8 != 0,
                long_lba: cdb[1] & 0x10 != 0,
                control: cdb[2] >> 6,
                page: cdb[2] & 0x3f,
                subpage: cdb[3],
                allocation: if opcode == 0x5a { u16_at(7) } else { short(4) },
            },
            0x1b => {
                Command::StartStop { start: cdb[4] & 1 != 0, load_eject: cdb[4] & 2 != 0, power_condition: cdb[4] >> 4 }
            }
            0x1e => Command::PreventRemoval,
            0x25 => {
                // PMI and LBA are obsolete (SBC-4); without PMI the LBA must be zero, as it was.
                if cdb[8] & 1 == 0 && extent.lba != 0 {
                    return Err(Sense::in_cdb(2));
                }
                Command::ReadCapacity10
            }
            0x35 | 0x91 => Command::SynchronizeCache { extent, immediate: cdb[1] & 2 != 0 },
            0x41 | 0x93 => {
                // LBDATA and PBDATA are obsolete and refused; ANCHOR is not supported (VPD B2h).
                if cdb[1] & 0x16 != 0 {
                    return Err(Sense::in_cdb(1));
                }
                let no_data = opcode == 0x93 && cdb[1] & 1 != 0;
                Command::WriteSame { extent, unmap: cdb[1] & 8 != 0, no_data }
            }
            0x42 => {
                if cdb[1] & 1 != 0 {
                    return Err(Sense::in_cdb(1)); // ANCHOR
                }
                Command::Unmap { len: u16_at(7) }
            }
            0x9e if cdb[1] & 0x1f == 0x12 => Command::GetLbaStatus { lba: extent.lba, allocation: extent.count },
            0x9e => Command::ReadCapacity16 { allocation: u32_at(10) },
            0xa0 => Command::ReportLuns { select: cdb[2], allocation: u32_at(6) },
            0xa3 if cdb[1] & 0x1f == 0x0c => Command::ReportOpcodes {
                timeouts: cdb[2] & 0x80 != 0,
                options: cdb[2] & 7,
                opcode: cdb[3],
                action: u16_at(4) as u16,
                allocation: u32_at(6),
            },
            0xa3 => Command::ReportTaskManagement { long: cdb[2] & 0x80 != 0, allocation: u32_at(6) },
            _ => unreachable!("opcode {opcode:#04x} is in the table and not in the match"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cdb(bytes: &[u8]) -> [u8; 16] {
        let mut cdb = [0; 16];
        cdb[..bytes.len()].copy_from_slice(bytes);
        cdb
    }

    #[test]
    fn commands_are_understood_or_refused() {
        let extent = |lba, count| Extent { lba, count };
        for (bytes, expected) in [
            (&[0x08, 0x01, 2, 3, 0, 0][..], Ok(Command::Read { extent: extent(0x10203, 256) })),
            (&[0x28, 0, 0, 0, 1, 0, 0, 0, 8, 0], Ok(Command::Read { extent: extent(256, 8) })),
            (&[0x28, 0x20, 0, 0, 1, 0, 0, 0, 8, 0], Err(Sense::in_cdb(1))),
            (&[0x28, 0, 0, 0, 1, 0, 0, 0, 8, 4], Err(Sense::in_cdb(9))),
            (&[0x2a, 0x08, 0, 0, 0, 9, 0, 1, 0, 0], Ok(Command::Write { extent: extent(9, 256), fua: true })),
            (
                &[0x8a, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0],
                Ok(Command::Write { extent: extent(0x0100_0000_0000_0002, 3), fua: false }),
            ),
            (&[0xa8, 0, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0], Ok(Command::Read { extent: extent(4, 5) })),
            (&[0x2f, 0x04, 0, 0, 0, 0, 0, 0, 1, 0], Err(Sense::in_cdb(1))),
            (&[0x42, 1, 0, 0, 0, 0, 0, 0, 24, 0], Err(Sense::in_cdb(1))),
            (&[0x9e, 0x13], Err(Sense::in_cdb(1))),
            (&[0x37, 0], Err(Sense::INVALID_OPCODE)),
            (&[0x12, 0, 0x80, 0, 96, 0], Err(Sense::in_cdb(2))),
        ] {
            assert_eq!(Command::parse(&cdb(bytes)), expected, "{bytes:02x?}");
        }
    }

    #[test]
    fn the_table_describes_itself() {
        for row in COMMANDS {
            assert_eq!(row.usage[0], row.opcode);
            assert!(matches!(row.usage.len(), 6 | 10 | 12 | 16), "{:#04x}", row.opcode);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_cdbs_never_panic(bytes in proptest::array::uniform16(any::<u8>()), row in 0..COMMANDS.len()) {
            let _ = Command::parse(&bytes);
            let mut known = bytes;
            known[0] = COMMANDS[row].opcode;
            if let Some(action) = COMMANDS[row].action {
                known[1] = action as u8;
            }
            let _ = Command::parse(&known);
            for (byte, usage) in known.iter_mut().zip(COMMANDS[row].usage).skip(1) {
                *byte &= usage;
            }
            let _ = Command::parse(&known);
        }
    }
}
