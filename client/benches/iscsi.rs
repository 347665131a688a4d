//! What a command costs before any volume sees it: PDUs, CDBs; and the lock table of a mirror. `cargo bench -p client`.

use std::hint::black_box;
use std::io::IoSlice;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use client::iscsi::pdu::response::{Body, Residual};
use client::iscsi::pdu::wire::{Digests, Receiver, Sender};
use client::iscsi::pdu::{CmdSn, Request, Response, request};
use client::mirror::{LockOwner, RangeLocks};
use client::scsi::cdb;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use proto::id::BlockIndex;

fn write16(lba: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = 0x8a;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

fn command(bytes: u32) -> Request {
    Request::Command(request::Command {
        immediate: false,
        last: true,
        read: false,
        write: true,
        attribute: 1,
        lun: 0,
        itt: 77,
        expected_len: bytes,
        cmd_sn: CmdSn(9),
        exp_stat_sn: 4,
        cdb: write16(123_456, bytes / 512),
    })
}

fn answer() -> Response {
    let residual = Residual::default();
    Response {
        stat_sn: 4,
        exp_cmd_sn: CmdSn(10),
        max_cmd_sn: CmdSn(137),
        body: Body::Command { itt: 77, response: 0, status: 0, exp_data_sn: 0, residual },
    }
}

fn pdus(c: &mut Criterion) {
    let mut group = c.benchmark_group("pdu");
    let (request, response) = (command(4096), answer());
    group.bench_function("encode a SCSI Command", |b| b.iter(|| black_box(&request).encode()));
    let bhs = request.encode();
    group.bench_function("decode a SCSI Command", |b| b.iter(|| Request::decode(black_box(&bhs))));
    group.bench_function("encode a SCSI Response", |b| b.iter(|| black_box(&response).encode()));
    let bhs = response.encode();
    group.bench_function("decode a SCSI Response", |b| b.iter(|| Response::decode(black_box(&bhs))));
    let cdb = write16(123_456, 8);
    group.bench_function("parse a WRITE (16)", |b| b.iter(|| cdb::Command::parse(black_box(&cdb))));
    group.finish();
}

/// All bytes that a sender has, as one read would bring them.
fn taken(sender: &mut Sender) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !sender.is_empty() {
        let mut slices = [IoSlice::new(&[]); 64];
        let n = sender.slices(&mut slices);
        let len = slices[..n].iter().map(|slice| slice.len()).sum();
        slices[..n].iter().for_each(|slice| bytes.extend_from_slice(slice));
        sender.advance(len);
    }
    bytes
}

fn wire(c: &mut Criterion) {
    let mut group = c.benchmark_group("wire");
    for (name, on) in [("no digests", false), ("CRC32C digests", true)] {
        let digests = Digests { header: on, data: on };
        for len in [4096, 65536] {
            let data = Bytes::from(vec![7u8; len]);
            group.throughput(Throughput::Bytes(len as u64));
            let bhs = command(len as u32).encode();
            let mut sender = Sender::new(digests);
            group.bench_function(format!("queue {} KiB, {name}", len >> 10), |b| {
                b.iter(|| {
                    sender.push(black_box(bhs), [data.clone()]);
                    let mut slices = [IoSlice::new(&[]); 8];
                    let n = sender.slices(&mut slices);
                    let len = slices[..n].iter().map(|slice| slice.len()).sum();
                    sender.advance(len);
                });
            });
            sender.push(bhs, [data]);
            let stream = taken(&mut sender);
            let mut receiver = Receiver::new(BytesMut::new(), digests, 1 << 20);
            group.bench_function(format!("receive {} KiB, {name}", len >> 10), |b| {
                b.iter(|| {
                    let mut at = 0;
                    while at < stream.len() {
                        let mut space = receiver.space();
                        let n = space.remaining_mut().min(stream.len() - at);
                        space.put_slice(&stream[at..at + n]);
                        at += n;
                        while let Some(pdu) = receiver.next(|_| Vec::new()).expect("our own bytes") {
                            assert!(black_box(pdu).digest_ok);
                        }
                    }
                });
            });
        }
    }
    group.finish();
}

fn locks(c: &mut Criterion) {
    let mut group = c.benchmark_group("range locks");
    for held in [0u64, 31, 127] {
        let mut locks = RangeLocks::default();
        for op in 0..held {
            assert!(locks.acquire(LockOwner::Op(op), BlockIndex(op * 10), 1, true));
        }
        let mut granted = Vec::new();
        let mut op = held;
        group.bench_function(format!("take and give up one beside {held}"), |b| {
            b.iter(|| {
                op += 1;
                assert!(locks.acquire(LockOwner::Op(op), BlockIndex(5_000), 1, true));
                locks.release(LockOwner::Op(op), &mut granted);
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500));
    targets = pdus, wire, locks
}
criterion_main!(benches);
