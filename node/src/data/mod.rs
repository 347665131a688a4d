//! The data plane of a storage node: the replica protocol's server, and the replicas behind it.
//!
//! ```text
//! accept ─► greeting: Hello ─► the data thread that owns the volume
//!                               │ connection: frames in, replies out
//!                               ▼
//!                             shard: replica cores ─► disks (store::Engine), peers (copies to other nodes)
//! ```
//!
//! - [`plane`]: starts and stops all of it, makes, opens and deletes replicas;
//! - [`host`]: has that done as the control plane says;
//! - [`shard`]: one data thread: its replicas, their connections, their disks;
//! - [`channel`]: one connection: frames in, replies out;
//! - [`server`]: accepts and greets;
//! - [`peer`]: copies to other nodes.
//!
//! A volume's replicas and connections live on one thread, so that nothing here is shared or locked, and a request
//! that the page cache can serve is answered in the wake-up that brought it.

pub mod channel;
pub mod host;
pub mod peer;
pub mod plane;
pub mod server;
pub mod shard;

pub use plane::{
    DataConfig, DataPlane, PoolPlace, PoolSpec, PoolStat, ReplicaProblem, ReplicaSpec, ReplicaState, ReplicaStatus,
    StartError,
};

use proto::id::VolumeId;

/// The data thread that owns a volume.
pub(crate) fn thread_of(volume: VolumeId, threads: usize) -> usize {
    let (high, low) = volume.0.as_u64_pair();
    ((high ^ low).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % threads
}

/// Milliseconds of a clock that goes on while the machine sleeps (R3).
pub(crate) fn now_ms() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    t.tv_sec as u64 * 1000 + t.tv_nsec as u64 / 1_000_000
}
