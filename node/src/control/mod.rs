//! The control plane of one member: [`core`] joins raft, the metadata machine and the [`lease`] table into one
//! state machine without I/O; [`service`] answers gRPC from it; [`agent`] is what a storage node itself wants of
//! it; [`daemon`] starts all of it.

pub mod agent;
pub mod config;
pub mod core;
pub mod daemon;
pub mod lease;
pub mod service;

pub use agent::{NodeAgent, ReplicaAssignment, ReplicaHost, ReplicaWish};
pub use config::NodeConfig;
pub use daemon::{DaemonError, run};
