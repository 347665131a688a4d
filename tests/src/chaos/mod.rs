//! Chaos on real processes: a cluster whose members live in network namespaces of their own, killed, stopped, cut
//! off and run out of disk at random, under initiators that check every answer.
//!
//! - [`lab`]: namespaces, links, disks and processes, and what can be done to them;
//! - [`plan`]: what is done when, drawn from a seed, and the book that says what a cluster must survive;
//! - [`race`]: initiators that write over one another, checked for linearizability as the simulation is;
//! - [`watch`]: what the cluster says of itself;
//! - [`run`]: a run from the first process to the verdict;
//! - [`report`]: what was done, and how long commands took meanwhile.
//!
//! Everything happens in namespaces that end with the run, also when it is killed: network, mounts and processes.
//! The machine's own are not touched.
//!
//! # What is injected, and what is withheld
//!
//! SIGKILL and SIGSTOP of any process, alone and together, shorter and longer than a lease; cuts between any two
//! members, of one member from all, both ways and one way; reset connections; disks that fill up; volumes that move
//! from one gateway to another, whether the first one is dead, stopped, cut off or well. Withheld is what may lose
//! data by design, or what the volume may answer with an error:
//!
//! - While a node's disk is full, or was and it is not in sync again, one other node stays untouched
//!   ([`plan::Book`]).
//! - A majority of the voters is taken away for seconds only, so that a run gets on. I/O waits meanwhile (R12).

pub mod lab;
pub mod plan;
pub mod race;
pub mod report;
pub mod run;
pub mod watch;

use std::path::PathBuf;
use std::time::Duration;

/// What a run is to be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long faults are injected.
    pub lasts: Duration,
    /// Decides every choice.
    pub seed: u64,
    /// Where logs and configurations go; made if it is not there.
    pub dir: PathBuf,
    /// 1 or 2.
    pub gateways: usize,
    /// Only these kinds of faults; empty: all.
    pub only: Vec<plan::Kind>,
    /// Instead of a random plan: each long fault alone, one after the other.
    pub drills: bool,
}
