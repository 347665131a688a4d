//! Every limit that both sides of a connection must agree on (R11), with what happens there.

/// Bytes in a block: the unit of checksums, allocation and comparison.
pub const BLOCK_SIZE: u64 = 4096;
/// Bytes in a region: the unit of the dirty-region log and of resync.
pub const REGION_SIZE: u64 = 1 << 20;
/// Blocks in a region.
pub const REGION_BLOCKS: u64 = REGION_SIZE / BLOCK_SIZE;
/// Blocks that one replica request may name; a longer one is refused and its connection closed.
pub const MAX_REQUEST_BLOCKS: u32 = 256;
/// Blocks that one discard or write-zeroes request may name: it carries no payload.
pub const MAX_DISCARD_BLOCKS: u32 = 1 << 20;
/// Bytes of a frame's body that is not block data (set views, region lists, hashes).
pub const MAX_BODY: u32 = 1 << 20;
/// Requests that one attach may have in flight at a replica; the requester waits for answers before it sends
/// more, a replica that is sent more closes the connection.
pub const MAX_ATTACH_IN_FLIGHT: usize = 256;
/// Replicas of one mirror.
pub const MAX_REPLICAS: usize = 5;
/// Mirrors of one volume.
pub const MAX_MIRRORS: usize = 32;
/// Bytes in a mirror, so that a region's index fits in 32 bits with room and a bitmap stays small (2 MiB).
pub const MAX_MIRROR_SIZE: u64 = 16 << 40;
/// How long a session's lease lasts, in milliseconds, from the moment the gateway *sent* its request (R3).
pub const LEASE_MS: u64 = 6_000;
/// How often a gateway renews its lease.
pub const LEASE_RENEW_MS: u64 = 1_000;
/// Clock rates are assumed to be within this many parts per thousand of each other (R3).
pub const CLOCK_DRIFT_PERMILLE: u64 = 10;

const _: () = assert!(REGION_SIZE.is_multiple_of(BLOCK_SIZE));
const _: () = assert!(MAX_REQUEST_BLOCKS as u64 == REGION_BLOCKS);
const _: () = assert!(LEASE_RENEW_MS * 4 < LEASE_MS);
const _: () = assert!(MAX_MIRROR_SIZE / REGION_SIZE <= u32::MAX as u64);
