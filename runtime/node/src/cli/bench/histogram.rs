//! A histogram of durations with fixed memory and a bounded relative error.
//!
//! Log-linear buckets, after Gil Tene's HdrHistogram: values below 2^8 ns have a bucket each, and every further
//! power of two is divided into 2^7 buckets, so that a bucket is never wider than 1/128 of its values. A percentile
//! is reported as the upper end of its bucket, at most 0.8 % too high, never too low. Count, sum and maximum are exact.

use std::time::Duration;

/// Sub-buckets per power of two, as a power of two.
const SUB_BITS: u32 = 7;
/// Values below this have a bucket of their own.
const LINEAR: u64 = 1 << (SUB_BITS + 1);
/// Buckets for every `u64` of nanoseconds: the linear part, then 128 for each of the 56 further powers of two (58 KiB).
const BUCKETS: usize = LINEAR as usize + ((63 - SUB_BITS as usize) << SUB_BITS);

/// Durations, recorded one by one.
#[derive(Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            count: 0,
            sum_ns: 0,
            max_ns: 0,
        }
    }
}

/// The bucket that holds a value.
fn bucket_of(ns: u64) -> usize {
    if ns < LINEAR {
        return ns as usize;
    }
    // `shift` ≥ 1: the value's leading SUB_BITS + 1 bits name the sub-bucket.
    let shift = 63 - ns.leading_zeros() - SUB_BITS;
    let sub = (ns >> shift) as usize - (1 << SUB_BITS);
    LINEAR as usize + ((shift as usize - 1) << SUB_BITS) + sub
}

/// The largest value of a bucket, in nanoseconds.
fn upper_end(bucket: usize) -> u64 {
    if bucket < LINEAR as usize {
        return bucket as u64;
    }
    let beyond = bucket - LINEAR as usize;
    let shift = (beyond >> SUB_BITS) as u32 + 1;
    let leading = (1u64 << SUB_BITS) + (beyond as u64 & ((1 << SUB_BITS) - 1));
    (leading << shift) | ((1u64 << shift) - 1)
}

impl Histogram {
    /// Adds one duration; more than 584 years count as 584 years.
    pub fn record(&mut self, value: Duration) {
        let ns = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket_of(ns)] += 1;
        self.count += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// How many durations there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest duration, exactly; `None` where there is none.
    pub fn max(&self) -> Option<Duration> {
        (self.count > 0).then(|| Duration::from_nanos(self.max_ns))
    }

    /// The mean, exactly, rounded down to nanoseconds; `None` where there is none.
    pub fn mean(&self) -> Option<Duration> {
        let mean = self.sum_ns.checked_div(u128::from(self.count))?;
        Some(Duration::from_nanos(
            u64::try_from(mean).unwrap_or(u64::MAX),
        ))
    }

    /// The smallest recorded duration that at least `percent` % of all do not exceed (nearest rank), within the bucket
    /// error; `None` where there is none.
    pub fn percentile(&self, percent: f64) -> Option<Duration> {
        let rank =
            ((percent / 100.0 * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(Duration::from_nanos(upper_end(bucket).min(self.max_ns)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_tile_the_whole_range() {
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(upper_end(BUCKETS - 1), u64::MAX);
        for bucket in 0..BUCKETS - 1 {
            let end = upper_end(bucket);
            assert_eq!(bucket_of(end), bucket);
            assert_eq!(bucket_of(end + 1), bucket + 1);
        }
    }

    #[test]
    fn percentiles_are_within_the_bound_of_the_sorted_values() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut values: Vec<u64> = (0..10_000)
            .map(|_| {
                let scale = 1u64 << random.u32(0..40);
                random.u64(0..=scale)
            })
            .collect();
        let mut histogram = Histogram::default();
        for value in &values {
            histogram.record(Duration::from_nanos(*value));
        }
        values.sort_unstable();
        for percent in [0.01, 1.0, 25.0, 50.0, 90.0, 99.0, 99.9, 100.0] {
            let rank = ((percent / 100.0 * values.len() as f64).ceil() as usize).max(1);
            let exact = values[rank - 1];
            let got = histogram.percentile(percent).expect("not empty").as_nanos() as u64;
            assert!(got >= exact, "p{percent}: {got} below {exact}");
            assert!(
                got as f64 <= exact as f64 * 1.008,
                "p{percent}: {got} far above {exact}"
            );
        }
        assert_eq!(
            histogram.max(),
            values.last().copied().map(Duration::from_nanos)
        );
        let mean = values.iter().map(|v| u128::from(*v)).sum::<u128>() / values.len() as u128;
        assert_eq!(histogram.mean().map(|mean| mean.as_nanos()), Some(mean));
    }

    #[test]
    fn nothing_recorded_has_no_percentile() {
        let empty = Histogram::default();
        assert_eq!(
            (empty.percentile(50.0), empty.mean(), empty.max()),
            (None, None, None)
        );
    }

    #[test]
    fn one_value_is_every_percentile() {
        let mut one = Histogram::default();
        one.record(Duration::from_micros(1234));
        for percent in [1.0, 50.0, 100.0] {
            assert_eq!(one.percentile(percent), Some(Duration::from_micros(1234)));
        }
    }
}
