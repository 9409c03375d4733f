//! Seeded damage to frames: what a broken or hostile peer could send.

use fastrand::Rng;

/// Bytes that mean something in MessagePack: every kind of header, and lengths that lie.
const MARKERS: [u8; 26] = [
    0x00, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc4, 0xc6, 0xc7, 0xca, 0xcb, 0xcf,
    0xd3, 0xd4, 0xd9, 0xdb, 0xdc, 0xdd, 0xde, 0xdf, 0xe0, 0xff,
];

/// A payload damaged in one to four ways. `others` are payloads to take pieces from.
pub fn damage(rng: &mut Rng, payload: &[u8], others: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = payload.to_vec();
    let times = if rng.bool() { 1 } else { rng.u32(2..=4) };
    for _ in 0..times {
        damage_once(rng, &mut bytes, others);
    }
    bytes
}

fn damage_once(rng: &mut Rng, bytes: &mut Vec<u8>, others: &[Vec<u8>]) {
    if bytes.is_empty() {
        bytes.push(rng.u8(..));
        return;
    }
    let at = rng.usize(..bytes.len());
    match rng.u32(..10) {
        0 => bytes[at] ^= 1 << rng.u32(..8),
        1 => bytes[at] = rng.u8(..),
        2 => bytes[at] = MARKERS[rng.usize(..MARKERS.len())],
        3 => bytes.truncate(at),
        4 => bytes.insert(at, MARKERS[rng.usize(..MARKERS.len())]),
        5 => {
            bytes.remove(at);
        }
        6 => {
            // A length of 32 bits that is not true.
            let header = [
                MARKERS[rng.usize(..MARKERS.len())],
                0xff,
                0xff,
                0xff,
                rng.u8(..),
            ];
            bytes.splice(at..at, header);
        }
        7 => {
            let other = &others[rng.usize(..others.len())];
            let from = rng.usize(..other.len());
            let to = rng.usize(from..=other.len());
            bytes.splice(at..at, other[from..to].iter().copied());
        }
        8 => {
            let to = rng.usize(at..=bytes.len());
            let piece = bytes[at..to].to_vec();
            let again = rng.usize(..=bytes.len());
            bytes.splice(again..again, piece);
        }
        _ => {
            // Nesting, as deep as it gets.
            let marker = [0x81, 0x91, 0xdd][rng.usize(..3)];
            let depth = rng.usize(1..2000);
            bytes.splice(at..at, std::iter::repeat_n(marker, depth));
        }
    }
}
