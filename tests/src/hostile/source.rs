//! How a target reads its decisions from an input, and what it tells of what happened.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Bytes that are taken from the front; zeroes when there are none left.
pub struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    pub fn new(input: &'a [u8]) -> Self {
        Self(input)
    }
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
    /// Bytes behind a 16-bit length.
    pub fn item(&mut self) -> &'a [u8] {
        let len = self.u16();
        self.bytes(len.into())
    }
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
    /// A number that is most often small, and sometimes at an edge of what fits.
    pub fn number(&mut self) -> u64 {
        match self.u8() {
            n @ 0..=239 => u64::from(n % 40),
            240 => u64::from(u32::MAX),
            241 => u64::from(u32::MAX) + 1,
            242 => u64::MAX,
            243 => u64::MAX - 1,
            244 => u64::MAX / 2,
            245 => i64::MAX as u64 + 1,
            246 => u64::MAX / 4096,
            247 => u64::MAX / 512 + 1,
            _ => self.u64(),
        }
    }
}

/// What an input led to: an input that leads to something new is kept to be changed further.
#[derive(Debug, Default)]
pub struct Seen(BTreeSet<u64>);

impl Seen {
    pub fn note(&mut self, what: impl Hash) {
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        self.0.insert(hasher.finish());
    }
    /// A text without its numbers: those would make everything new.
    pub fn words(&mut self, text: &str) {
        let words: String = text.chars().filter(|c| !c.is_ascii_hexdigit()).take(80).collect();
        self.note(words);
    }
    pub fn into_features(self) -> BTreeSet<u64> {
        self.0
    }
}
