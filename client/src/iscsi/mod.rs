//! The iSCSI target (RFC 7143): from a TCP connection to requests of a [`BlockDevice`](crate::block::BlockDevice).
//! Nothing here speaks to a replica.
//!
//! - [`pdu`]: bytes and PDUs. [`text`], [`login`]: negotiation, as a core without I/O.
//! - [`session`]: the full-feature phase as a core: command window, tasks, write data, task management.
//!   [`task`]: one command in it.
//! - [`server`]: accepts connections on a portal, does the login on whatever thread it runs on, answers discovery, and
//!   hands a logged-in connection to its target's thread.
//! - [`target`]: lives on the volume's thread; [`connection`] drives a session core there between its socket and the
//!   device.
//!
//! One connection per session (MaxConnections=1), ErrorRecoveryLevel 0: whatever goes wrong on a connection ends its
//! session, and the initiator logs in again.

pub mod connection;
pub mod login;
pub mod pdu;
pub mod server;
pub mod session;
pub mod target;
pub mod task;
pub mod text;

/// What the names of our targets begin with.
pub const IQN_PREFIX: &str = "iqn.2026-11.io.md99:";

/// The target name of a volume.
pub fn iqn(volume: &str) -> String {
    format!("{IQN_PREFIX}{volume}")
}

/// Our one portal group (RFC 7143 §4.2.7.1 has them; all portals reach the same targets).
pub const PORTAL_GROUP_TAG: u16 = 1;
