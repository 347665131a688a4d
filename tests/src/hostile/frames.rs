//! Frames of the replica protocol, in arbitrary pieces.

use bytes::{Bytes, BytesMut};
use proto::frame::{
    AttachInfo, BlockHash, CleanEntry, Code, CopyTarget, Encoded, HEADER_LEN, Header, Kind, PeerRole, RegionWindow,
    Reply, Request, SetView, block_sums,
};
use proto::id::*;
use proto::limits::{BLOCK_SIZE, MAX_BODY, MAX_REQUEST_BLOCKS};
use uuid::Uuid;

use super::source::{Seen, Source};
use crate::sim::rng::Rng;

/// What a decoder may hold: one frame as it comes, its parts, and the same again for the frame that follows it in the
/// buffer.
pub const MEMORY: usize = 4 * (MAX_BODY as usize + MAX_REQUEST_BLOCKS as usize * BLOCK_SIZE as usize) + (256 << 10);

/// Sums are made right before the bytes are given on.
pub const MEND: u8 = 1;

/// The frames' beginnings in a stream, as their headers claim.
pub fn starts(stream: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 0;
    while let Some(header) = stream.get(at..at + HEADER_LEN) {
        starts.push(at);
        let len = |from: usize| u32::from_le_bytes(header[from..from + 4].try_into().expect("4 bytes")) as usize;
        at = at.saturating_add(HEADER_LEN + len(52)).saturating_add(len(56));
    }
    starts
}

/// Makes the checksums of headers and bodies right.
pub fn mend(stream: &mut [u8]) {
    for at in starts(stream) {
        let crc = crc32fast::hash(&stream[at..at + 60]);
        stream[at + 60..at + 64].copy_from_slice(&crc.to_le_bytes());
        let len = u32::from_le_bytes(stream[at + 52..at + 56].try_into().expect("4 bytes")) as usize;
        let body = at + HEADER_LEN;
        if len >= 4 && body + len <= stream.len() {
            let crc = crc32fast::hash(&stream[body..body + len - 4]);
            stream[body + len - 4..body + len].copy_from_slice(&crc.to_le_bytes());
        }
    }
}

/// Cuts a stream into frames as the drivers do: a header is decoded as soon as it is there, and the rest awaited.
pub fn frames(stream: &[u8], rng: &mut Rng, seen: &mut Seen, mut each: impl FnMut(Header, Result<Request, Reply>)) {
    let mut buffer = BytesMut::new();
    let mut rest = stream;
    loop {
        let waits = match buffer.first_chunk::<HEADER_LEN>().map(Header::decode).transpose() {
            Err(error) => return seen.words(&error.to_string()),
            Ok(None) => true,
            Ok(Some(header)) => {
                let (body, payload) = (header.body_len as usize, header.payload_len as usize);
                let whole = HEADER_LEN + body + payload;
                if buffer.len() < whole {
                    buffer.reserve(whole - buffer.len());
                    true
                } else {
                    let mut frame = buffer.split_to(whole).freeze();
                    let payload = frame.split_off(HEADER_LEN + body);
                    let body = &frame[HEADER_LEN..];
                    let decoded = match header.is_reply {
                        false => Request::decode(&header, body, payload).map(Ok),
                        true => Reply::decode(&header, body, payload).map(Err),
                    };
                    match decoded {
                        Ok(decoded) => each(header, decoded),
                        Err(error) => return seen.words(&error.to_string()),
                    }
                    false
                }
            }
        };
        if waits {
            if rest.is_empty() {
                return;
            }
            let most = rng.pick(&[1, 3, 64, 4096, 1 << 20]).min(rest.len() as u64);
            let (piece, after) = rest.split_at(rng.between(1, most) as usize);
            buffer.extend_from_slice(piece);
            rest = after;
        }
    }
}

/// Flags, a seed for the pieces, the stream.
pub fn run(input: &[u8], seen: &mut Seen) {
    let mut source = Source::new(input);
    let (flags, cuts) = (source.u8(), source.u8());
    let mut stream = source.rest().to_vec();
    if flags & MEND != 0 {
        mend(&mut stream);
    }
    let mut noted = Vec::new();
    frames(&stream, &mut Rng::new(cuts.into()), seen, |header, frame| {
        let whole = |encoded: &Encoded| {
            let head = encoded.head.first_chunk::<HEADER_LEN>().expect("a frame has a header");
            let again = Header::decode(head).expect("what we encode can be read");
            assert_eq!(
                (again.body_len as usize, again.payload_len as usize),
                (encoded.head.len() - HEADER_LEN, encoded.payload.len()),
                "a frame's lengths"
            );
            (again, encoded.head.slice(HEADER_LEN..), encoded.payload.clone())
        };
        match frame {
            Ok(request) => {
                noted.push((header.kind, None));
                let (again, body, payload) = whole(&request.encode(header.channel, header.attach, header.tag));
                assert_eq!((again.channel, again.attach, again.tag), (header.channel, header.attach, header.tag));
                assert_eq!(Request::decode(&again, &body, payload).as_ref(), Ok(&request), "it comes back");
            }
            Err(reply) => {
                noted.push((header.kind, Some(header.code)));
                let (again, body, payload) = whole(&reply.encode(header.channel, header.attach, header.tag));
                assert_eq!(Reply::decode(&again, &body, payload).as_ref(), Ok(&reply), "it comes back");
            }
        }
    });
    noted.into_iter().for_each(|(kind, code)| seen.note((kind as u8, code)));
}

/// The records of an input: frames behind two bytes.
pub fn records(input: &[u8]) -> Vec<usize> {
    starts(input.get(2..).unwrap_or_default()).into_iter().map(|at| at + 2).collect()
}

pub const WORDS: &[&[u8]] = &[
    b"md99\x01",
    &[0xff; 8],
    &[0; 8],
    &4096u32.to_le_bytes(),
    &256u32.to_le_bytes(),
    &257u32.to_le_bytes(),
    &MAX_BODY.to_le_bytes(),
    &(MAX_BODY + 1).to_le_bytes(),
    &(1u32 << 20).to_le_bytes(),
];

/// The replica that [`requests`] speak to.
pub fn ids() -> node::replica::ReplicaIds {
    node::replica::ReplicaIds {
        cluster: ClusterId(Uuid::from_u128(1)),
        volume: VolumeId(Uuid::from_u128(2)),
        mirror: MirrorId(Uuid::from_u128(3)),
        replica: ReplicaId(Uuid::from_u128(4)),
    }
}

pub fn set() -> SetView {
    let members = vec![ids().replica, ReplicaId(Uuid::from_u128(5))];
    SetView { version: SetVersion(2), members, clean: CleanNo(1) }
}

/// One of each request, in an order that a replica of 1000 blocks takes.
pub fn requests() -> Vec<Request> {
    let block = BlockIndex;
    let data = |n: usize| Bytes::from((0..n * BLOCK_SIZE as usize).map(|i| (i / 7) as u8).collect::<Vec<_>>());
    let write = |at, n, fua| Request::Write { block: block(at), fua, sums: block_sums(&data(n)), data: data(n) };
    let entries = vec![
        CleanEntry { region: RegionIndex(0), flush: FlushNo(2) },
        CleanEntry { region: RegionIndex(2), flush: FlushNo(2) },
    ];
    let target = CopyTarget {
        addr: "127.0.0.1:7401".into(),
        replica: ReplicaId(Uuid::from_u128(5)),
        attach: AttachId { epoch: Epoch(1), attach: AttachNo(1) },
    };
    let ids = ids();
    vec![
        Request::Hello { role: PeerRole::Gateway, cluster: ids.cluster, volume: ids.volume, name: "gateway-1".into() },
        Request::Attach { replica: ids.replica, mirror: ids.mirror, lease_ms: 6000, set: set() },
        Request::StoreSet { set: set(), accounted: true },
        Request::ListRegions { first: RegionIndex(0), count: 4 },
        write(10, 1, false),
        write(250, 2, true),
        write(999, 1, false),
        Request::Flush { flush: FlushNo(1) },
        Request::Read { block: block(8), count: 4 },
        Request::Read { block: block(744), count: 256 },
        Request::WriteZeroes { block: block(10), count: 3, fua: true },
        Request::Discard { block: block(0), count: 1000 },
        Request::CopyWrite {
            replica: ids.replica,
            block: block(600),
            count: 1,
            sums: block_sums(&data(1)),
            data: data(1),
        },
        Request::CopyWrite { replica: ids.replica, block: block(20), count: 9, sums: vec![], data: Bytes::new() },
        Request::Hashes { block: block(512), count: 256, key: [7; 32] },
        Request::CopyTo { block: block(600), blocks: [1, 0, 0, 1 << 63], target },
        Request::Restamp { block: block(512), blocks: [u64::MAX, 0, 1 << 24, 0] },
        Request::Distrust { block: block(512), blocks: [1, 0, 1 << 24, 0] },
        Request::Flush { flush: FlushNo(2) },
        Request::Settle { entries: entries.clone() },
        Request::Clean { clean: CleanNo(2), entries },
        Request::MarkAllDirty,
        Request::Ping,
        Request::Detach,
    ]
}

fn replies() -> Vec<Reply> {
    let ids = ids();
    let attach = AttachId { epoch: Epoch(3), attach: AttachNo(4) };
    vec![
        Reply::Done(Kind::Write),
        Reply::Failed { kind: Kind::Read, code: Code::Checksum, block: 9 },
        Reply::Attached(AttachInfo {
            incarnation: Incarnation(1),
            held: attach,
            stored_epoch: Epoch(2),
            kept_epoch: Epoch(2),
            told: true,
            accounted: true,
            set: SetView { members: vec![ids.replica], ..set() },
            blocks: 1000,
            dirty: 3,
            suspect: 1,
            kept: false,
            rebuilt: true,
        }),
        Reply::Read { block: BlockIndex(3), sums: block_sums(&[5; 4096]), data: Bytes::from_static(&[5; 4096]) },
        Reply::Regions(RegionWindow {
            first: RegionIndex(1),
            count: 9,
            dirty: Bytes::from_static(&[1, 1]),
            suspect: Bytes::from_static(&[0, 1]),
            allocated: Bytes::from_static(&[3, 0]),
        }),
        Reply::Hashes(vec![BlockHash { hash: [9; 16], intact: true, readable: true, allocated: false }; 3]),
    ]
}

/// An input of these frames.
pub fn input(head: &[u8], frames: impl IntoIterator<Item = Encoded>) -> Vec<u8> {
    let mut input = head.to_vec();
    for frame in frames {
        input.extend_from_slice(&frame.head);
        input.extend_from_slice(&frame.payload);
    }
    input
}

pub fn attach() -> AttachId {
    AttachId { epoch: Epoch(3), attach: AttachNo(1) }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let head = [MEND, 3];
    let request = |(tag, request): (u64, Request)| request.encode(1, attach(), tag);
    let mut seeds: Vec<Vec<u8>> = (0..).zip(requests()).map(|numbered| input(&head, [request(numbered)])).collect();
    seeds.extend(replies().iter().map(|reply| input(&head, [reply.encode(1, attach(), 7)])));
    let small = |r: &(u64, Request)| !matches!(r.1, Request::Write { .. } | Request::CopyWrite { .. });
    seeds.push(input(&head, (0..).zip(requests()).filter(small).map(request)));
    seeds
}
