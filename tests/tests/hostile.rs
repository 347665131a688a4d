//! A share of the hostile inputs: all that are kept, and changes of them from a fixed seed. `cargo run --release -p
//! tests --bin hostile` runs as many more as one likes, and repeats one.

use tests::hostile::{TARGETS, Until, drive, find, memory::Counting};

#[global_allocator]
static COUNTING: Counting = Counting;

const SEED: u64 = 1;

fn run(name: &str, inputs: u64) {
    let target = find(name).expect("a target of this name");
    let report = drive(target, Until::Inputs(inputs), SEED).unwrap_or_else(|failure| panic!("{failure:?}"));
    assert!(report.inputs > inputs && report.features > 10, "{name}: {report:?}");
}

#[test]
fn every_target_is_run_here() {
    let source = include_str!("hostile.rs");
    for target in TARGETS {
        assert!(source.contains(&format!("run(\"{}\"", target.name)), "{}", target.name);
    }
}

#[test]
fn frames() {
    run("frames", 50_000);
}
#[test]
fn requests() {
    run("requests", 4_000);
}
#[test]
fn meta() {
    run("meta", 1_500);
}
#[test]
fn iscsi() {
    run("iscsi", 8_000);
}
#[test]
fn scsi() {
    run("scsi", 8_000);
}
#[test]
fn commands() {
    run("commands", 2_000);
}
#[test]
fn raft() {
    run("raft", 5_000);
}
#[test]
fn metadata() {
    run("metadata", 2_000);
}
#[test]
fn config() {
    run("config", 4_000);
}
