//! Replies.

use bytes::{BufMut, Bytes};

use super::body::{BodyReader, assemble};
use super::request::{put_set, put_sums, read_set};
use super::{Encoded, FrameError, Header, Kind, SetView};
use crate::id::{AttachId, AttachNo, BlockIndex, Epoch, Incarnation, RegionIndex};
use crate::limits::{BLOCK_SIZE, REGION_BLOCKS};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Code {
    Ok = 0,
    /// A newer attach is known; `block` of the header carries its epoch.
    Superseded = 1,
    /// The attach has ended here, or this process never had it.
    NotAttached = 2,
    /// No such replica on this node, or not of this mirror, volume or cluster.
    UnknownReplica = 3,
    /// The bytes that came with the request do not match their sums.
    BadData = 4,
    /// The block numbered in `block` fails its stored sum (R10).
    Checksum = 5,
    /// The disk could not read the block numbered in `block`.
    ReadFailed = 6,
    /// The disk refused a write; the replica's copy of that range is undefined.
    WriteFailed = 7,
    /// The pool is full.
    NoSpace = 8,
    /// A flush failed: this replica no longer knows what it holds and refuses everything until it restarts.
    FlushFailed = 9,
    /// The replica was closed by an earlier failure, named in the node's log.
    Faulted = 10,
    /// A limit was met; the same request may be sent again later.
    Busy = 11,
    /// The request makes no sense here (range past the end, wrong state).
    Invalid = 12,
    /// The destination of a copy could not be reached.
    PeerUnreachable = 13,
    /// The destination of a copy refused it.
    PeerRefused = 14,
}

/// What a requester does about a [`Code`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhatNext {
    /// Nothing: done.
    Done,
    /// The same request may be sent again.
    Retry,
    /// Read another replica.
    TryAnother,
    /// Give the replica's attach up.
    FaultReplica,
    /// Give the session up: somebody newer owns the volume.
    Stop,
}

impl Code {
    /// What the requester does next.
    pub fn what_next(self) -> WhatNext {
        match self {
            Self::Ok => WhatNext::Done,
            Self::Superseded => WhatNext::Stop,
            Self::Busy | Self::BadData => WhatNext::Retry,
            Self::Checksum | Self::ReadFailed | Self::PeerUnreachable | Self::PeerRefused => WhatNext::TryAnother,
            Self::NotAttached
            | Self::UnknownReplica
            | Self::WriteFailed
            | Self::NoSpace
            | Self::FlushFailed
            | Self::Faulted
            | Self::Invalid => WhatNext::FaultReplica,
        }
    }
}

impl TryFrom<u32> for Code {
    type Error = FrameError;
    fn try_from(n: u32) -> Result<Self, FrameError> {
        const ALL: [Code; 15] = [
            Code::Ok,
            Code::Superseded,
            Code::NotAttached,
            Code::UnknownReplica,
            Code::BadData,
            Code::Checksum,
            Code::ReadFailed,
            Code::WriteFailed,
            Code::NoSpace,
            Code::FlushFailed,
            Code::Faulted,
            Code::Busy,
            Code::Invalid,
            Code::PeerUnreachable,
            Code::PeerRefused,
        ];
        ALL.get(n as usize).copied().ok_or(FrameError::Code(n))
    }
}

/// What a replica says of itself when it is attached (R1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachInfo {
    /// The node process that answers.
    pub incarnation: Incarnation,
    /// The newest attach that this *process* held before this one; zero: none since it started.
    pub held: AttachId,
    /// The epoch that was in the superblock before this attach.
    pub stored_epoch: Epoch,
    /// The epoch in which it was last told the in-sync set: it was kept, or added, by that session. Unlike
    /// [`Self::stored_epoch`] it does not rise with a session that attached and then decided nothing.
    pub kept_epoch: Epoch,
    /// This process has been told the in-sync set: it has not restarted since it was last counted on (R6, R8).
    pub told: bool,
    /// And by a session that knew what this process found dirty when it began: replicas that are awaited have missed no
    /// write to a region that is suspect here (R8).
    pub accounted: bool,
    /// What it last stored of the in-sync set.
    pub set: SetView,
    /// Its size in blocks.
    pub blocks: u64,
    /// Dirty regions.
    pub dirty: u32,
    /// Regions dirty when the process started (or damaged), not yet settled.
    pub suspect: u32,
    /// Everything that it ever answered is still there, so that a restart has lost nothing (R9): its processes were
    /// killed at most, and the page cache outlived them.
    pub kept: bool,
    /// Its metadata could not be read and was made anew: treat it as new (every region is dirty).
    pub rebuilt: bool,
}

/// The state of a run of regions: one bit each, bit 0 of byte 0 is `first`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionWindow {
    pub first: RegionIndex,
    pub count: u32,
    /// Dirty regions.
    pub dirty: Bytes,
    /// Suspect regions, a subset of the dirty ones.
    pub suspect: Bytes,
    /// Regions with an allocated block, or whose allocation is not known.
    pub allocated: Bytes,
}

/// One block for comparison (R7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHash {
    /// Keyed 128-bit hash of the bytes on the disk; an unallocated block hashes as zeroes.
    pub hash: [u8; 16],
    /// The bytes match the stored sum. False as well where they could not be read or the sum is not known.
    pub intact: bool,
    /// The bytes could be read, and are none that were distrusted: they may be taken for right if nobody knows better.
    pub readable: bool,
    /// The block is allocated.
    pub allocated: bool,
}

/// A reply: an error code with what it says, or the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Anything that returns nothing.
    Done(Kind),
    /// `code` is not [`Code::Ok`]; `block` as the code says.
    Failed {
        kind: Kind,
        code: Code,
        block: u64,
    },
    Attached(AttachInfo),
    Read {
        block: BlockIndex,
        sums: Vec<u32>,
        data: Bytes,
    },
    Regions(RegionWindow),
    Hashes(Vec<BlockHash>),
}

impl Reply {
    /// The kind of the request that this answers.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Done(kind) | Self::Failed { kind, .. } => *kind,
            Self::Attached(_) => Kind::Attach,
            Self::Read { .. } => Kind::Read,
            Self::Regions(_) => Kind::ListRegions,
            Self::Hashes(_) => Kind::Hashes,
        }
    }

    /// Encodes the reply for the request with this channel, attach and tag. The payload is shared, not copied.
    pub fn encode(&self, channel: u32, attach: AttachId, tag: u64) -> Encoded {
        let mut header = Header {
            kind: self.kind(),
            is_reply: true,
            flags: 0,
            channel,
            code: 0,
            tag,
            attach,
            block: 0,
            count: 0,
            body_len: 0,
            payload_len: 0,
        };
        let none = Bytes::new();
        match self {
            Self::Done(_) => assemble(header, none, 0, |_| ()),
            Self::Failed { code, block, .. } => {
                (header.code, header.block) = (*code as u32, *block);
                assemble(header, none, 0, |_| ())
            }
            Self::Attached(info) => assemble(header, none, 160, |b| {
                b.put_u64_le(info.incarnation.0);
                b.put_u64_le(info.held.epoch.0);
                b.put_u64_le(info.held.attach.0);
                b.put_u64_le(info.stored_epoch.0);
                b.put_u64_le(info.kept_epoch.0);
                b.put_u64_le(info.blocks);
                b.put_u32_le(info.dirty);
                b.put_u32_le(info.suspect);
                b.put_u8(info.kept.into());
                b.put_u8(info.rebuilt.into());
                b.put_u8(info.told.into());
                b.put_u8(info.accounted.into());
                put_set(b, &info.set);
            }),
            Self::Read { block, sums, data } => {
                (header.block, header.count) = (block.0, sums.len() as u32);
                assemble(header, data.clone(), sums.len() * 4, |b| put_sums(b, sums))
            }
            Self::Regions(w) => {
                (header.block, header.count) = (w.first.0.into(), w.count);
                assemble(header, none, w.dirty.len() * 3, |b| {
                    b.put_slice(&w.dirty);
                    b.put_slice(&w.suspect);
                    b.put_slice(&w.allocated);
                })
            }
            Self::Hashes(hashes) => {
                header.count = hashes.len() as u32;
                assemble(header, none, hashes.len() * 17, |b| {
                    for h in hashes {
                        b.put_slice(&h.hash);
                        b.put_u8(u8::from(h.intact) | u8::from(h.readable) << 1 | u8::from(h.allocated) << 2);
                    }
                })
            }
        }
    }

    /// Decodes what followed `header`.
    ///
    /// # Errors
    /// Names what is wrong; the connection is to be closed.
    pub fn decode(header: &Header, body: &[u8], payload: Bytes) -> Result<Self, FrameError> {
        let kind = header.kind;
        let code = Code::try_from(header.code)?;
        let mut b = BodyReader::new(body, "reply")?;
        let has_data = kind == Kind::Read && code == Code::Ok;
        if !has_data && !payload.is_empty() {
            return Err(FrameError::Malformed("payload where none belongs"));
        }
        if code != Code::Ok {
            b.end()?;
            return Ok(Self::Failed { kind, code, block: header.block });
        }
        let reply = match kind {
            Kind::Attach => Self::Attached(AttachInfo {
                incarnation: Incarnation(b.u64()?),
                held: AttachId { epoch: Epoch(b.u64()?), attach: AttachNo(b.u64()?) },
                stored_epoch: Epoch(b.u64()?),
                kept_epoch: Epoch(b.u64()?),
                blocks: b.u64()?,
                dirty: b.u32()?,
                suspect: b.u32()?,
                kept: b.bool()?,
                rebuilt: b.bool()?,
                told: b.bool()?,
                accounted: b.bool()?,
                set: read_set(&mut b)?,
            }),
            Kind::Read => {
                let sums = b.sums(header.count)?;
                if payload.len() as u64 != u64::from(header.count) * BLOCK_SIZE {
                    return Err(FrameError::Length {
                        what: "payload",
                        found: payload.len() as u64,
                        expected: u64::from(header.count) * BLOCK_SIZE,
                    });
                }
                Self::Read { block: BlockIndex(header.block), sums, data: payload }
            }
            Kind::ListRegions => {
                let first = u32::try_from(header.block).map_err(|_| FrameError::Malformed("region index"))?;
                let bytes = (header.count as usize).div_ceil(8);
                let mut map = || b.bytes(bytes).map(Bytes::copy_from_slice);
                Self::Regions(RegionWindow {
                    first: RegionIndex(first),
                    count: header.count,
                    dirty: map()?,
                    suspect: map()?,
                    allocated: map()?,
                })
            }
            Kind::Hashes => {
                if u64::from(header.count) > REGION_BLOCKS {
                    return Err(FrameError::Malformed("hash count"));
                }
                let mut hashes = Vec::with_capacity(header.count as usize);
                for _ in 0..header.count {
                    let hash = b.bytes(16)?.try_into().expect("16 bytes");
                    let flags = b.u8()?;
                    hashes.push(BlockHash {
                        hash,
                        intact: flags & 1 != 0,
                        readable: flags & 2 != 0,
                        allocated: flags & 4 != 0,
                    });
                }
                Self::Hashes(hashes)
            }
            _ => Self::Done(kind),
        };
        b.end()?;
        Ok(reply)
    }
}
