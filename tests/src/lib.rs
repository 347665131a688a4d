//! What needs more than one crate: the simulation, and chaos on real processes; cluster and conformance tests are in `tests/tests`.

pub mod chaos;
pub mod hostile;
pub mod sim;
