//! Golden bytes of every frame, and arbitrary ones.

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::id::*;
use crate::limits::*;

const ATTACH: AttachId = AttachId { epoch: Epoch(0x0102), attach: AttachNo(3) };

fn id(n: u8) -> Uuid {
    Uuid::from_bytes([n; 16])
}

fn set() -> SetView {
    SetView { version: SetVersion(5), members: vec![ReplicaId(id(0xa1)), ReplicaId(id(0xa2))], clean: CleanNo(6) }
}

fn block(byte: u8) -> Bytes {
    vec![byte; BLOCK_SIZE as usize].into()
}

/// Every kind of request, and the bytes of its header and body.
fn requests() -> Vec<(Request, &'static str)> {
    let entries = vec![CleanEntry { region: RegionIndex(7), flush: FlushNo(8) }];
    let target = CopyTarget { addr: "n:1".into(), replica: ReplicaId(id(0xa3)), attach: ATTACH };
    let (data, sums) = (block(0x55), block_sums(&block(0x55)));
    vec![
        (
            Request::Hello {
                role: PeerRole::Node,
                cluster: ClusterId(id(1)),
                volume: VolumeId(id(2)),
                name: "gw".into(),
            },
            concat!(
                "6d643939010100000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "0000000029000000000000005c251f6a",
                "0101010101010101010101010101010101020202020202020202020202020202",
                "02020067775f815a00",
            ),
        ),
        (
            Request::Attach { replica: ReplicaId(id(3)), mirror: MirrorId(id(4)), lease_ms: 6000, set: set() },
            concat!(
                "6d643939010200000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "7017000055000000000000000f246354",
                "0303030303030303030303030303030304040404040404040404040404040404",
                "0500000000000000060000000000000002a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1",
                "a1a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2e572463a",
            ),
        ),
        (
            Request::Read { block: BlockIndex(0x10), count: 2 },
            concat!(
                "6d643939010300000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "020000000000000000000000bb0fdcc4",
            ),
        ),
        (
            Request::Write { block: BlockIndex(0x10), fua: true, sums: sums.clone(), data: data.clone() },
            concat!(
                "6d643939010401000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "01000000080000000010000048d52e93",
                "27dff463cd2e1f3e",
            ),
        ),
        (
            Request::WriteZeroes { block: BlockIndex(0x10), count: 0x300, fua: true },
            concat!(
                "6d643939010501000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "000300000000000000000000f3f4a97c",
            ),
        ),
        (
            Request::Discard { block: BlockIndex(0x10), count: 0x300 },
            concat!(
                "6d643939010600000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "0003000000000000000000007588081b",
            ),
        ),
        (
            Request::Flush { flush: FlushNo(0x21) },
            concat!(
                "6d643939010700000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000002100000000000000",
                "0000000000000000000000000c9db43f",
            ),
        ),
        (
            Request::ListRegions { first: RegionIndex(0x22), count: 0x23 },
            concat!(
                "6d643939010800000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000002200000000000000",
                "2300000000000000000000007f5ed4da",
            ),
        ),
        (
            Request::Clean { clean: CleanNo(0x24), entries: entries.clone() },
            concat!(
                "6d643939010900000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000002400000000000000",
                "010000001000000000000000f60445f4",
                "0700000008000000000000005534a8dc",
            ),
        ),
        (
            Request::Settle { entries },
            concat!(
                "6d643939010a00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "010000001000000000000000946a50c6",
                "0700000008000000000000005534a8dc",
            ),
        ),
        (
            Request::MarkAllDirty,
            concat!(
                "6d643939010b00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "000000000000000000000000c0a44d03",
            ),
        ),
        (
            Request::StoreSet { set: set(), accounted: true },
            concat!(
                "6d643939010c00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "0000000036000000000000004ae7e5ae",
                "010500000000000000060000000000000002a1a1a1a1a1a1a1a1a1a1a1a1a1a1",
                "a1a1a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a21a438d74",
            ),
        ),
        (
            Request::Hashes { block: BlockIndex(0x10), count: 4, key: [0x66; 32] },
            concat!(
                "6d643939010d00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "04000000240000000000000056f2b851",
                "6666666666666666666666666666666666666666666666666666666666666666",
                "11666370",
            ),
        ),
        (
            Request::CopyTo { block: BlockIndex(0x100), blocks: [1, 2, 3, 4], target },
            concat!(
                "6d643939010e00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000001000000000000",
                "0000000049000000000000000e827048",
                "0100000000000000020000000000000003000000000000000400000000000000",
                "a3a3a3a3a3a3a3a3a3a3a3a3a3a3a3a302010000000000000300000000000000",
                "03006e3a319d5f3dcc",
            ),
        ),
        (
            Request::CopyWrite { replica: ReplicaId(id(0xa3)), block: BlockIndex(0x10), count: 1, sums, data },
            concat!(
                "6d643939010f00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "01000000180000000010000024065843",
                "a3a3a3a3a3a3a3a3a3a3a3a3a3a3a3a327dff46333125524",
            ),
        ),
        (
            Request::CopyWrite {
                replica: ReplicaId(id(0xa3)),
                block: BlockIndex(0x10),
                count: 9,
                sums: vec![],
                data: Bytes::new(),
            },
            concat!(
                "6d643939010f00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "090000001400000000000000e5c6dd0e",
                "a3a3a3a3a3a3a3a3a3a3a3a3a3a3a3a3d52f0c89",
            ),
        ),
        (
            Request::Ping,
            concat!(
                "6d643939011000000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "000000000000000000000000f2d48de3",
            ),
        ),
        (
            Request::Detach,
            concat!(
                "6d643939011100000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "000000000000000000000000e2678ec1",
            ),
        ),
        (
            Request::Restamp { block: BlockIndex(0x100), blocks: [1, 2, 3, 4] },
            concat!(
                "6d643939011200000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000001000000000000",
                "000000002400000000000000265e540d",
                "0100000000000000020000000000000003000000000000000400000000000000",
                "0026699c",
            ),
        ),
        (
            Request::Distrust { block: BlockIndex(0x100), blocks: [1, 2, 3, 4] },
            concat!(
                "6d643939011300000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000001000000000000",
                "00000000240000000000000036ed572f",
                "0100000000000000020000000000000003000000000000000400000000000000",
                "0026699c",
            ),
        ),
    ]
}

/// Every kind of reply, and the bytes of its header and body.
fn replies() -> Vec<(Reply, &'static str)> {
    let info = AttachInfo {
        incarnation: Incarnation(0x11),
        held: AttachId { epoch: Epoch(1), attach: AttachNo(2) },
        stored_epoch: Epoch(3),
        kept_epoch: Epoch(2),
        told: true,
        accounted: false,
        set: set(),
        blocks: 1024,
        dirty: 4,
        suspect: 2,
        kept: false,
        rebuilt: true,
    };
    let window = RegionWindow {
        first: RegionIndex(8),
        count: 9,
        dirty: Bytes::from_static(&[0xff, 1]),
        suspect: Bytes::from_static(&[1, 0]),
        allocated: Bytes::from_static(&[3, 0]),
    };
    let hash = BlockHash { hash: [0xcc; 16], intact: true, readable: true, allocated: false };
    let (data, sums) = (block(0x55), block_sums(&block(0x55)));
    vec![
        (
            Reply::Done(Kind::Write),
            concat!(
                "6d643939018400000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "000000000000000000000000aaf7f926",
            ),
        ),
        (
            Reply::Failed { kind: Kind::Attach, code: Code::Superseded, block: 0x1234 },
            concat!(
                "6d643939018200000900000001000000",
                "07080000000000000201000000000000",
                "03000000000000003412000000000000",
                "0000000000000000000000009a9c6004",
            ),
        ),
        (
            Reply::Attached(info),
            concat!(
                "6d643939018200000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "000000007100000000000000c4cc0a8a",
                "1100000000000000010000000000000002000000000000000300000000000000",
                "0200000000000000000400000000000004000000020000000001010005000000",
                "00000000060000000000000002a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a2a2a2",
                "a2a2a2a2a2a2a2a2a2a2a2a2a2af2e3ca5",
            ),
        ),
        (
            Reply::Read { block: BlockIndex(0x10), sums, data },
            concat!(
                "6d643939018300000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000001000000000000000",
                "01000000080000000010000055b1537c",
                "27dff463cd2e1f3e",
            ),
        ),
        (
            Reply::Regions(window),
            concat!(
                "6d643939018800000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000800000000000000",
                "090000000a00000000000000c05529f4",
                "ff01010003007917f7fb",
            ),
        ),
        (
            Reply::Hashes(vec![hash]),
            concat!(
                "6d643939018d00000900000000000000",
                "07080000000000000201000000000000",
                "03000000000000000000000000000000",
                "0100000015000000000000005ba96860",
                "cccccccccccccccccccccccccccccccc03c8e70934",
            ),
        ),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn decode_request(encoded: &Encoded) -> Result<Request, FrameError> {
    let header = Header::decode(encoded.head[..HEADER_LEN].try_into().unwrap())?;
    Request::decode(&header, &encoded.head[HEADER_LEN..], encoded.payload.clone())
}

fn decode_reply(encoded: &Encoded) -> Result<Reply, FrameError> {
    let header = Header::decode(encoded.head[..HEADER_LEN].try_into().unwrap())?;
    Reply::decode(&header, &encoded.head[HEADER_LEN..], encoded.payload.clone())
}

#[test]
fn golden_requests() {
    let mut kinds = std::collections::BTreeSet::new();
    for (request, golden) in requests() {
        let encoded = request.encode(9, ATTACH, 0x0807);
        kinds.insert(request.kind());
        assert_eq!(hex(&encoded.head), golden, "{request:?}");
        assert_eq!(decode_request(&encoded).as_ref(), Ok(&request));
        let header = Header::decode(encoded.head[..HEADER_LEN].try_into().unwrap()).unwrap();
        assert_eq!((header.channel, header.attach, header.tag, header.is_reply), (9, ATTACH, 0x0807, false));
        assert_eq!(header.payload_len as usize, encoded.payload.len());
    }
    assert_eq!(kinds.len(), 19, "every kind has its golden bytes");
}

#[test]
fn golden_replies() {
    for (reply, golden) in replies() {
        let encoded = reply.encode(9, ATTACH, 0x0807);
        assert_eq!(hex(&encoded.head), golden, "{reply:?}");
        assert_eq!(decode_reply(&encoded).as_ref(), Ok(&reply));
    }
}

#[test]
fn every_code_keeps_its_number() {
    for n in 0..15 {
        assert_eq!(Code::try_from(n).unwrap() as u32, n);
    }
    assert_eq!(Code::try_from(15), Err(FrameError::Code(15)));
    for byte in 0..=0x7f {
        match Kind::try_from(byte) {
            Ok(kind) => assert_eq!(kind as u8, byte),
            Err(error) => assert_eq!(error, FrameError::Kind(byte)),
        }
    }
}

#[test]
fn a_header_is_refused_for_the_first_thing_that_is_wrong() {
    let ping = || -> [u8; HEADER_LEN] { Request::Ping.encode(0, ATTACH, 1).head[..].try_into().expect("no body") };
    let header = |change: &dyn Fn(&mut [u8; HEADER_LEN])| {
        let mut bytes = ping();
        change(&mut bytes);
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        Header::decode(&bytes)
    };
    assert!(header(&|_| ()).is_ok());
    assert_eq!(header(&|b| b[0] = 0), Err(FrameError::Magic(0x3939_6400)));
    assert_eq!(header(&|b| b[4] = 2), Err(FrameError::Version(2)));
    assert_eq!(header(&|b| b[5] = 0x7f), Err(FrameError::Kind(0x7f)));
    assert_eq!(header(&|b| b[52] = 3), Err(FrameError::Malformed("body shorter than its checksum")));
    let too_long = |what, found, limit| Err(FrameError::TooLong { what, found, limit });
    let long = MAX_BODY + 1;
    assert_eq!(
        header(&|b| b[52..56].copy_from_slice(&long.to_le_bytes())),
        too_long("body", long.into(), MAX_BODY.into())
    );
    let (long, limit) = ((1u32 << 20) + 1, 1 << 20);
    assert_eq!(header(&|b| b[56..60].copy_from_slice(&long.to_le_bytes())), too_long("payload", long.into(), limit));
    let mut bytes = ping();
    bytes[33] ^= 1;
    assert!(matches!(Header::decode(&bytes), Err(FrameError::HeaderCrc { .. })));
}

#[test]
fn requests_that_contradict_themselves_are_refused() {
    let frame = |kind, count, block, body: &[u8], payload: Bytes| {
        let body_len = if body.is_empty() { 0 } else { body.len() as u32 + 4 };
        let header = Header {
            kind,
            is_reply: false,
            flags: 0,
            channel: 0,
            code: 0,
            tag: 0,
            attach: ATTACH,
            block,
            count,
            body_len,
            payload_len: payload.len() as u32,
        };
        let mut bytes = BytesMut::from(body);
        if !body.is_empty() {
            bytes.put_u32_le(crc32fast::hash(body));
        }
        Request::decode(&header, &bytes, payload)
    };
    let none = Bytes::new;
    assert_eq!(frame(Kind::Read, 0, 0, &[], none()), Err(FrameError::Malformed("empty range")));
    assert!(matches!(frame(Kind::Read, 257, 0, &[], none()), Err(FrameError::TooLong { .. })));
    assert!(matches!(frame(Kind::Discard, (1 << 20) + 1, 0, &[], none()), Err(FrameError::TooLong { .. })));
    assert!(matches!(frame(Kind::Read, 1, u64::MAX, &[], none()), Err(FrameError::Malformed(_))));
    assert!(matches!(frame(Kind::Read, 1, 0, &[], block(0)), Err(FrameError::Malformed(_))));
    assert!(matches!(frame(Kind::Read, 1, 0, &[1], none()), Err(FrameError::Malformed(_))), "a body too many");
    assert!(matches!(frame(Kind::Write, 2, 0, &[0; 8], block(0)), Err(FrameError::Length { .. })));
    assert!(matches!(frame(Kind::Write, 1, 0, &[0; 3], block(0)), Err(FrameError::Malformed(_))));
    assert!(matches!(frame(Kind::CopyWrite, 1, 0, &[0; 16], block(0)), Err(FrameError::Length { .. })));
    assert!(matches!(frame(Kind::Clean, 4097, 0, &[0; 12], none()), Err(FrameError::TooLong { .. })));
    assert!(matches!(frame(Kind::Clean, 2, 0, &[0; 12], none()), Err(FrameError::Malformed(_))));
    assert!(matches!(frame(Kind::Hashes, 1, 0, &[0; 31], none()), Err(FrameError::Malformed(_))));
    assert!(matches!(frame(Kind::ListRegions, 1, 1 << 32, &[], none()), Err(FrameError::Malformed(_))));
    let mut many = vec![0; 18 + 6 * 16];
    many[17] = 6;
    assert!(matches!(frame(Kind::StoreSet, 0, 0, &many, none()), Err(FrameError::TooLong { .. })));
}

#[test]
fn a_body_with_a_flipped_bit_is_refused() {
    for (request, _) in requests() {
        let good = request.encode(9, ATTACH, 1);
        for at in HEADER_LEN..good.head.len() {
            let mut bytes = BytesMut::from(&good.head[..]);
            bytes[at] ^= 0x10;
            let bad = Encoded { head: bytes.freeze(), payload: good.payload.clone() };
            assert!(matches!(decode_request(&bad), Err(FrameError::BodyCrc { .. })), "{request:?} byte {at}");
        }
    }
}

#[test]
fn block_sums_are_crc32() {
    assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926, "CRC-32, not CRC32C");
    assert_eq!(block_sums(&[block(0), block(1)].concat()), [zero_block_sum(), block_sum(&block(1))]);
}

/// A header with a good checksum around anything.
fn any_header() -> impl Strategy<Value = [u8; HEADER_LEN]> {
    (proptest::array::uniform32(any::<u8>()), proptest::array::uniform24(any::<u8>()), 0u8..0x14, any::<bool>())
        .prop_map(|(a, b, kind, is_reply)| {
            let mut bytes = [0; HEADER_LEN];
            bytes[..32].copy_from_slice(&a);
            bytes[32..56].copy_from_slice(&b);
            bytes[..4].copy_from_slice(b"md99");
            bytes[4] = 1;
            bytes[5] = kind | if is_reply { REPLY_BIT } else { 0 };
            // Small lengths are met as often as large ones.
            bytes[13..16].fill(0);
            bytes[50..52].fill(0);
            bytes[54..56].fill(0);
            let crc = crc32fast::hash(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
            bytes
        })
}

proptest! {
    #[test]
    fn arbitrary_headers_never_panic(bytes in proptest::collection::vec(any::<u8>(), HEADER_LEN)) {
        prop_assert!(Header::decode(bytes[..].try_into().unwrap()).is_err());
    }

    #[test]
    fn arbitrary_bodies_never_panic(
        header in any_header(),
        mut body in proptest::collection::vec(any::<u8>(), 0..300),
        blocks in 0usize..3,
        good_crc in any::<bool>(),
    ) {
        if let Ok(header) = Header::decode(&header) {
            if good_crc {
                let crc = crc32fast::hash(&body);
                body.extend_from_slice(&crc.to_le_bytes());
            }
            let payload = Bytes::from(vec![0; blocks * BLOCK_SIZE as usize]);
            // What decodes encodes to something that decodes to the same.
            if let Ok(request) = Request::decode(&header, &body, payload.clone()) {
                prop_assert_eq!(decode_request(&request.encode(0, ATTACH, 0)), Ok(request));
            }
            if let Ok(reply) = Reply::decode(&header, &body, payload) {
                prop_assert_eq!(decode_reply(&reply.encode(0, ATTACH, 0)), Ok(reply));
            }
        }
    }
}
