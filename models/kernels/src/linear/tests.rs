use super::*;
use crate::lanes::{f32_to_bf16, f32_to_f16};
use crate::testing::Random;

/// The definition: one chain per element.
fn reference(x: &[f32], w: &[f32], rows: usize, n: usize, k: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(rows * n);
    for row in x.chunks(k).take(rows) {
        for weights in w.chunks(k).take(n) {
            y.push(
                row.iter()
                    .zip(weights)
                    .fold(0.0_f32, |sum, (a, b)| a.mul_add(*b, sum)),
            );
        }
    }
    y
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_path_and_row_count_gives_the_bits_of_the_definition() {
    let mut random = Random::new(11);
    for (n, k) in [
        (1, 1),
        (5, 3),
        (16, 8),
        (47, 33),
        (48, 64),
        (49, 31),
        (96, 20),
        (130, 129),
        (200, 77),
    ] {
        let wide: Vec<f32> = random.values(n * k);
        let half: Vec<u16> = wide.iter().map(|v| f32_to_f16(*v)).collect();
        let brain: Vec<u16> = wide.iter().map(|v| f32_to_bf16(*v)).collect();
        let half_wide: Vec<f32> = half.iter().map(|v| f16_to_f32(*v)).collect();
        let brain_wide: Vec<f32> = brain.iter().map(|v| bf16_to_f32(*v)).collect();
        let cases = [
            (PackedLinear::pack(WeightSlice::F32(&wide), n, k), &wide),
            (
                PackedLinear::pack(WeightSlice::F16(&half), n, k),
                &half_wide,
            ),
            (
                PackedLinear::pack(WeightSlice::Bf16(&brain), n, k),
                &brain_wide,
            ),
        ];
        let x = random.values(40 * k);
        for (linear, weights) in &cases {
            let expected = bits(&reference(&x, weights, 40, n, k));
            for threads in [1, 2] {
                let pool = Pool::new(threads);
                for &isa in Isa::available() {
                    for rows in 1..=40 {
                        let mut y = vec![f32::NAN; rows * n];
                        linear.forward_on(isa, &pool, &x[..rows * k], rows, &mut y);
                        assert_eq!(
                            bits(&y),
                            expected[..rows * n],
                            "{isa:?}, {rows} rows, [{n}, {k}], {threads} threads"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn large_products_split_over_threads_keep_their_bits() {
    let mut random = Random::new(12);
    let (n, k, rows) = (1000, 300, 21);
    let w = random.values(n * k);
    let x = random.values(rows * k);
    let linear = PackedLinear::pack(WeightSlice::F32(&w), n, k);
    let expected = bits(&reference(&x, &w, rows, n, k));
    for threads in [1, 2, 5] {
        let mut y = vec![0.0; rows * n];
        linear.forward(&Pool::new(threads), &x, rows, &mut y);
        assert_eq!(bits(&y), expected);
    }
}

#[test]
fn weight_rows_come_back() {
    let mut random = Random::new(13);
    let (n, k) = (77, 19);
    let w = random.values(n * k);
    let linear = PackedLinear::pack(WeightSlice::F32(&w), n, k);
    let mut row = vec![0.0; k];
    for output in 0..n {
        linear.weight_row(output, &mut row);
        assert_eq!(row, w[output * k..][..k]);
    }
}

#[test]
fn no_rows_is_no_work() {
    let linear = PackedLinear::pack(WeightSlice::F32(&[1.0, 2.0]), 1, 2);
    linear.forward(&Pool::new(1), &[], 0, &mut []);
}
