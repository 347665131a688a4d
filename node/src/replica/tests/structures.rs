//! Golden bytes of every disk structure, damaged superblocks, foreign and truncated files, and arbitrary bytes.

use bytes::BytesMut;
use proptest::prelude::*;
use proto::frame::SetView;
use proto::id::*;

use super::super::layout::{self, BITMAP_BITS, Layout, MapPage, PageKind};
use super::super::superblock::{BadCopy, Superblock};
use super::super::*;
use super::rig::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn superblock() -> Superblock {
    Superblock {
        generation: 9,
        ids: ids(),
        blocks: BLOCKS,
        epoch: Epoch(0x0102),
        kept_epoch: Epoch(0x0103),
        set: SetView {
            version: SetVersion(3),
            members: vec![ReplicaId(uuid::Uuid::from_u128(4)), ReplicaId(uuid::Uuid::from_u128(5))],
            clean: CleanNo(7),
        },
        rebuilt: true,
    }
}

#[test]
fn golden_superblock() {
    let bytes = superblock().encode();
    assert_eq!(bytes.len(), 4096);
    let golden = concat!(
        "6d643939",
        "7265706c",
        "03000000",
        "01000000",
        "0900000000000000",
        "00000000000000000000000000000001",
        "00000000000000000000000000000002",
        "00000000000000000000000000000003",
        "00000000000000000000000000000004",
        "c006000000000000",
        "0201000000000000",
        "0300000000000000",
        "0700000000000000",
        "0200000000000000",
        "00000000000000000000000000000004",
        "00000000000000000000000000000005",
        "00000000000000000000000000000000",
        "00000000000000000000000000000000",
        "00000000000000000000000000000000",
        "0301000000000000",
    );
    assert_eq!(hex(&bytes[..golden.len() / 2]), golden);
    assert!(bytes[golden.len() / 2..4092].iter().all(|b| *b == 0));
    assert_eq!(bytes[4092..], crc32fast::hash(&bytes[..4092]).to_le_bytes());
    assert_eq!(Superblock::decode(&bytes), Ok(superblock()));
}

#[test]
fn a_superblock_of_another_layout_or_with_any_bit_flipped_is_bad() {
    let good = superblock().encode();
    for at in [0, 9, 88, 120, 2000, 4095] {
        let mut bad = good.clone();
        bad[at] ^= 4;
        assert_eq!(Superblock::decode(&bad), Err(BadCopy::Damaged), "byte {at}");
    }
    let mut other = good.clone();
    other[8] = 2;
    let crc = crc32fast::hash(&other[..4092]);
    other[4092..].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Superblock::decode(&other), Err(BadCopy::Layout(2)));
    assert_eq!(Superblock::decode(&[0; 4096]), Err(BadCopy::Zero));
}

#[test]
fn golden_bitmap_page() {
    let mut bytes = BytesMut::new();
    let words = (0..504).map(|i| if i == 0 { 0x8000_0000_0000_0005 } else { 0 });
    layout::encode_bitmap(&mut bytes, PageKind::Presence, 2, ids().replica, words);
    assert_eq!(bytes.len(), 4096);
    let golden = concat!(
        "0200000000000000",
        "0200000000000000",
        "0000000000000000",
        "00000000000000000000000000000004",
        "00000000000000000000000000000000",
        "0500000000000080",
    );
    assert_eq!(&bytes[..4], b"m9pg");
    assert_eq!(bytes[4..8], crc32fast::hash(&bytes[8..]).to_le_bytes());
    assert_eq!(hex(&bytes[8..8 + golden.len() / 2]), golden);
    let decode = |kind, index, replica| {
        layout::decode_bitmap(&bytes, kind, index, replica).map(|words| words.take(2).collect::<Vec<_>>())
    };
    assert_eq!(decode(PageKind::Presence, 2, ids().replica), Some(vec![0x8000_0000_0000_0005, 0]));
    assert_eq!(decode(PageKind::Dirty, 2, ids().replica), None, "another kind");
    assert_eq!(decode(PageKind::Presence, 1, ids().replica), None, "another place");
    assert_eq!(decode(PageKind::Presence, 2, ReplicaId::default()), None, "another replica's");
}

#[test]
fn golden_map_page() {
    let mut map = MapPage::empty();
    map.set(0, 0x0403_0201);
    map.set(256 + 255, 0xaabb_ccdd);
    map.unverified[8] = 1 << 3;
    let mut bytes = BytesMut::new();
    layout::encode_map(&mut bytes, 5, ids().replica, &map);
    assert_eq!(bytes.len(), 4096);
    assert_eq!(bytes[8], 3);
    assert_eq!(hex(&bytes[512..520]), "0102030400000000", "first region's sums");
    assert_eq!(hex(&bytes[64..72]), "0100000000000000", "first region's allocation");
    assert_eq!(hex(&bytes[512 + 2044..512 + 2048]), "ddccbbaa", "second region's sums");
    assert_eq!(hex(&bytes[64 + 64 + 24..64 + 64 + 32]), "0000000000000080", "second region's allocation");
    assert_eq!(hex(&bytes[64 + 128 + 32..64 + 128 + 40]), "0800000000000000", "third region's unverified blocks");
    for r in 0..3 {
        let sums = &bytes[512 + r * 1024..][..1024];
        assert_eq!(bytes[256 + r * 4..][..4], crc32fast::hash(sums).to_le_bytes());
    }
    assert_eq!(bytes[4..8], crc32fast::hash(&bytes[8..512]).to_le_bytes());
    assert!(bytes[268..512].iter().chain(&bytes[512 + 3 * 1024..]).all(|b| *b == 0));
    assert_eq!(layout::decode_map(&bytes, 5, ids().replica), (map, [false; 3]));
    assert_eq!(layout::decode_map(&[0; 4096], 5, ids().replica).1, [true; 3], "a hole is no page");
}

/// Of a write that was cut short any sectors may be there.
#[test]
fn a_torn_map_page_has_its_other_regions() {
    let encoded = |map: &MapPage| {
        let mut bytes = BytesMut::new();
        layout::encode_map(&mut bytes, 5, ids().replica, map);
        bytes
    };
    let mut map = MapPage::empty();
    for (i, sum) in [(3, 77), (300, 78), (700, 79)] {
        map.set(i, sum);
    }
    map.distrust(301);
    let before = encoded(&map);
    let was = map.clone();
    for (i, sum) in [(3, 177), (200, 178)] {
        map.set(i, sum);
    }
    let after = encoded(&map);
    for sectors in 0..256u32 {
        let from = |i: usize| if sectors >> (i / 512) & 1 == 0 { before[i] } else { after[i] };
        let torn: Vec<u8> = (0..4096).map(from).collect();
        let (read, bad) = layout::decode_map(&torn, 5, ids().replica);
        assert_eq!(bad[1..], [false; 2], "{sectors:#b}");
        assert_eq!((&read.sums[256..], &read.allocated[4..]), (&was.sums[256..], &was.allocated[4..]));
        assert_eq!(read.unverified[4..], was.unverified[4..]);
        // The first sector and the two with the region's sums are of one version, or it is bad.
        assert_eq!(bad[0], ![0b000, 0b111].contains(&(sectors & 0b111)), "{sectors:#b}");
        if bad[0] {
            assert!((0..256).all(|i| read.is_unverified(i)));
        } else {
            assert_eq!(read, if sectors & 1 == 0 { was.clone() } else { map.clone() });
        }
    }
}

#[test]
fn golden_journal_page() {
    let records = vec![(0x0102_0304_0506, 7), (9, 1)];
    let page = layout::JournalPage { number: 0x0a0b, oldest: 0x0a0a, whole: true, records };
    let mut bytes = BytesMut::new();
    layout::encode_journal(&mut bytes, 3, ids().replica, [0xee; 16], &page);
    assert_eq!(bytes.len(), 4096);
    let golden = concat!(
        "0400000000000000",
        "0300000000000000",
        "0000000000000000",
        "00000000000000000000000000000004",
        "00000000000000000000000000000000",
        "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee",
        "0b0a000000000000",
        "0a0a000000000000",
        "02000000",
        "01000000",
        "0605040302010000",
        "07000000",
        "0900000000000000",
        "01000000",
    );
    assert_eq!(bytes[4..8], crc32fast::hash(&bytes[8..]).to_le_bytes());
    assert_eq!(hex(&bytes[8..8 + golden.len() / 2]), golden);
    assert!(bytes[8 + golden.len() / 2..].iter().all(|b| *b == 0));
    let decode = |bytes: &[u8], slot, era| layout::decode_journal(bytes, slot, ids().replica, era);
    assert_eq!(decode(&bytes, 3, [0xee; 16]), Some(page));
    assert_eq!(decode(&bytes, 3, [0xed; 16]), None, "another era");
    assert_eq!(decode(&bytes, 2, [0xee; 16]), None, "another place");
    bytes[70] ^= 1;
    assert_eq!(decode(&bytes, 3, [0xee; 16]), None, "torn");
}

#[test]
fn layout_of_a_large_replica() {
    let layout = Layout::new(200 << 30 >> 12);
    assert_eq!((layout.regions, layout.map_pages), (204_800, 68_267));
    assert_eq!((layout.dirty_pages, layout.presence_pages), (7, 3));
    assert_eq!(layout.map(0), 28 * 4096);
    assert_eq!(BITMAP_BITS, 32256);
}

#[test]
fn one_bad_superblock_copy_is_repaired_from_the_other() {
    for copy in 0..2 {
        let mut rig = Rig::attached();
        rig.attach(4, 1);
        rig.meta.durable[copy * B + 100] ^= 1;
        rig.meta.current[copy * B + 100] ^= 1;
        let report = rig.reopen().clone().unwrap();
        assert_eq!((report.repaired_superblock, report.epoch), (Some(copy as u8), Epoch(4)));
        assert!(Superblock::decode(&rig.meta.durable[copy * B..(copy + 1) * B]).is_ok(), "durably");
        assert_eq!(rig.reopen().clone().unwrap().repaired_superblock, None);
    }
}

#[test]
fn two_bad_superblock_copies_are_refused() {
    let mut rig = Rig::attached();
    for copy in 0..2 {
        rig.meta.current[copy * B + 100] ^= 1;
    }
    assert_eq!(rig.reopen(), &Err(OpenError::NoSuperblock { empty: false }));
    assert_eq!(failed(&rig.ask(read(0, 1))), proto::frame::Code::Faulted);
    rig.meta.current.fill(0);
    assert_eq!(rig.reopen(), &Err(OpenError::NoSuperblock { empty: true }));
}

#[test]
fn foreign_and_truncated_files_are_refused_and_named() {
    let mut rig = Rig::attached();
    let mut other = Superblock { generation: 99, ..superblock() };
    other.ids.volume = VolumeId(uuid::Uuid::from_u128(77));
    let before = rig.meta.current.clone();
    rig.meta.current[..B].copy_from_slice(&other.encode());
    assert_eq!(rig.reopen(), &Err(OpenError::Foreign { found: other.ids.into(), expected: ids().into() }));
    let text = rig.opened.as_ref().unwrap().as_ref().unwrap_err().to_string();
    assert!(text.contains(&other.ids.volume.to_string()) && text.contains(&ids().volume.to_string()), "{text}");
    rig.meta.current = before;
    rig.data.current.truncate(5 * B);
    let layout = Layout::new(BLOCKS);
    let (file, found) = (FileKind::Data, 5 * B as u64);
    assert_eq!(rig.reopen(), &Err(OpenError::Truncated { file, found, expected: layout.data_len() }));
    rig.meta.current.truncate(B);
    let (file, found) = (FileKind::Meta, B as u64);
    assert_eq!(rig.reopen(), &Err(OpenError::Truncated { file, found, expected: layout.meta_len() }));
}

#[test]
fn a_creation_cut_short_leaves_no_superblock() {
    // Whatever the crash leaves, either the replica is whole or its superblock says that it is not there.
    for steps in 0..8 {
        let mut out = Vec::new();
        let mut core = ReplicaCore::create(config(1), Create::Clean, &mut out);
        let mut meta = vec![0u8; Layout::new(BLOCKS).meta_len() as usize];
        for _ in 0..steps {
            let Some(at) = out.iter().position(|o| matches!(o, Output::Disk { .. })) else { break };
            let Output::Disk { op, io } = out.remove(at) else { unreachable!() };
            if let DiskIo::Write { offset, bytes, .. } = &io {
                meta[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
            }
            core.step(0, Input::DiskDone { op, result: Ok(DiskData::None) }, &mut out);
        }
        let layout = Layout::new(BLOCKS);
        let good = (0..2).any(|copy| Superblock::decode(&meta[copy * B..(copy + 1) * B]).is_ok());
        let at = layout.dirty(0) as usize;
        let bitmaps = layout::decode_bitmap(&meta[at..at + B], PageKind::Dirty, 0, ids().replica).is_some();
        assert!(!good || bitmaps, "a superblock without its bitmaps after {steps} steps");
    }
}

proptest! {
    #[test]
    fn arbitrary_pages_are_refused_not_believed(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
        prop_assert!(Superblock::decode(&bytes).is_err());
        prop_assert_eq!(layout::decode_map(&bytes, 0, ids().replica).1, [true; 3]);
        prop_assert!(layout::decode_bitmap(&bytes, PageKind::Dirty, 0, ids().replica).is_none());
    }

    #[test]
    fn a_flipped_bit_spoils_what_it_hits_of_a_map_page(at in 0usize..4096, bit in 0u8..8, index in 0u64..9) {
        let mut bytes = BytesMut::new();
        layout::encode_map(&mut bytes, index, ids().replica, &MapPage::empty());
        bytes[at] ^= 1 << bit;
        // Bytes 9..16, 24..32 and 48..64 are zero and under the checksum like everything else of the first sector.
        let expected = match at {
            0..512 => [true; 3],
            _ => [0, 1, 2].map(|r| (512 + r * 1024..1536 + r * 1024).contains(&at)),
        };
        prop_assert_eq!(layout::decode_map(&bytes, index, ids().replica).1, expected);
    }

    #[test]
    fn superblocks_survive_the_round_trip(
        generation in 0..=u64::MAX / 2,
        epoch in any::<u64>(),
        members in 0usize..=5,
    ) {
        let mut sb = superblock();
        sb.generation = generation;
        sb.epoch = Epoch(epoch);
        sb.set.members = (0..members).map(|i| ReplicaId(uuid::Uuid::from_u128(i as u128))).collect();
        prop_assert_eq!(Superblock::decode(&sb.encode()), Ok(sb.clone()));
        sb.generation |= 1 << 63;
        prop_assert!(Superblock::decode(&sb.encode()).is_err(), "no room for the next one");
    }
}
