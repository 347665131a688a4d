//! Raft among the members. [`core`] decides and does no I/O; [`log_store`] keeps the log in redb; [`transport`]
//! carries messages; [`driver`] is the task around them.
//!
//! raft-rs panics on impossible input, so [`core::RaftCore`] checks every message before it gets there, and logs
//! through slog, which [`logger`] passes on to tracing.

pub mod core;
pub mod driver;
pub mod log_store;
pub mod logger;
pub mod memory_log;
pub mod transport;
