//! A storage node of md99: raft membership and metadata, the replica store and its server. A node never knows
//! stripes.

pub mod control;
pub mod data;
pub mod metadata;
pub mod raft;
pub mod replica;
pub mod store;
