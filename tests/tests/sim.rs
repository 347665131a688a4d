//! A fixed share of the simulation's seeds, and the seeds that once failed. `cargo run --release -p tests --bin sim`
//! runs as many more as one likes.

use tests::sim::{Counters, Setup, run_seed};

/// Requests of one seed.
const OPS: u64 = 1000;

fn run(seeds: impl Iterator<Item = u64>) -> Counters {
    let mut total = Counters::default();
    for seed in seeds {
        match run_seed(Setup::of_seed(seed, OPS)) {
            Ok(outcome) => total.add(&outcome.counters),
            Err(failure) => panic!("{failure}"),
        }
    }
    total
}

#[test]
fn no_seed_loses_or_mixes_data() {
    let total = run(1..=60);
    assert!(total.completed > 20_000, "{total:?}");
    assert!(total.faults.len() > 15, "faults of every class are injected: {total:?}");
    assert!(total.joins > 50 && total.power_ons > 20 && total.set_changes > 100, "{total:?}");
}

/// Each failed once; the commit that mended it tells how.
#[test]
fn seeds_that_found_faults_find_them_no_more() {
    let seeds = [
        2, 46, 32, 35, 53, 218, 227, 473, 503, 1075, 1150, 1187, 2045, 3029, 3041, 3209, 3292, 6047, 6140, 10_201,
        20_029, 200_222, 1_000_163, 1_005_257, 1_005_422, 2_000_523, 2_005_019,
    ];
    run(seeds.into_iter());
}

#[test]
fn a_seed_is_one_run() {
    for seed in [3, 7, 11, 23] {
        let digest = || run_seed(Setup::of_seed(seed, OPS)).map_err(|f| f.to_string()).expect("passes").digest;
        assert_eq!(digest(), digest(), "seed {seed}");
    }
}
