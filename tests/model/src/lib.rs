//! model
pub mod config;
mod gateway;
pub mod check;
mod replica;
pub mod state;
pub use config::*;
