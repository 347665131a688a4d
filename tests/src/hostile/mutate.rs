//! Changes inputs: single bits and numbers, pieces that are moved, cut, repeated or taken from other inputs, words that
//! mean something to a target, and whole records where a target tells where they begin.

use crate::sim::rng::Rng;

/// Longest input.
pub const MAX_INPUT: usize = 48 << 10;

const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 52,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

/// Changes `input` a few times.
pub fn mutate(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8], words: &[&[u8]], records: fn(&[u8]) -> Vec<usize>) {
    let times = 1 + rng.tail(0, 12);
    for _ in 0..times {
        if rng.chance(250) {
            move_records(rng, input, other, records);
        } else {
            once(rng, input, other, words);
        }
    }
    input.truncate(MAX_INPUT);
}

fn range(rng: &mut Rng, len: usize) -> (usize, usize) {
    let at = rng.below(len as u64 + 1) as usize;
    let most = (len - at).min(if rng.chance(800) { 16 } else { 4096 });
    (at, at + rng.below(most as u64 + 1) as usize)
}

fn once(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8], words: &[&[u8]]) {
    let len = input.len();
    // Behind nothing: all that changes bytes in place needs some.
    let at = if len == 0 { 0 } else { rng.below(len as u64) as usize };
    match rng.below(if len == 0 { 3 } else { 14 }) {
        0 => {
            let bytes: Vec<u8> = (0..1 + rng.below(16)).map(|_| rng.next() as u8).collect();
            input.splice(at..at, bytes);
        }
        1 if !words.is_empty() => {
            let word = rng.pick(words);
            input.splice(at..at, word.iter().copied());
        }
        1 | 2 => {
            let (from, to) = range(rng, other.len());
            input.splice(at..at, other[from..to].iter().copied());
        }
        3 => input[at] ^= 1 << rng.below(8),
        4 => input[at] = rng.next() as u8,
        5 => input[at] = input[at].wrapping_add(rng.between(1, 16) as u8).wrapping_sub(8),
        6 | 7 => {
            // A number of some width, of either byte order, at an edge or a little changed.
            let width = rng.pick(&[1usize, 2, 3, 4, 8]).min(len - at);
            let little = rng.chance(500);
            let place = &mut input[at..at + width];
            let mut number = 0u64;
            for i in 0..width {
                number = number << 8 | u64::from(place[if little { width - 1 - i } else { i }]);
            }
            let number = match rng.below(3) {
                0 => rng.pick(&NUMBERS),
                1 => number.wrapping_add(rng.between(0, 32)).wrapping_sub(16),
                _ => number.wrapping_mul(rng.between(2, 9)),
            };
            for (i, byte) in number.to_le_bytes()[..width].iter().enumerate() {
                place[if little { i } else { width - 1 - i }] = *byte;
            }
        }
        8 => {
            let (from, to) = range(rng, len);
            input.drain(from..to);
        }
        9 => {
            let (from, to) = range(rng, len);
            let piece = input[from..to].to_vec();
            input.splice(at..at, piece);
        }
        10 => {
            let (from, to) = range(rng, len);
            let piece = input[from..to].to_vec();
            let end = (at + piece.len()).min(len);
            input[at..end].copy_from_slice(&piece[..end - at]);
        }
        11 => {
            let (from, to) = range(rng, other.len());
            let end = (at + (to - from)).min(len);
            input[at..end].copy_from_slice(&other[from..from + (end - at)]);
        }
        12 if !words.is_empty() => {
            let word = rng.pick(words);
            let end = (at + word.len()).min(len);
            input[at..end].copy_from_slice(&word[..end - at]);
        }
        12 => {
            let (from, to) = range(rng, len);
            input[from..to].fill(rng.pick(&[0, 0xff, b'A']));
        }
        _ if rng.chance(300) => input.truncate(at),
        _ => input[at] = rng.pick(&[0, 1, 0x7f, 0x80, 0xff]),
    }
}

/// Drops, repeats, exchanges or takes over whole records.
fn move_records(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8], records: fn(&[u8]) -> Vec<usize>) {
    let cuts = |bytes: &[u8]| -> Vec<(usize, usize)> {
        let mut starts = records(bytes);
        starts.push(bytes.len());
        starts.windows(2).map(|w| (w[0], w[1])).filter(|(from, to)| from < to).collect()
    };
    let (own, others) = (cuts(input), cuts(other));
    let Some(&(from, to)) = own.get(rng.below(own.len().max(1) as u64) as usize) else { return };
    let piece = input[from..to].to_vec();
    let place = own[rng.below(own.len() as u64) as usize];
    match rng.below(4) {
        0 => drop(input.drain(from..to)),
        1 => drop(input.splice(place.0..place.0, piece)),
        2 => {
            let second = input[place.0..place.1].to_vec();
            if place.0 > from {
                input.splice(place.0..place.1, piece);
                input.splice(from..to, second);
            }
        }
        _ => {
            let Some(&(start, end)) = others.get(rng.below(others.len().max(1) as u64) as usize) else { return };
            input.splice(place.0..place.0, other[start..end].iter().copied());
        }
    }
}
