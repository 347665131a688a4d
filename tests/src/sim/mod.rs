//! A whole cluster in one thread: the shipping mirror and replica cores on virtual time, network and disks, from one
//! printed seed.
//!
//! - `world`: the event queue, the processes, and what is injected and withheld;
//! - `net`, `disk`, `control`: what the cores stand on;
//! - `node`, `gateway`: stand-ins for the drivers;
//! - `work`: initiators; `faults`: what goes wrong and when;
//! - `history`: is what initiators were told what one disk could have told them;
//! - `invariants`: the rules of DESIGN §5 that can be checked at every step;
//! - `run`: one seed, or one scenario, from beginning to end; `script`: what scenarios do by name.

mod control;
mod disk;
mod faults;
mod gateway;
pub mod history;
mod invariants;
mod net;
mod node;
pub(crate) mod rng;
mod run;
mod script;
mod work;
mod world;

pub use disk::DiskFaults;
pub use faults::Fault;
pub use net::Party;
pub use run::{Failure, Outcome, run_scenario, run_seed};
pub use world::{Counters, MS, SECOND, Setup, World};
