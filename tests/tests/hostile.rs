//! A share of the hostile inputs: all that are kept, and changes of them from a fixed seed. `cargo run --release -p
//! tests --bin hostile` runs as many more as one likes, and repeats one.

use tests::hostile::source::Seen;
use tests::hostile::{TARGETS, Target, Until, drive, find, memory::Counting, replay};

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

/// A target that goes wrong when an input holds this byte.
const BAD: u8 = 0xee;

fn goes_wrong(name: &'static str, run: fn(&[u8], &mut Seen)) {
    let target = Target {
        name,
        about: "",
        run,
        memory: 1 << 20,
        seeds: || vec![vec![0; 100]],
        words: &[],
        records: |input| (0..input.len()).step_by(50).collect(),
    };
    let target: &'static Target = Box::leak(Box::new(target));
    let failure = drive(target, Until::Inputs(100_000), SEED).expect_err("a bad byte comes up");
    let input = std::fs::read(&failure.file).expect("the input is kept");
    assert!(input.contains(&BAD), "{input:?}");
    let again = replay(target, &failure.file).expect_err("it is repeated");
    assert_eq!(again.why, failure.why);
    std::fs::remove_file(&failure.file).expect("it was there");
}

#[test]
fn a_panic_is_found_and_repeated() {
    goes_wrong("test-panic", |input, _| assert!(!input.contains(&BAD), "a bad byte"));
}

#[test]
fn too_much_memory_is_found_and_repeated() {
    goes_wrong("test-memory", |input, _| {
        // Reserved, not touched: what a believed length does.
        let len = if input.contains(&BAD) { 2 << 20 } else { 1 << 10 };
        drop(std::hint::black_box(Vec::<u8>::with_capacity(len)));
    });
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
    run("meta", 400);
}
#[test]
fn iscsi() {
    run("iscsi", 8_000);
}
#[test]
fn portal() {
    run("portal", 500);
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
