//! Requests, one variant a kind.

use bytes::{BufMut, Bytes};

use super::body::{BodyReader, assemble, put_text};
use super::{Encoded, FLAG_FUA, FrameError, Header};
use crate::id::{
    AttachId, AttachNo, BlockIndex, CleanNo, ClusterId, Epoch, FlushNo, MirrorId, RegionIndex, ReplicaId, SetVersion,
    VolumeId,
};
use crate::limits::{BLOCK_SIZE, MAX_DISCARD_BLOCKS, MAX_REPLICAS, MAX_REQUEST_BLOCKS, REGION_BLOCKS};

const MAX_NAME: usize = 256;
/// Regions that one list, clean or settle may name.
const MAX_REGIONS: u32 = 1 << 20;
/// Entries of one clean or settle.
const MAX_CLEAN_ENTRIES: u32 = 4096;

/// What a frame asks or answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    Hello = 0x01,
    Attach = 0x02,
    Read = 0x03,
    Write = 0x04,
    WriteZeroes = 0x05,
    Discard = 0x06,
    Flush = 0x07,
    ListRegions = 0x08,
    Clean = 0x09,
    Settle = 0x0a,
    MarkAllDirty = 0x0b,
    StoreSet = 0x0c,
    Hashes = 0x0d,
    CopyTo = 0x0e,
    CopyWrite = 0x0f,
    Ping = 0x10,
    Detach = 0x11,
    Restamp = 0x12,
    Distrust = 0x13,
}

impl TryFrom<u8> for Kind {
    type Error = FrameError;
    fn try_from(byte: u8) -> Result<Self, FrameError> {
        const ALL: [Kind; 19] = [
            Kind::Hello,
            Kind::Attach,
            Kind::Read,
            Kind::Write,
            Kind::WriteZeroes,
            Kind::Discard,
            Kind::Flush,
            Kind::ListRegions,
            Kind::Clean,
            Kind::Settle,
            Kind::MarkAllDirty,
            Kind::StoreSet,
            Kind::Hashes,
            Kind::CopyTo,
            Kind::CopyWrite,
            Kind::Ping,
            Kind::Detach,
            Kind::Restamp,
            Kind::Distrust,
        ];
        ALL.into_iter().find(|k| *k as u8 == byte).ok_or(FrameError::Kind(byte))
    }
}

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRole {
    /// A gateway, which attaches.
    Gateway,
    /// A node, which delivers copies under the attach of the gateway that ordered them.
    Node,
}

/// A mirror's in-sync set as raft committed it, with the number of the last clean, for a replica to store (R2, R6).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SetView {
    /// The committed version.
    pub version: SetVersion,
    /// The members, sorted.
    pub members: Vec<ReplicaId>,
    /// The number of the last clean that is durable everywhere.
    pub clean: CleanNo,
}

/// A region whose dirty bit may go: it has not changed since flush `flush` of the attach that sends this began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CleanEntry {
    pub region: RegionIndex,
    pub flush: FlushNo,
}

/// Where a copy goes: the destination's data address and the attach that the gateway holds there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyTarget {
    /// `host:port` of the destination node's data plane.
    pub addr: String,
    /// The destination replica.
    pub replica: ReplicaId,
    /// The attach under which the destination takes the copy.
    pub attach: AttachId,
}

/// A request. Those that carry blocks have one sum per block; block ranges are whole and inside the replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The first frame of a connection. Any one volume's connections are served by one thread of the node.
    Hello { role: PeerRole, cluster: ClusterId, volume: VolumeId, name: String },
    /// Takes the replica over for the attach in the header (R1). `members` tells what raft says is in sync.
    Attach { replica: ReplicaId, mirror: MirrorId, lease_ms: u32, set: SetView },
    /// Reads `count` blocks.
    Read { block: BlockIndex, count: u32 },
    /// Writes the payload.
    Write { block: BlockIndex, fua: bool, sums: Vec<u32>, data: Bytes },
    /// Makes blocks read as zeroes; they become unallocated.
    WriteZeroes { block: BlockIndex, count: u32, fua: bool },
    /// As write zeroes, without a promise of when the space is freed.
    Discard { block: BlockIndex, count: u32 },
    /// Makes every write that this replica answered before it durable, then answers. Numbers rise within an attach.
    Flush { flush: FlushNo },
    /// Asks for the state of `count` regions from `first`.
    ListRegions { first: RegionIndex, count: u32 },
    /// Clears dirty bits, each unless its region has changed since its flush began (R6). Durable when answered.
    Clean { clean: CleanNo, entries: Vec<CleanEntry> },
    /// The regions were equalised and flushed: they are suspect no more. Same condition as for a clean; in memory.
    Settle { entries: Vec<CleanEntry> },
    /// Makes every region dirty, durably: the replica is new, or an old image.
    MarkAllDirty,
    /// Stores the committed in-sync set, durably. Whether it is [`AttachInfo::accounted`](super::AttachInfo) from then
    /// on is kept in memory.
    StoreSet { set: SetView, accounted: bool },
    /// Hashes the bytes that are on the disk, per block, with this key (R7). Inside one region.
    Hashes { block: BlockIndex, count: u32, key: [u8; 32] },
    /// Copies the blocks named by the bits of `blocks` (bit i: block + i) to another node's replica.
    CopyTo { block: BlockIndex, blocks: [u64; 4], target: CopyTarget },
    /// A copied run of blocks, from node to node. `unallocated`: no payload, the blocks become unallocated.
    CopyWrite { replica: ReplicaId, block: BlockIndex, count: u32, sums: Vec<u32>, data: Bytes },
    /// Asks for a sign of life; also renews every attach of the connection.
    Ping,
    /// Ends the attach: the session is over.
    Detach,
    /// Takes the bytes on the disk for right, where no replica's block matches its sum (R7): the named blocks get
    /// the sum of what they hold.
    Restamp { block: BlockIndex, blocks: [u64; 4] },
    /// The named blocks are not to be believed, whatever they hold: no replica that could tell has them as they were
    /// written (R10). They are answered with `Checksum` until they are written, and never taken for right.
    Distrust { block: BlockIndex, blocks: [u64; 4] },
}

impl Request {
    /// The kind of this request.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello { .. } => Kind::Hello,
            Self::Attach { .. } => Kind::Attach,
            Self::Read { .. } => Kind::Read,
            Self::Write { .. } => Kind::Write,
            Self::WriteZeroes { .. } => Kind::WriteZeroes,
            Self::Discard { .. } => Kind::Discard,
            Self::Flush { .. } => Kind::Flush,
            Self::ListRegions { .. } => Kind::ListRegions,
            Self::Clean { .. } => Kind::Clean,
            Self::Settle { .. } => Kind::Settle,
            Self::MarkAllDirty => Kind::MarkAllDirty,
            Self::StoreSet { .. } => Kind::StoreSet,
            Self::Hashes { .. } => Kind::Hashes,
            Self::CopyTo { .. } => Kind::CopyTo,
            Self::CopyWrite { .. } => Kind::CopyWrite,
            Self::Ping => Kind::Ping,
            Self::Detach => Kind::Detach,
            Self::Restamp { .. } => Kind::Restamp,
            Self::Distrust { .. } => Kind::Distrust,
        }
    }

    /// Encodes the request. The payload is shared, not copied.
    pub fn encode(&self, channel: u32, attach: AttachId, tag: u64) -> Encoded {
        let mut header = Header {
            kind: self.kind(),
            is_reply: false,
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
            Self::Hello { role, cluster, volume, name } => assemble(header, none, 64, |b| {
                b.put_u8(matches!(role, PeerRole::Node).into());
                b.put_slice(&cluster.to_bytes());
                b.put_slice(&volume.to_bytes());
                put_text(b, name);
            }),
            Self::Attach { replica, mirror, lease_ms, set } => {
                header.count = *lease_ms;
                assemble(header, none, 160, |b| {
                    b.put_slice(&replica.to_bytes());
                    b.put_slice(&mirror.to_bytes());
                    put_set(b, set);
                })
            }
            Self::Read { block, count } => {
                (header.block, header.count) = (block.0, *count);
                assemble(header, none, 0, |_| ())
            }
            Self::Write { block, fua, sums, data } => {
                (header.block, header.count) = (block.0, sums.len() as u32);
                header.flags = if *fua { FLAG_FUA } else { 0 };
                assemble(header, data.clone(), sums.len() * 4, |b| put_sums(b, sums))
            }
            Self::WriteZeroes { block, count, fua } => {
                (header.block, header.count) = (block.0, *count);
                header.flags = if *fua { FLAG_FUA } else { 0 };
                assemble(header, none, 0, |_| ())
            }
            Self::Discard { block, count } => {
                (header.block, header.count) = (block.0, *count);
                assemble(header, none, 0, |_| ())
            }
            Self::Flush { flush } => {
                header.block = flush.0;
                assemble(header, none, 0, |_| ())
            }
            Self::ListRegions { first, count } => {
                (header.block, header.count) = (first.0.into(), *count);
                assemble(header, none, 0, |_| ())
            }
            Self::Clean { clean, entries } => {
                (header.block, header.count) = (clean.0, entries.len() as u32);
                assemble(header, none, entries.len() * 12, |b| put_entries(b, entries))
            }
            Self::Settle { entries } => {
                header.count = entries.len() as u32;
                assemble(header, none, entries.len() * 12, |b| put_entries(b, entries))
            }
            Self::StoreSet { set, accounted } => assemble(header, none, 128, |b| {
                b.put_u8((*accounted).into());
                put_set(b, set);
            }),
            Self::Hashes { block, count, key } => {
                (header.block, header.count) = (block.0, *count);
                assemble(header, none, 32, |b| b.put_slice(key))
            }
            Self::CopyTo { block, blocks, target } => {
                header.block = block.0;
                assemble(header, none, 128, |b| {
                    blocks.iter().for_each(|w| b.put_u64_le(*w));
                    b.put_slice(&target.replica.to_bytes());
                    b.put_u64_le(target.attach.epoch.0);
                    b.put_u64_le(target.attach.attach.0);
                    put_text(b, &target.addr);
                })
            }
            Self::CopyWrite { replica, block, count, sums, data } => {
                (header.block, header.count) = (block.0, *count);
                assemble(header, data.clone(), 16 + sums.len() * 4, |b| {
                    b.put_slice(&replica.to_bytes());
                    put_sums(b, sums);
                })
            }
            Self::Restamp { block, blocks } | Self::Distrust { block, blocks } => {
                header.block = block.0;
                assemble(header, none, 32, |b| blocks.iter().for_each(|w| b.put_u64_le(*w)))
            }
            Self::MarkAllDirty | Self::Ping | Self::Detach => assemble(header, none, 0, |_| ()),
        }
    }

    /// Decodes what followed `header`. Block ranges are checked against the limits, not against a replica's size.
    ///
    /// # Errors
    /// Names what is wrong; the connection is to be closed.
    pub fn decode(header: &Header, body: &[u8], payload: Bytes) -> Result<Self, FrameError> {
        let block = BlockIndex(header.block);
        let count = header.count;
        let fua = header.flags & FLAG_FUA != 0;
        if !matches!(header.kind, Kind::Write | Kind::CopyWrite) && !payload.is_empty() {
            return Err(FrameError::Malformed("payload where none belongs"));
        }
        let mut b = BodyReader::new(body, kind_name(header.kind))?;
        let request = match header.kind {
            Kind::Hello => Self::Hello {
                role: if b.bool()? { PeerRole::Node } else { PeerRole::Gateway },
                cluster: ClusterId(b.uuid()?),
                volume: VolumeId(b.uuid()?),
                name: b.text(MAX_NAME)?,
            },
            Kind::Attach => Self::Attach {
                replica: ReplicaId(b.uuid()?),
                mirror: MirrorId(b.uuid()?),
                lease_ms: count,
                set: read_set(&mut b)?,
            },
            Kind::Read => Self::Read { block, count: range(block, count, MAX_REQUEST_BLOCKS)? },
            Kind::Write => {
                range(block, count, MAX_REQUEST_BLOCKS)?;
                let sums = b.sums(count)?;
                exact("payload", payload.len(), sums.len() * BLOCK_SIZE as usize)?;
                Self::Write { block, fua, sums, data: payload }
            }
            Kind::WriteZeroes => Self::WriteZeroes { block, count: range(block, count, MAX_DISCARD_BLOCKS)?, fua },
            Kind::Discard => Self::Discard { block, count: range(block, count, MAX_DISCARD_BLOCKS)? },
            Kind::Flush => Self::Flush { flush: FlushNo(header.block) },
            Kind::ListRegions => {
                let first = u32::try_from(header.block).map_err(|_| FrameError::Malformed("region index"))?;
                range(block, count, MAX_REGIONS)?;
                Self::ListRegions { first: RegionIndex(first), count }
            }
            Kind::Clean => Self::Clean { clean: CleanNo(header.block), entries: read_entries(&mut b, count)? },
            Kind::Settle => Self::Settle { entries: read_entries(&mut b, count)? },
            Kind::MarkAllDirty => Self::MarkAllDirty,
            Kind::StoreSet => Self::StoreSet { accounted: b.bool()?, set: read_set(&mut b)? },
            Kind::Hashes => {
                range(block, count, REGION_BLOCKS as u32)?;
                Self::Hashes { block, count, key: b.bytes(32)?.try_into().expect("32 bytes") }
            }
            Kind::CopyTo => Self::CopyTo {
                block,
                blocks: read_mask(&mut b)?,
                target: CopyTarget {
                    replica: ReplicaId(b.uuid()?),
                    attach: AttachId { epoch: Epoch(b.u64()?), attach: AttachNo(b.u64()?) },
                    addr: b.text(MAX_NAME)?,
                },
            },
            Kind::CopyWrite => {
                range(block, count, MAX_REQUEST_BLOCKS)?;
                let replica = ReplicaId(b.uuid()?);
                let sums = if b.remaining() == 0 { Vec::new() } else { b.sums(count)? };
                exact("payload", payload.len(), sums.len() * BLOCK_SIZE as usize)?;
                Self::CopyWrite { replica, block, count, sums, data: payload }
            }
            Kind::Ping => Self::Ping,
            Kind::Detach => Self::Detach,
            Kind::Restamp => Self::Restamp { block, blocks: read_mask(&mut b)? },
            Kind::Distrust => Self::Distrust { block, blocks: read_mask(&mut b)? },
        };
        b.end()?;
        Ok(request)
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Hello => "hello",
        Kind::Attach => "attach",
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::WriteZeroes => "write zeroes",
        Kind::Discard => "discard",
        Kind::Flush => "flush",
        Kind::ListRegions => "list regions",
        Kind::Clean => "clean",
        Kind::Settle => "settle",
        Kind::MarkAllDirty => "mark all dirty",
        Kind::StoreSet => "store set",
        Kind::Hashes => "hashes",
        Kind::CopyTo => "copy to",
        Kind::CopyWrite => "copy write",
        Kind::Ping => "ping",
        Kind::Detach => "detach",
        Kind::Restamp => "restamp",
        Kind::Distrust => "distrust",
    }
}

fn range(block: BlockIndex, count: u32, limit: u32) -> Result<u32, FrameError> {
    if count == 0 {
        return Err(FrameError::Malformed("empty range"));
    }
    if count > limit {
        return Err(FrameError::TooLong { what: "range", found: count.into(), limit: limit.into() });
    }
    block.0.checked_add(count.into()).ok_or(FrameError::Malformed("range past the end of numbers"))?;
    Ok(count)
}

fn exact(what: &'static str, found: usize, expected: usize) -> Result<(), FrameError> {
    if found == expected {
        Ok(())
    } else {
        Err(FrameError::Length { what, found: found as u64, expected: expected as u64 })
    }
}

pub(super) fn put_sums(b: &mut bytes::BytesMut, sums: &[u32]) {
    sums.iter().for_each(|s| b.put_u32_le(*s));
}

pub(super) fn put_set(b: &mut bytes::BytesMut, set: &SetView) {
    b.put_u64_le(set.version.0);
    b.put_u64_le(set.clean.0);
    b.put_u8(u8::try_from(set.members.len()).expect("members are few"));
    set.members.iter().for_each(|m| b.put_slice(&m.to_bytes()));
}

pub(super) fn read_set(b: &mut BodyReader<'_>) -> Result<SetView, FrameError> {
    let version = SetVersion(b.u64()?);
    let clean = CleanNo(b.u64()?);
    let n = usize::from(b.u8()?);
    if n > MAX_REPLICAS {
        return Err(FrameError::TooLong { what: "members", found: n as u64, limit: MAX_REPLICAS as u64 });
    }
    let members = (0..n).map(|_| b.uuid().map(ReplicaId)).collect::<Result<_, _>>()?;
    Ok(SetView { version, members, clean })
}

fn read_mask(b: &mut BodyReader<'_>) -> Result<[u64; 4], FrameError> {
    Ok([b.u64()?, b.u64()?, b.u64()?, b.u64()?])
}

fn put_entries(b: &mut bytes::BytesMut, entries: &[CleanEntry]) {
    for e in entries {
        b.put_u32_le(e.region.0);
        b.put_u64_le(e.flush.0);
    }
}

fn read_entries(b: &mut BodyReader<'_>, count: u32) -> Result<Vec<CleanEntry>, FrameError> {
    if count > MAX_CLEAN_ENTRIES {
        return Err(FrameError::TooLong { what: "entries", found: count.into(), limit: MAX_CLEAN_ENTRIES.into() });
    }
    (0..count).map(|_| Ok(CleanEntry { region: RegionIndex(b.u32()?), flush: FlushNo(b.u64()?) })).collect()
}
