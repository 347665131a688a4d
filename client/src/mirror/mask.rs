//! A handful of replicas as bits: the replicas of one mirror by their place in its definition.

/// A set of replicas of one mirror.
#[derive(Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct Mask(u8);

impl Mask {
    pub const EMPTY: Self = Self(0);

    pub fn one(slot: usize) -> Self {
        Self(1 << slot)
    }
    pub fn contains(self, slot: usize) -> bool {
        self.0 >> slot & 1 == 1
    }
    pub fn insert(&mut self, slot: usize) {
        self.0 |= 1 << slot;
    }
    pub fn remove(&mut self, slot: usize) {
        self.0 &= !(1 << slot);
    }
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }
    /// Whether every replica of this set is in `other`.
    pub fn within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..8).filter(move |slot| self.contains(*slot))
    }
}

impl std::ops::BitOr for Mask {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}
impl std::ops::BitAnd for Mask {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}
impl std::ops::Sub for Mask {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}
impl FromIterator<usize> for Mask {
    fn from_iter<T: IntoIterator<Item = usize>>(slots: T) -> Self {
        slots.into_iter().fold(Self::EMPTY, |mask, slot| mask | Self::one(slot))
    }
}
impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
