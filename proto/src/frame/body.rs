//! Bodies: little-endian fields with a CRC-32 after them, and the block sums.

use std::sync::LazyLock;

use bytes::{BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::{Encoded, FrameError, HEADER_LEN, Header};
use crate::limits::BLOCK_SIZE;

/// The CRC-32 of one block (R10).
pub fn block_sum(block: &[u8]) -> u32 {
    crc32fast::hash(block)
}

/// The CRC-32 of each block of `data`, whose length is a multiple of the block size.
pub fn block_sums(data: &[u8]) -> Vec<u32> {
    data.chunks_exact(BLOCK_SIZE as usize).map(block_sum).collect()
}

/// The CRC-32 of a block of zeroes: what an unallocated block reads as.
pub fn zero_block_sum() -> u32 {
    static SUM: LazyLock<u32> = LazyLock::new(|| block_sum(&[0; BLOCK_SIZE as usize]));
    *SUM
}

/// Puts header, body and payload together; fills in the header's lengths and the body's checksum.
pub(super) fn assemble(
    mut header: Header,
    payload: Bytes,
    body_hint: usize,
    fill: impl FnOnce(&mut BytesMut),
) -> Encoded {
    let mut head = BytesMut::with_capacity(HEADER_LEN + body_hint + 4);
    head.put_bytes(0, HEADER_LEN);
    fill(&mut head);
    let body = head.len() - HEADER_LEN;
    if body > 0 {
        let crc = crc32fast::hash(&head[HEADER_LEN..]);
        head.put_u32_le(crc);
        header.body_len = body as u32 + 4;
    }
    header.payload_len = payload.len() as u32;
    head[..HEADER_LEN].copy_from_slice(&header.encode());
    Encoded { head: head.freeze(), payload }
}

/// Reads a body whose checksum has been verified.
pub(super) struct BodyReader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> BodyReader<'a> {
    /// Verifies the checksum and strips it. An absent body is an empty one.
    pub(super) fn new(body: &'a [u8], what: &'static str) -> Result<Self, FrameError> {
        if body.is_empty() {
            return Ok(Self { rest: body, what });
        }
        let (rest, crc) = body.split_last_chunk::<4>().ok_or(FrameError::Malformed(what))?;
        let (found, computed) = (u32::from_le_bytes(*crc), crc32fast::hash(rest));
        if found != computed {
            return Err(FrameError::BodyCrc { found, computed });
        }
        Ok(Self { rest, what })
    }

    pub(super) fn bytes(&mut self, n: usize) -> Result<&'a [u8], FrameError> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(FrameError::Malformed(self.what))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        Ok(self.bytes(N)?.try_into().expect("split at N"))
    }
    pub(super) fn u8(&mut self) -> Result<u8, FrameError> {
        Ok(self.array::<1>()?[0])
    }
    pub(super) fn bool(&mut self) -> Result<bool, FrameError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(FrameError::Malformed(self.what)),
        }
    }
    pub(super) fn u16(&mut self) -> Result<u16, FrameError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub(super) fn u32(&mut self) -> Result<u32, FrameError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub(super) fn u64(&mut self) -> Result<u64, FrameError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub(super) fn uuid(&mut self) -> Result<Uuid, FrameError> {
        Ok(Uuid::from_bytes(self.array()?))
    }
    /// A string of at most `limit` bytes behind a 16-bit length.
    pub(super) fn text(&mut self, limit: usize) -> Result<String, FrameError> {
        let n = usize::from(self.u16()?);
        if n > limit {
            return Err(FrameError::TooLong { what: self.what, found: n as u64, limit: limit as u64 });
        }
        let bytes = self.bytes(n)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| FrameError::Malformed(self.what))
    }
    /// What is left must be `n` numbers of 32 bits.
    pub(super) fn sums(&mut self, n: u32) -> Result<Vec<u32>, FrameError> {
        let bytes = self.bytes(n as usize * 4)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }
    /// Everything must have been read.
    pub(super) fn end(self) -> Result<(), FrameError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FrameError::Malformed(self.what)) }
    }
    pub(super) fn remaining(&self) -> usize {
        self.rest.len()
    }
}

pub(super) fn put_text(out: &mut BytesMut, text: &str) {
    out.put_u16_le(u16::try_from(text.len()).expect("names are short"));
    out.put_slice(text.as_bytes());
}
