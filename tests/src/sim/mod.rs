//! A whole cluster in one thread: the shipping cores on virtual time, network and disks, from one printed seed.
//!
//! Nodes and witnesses run `ControlCore` (raft-rs, the metadata machine, the lease table) and `ReplicaCore`, gateways
//! run `VolumeSession` over several mirrors and decide by `gateway::decide`.
//!
//! - `world`: the event queue, and what is injected and withheld;
//! - `net`, `disk`: what the cores stand on;
//! - `voter`, `node`, `gateway`, `ask`: stand-ins for the drivers;
//! - `operator`: orders to the cluster; `work`: initiators; `faults`: what goes wrong and when;
//! - `volume`, `history`: is what initiators were told what one disk could have told them;
//! - `invariants`: the rules of DESIGN §5, and where each is checked; `checker`: what found that something is wrong;
//!   `mutants`: does it find faults that are planted;
//! - `run`: one seed, or one scenario, from beginning to end; `script`: what scenarios do by name.

mod ask;
mod checker;
mod disk;
mod faults;
mod gateway;
pub mod history;
mod invariants;
#[cfg(feature = "mutants")]
pub mod mutants;
mod net;
mod node;
mod operator;
pub(crate) mod rng;
mod run;
mod script;
mod volume;
mod voter;
mod work;
mod world;

pub use checker::Checker;
pub use disk::DiskFaults;
pub use faults::Fault;
pub use net::Party;
pub use run::{Failure, Outcome, run_scenario, run_seed, run_story};
pub use world::{Counters, MS, SECOND, Setup, World};
