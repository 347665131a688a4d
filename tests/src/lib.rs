//! What needs more than one crate: the simulation; cluster and conformance tests are in `tests/tests`.

pub mod hostile;
pub mod sim;
