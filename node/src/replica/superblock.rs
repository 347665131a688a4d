//! The superblock: who a replica is, the newest epoch it has taken, and what it last knew of the in-sync set.
//!
//! ```text
//!    0  magic "md99repl"             96  epoch         u64
//!    8  layout version  u32         104  set version   u64
//!   12  flags           u32         112  clean         u64
//!   16  generation      u64         120  members       u8, then 7 zero bytes
//!   24  cluster         16 bytes    128  members' ids  5 × 16 bytes, unused ones zero
//!   40  volume          16 bytes    208  kept epoch    u64
//!   56  mirror          16 bytes    216  zeroes
//!   72  replica         16 bytes   4092  CRC-32 of bytes 0..4092
//!   88  blocks          u64
//! ```
//!
//! Flag 1: the metadata was made anew after a loss, and the replica has not been equalised since. Whoever opens
//! the replica validates both copies; the one with the higher generation counts.

use proto::frame::SetView;
use proto::id::{CleanNo, ClusterId, Epoch, MirrorId, ReplicaId, SetVersion, VolumeId};
use proto::limits::MAX_REPLICAS;

use super::interface::ReplicaIds;
use super::layout::{LAYOUT_VERSION, PAGE};

const MAGIC: [u8; 8] = *b"md99repl";
const FLAG_REBUILT: u32 = 1;
const MEMBERS: usize = 128;
const KEPT_EPOCH: usize = MEMBERS + MAX_REPLICAS * 16;

/// What the superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Rises with every write of the pair.
    pub generation: u64,
    pub ids: ReplicaIds,
    pub blocks: u64,
    pub epoch: Epoch,
    /// The epoch in which the set was last stored.
    pub kept_epoch: Epoch,
    pub set: SetView,
    /// See the module.
    pub rebuilt: bool,
}

/// Why a copy can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadCopy {
    /// Nothing was ever written there.
    Zero,
    /// Magic, checksum or a field is wrong.
    Damaged,
    /// Intact, but of another layout.
    Layout(u32),
}

impl Superblock {
    /// One copy, a page long.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.set.members.len() <= MAX_REPLICAS, "{} members", self.set.members.len());
        let mut b = vec![0u8; PAGE as usize];
        b[0..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&LAYOUT_VERSION.to_le_bytes());
        b[12..16].copy_from_slice(&if self.rebuilt { FLAG_REBUILT } else { 0 }.to_le_bytes());
        b[16..24].copy_from_slice(&self.generation.to_le_bytes());
        b[24..40].copy_from_slice(&self.ids.cluster.to_bytes());
        b[40..56].copy_from_slice(&self.ids.volume.to_bytes());
        b[56..72].copy_from_slice(&self.ids.mirror.to_bytes());
        b[72..88].copy_from_slice(&self.ids.replica.to_bytes());
        b[88..96].copy_from_slice(&self.blocks.to_le_bytes());
        b[96..104].copy_from_slice(&self.epoch.0.to_le_bytes());
        b[104..112].copy_from_slice(&self.set.version.0.to_le_bytes());
        b[112..120].copy_from_slice(&self.set.clean.0.to_le_bytes());
        b[120] = self.set.members.len() as u8;
        for (i, member) in self.set.members.iter().enumerate() {
            b[MEMBERS + i * 16..MEMBERS + (i + 1) * 16].copy_from_slice(&member.to_bytes());
        }
        b[KEPT_EPOCH..KEPT_EPOCH + 8].copy_from_slice(&self.kept_epoch.0.to_le_bytes());
        let crc = crc32fast::hash(&b[..4092]);
        b[4092..].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Reads and checks one copy.
    ///
    /// # Errors
    /// Says in which way the copy is of no use.
    pub fn decode(b: &[u8]) -> Result<Self, BadCopy> {
        let u32_at = |at: usize| u32::from_le_bytes(b[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(b[at..at + 8].try_into().expect("8 bytes"));
        let id_at = |at: usize| -> [u8; 16] { b[at..at + 16].try_into().expect("16 bytes") };
        if b.len() != PAGE as usize {
            return Err(BadCopy::Damaged);
        }
        if b.iter().all(|byte| *byte == 0) {
            return Err(BadCopy::Zero);
        }
        if b[0..8] != MAGIC || u32_at(4092) != crc32fast::hash(&b[..4092]) {
            return Err(BadCopy::Damaged);
        }
        if u32_at(8) != LAYOUT_VERSION {
            return Err(BadCopy::Layout(u32_at(8)));
        }
        let members = usize::from(b[120]);
        let generation = u64_at(16);
        // Nobody counts so far, and the next one must fit.
        if members > MAX_REPLICAS || generation > u64::MAX / 2 {
            return Err(BadCopy::Damaged);
        }
        Ok(Self {
            generation,
            ids: ReplicaIds {
                cluster: ClusterId::from_bytes(id_at(24)),
                volume: VolumeId::from_bytes(id_at(40)),
                mirror: MirrorId::from_bytes(id_at(56)),
                replica: ReplicaId::from_bytes(id_at(72)),
            },
            blocks: u64_at(88),
            epoch: Epoch(u64_at(96)),
            kept_epoch: Epoch(u64_at(KEPT_EPOCH)),
            set: SetView {
                version: SetVersion(u64_at(104)),
                members: (0..members).map(|i| ReplicaId::from_bytes(id_at(MEMBERS + i * 16))).collect(),
                clean: CleanNo(u64_at(112)),
            },
            rebuilt: u32_at(12) & FLAG_REBUILT != 0,
        })
    }
}
