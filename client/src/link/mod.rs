//! A link: one connection from an open volume to one node, shared by the volume's mirrors.
//!
//! `core` decides when a link is silent for too long; `task` owns the socket. A mirror's channel on a link is its
//! place in the stripe: a node holds at most one replica of a mirror.

mod core;
mod task;

pub use core::{Due, Liveness, SILENT_MS};
pub use task::{LinkConfig, LinkEvents, LinkQueue, run};
