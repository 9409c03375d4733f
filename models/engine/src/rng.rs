//! The counter-based generator behind every random choice: Philox4x32-10.
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); test vectors of the
//! Random123 library. Key = the request's seed; counter = (output position, branch, domain). There is no state, so a
//! replay can draw position 917 without having drawn the 917 before it, and gets the same bits.

const MULTIPLIER_0: u32 = 0xD251_1F53;
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
const WEYL_0: u32 = 0x9E37_79B9;
const WEYL_1: u32 = 0xBB67_AE85;
const ROUNDS: usize = 10;

/// What a draw is for; keeps draws of different purposes at one position independent of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Domain {
    /// Choosing the token at a position.
    Token = 0,
}

/// The 128 random bits of one (counter, key) pair.
#[must_use]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL_0), key[1].wrapping_add(WEYL_1)];
        }
        let (high_0, low_0) = wide_multiply(MULTIPLIER_0, counter[0]);
        let (high_1, low_1) = wide_multiply(MULTIPLIER_1, counter[2]);
        counter = [
            high_1 ^ counter[1] ^ key[0],
            low_1,
            high_0 ^ counter[3] ^ key[1],
            low_0,
        ];
    }
    counter
}

/// A uniform number in `[0, 1)` with 53 random bits: a pure function of its arguments.
///
/// `branch` tells the completions of one request apart (0 for the first).
#[must_use]
pub fn uniform(seed: u64, position: u64, branch: u32, domain: Domain) -> f64 {
    let counter = [
        position as u32,
        (position >> 32) as u32,
        branch,
        domain as u32,
    ];
    let bits = philox4x32_10(counter, [seed as u32, (seed >> 32) as u32]);
    let word = u64::from(bits[0]) << 32 | u64::from(bits[1]);
    (word >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
}

fn wide_multiply(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of Random123 for philox4x32-10.
    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([ones; 4], [ones; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_is_spread_evenly_over_its_interval() {
        let mut buckets = [0_u32; 16];
        let mut sum = 0.0;
        for position in 0..16_000 {
            let u = uniform(42, position, 0, Domain::Token);
            assert!((0.0..1.0).contains(&u));
            buckets[(u * 16.0) as usize] += 1;
            sum += u;
        }
        assert!((sum / 16_000.0 - 0.5).abs() < 0.01);
        assert!(
            buckets.iter().all(|&count| (850..1150).contains(&count)),
            "{buckets:?}"
        );
    }

    #[test]
    fn seed_position_and_branch_all_matter() {
        let base = uniform(1, 2, 0, Domain::Token);
        assert_ne!(base, uniform(1, 3, 0, Domain::Token));
        assert_ne!(base, uniform(1, 2 + (1 << 32), 0, Domain::Token));
        assert_ne!(base, uniform(1 + (1 << 32), 2, 0, Domain::Token));
        assert_ne!(base, uniform(1, 2, 1, Domain::Token));
        assert_eq!(base.to_bits(), uniform(1, 2, 0, Domain::Token).to_bits());
    }
}
