//! A dense set of region or page numbers.

/// Bits by number, with their count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BitSet {
    words: Vec<u64>,
    len: u64,
    ones: u64,
}

impl BitSet {
    pub(super) fn new(len: u64) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len, ones: 0 }
    }

    pub(super) fn full(len: u64) -> Self {
        let mut set = Self::new(len);
        set.set_range(0, len);
        set
    }

    pub(super) fn ones(&self) -> u64 {
        self.ones
    }

    pub(super) fn get(&self, bit: u64) -> bool {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        self.words[(bit / 64) as usize] & (1 << (bit % 64)) != 0
    }

    /// Sets a bit; tells whether it was clear.
    pub(super) fn set(&mut self, bit: u64) -> bool {
        let new = !self.get(bit);
        self.words[(bit / 64) as usize] |= 1 << (bit % 64);
        self.ones += u64::from(new);
        new
    }

    /// Clears a bit; tells whether it was set.
    pub(super) fn clear(&mut self, bit: u64) -> bool {
        let was = self.get(bit);
        self.words[(bit / 64) as usize] &= !(1 << (bit % 64));
        self.ones -= u64::from(was);
        was
    }

    /// Sets the bits from `first` up to, not including, `end`.
    pub(super) fn set_range(&mut self, first: u64, end: u64) {
        (first..end.min(self.len)).for_each(|bit| {
            self.set(bit);
        });
    }

    /// The words from word `first` on, `n` of them; zeroes past the end.
    pub(super) fn words(&self, first: usize, n: usize) -> impl Iterator<Item = u64> + '_ {
        (first..first + n).map(|i| self.words.get(i).copied().unwrap_or(0))
    }

    /// Replaces the words from word `first` on; bits past the end of the set are dropped.
    pub(super) fn replace_words(&mut self, first: usize, words: impl Iterator<Item = u64>) {
        for (i, word) in (first..self.words.len()).zip(words) {
            let valid = self.len - i as u64 * 64;
            let word = if valid < 64 { word & ((1 << valid) - 1) } else { word };
            self.ones -= u64::from(self.words[i].count_ones());
            self.ones += u64::from(word.count_ones());
            self.words[i] = word;
        }
    }

    /// The bits `first..first + n` as bytes, bit 0 of byte 0 first.
    pub(super) fn window(&self, first: u64, n: u64) -> Vec<u8> {
        let mut bytes = vec![0u8; n.div_ceil(8) as usize];
        for i in (0..n).filter(|i| self.get(first + i)) {
            bytes[(i / 8) as usize] |= 1 << (i % 8);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_follow_every_change() {
        let mut set = BitSet::new(130);
        assert!(set.set(0) && set.set(129) && !set.set(129));
        assert_eq!(set.ones(), 2);
        assert!(set.clear(0) && !set.clear(0));
        assert_eq!(set.ones(), 1);
        set.replace_words(0, [u64::MAX, u64::MAX, u64::MAX].into_iter());
        assert_eq!(set.ones(), 130, "bits past the end are dropped");
        assert_eq!(set, BitSet::full(130));
        assert_eq!(set.window(126, 4), vec![0b1111]);
        assert_eq!(set.words(2, 2).collect::<Vec<_>>(), vec![0b11, 0]);
    }
}
