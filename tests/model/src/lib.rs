//! model
pub mod check;
pub mod config;
mod gateway;
mod replica;
pub mod run;
pub mod state;

pub use config::{CONFIGS, Config, Mutant, config};
pub use run::{Outcome, Trace, run};
