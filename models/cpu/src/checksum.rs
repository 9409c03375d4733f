//! A fast checksum of large memory: it finds damage, not malice.

use std::sync::atomic::{AtomicU64, Ordering};

use understudy_kernels::Pool;

/// What a task takes.
const PART_BYTES: usize = 4 << 20;
/// Chains side by side, so that multiplications overlap.
const LANES: usize = 8;
/// Odd, with well mixed bits (the golden ratio).
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// The checksum of `bytes`; the same for any number of threads.
#[must_use]
pub fn checksum(pool: &Pool, bytes: &[u8]) -> u64 {
    let parts = bytes.len().div_ceil(PART_BYTES);
    let sums: Vec<AtomicU64> = (0..parts).map(|_| AtomicU64::new(0)).collect();
    pool.run(parts, &|index| {
        let part = &bytes[index * PART_BYTES..((index + 1) * PART_BYTES).min(bytes.len())];
        sums[index].store(part_sum(part), Ordering::Relaxed);
    });
    let length = bytes.len() as u64;
    sums.iter().fold(mix(length), |sum, part| {
        mix(sum ^ part.load(Ordering::Relaxed))
    })
}

fn part_sum(bytes: &[u8]) -> u64 {
    let mut lanes = [FACTOR; LANES];
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 8 }>();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            // Every step is a bijection of the lane: no single change can cancel itself.
            *lane = (*lane ^ u64::from_le_bytes(*word))
                .wrapping_mul(FACTOR)
                .rotate_left(29);
        }
    }
    let sum = lanes
        .iter()
        .fold(rest.len() as u64, |sum, lane| mix(sum ^ lane));
    rest.iter()
        .fold(sum, |sum, byte| mix(sum ^ u64::from(*byte)))
}

fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 32)).wrapping_mul(FACTOR);
    (word ^ (word >> 29)).wrapping_mul(FACTOR) ^ (word >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_bit_and_any_length_shows() {
        let pool = Pool::new(2);
        let mut bytes: Vec<u8> = (0..PART_BYTES + 777).map(|i| (i % 251) as u8).collect();
        let sum = checksum(&pool, &bytes);
        assert_eq!(sum, checksum(&Pool::new(1), &bytes));
        for at in [0, 63, 64, PART_BYTES - 1, PART_BYTES, PART_BYTES + 776] {
            bytes[at] ^= 0x10;
            assert_ne!(sum, checksum(&pool, &bytes), "{at}");
            bytes[at] ^= 0x10;
        }
        assert_ne!(sum, checksum(&pool, &bytes[..PART_BYTES + 776]));
        assert_ne!(checksum(&pool, &[0; 64]), checksum(&pool, &[0; 128]));
    }
}
