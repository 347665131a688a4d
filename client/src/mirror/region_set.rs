//! A set of regions as a bitmap: one bit per MiB, so 2 MiB for the largest mirror.

use proto::id::RegionIndex;

/// A set of regions of one mirror.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct RegionSet {
    words: Vec<u64>,
    count: usize,
}

impl std::fmt::Debug for RegionSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl RegionSet {
    /// An empty set; it grows as regions are inserted.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many regions are in it.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether none is in it.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `region` is in it.
    pub fn contains(&self, region: RegionIndex) -> bool {
        self.words.get(region.0 as usize / 64).is_some_and(|w| w >> (region.0 % 64) & 1 == 1)
    }

    /// Adds a region; true if it was not in the set.
    pub fn insert(&mut self, region: RegionIndex) -> bool {
        let at = region.0 as usize / 64;
        if self.words.len() <= at {
            self.words.resize(at + 1, 0);
        }
        let bit = 1 << (region.0 % 64);
        let new = self.words[at] & bit == 0;
        self.words[at] |= bit;
        self.count += usize::from(new);
        new
    }

    /// Takes a region out; true if it was in the set.
    pub fn remove(&mut self, region: RegionIndex) -> bool {
        let Some(word) = self.words.get_mut(region.0 as usize / 64) else { return false };
        let bit = 1 << (region.0 % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        self.count -= usize::from(was);
        was
    }

    /// Adds everything that is in `other`.
    pub fn union_with(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.count = self.words.iter().map(|w| w.count_ones() as usize).sum();
    }

    /// Adds the regions whose bits are set in `bits`, bit 0 of byte 0 being `first`, `count` bits at most.
    pub fn insert_bits(&mut self, first: RegionIndex, count: u32, bits: &[u8]) {
        for (i, byte) in bits.iter().enumerate().filter(|(_, b)| **b != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                let at = i as u32 * 8 + bit;
                if at < count {
                    self.insert(RegionIndex(first.0 + at));
                }
            }
        }
    }

    /// The regions, ascending.
    pub fn iter(&self) -> impl Iterator<Item = RegionIndex> + '_ {
        self.words.iter().enumerate().flat_map(|(i, w)| {
            let mut word = *w;
            std::iter::from_fn(move || {
                let bit = word.trailing_zeros();
                (word != 0).then(|| {
                    word &= word - 1;
                    RegionIndex(i as u32 * 64 + bit)
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_counts_and_lists_what_it_holds() {
        let mut set = RegionSet::new();
        for r in [0, 63, 64, 1000] {
            assert!(set.insert(RegionIndex(r)));
            assert!(!set.insert(RegionIndex(r)));
        }
        assert!(set.remove(RegionIndex(64)) && !set.remove(RegionIndex(64)));
        assert_eq!(set.iter().map(|r| r.0).collect::<Vec<_>>(), [0, 63, 1000]);
        assert_eq!(set.len(), 3);
        let mut other = RegionSet::new();
        other.insert_bits(RegionIndex(60), 9, &[0b1000_0001, 0b11]);
        assert_eq!(other.iter().map(|r| r.0).collect::<Vec<_>>(), [60, 67, 68]);
        other.union_with(&set);
        assert_eq!(other.len(), 6);
    }
}
