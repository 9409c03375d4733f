//! Percentiles by nearest rank: each figure is one that was measured.

use serde_json::{Value, json};

/// Count, percentiles and maximum of `values`, to a tenth.
pub fn percentiles(values: &[f64]) -> Value {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |percent: usize| match sorted.len() {
        0 => Value::Null,
        count => json!(tenth(
            sorted[(count * percent).div_ceil(100).clamp(1, count) - 1]
        )),
    };
    json!({"n": sorted.len(), "p50": at(50), "p90": at(90), "p99": at(99), "max": at(100)})
}

pub fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let sixty: Vec<f64> = (1..=60).map(f64::from).collect();
        assert_eq!(
            percentiles(&sixty),
            json!({"n": 60, "p50": 30.0, "p90": 54.0, "p99": 60.0, "max": 60.0})
        );
        assert_eq!(percentiles(&[])["p99"], Value::Null);
    }
}
