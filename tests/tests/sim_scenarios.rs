//! Sequences of events that break weaker designs, each by name. Every one of them ends as a seed does: everything
//! heals, every request is answered, all replicas become equal and clean, and the history is checked.

use tests::sim::{Fault, MS, Outcome, Party, SECOND, Setup, World, run_scenario, run_story};

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
        w.until("c is back", |w| w.in_sync() == [0, 1, 2]);
        leave_for_a_moment(w, C);
        fill(w, 64);
        for source in [A, B] {
            w.cut(source, C);
        }
        w.until("c is back, by way of the gateway", |w| w.in_sync() == [0, 1, 2]);
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
    world.until("it has left", |w| !w.in_sync().contains(&node));
}

#[test]
fn a_node_that_restarts_between_a_write_and_the_flush_leaves_first() {
    scenario(|w| {
        w.open();
        w.write(0, 0, 10, 8, false);
        w.answered();
        // Its process reopens the replica without its cache; the connections survive.
        w.nodes[1].faults.fail_sync = true;
        w.flush(0, 0);
        w.answered();
        assert!(!w.in_sync().contains(&1), "the flush was answered without it: {:?}", w.in_sync());
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
        w.until("c has left", |w| w.in_sync() == [0, 1]);
        fill(w, 32);
        w.cut(Party::Control, GATEWAY);
        start(w, 2);
        w.until("c is added, and the gateway does not know", |w| w.in_sync() == [0, 1, 2]);
        w.write(1, 0, 0, 4, false);
        w.run_for(200 * MS);
        w.kill_node(0, true);
        w.kill_node(1, true);
        w.join_up(Party::Control, GATEWAY);
        w.run_for(4 * SECOND);
    });
}

#[test]
fn a_replica_that_comes_while_the_last_member_is_away_does_not_join_without_it() {
    let outcome = scenario(|w| {
        w.open();
        w.kill_node(0, false);
        w.kill_node(1, false);
        w.until("only c is left", |w| w.in_sync() == [2]);
        // Neither of the others has ever heard of this region.
        w.write(0, 0, 300, 8, false);
        w.answered();
        w.cut(Party::Control, GATEWAY);
        start(w, 0);
        w.until("a is added, and the gateway does not know", |w| w.in_sync() == [0, 2]);
        w.cut(GATEWAY, C);
        w.reset_link(0, 2);
        start(w, 1);
        w.run_for(2 * SECOND);
        w.join_up(Party::Control, GATEWAY);
        w.until("b is added", |w| w.in_sync() == [0, 1]);
        w.kill_node(0, false);
        w.read(1, 0, 300, 8);
        w.answered();
    });
    assert_eq!(outcome.counters.power_ons, 0);
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
            w.until("c has left", |w| w.in_sync() == [0, 1]);
            w.write(0, 0, round, 16, false);
            start(w, 2);
            // Writes go on while it attaches, lists and is equalised.
            while w.in_sync() != [0, 1, 2] {
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
            w.until("a is back", |w| w.in_sync() == [0, 1, 2]);
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
        w.until("the session is there", |w| w.takes_requests(1));
        w.read(1, 1, 10, 8);
        w.run_for(20 * SECOND);
        assert!(!w.idle(), "what only a restarted member may know is not read");
        w.join_up(Party::Gateway(1), B);
        w.join_up(Party::Gateway(1), C);
        w.answered();
    });
}

#[test]
fn a_region_waits_for_those_that_left_in_the_next_session_too() {
    for same_session in [true, false] {
        let outcome = scenario(|w| {
            w.open();
            fill(w, 64);
            w.leave_two_behind();
            let gateway = w.attach_again(same_session);
            w.read(1, gateway, 10, 8);
            w.run_for(10 * SECOND);
            assert!(!w.idle(), "what only a restarted member may know is not read");
            w.join_up(Party::Gateway(gateway), B);
            w.join_up(Party::Gateway(gateway), C);
            w.answered();
        });
        assert_eq!(outcome.counters.recovers, 0, "those that it waited for had it");
    }
}

#[test]
fn what_was_written_after_others_left_is_not_replaced_by_what_they_have() {
    for same_session in [true, false] {
        let outcome = scenario(|w| w.read_what_others_have_missed(same_session));
        assert_eq!(outcome.counters.recovers, 1, "nobody but an operator can tell");
    }
}

#[test]
fn what_was_written_under_a_bad_map_page_is_not_replaced_by_what_those_that_left_have() {
    for same_session in [true, false] {
        let setup = Setup { blocks: 1600, ..Setup::quiet(99) };
        let outcome = run_scenario(setup, |w| w.read_what_was_written_under_a_bad_page(same_session));
        let outcome = outcome.unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!(outcome.counters.recovers, 1, "nobody but an operator can tell");
    }
}

#[test]
fn what_was_flushed_survives_a_power_cut_that_tears_its_map_page_everywhere() {
    for seed in 0..100 {
        scenario_of(seed, World::tear_the_map_page_of_what_is_clean);
    }
}

#[test]
fn what_a_bad_map_page_has_made_suspect_is_clean_again_in_the_same_session() {
    scenario(|w| {
        w.open();
        fill(w, 700);
        w.until("nothing is dirty", |w| w.is_in_order());
        w.kill_node(2, false);
        w.spoil_map(2, 0);
        w.start_node(2);
        w.until("c is back", |w| w.in_sync() == [0, 1, 2] && w.is_in_order());
        let mut suspect = 0;
        // Many at a time are spread over all replicas.
        for (region, round) in [0, 256, 512].into_iter().flat_map(|region| (0..15).map(move |round| (region, round))) {
            for client in 0..12 {
                w.read(client, 0, region + round * 12 + client as u64, 1);
            }
            w.answered();
            suspect = suspect.max(w.suspect(2));
        }
        assert_eq!(suspect, 3, "c was asked, and found its page bad");
        w.until("nobody suspects anything", |w| w.suspect(2) == 0 && w.is_in_order());
    });
}

#[test]
fn nothing_is_clean_before_a_take_over_has_settled_it() {
    scenario(World::clean_while_it_settles);
}

#[test]
fn a_join_does_not_miss_what_is_out_to_a_region_that_nobody_has_allocated() {
    scenario(World::join_while_a_write_is_out);
}

#[test]
fn a_slow_replica_joins_while_it_is_written_to() {
    scenario(World::join_under_writes);
}

#[test]
fn nothing_is_read_that_a_member_lacks_whose_removal_is_not_committed() {
    scenario(World::read_what_a_lost_member_lacks);
}

#[test]
fn a_region_waits_again_when_those_that_it_waited_for_are_lost() {
    let outcome = scenario(World::lose_those_that_were_waited_for);
    assert_eq!(outcome.counters.recovers, 0, "those that it waited for had it");
}

#[test]
fn what_a_killed_process_holds_is_not_replaced_by_what_power_cuts_have_left() {
    for seed in 1..=10 {
        let outcome = scenario_of(seed, |w| {
            w.open();
            fill(w, 64);
            w.write(0, 0, 10, 8, false);
            w.answered();
            w.kill_gateway(0);
            w.kill_node(0, false);
            w.kill_node(1, true);
            w.kill_node(2, true);
            w.cut(Party::Gateway(1), B);
            w.cut(Party::Gateway(1), C);
            (0..3).for_each(|node| start(w, node));
            w.want_on(1, true);
            w.until("the session is there", |w| w.takes_requests(1));
            w.until("it has decided", |w| w.status(1).unsettled > 0);
            w.join_up(Party::Gateway(1), B);
            w.join_up(Party::Gateway(1), C);
            w.read(1, 1, 10, 8);
            w.answered();
        });
        assert_eq!(outcome.counters.power_ons, 0, "one replica has lost nothing");
    }
}

#[test]
fn two_losses_after_one_another_lose_no_acknowledged_write() {
    for seed in 1..=10 {
        let outcome = scenario_of(seed, |w| {
            w.open();
            w.write(0, 0, 10, 8, false);
            w.answered();
            let written = w.history().len() as u32;
            // All of this before the mirror would have flushed by itself.
            w.kill_node(0, false);
            w.until("a has left", |w| w.in_sync() == [1, 2]);
            w.kill_node(1, false);
            w.until("b has left", |w| w.in_sync() == [2]);
            w.kill_node(2, true);
            w.run_for(SECOND);
            start(w, 2);
            w.read(0, 0, 10, 8);
            w.answered();
            // POWER ON would excuse its loss; the flush of those that stayed, before each removal, does better.
            assert!(
                w.history().last_read().iter().all(|v| *v == written),
                "{written} became {:?}",
                w.history().last_read()
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
            w.until("only c is left", |w| w.in_sync() == [2]);
            w.write(0, 0, 10, 8, false);
            w.answered();
            let written = w.history().len() as u32;
            w.kill_node(2, true);
            w.run_for(SECOND);
            start(w, 2);
            w.read(0, 0, 10, 8);
            w.answered();
            assert!(
                w.history().last_read().iter().all(|v| *v == written),
                "{written} became {:?}",
                w.history().last_read()
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
            if w.takes_requests(0) && w.client_is_idle(0) {
                w.read(0, 0, 0, 4);
            }
            if w.takes_requests(1) && w.client_is_idle(1) {
                w.write(1, 1, 0, 4, false);
            }
            w.run_for(100 * MS);
        }
        assert_eq!(w.in_sync(), [1, 2], "the new owner went on without the one that it can't reach");
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
        w.until("the other serves", |w| w.takes_requests(1));
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
fn a_bad_block_of_the_last_member_keeps_nobody_out() {
    let mut setup = Setup::quiet(99);
    setup.min_in_sync = 2;
    let story = |w: &mut World| {
        w.open();
        fill(w, 64);
        w.until("everything is on the disks", |w| w.is_in_order());
        w.kill_node(0, false);
        w.kill_node(1, false);
        w.until("only c is left", |w| w.in_sync() == [2]);
        // Writes wait for another replica, and only a write can mend the block.
        assert!(w.flip(2, 7), "block 7 is at rest");
        w.write(0, 0, 7, 1, false);
        w.write(1, 0, 20, 8, false);
        w.read(2, 0, 0, 16);
        start(w, 0);
        start(w, 1);
        w.answered();
        w.until("all are there", |w| w.in_sync() == [0, 1, 2]);
        w.read(2, 0, 0, 64);
        w.answered();
    };
    run_scenario(setup, story).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn what_was_taken_over_as_bad_is_not_served_after_a_write_that_fails_beside_it() {
    scenario(World::read_what_was_taken_over_as_bad);
}

#[test]
fn a_replica_that_came_back_mends_the_others() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        w.kill_node(1, true);
        w.until("b has left", |w| w.in_sync() == [0, 2]);
        w.write(0, 0, 30, 1, false);
        start(w, 1);
        w.until("b is back, and all is on the disks", |w| w.in_sync() == [0, 1, 2] && w.is_in_order());
        for node in [0, 2] {
            assert!(w.flip(node, 7), "block 7 is at rest");
        }
        // The reads of a chunk go to one replica; whichever it is, some find it bad.
        w.read(0, 0, 0, 64);
        w.answered();
        w.run_for(SECOND);
        w.kill_node(1, false);
        w.read(0, 0, 7, 1);
        w.answered();
        assert_eq!(w.history().last_read(), [1; 8]);
    });
}

#[test]
fn durable_writes_alone_do_not_fill_what_is_kept() {
    scenario(|w| {
        w.open();
        w.kill_node(2, false);
        w.until("c has left", |w| w.in_sync() == [0, 1]);
        w.write(0, 0, 0, 1, false);
        w.answered();
        // Some are acknowledged while the flush is out that the first one brings about.
        w.nodes[1].faults.slow = 20;
        for _ in 0..3000 {
            for client in (0..8).filter(|client| w.client_is_idle(*client)).collect::<Vec<_>>() {
                w.write(client, 0, client as u64 * 64, 64, true);
            }
            w.run_for(MS);
        }
        w.answered();
    });
}

#[test]
fn the_first_to_be_back_after_a_power_cut_does_not_spread_its_bad_blocks() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        w.until("everything is on the disks", |w| w.is_in_order());
        w.write(0, 0, 20, 8, false);
        w.answered();
        (0..3).for_each(|node| w.kill_node(node, true));
        assert!(w.flip(0, 7), "block 7 is at rest");
        start(w, 0);
        w.run_for(5 * SECOND);
        start(w, 1);
        start(w, 2);
        w.read(0, 0, 7, 1);
        w.answered();
        assert_eq!(w.history().last_read(), [1; 8]);
    });
}

#[test]
fn zeroes_that_were_read_after_a_take_over_survive_a_power_cut() {
    for seed in 1..=10 {
        scenario_of(seed, |w| {
            w.open();
            fill(w, 64);
            w.until("everything is on the disks", |w| w.is_in_order());
            w.zero(0, 0, 0, 256, false, true);
            w.answered();
            w.kill_gateway(0);
            w.want_on(1, true);
            w.until("the session is there", |w| w.takes_requests(1));
            w.read(1, 1, 0, 8);
            w.answered();
            (0..3).for_each(|node| w.kill_node(node, true));
            w.run_for(SECOND);
            (0..3).for_each(|node| start(w, node));
            w.read(1, 1, 0, 8);
            w.answered();
        });
    }
}

#[test]
fn what_is_written_again_does_not_undo_durable_writes() {
    for seed in 1..=60 {
        let story = |w: &mut World| {
            w.open();
            w.write(0, 0, 10, 8, false);
            w.answered();
            w.write(0, 0, 12, 4, true);
            w.answered();
            let written = w.history().len() as u32;
            (0..3).for_each(|node| w.kill_node(node, true));
            w.until("it is down", |w| !w.is_serving());
            (0..3).for_each(|node| start(w, node));
            w.until("what was kept is written, not flushed", |w| w.is_serving());
            w.kill_gateway(0);
            (0..3).for_each(|node| w.kill_node(node, true));
            w.run_for(SECOND);
            (0..3).for_each(|node| start(w, node));
            w.want_on(1, true);
            w.until("the session is there", |w| w.takes_requests(1));
            w.read(1, 1, 12, 4);
            w.answered();
            assert!(w.history().last_read().iter().all(|v| *v == written), "{:?}", w.history().last_read());
        };
        // Of two a power cut more often leaves the same on both.
        let setup = Setup { replicas: 2, ..Setup::quiet(seed) };
        run_scenario(setup, story).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn a_resync_keeps_to_its_limit_until_that_is_changed() {
    scenario(|w| {
        w.open();
        fill(w, 700);
        w.kill_node(1, true);
        w.run_for(5 * SECOND);
        fill(w, 700);
        // A region in 16 seconds.
        w.limit_resync(0, Some(64 << 10));
        let before = w.status(0).compared_bytes;
        start(w, 1);
        w.run_for(10 * SECOND);
        let compared = w.status(0).compared_bytes - before;
        assert!((1..=1 << 20).contains(&compared), "{compared} bytes in ten seconds");
        assert_ne!(w.in_sync(), [0, 1, 2]);
        w.limit_resync(0, None);
        w.until("b is back", |w| w.in_sync() == [0, 1, 2]);
    });
}

#[test]
fn reads_do_not_wait_for_a_slow_disk() {
    scenario(|w| {
        w.open();
        fill(w, 512);
        w.nodes[1].faults.slow = 5_000;
        let mut waited = 0;
        for block in (0..512).step_by(4) {
            let asked = w.now;
            w.read(0, 0, block, 4);
            w.answered();
            let took = w.now - asked;
            assert!(took < 100 * MS, "a read took {took} us");
            waited += u32::from(took > 30 * MS);
        }
        // One is late, and tells that the disk is slow; every two seconds another one may be.
        assert!((1..=3).contains(&waited), "{waited} reads were late");
        w.nodes[1].faults.slow = 0;
    });
}

#[test]
fn a_disk_that_is_somewhat_slower_is_read_now_and_then() {
    scenario(|w| {
        w.open();
        fill(w, 512);
        w.nodes[1].faults.slow = 300;
        let slow_reads = |w: &mut World| {
            let mut slow = 0;
            for block in (0..512).step_by(2) {
                let asked = w.now;
                w.read(0, 0, block, 2);
                w.answered();
                slow += u32::from(w.now - asked > 5 * MS);
            }
            slow
        };
        let first = slow_reads(w);
        assert!((3..20).contains(&first), "{first} slow reads; a third of them would be 85");
        let then = slow_reads(w);
        assert!((1..8).contains(&then), "{then} slow reads: it is asked, but seldom");
        w.nodes[1].faults.slow = 0;
    });
}

#[test]
fn an_aborted_write_is_awaited_once_it_is_out() {
    let outcome = scenario(|w| {
        w.open();
        w.nodes[1].faults.slow = 100;
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
        w.until("the other serves", |w| w.takes_requests(1));
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
        w.until("c has left", |w| w.in_sync() == [0, 1]);
        fill(w, 64);
        start(w, 2);
        w.until("c is back", |w| w.in_sync() == [0, 1, 2]);
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
        w.until("it is closed", |w| !w.gateways[0].has_sessions());
        for node in 0..3 {
            w.kill_node(node, true);
        }
        for node in 0..3 {
            start(w, node);
        }
        w.until("it is open again", |w| w.takes_requests(1));
        w.run_for(10 * SECOND);
        assert_eq!(w.status(1).compared_bytes, 0);
    });
    assert_eq!((outcome.counters.copied_bytes, outcome.counters.power_ons), (0, 0));
}

#[test]
fn an_attach_waits_for_the_writes_that_the_disk_has() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        for round in 0..10 {
            w.nodes[1].faults.slow = 200;
            w.write(0, 0, 0, 16, false);
            w.run_for(2 * MS);
            // The node has given it to its disk; the gateway attaches anew, and writes the same blocks again.
            w.reset_link(0, 1);
            w.run_for(round * 20 * MS);
            w.write(1, 0, 4, 16, false);
            w.run_for(SECOND);
            w.nodes[1].faults.slow = 0;
            w.answered();
            w.until("b is back", |w| w.in_sync() == [0, 1, 2]);
            w.read(2, 0, 0, 32);
            w.answered();
        }
    });
}

#[test]
fn a_removal_that_an_old_session_asked_for_comes_to_nothing_after_a_take_over() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        w.cut(GATEWAY, Party::Control);
        w.kill_node(2, false);
        w.write(0, 0, 0, 8, false);
        // The old owner asks for a set without c, over and over.
        w.run_for(2 * SECOND);
        start(w, 2);
        w.want_on(1, true);
        w.until("the other serves with all of them", |w| w.takes_requests(1) && w.in_sync() == [0, 1, 2]);
        w.join_up(GATEWAY, Party::Control);
        w.write(1, 1, 4, 8, false);
        w.run_for(3 * SECOND);
        assert_eq!(w.in_sync(), [0, 1, 2]);
    });
}

#[test]
fn an_isolated_leader_grants_no_lease_beside_a_new_one() {
    scenario(|w| {
        w.open();
        fill(w, 64);
        // A witness, once there was time to hand the lead to one.
        w.until("a witness leads", |w| w.leaders().iter().all(|m| *m >= 3) && w.leaders().len() == 1);
        let old = w.leaders()[0];
        let isolated = w.member_party(old);
        for member in (0..5).filter(|m| *m != old) {
            let other = w.member_party(member);
            w.cut(isolated, other);
            w.cut(other, isolated);
        }
        // The first gateway reaches the old leader only, the second one all others.
        w.cut(Party::Gateway(1), isolated);
        for other in (3..5).filter(|m| *m != old) {
            let other = w.member_party(other);
            w.cut(GATEWAY, other);
        }
        w.want_on(1, true);
        for _ in 0..150 {
            for gateway in 0..2 {
                if w.takes_requests(gateway) && w.client_is_idle(gateway) {
                    match gateway {
                        0 => w.read(0, 0, 0, 4),
                        _ => w.write(1, 1, 0, 4, false),
                    }
                }
            }
            w.run_for(100 * MS);
        }
        assert!(w.takes_requests(1), "the others elected one of them, and opened a session");
    });
}

#[test]
fn an_old_image_of_one_node_is_taken_for_new() {
    for (seed, take_over) in [(1, false), (2, true), (3, false), (4, true)] {
        scenario_of(seed, |w| {
            w.open();
            fill(w, 256);
            w.until("everything is clean", |w| w.is_in_order());
            w.copy_images(2);
            for _ in 0..3 {
                fill(w, 64);
                w.until("everything is clean again", |w| w.is_in_order());
            }
            w.kill_node(2, true);
            w.restore_images(2);
            if take_over {
                w.kill_gateway(0);
                w.want_on(1, false);
            }
            start(w, 2);
            let gateway = usize::from(take_over);
            w.until("it is served", |w| w.takes_requests(gateway));
            for first in [0, 64, 128, 192] {
                w.read(1, gateway, first, 64);
                w.answered();
            }
        });
    }
}

#[test]
fn voters_that_were_restored_from_an_old_image_stop_the_volume() {
    let mut refused = 0;
    for seed in 1..=6 {
        let outcome = run_story(Setup::quiet(seed), |w| {
            w.open();
            fill(w, 64);
            let n2 = Party::Node(2);
            // Node 2 votes no more, but keeps its replica: like the two witnesses it will know nothing of what
            // follows.
            for member in [0, 1, 3, 4] {
                let other = w.member_party(member);
                w.cut(n2, other);
                w.cut(other, n2);
            }
            w.copy_log(3);
            w.copy_log(4);
            for gateway in [1, 0, 1] {
                w.want_on(gateway, true);
                w.until("it is served", |w| w.takes_requests(gateway));
                w.write(gateway, gateway, 0, 8, false);
                w.until("it is written", |w| w.client_is_idle(gateway));
            }
            w.kill_gateway(0);
            w.kill_gateway(1);
            w.kill_node(0, false);
            w.kill_node(1, false);
            for witness in 0..2 {
                w.kill_witness(witness);
                w.restore_log(3 + witness);
                w.start_member(3 + witness);
            }
            for member in [0, 1, 3, 4] {
                let other = w.member_party(member);
                w.join_up(n2, other);
                w.join_up(other, n2);
            }
            w.start_gateway(0);
            w.start_gateway(1);
            w.run_for(20 * SECOND);
            // Whoever opens it meets a replica that knows better.
            for gateway in 0..2 {
                if w.takes_requests(gateway) {
                    w.read(4 + gateway, gateway, 0, 8);
                }
            }
            w.run_for(20 * SECOND);
        });
        match outcome {
            Ok(outcome) => refused += outcome.counters.refusing,
            Err(failure) => panic!("{failure}"),
        }
    }
    assert!(refused > 0, "nobody noticed");
}

#[test]
fn a_volume_on_the_space_of_a_deleted_one_shows_nothing_of_it() {
    let setup = Setup { stripes: 2, pool_bytes: 4 << 20, ..Setup::quiet(5) };
    let outcome = run_scenario(setup, |w| {
        w.open();
        fill(w, 700);
        for _ in 0..2 {
            w.kill_node(1, true);
            w.want_recreated();
            w.run_for(3 * SECOND);
            start(w, 1);
            w.until("it is there again", |w| w.is_recreated() && w.is_serving());
            for first in (0..640).step_by(64) {
                w.read(0, 0, first, 64);
                w.answered();
                assert!(w.history().last_read().iter().all(|v| *v == 0), "a new volume reads as zeroes");
            }
            w.write(0, 0, 8, 8, false);
            w.answered();
        }
    });
    match outcome {
        Ok(outcome) => assert_eq!(outcome.counters.recreated, 2),
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn a_replica_that_has_lost_its_files_is_filled_again() {
    scenario(|w| {
        w.open();
        fill(w, 256);
        w.kill_node(1, true);
        for replica in w.replicas_of(1) {
            w.lose_files(replica);
        }
        start(w, 1);
        w.kill_gateway(0);
        w.want_on(1, false);
        w.until("b is back", |w| w.takes_requests(1) && w.in_sync() == [0, 1, 2]);
        w.read(0, 1, 0, 64);
        w.answered();
    });
}

#[test]
fn what_a_failed_sync_has_left_in_the_page_cache_of_a_killed_process_is_not_believed() {
    for seed in 1..=10 {
        scenario_of(seed, |w| {
            w.open();
            fill(w, 64);
            w.write(0, 0, 0, 32, false);
            w.answered();
            let written = w.history().len() as u32;
            w.nodes[1].faults.fail_sync = true;
            w.flush(0, 0);
            w.answered();
            // Before it has opened its replica again.
            w.run_for(50 * MS);
            w.kill_node(1, false);
            start(w, 1);
            w.until("b is back", |w| w.in_sync() == [0, 1, 2]);
            w.flush(0, 0);
            w.answered();
            for node in [0, 2] {
                w.kill_node(node, false);
            }
            w.until("only b is left", |w| w.in_sync() == [1]);
            w.kill_node(1, true);
            for node in [1, 0, 2] {
                start(w, node);
            }
            w.read(0, 0, 0, 32);
            w.answered();
            assert!(w.history().last_read().iter().all(|v| *v == written), "{written} was flushed");
        });
    }
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
