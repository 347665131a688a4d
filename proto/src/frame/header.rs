//! The fixed header.

use super::{FrameError, Kind};
use crate::id::{AttachId, AttachNo, Epoch};
use crate::limits::{BLOCK_SIZE, MAX_BODY, MAX_REQUEST_BLOCKS};

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 64;
/// Set in a reply's kind.
pub const REPLY_BIT: u8 = 0x80;
/// Flag: the write, or zeroes, are durable before they are answered.
pub const FLAG_FUA: u16 = 1;

const MAGIC: u32 = u32::from_le_bytes(*b"md99");
const VERSION: u8 = 1;

/// A decoded header, lengths already checked against the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked, or answered.
    pub kind: Kind,
    /// Whether this is an answer.
    pub is_reply: bool,
    /// `FLAG_*`.
    pub flags: u16,
    /// The attach's channel on this connection.
    pub channel: u32,
    /// A reply's [`super::Code`] as a number; 0 in requests.
    pub code: u32,
    /// Matches a reply to its request; chosen by the requester.
    pub tag: u64,
    /// The attach under which this is sent.
    pub attach: AttachId,
    /// First block, or a number that the kind defines.
    pub block: u64,
    /// Blocks, or what the kind defines.
    pub count: u32,
    /// Bytes of body that follow, 4 bytes of CRC included; 0: no body.
    pub body_len: u32,
    /// Bytes of block data that follow the body.
    pub payload_len: u32,
}

impl Header {
    /// Writes the header with its checksum.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut b = [0u8; HEADER_LEN];
        b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        b[4] = VERSION;
        b[5] = self.kind as u8 | if self.is_reply { REPLY_BIT } else { 0 };
        b[6..8].copy_from_slice(&self.flags.to_le_bytes());
        b[8..12].copy_from_slice(&self.channel.to_le_bytes());
        b[12..16].copy_from_slice(&self.code.to_le_bytes());
        b[16..24].copy_from_slice(&self.tag.to_le_bytes());
        b[24..32].copy_from_slice(&self.attach.epoch.0.to_le_bytes());
        b[32..40].copy_from_slice(&self.attach.attach.0.to_le_bytes());
        b[40..48].copy_from_slice(&self.block.to_le_bytes());
        b[48..52].copy_from_slice(&self.count.to_le_bytes());
        b[52..56].copy_from_slice(&self.body_len.to_le_bytes());
        b[56..60].copy_from_slice(&self.payload_len.to_le_bytes());
        let crc = crc32fast::hash(&b[..60]);
        b[60..64].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Reads and checks a header; after this `body_len + payload_len` bytes may safely be awaited.
    ///
    /// # Errors
    /// Names the first thing that is wrong.
    pub fn decode(b: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(0) != MAGIC {
            return Err(FrameError::Magic(u32_at(0)));
        }
        let (found, computed) = (u32_at(60), crc32fast::hash(&b[..60]));
        if found != computed {
            return Err(FrameError::HeaderCrc { found, computed });
        }
        if b[4] != VERSION {
            return Err(FrameError::Version(b[4]));
        }
        let header = Self {
            kind: Kind::try_from(b[5] & !REPLY_BIT)?,
            is_reply: b[5] & REPLY_BIT != 0,
            flags: u16_at(6),
            channel: u32_at(8),
            code: u32_at(12),
            tag: u64_at(16),
            attach: AttachId { epoch: Epoch(u64_at(24)), attach: AttachNo(u64_at(32)) },
            block: u64_at(40),
            count: u32_at(48),
            body_len: u32_at(52),
            payload_len: u32_at(56),
        };
        let too_long =
            |what, found: u32, limit: u32| FrameError::TooLong { what, found: found.into(), limit: limit.into() };
        if header.body_len > MAX_BODY {
            return Err(too_long("body", header.body_len, MAX_BODY));
        }
        let payload_limit = MAX_REQUEST_BLOCKS * BLOCK_SIZE as u32;
        if header.payload_len > payload_limit {
            return Err(too_long("payload", header.payload_len, payload_limit));
        }
        if (1..4).contains(&header.body_len) {
            return Err(FrameError::Malformed("body shorter than its checksum"));
        }
        Ok(header)
    }
}
