//! Key=value text of login and text negotiation (RFC 7143 §6.1): pairs end in a NUL byte; a text longer than a data
//! segment is continued under the C bit.

use bytes::{Buf, Bytes, BytesMut};

/// The longest key (RFC 7143 §6.1).
pub const MAX_KEY: usize = 63;

/// The longest text of one negotiation, all continued segments together; a longer one is refused.
pub const MAX_TEXT: usize = 64 * 1024;

/// Why a text is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// More than [`MAX_TEXT`] bytes.
    #[error("text of more than {MAX_TEXT} bytes")]
    TooLong,
    /// Not `key=value`, or not UTF-8, or the last NUL is missing.
    #[error("text is not key=value pairs")]
    Malformed,
}

/// Gathers the segments of one text.
#[derive(Debug, Default)]
pub struct Incoming(BytesMut);

impl Incoming {
    /// Takes a segment; `more` is its C bit. Gives the pairs once the text is whole.
    ///
    /// # Errors
    /// The text is too long or malformed; what was gathered is dropped.
    pub fn push(&mut self, segment: &[u8], more: bool) -> Result<Option<Vec<(String, String)>>, TextError> {
        if self.0.len() + segment.len() > MAX_TEXT {
            self.0.clear();
            return Err(TextError::TooLong);
        }
        self.0.extend_from_slice(segment);
        if more { Ok(None) } else { parse(&self.0.split()).map(Some) }
    }
}

/// The pairs of a whole text, in order. Empty pairs (stray NULs) are skipped.
///
/// # Errors
/// [`TextError::Malformed`].
pub fn parse(text: &[u8]) -> Result<Vec<(String, String)>, TextError> {
    let mut pairs = Vec::new();
    for pair in text.split(|&b| b == 0).filter(|pair| !pair.is_empty()) {
        let pair = std::str::from_utf8(pair).map_err(|_| TextError::Malformed)?;
        let (key, value) = pair.split_once('=').ok_or(TextError::Malformed)?;
        if key.is_empty() || key.len() > MAX_KEY || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(TextError::Malformed);
        }
        pairs.push((key.to_owned(), value.to_owned()));
    }
    Ok(pairs)
}

/// A text that is being sent, a segment at a time.
#[derive(Debug, Default)]
pub struct Outgoing(BytesMut);

impl Outgoing {
    /// Appends a pair.
    pub fn pair(&mut self, key: &str, value: &str) {
        for part in [key, "=", value, "\0"] {
            self.0.extend_from_slice(part.as_bytes());
        }
    }

    /// Takes the next segment of at most `limit` bytes off, and says whether more is left (the C bit).
    pub fn segment(&mut self, limit: usize) -> (Bytes, bool) {
        let segment = self.0.split_to(self.0.len().min(limit)).freeze();
        (segment, self.0.has_remaining())
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A number as RFC 7143 §6.1 writes it: decimal, or hexadecimal with `0x`.
pub fn number(value: &str) -> Option<u64> {
    match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pairs_go_there_and_back_over_small_segments() {
        let mut out = Outgoing::default();
        out.pair("InitiatorName", "iqn.2026-11.io.md99:a=b");
        out.pair("TargetAlias", "");
        let mut incoming = Incoming::default();
        loop {
            let (segment, more) = out.segment(7);
            if let Some(pairs) = incoming.push(&segment, more).unwrap() {
                assert_eq!(
                    pairs,
                    [("InitiatorName".into(), "iqn.2026-11.io.md99:a=b".into()), ("TargetAlias".into(), String::new())]
                );
                break;
            }
        }
    }

    #[test]
    fn malformed_and_oversized_texts_are_refused() {
        assert_eq!(parse(b"NoValue\0"), Err(TextError::Malformed));
        assert_eq!(parse(b"=x\0"), Err(TextError::Malformed));
        assert_eq!(parse(b"A=\xff\0"), Err(TextError::Malformed));
        let mut incoming = Incoming::default();
        assert_eq!(incoming.push(&vec![b'a'; MAX_TEXT], true), Ok(None));
        assert_eq!(incoming.push(b"b", true), Err(TextError::TooLong));
        assert_eq!((number("0x1F"), number("31"), number("x")), (Some(31), Some(31), None));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&text);
        }
    }
}
