//! `cluster dev`: a whole cluster as separate processes on this machine. [`layout`] says what its directory holds,
//! [`process`] starts and finds processes, [`ports`] chooses where they listen, [`commands`] are the verbs.

pub mod commands;
pub mod layout;
pub mod ports;
pub mod process;

pub use commands::{DevArgs, Up, down, run, start, up};
pub use layout::{Dev, Part};
