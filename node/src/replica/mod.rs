//! One replica: what it holds, who may use it, and what is known of every block. A core without I/O.
//!
//! [`ReplicaCore`] takes [`Input`]s and states [`Output`]s. It owns no clock, file, socket or random source; its
//! driver is [`crate::data`], and the simulator drives it unchanged.
//!
//! - [`interface`]: what goes in and comes out;
//! - [`layout`]: where things are in the meta file, and the page formats;
//! - [`superblock`]: who the replica is, its epoch and its in-sync set;
//! - `open`: making and opening a replica;
//! - `attach`: the fence (R1);
//! - `dirty_log`: regions, their dirty bits, and the metadata pass that makes them durable (R5, R6);
//! - `map`: which blocks are allocated, and their sums (R10);
//! - `journal`: what a killed process had allocated since the last flush;
//! - `flush`: making answered writes durable (R9);
//! - `io`: reads, writes, zeroes;
//! - `repair`: hashes, copies, restamps (R7).
//!
//! # The meta file
//!
//! Pages of 4 KiB, everything little-endian, every page with a CRC-32 of its own that is checked by whoever loads
//! it, together with the magic, the kind, the page's index and the replica's id (so that a misplaced page or one
//! of another file is a bad page):
//!
//! ```text
//! page 0        superblock, copy 0     written one after the other with a sync between, so that one is always good
//! page 1        superblock, copy 1
//! page 2..17    allocation journal     8 pages in two versions each, never synced for their own sake: see `journal`
//! page 18..     dirty bitmap           1 bit a region, 32256 bits a page
//! then          presence bitmap        1 bit a map page: it has been written
//! then          block map              1 page for 3 regions: sums, allocation and verification of 768 blocks;
//!                                      the store has it behind the data, in the data file
//! ```
//!
//! A block's sum and its allocation bit travel in one checksummed page: one page write makes both durable, and
//! they can't disagree. The allocation bitmap stays a field of its own in it (R10), never a magic sum.
//!
//! A replica is created sparse: only superblocks and bitmaps are written (a few KiB for 200 GiB), the map is a
//! hole. The presence bitmap tells a map page that was never written (its blocks are unallocated) from one that
//! was lost. A map page's first, empty version is written together with the dirty bit of the first region that
//! changes, and its presence bit only after that write is durable, but before any flush is answered: so presence
//! without a page means loss, and a page without presence holds nothing that was promised.
//!
//! What a crash can leave, and what then holds:
//!
//! - a torn dirty page: all its regions are dirty (R5);
//! - a torn presence page: every map page under it is looked at when the replica is opened; one that is neither
//!   good nor provably never written is a bad page;
//! - a torn map page: regions that the write changed are bad, those beside them are as they were (`layout`);
//! - a bad region of a map page, or a lost page: the region, or all three, become dirty and suspect before anybody sees
//!   the page, their blocks unverified: reads of them are answered with `Checksum` until they are written, copied to or
//!   restamped;
//! - data without its sum, or a sum without its data: a mismatch inside a dirty region, for equalising to settle;
//! - an allocation without its data: never, map pages that allocate are written after the data is durable;
//! - data without its allocation, or a punch that is lost: bytes in a block that reads as zeroes. They are freed
//!   before anybody looks, see `map`;
//! - after a kill, data without its allocation in the map, but with a record of it in the allocation journal of this
//!   era: the blocks become unverified. After a power cut the journal is of another era, and ignored;
//! - what a killed process had only written, not synced: the meta file is synced before it is read.

mod attach;
mod bitset;
mod dirty_log;
mod flush;
mod interface;
mod io;
mod journal;
pub mod layout;
mod map;
mod open;
mod repair;
mod state;
pub mod superblock;
#[cfg(test)]
mod tests;

pub use interface::{
    AttachEnd, CloseReason, Config, ConnId, CopyError, CopyToken, Create, DiskData, DiskError, DiskIo, FaultReason,
    FileKind, FileLengths, Input, Notice, OpId, OpenError, OpenReport, Output, ReplicaIds,
};
pub(crate) use repair::MAX_COPIES_OUT;
pub use repair::block_hash;
pub use state::ReplicaCore;
