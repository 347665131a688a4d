//! What a sector holds: made from (seed, sector, version), so that whatever is read tells where it belongs and
//! which write made it.
//!
//! ```text
//!  0  mark     u32  derived from the seed
//!  4  version  u32
//!  8  sector   u64
//! 16  numbers drawn from (seed, sector, version)
//! ```

use client::block::SECTOR;

use super::rng::{Rng, mix};

const LEN: usize = SECTOR as usize;
const HEAD: usize = 16;

/// What was found in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes.
    Zero,
    /// Whole, as this write made it.
    Version(u32),
    /// Whole, but of another sector.
    Elsewhere {
        /// Where it belongs.
        sector: u64,
        /// Which write made it.
        version: u32,
    },
    /// Begins as this version does and does not go on so.
    Torn(u32),
    /// Nothing of ours.
    Foreign,
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zero => f.write_str("zeroes"),
            Self::Version(version) => write!(f, "version {version}"),
            Self::Elsewhere { sector, version } => write!(f, "version {version} of sector {sector}"),
            Self::Torn(version) => write!(f, "a damaged version {version}"),
            Self::Foreign => f.write_str("bytes that were never written"),
        }
    }
}

fn mark(seed: u64) -> u32 {
    mix(seed ^ 0x6d64_3939) as u32 | 1
}

fn body(seed: u64, sector: u64, version: u32) -> Rng {
    Rng::new(mix(seed ^ mix(sector ^ u64::from(version) << 40)))
}

/// Fills one sector.
///
/// # Panics
/// When `out` is not a sector long.
pub fn fill(seed: u64, sector: u64, version: u32, out: &mut [u8]) {
    assert_eq!(out.len(), LEN, "a sector");
    out[..4].copy_from_slice(&mark(seed).to_le_bytes());
    out[4..8].copy_from_slice(&version.to_le_bytes());
    out[8..16].copy_from_slice(&sector.to_le_bytes());
    let mut body = body(seed, sector, version);
    for word in out[HEAD..].chunks_exact_mut(8) {
        word.copy_from_slice(&body.draw().to_le_bytes());
    }
}

/// Tells what a sector holds.
///
/// # Panics
/// When `bytes` is not a sector long.
pub fn read(seed: u64, sector: u64, bytes: &[u8]) -> Content {
    assert_eq!(bytes.len(), LEN, "a sector");
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if bytes[..4] != mark(seed).to_le_bytes() {
        return if bytes.iter().all(|b| *b == 0) { Content::Zero } else { Content::Foreign };
    }
    let version = u32_at(4);
    let belongs = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
    let mut body = body(seed, belongs, version);
    if !bytes[HEAD..].chunks_exact(8).all(|word| word == body.draw().to_le_bytes()) {
        return Content::Torn(version);
    }
    match belongs == sector {
        true => Content::Version(version),
        false => Content::Elsewhere { sector: belongs, version },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_where_it_belongs_and_which_write_made_it() {
        let mut bytes = [0; LEN];
        assert_eq!(read(1, 7, &bytes), Content::Zero);
        fill(1, 7, 5, &mut bytes);
        assert_eq!(read(1, 7, &bytes), Content::Version(5));
        assert_eq!(read(1, 8, &bytes), Content::Elsewhere { sector: 7, version: 5 });
        assert_eq!(read(2, 7, &bytes), Content::Foreign, "another run's");
        bytes[511] ^= 1;
        assert_eq!(read(1, 7, &bytes), Content::Torn(5));
    }
}
