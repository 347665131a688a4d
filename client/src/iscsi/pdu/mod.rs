//! The PDUs of RFC 7143 §11 as values, and their bytes. No I/O.
//!
//! Every PDU begins with a basic header segment (BHS) of 48 bytes, all numbers big-endian:
//!
//! ```text
//!  0      opcode: bit 7 reserved, bit 6 I (immediate), bits 5..0 opcode
//!  1..4   flags and opcode-specific bytes; byte 1 bit 7 is F (final) nearly everywhere
//!  4      TotalAHSLength, in 4-byte words
//!  5..8   DataSegmentLength, in bytes, padding excluded
//!  8..16  LUN or opcode-specific
//!  16..20 initiator task tag (ITT)
//!  20..48 opcode-specific
//! ```
//!
//! After it come the additional header segments, a header digest if negotiated, the data segment padded to four
//! bytes, and a data digest if negotiated. [`wire`] cuts a byte stream into these; [`request`] and [`response`] give
//! the fields names. Who validates: `wire` the lengths and digests, `request`/`response` the opcode, the session and
//! login cores everything that depends on state.

pub mod request;
pub mod response;
pub mod sn;
pub mod wire;

pub use request::Request;
pub use response::Response;
pub use sn::CmdSn;

/// Bytes in a basic header segment (RFC 7143 §11.2).
pub const BHS_LEN: usize = 48;

/// The tag that means "no task" (RFC 7143 §11.2.1.8, §11.18.1).
pub const NO_TAG: u32 = 0xffff_ffff;

/// A basic header segment as it is on the wire.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Bhs(pub [u8; BHS_LEN]);

impl std::fmt::Debug for Bhs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bhs(opcode {:#04x}, itt {:#x})", self.opcode(), self.itt())
    }
}

impl Bhs {
    /// An all-zero header with this opcode.
    pub fn new(opcode: u8) -> Self {
        let mut bytes = [0; BHS_LEN];
        bytes[0] = opcode;
        Bhs(bytes)
    }

    /// The opcode, without the I bit (RFC 7143 §11.2.1.2).
    pub fn opcode(&self) -> u8 {
        self.0[0] & 0x3f
    }

    /// The I bit: delivered at once, outside CmdSN order (RFC 7143 §11.2.1.1).
    pub fn immediate(&self) -> bool {
        self.0[0] & 0x40 != 0
    }

    /// Bytes of additional header segments; at most 1020 (RFC 7143 §11.2.1.5).
    pub fn ahs_len(&self) -> usize {
        usize::from(self.0[4]) * 4
    }

    /// Bytes in the data segment, padding excluded (RFC 7143 §11.2.1.6).
    pub fn data_len(&self) -> usize {
        usize::from(self.0[5]) << 16 | usize::from(self.0[6]) << 8 | usize::from(self.0[7])
    }

    /// The initiator task tag (RFC 7143 §11.2.1.8).
    pub fn itt(&self) -> u32 {
        self.u32(16)
    }

    /// Sets DataSegmentLength.
    ///
    /// # Panics
    /// If `len` needs more than 24 bits; segments are negotiated to less.
    pub fn set_data_len(&mut self, len: usize) {
        assert!(len < 1 << 24, "data segment of {len} bytes does not fit its field");
        self.0[5..8].copy_from_slice(&(len as u32).to_be_bytes()[1..]);
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    pub(crate) fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    pub(crate) fn put_u16(&mut self, at: usize, value: u16) {
        self.0[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put_u32(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put_u64(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// Why a header is not a PDU that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PduError {
    /// An opcode that this direction does not have.
    #[error("unknown opcode {opcode:#04x}")]
    Opcode {
        /// The opcode.
        opcode: u8,
    },
    /// A field holds a value that RFC 7143 does not define.
    #[error("opcode {opcode:#04x}: byte {at} is invalid")]
    Field {
        /// The opcode.
        opcode: u8,
        /// Offset of the field in the BHS.
        at: usize,
    },
}
