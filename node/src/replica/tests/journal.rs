//! The allocation journal: what a killed process leaves of blocks that it had just allocated.

use bytes::Bytes;
use proto::frame::{CleanEntry, Code, Reply, Request, block_sums};
use proto::id::*;

use super::super::layout::{JOURNAL_PAGES, JOURNAL_RECORDS, JOURNAL_SLOTS, Layout, decode_journal};
use super::super::*;
use super::rig::*;

fn report(rig: &Rig) -> OpenReport {
    rig.opened.clone().expect("opening ends").expect("it opens")
}

fn zeroes(count: usize) -> Bytes {
    Bytes::from(vec![0; count * B])
}

fn restamp(block: u64, count: u64) -> Request {
    let mut blocks = [0; 4];
    (0..count as usize).for_each(|i| blocks[i / 64] |= 1 << (i % 64));
    Request::Restamp { block: BlockIndex(block), blocks }
}

/// Nothing but equalising makes these blocks readable, and then they are these.
fn assert_kept(rig: &mut Rig, block: u64, expected: &Bytes) {
    let count = expected.len() / B;
    assert_eq!(rig.bytes(block, count as u32), Err(Code::Checksum));
    rig.done(restamp(block, count as u64));
    assert_eq!(&rig.bytes(block, count as u32).unwrap(), expected);
}

fn records(rig: &Rig) -> Vec<(u64, u32)> {
    let layout = Layout::new(BLOCKS);
    let page = |slot: u64| {
        let at = layout.journal(slot) as usize;
        decode_journal(&rig.meta.current[at..at + B], slot, ids().replica, [rig.era; 16])
    };
    let newest =
        (0..JOURNAL_SLOTS).filter_map(page).max_by_key(|p| (p.number, p.records.iter().map(|r| r.1).sum::<u32>()));
    newest.map_or(Vec::new(), |p| p.records)
}

#[test]
fn a_kill_keeps_writes_that_no_flush_has_covered() {
    let mut rig = Rig::attached();
    rig.done(write(3, 2, 1));
    rig.done(write(800, 1, 1));
    rig.flush(1);
    // Beside flushed blocks, in a region that held nothing, and under a map page that was never written.
    rig.done(write(5, 3, 2));
    rig.done(write(255, 2, 3));
    rig.done(write(1600, 1, 4));
    rig.kill();
    assert_eq!(report(&rig).journal_blocks, 6);
    rig.attach(1, 2);
    let (dirty, suspect, _) = rig.regions();
    assert_eq!((dirty & 0b100_0011, suspect & 0b100_0011), (0b100_0011, 0b100_0011));
    assert_eq!(rig.bytes(3, 2).unwrap(), pattern(3, 2, 1));
    assert_eq!(rig.bytes(800, 1).unwrap(), pattern(800, 1, 1));
    assert_kept(&mut rig, 5, &pattern(5, 3, 2));
    assert_kept(&mut rig, 255, &pattern(255, 2, 3));
    assert_kept(&mut rig, 1600, &pattern(1600, 1, 4));
    assert_eq!(rig.bytes(8, 1).unwrap(), zeroes(1));
}

/// The page is written when the replica is opened, and what is bad of it stays so.
#[test]
fn a_page_that_is_bad_in_part_has_the_records_of_the_rest() {
    let mut rig = Rig::attached();
    rig.done(write(3, 2, 1));
    rig.done(write(300, 2, 1));
    rig.flush(1);
    rig.clean(1, &[(0, 1), (1, 1)]);
    rig.done(write(5, 3, 2));
    let at = Layout::new(BLOCKS).map(0) as usize + 512 + 1024 + 500;
    rig.meta.current[at] ^= 1;
    rig.kill();
    assert_eq!(report(&rig).journal_blocks, 3);
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 2).unwrap(), pattern(3, 2, 1));
    assert_eq!(rig.bytes(300, 1), Err(Code::Checksum));
    assert_kept(&mut rig, 5, &pattern(5, 3, 2));
}

#[test]
fn kills_before_anything_is_flushed_keep_it_again_and_again() {
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    for n in 2..30 {
        rig.kill();
        rig.attach(1, n);
        rig.done(write(2 * n, 1, n));
    }
    rig.kill();
    rig.attach(1, 30);
    // Half of the journal's pages were in use at some time, so part of it has been flushed.
    for (block, n) in [(3, 1)].into_iter().chain((2..30).map(|n| (2 * n, n))) {
        if rig.bytes(block, 1) == Err(Code::Checksum) {
            rig.done(restamp(block, 1));
        }
        assert_eq!(rig.bytes(block, 1).unwrap(), pattern(block, 1, n), "block {block}");
    }
}

#[test]
fn what_the_journal_kept_is_durable_before_the_map_says_so() {
    // The rig itself watches that no verified allocation precedes its data; here the blocks are unverified.
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.flush(1);
    rig.done(write(3, 1, 1));
    rig.kill();
    assert_eq!(rig.data.durable[3 * B..4 * B], pattern(3, 1, 1)[..]);
    let mut rng = Rng(7);
    rig.power_cut(&mut rng);
    rig.attach(1, 2);
    assert_kept(&mut rig, 3, &pattern(3, 1, 1));
}

#[test]
fn another_era_ignores_the_journal_though_its_pages_survived() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.flush(1);
    rig.done(write(3, 1, 2));
    assert_eq!(records(&rig), [(3, 1)]);
    rig.power_cut_that_kept_everything();
    assert_eq!(report(&rig).journal_blocks, 0);
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
    assert!(rig.data.current[3 * B..4 * B].iter().all(|b| *b == 0));
    assert_eq!(rig.bytes(0, 1).unwrap(), pattern(0, 1, 1));
}

#[test]
fn a_fault_drops_the_cache_and_the_journal_with_it() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.flush(1);
    rig.done(write(3, 1, 2));
    rig.fail = Box::new(|io| matches!(io, DiskIo::Sync { .. }).then_some(DiskError::Io));
    rig.ask(Request::Flush { flush: FlushNo(2) });
    assert!(rig.faulted.is_some());
    rig.fail = Box::new(|_| None);
    // As the driver does.
    rig.era += 1;
    rig.kill();
    assert_eq!(report(&rig).journal_blocks, 0);
    rig.kill();
    assert_eq!(report(&rig).journal_blocks, 0, "nor does the next one believe it");
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
}

#[test]
fn data_that_cannot_be_made_durable_is_not_believed() {
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    rig.fail = Box::new(|io| matches!(io, DiskIo::Sync { file: FileKind::Data, .. }).then_some(DiskError::Io));
    rig.kill();
    let failed = OpenError::Disk { file: FileKind::Data, error: DiskError::Io };
    assert_eq!(rig.opened.as_ref().unwrap().as_ref().unwrap_err(), &failed);
    rig.fail = Box::new(|_| None);
    // As the driver does.
    rig.era += 1;
    rig.kill();
    assert_eq!(report(&rig).journal_blocks, 0, "another try does not help");
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
}

#[test]
fn records_that_a_flush_has_covered_no_longer_count() {
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    rig.flush(1);
    rig.done(write(9, 1, 1));
    assert_eq!(records(&rig), [(9, 1)]);
    rig.done(Request::Discard { block: BlockIndex(3), count: 1 });
    rig.flush(2);
    rig.done(write(11, 1, 1));
    rig.kill();
    assert_eq!(report(&rig).journal_blocks, 1, "block 11 alone");
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
    assert_eq!(rig.bytes(9, 1).unwrap(), pattern(9, 1, 1));
    assert_kept(&mut rig, 11, &pattern(11, 1, 1));
}

#[test]
fn a_record_of_a_clean_region_does_not_count() {
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    rig.flush(1);
    rig.done(Request::Discard { block: BlockIndex(3), count: 1 });
    rig.flush(2);
    rig.clean(1, &[(0, 2)]);
    assert_eq!(records(&rig), [(3, 1)], "it is still there");
    rig.kill();
    assert_eq!(report(&rig).journal_blocks, 0);
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
    assert_eq!(rig.regions().0, 0);
}

#[test]
fn what_was_discarded_does_not_come_back() {
    for punches_fail in [false, true] {
        let mut rig = Rig::attached();
        if punches_fail {
            rig.fail = Box::new(|io| matches!(io, DiskIo::Punch { .. }).then_some(DiskError::Io));
        }
        rig.done(write(3, 2, 1));
        rig.done(Request::Discard { block: BlockIndex(3), count: 2 });
        rig.done(write(4, 1, 2));
        rig.fail = Box::new(|_| None);
        rig.data.forget_unfinished();
        rig.kill();
        rig.attach(1, 2);
        assert_kept(&mut rig, 4, &pattern(4, 1, 2));
        rig.done(restamp(3, 1));
        assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
    }
}

#[test]
fn a_torn_page_takes_nothing_along_that_was_answered() {
    let layout = Layout::new(BLOCKS);
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    rig.done(write(5, 1, 1));
    rig.send(write(7, 1, 1));
    rig.run_only(|io| !is_journal(io));
    let offset = rig.queue.iter().find_map(|(_, io)| match io {
        DiskIo::Write { offset, .. } => Some(*offset as usize),
        _ => None,
    });
    rig.kill();
    // As the last journal write left it, half done.
    let mut torn = rig;
    let offset = offset.expect("a journal page is being written");
    assert!((layout.journal(0)..layout.dirty(0)).contains(&(offset as u64)));
    torn.meta.current[offset + 512..offset + B].fill(0xff);
    torn.kill();
    torn.attach(1, 2);
    assert_kept(&mut torn, 3, &pattern(3, 1, 1));
    assert_kept(&mut torn, 5, &pattern(5, 1, 1));
}

#[test]
fn an_unanswered_write_without_a_record_is_freed() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    let tag = rig.send(write(3, 1, 1));
    rig.run_only(|io| !is_journal(io));
    assert_eq!(rig.reply(tag), None, "it is answered when it is recorded");
    rig.meta.forget_unfinished();
    rig.kill();
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
    assert_kept(&mut rig, 0, &pattern(0, 1, 1));
}

#[test]
fn adjacent_blocks_share_a_record_and_waiting_writes_share_a_page() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.trace.clear();
    let tags: Vec<u64> = (1..9).map(|i| rig.send(write(i, 1, 1))).collect();
    rig.run();
    assert!(tags.iter().all(|tag| rig.reply(*tag) == Some(&Reply::Done(proto::frame::Kind::Write))));
    assert_eq!(rig.trace.iter().filter(|io| is_journal(io)).count(), 2, "the first, and all that came meanwhile");
    assert_eq!(records(&rig), [(0, 9)]);
}

#[test]
fn a_full_journal_flushes_for_its_own_sake() {
    let mut rig = Rig::attached();
    // Every other block, so that nothing merges, over and over.
    let mut n = 0;
    let per_round = BLOCKS / 2;
    let rounds = JOURNAL_PAGES * JOURNAL_RECORDS as u64 / per_round + 3;
    for round in 0..rounds {
        let tags: Vec<u64> = (0..per_round)
            .map(|i| {
                if i % 200 == 0 {
                    rig.run();
                }
                rig.send(write(i * 2, 1, round + 1))
            })
            .collect();
        rig.run();
        n += tags.len();
        assert!(tags.iter().all(|tag| rig.replies.remove(tag) == Some(Reply::Done(proto::frame::Kind::Write))));
        if round + 1 < rounds {
            rig.done(Request::Discard { block: BlockIndex(0), count: BLOCKS as u32 });
        }
    }
    assert!(n > JOURNAL_PAGES as usize * JOURNAL_RECORDS);
    assert!(
        rig.trace.iter().any(|io| matches!(io, DiskIo::Sync { file: FileKind::Data, .. })),
        "no flush was asked for"
    );
    rig.kill();
    rig.attach(1, 2);
    for block in (0..BLOCKS).step_by(2) {
        if rig.bytes(block, 1) == Err(Code::Checksum) {
            rig.done(restamp(block, 1));
        }
        assert_eq!(rig.bytes(block, 1).unwrap(), pattern(block, 1, rounds));
    }
}

#[test]
fn while_no_page_is_free_writes_wait() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    let is_sync = |io: &DiskIo| matches!(io, DiskIo::Sync { file: FileKind::Data, .. });
    // A flush that does not end.
    rig.send(Request::Flush { flush: FlushNo(1) });
    rig.run_only(|io| !is_sync(io));
    let mut waiting = None;
    'full: for round in 0..20 {
        for i in 1..BLOCKS / 2 {
            let tag = rig.send(write(i * 2, 1, 1));
            rig.run_only(|io| !is_sync(io));
            if rig.replies.remove(&tag).is_none() {
                waiting = Some(tag);
                break 'full;
            }
        }
        let tag = rig.send(Request::Discard { block: BlockIndex(1), count: BLOCKS as u32 - 1 });
        rig.run_only(|io| !is_sync(io));
        assert!(rig.replies.remove(&tag).is_some(), "round {round}");
    }
    let waiting = waiting.expect("the journal is full at some time");
    rig.run();
    assert_eq!(rig.replies.remove(&waiting), Some(Reply::Done(proto::frame::Kind::Write)));
}

#[test]
fn what_cannot_be_recorded_is_not_answered() {
    for error in [DiskError::NoSpace, DiskError::Io] {
        let mut rig = Rig::attached();
        rig.done(write(0, 1, 1));
        rig.fail = Box::new(move |io| is_journal(io).then_some(error));
        assert_eq!(failed(&rig.ask(write(4, 1, 1))), Code::Faulted);
    }
}

#[test]
fn what_was_answered_is_kept_by_kills_and_by_nothing_else() {
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    for attach in 2..5 {
        rig.kill();
        assert!(rig.attach(1, attach).kept, "process {attach} of the same era");
    }
    rig.power_cut_that_kept_everything();
    assert!(!rig.attach(1, 5).kept);
    rig.kill();
    assert!(!rig.attach(1, 6).kept, "the loss was not mended yet");
    // The gateway has equalised the region, and flushed it.
    rig.flush(1);
    let entries = vec![CleanEntry { region: RegionIndex(0), flush: FlushNo(1) }];
    rig.done(Request::Settle { entries });
    rig.kill();
    assert!(rig.attach(1, 7).kept, "mended");
}

#[test]
fn a_clean_replica_has_nothing_to_lose() {
    let mut rig = Rig::attached();
    rig.power_cut_that_kept_everything();
    assert!(!rig.attach(1, 2).kept, "nobody knows what was written in an earlier era");
    rig.done(write(3, 1, 1));
    rig.kill();
    assert!(rig.attach(1, 3).kept);
}

#[test]
fn a_fault_loses_what_was_answered() {
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 2));
    rig.fail = Box::new(|io| matches!(io, DiskIo::Sync { .. }).then_some(DiskError::Io));
    rig.ask(Request::Flush { flush: FlushNo(2) });
    rig.fail = Box::new(|_| None);
    rig.era += 1;
    rig.kill();
    assert!(!rig.attach(1, 2).kept);
    rig.kill();
    assert!(!rig.attach(1, 3).kept, "the next process knows of it too");
}

#[test]
fn a_fua_write_is_recorded_and_then_flushed() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    let data = pattern(3, 1, 1);
    let tag = rig.send(Request::Write { block: BlockIndex(3), fua: true, sums: block_sums(&data), data });
    rig.run_only(|io| !matches!(io, DiskIo::Sync { .. }));
    assert_eq!(rig.reply(tag), None);
    // Killed before it is durable: it is there all the same.
    rig.kill();
    rig.attach(1, 2);
    assert_kept(&mut rig, 3, &pattern(3, 1, 1));
    let data = pattern(5, 1, 1);
    rig.done(Request::Write { block: BlockIndex(5), fua: true, sums: block_sums(&data), data });
    rig.kill();
    rig.attach(1, 3);
    assert_eq!(rig.bytes(5, 1).unwrap(), pattern(5, 1, 1));
}

#[test]
fn a_copy_is_recorded_before_it_is_answered() {
    let mut rig = Rig::attached();
    let data = pattern(3, 2, 1);
    let copy = Request::CopyWrite {
        replica: ids().replica,
        block: BlockIndex(3),
        count: 2,
        sums: block_sums(&data),
        data: data.clone(),
    };
    let attach = rig.attach;
    let tag = rig.send_as(ConnId(9), attach, copy);
    rig.run_only(|io| !is_journal(io));
    assert_eq!(rig.reply(tag), None);
    rig.run();
    assert!(matches!(rig.reply(tag), Some(Reply::Done(_))));
    rig.kill();
    rig.attach(1, 2);
    assert_kept(&mut rig, 3, &data);
}

#[test]
fn a_newer_attach_waits_for_the_records_of_an_older_one() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.send(write(3, 1, 1));
    rig.run_only(|io| !is_journal(io));
    let tag = rig.send_as(ConnId(2), attach_id(1, 2), Rig::attach_request());
    rig.run_only(|io| !is_journal(io));
    assert_eq!(rig.reply(tag), None);
    rig.run();
    assert!(matches!(rig.reply(tag), Some(Reply::Attached(_))));
    // It allocates nothing, so it costs nothing, and is kept by the record that was waited for.
    (rig.conn, rig.attach) = (ConnId(2), attach_id(1, 2));
    rig.done(write(3, 1, 2));
    rig.kill();
    rig.attach(1, 3);
    assert_kept(&mut rig, 3, &pattern(3, 1, 2));
}

#[test]
fn without_an_era_nothing_is_recorded() {
    let mut rig = Rig::attached();
    rig.era = 0;
    rig.kill();
    rig.attach(1, 2);
    rig.trace.clear();
    rig.done(write(3, 1, 1));
    assert!(!rig.trace.iter().any(is_journal));
    rig.kill();
    rig.attach(1, 3);
    assert_eq!(rig.bytes(3, 1).unwrap(), zeroes(1));
}
