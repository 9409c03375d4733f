//! Maxima, exponentials and sums over a row of logits, with one definition of their order.
//!
//! Invariant: the sum of exponentials runs in [`LANES`] partial sums in double precision (lane j takes the elements
//! j, j + LANES, …), which are then added lane 0 first. `exp` and `ln` are our own. So the bits depend neither on the
//! vector unit nor on the compiler; with AVX2 and FMA present the same code is merely compiled for them.

use understudy_kernels::{exp, ln};

use crate::sampler::SampleError;

/// Partial sums of one row.
const LANES: usize = 16;

/// The largest value of a row, proven to be usable.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    max: f32,
}

impl Row {
    /// The lowest id that has the largest value.
    #[must_use]
    pub fn argmax(self, logits: &[f32]) -> u32 {
        // Whole blocks first: a comparison of 16 at a time is a vector one.
        let (blocks, _) = logits.as_chunks::<LANES>();
        let skipped = blocks
            .iter()
            .take_while(|block| !block.iter().fold(false, |any, &x| any | (x == self.max)))
            .count()
            * LANES;
        logits[skipped..]
            .iter()
            .position(|&logit| logit == self.max)
            .map_or(0, |index| skipped + index) as u32
    }
}

/// The maximum of a row of a model: `None` if a value is NaN or plus infinity, or if none is above minus infinity. A minus infinity
/// among others is a token that the model rules out.
#[must_use]
pub fn finite_max(logits: &[f32]) -> Option<Row> {
    let (max, usable) = dispatch_scan(logits);
    (usable && max > f32::NEG_INFINITY).then_some(Row { max })
}

/// The maximum of a row in which minus infinity means "not this one".
///
/// # Errors
/// [`SampleError::NotFinite`] for NaN or plus infinity, [`SampleError::NothingLeft`] if all is minus infinity.
pub fn masked_max(logits: &[f32]) -> Result<Row, SampleError> {
    match dispatch_scan(logits) {
        (_, false) => Err(SampleError::NotFinite),
        (f32::NEG_INFINITY, true) => Err(SampleError::NothingLeft),
        (max, true) => Ok(Row { max }),
    }
}

/// What turns a logit of one row into its natural log probability.
#[derive(Debug, Clone, Copy)]
pub struct LogSoftmax {
    max: f32,
    /// ln of the sum of e^(x - max).
    log_sum: f32,
}

impl LogSoftmax {
    /// Normalises a row by its maximum and sum.
    #[must_use]
    pub fn of(logits: &[f32], row: Row) -> Self {
        Self {
            max: row.max,
            log_sum: ln(dispatch_sum(logits, row.max) as f32),
        }
    }

    /// ln of the softmax probability of a token with this logit.
    #[must_use]
    pub fn logprob(self, logit: f32) -> f32 {
        (logit - self.max) - self.log_sum
    }
}

/// Fills `weights` with e^((x - max) / temperature): 1 for the most likely token, 0 for suppressed ones.
pub fn weights_into(logits: &[f32], row: Row, temperature: f32, weights: &mut Vec<f32>) {
    weights.resize(logits.len(), 0.0);
    dispatch_weights(logits, row.max, temperature, weights);
}

#[inline(always)]
fn scan(logits: &[f32]) -> (f32, bool) {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [0_u32; LANES];
    let (blocks, tail) = logits.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            let x = block[lane];
            max[lane] = if x > max[lane] { x } else { max[lane] };
            bad[lane] |= u32::from(is_fault(x));
        }
    }
    let mut best = f32::NEG_INFINITY;
    for &x in max.iter().chain(tail) {
        best = if x > best { x } else { best };
    }
    let usable = bad.iter().all(|&flag| flag == 0) && !tail.iter().any(|&x| is_fault(x));
    (best, usable)
}

/// NaN or plus infinity, without a branch.
#[inline(always)]
fn is_fault(x: f32) -> bool {
    let bits = x.to_bits();
    bits & 0x7f80_0000 == 0x7f80_0000 && bits != f32::NEG_INFINITY.to_bits()
}

#[inline(always)]
fn sum_of_exponentials(logits: &[f32], max: f32) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let (blocks, tail) = logits.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] += f64::from(exp(block[lane] - max));
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += f64::from(exp(x - max));
    }
    lanes.iter().sum()
}

#[inline(always)]
fn exponentials(logits: &[f32], max: f32, temperature: f32, weights: &mut [f32]) {
    for (weight, &x) in weights.iter_mut().zip(logits) {
        *weight = exp((x - max) / temperature);
    }
}

/// Defines `$name` as `$portable`, compiled a second time for AVX2 and FMA and chosen at run time: on a baseline
/// x86-64 build `mul_add` would be a library call per operation.
macro_rules! dispatch {
    ($name:ident, $portable:ident, ($($argument:ident: $kind:ty),*) -> $result:ty) => {
        fn $name($($argument: $kind),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn wide($($argument: $kind),*) -> $result {
                    $portable($($argument),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                    // SAFETY: both features were just detected on this CPU.
                    return unsafe { wide($($argument),*) };
                }
            }
            $portable($($argument),*)
        }
    };
}

dispatch!(dispatch_scan, scan, (logits: &[f32]) -> (f32, bool));
dispatch!(dispatch_sum, sum_of_exponentials, (logits: &[f32], max: f32) -> f64);
dispatch!(dispatch_weights, exponentials, (logits: &[f32], max: f32, temperature: f32, weights: &mut [f32]) -> ());

#[cfg(test)]
mod tests {
    use super::*;

    fn row(length: usize) -> Vec<f32> {
        (0..length)
            .map(|i| ((i * 2_654_435_761) % 8191) as f32 / 512.0 - 8.0)
            .collect()
    }

    #[test]
    fn wide_and_portable_code_give_the_same_bits() {
        for length in [1, 7, 15, 16, 17, 100, 1003] {
            let logits = row(length);
            let max = finite_max(&logits).unwrap().max;
            assert_eq!(
                dispatch_sum(&logits, max).to_bits(),
                sum_of_exponentials(&logits, max).to_bits()
            );
            assert_eq!(dispatch_scan(&logits), scan(&logits));
            let (mut a, mut b) = (vec![0.0; length], vec![0.0; length]);
            dispatch_weights(&logits, max, 0.7, &mut a);
            exponentials(&logits, max, 0.7, &mut b);
            assert_eq!(a, b);
        }
    }

    /// Lane 0 alone holds a 1, and every other term is less than half a step of it: only an order that adds the small ones among
    /// themselves first gets above 1.
    #[test]
    fn the_sum_starts_with_lane_0() {
        let logits = [&[-37.0; LANES][..], &[0.0], &[-50.0; LANES - 1]].concat();
        assert_eq!(dispatch_sum(&logits, 0.0).to_bits(), 1.0_f64.to_bits());
        assert_eq!(
            sum_of_exponentials(&logits, 0.0).to_bits(),
            1.0_f64.to_bits()
        );
    }

    #[test]
    fn logprobs_agree_with_double_precision() {
        let logits = row(1000);
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let log_softmax = LogSoftmax::of(&logits, finite_max(&logits).unwrap());
        for &logit in &logits {
            let exact = f64::from(logit) - sum.ln();
            assert!((f64::from(log_softmax.logprob(logit)) - exact).abs() < 4e-6);
        }
    }

    #[test]
    fn a_row_with_one_bad_value_anywhere_is_refused() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            for index in 0..40 {
                let mut logits = row(40);
                logits[index] = bad;
                assert!(finite_max(&logits).is_none(), "{bad} at {index}");
            }
        }
        assert!(finite_max(&[]).is_none());
        assert!(finite_max(&[f32::NEG_INFINITY; 20]).is_none());
        for index in 0..40 {
            let mut logits = row(40);
            logits[index] = f32::NEG_INFINITY;
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(finite_max(&logits).unwrap().max, max, "ruled out: {index}");
        }
        assert_eq!(
            masked_max(&[f32::NEG_INFINITY; 3]).unwrap_err(),
            SampleError::NothingLeft
        );
        assert_eq!(
            masked_max(&[0.0, f32::NAN]).unwrap_err(),
            SampleError::NotFinite
        );
    }

    #[test]
    fn ties_go_to_the_lowest_id() {
        let logits = [1.0, 3.0, -0.0, 3.0];
        assert_eq!(finite_max(&logits).unwrap().argmax(&logits), 1);
        let zeros = [-0.0, 0.0];
        assert_eq!(finite_max(&zeros).unwrap().argmax(&zeros), 0);
    }
}
