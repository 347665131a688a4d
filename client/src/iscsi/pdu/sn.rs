//! Sequence numbers with serial-number arithmetic (RFC 7143 §4.2.2.1, RFC 1982).

/// A command sequence number. It wraps, so it has no total order and hence no `Ord`: compare by distance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CmdSn(pub u32);

impl CmdSn {
    /// The number `n` later.
    #[must_use]
    pub fn plus(self, n: u32) -> Self {
        CmdSn(self.0.wrapping_add(n))
    }

    /// The number `n` earlier.
    #[must_use]
    pub fn minus(self, n: u32) -> Self {
        CmdSn(self.0.wrapping_sub(n))
    }

    /// How far ahead of `base` this is; `None` if it is behind it (RFC 1982 with SERIAL_BITS 32; the one undefined
    /// distance, 2^31, counts as behind).
    pub fn ahead_of(self, base: CmdSn) -> Option<u32> {
        let distance = self.0.wrapping_sub(base.0);
        (distance < 1 << 31).then_some(distance)
    }
}

#[cfg(test)]
mod tests {
    use super::CmdSn;

    #[test]
    fn distance_wraps_and_is_one_sided() {
        for (sn, base, expected) in [
            (5, 5, Some(0)),
            (6, 5, Some(1)),
            (4, 5, None),
            (2, 0xffff_ffff, Some(3)),
            (0xffff_ffff, 2, None),
            (0x8000_0000, 0, None),
            (0x7fff_ffff, 0, Some(0x7fff_ffff)),
        ] {
            assert_eq!(CmdSn(sn).ahead_of(CmdSn(base)), expected, "{sn:#x} from {base:#x}");
        }
    }
}
