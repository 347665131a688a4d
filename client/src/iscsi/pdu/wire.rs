//! Cuts a byte stream into PDUs and builds one from PDUs: AHS, padding, digests (RFC 7143 §11.2). No I/O: the driver
//! reads into [`Receiver::space`] and writes what [`Sender::slices`] names.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::buf::Limit;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{BHS_LEN, Bhs};

/// What the read buffer is refilled by: many small PDUs arrive with one system call.
const READ_CHUNK: usize = 64 * 1024;

/// After a data segment of so many bytes another one is likely: no more than [`PEEK`] bytes are then read into the read
/// buffer, from where they must be copied.
const LARGE: usize = 32 * 1024;
const PEEK: usize = 2 * 1024;

/// From so many missing bytes on, the data segment is read straight into its destination.
const DIRECT_READ: usize = 4 * 1024;

/// What is reserved for a data segment that has no destination of its own, before its bytes come.
const CONTROL_RESERVE: usize = 8 * 1024;

const _: () = assert!(PEEK > BHS_LEN + 1020 + 4 + 7 && PEEK <= READ_CHUNK / 4 && DIRECT_READ <= READ_CHUNK);

/// Which digests a connection carries (RFC 7143 §13.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    /// CRC32C after BHS and AHS.
    pub header: bool,
    /// CRC32C after each data segment that is not empty.
    pub data: bool,
}

/// A PDU as it was received.
#[derive(Debug)]
pub struct Pdu {
    /// Basic header segment.
    pub bhs: Bhs,
    /// Additional header segments, raw.
    pub ahs: Bytes,
    /// Where the data segment went: the buffer that `place` gave, with the segment appended.
    pub data: Vec<u8>,
    /// Where in `data` the segment begins.
    pub start: usize,
    /// Whether the data digest, if there is one, matches.
    pub digest_ok: bool,
}

impl Pdu {
    /// The data segment.
    pub fn segment(&self) -> &[u8] {
        &self.data[self.start..]
    }
}

/// Why a stream cannot be understood any more. The connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A data segment longer than what we declared (MaxRecvDataSegmentLength).
    #[error("opcode {opcode:#04x} with a data segment of {len} bytes, {limit} are allowed")]
    TooLong {
        /// The opcode.
        opcode: u8,
        /// Its DataSegmentLength.
        len: usize,
        /// What is allowed.
        limit: usize,
    },
    /// The header digest is wrong; the lengths cannot be trusted (RFC 7143 §7.7).
    #[error("header digest error")]
    HeaderDigest,
}

enum State {
    Header,
    Data { bhs: Bhs, ahs: Bytes, data: Vec<u8>, start: usize, missing: usize },
}

/// The receiving half of a connection.
pub struct Receiver {
    buffer: BytesMut,
    state: State,
    digests: Digests,
    limit: usize,
    /// The last data segment was a large one.
    after_large: bool,
}

impl Receiver {
    /// A receiver that begins with `leftover` and takes data segments of up to `limit` bytes.
    pub fn new(leftover: BytesMut, digests: Digests, limit: usize) -> Self {
        Receiver { buffer: leftover, state: State::Header, digests, limit, after_large: false }
    }

    /// Where the driver reads into next; never without room.
    pub fn space(&mut self) -> Limit<&mut (dyn BufMut + Send)> {
        if let State::Data { data, missing, .. } = &mut self.state
            && *missing >= DIRECT_READ
            && self.buffer.is_empty()
        {
            let room = *missing;
            data.reserve(room);
            return (data as &mut (dyn BufMut + Send)).limit(room);
        }
        if self.buffer.capacity() - self.buffer.len() < READ_CHUNK / 4 {
            self.buffer.reserve(READ_CHUNK);
        }
        let room = if self.after_large { PEEK } else { self.buffer.capacity() - self.buffer.len() };
        (&mut self.buffer as &mut (dyn BufMut + Send)).limit(room)
    }

    /// The next whole PDU, if its last byte has come. `place` gives the buffer that a data segment is to be appended
    /// to; it is called once for each PDU that has one.
    ///
    /// # Errors
    /// The stream has lost its meaning; call no more.
    pub fn next(&mut self, mut place: impl FnMut(&Bhs) -> Vec<u8>) -> Result<Option<Pdu>, WireError> {
        loop {
            match &mut self.state {
                State::Header => {
                    if self.buffer.len() < BHS_LEN {
                        return Ok(None);
                    }
                    let mut bhs = Bhs([0; BHS_LEN]);
                    bhs.0.copy_from_slice(&self.buffer[..BHS_LEN]);
                    let header = BHS_LEN + bhs.ahs_len();
                    let digest = if self.digests.header { 4 } else { 0 };
                    if self.buffer.len() < header + digest {
                        return Ok(None);
                    }
                    if self.digests.header {
                        let sum = crc32c::crc32c(&self.buffer[..header]);
                        if self.buffer[header..header + 4] != sum.to_le_bytes() {
                            return Err(WireError::HeaderDigest);
                        }
                    }
                    let len = bhs.data_len();
                    if len > self.limit {
                        return Err(WireError::TooLong { opcode: bhs.opcode(), len, limit: self.limit });
                    }
                    self.buffer.advance(BHS_LEN);
                    let ahs = if bhs.ahs_len() == 0 {
                        Bytes::new()
                    } else {
                        Bytes::copy_from_slice(&self.buffer.split_to(bhs.ahs_len()))
                    };
                    self.buffer.advance(digest);
                    if len == 0 {
                        return Ok(Some(Pdu { bhs, ahs, data: Vec::new(), start: 0, digest_ok: true }));
                    }
                    let mut data = place(&bhs);
                    if data.capacity() == data.len() {
                        data.reserve(len.min(CONTROL_RESERVE));
                    }
                    let start = data.len();
                    self.state = State::Data { bhs, ahs, data, start, missing: len };
                }
                State::Data { bhs, data, start, missing, .. } => {
                    let len = bhs.data_len();
                    // The driver may have read straight into `data`.
                    *missing = *start + len - data.len();
                    let here = self.buffer.len().min(*missing);
                    data.extend_from_slice(&self.buffer[..here]);
                    self.buffer.advance(here);
                    *missing -= here;
                    let padding = len.wrapping_neg() & 3;
                    let digest = if self.digests.data { 4 } else { 0 };
                    if *missing > 0 || self.buffer.len() < padding + digest {
                        return Ok(None);
                    }
                    let mut digest_ok = true;
                    if self.digests.data {
                        let sum = crc32c::crc32c(&data[*start..]);
                        let sum = crc32c::crc32c_append(sum, &self.buffer[..padding]);
                        digest_ok = self.buffer[padding..padding + 4] == sum.to_le_bytes();
                    }
                    self.buffer.advance(padding + digest);
                    self.after_large = len >= LARGE;
                    let State::Data { bhs, ahs, data, start, .. } = std::mem::replace(&mut self.state, State::Header)
                    else {
                        unreachable!("matched above")
                    };
                    return Ok(Some(Pdu { bhs, ahs, data, start, digest_ok }));
                }
            }
        }
    }

    /// Changes digests and limit; takes effect with the next PDU (after login, RFC 7143 §6.1).
    pub fn set(&mut self, digests: Digests, limit: usize) {
        self.digests = digests;
        self.limit = limit;
    }

    /// The bytes that were read and not yet consumed; between PDUs only.
    pub fn into_leftover(self) -> BytesMut {
        self.buffer
    }
}

/// The sending half of a connection: bytes in order, with the payload never copied.
pub struct Sender {
    digests: Digests,
    queue: VecDeque<Bytes>,
    /// Headers that nothing but headers have followed yet.
    tail: BytesMut,
    queued: u64,
    written: u64,
}

impl Sender {
    /// An empty sender.
    pub fn new(digests: Digests) -> Self {
        Sender { digests, queue: VecDeque::new(), tail: BytesMut::new(), queued: 0, written: 0 }
    }

    /// Changes the digests; takes effect with the next PDU.
    pub fn set(&mut self, digests: Digests) {
        self.digests = digests;
    }

    /// Queues a PDU whose data segment is the `data` pieces.
    pub fn push(&mut self, mut bhs: Bhs, data: impl IntoIterator<Item = Bytes>) {
        if self.tail.capacity() - self.tail.len() < 2 * BHS_LEN {
            self.tail.reserve(4096);
        }
        let before = self.queued;
        let at = self.tail.len();
        self.tail.put_slice(&bhs.0);
        if self.digests.header {
            self.tail.put_u32(0);
        }
        let header = self.tail.len() - at;
        let mut len = 0;
        let mut sum = 0;
        let mut first: Option<Bytes> = None;
        // The header must know the length, which is known after the pieces: look at them before the header is split
        // off. One piece is by far the most common.
        let mut rest: Vec<Bytes> = Vec::new();
        for piece in data {
            if piece.is_empty() {
                continue;
            }
            len += piece.len();
            if self.digests.data {
                sum = crc32c::crc32c_append(sum, &piece);
            }
            if first.is_none() {
                first = Some(piece);
            } else {
                rest.push(piece);
            }
        }
        bhs.set_data_len(len);
        self.tail[at..at + BHS_LEN].copy_from_slice(&bhs.0);
        if self.digests.header {
            let sum = crc32c::crc32c(&bhs.0);
            self.tail[at + BHS_LEN..at + BHS_LEN + 4].copy_from_slice(&sum.to_le_bytes());
        }
        self.queued += header as u64;
        if let Some(first) = first {
            let small = rest.is_empty() && first.len() <= 512;
            if small {
                self.tail.put_slice(&first);
            } else {
                self.queue.push_back(self.tail.split().freeze());
                self.queue.push_back(first);
                self.queue.extend(rest);
            }
            let padding = len.wrapping_neg() & 3;
            self.tail.put_bytes(0, padding);
            self.queued += (len + padding) as u64;
            if self.digests.data {
                let sum = crc32c::crc32c_append(sum, &[0; 3][..padding]);
                self.tail.put_slice(&sum.to_le_bytes());
                self.queued += 4;
            }
        }
        debug_assert!(self.queued > before);
    }

    /// Whether everything has been written.
    pub fn is_empty(&self) -> bool {
        self.queued == self.written
    }

    /// Bytes that wait to be written.
    pub fn pending(&self) -> u64 {
        self.queued - self.written
    }

    /// All bytes ever queued: a mark that [`Sender::written`] reaches when what was queued so far has been written.
    pub fn queued(&self) -> u64 {
        self.queued
    }

    /// All bytes ever written.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Fills `slices` with what to write next; returns how many were filled.
    pub fn slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        if !self.tail.is_empty() {
            self.queue.push_back(self.tail.split().freeze());
        }
        let mut n = 0;
        for (slot, bytes) in slices.iter_mut().zip(&self.queue) {
            *slot = IoSlice::new(bytes);
            n += 1;
        }
        n
    }

    /// Forgets the first `n` bytes: they were written.
    ///
    /// # Panics
    /// If more than the queued bytes were said to be written.
    pub fn advance(&mut self, mut n: usize) {
        self.written += n as u64;
        assert!(self.written <= self.queued, "{} bytes written of {} queued", self.written, self.queued);
        while n > 0 {
            let front = self.queue.front_mut().expect("bytes are counted");
            if n < front.len() {
                front.advance(n);
                return;
            }
            n -= front.len();
            self.queue.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes_of(sender: &mut Sender) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); 64];
        let n = sender.slices(&mut slices);
        let all: Vec<u8> = slices[..n].iter().flat_map(|s| s.to_vec()).collect();
        let len = all.len();
        sender.advance(len);
        assert!(sender.is_empty());
        all
    }

    #[test]
    fn digests_and_padding_have_their_golden_bytes() {
        let mut sender = Sender::new(Digests { header: true, data: true });
        let mut bhs = Bhs::new(0x05);
        bhs.0[1] = 0x80;
        sender.push(bhs, [Bytes::from_static(b"hello")]);
        let wire = bytes_of(&mut sender);
        assert_eq!(wire.len(), 48 + 4 + 8 + 4);
        assert_eq!(&wire[..8], &[0x05, 0x80, 0, 0, 0, 0, 0, 5]);
        assert_eq!(&wire[52..60], b"hello\0\0\0");
        // RFC 3720 appendix B.4: 32 bytes of zeroes have the CRC32C aa 36 91 8a, in this order on the wire.
        assert_eq!(crc32c::crc32c(&[0; 32]).to_le_bytes(), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(wire[48..52], crc32c::crc32c(&wire[..48]).to_le_bytes());
        assert_eq!(wire[60..], crc32c::crc32c(b"hello\0\0\0").to_le_bytes());
    }

    #[test]
    fn a_header_digest_error_ends_the_stream_and_a_data_digest_error_is_told() {
        let digests = Digests { header: true, data: true };
        let mut sender = Sender::new(digests);
        sender.push(Bhs::new(0), [Bytes::from_static(b"ping")]);
        let wire = bytes_of(&mut sender);
        for (at, expected) in [(3, Err(WireError::HeaderDigest)), (53, Ok(false)), (usize::MAX, Ok(true))] {
            let mut broken = wire.clone();
            if let Some(byte) = broken.get_mut(at) {
                *byte ^= 1;
            }
            let mut receiver = Receiver::new(BytesMut::from(&broken[..]), digests, 8192);
            let got = receiver.next(|_| Vec::new()).map(|pdu| pdu.unwrap().digest_ok);
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_segment_over_the_limit_is_refused_before_memory_is_reserved() {
        let mut bhs = Bhs::new(0x01);
        bhs.set_data_len(8193);
        let mut receiver = Receiver::new(BytesMut::from(&bhs.0[..]), Digests::default(), 8192);
        let got = receiver.next(|_| panic!("placed")).unwrap_err();
        assert_eq!(got, WireError::TooLong { opcode: 1, len: 8193, limit: 8192 });
    }

    proptest! {
        #[test]
        fn what_is_sent_is_received_however_it_is_cut(
            sizes in proptest::collection::vec(0usize..20000, 1..6),
            cuts in proptest::collection::vec(1usize..9000, 1..20),
            header in any::<bool>(),
            data in any::<bool>(),
        ) {
            let digests = Digests { header, data };
            let mut sender = Sender::new(digests);
            let mut payloads = Vec::new();
            for (i, &size) in sizes.iter().enumerate() {
                let payload: Vec<u8> = (0..size).map(|b| (b * 7 + i) as u8).collect();
                let (a, b) = payload.split_at(size / 3);
                sender.push(Bhs::new(i as u8), [Bytes::copy_from_slice(a), Bytes::copy_from_slice(b)]);
                payloads.push(payload);
            }
            let wire = bytes_of(&mut sender);
            let mut receiver = Receiver::new(BytesMut::new(), digests, 1 << 20);
            let (mut at, mut cut, mut got) = (0, 0, Vec::new());
            while at < wire.len() {
                let mut space = receiver.space();
                let n = space.remaining_mut().min(cuts[cut % cuts.len()]).min(wire.len() - at);
                space.put_slice(&wire[at..at + n]);
                at += n;
                cut += 1;
                while let Some(pdu) = receiver.next(|_| b"x".to_vec()).unwrap() {
                    prop_assert!(pdu.digest_ok);
                    got.push(pdu.segment().to_vec());
                }
            }
            prop_assert_eq!(got, payloads);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096), header in any::<bool>()) {
            let digests = Digests { header, data: true };
            let mut receiver = Receiver::new(BytesMut::from(&bytes[..]), digests, 1024);
            for _ in 0..100 {
                match receiver.next(|_| Vec::new()) {
                    Ok(Some(pdu)) => { let _ = super::super::Request::decode(&pdu.bhs); }
                    Ok(None) | Err(_) => break,
                }
            }
        }
    }
}
