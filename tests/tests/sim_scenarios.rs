//! Sequences of events that break weaker designs, each by name. Every one of them ends as a seed does: everything
//! heals, every request is answered, all replicas become equal and clean, and the history is checked.

use tests::sim::{Fault, MS, Outcome, Party, SECOND, Setup, World, run_scenario};

const A: Party = Party::Node(0);
const B: Party = Party::Node(1);
const C: Party = Party::Node(2);
const GATEWAY: Party = Party::Gateway(0);

fn scenario(story: impl FnOnce(&mut World)) -> Outcome {
    scenario_of(99, story)
}

/// A seed decides what a power cut leaves, among other things.
fn scenario_of(seed: u64, story: impl FnOnce(&mut World)) -> Outcome {
    match run_scenario(Setup::quiet(seed), story) {
        Ok(outcome) => outcome,
        Err(failure) => panic!("{failure}"),
    }
}

/// Every block of the first `count` is written and flushed.
fn fill(world: &mut World, count: u64) {
    for first in (0..count).step_by(64) {
        world.write(0, 0, first, 64.min(count - first), false);
        world.answered();
    }
    world.flush(0, 0);
    world.answered();
}

fn start(world: &mut World, node: usize) {
    if world.nodes[node].is_down() {
        world.start_node(node);
    }
}

#[test]
fn a_late_copy_does_not_replace_a_newer_write() {
    let outcome = scenario(|w| {
        w.open();
        fill(w, 256);
        // Nodes connect for their first copy; that connection is there when the paths are cut.
        leave_for_a_moment(w, C);
        fill(w, 64);
        w.until("c is back", |w| w.members() == [0, 1, 2]);
        leave_for_a_moment(w, C);
        fill(w, 64);
        for source in [A, B] {
            w.cut(source, C);
        }
        w.until("c is back, by way of the gateway", |w| w.members() == [0, 1, 2]);
        w.write(1, 0, 0, 64, false);
        w.answered();
        for source in [A, B] {
            w.join_up(source, C);
        }
        w.run_for(SECOND);
        for first in [0, 64, 128, 192] {
            w.read(1, 0, first, 64);
            w.answered();
        }
    });
    assert!(outcome.counters.late_copies > 0, "a copy was late");
}

/// The gateway loses its connection to a node, whose process goes on.
fn leave_for_a_moment(world: &mut World, party: Party) {
    let Party::Node(node) = party else { panic!("{party:?} is no node") };
    world.reset_link(0, node);
    world.until("it has left", |w| !w.members().contains(&node));
}

#[test]
fn a_node_that_restarts_between_a_write_and_the_flush_leaves_first() {
    scenario(|w| {
        w.open();
        w.write(0, 0, 10, 8, false);
        w.answered();
        // Its process reopens the replica without its cache; the connections survive.
        w.nodes[1].disk.faults.fail_sync = true;
        w.flush(0, 0);
        w.answered();
        assert!(!w.members().contains(&1), "the flush was answered without it: {:?}", w.members());
        w.kill_node(0, true);
        w.kill_node(2, true);
        w.run_for(SECOND);
        start(w, 0);
        start(w, 2);
    });
}

#[test]
fn an_addition_whose_answer_is_lost_counts_both_sets() {
    scenario(|w| {
        w.open();
        w.kill_node(2, false);
        w.until("c has left", |w| w.members() == [0, 1]);
        fill(w, 32);
        w.cut(Party::Control, GATEWAY);
        start(w, 2);
        w.until("c is added, and the gateway does not know", |w| w.members() == [0, 1, 2]);
        w.write(1, 0, 0, 4, false);
        w.run_for(200 * MS);
        w.kill_node(0, true);
        w.kill_node(1, true);
        w.join_up(Party::Control, GATEWAY);
        w.run_for(4 * SECOND);
    });
}

#[test]
fn a_write_races_with_a_clean() {
    scenario(|w| {
        w.open();
        for round in 0..40 {
            w.write(0, 0, round % 3, 1, false);
            w.answered();
            // The clean of the idle region is about due.
            w.run_for(3_480 * MS + round * 40 * MS);
            if round % 8 == 7 {
                w.kill_node((round / 8 % 3) as usize, true);
                w.run_for(SECOND);
                start(w, (round / 8 % 3) as usize);
            }
        }
    });
}

#[test]
fn a_write_that_a_joining_replica_missed_holds_its_join_up() {
    scenario(|w| {
        w.open();
        fill(w, 256);
        for round in 0..20 {
            w.kill_node(2, false);
            w.until("c has left", |w| w.members() == [0, 1]);
            w.write(0, 0, round, 16, false);
            start(w, 2);
            // Writes go on while it attaches, lists and is equalised.
            while w.members() != [0, 1, 2] {
                for client in 1..8 {
                    if w.client_is_idle(client) {
                        w.write(client, 0, round + client as u64, 8, false);
                    }
                }
                w.run_for(300);
            }
            w.kill_node(0, true);
            w.run_for(2 * SECOND);
            start(w, 0);
            w.until("a is back", |w| w.members() == [0, 1, 2]);
        }
    });
}

#[test]
fn a_take_over_that_reaches_only_a_restarted_member_waits_for_the_others() {
    scenario(|w| {
        w.open();
        w.write(0, 0, 10, 8, false);
        w.answered();
        w.kill_gateway(0);
        w.kill_node(0, true);
        w.cut(Party::Gateway(1), B);
        w.cut(Party::Gateway(1), C);
        start(w, 0);
        w.want_on(1, true);
        w.until("the session is there", |w| w.gateways[1].takes_requests());
        w.read(1, 1, 10, 8);
        w.run_for(20 * SECOND);
        assert!(!w.idle(), "what only a restarted member may know is not read");
        w.join_up(Party::Gateway(1), B);
        w.join_up(Party::Gateway(1), C);
        w.answered();
    });
}

#[test]
fn two_losses_after_one_another_lose_no_acknowledged_write() {
    for seed in 1..=10 {
        let outcome = scenario_of(seed, |w| {
            w.open();
            w.write(0, 0, 10, 8, false);
            w.answered();
            let written = w.history.len() as u32;
            // All of this before the mirror would have flushed by itself.
            w.kill_node(0, false);
            w.until("a has left", |w| w.members() == [1, 2]);
            w.kill_node(1, false);
            w.until("b has left", |w| w.members() == [2]);
            w.kill_node(2, true);
            w.run_for(SECOND);
            start(w, 2);
            w.read(0, 0, 10, 8);
            w.answered();
            // POWER ON would excuse its loss; the flush of those that stayed, before each removal, does better.
            assert!(
                w.history.last_read().iter().all(|v| *v == written),
                "{written} became {:?}",
                w.history.last_read()
            );
        });
        assert_eq!(outcome.counters.recovers, 0, "nobody had to be asked");
    }
}

#[test]
fn what_the_last_member_acknowledged_survives_its_power_cut() {
    for seed in 1..=10 {
        scenario_of(seed, |w| {
            w.open();
            w.kill_node(0, false);
            w.kill_node(1, false);
            w.until("only c is left", |w| w.members() == [2]);
            w.write(0, 0, 10, 8, false);
            w.answered();
            let written = w.history.len() as u32;
            w.kill_node(2, true);
            w.run_for(SECOND);
            start(w, 2);
            w.read(0, 0, 10, 8);
            w.answered();
            assert!(
                w.history.last_read().iter().all(|v| *v == written),
                "{written} became {:?}",
                w.history.last_read()
            );
        });
    }
}

#[test]
fn a_gateway_that_was_cut_off_with_one_replica_reads_nothing_old() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        let other = Party::Gateway(1);
        for (a, b) in [(GATEWAY, Party::Control), (GATEWAY, B), (GATEWAY, C), (other, A)] {
            w.cut(a, b);
            w.cut(b, a);
        }
        w.want_on(1, true);
        for _ in 0..150 {
            if w.gateways[0].takes_requests() && w.client_is_idle(0) {
                w.read(0, 0, 0, 4);
            }
            if w.gateways[1].takes_requests() && w.client_is_idle(1) {
                w.write(1, 1, 0, 4, false);
            }
            w.run_for(100 * MS);
        }
        assert_eq!(w.members(), [1, 2], "the new owner went on without the one that it can't reach");
    });
}

#[test]
fn a_gateway_that_slept_past_its_lease_answers_nothing() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        w.read(1, 0, 0, 8);
        w.write(2, 0, 8, 8, false);
        // The nodes answer while it sleeps.
        w.halt(GATEWAY);
        w.run_for(8 * SECOND);
        w.want_on(1, false);
        w.until("the other serves", |w| w.gateways[1].takes_requests());
        w.write(3, 1, 0, 16, false);
        w.until("the write is done", |w| w.client_is_idle(3));
        w.go_on(GATEWAY);
        w.run_for(SECOND);
        w.read(3, 1, 0, 16);
        w.answered();
    });
}

#[test]
fn two_sectors_of_one_block_are_both_kept() {
    scenario(|w| {
        w.open();
        for round in 0..20 {
            w.merge(0, 0, 5, 0, 1, false);
            w.merge(1, 0, 5, 1, 1, false);
            w.merge(2, 0, 5, 7, 1, round % 2 == 0);
            w.answered();
            w.read(0, 0, 5, 1);
            w.answered();
        }
    });
}

#[test]
fn a_bad_block_is_repaired_beside_writes() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        w.until("everything is on the disks", |w| w.is_in_order());
        for node in 0..2 {
            assert!(w.flip(node, 7), "block 7 is at rest");
        }
        for client in 0..6 {
            w.read(client, 0, 0, 16);
            w.run_for(200);
        }
        w.write(6, 0, 4, 8, false);
        w.write(7, 0, 7, 1, false);
        w.answered();
    });
}

#[test]
fn an_aborted_write_is_awaited_once_it_is_out() {
    let outcome = scenario(|w| {
        w.open();
        w.nodes[1].disk.faults.slow = 100;
        w.write(0, 0, 5, 8, false);
        w.write(1, 0, 5, 8, false);
        w.run_for(5 * MS);
        w.give_up(0);
        w.give_up(1);
        w.answered();
        w.read(2, 0, 5, 8);
        w.answered();
    });
    assert_eq!(outcome.counters.aborted, 1, "only the one that had no lock was dropped");
}

#[test]
fn an_outage_of_the_whole_mirror_is_followed_by_a_foreign_session() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        w.write(0, 0, 0, 16, false);
        w.halt(GATEWAY);
        for node in 0..3 {
            w.kill_node(node, true);
        }
        w.run_for(SECOND);
        for node in 0..3 {
            start(w, node);
        }
        w.want_on(1, true);
        w.until("the other serves", |w| w.gateways[1].takes_requests());
        w.write(3, 1, 0, 8, false);
        w.until("the write is done", |w| w.client_is_idle(3));
        w.go_on(GATEWAY);
        w.run_for(2 * SECOND);
    });
}

#[test]
fn a_node_that_was_away_gets_back_about_what_it_missed() {
    scenario(|w| {
        w.open();
        fill(w, 700);
        w.until("everything is clean", |w| w.is_in_order());
        w.kill_node(2, false);
        w.until("c has left", |w| w.members() == [0, 1]);
        fill(w, 64);
        start(w, 2);
        w.until("c is back", |w| w.members() == [0, 1, 2]);
        let copied = w.status(0).copied_bytes;
        assert!((64 * 4096..=77 * 4096).contains(&copied), "{copied} bytes copied for 64 blocks");
    });
}

#[test]
fn a_restart_of_an_idle_cluster_copies_nothing() {
    let outcome = scenario(|w| {
        w.open();
        fill(w, 700);
        w.close_session(0);
        w.want_on(1, false);
        w.until("it is closed", |w| w.gateways[0].session.is_none());
        for node in 0..3 {
            w.kill_node(node, true);
        }
        for node in 0..3 {
            start(w, node);
        }
        w.until("it is open again", |w| w.gateways[1].takes_requests());
        w.run_for(10 * SECOND);
        assert_eq!(w.status(1).compared_bytes, 0);
    });
    assert_eq!((outcome.counters.copied_bytes, outcome.counters.power_ons), (0, 0));
}

#[test]
fn killing_every_process_at_once_loses_nothing_that_was_acknowledged() {
    let mut power_ons = 0;
    for seed in 1..=12 {
        let faults = vec![Fault::KillAll, Fault::KillNode, Fault::CutGateway, Fault::TakeOver];
        let setup = Setup { ops: 400, faults, fault_every: 700 * MS, ..Setup::of_seed(seed, 400) };
        match tests::sim::run_seed(setup) {
            Ok(outcome) => power_ons += outcome.counters.power_ons,
            Err(failure) => panic!("{failure}"),
        }
    }
    assert_eq!(power_ons, 0, "a kill was taken for the loss of a cache");
}

#[test]
fn every_fault_alone_is_survived() {
    for (seed, fault) in (1..).zip(Fault::ALL) {
        let setup = Setup { ops: 400, faults: vec![fault], fault_every: 500 * MS, ..Setup::of_seed(seed, 400) };
        if let Err(failure) = tests::sim::run_seed(setup) {
            panic!("{}: {failure}", fault.name());
        }
    }
}
