//! What needs more than one crate: the simulation, chaos on real processes, and measuring; cluster and conformance tests are in `tests/tests`.

pub mod bench;
pub mod chaos;
pub mod hostile;
pub mod sim;
