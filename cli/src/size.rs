//! Sizes as people write them: a whole number and a binary unit.

use proto::limits::BLOCK_SIZE;

const UNITS: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSize {
    /// No unit.
    #[error("give a unit: {digits}KiB, {digits}MiB, {digits}GiB or {digits}TiB")]
    NoUnit {
        /// What came before it.
        digits: String,
    },
    /// Not one of ours.
    #[error("unknown unit {unit:?}: sizes take KiB, MiB, GiB or TiB")]
    UnknownUnit {
        /// What was written.
        unit: String,
    },
    /// Not digits only.
    #[error("{number:?} is not a whole number: write 1536MiB rather than 1.5GiB")]
    NotWhole {
        /// What was written.
        number: String,
    },
    /// Nothing.
    #[error("a size of zero makes no sense")]
    Zero,
    /// Does not fit in 64 bits.
    #[error("is larger than any disk")]
    TooLarge,
    /// Not whole blocks.
    #[error("{bytes} bytes is not a multiple of the block, {BLOCK_SIZE} bytes")]
    NotBlocks {
        /// Bytes.
        bytes: u64,
    },
}

/// Bytes of a size like `75GiB`.
///
/// # Errors
/// [`BadSize`].
pub fn parse(text: &str) -> Result<u64, BadSize> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = (text[..split].trim_end(), &text[split..]);
    if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
        return Err(BadSize::NotWhole { number: number.into() });
    }
    if unit.is_empty() {
        return Err(match number.bytes().all(|b| b == b'0') {
            true => BadSize::Zero,
            false => BadSize::NoUnit { digits: number.into() },
        });
    }
    let scale = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, scale)| *scale);
    let scale = scale.ok_or_else(|| BadSize::UnknownUnit { unit: unit.into() })?;
    let number: u64 = number.parse().map_err(|_| BadSize::TooLarge)?;
    match number.checked_mul(scale) {
        None => Err(BadSize::TooLarge),
        Some(0) => Err(BadSize::Zero),
        Some(bytes) => Ok(bytes),
    }
}

/// Bytes of a size in whole blocks.
///
/// # Errors
/// [`BadSize`].
pub fn parse_blocks(text: &str) -> Result<u64, BadSize> {
    let bytes = parse(text)?;
    if !bytes.is_multiple_of(BLOCK_SIZE) {
        return Err(BadSize::NotBlocks { bytes });
    }
    Ok(bytes)
}

/// Bytes as a chunk: a power of two that a request can span.
///
/// # Errors
/// Says what a chunk may be.
pub fn parse_chunk(text: &str) -> Result<u32, String> {
    let bytes = parse_blocks(text).map_err(|bad| bad.to_string())?;
    match u32::try_from(bytes) {
        Ok(chunk) if chunk.is_power_of_two() && chunk <= 16 << 20 => Ok(chunk),
        _ => Err("a chunk is a power of two from 4KiB to 16MiB".into()),
    }
}

/// For people: exact where a unit divides it, else with one decimal.
pub fn show(bytes: u64) -> String {
    let unit = UNITS.iter().rev().find(|(_, scale)| bytes >= *scale);
    match unit {
        None => format!("{bytes} B"),
        Some((name, scale)) if bytes.is_multiple_of(*scale) => format!("{} {name}", bytes / scale),
        Some((name, scale)) => format!("{:.1} {name}", bytes as f64 / *scale as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_numbers_with_a_binary_unit() {
        let table: [(&str, Result<u64, BadSize>); 12] = [
            ("4KiB", Ok(4096)),
            ("2GiB", Ok(2 << 30)),
            ("2 gib", Ok(2 << 30)),
            ("1TiB", Ok(1 << 40)),
            ("0", Err(BadSize::Zero)),
            ("0GiB", Err(BadSize::Zero)),
            ("17", Err(BadSize::NoUnit { digits: "17".into() })),
            ("1.5GiB", Err(BadSize::NotWhole { number: "1.5".into() })),
            ("-1GiB", Err(BadSize::NotWhole { number: "-1".into() })),
            ("GiB", Err(BadSize::NotWhole { number: String::new() })),
            ("2GB", Err(BadSize::UnknownUnit { unit: "GB".into() })),
            ("99999999999TiB", Err(BadSize::TooLarge)),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text), expected, "{text}");
        }
        assert_eq!(parse_blocks("6KiB"), Err(BadSize::NotBlocks { bytes: 6144 }));
        assert_eq!(parse_chunk("256KiB"), Ok(256 << 10));
        for chunk in ["12KiB", "32MiB", "0KiB", "1KiB"] {
            assert!(parse_chunk(chunk).is_err(), "{chunk}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit() {
        for (bytes, text) in
            [(0, "0 B"), (512, "512 B"), (4096, "4 KiB"), (5 << 20, "5 MiB"), ((3 << 30) + (1 << 29), "3.5 GiB")]
        {
            assert_eq!(show(bytes), text);
        }
    }
}
