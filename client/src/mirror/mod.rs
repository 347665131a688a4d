//! A mirror: up to five replicas that hold the same bytes, and the rules that keep it so.
//!
//! [`Mirror`] is a state machine without I/O: [`Mirror::step`] takes an [`Input`] and the time, and says what is
//! to be done. ARCHITECTURE.md tells its states; the parts are
//! - `state`: the struct, replicas' attaches (R1), what is sent and answered;
//! - `foreground`: reads, writes, merges, zeroes, flushes under range locks (R2, R4, R9, R10);
//! - `hedge`: reads that a replica is late with;
//! - `membership`: who leaves and enters the in-sync set, and when writes may be acknowledged (R2);
//! - `take_over`: what a session begins with, and begins again with after every replica was lost (R8);
//! - `replay`: acknowledged writes that are not durable yet, for when every cache was lost (R9);
//! - `equalise`: making a region equal (R7), for joins, reconcile, repair and comparison;
//! - `join`: how a replica comes back (R7);
//! - `clean`: the dirty-region log's other half (R6).

mod clean;
mod equalise;
mod foreground;
mod hedge;
mod join;
mod mask;
mod membership;
mod range_lock;
mod region_set;
mod replay;
mod state;
mod take_over;
mod types;

pub use range_lock::{LockOwner, RangeLocks};
pub use region_set::RegionSet;
pub use state::{Mirror, REST_TICK_MS, TICK_MS, limits};
pub use types::*;
