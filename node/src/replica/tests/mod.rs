//! The core over a disk in memory that loses un-synced writes, tears them and flips bits.

mod crash;
mod fence;
mod journal;
mod rig;
mod rules;
mod structures;
