//! A load that knows what it wrote: it writes, reads, flushes and discards through the real target over TCP, keeps
//! the history of every sector, and checks every byte that it reads against what that history allows.
//!
//! [`history`] decides what a read may return, [`pattern`] makes contents from (seed, sector, version),
//! [`meter`] measures, [`line`] is a session that logs in again when its connection is lost, [`run`] drives all of
//! it and repeats what was not answered.

pub mod history;
pub mod line;
pub mod meter;
pub mod pattern;
mod rng;
pub mod run;

pub use history::UnderWay;
pub use meter::Measured;
pub use rng::Rng;
pub use run::{Load, LoadSpec, Mix};
