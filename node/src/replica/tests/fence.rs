//! R1: attaches.

use proto::frame::{Code, Kind, Reply, Request, SetView};
use proto::id::*;

use super::super::*;
use super::rig::*;

const OTHER: ConnId = ConnId(2);

fn is_data_write(io: &DiskIo) -> bool {
    matches!(io, DiskIo::Write { file: FileKind::Data, .. })
}

/// A rig with one write given to the disk and not ended, and the write's tag.
fn with_write_in_flight() -> (Rig, u64) {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    let tag = rig.send(write(0, 1, 2));
    assert!(is_data_write(&rig.queue[0].1));
    (rig, tag)
}

#[test]
fn a_newer_attach_is_answered_only_when_the_older_ones_writes_have_ended() {
    let (mut rig, old) = with_write_in_flight();
    let new = rig.send_as(OTHER, attach_id(2, 1), Rig::attach_request());
    rig.run_only(|io| !is_data_write(io));
    assert_eq!(rig.reply(new), None, "the write has not ended");
    assert_eq!(failed(rig.reply(old).unwrap()), Code::Superseded);
    rig.run();
    let Some(Reply::Attached(info)) = rig.reply(new) else { panic!("{:?}", rig.reply(new)) };
    assert_eq!((info.held, info.stored_epoch), (attach_id(1, 1), Epoch(1)));
    // What the older one had given to the disk is there, with its sum.
    (rig.conn, rig.attach) = (OTHER, attach_id(2, 1));
    assert_eq!(rig.bytes(0, 1).unwrap(), pattern(0, 1, 2));
}

#[test]
fn the_epoch_is_in_both_superblocks_before_the_attach_is_answered() {
    let mut rig = Rig::attached();
    let tag = rig.send_as(OTHER, attach_id(7, 1), Rig::attach_request());
    while rig.reply(tag).is_none() {
        rig.end_one(0);
    }
    for copy in 0..2 {
        let at = copy * B;
        let copy = superblock::Superblock::decode(&rig.meta.durable[at..at + B]).unwrap();
        assert_eq!(copy.epoch, Epoch(7));
    }
}

#[test]
fn older_and_equal_attaches_are_superseded_and_name_the_known_epoch() {
    let mut rig = Rig::attached();
    rig.attach(5, 3);
    for id in [attach_id(4, 9), attach_id(5, 2), attach_id(5, 3)] {
        let tag = rig.send_as(OTHER, id, Rig::attach_request());
        rig.run();
        let kind = Kind::Attach;
        assert_eq!(rig.reply(tag), Some(&Reply::Failed { kind, code: Code::Superseded, block: 5 }), "{id}");
    }
    rig.done(write(0, 1, 1));
    rig.kill();
    let tag = rig.send_as(OTHER, attach_id(4, 9), Rig::attach_request());
    assert_eq!(failed(rig.reply(tag).unwrap()), Code::Superseded, "the stored epoch outlives the process");
}

#[test]
fn of_two_attaches_that_wait_the_newer_one_wins() {
    let (mut rig, _) = with_write_in_flight();
    let first = rig.send_as(OTHER, attach_id(2, 1), Rig::attach_request());
    let second = rig.send_as(ConnId(3), attach_id(3, 1), Rig::attach_request());
    assert_eq!(failed(rig.reply(first).unwrap()), Code::Superseded);
    rig.run();
    assert!(matches!(rig.reply(second), Some(Reply::Attached(_))));
    assert_eq!(rig.core.current_attach(), Some(attach_id(3, 1)));
}

#[test]
fn a_newer_attach_while_an_epoch_is_being_stored_wins_too() {
    let mut rig = Rig::attached();
    let first = rig.send_as(OTHER, attach_id(2, 1), Rig::attach_request());
    assert!(!rig.queue.is_empty(), "the epoch is on its way");
    let second = rig.send_as(ConnId(3), attach_id(3, 1), Rig::attach_request());
    rig.run();
    assert_eq!(failed(rig.reply(first).unwrap()), Code::Superseded);
    let Some(Reply::Attached(info)) = rig.reply(second) else { panic!() };
    assert_eq!(info.held, attach_id(1, 1), "the one in between never held");
}

#[test]
fn requests_need_the_current_attach_on_its_connection() {
    let mut rig = Rig::attached();
    rig.attach(2, 1);
    for (conn, id, code) in [
        (ConnId(1), attach_id(1, 1), Code::Superseded),
        (ConnId(1), attach_id(2, 2), Code::NotAttached),
        (OTHER, attach_id(2, 1), Code::NotAttached),
    ] {
        let tag = rig.send_as(conn, id, read(0, 1));
        assert_eq!(failed(rig.reply(tag).unwrap()), code, "{conn:?} {id}");
    }
    rig.step(Input::Request { conn: ConnId(1), channel: 9, tag: 999, attach: attach_id(2, 1), request: read(0, 1) });
    assert_eq!(failed(rig.reply(999).unwrap()), Code::NotAttached, "another channel");
    assert!(rig.bytes(0, 1).is_ok());
}

#[test]
fn a_lost_connection_ends_its_attach_and_the_next_one_still_drains() {
    let (mut rig, old) = with_write_in_flight();
    rig.step(Input::ConnectionLost { conn: ConnId(1) });
    assert_eq!(rig.core.current_attach(), None);
    let new = rig.send_as(OTHER, attach_id(1, 2), Rig::attach_request());
    rig.run_only(|io| !is_data_write(io));
    assert_eq!(rig.reply(new), None);
    rig.run();
    assert!(matches!(rig.reply(new), Some(Reply::Attached(_))));
    // The old one's connection is gone, so nobody hears how its write ended.
    assert!(rig.reply(old).is_none_or(|r| !matches!(r, Reply::Done(_))));
}

#[test]
fn silence_for_the_lease_time_ends_the_attach() {
    let mut rig = Rig::attached();
    rig.now = 6_000;
    assert!(rig.bytes(0, 1).is_ok(), "a request counts as a sign of life");
    rig.now = 12_000;
    rig.step(Input::Heard { conn: ConnId(1) });
    rig.now = 18_000;
    rig.step(Input::Tick);
    assert!(rig.core.current_attach().is_some());
    rig.step(Input::Heard { conn: OTHER });
    rig.now = 18_001;
    let tag = rig.send(read(0, 1));
    assert_eq!(failed(rig.reply(tag).unwrap()), Code::NotAttached, "even the late request finds it ended");
}

#[test]
fn a_fresh_process_has_held_nothing_and_suspects_what_was_dirty() {
    let mut rig = Rig::attached();
    rig.done(write(300, 1, 1));
    rig.flush(1);
    rig.kill();
    let info = rig.attach(1, 2);
    assert_eq!((info.held, info.stored_epoch), (AttachId::default(), Epoch(1)));
    assert_eq!((info.dirty, info.suspect), (1, 1));
    rig.flush(1);
    let entries = vec![proto::frame::CleanEntry { region: RegionIndex(1), flush: FlushNo(1) }];
    rig.done(Request::Settle { entries });
    let info = rig.attach(1, 3);
    assert_eq!((info.held, info.dirty, info.suspect), (attach_id(1, 2), 1, 0));
}

#[test]
fn another_mirror_or_replica_is_unknown() {
    let mut rig = Rig::create(Create::Clean);
    let other = uuid::Uuid::from_u128(99);
    for (replica, mirror) in [(ReplicaId(other), ids().mirror), (ids().replica, MirrorId(other))] {
        let request = Request::Attach { replica, mirror, lease_ms: 1, set: SetView::default() };
        let tag = rig.send_as(OTHER, attach_id(1, 1), request);
        assert_eq!(failed(rig.reply(tag).unwrap()), Code::UnknownReplica);
    }
}

#[test]
fn detach_waits_for_what_is_in_flight_and_keeps_held() {
    let (mut rig, tag) = with_write_in_flight();
    let detach = rig.send(Request::Detach);
    let late = rig.send(read(0, 1));
    assert_eq!(failed(rig.reply(late).unwrap()), Code::NotAttached);
    assert_eq!(rig.reply(detach), None);
    rig.run();
    assert_eq!(rig.reply(tag), Some(&Reply::Done(Kind::Write)));
    assert_eq!(rig.reply(detach), Some(&Reply::Done(Kind::Detach)));
    assert_eq!(rig.attach(1, 2).held, attach_id(1, 1));
}

#[test]
fn copies_come_under_the_destinations_attach_and_are_drained_with_it() {
    let mut rig = Rig::attached();
    let data = pattern(10, 2, 7);
    let copy = |replica| Request::CopyWrite {
        replica,
        block: BlockIndex(10),
        count: 2,
        sums: proto::frame::block_sums(&data),
        data: data.clone(),
    };
    let tag = rig.send_as(OTHER, attach_id(1, 2), copy(ids().replica));
    assert_eq!(failed(rig.reply(tag).unwrap()), Code::NotAttached);
    let tag = rig.send_as(OTHER, attach_id(1, 1), copy(ReplicaId::default()));
    assert_eq!(failed(rig.reply(tag).unwrap()), Code::UnknownReplica);
    let tag = rig.send_as(OTHER, attach_id(1, 1), copy(ids().replica));
    rig.run();
    assert_eq!(rig.reply(tag), Some(&Reply::Done(Kind::CopyWrite)));
    assert_eq!(rig.bytes(10, 2).unwrap(), data);
    assert_eq!(rig.regions().0, 1, "R5 holds for copies");
    // In flight: a newer attach waits for it.
    let copying = rig.send_as(OTHER, attach_id(1, 1), copy(ids().replica));
    let new = rig.send_as(ConnId(3), attach_id(2, 1), Rig::attach_request());
    rig.run_only(|io| !is_data_write(io));
    assert_eq!(rig.reply(new), None);
    rig.run();
    assert!(matches!(rig.reply(new), Some(Reply::Attached(_))));
    assert_eq!(failed(rig.reply(copying).unwrap()), Code::Superseded);
}

#[test]
fn too_many_requests_close_the_connection() {
    let mut rig = Rig::attached();
    for _ in 0..=proto::limits::MAX_ATTACH_IN_FLIGHT {
        rig.send(write(0, 1, 1));
    }
    assert_eq!(rig.closed, vec![ConnId(1)]);
    assert_eq!(rig.core.current_attach(), None);
    rig.run();
}
