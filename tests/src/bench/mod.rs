//! How fast md99 is on this machine, told by bounds of the same machine in the same run: `tests/bench/run`.
//!
//! One iSCSI session and the whole cluster share the machine's processors, and everything that is compared runs in
//! turn, round after round: only such ratios count, since a request at depth 1 takes twice as long or half as long
//! by where the scheduler puts the processes.
//!
//! - [`fanout`]: the bound of writes: one sender, and for each replica a sink behind TCP that writes to a file;
//! - [`peers`]: the bound of reads, tgtd with one copy in memory; and clusters of processes by any `cluster` program;
//! - [`run`]: what is measured, in which order; [`results`]: what it has to be, and how it is written down.

pub mod fanout;
pub mod peers;
pub mod results;
pub mod run;
mod scale;

use std::path::PathBuf;
use std::time::Duration;

/// How a run is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `cluster` program that is measured.
    pub program: PathBuf,
    /// The program of the fan-out.
    pub fanout: PathBuf,
    /// Other `cluster` programs, measured in turn with it: their names and files.
    pub also: Vec<(String, PathBuf)>,
    /// Parts of the run; empty: all.
    pub only: Vec<String>,
    /// About two minutes, with fewer and shorter rounds.
    pub quick: bool,
    /// Rounds of what is compared.
    pub rounds: usize,
    /// How long a round is.
    pub time: Duration,
    /// How often a node is killed.
    pub kills: usize,
    /// How often a node is stopped.
    pub hangs: usize,
    /// Bytes that the load works on.
    pub region: u64,
    /// Bytes that a replica misses, and then gets.
    pub missed: u64,
    /// How long the cluster is watched at rest.
    pub rest: Duration,
    /// Where memory is a file system.
    pub memory: PathBuf,
    /// A directory on a disk.
    pub disk: PathBuf,
}
