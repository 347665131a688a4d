//! Hostile bytes: whatever comes from a network, a disk or a file is refused or understood. It never brings a process
//! down, never makes it hold more than it says it does, and never keeps it busy for good.
//!
//! Each [`Target`] gives an input to the shipping code, as deep as it goes: not to a parser alone, but to the state
//! machine behind it, whose invariants it checks. The inputs' formats are the targets' own: checksums and numbers that
//! only a peer with a memory gets right are put right by the target where the input says so, since everything else
//! would end at them.
//!
//! - [`drive`]: kept inputs, then changed ones ([`mutate`]); `tests/tests/hostile.rs` runs a share, the program
//!   `hostile` as many as one likes, `tests/fuzz` the same functions under cargo-fuzz;
//! - [`memory`]: what an input makes the product hold;
//! - [`frames`], [`replica`]: the replica protocol, requests to a replica, meta files;
//! - [`iscsi`], [`portal`], [`unit`]: connections of initiators, SCSI commands;
//! - [`control`]: gRPC messages, raft messages, log entries and snapshots;
//! - [`config`]: configuration files.

pub mod config;
pub mod control;
pub mod drive;
pub mod frames;
pub mod iscsi;
pub mod memory;
pub mod mutate;
pub mod portal;
pub mod replica;
pub mod source;
pub mod unit;

pub use drive::{Failure, Report, Until, check, corpus, corpus_dir, drive, replay};
use source::Seen;

/// Something that takes bytes.
pub struct Target {
    pub name: &'static str,
    /// What its inputs are.
    pub about: &'static str,
    pub run: fn(&[u8], &mut Seen),
    /// Bytes that one input may make the thread hold, what stands in for disks and peers included.
    pub memory: usize,
    /// Inputs that mean something, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words that mean something.
    pub words: &'static [&'static [u8]],
    /// Where an input's records begin.
    pub records: fn(&[u8]) -> Vec<usize>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "frames",
        about: "frames of the replica protocol, in pieces",
        run: frames::run,
        memory: frames::MEMORY,
        seeds: frames::seeds,
        words: frames::WORDS,
        records: frames::records,
    },
    Target {
        name: "requests",
        about: "frames of the replica protocol, to a replica",
        run: replica::run_requests,
        memory: replica::MEMORY,
        seeds: replica::request_seeds,
        words: frames::WORDS,
        records: frames::records,
    },
    Target {
        name: "meta",
        about: "changes of a replica's meta file, which is opened, read, written and opened again",
        run: replica::run_meta,
        memory: replica::MEMORY,
        seeds: replica::meta_seeds,
        words: &[],
        records: replica::meta_records,
    },
    Target {
        name: "iscsi",
        about: "an initiator's connection: login, text, session",
        run: iscsi::run,
        memory: iscsi::MEMORY,
        seeds: iscsi::seeds,
        words: iscsi::WORDS,
        records: iscsi::records,
    },
    Target {
        name: "portal",
        about: "the same to a portal, over a socket",
        run: portal::run,
        memory: portal::MEMORY,
        seeds: portal::seeds,
        words: iscsi::WORDS,
        records: portal::records,
    },
    Target {
        name: "scsi",
        about: "SCSI commands with their data",
        run: unit::run,
        memory: unit::MEMORY,
        seeds: unit::seeds,
        words: &[],
        records: unit::records,
    },
    Target {
        name: "commands",
        about: "gRPC messages to a leader",
        run: control::run_commands,
        memory: control::MEMORY,
        seeds: control::command_seeds,
        words: &[],
        records: control::records,
    },
    Target {
        name: "raft",
        about: "raft messages to a voter",
        run: control::run_raft,
        memory: control::MEMORY,
        seeds: control::raft_seeds,
        words: &[],
        records: control::records,
    },
    Target {
        name: "metadata",
        about: "log entries and snapshots to the metadata machine",
        run: control::run_metadata,
        memory: control::MEMORY,
        seeds: control::metadata_seeds,
        words: control::METADATA_WORDS,
        records: control::records,
    },
    Target {
        name: "config",
        about: "node.toml and gateway.toml",
        run: config::run,
        memory: config::MEMORY,
        seeds: config::seeds,
        words: config::WORDS,
        records: config::records,
    },
];

/// The target of this name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Gives an input to the target of this name: what the targets of cargo-fuzz call.
///
/// # Panics
/// When the target does, or there is none.
pub fn fuzz(name: &str, input: &[u8]) {
    check(find(name).expect("a target of this name"), input);
}
