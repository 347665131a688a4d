//! The control plane as gateways and the command line see it: [`ControlClient`] finds the leader, tries again
//! under one request id, and answers with checked types; [`watch`] follows the metadata.

mod client;
mod watch;

pub use client::{ControlClient, ControlConfig, ControlError};
pub use watch::ViewReceiver;
