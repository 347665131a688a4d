//! The metadata machine: what the cluster consists of, who owns which volume, which replicas are in sync. It is
//! deterministic: ids and times arrive in commands, verdicts about leases too, and only ordered maps are walked,
//! so that every voter that has applied the same log holds the same state, byte for byte.

pub mod command;
pub mod placement;
pub mod snapshot;
pub mod state;

pub use command::{Command, Proposal};
pub use state::{Answer, Metadata};
