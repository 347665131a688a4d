//! The replica protocol: how gateways speak to replicas, and nodes to each other, on the data plane.
//!
//! A connection carries frames in both directions; requests may be answered in any order, matched by `tag`. The
//! first frame on a connection is [`Request::Hello`]; after it a gateway attaches to replicas, each attach on a
//! channel number of its choice, and every later request names its channel and repeats its [`AttachId`] (R1).
//!
//! ```text
//!  0  magic "md99"                 24  epoch        u64
//!  4  version       u8  (1)        32  attach       u64
//!  5  kind          u8             40  block        u64  first block, or the number a kind says
//!  6  flags         u16            48  count        u32  blocks, or what a kind says
//!  8  channel       u32            52  body_len     u32  bytes of body, its own CRC-32 (4 bytes, last) included
//! 12  code          u32            56  payload_len  u32  bytes of block data
//! 16  tag           u64            60  crc          u32  CRC-32 of bytes 0..60
//! 64  body, then payload
//! ```
//!
//! Everything is little-endian. A reply has the request's kind with the top bit set, its tag, channel and attach.
//! The receiver checks magic, version, header CRC, lengths (before it reserves memory) and body CRC; a breach
//! closes the connection. Block data is covered by one CRC-32 per block, which stands in the body and is
//! verified by whoever stores or uses the block (R10).

mod body;
mod header;
mod reader;
mod reply;
mod request;
#[cfg(test)]
mod tests;

pub use body::{block_sum, block_sums, zero_block_sum};
pub use header::{FLAG_FUA, HEADER_LEN, Header, REPLY_BIT};
pub use reader::FrameReader;
pub use reply::{AttachInfo, BlockHash, Code, RegionWindow, Reply, WhatNext};
pub use request::{CleanEntry, CopyTarget, Kind, PeerRole, Request, SetView};

/// Why bytes are no frame. The connection that brought them is closed (bad input from a peer is never asserted).
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum FrameError {
    #[error("bad magic {0:#010x}")]
    Magic(u32),
    #[error("protocol version {0}, expected 1")]
    Version(u8),
    #[error("header checksum {found:#010x}, computed {computed:#010x}")]
    HeaderCrc { found: u32, computed: u32 },
    #[error("body checksum {found:#010x}, computed {computed:#010x}")]
    BodyCrc { found: u32, computed: u32 },
    #[error("unknown kind {0:#04x}")]
    Kind(u8),
    #[error("unknown code {0}")]
    Code(u32),
    #[error("{what} of {found}, at most {limit}")]
    TooLong { what: &'static str, found: u64, limit: u64 },
    #[error("{what} is {found} bytes, expected {expected}")]
    Length { what: &'static str, found: u64, expected: u64 },
    #[error("malformed {0}")]
    Malformed(&'static str),
}

/// A frame ready to be sent: `head` is header and body, `payload` the block data, uncopied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Header and body.
    pub head: bytes::Bytes,
    /// Block data; empty for most frames.
    pub payload: bytes::Bytes,
}
