//! Cuts a byte stream into frames. No I/O: whoever owns the socket reads into [`FrameReader::space`].

use bytes::buf::Limit;
use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{FrameError, HEADER_LEN, Header, Reply, Request};
use crate::buffer;

/// What the common buffer is refilled by after a small frame: many of them arrive with one system call.
const READ_ROOM: usize = 128 << 10;
/// Payloads of so many bytes have a buffer of their own, which they are read straight into.
const LARGE: usize = 16 << 10;
/// What is read into the common buffer otherwise: where nothing has come yet, and after a large payload, since another
/// one is likely, and what comes here with its header must be copied.
const PEEK: usize = 4 << 10;

/// Whole frames out of a stream of bytes.
#[derive(Debug, Default)]
pub struct FrameReader {
    common: BytesMut,
    large: Option<Large>,
    /// The last frame was a small one.
    after_small: bool,
}

/// A frame whose payload is being read into a buffer of its own.
#[derive(Debug)]
struct Large {
    header: Header,
    body: Bytes,
    payload: Vec<u8>,
}

/// A frame as it came: header, body with its checksum, and payload; lengths and header checksum verified.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RawFrame {
    header: Header,
    body: Bytes,
    payload: Bytes,
}

impl FrameReader {
    /// Where to read into next; never without room. What is read there is taken by [`request`](Self::request) or
    /// [`reply`](Self::reply).
    pub fn space(&mut self) -> Limit<&mut (dyn BufMut + Send)> {
        if let Some(large) = &mut self.large {
            let room = large.header.payload_len as usize - large.payload.len();
            return (&mut large.payload as &mut (dyn BufMut + Send)).limit(room);
        }
        let room = if self.after_small { READ_ROOM } else { PEEK };
        if self.common.capacity() - self.common.len() < room / 8 {
            self.common.reserve(room);
        }
        let room = room.min(self.common.capacity() - self.common.len());
        (&mut self.common as &mut (dyn BufMut + Send)).limit(room)
    }

    /// The header that comes next, if it is there and its payload is not being read yet.
    ///
    /// # Errors
    /// The bytes are no frame.
    pub fn peek(&self) -> Result<Option<Header>, FrameError> {
        self.common.first_chunk::<HEADER_LEN>().map(Header::decode).transpose()
    }

    /// The next request, once all of it is there.
    ///
    /// # Errors
    /// The bytes are no request; call no more.
    pub fn request(&mut self) -> Result<Option<(Header, Request)>, FrameError> {
        let Some(RawFrame { header, body, payload }) = self.next()? else { return Ok(None) };
        if header.is_reply {
            return Err(FrameError::Malformed("a reply where a request belongs"));
        }
        Ok(Some((header, Request::decode(&header, &body, payload)?)))
    }

    /// The next reply, once all of it is there.
    ///
    /// # Errors
    /// The bytes are no reply; call no more.
    pub fn reply(&mut self) -> Result<Option<(Header, Reply)>, FrameError> {
        let Some(RawFrame { header, body, payload }) = self.next()? else { return Ok(None) };
        if !header.is_reply {
            return Err(FrameError::Malformed("a request where a reply belongs"));
        }
        Ok(Some((header, Reply::decode(&header, &body, payload)?)))
    }

    /// The next frame; small payloads share the common buffer's memory.
    fn next(&mut self) -> Result<Option<RawFrame>, FrameError> {
        if let Some(large) = &mut self.large {
            if large.payload.len() < large.header.payload_len as usize {
                return Ok(None);
            }
            let Large { header, body, payload } = self.large.take().expect("seen above");
            self.after_small = false;
            return Ok(Some(RawFrame { header, body, payload: buffer::freeze(payload) }));
        }
        let Some(header) = self.peek()? else { return Ok(None) };
        let (body, payload) = (header.body_len as usize, header.payload_len as usize);
        let whole = HEADER_LEN + body + payload;
        if self.common.len() >= whole {
            self.after_small = payload < LARGE;
            let mut frame = self.common.split_to(whole).freeze();
            let payload = frame.split_off(HEADER_LEN + body);
            return Ok(Some(RawFrame { header, body: frame.split_off(HEADER_LEN), payload }));
        }
        if payload < LARGE || self.common.len() < HEADER_LEN + body {
            self.common.reserve(whole.min(HEADER_LEN + body + LARGE) - self.common.len());
            return Ok(None);
        }
        let mut buffer = buffer::take(payload);
        self.common.advance(HEADER_LEN);
        let body = self.common.split_to(body).freeze();
        buffer.extend_from_slice(&self.common);
        self.common.clear();
        self.large = Some(Large { header, body, payload: buffer });
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::{Encoded, Request, block_sums};
    use crate::id::{AttachId, BlockIndex};
    use crate::limits::BLOCK_SIZE;

    fn write(tag: u64, blocks: usize) -> Encoded {
        let data = Bytes::from(vec![tag as u8; blocks * BLOCK_SIZE as usize]);
        let request = match blocks {
            0 => Request::Read { block: BlockIndex(tag), count: 1 },
            _ => Request::Write { block: BlockIndex(tag), fua: false, sums: block_sums(&data), data },
        };
        request.encode(1, AttachId::default(), tag)
    }

    /// Gives the reader the stream in pieces of the sizes, as a socket would, and checks every frame.
    fn read_all(stream: &[u8], sizes: &[usize], frames: &[Encoded]) {
        let mut reader = FrameReader::default();
        let (mut rest, mut seen) = (stream, 0);
        for size in sizes.iter().cycle() {
            let mut space = reader.space();
            assert!(space.has_remaining_mut(), "a reader without room");
            let n = (*size).min(rest.len()).min(space.remaining_mut());
            space.put_slice(&rest[..n]);
            rest = &rest[n..];
            while let Some(frame) = reader.next().expect("frames") {
                let sent = &frames[seen];
                assert_eq!(frame.header.encode()[..], sent.head[..HEADER_LEN]);
                assert_eq!(frame.body[..], sent.head[HEADER_LEN..]);
                assert_eq!(frame.payload, sent.payload);
                seen += 1;
            }
            if rest.is_empty() {
                break;
            }
        }
        assert_eq!(seen, frames.len());
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            blocks in proptest::collection::vec(prop_oneof![0usize..4, 3usize..70, Just(256)], 1..12),
            sizes in proptest::collection::vec(prop_oneof![1usize..100, 1usize..300_000], 1..8),
        ) {
            let frames: Vec<Encoded> = blocks.iter().enumerate().map(|(i, blocks)| write(i as u64, *blocks)).collect();
            let stream: Vec<u8> = frames.iter().flat_map(|f| [&f.head[..], &f.payload[..]].concat()).collect();
            // A byte at a time would take long for the large ones.
            let least = stream.len() / 20_000 + 1;
            let sizes: Vec<usize> = sizes.into_iter().map(|size| size.max(least)).collect();
            read_all(&stream, &sizes, &frames);
        }
    }

    #[test]
    fn a_large_payload_is_not_copied_but_for_what_came_with_its_header() {
        let frame = write(1, 64);
        let mut reader = FrameReader::default();
        reader.space().put_slice(&frame.head);
        assert_eq!(reader.next(), Ok(None));
        let at = reader.space().chunk_mut().as_mut_ptr();
        reader.space().put_slice(&frame.payload);
        let read = reader.next().unwrap().expect("it is whole");
        assert_eq!(read.payload.as_ptr(), at.cast_const());
    }

    #[test]
    fn what_is_no_frame_is_said_at_once() {
        let mut reader = FrameReader::default();
        reader.space().put_slice(&[7; HEADER_LEN]);
        assert!(reader.next().is_err());
    }
}
