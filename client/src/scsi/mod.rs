//! The SCSI command set of a direct-access block device (SPC-5, SBC-4), without I/O: [`cdb`] understands commands,
//! [`unit`] decides what they do and turns what the device says into status, [`inquiry`], [`mode`] and [`sense`] make
//! the bytes that initiators read. Nothing here knows iSCSI.

pub mod cdb;
pub mod inquiry;
pub mod mode;
pub mod sense;
pub mod unit;

/// Status codes (SAM-5 §5.3.1).
pub mod status {
    /// Done.
    pub const GOOD: u8 = 0x00;
    /// Sense data says what is wrong.
    pub const CHECK_CONDITION: u8 = 0x02;
    /// The logical unit takes no more commands from this initiator now.
    pub const TASK_SET_FULL: u8 = 0x28;
}
