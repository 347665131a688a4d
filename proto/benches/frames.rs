//! What a frame costs: checksums, encoding, decoding. `cargo bench -p proto`.

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use proto::frame::{Encoded, HEADER_LEN, Header, Kind, Reply, Request, block_sums};
use proto::id::{AttachId, AttachNo, BlockIndex, Epoch};

const ATTACH: AttachId = AttachId { epoch: Epoch(7), attach: AttachNo(3) };

fn data(blocks: usize) -> Bytes {
    (0..blocks * 4096).map(|i| ((i * 31) >> 3) as u8).collect::<Vec<_>>().into()
}

fn sums(c: &mut Criterion) {
    let mut group = c.benchmark_group("block_sums");
    for blocks in [1, 16, 256] {
        let data = data(blocks);
        group.throughput(Throughput::Bytes(data.len() as u64));
        group.bench_function(format!("{blocks} blocks"), |b| b.iter(|| block_sums(black_box(&data))));
    }
    group.finish();
}

fn write(blocks: usize) -> Request {
    let data = data(blocks);
    let sums = block_sums(&data);
    Request::Write { block: BlockIndex(1000), fua: false, sums, data }
}

/// A frame as it arrives: header, body, payload.
fn arrived(frame: &Encoded) -> ([u8; HEADER_LEN], &[u8], Bytes) {
    let (header, body) = frame.head.split_at(HEADER_LEN);
    (header.try_into().expect("as long as a header"), body, frame.payload.clone())
}

fn codec(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame");
    for blocks in [1, 16, 256] {
        let request = write(blocks);
        group.bench_function(format!("encode a write of {blocks} blocks"), |b| {
            b.iter(|| black_box(&request).encode(1, ATTACH, 9));
        });
        let frame = request.encode(1, ATTACH, 9);
        let (header, body, payload) = arrived(&frame);
        group.bench_function(format!("decode a write of {blocks} blocks"), |b| {
            b.iter(|| {
                let header = Header::decode(black_box(&header)).expect("our own header");
                Request::decode(&header, body, payload.clone()).expect("our own frame")
            });
        });
    }
    let reply = Reply::Done(Kind::Write);
    group.bench_function("encode an acknowledgement", |b| b.iter(|| black_box(&reply).encode(1, ATTACH, 9)));
    let frame = reply.encode(1, ATTACH, 9);
    let (header, body, payload) = arrived(&frame);
    group.bench_function("decode an acknowledgement", |b| {
        b.iter(|| {
            let header = Header::decode(black_box(&header)).expect("our own header");
            Reply::decode(&header, body, payload.clone()).expect("our own frame")
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500));
    targets = sums, codec
}
criterion_main!(benches);
