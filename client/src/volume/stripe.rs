//! RAID-0: chunk *c* of a volume of *w* mirrors lies in mirror *c mod w*, as its chunk *c / w*.

/// The geometry of a striped volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// Bytes in a chunk, a multiple of the block size.
    pub chunk: u64,
    /// Mirrors.
    pub width: u64,
}

/// A run of bytes inside one mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which mirror.
    pub mirror: usize,
    /// Where in it.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Stripe {
    /// The pieces of a range, in the order of the volume's bytes, none across a chunk's end.
    pub fn pieces(self, offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let mut at = offset;
        let end = offset + len;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let chunk = at / self.chunk;
                let inside = at % self.chunk;
                let len = (self.chunk - inside).min(end - at);
                at += len;
                let offset = chunk / self.width * self.chunk + inside;
                Piece { mirror: (chunk % self.width) as usize, offset, len }
            })
        })
    }

    /// The same range as at most one piece a mirror: what a range of the volume covers of a mirror is one run.
    /// Their order says nothing.
    pub fn spans(self, offset: u64, len: u64) -> Vec<Piece> {
        if len == 0 {
            return Vec::new();
        }
        let end = offset + len;
        (0..self.width)
            .filter_map(|mirror| {
                let from = self.bytes_before(offset, mirror);
                let to = self.bytes_before(end, mirror);
                (to > from).then_some(Piece { mirror: mirror as usize, offset: from, len: to - from })
            })
            .collect()
    }

    /// How many of the volume's first `offset` bytes lie in a mirror.
    fn bytes_before(self, offset: u64, mirror: u64) -> u64 {
        let row = self.chunk * self.width;
        let inside = offset % row;
        offset / row * self.chunk + inside.saturating_sub(mirror * self.chunk).min(self.chunk)
    }

    /// Where a mirror's byte is in the volume.
    pub fn volume_offset(self, mirror: usize, offset: u64) -> u64 {
        (offset / self.chunk * self.width + mirror as u64) * self.chunk + offset % self.chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_across_three_chunks_is_three_pieces() {
        let stripe = Stripe { chunk: 8192, width: 2 };
        let pieces: Vec<_> = stripe.pieces(4096, 16384).map(|p| (p.mirror, p.offset, p.len)).collect();
        assert_eq!(pieces, [(0, 4096, 4096), (1, 0, 8192), (0, 8192, 4096)]);
        let spans: Vec<_> = stripe.spans(4096, 16384).iter().map(|p| (p.mirror, p.offset, p.len)).collect();
        assert_eq!(spans, [(0, 4096, 8192), (1, 0, 8192)]);
    }

    proptest! {
        #[test]
        fn pieces_and_spans_cover_the_same_bytes(
            width in 1u64..6, chunk in 1u64..4, offset in 0u64..200, len in 0u64..200,
        ) {
            let stripe = Stripe { chunk: chunk * 4096, width };
            let (offset, len) = (offset * 512, len * 512);
            let mut at = offset;
            let mut by_mirror = vec![(u64::MAX, 0, 0); width as usize];
            for p in stripe.pieces(offset, len) {
                prop_assert_eq!(stripe.volume_offset(p.mirror, p.offset), at);
                at += p.len;
                let m = &mut by_mirror[p.mirror];
                *m = (m.0.min(p.offset), m.1.max(p.offset + p.len), m.2 + p.len);
            }
            prop_assert_eq!(at, offset + len);
            for span in stripe.spans(offset, len) {
                let m = &mut by_mirror[span.mirror];
                prop_assert_eq!((span.offset, span.offset + span.len, span.len), *m);
                *m = (u64::MAX, 0, 0);
            }
            prop_assert!(by_mirror.iter().all(|m| m.2 == 0));
        }
    }
}
