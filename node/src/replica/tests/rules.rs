//! R5, R6, R9, R10, and what a full or failing disk does.

use bytes::Bytes;
use proto::frame::{Code, CopyTarget, Kind, Reply, Request, SetView, block_sums, zero_block_sum};
use proto::id::*;

use super::super::layout::Layout;
use super::super::*;
use super::rig::*;

fn is_data(io: &DiskIo) -> bool {
    matches!(io, DiskIo::Write { file: FileKind::Data, .. } | DiskIo::Punch { .. })
}

fn is_meta_sync(io: &DiskIo) -> bool {
    matches!(io, DiskIo::Sync { file: FileKind::Meta, .. })
}

fn hashes(rig: &mut Rig, block: u64, count: u32) -> Vec<proto::frame::BlockHash> {
    match rig.ask(Request::Hashes { block: BlockIndex(block), count, key: [7; 32] }) {
        Reply::Hashes(hashes) => hashes,
        other => panic!("{other:?}"),
    }
}

fn expected_hash(bytes: &[u8]) -> [u8; 16] {
    crate::replica::block_hash(&[7; 32], bytes)
}

#[test]
fn r5_the_dirty_bit_is_durable_before_the_data_is_written() {
    let mut rig = Rig::attached();
    rig.send(write(0, 1, 1));
    assert!(!rig.queue.iter().any(|(_, io)| is_data(io)));
    while !rig.queue.iter().any(|(_, io)| is_data(io)) {
        rig.end_one(0);
    }
    let layout = Layout::new(BLOCKS);
    let at = layout.dirty(0) as usize;
    let words = layout::decode_bitmap(&rig.meta.durable[at..at + B], layout::PageKind::Dirty, 0, ids().replica);
    assert_eq!(words.unwrap().next(), Some(1));
}

#[test]
fn r5_a_write_to_a_dirty_region_is_one_disk_operation() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.trace.clear();
    rig.done(write(0, 1, 2));
    assert_eq!(rig.trace.len(), 1, "{:?}", rig.trace);
    assert!(is_data(&rig.trace[0]));
    // A block that was not allocated before takes a journal page more, and no sync.
    rig.trace.clear();
    rig.done(write(5, 1, 2));
    assert_eq!(rig.trace.len(), 2, "{:?}", rig.trace);
    assert!(is_data(&rig.trace[0]) && is_journal(&rig.trace[1]));
}

#[test]
fn r5_a_dirty_bit_that_a_killed_process_only_wrote_is_not_taken_for_durable() {
    let mut rig = Rig::attached();
    rig.send(write(0, 1, 1));
    // Written to the page cache, not synced.
    rig.run_only(|io| matches!(io, DiskIo::Write { file: FileKind::Meta, .. }));
    rig.kill();
    rig.attach(1, 2);
    // The rig checks every write that is given to the disk.
    rig.done(write(0, 1, 1));
}

#[test]
fn r5_many_regions_that_wait_cost_one_sync() {
    let mut rig = Rig::attached();
    rig.send(write(0, 1, 1));
    // The first one's pass runs; these share the next.
    for region in 1..7 {
        rig.send(write(region * 256, 1, 1));
    }
    rig.trace.clear();
    rig.run();
    assert_eq!(rig.trace.iter().filter(|io| is_meta_sync(io)).count(), 2, "{:?}", rig.trace);
    assert_eq!(rig.regions().0, 0b111_1111);
}

#[test]
fn r5_a_sequential_stream_marks_ahead() {
    let mut rig = Rig::attached();
    rig.done(write(0, 256, 1));
    rig.done(write(256, 256, 1));
    rig.trace.clear();
    rig.done(write(512, 256, 1));
    rig.done(write(768, 256, 1));
    assert!(rig.trace.iter().all(|io| is_data(io) || is_journal(io)), "{:?}", rig.trace);
}

#[test]
fn r6_a_clean_is_ignored_where_the_region_has_changed_since_its_flush_began() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.done(write(256, 1, 1));
    rig.flush(1);
    rig.done(write(256, 1, 2));
    let flying = rig.send(write(512, 1, 3));
    rig.run_only(|io| !is_data(io));
    let entries = (0..3).map(|r| proto::frame::CleanEntry { region: RegionIndex(r), flush: FlushNo(1) }).collect();
    let clean = rig.send(Request::Clean { clean: CleanNo(1), entries });
    rig.run_only(|io| !is_data(io));
    assert_eq!(rig.reply(clean), Some(&Reply::Done(Kind::Clean)));
    rig.run();
    assert_eq!(rig.reply(flying), Some(&Reply::Done(Kind::Write)));
    assert_eq!(rig.regions().0, 0b110);
    // A later flush covers them.
    rig.flush(2);
    rig.clean(2, &[(1, 2), (2, 2)]);
    assert_eq!(rig.regions().0, 0);
    rig.power_cut(&mut Rng(1));
    assert_eq!(rig.attach(1, 2).dirty, 0);
    assert_eq!(rig.bytes(256, 1).unwrap(), pattern(256, 1, 2));
}

#[test]
fn r6_a_flush_that_was_asked_for_but_has_not_ended_cleans_nothing() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.clean(1, &[(0, 1)]);
    assert_eq!(rig.regions().0, 1);
    rig.flush(1);
    rig.clean(1, &[(0, 1)]);
    assert_eq!(rig.regions().0, 0, "the same number again is harmless");
    let entries = Vec::new();
    assert_eq!(failed(&rig.ask(Request::Clean { clean: CleanNo(0), entries })), Code::Invalid, "a lower one is not");
}

#[test]
fn r6_a_write_to_a_region_that_is_being_cleaned_waits_for_its_new_dirty_bit() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.flush(1);
    let entries = vec![proto::frame::CleanEntry { region: RegionIndex(0), flush: FlushNo(1) }];
    let clean = rig.send(Request::Clean { clean: CleanNo(1), entries });
    let tag = rig.send(write(0, 1, 2));
    while rig.reply(tag).is_none() {
        let data_began = rig.queue.iter().any(|(_, io)| is_data(io));
        if data_began {
            let mut crashed = rig.meta.durable.clone();
            let at = Layout::new(BLOCKS).dirty(0) as usize;
            let page = &mut crashed[at..at + B];
            let words = layout::decode_bitmap(page, layout::PageKind::Dirty, 0, ids().replica);
            assert_eq!(words.unwrap().next(), Some(1), "dirty again before the data");
        }
        rig.end_one(0);
    }
    assert_eq!(rig.reply(clean), Some(&Reply::Done(Kind::Clean)));
}

#[test]
fn r6_a_change_under_an_older_attach_is_covered_by_a_flush_of_the_newer_one() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.attach(2, 1);
    rig.clean(1, &[(0, 5)]);
    assert_eq!(rig.regions().0, 1, "flush numbers of another attach count for nothing");
    rig.flush(1);
    rig.clean(2, &[(0, 1)]);
    assert_eq!(rig.regions().0, 0);
}

#[test]
fn r9_a_flush_makes_answered_writes_durable() {
    let mut rig = Rig::attached();
    rig.done(write(0, 4, 1));
    rig.done(write(1000, 2, 2));
    rig.flush(1);
    for seed in 0..20 {
        rig.power_cut(&mut Rng(seed));
        rig.attach(2 + seed, 1);
        assert_eq!(rig.bytes(0, 4).unwrap(), pattern(0, 4, 1));
        assert_eq!(rig.bytes(1000, 2).unwrap(), pattern(1000, 2, 2));
    }
}

#[test]
fn r5_a_region_marked_during_a_pass_waits_for_the_next() {
    let mut rig = Rig::attached();
    rig.send(write(0, 1, 1));
    rig.send(write(256, 1, 1));
    let mut late = Vec::new();
    while !rig.queue.is_empty() {
        // The rig checks every write that is given to the disk.
        late.push(rig.send(write(257 + late.len() as u64, 1, 1)));
        rig.end_one(0);
        if late.len() == 12 {
            rig.run();
        }
    }
    assert!(late.iter().all(|tag| rig.reply(*tag) == Some(&Reply::Done(Kind::Write))));
}

#[test]
fn r9_a_page_that_changed_while_it_was_being_written_back_is_written_again() {
    let mut rig = Rig::attached();
    (0..3).for_each(|page| rig.done(write(page * 768, 1, 1)));
    rig.flush(1);
    rig.cache_pages = 2;
    rig.kill();
    rig.attach(1, 2);
    let is_map = |io: &DiskIo| match io {
        DiskIo::Write { file: FileKind::Meta, offset, .. } => *offset >= Layout::new(BLOCKS).map(0),
        _ => false,
    };
    // Changes in every page, and reads that need room, until one is being written back.
    let mut block = 1;
    while !rig.queue.iter().any(|(_, io)| is_map(io)) {
        block += 1;
        assert!(block < 600, "no page is ever written back");
        for page in 0..3 {
            rig.send(write(page * 768 + block, 1, 2));
            rig.run_only(|io| !is_map(io));
        }
    }
    // The page changes meanwhile, and the flush must wait for it.
    let tags: Vec<u64> = (0..3).map(|page| rig.send(write(page * 768 + 700, 1, 3))).collect();
    rig.run_only(|io| !is_map(io));
    let answered: Vec<u64> =
        (0..3).filter(|p| rig.reply(tags[*p as usize]) == Some(&Reply::Done(Kind::Write))).collect();
    assert!(!answered.is_empty());
    let flush = rig.send(Request::Flush { flush: FlushNo(1) });
    rig.run_only(|io| !is_map(io));
    assert_eq!(rig.reply(flush), None);
    rig.run();
    assert_eq!(rig.reply(flush), Some(&Reply::Done(Kind::Flush)));
    for seed in 0..10 {
        rig.power_cut(&mut Rng(seed));
        rig.attach(2 + seed, 1);
        for page in &answered {
            assert_eq!(rig.bytes(page * 768 + 700, 1).unwrap(), pattern(page * 768 + 700, 1, 3));
        }
    }
}

#[test]
fn r9_fua_is_durable_when_answered() {
    let mut rig = Rig::attached();
    let data = pattern(3, 1, 9);
    rig.done(Request::Write { block: BlockIndex(3), fua: true, sums: block_sums(&data), data: data.clone() });
    rig.done(write(600, 1, 1));
    rig.done(Request::WriteZeroes { block: BlockIndex(600), count: 1, fua: true });
    for seed in 0..20 {
        rig.power_cut(&mut Rng(seed));
        rig.attach(2 + seed, 1);
        assert_eq!(rig.bytes(3, 1).unwrap(), data);
        assert_eq!(rig.bytes(600, 1).unwrap(), Bytes::from(vec![0; B]));
    }
}

#[test]
fn r9_flushes_that_come_during_a_pass_share_the_next() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.trace.clear();
    let tags: Vec<u64> = (1..=5).map(|n| rig.send(Request::Flush { flush: FlushNo(n) })).collect();
    // Something to sync for the second pass too.
    rig.send(write(1, 1, 2));
    rig.run_only(is_data);
    rig.run();
    assert!(tags.iter().all(|t| rig.reply(*t) == Some(&Reply::Done(Kind::Flush))));
    let syncs = rig.trace.iter().filter(|io| matches!(io, DiskIo::Sync { file: FileKind::Data, .. })).count();
    assert_eq!(syncs, 2);
    assert_eq!(failed(&rig.ask(Request::Flush { flush: FlushNo(5) })), Code::Invalid, "numbers rise");
}

#[test]
fn r10_unallocated_blocks_read_as_zeroes_without_the_disk() {
    let mut rig = Rig::attached();
    rig.data.current.fill(0xee);
    rig.trace.clear();
    let Reply::Read { data, sums, .. } = rig.ask(read(0, 256)) else { panic!() };
    assert!(data.iter().all(|b| *b == 0) && sums.iter().all(|s| *s == zero_block_sum()));
    assert!(rig.trace.is_empty());
    rig.done(write(1, 1, 5));
    let bytes = rig.bytes(0, 3).unwrap();
    assert!(bytes[..B].iter().chain(&bytes[2 * B..]).all(|b| *b == 0), "old contents never show");
    assert_eq!(bytes[B..2 * B], pattern(1, 1, 5));
}

#[test]
fn r10_data_that_does_not_match_its_sums_is_refused() {
    let mut rig = Rig::attached();
    let data = pattern(0, 2, 1);
    let mut sums = block_sums(&data);
    sums[1] ^= 1;
    let request = Request::Write { block: BlockIndex(0), fua: false, sums, data };
    assert_eq!(rig.ask(request), Reply::Failed { kind: Kind::Write, code: Code::BadData, block: 1 });
    assert_eq!(rig.regions().0, 0, "nothing has changed");
}

#[test]
fn r10_rot_is_answered_with_the_blocks_number_and_overwriting_heals_it() {
    let mut rig = Rig::attached();
    rig.done(write(0, 4, 1));
    rig.data.current[2 * B + 5] ^= 0x40;
    assert_eq!(rig.ask(read(0, 4)), Reply::Failed { kind: Kind::Read, code: Code::Checksum, block: 2 });
    assert!(rig.notices.contains(&Notice::ChecksumMismatch { block: BlockIndex(2) }));
    let found = hashes(&mut rig, 0, 5);
    let intact: Vec<bool> = found.iter().map(|h| h.intact).collect();
    assert_eq!(intact, vec![true, true, false, true, true]);
    rig.done(write(2, 1, 8));
    assert!(rig.bytes(0, 4).is_ok());
}

#[test]
fn r10_a_bad_map_page_makes_regions_dirty_and_blocks_unverified_until_equalised() {
    let mut rig = Rig::attached();
    rig.done(write(0, 2, 1));
    rig.done(write(300, 1, 2));
    rig.flush(1);
    rig.clean(1, &[(0, 1), (1, 1)]);
    let at = Layout::new(BLOCKS).map(0) as usize;
    rig.meta.current[at + 100] ^= 1;
    rig.meta.durable[at + 100] ^= 1;
    rig.kill();
    rig.attach(2, 1);
    assert_eq!(rig.regions().0, 0, "not looked at yet");
    assert_eq!(rig.bytes(700, 1), Err(Code::Checksum), "a block that was never written is no zero any more");
    assert_eq!(rig.regions(), (0b111, 0b111, 0b111));
    let found = hashes(&mut rig, 0, 3);
    assert!(found.iter().all(|h| !h.intact && h.readable));
    assert_eq!(found[1].hash, expected_hash(&pattern(1, 1, 1)), "the hash is of what is on the disk");
    // Restamped, copied to, zeroed: known again.
    rig.done(Request::Restamp { block: BlockIndex(0), blocks: [0b101, 0, 0, 0] });
    assert_eq!(rig.bytes(0, 1).unwrap(), pattern(0, 1, 1));
    assert_eq!(rig.bytes(2, 1).unwrap(), Bytes::from(vec![0; B]));
    assert_eq!(rig.bytes(1, 1), Err(Code::Checksum));
    rig.done(Request::WriteZeroes { block: BlockIndex(512), count: 256, fua: false });
    assert!(rig.bytes(512, 256).is_ok());
    // And it stays so.
    rig.flush(1);
    rig.power_cut(&mut Rng(3));
    rig.attach(3, 1);
    assert_eq!(rig.bytes(1, 1), Err(Code::Checksum));
    assert!(rig.bytes(512, 256).is_ok() && rig.bytes(0, 1).is_ok());
}

#[test]
fn r10_a_bad_sum_spoils_the_blocks_of_its_region_alone() {
    let mut rig = Rig::attached();
    rig.done(write(0, 2, 1));
    rig.done(write(300, 1, 2));
    rig.flush(1);
    rig.clean(1, &[(0, 1), (1, 1)]);
    // A block's sum in the second region.
    let at = Layout::new(BLOCKS).map(0) as usize + 512 + 1024 + 500;
    rig.meta.current[at] ^= 1;
    rig.meta.durable[at] ^= 1;
    rig.kill();
    rig.attach(2, 1);
    assert_eq!(rig.bytes(0, 2).unwrap(), pattern(0, 2, 1));
    assert_eq!(rig.regions(), (0b010, 0b010, 0b011), "found with the page");
    assert_eq!(rig.bytes(300, 1), Err(Code::Checksum));
    assert_eq!(rig.bytes(512, 1).unwrap(), Bytes::from(vec![0; B]));
    // The page is written, and what was bad of it stays so.
    rig.done(write(2, 1, 3));
    rig.flush(1);
    rig.power_cut(&mut Rng(3));
    rig.attach(3, 1);
    assert_eq!(rig.bytes(0, 2).unwrap(), pattern(0, 2, 1));
    assert_eq!(rig.bytes(300, 1), Err(Code::Checksum));
}

/// A clean replica, attached anew: blocks 0 and 1 were written, and the page of its map that has them is bad, which it has
/// yet to see.
fn attached_to_a_bad_map_page() -> Rig {
    let mut rig = Rig::attached();
    rig.done(write(0, 2, 1));
    rig.flush(1);
    rig.clean(1, &[(0, 1)]);
    let at = Layout::new(BLOCKS).map(0) as usize;
    rig.meta.current[at + 100] ^= 1;
    rig.meta.durable[at + 100] ^= 1;
    rig.kill();
    rig.attach(2, 1);
    rig
}

#[test]
fn r8_what_became_suspect_after_a_session_has_looked_is_not_accounted_for_by_it() {
    let mut rig = attached_to_a_bad_map_page();
    assert_eq!(rig.regions().1, 0, "what the session is told");
    assert_eq!(rig.bytes(0, 1), Err(Code::Checksum));
    let set = SetView { version: SetVersion(9), members: vec![ids().replica], clean: CleanNo(9) };
    rig.done(Request::StoreSet { set: set.clone(), accounted: true });
    let info = rig.attach(2, 2);
    assert!(info.told && !info.accounted);
}

#[test]
fn r6_what_was_found_suspect_is_not_cleaned_before_it_is_settled() {
    let mut rig = attached_to_a_bad_map_page();
    // The page is looked at only now, and the owner knows nothing of what it finds.
    assert_eq!(rig.bytes(0, 1), Err(Code::Checksum));
    rig.flush(1);
    rig.clean(2, &[(0, 1), (1, 1), (2, 1)]);
    assert_eq!((rig.regions().0, rig.regions().1), (0b111, 0b111));
    rig.done(Request::Settle { entries: vec![proto::frame::CleanEntry { region: RegionIndex(0), flush: FlushNo(1) }] });
    rig.clean(3, &[(0, 1), (1, 1), (2, 1)]);
    assert_eq!((rig.regions().0, rig.regions().1), (0b110, 0b110));
}

#[test]
fn r10_a_lost_map_page_is_no_unallocated_one() {
    let mut rig = Rig::attached();
    rig.done(write(0, 2, 1));
    rig.flush(1);
    let at = Layout::new(BLOCKS).map(0) as usize;
    rig.meta.durable[at..at + B].fill(0);
    rig.meta.current[at..at + B].fill(0);
    rig.kill();
    rig.attach(2, 1);
    assert_eq!(rig.bytes(0, 2), Err(Code::Checksum));
    // The other page was never written, and its blocks are unallocated.
    assert!(rig.bytes(768, 1).is_ok());
}

#[test]
fn a_bad_bitmap_page_counts_as_all_dirty() {
    let mut rig = Rig::attached();
    rig.done(write(0, 2, 1));
    rig.flush(1);
    let layout = Layout::new(BLOCKS);
    for at in [layout.dirty(0), layout.presence(0)] {
        rig.meta.current[at as usize + 70] ^= 1;
    }
    rig.kill();
    assert_eq!(rig.opened.as_ref().unwrap().as_ref().unwrap().bad_bitmap_pages, 2);
    let info = rig.attach(2, 1);
    assert_eq!((info.dirty, info.suspect), (7, 7));
    assert_eq!(rig.bytes(0, 2).unwrap(), pattern(0, 2, 1), "a good map page is believed");
    assert_eq!(rig.bytes(768, 1), Err(Code::Checksum), "a missing one may have been lost");
}

#[test]
fn discard_frees_and_reads_as_zeroes() {
    let mut rig = Rig::attached();
    rig.done(write(200, 200, 1));
    rig.trace.clear();
    rig.done(Request::Discard { block: BlockIndex(0), count: BLOCKS as u32 });
    let punches: Vec<_> = rig.trace.iter().filter(|io| matches!(io, DiskIo::Punch { .. })).collect();
    assert_eq!(punches, vec![&DiskIo::Punch { offset: 0, len: 768 * B as u64 }], "one punch for the run");
    assert_eq!(rig.bytes(200, 200).unwrap(), Bytes::from(vec![0; 200 * B]));
    assert_eq!(rig.regions().2, 0);
    // A punch that fails only wastes space: the old bytes go all the same.
    rig.done(write(0, 200, 1));
    rig.fail = Box::new(|io| matches!(io, DiskIo::Punch { .. }).then_some(DiskError::Io));
    rig.done(Request::Discard { block: BlockIndex(0), count: 200 });
    assert_eq!(rig.bytes(0, 1).unwrap(), Bytes::from(vec![0; B]));
    assert!(rig.data.current[..200 * B].iter().all(|b| *b == 0));
    rig.done(write(0, 1, 1));
    rig.fail = Box::new(|io| is_data(io).then_some(DiskError::Io));
    assert_eq!(failed(&rig.ask(Request::Discard { block: BlockIndex(0), count: 1 })), Code::WriteFailed);
}

#[test]
fn r10_what_a_lost_allocation_left_behind_is_gone_before_anybody_looks() {
    // Without a map page: the region is freed when the replica is opened.
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    rig.power_cut_that_kept_everything();
    assert!(rig.data.current.iter().all(|b| *b == 0));
    // With one: when the page is loaded.
    rig.attach(1, 2);
    rig.done(write(0, 1, 1));
    rig.flush(1);
    rig.done(write(3, 2, 2));
    rig.power_cut_that_kept_everything();
    rig.attach(1, 3);
    assert_eq!(rig.bytes(3, 2).unwrap(), Bytes::from(vec![0; 2 * B]));
    assert!(rig.data.current[B..].iter().all(|b| *b == 0));
    rig.done(write(3, 1, 3));
    assert_eq!(rig.bytes(0, 4).unwrap()[3 * B..], pattern(3, 1, 3));
    // What can't be freed is not taken for zeroes.
    rig.power_cut_that_kept_everything();
    rig.attach(1, 4);
    rig.fail = Box::new(|io| matches!(io, DiskIo::Punch { .. }).then_some(DiskError::Io));
    assert_eq!(rig.bytes(3, 1), Err(Code::Checksum));
    let mut rig = Rig::attached();
    rig.done(write(3, 1, 1));
    rig.fail = Box::new(|io| matches!(io, DiskIo::Punch { .. }).then_some(DiskError::Io));
    rig.power_cut_that_kept_everything();
    rig.attach(1, 2);
    assert_eq!(rig.bytes(3, 1), Err(Code::Checksum));
}

#[test]
fn r10_a_write_that_failed_leaves_nothing_in_a_block_that_held_nothing() {
    let mut rig = Rig::attached();
    rig.done(write(1, 1, 1));
    rig.fail = Box::new(|io| matches!(io, DiskIo::Write { file: FileKind::Data, .. }).then_some(DiskError::NoSpace));
    rig.trace.clear();
    assert_eq!(failed(&rig.ask(write(0, 4, 2))), Code::NoSpace);
    let punches: Vec<_> = rig.trace.iter().filter(|io| matches!(io, DiskIo::Punch { .. })).collect();
    let punch = |block: u64, count: u64| DiskIo::Punch { offset: block * B as u64, len: count * B as u64 };
    assert_eq!(punches, vec![&punch(0, 1), &punch(2, 2)]);
    assert_eq!(rig.bytes(2, 2).unwrap(), Bytes::from(vec![0; 2 * B]));
    rig.fail = Box::new(|io| is_data(io).then_some(DiskError::Io));
    assert_eq!(failed(&rig.ask(write(0, 4, 2))), Code::WriteFailed);
    assert_eq!(rig.bytes(2, 1), Err(Code::Checksum), "not known, so not zeroes");
}

#[test]
fn a_memory_full_of_new_allocations_is_flushed_for_its_own_sake() {
    let mut rig = Rig::attached();
    (0..3).for_each(|page| rig.done(write(page * 768, 1, 1)));
    rig.cache_pages = 1;
    rig.flush(1);
    rig.kill();
    rig.core.map.set_hard_limit(2);
    rig.attach(1, 2);
    let tags: Vec<u64> = (0..9).map(|i| rig.send(write(i % 3 * 768 + 1 + i, 1, i))).collect();
    rig.run();
    for (i, tag) in (0..).zip(&tags) {
        assert_eq!(rig.reply(*tag), Some(&Reply::Done(Kind::Write)));
        assert_eq!(rig.bytes(i % 3 * 768 + 1 + i, 1).unwrap(), pattern(i % 3 * 768 + 1 + i, 1, i));
    }
}

#[test]
fn no_space_for_the_dirty_bit_fails_the_write_and_nothing_else() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.fail = Box::new(|io| {
        (matches!(io, DiskIo::Write { file: FileKind::Meta, .. }) && !is_journal(io)).then_some(DiskError::NoSpace)
    });
    assert_eq!(failed(&rig.ask(write(1000, 1, 1))), Code::NoSpace);
    assert!(rig.faulted.is_none());
    rig.done(write(1, 1, 2));
    assert_eq!(rig.bytes(1000, 1).unwrap(), Bytes::from(vec![0; B]));
    rig.fail = Box::new(|_| None);
    rig.done(write(1000, 1, 3));
    assert_eq!(rig.bytes(1000, 1).unwrap(), pattern(1000, 1, 3));
}

#[test]
fn a_failed_data_write_is_answered_and_the_replica_goes_on() {
    for (error, code) in [(DiskError::NoSpace, Code::NoSpace), (DiskError::Io, Code::WriteFailed)] {
        let mut rig = Rig::attached();
        rig.fail = Box::new(move |io| is_data(io).then_some(error));
        assert_eq!(failed(&rig.ask(write(0, 1, 1))), code);
        assert!(rig.faulted.is_none());
        rig.fail = Box::new(|_| None);
        rig.done(write(0, 1, 2));
        assert_eq!(rig.bytes(0, 1).unwrap(), pattern(0, 1, 2));
    }
}

#[test]
fn a_failed_sync_faults_the_replica_until_it_is_opened_again() {
    let mut rig = Rig::attached();
    rig.done(write(0, 1, 1));
    rig.fail = Box::new(|io| matches!(io, DiskIo::Sync { .. }).then_some(DiskError::Io));
    assert_eq!(failed(&rig.ask(Request::Flush { flush: FlushNo(1) })), Code::FlushFailed);
    assert!(matches!(rig.faulted, Some(FaultReason::Sync(_))));
    rig.fail = Box::new(|_| None);
    assert_eq!(failed(&rig.ask(read(0, 1))), Code::Faulted);
    let tag = rig.send_as(ConnId(2), attach_id(2, 1), Rig::attach_request());
    assert_eq!(failed(rig.reply(tag).unwrap()), Code::Faulted);
    assert!(rig.core.is_quiet());
    rig.power_cut(&mut Rng(1));
    assert_eq!(rig.attach(2, 1).held, AttachId::default(), "it has restarted");
}

#[test]
fn an_unreadable_block_is_named_and_hides_no_neighbour() {
    let mut rig = Rig::attached();
    rig.done(write(0, 64, 1));
    let hits = |offset: u64, len: u64| offset <= 7 * B as u64 && 7 * (B as u64) < offset + len;
    rig.fail = Box::new(move |io| match io {
        DiskIo::Read { file: FileKind::Data, offset, len } if hits(*offset, u64::from(*len)) => Some(DiskError::Io),
        _ => None,
    });
    assert_eq!(failed(&rig.ask(read(0, 64))), Code::ReadFailed);
    let found = hashes(&mut rig, 0, 64);
    assert_eq!(found.iter().filter(|h| !h.readable).count(), 1);
    assert!(!found[7].readable && found[8].intact);
    let restamp = Request::Restamp { block: BlockIndex(7), blocks: [1, 0, 0, 0] };
    assert_eq!(failed(&rig.ask(restamp)), Code::ReadFailed);
}

fn target() -> CopyTarget {
    CopyTarget { addr: "there:1".to_owned(), replica: ReplicaId::default(), attach: attach_id(1, 9) }
}

#[test]
fn a_copy_sends_what_is_on_the_disk_and_ends_with_the_last_answer() {
    let mut rig = Rig::attached();
    rig.done(write(0, 3, 1));
    let copy = Request::CopyTo { block: BlockIndex(0), blocks: [0b11_1111, 0, 0, 1 << 63], target: target() };
    let tag = rig.send(copy);
    rig.run();
    let sent = std::mem::take(&mut rig.sent);
    let runs: Vec<(u64, u32, bool)> = sent
        .iter()
        .map(|(_, request)| match request {
            Request::CopyWrite { block, count, sums, data, .. } => {
                assert_eq!(&block_sums(data), sums);
                (block.0, *count, data.is_empty())
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let mut sorted = runs.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, vec![(0, 3, false), (3, 3, true), (255, 1, true)]);
    for (n, (token, _)) in sent.iter().enumerate() {
        assert_eq!(rig.reply(tag), None, "{n} of {} answered", sent.len());
        rig.step(Input::CopySent { token: *token, result: Ok(()) });
    }
    assert_eq!(rig.reply(tag), Some(&Reply::Done(Kind::CopyTo)));
}

#[test]
fn r10_a_copy_does_not_send_what_has_changed_on_the_disk() {
    let mut rig = Rig::attached();
    rig.done(write(0, 3, 1));
    rig.data.current[B] ^= 1;
    let copy = Request::CopyTo { block: BlockIndex(0), blocks: [0b111, 0, 0, 0], target: target() };
    assert_eq!(failed(&rig.ask(copy.clone())), Code::Checksum);
    assert!(rig.sent.is_empty());
    rig.done(Request::Restamp { block: BlockIndex(0), blocks: [0b10, 0, 0, 0] });
    rig.send(copy);
    rig.run();
    assert_eq!(rig.sent.len(), 1, "taken for right, it is sent");
}

#[test]
fn r10_a_distrusted_block_is_bad_until_it_is_written() {
    let mut rig = Rig::attached();
    rig.done(write(0, 2, 1));
    // One that holds something, and one in a region that nobody ever wrote to.
    for block in [0, 512] {
        rig.done(Request::Distrust { block: BlockIndex(block), blocks: [0b10, 0, 0, 0] });
    }
    let check = |rig: &mut Rig| {
        assert_eq!((rig.bytes(1, 1), rig.bytes(513, 1)), (Err(Code::Checksum), Err(Code::Checksum)));
        assert_eq!(rig.bytes(0, 1).unwrap(), pattern(0, 1, 1));
        assert_eq!(rig.bytes(512, 1).unwrap(), Bytes::from(vec![0; B]));
        let copy = Request::CopyTo { block: BlockIndex(0), blocks: [0b11, 0, 0, 0], target: target() };
        assert_eq!(failed(&rig.ask(copy)), Code::Checksum);
        for first in [0, 512] {
            let found = hashes(rig, first, 2);
            let may_be_right: Vec<bool> = found.iter().map(|h| h.readable).collect();
            assert_eq!(may_be_right, vec![true, false]);
            assert!(!found[1].intact);
        }
    };
    check(&mut rig);
    rig.flush(1);
    rig.power_cut(&mut Rng(3));
    rig.attach(2, 1);
    check(&mut rig);
    rig.done(write(1, 1, 2));
    rig.done(write(513, 1, 2));
    // The journal of blocks that were fresh tells nothing of them.
    rig.kill();
    rig.attach(3, 1);
    assert_eq!((rig.bytes(1, 1).unwrap(), rig.bytes(513, 1).unwrap()), (pattern(1, 1, 2), pattern(513, 1, 2)));
    rig.done(Request::Distrust { block: BlockIndex(0), blocks: [0b10, 0, 0, 0] });
    rig.flush(1);
    rig.done(Request::Discard { block: BlockIndex(0), count: 8 });
    rig.kill();
    rig.attach(4, 1);
    assert_eq!(rig.bytes(1, 1).unwrap(), Bytes::from(vec![0; B]));
}

#[test]
fn a_copy_that_a_peer_refuses_or_that_loses_its_attach_sends_no_more() {
    let mut rig = Rig::attached();
    // Alternate blocks: many runs.
    (0..48).for_each(|i| rig.done(write(i * 2, 1, 1)));
    let copy = Request::CopyTo { block: BlockIndex(0), blocks: [u64::MAX, u64::MAX, 0, 0], target: target() };
    let tag = rig.send(copy.clone());
    rig.run();
    let sent = std::mem::take(&mut rig.sent);
    assert_eq!(sent.len(), 32, "the window");
    for (token, _) in &sent {
        rig.step(Input::CopySent { token: *token, result: Err(CopyError::Refused(Code::NotAttached)) });
    }
    rig.run();
    assert!(rig.sent.is_empty());
    assert_eq!(failed(rig.reply(tag).unwrap()), Code::PeerRefused);

    let tag = rig.send(copy);
    rig.run();
    let sent = std::mem::take(&mut rig.sent);
    rig.step(Input::ConnectionLost { conn: ConnId(1) });
    for (token, _) in &sent {
        rig.step(Input::CopySent { token: *token, result: Ok(()) });
    }
    rig.run();
    assert!(rig.sent.is_empty() && rig.reply(tag).is_none_or(|r| failed(r) == Code::NotAttached));
}

#[test]
fn a_set_is_stored_durably_and_never_goes_back() {
    let mut rig = Rig::attached();
    let set =
        |version, clean| SetView { version: SetVersion(version), members: vec![ids().replica], clean: CleanNo(clean) };
    rig.done(Request::StoreSet { set: set(3, 5), accounted: true });
    rig.done(Request::StoreSet { set: set(3, 2), accounted: true });
    assert_eq!(failed(&rig.ask(Request::StoreSet { set: set(2, 9), accounted: true })), Code::Invalid);
    let info = rig.attach(1, 9);
    assert!(info.told && info.accounted);
    rig.power_cut(&mut Rng(1));
    let info = rig.attach(2, 1);
    assert_eq!((info.set, info.told, info.accounted), (set(3, 5), false, false));
    rig.done(Request::StoreSet { set: set(4, 5), accounted: false });
    let info = rig.attach(2, 2);
    assert!(info.told && !info.accounted, "told by a session that does not know what is suspect");
}

#[test]
fn mark_all_dirty_is_durable() {
    let mut rig = Rig::attached();
    rig.done(Request::MarkAllDirty);
    rig.power_cut(&mut Rng(1));
    let info = rig.attach(2, 1);
    assert_eq!((info.dirty, info.suspect), (7, 7));
}

#[test]
fn a_rebuilt_replica_says_so_until_it_is_settled_and_counted_in() {
    let mut rig = Rig::create(Create::Rebuilt);
    let info = rig.attach(1, 1);
    assert_eq!((info.rebuilt, info.dirty, info.suspect), (true, 7, 7));
    assert_eq!(rig.bytes(0, 1), Err(Code::Checksum), "its blocks are not zeroes");
    assert_eq!(rig.regions().2, 0b111_1111);
    rig.done(write(0, 256, 1));
    assert!(rig.bytes(0, 256).is_ok());
    rig.done(Request::Restamp { block: BlockIndex(256), blocks: [u64::MAX; 4] });
    assert!(rig.bytes(256, 256).is_ok());
    let set = SetView { version: SetVersion(1), members: vec![ids().replica], clean: CleanNo(0) };
    rig.done(Request::StoreSet { set: set.clone(), accounted: true });
    assert!(rig.attach(1, 2).rebuilt, "suspect regions are left");
    rig.flush(1);
    let entries = (0..7).map(|r| proto::frame::CleanEntry { region: RegionIndex(r), flush: FlushNo(1) }).collect();
    rig.done(Request::Settle { entries });
    rig.done(Request::StoreSet { set, accounted: true });
    assert!(!rig.attach(1, 3).rebuilt);
}

#[test]
fn a_replica_added_later_is_all_dirty_and_empty() {
    let mut rig = Rig::create(Create::AllDirty);
    let info = rig.attach(1, 1);
    assert_eq!((info.rebuilt, info.dirty, info.suspect), (false, 7, 0));
    assert!(rig.bytes(0, 1).is_ok());
    let mut lost = Rig::create(Create::Lost);
    let info = lost.attach(1, 1);
    assert_eq!((info.rebuilt, info.dirty, info.suspect), (true, 7, 7));
    assert!(lost.bytes(0, 1).is_ok());
}

#[test]
fn ranges_past_the_end_are_invalid() {
    let mut rig = Rig::attached();
    let end = BlockIndex(BLOCKS);
    let mask = [1, 0, 0, 0];
    for request in [
        read(BLOCKS - 1, 2),
        read(u64::MAX, 1),
        read(0, 0),
        write(BLOCKS, 1, 1),
        Request::Discard { block: end, count: 1 },
        Request::WriteZeroes { block: BlockIndex(1), count: BLOCKS as u32, fua: false },
        Request::Hashes { block: BlockIndex(255), count: 2, key: [0; 32] },
        Request::Hashes { block: end, count: 1, key: [0; 32] },
        Request::CopyTo { block: end, blocks: mask, target: target() },
        Request::CopyTo { block: BlockIndex(0), blocks: [0; 4], target: target() },
        Request::Restamp { block: BlockIndex(u64::MAX - 1), blocks: [4, 0, 0, 0] },
        Request::Distrust { block: end, blocks: mask },
        Request::ListRegions { first: RegionIndex(1), count: 7 },
        Request::ListRegions { first: RegionIndex(u32::MAX), count: u32::MAX },
    ] {
        assert_eq!(failed(&rig.ask(request.clone())), Code::Invalid, "{request:?}");
    }
}
