//! The replication protocol of one mirror as a small model, checked exhaustively: every order of events within the
//! bounds, not a sample of them. The simulation runs the code itself over random orders; this runs a description of
//! it over all. Where the two say different things, one of them is wrong.
//!
//! ```sh
//! cargo run --release -p model                                  # every configuration: states seen, depth, time
//! cargo run --release -p model -- --config B4 --mutant ReplyAfterLease      # an error, step by step
//! cargo run --release -p model -- --mutants                     # each planted error in every configuration
//! cargo run --release -p model -- --list
//! ```
//!
//! # What is modelled
//!
//! Three replicas, or two, of one block in one region, two gateways, and raft as one register. Writes are numbered and
//! write their number. A replica's disk holds the block (what is read now, and the set of what a power cut may leave of
//! it), the region's dirty bit, its epochs, set version and clean. A request is sent, taken by the replica (the dirty
//! bit is durable and the disk has the data), done, answered and heard: five moments between which anything else may
//! happen. Requests and answers overtake each other, also those of one connection; those of an attach that was given up
//! may still arrive as long as the replica's process has seen no newer one. An answer under an attach that was given up
//! is never heard.
//!
//! | what happens here | stands for |
//! |---|---|
//! | `Attach`, `Take(Attach)` | `Mirror::attach_where_due`, `ReplicaCore::take_attach`, `continue_attach`, `attach_stored`, `Mirror::attached` |
//! | `GiveUp`, `Fenced` | `Mirror::give_up` with all it calls; `Mirror::stop` |
//! | `DecideWithout`, and at once when all answered | `Mirror::advance_opening`, `decide`, `find_old_images`, `try_release`, `extra_base_lost`, `store_set_again`, `reopen` |
//! | after that, at once | `Mirror::begin_replay`, `advance_replay`, `advance_kept`, `begin_serving`; `Replay::keep`, `flushed` |
//! | `Write`, `Take`, `Finish`, `Hear` | `Mirror::write`, `ReplicaCore::write`, `may_change_or_wait`, `write_done`, `Mirror::reconsider`, `required` |
//! | `Read`, `ReadFrom` | `Mirror::pick`, `read`; the lease as in `VolumeSession::step` |
//! | `Flush`, `Take(Flush)`, `Finish(Flush)` | `Mirror::want_flush`, `advance_flush`, `ReplicaCore::start_flush_pass`, `continue_flush` |
//! | `Overdue` | `limits::MAX_UNFLUSHED_MS` |
//! | `Decide`, `Decided`, `AnswerLost` | `Command::ChangeSet` (`change_set`, `owned`), `decide_set`; `Mirror::shrink`, `propose`, `set_decided`, `ReplicaCore::store_set` |
//! | joins, at once | `Mirror::start_join`, `advance_joins`, `listed`, `counting` |
//! | `Base`, `Take(CopyTo)`, `Take(Copy)` | `Mirror::equalise_locked`, `plan`, `base_ranks`, `copy`, `equalise_lost`; `ReplicaCore::advance_copy`, `check_copy` |
//! | `CleanDue`, `Take(Clean)`, `Finish(Clean)` | `Mirror::advance_clean`, `ReplicaCore::clean`, `settled`, `unchanged_since`; `settle` |
//! | `Close` | `Mirror::begin_close`, `advance_close` |
//! | `PowerCut`, `AllCut`, `Kill`, `RestoreImage` | a new process: `ReplicaCore::open`, with less than before on its disk, all of it, or what was there once; `Journal::recover`, `find_whole` |
//! | `Fault` | `ReplicaCore::fault`, `void_journal`, and the opening after it |
//! | `Open`, `Die`, `LeaseOver` | `Command::OpenSession`; the leader's lease table; a gateway's process |
//!
//! What a gateway does without waiting for anybody (`Mirror::advance`) is one step. Time-outs, idle times and the
//! patience of an opening are choices: they may end at any moment.
//!
//! # Bounds, and what they leave out
//!
//! Each configuration says how often what may happen (`CONFIGS`), and all of its states are seen; none is cut off by
//! time or depth. States that differ only in how the replicas are numbered, or in the numbers of flushes that nobody
//! waits for, count once.
//!
//! Left out: checksums and blocks bad against them, torn blocks and pages, failing disks (R10; `broken`, restamps);
//! several blocks or regions, so whatever joins them (merges, one lock over many, cleans of many regions, several
//! copies at a time); relayed copies; allocation; more than one request of the volume at a time besides a flush;
//! `min-in-sync`, `recover-volume`, replacement; `--write-cache off`; raft itself; clocks: a lease ends when it ends,
//! and the leader knows. Regions and hashes are listed, suspects settled and regions marked at the moment they are
//! asked for; in some configurations sets are stored and flushes done so too (`store_at_once`, `flush_at_once`), and
//! answers heard when made unless `late`. All that an owner keeps is one block, so one write is replayed at a time;
//! that it keeps everything (`Replay::complete`) is so as soon as this one region is settled. A replica says at once
//! that it is whole again, and that it has lost something.
//!
//! Some rules were dropped in turn without any state of the configuration meant for them showing it, so no planted
//! error stands for them: that a region is served after a take-over only once it is flushed (what is lost then was lost
//! with every cache, and initiators are told); that of restarted members the dirty ones are bases before the clean
//! ones; that the lease is looked at after the last answer of a single read, not when it was asked for; that what is
//! replayed goes to joining replicas too (they are equalised afterwards), and is not replayed where a member has it.
//! And answers under an attach that was given up could count in `A2`: what they would tell is not wrong there.
//!
//! "Given up though held" (R8) does not count a killed member that is taken for an old image, since it was killed
//! before it stored that this session keeps it, while another one stored that and lost its cache then (R6).

pub mod check;
pub mod config;
mod gateway;
mod replica;
pub mod run;
pub mod state;

pub use config::{CONFIGS, Config, Mutant, config};
pub use run::{Outcome, Trace, run};
