//! Sense data (SPC-5 §4.4).

/// Sense keys (SPC-5 table 49).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Key {
    /// Nothing to tell.
    NoSense = 0x0,
    /// The medium has a defect there.
    MediumError = 0x3,
    /// The device failed.
    HardwareError = 0x4,
    /// The command is wrong.
    IllegalRequest = 0x5,
    /// Something happened since the last command.
    UnitAttention = 0x6,
    /// The blocks may not be written.
    DataProtect = 0x7,
    /// The command was given up.
    AbortedCommand = 0xb,
    /// Data compared unequal.
    Miscompare = 0xe,
}

/// Which field of a command or parameter list is wrong (SPC-5 §4.4.2.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// In the CDB, or else in the data-out buffer.
    pub in_cdb: bool,
    /// Offset in bytes.
    pub byte: u16,
}

/// What a command that ended with CHECK CONDITION tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// Sense key.
    pub key: Key,
    /// Additional sense code and its qualifier, as one number.
    pub code: u16,
    /// The INFORMATION field: usually the first bad LBA.
    pub information: Option<u64>,
    /// The wrong field.
    pub field: Option<Field>,
}

impl Sense {
    /// Sense of a key and an additional sense code with qualifier.
    pub const fn new(key: Key, code: u16) -> Self {
        Sense { key, code, information: None, field: None }
    }

    /// NO ADDITIONAL SENSE INFORMATION.
    pub const NONE: Sense = Sense::new(Key::NoSense, 0);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Sense = Sense::new(Key::IllegalRequest, 0x2000);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const LBA_OUT_OF_RANGE: Sense = Sense::new(Key::IllegalRequest, 0x2100);
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const NO_SUCH_LUN: Sense = Sense::new(Key::IllegalRequest, 0x2500);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LENGTH: Sense = Sense::new(Key::IllegalRequest, 0x1a00);
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const NO_SAVING: Sense = Sense::new(Key::IllegalRequest, 0x3900);
    /// MISCOMPARE DURING VERIFY OPERATION.
    pub const MISCOMPARE: Sense = Sense::new(Key::Miscompare, 0x1d00);
    /// UNEXPECTED UNSOLICITED DATA, as RFC 7143 §11.4.7.2 has it.
    pub const UNSOLICITED_DATA: Sense = Sense::new(Key::AbortedCommand, 0x0c0c);
    /// INCORRECT AMOUNT OF DATA, as RFC 7143 §11.4.7.2 has it.
    pub const DATA_AMOUNT: Sense = Sense::new(Key::AbortedCommand, 0x0c0d);
    /// PROTOCOL SERVICE CRC ERROR: data that did not come (RFC 7143 §11.4.7.2).
    pub const DATA_LOST: Sense = Sense::new(Key::AbortedCommand, 0x4705);
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED: what a new nexus begins with.
    pub const NEW_NEXUS: Sense = Sense::new(Key::UnitAttention, 0x2900);
    /// POWER ON OCCURRED.
    pub const POWER_ON: Sense = Sense::new(Key::UnitAttention, 0x2901);
    /// BUS DEVICE RESET FUNCTION OCCURRED.
    pub const RESET: Sense = Sense::new(Key::UnitAttention, 0x2903);
    /// CAPACITY DATA HAS CHANGED.
    pub const CAPACITY_CHANGED: Sense = Sense::new(Key::UnitAttention, 0x2a09);
    /// COMMANDS CLEARED BY ANOTHER INITIATOR.
    pub const CLEARED: Sense = Sense::new(Key::UnitAttention, 0x2f00);
    /// WRITE ERROR of the hardware.
    pub const WRITE_FAILED: Sense = Sense::new(Key::HardwareError, 0x4400);
    /// SPACE ALLOCATION FAILED WRITE PROTECT.
    pub const NO_SPACE: Sense = Sense::new(Key::DataProtect, 0x2707);

    /// INVALID FIELD IN CDB at this byte.
    pub const fn in_cdb(byte: u16) -> Self {
        Sense { field: Some(Field { in_cdb: true, byte }), ..Sense::new(Key::IllegalRequest, 0x2400) }
    }

    /// INVALID FIELD IN PARAMETER LIST at this byte.
    pub const fn in_list(byte: u16) -> Self {
        Sense { field: Some(Field { in_cdb: false, byte }), ..Sense::new(Key::IllegalRequest, 0x2600) }
    }

    /// UNRECOVERED READ ERROR at this LBA.
    pub const fn medium(lba: u64) -> Self {
        Sense { information: Some(lba), ..Sense::new(Key::MediumError, 0x1100) }
    }

    fn key_specific(&self) -> [u8; 3] {
        let Some(field) = self.field else { return [0; 3] };
        let [high, low] = field.byte.to_be_bytes();
        [0x80 | u8::from(field.in_cdb) << 6, high, low]
    }

    /// Fixed format, 18 bytes (SPC-5 §4.4.3). An INFORMATION that needs more than 32 bits is left out, as told there.
    pub fn fixed(&self) -> [u8; 18] {
        let mut bytes = [0; 18];
        bytes[0] = 0x70;
        bytes[2] = self.key as u8;
        if let Some(information) = self.information.and_then(|i| u32::try_from(i).ok()) {
            bytes[0] |= 0x80;
            bytes[3..7].copy_from_slice(&information.to_be_bytes());
        }
        bytes[7] = 10;
        bytes[12..14].copy_from_slice(&self.code.to_be_bytes());
        bytes[15..18].copy_from_slice(&self.key_specific());
        bytes
    }

    /// Descriptor format (SPC-5 §4.4.2).
    pub fn descriptor(&self) -> Vec<u8> {
        let [asc, ascq] = self.code.to_be_bytes();
        let mut bytes = vec![0x72, self.key as u8, asc, ascq, 0, 0, 0, 0];
        if let Some(information) = self.information {
            bytes.extend([0x00, 0x0a, 0x80, 0]);
            bytes.extend(information.to_be_bytes());
        }
        if self.field.is_some() {
            let [a, b, c] = self.key_specific();
            bytes.extend([0x02, 0x06, 0, 0, a, b, c, 0]);
        }
        bytes[7] = (bytes.len() - 8) as u8;
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sense_has_its_golden_bytes() {
        let sense = Sense::medium(0x1234);
        assert_eq!(sense.fixed(), [0xf0, 0, 3, 0, 0, 0x12, 0x34, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0]);
        assert_eq!(sense.descriptor(), [0x72, 3, 0x11, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34]);
        assert_eq!(Sense::in_cdb(2).fixed(), [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xc0, 0, 2]);
        assert_eq!(Sense::medium(1 << 32).fixed()[0], 0x70);
    }
}
