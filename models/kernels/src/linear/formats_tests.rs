//! Formats beyond `f32`: quantised products against their definitions, and images in memory of others.

use std::sync::Arc;

use super::*;
use crate::buffer::SharedMemory;
use crate::lanes::{f32_to_bf16, f32_to_f16};
use crate::testing::Random;

const ALL: [WeightFormat; 5] = [
    WeightFormat::F32,
    WeightFormat::Bf16,
    WeightFormat::F16,
    WeightFormat::Int8,
    WeightFormat::Int4,
];
const SHAPES: [(usize, usize); 8] = [
    (1, 1),
    (5, 3),
    (16, 8),
    (47, 33),
    (48, 64),
    (100, 31),
    (130, 161),
    (96, 300),
];

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn packed(format: WeightFormat, w: &[f32], n: usize, k: usize, threads: usize) -> PackedLinear {
    let source = |output: usize, row: &mut [f32]| row.copy_from_slice(&w[output * k..][..k]);
    PackedLinear::pack_rows(&Pool::new(threads), format, n, k, &source)
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_on_every_path() {
    let mut random = Random::new(31);
    for (n, k) in SHAPES {
        let (w, x) = (random.values(n * k), random.values(64 * k));
        for format in ALL {
            let linear = packed(format, &w, n, k, 1);
            let mut expected = vec![0.0; 64 * n];
            for (x, y) in x.chunks(k).zip(expected.chunks_mut(n)) {
                linear.forward_on(Isa::Scalar, &Pool::new(1), x, 1, y);
            }
            let expected = bits(&expected);
            for threads in [1, 2] {
                let pool = Pool::new(threads);
                for &isa in Isa::available() {
                    for rows in 1..=64 {
                        let mut y = vec![f32::NAN; rows * n];
                        linear.forward_on(isa, &pool, &x[..rows * k], rows, &mut y);
                        assert_eq!(
                            bits(&y),
                            expected[..rows * n],
                            "{format:?} {isa:?}, {rows} rows, [{n}, {k}], {threads} threads"
                        );
                    }
                }
            }
        }
    }
}

/// An activation row as int8 sees it.
fn quantised(row: &[f32]) -> (Vec<i64>, f32) {
    let max = row.iter().fold(0.0_f32, |max, v| max.max(v.abs()));
    let inverse = 127.0 / max;
    let codes = row
        .iter()
        .map(|v| (v * inverse).round_ties_even() as i64)
        .collect();
    (codes, max / 127.0)
}

#[test]
fn int8_is_the_exact_sum_of_its_codes() {
    let mut random = Random::new(32);
    for (n, k) in SHAPES {
        let (w, x) = (random.values(n * k), random.values(k));
        let linear = packed(WeightFormat::Int8, &w, n, k, 1);
        let mut y = vec![0.0; n];
        linear.forward(&Pool::new(1), &x, 1, &mut y);
        let (codes, scale) = quantised(&x);
        for (row, y) in w.chunks(k).zip(y) {
            let (weights, weight_scale) = quantised(row);
            let sum: i64 = codes.iter().zip(weights).map(|(a, b)| a * b).sum();
            assert_eq!(y, sum as f32 * (scale * weight_scale));
        }
    }
}

#[test]
fn int8_sums_of_the_most_terms_do_not_overflow() {
    let (n, k) = (16, int8::MAX_TERMS);
    let linear = packed(WeightFormat::Int8, &vec![-1.0; n * k], n, k, 1);
    for sign in [1.0, -1.0] {
        let x = vec![sign; k];
        for &isa in Isa::available() {
            let mut y = vec![0.0; n];
            linear.forward_on(isa, &Pool::new(1), &x, 1, &mut y);
            let scale = 1.0_f32 / 127.0;
            assert_eq!(y, vec![-sign * (127 * 127 * k) as f32 * (scale * scale); n]);
        }
    }
}

#[test]
fn int8_rows_that_are_zero_tiny_or_not_finite() {
    let linear = packed(WeightFormat::Int8, &[0.5; 20 * 6], 20, 6, 1);
    for (first, check) in [
        (0.0, f32::is_finite as fn(f32) -> bool),
        (1e-40, f32::is_finite),
        (f32::NAN, f32::is_nan),
        (f32::INFINITY, f32::is_nan),
    ] {
        for &isa in Isa::available() {
            let mut y = [7.0; 20];
            let x = [first, 0.0, 0.0, 0.0, 0.0, 0.0];
            linear.forward_on(isa, &Pool::new(1), &x, 1, &mut y);
            assert!(y.iter().all(|y| check(*y)), "{first} {isa:?} {y:?}");
        }
    }
}

#[test]
fn int4_is_its_chains_over_groups_and_near_the_weights() {
    let mut random = Random::new(33);
    for (n, k) in SHAPES {
        let (w, x) = (random.values(n * k), random.values(k));
        let linear = packed(WeightFormat::Int4, &w, n, k, 1);
        let mut y = vec![0.0; n];
        linear.forward(&Pool::new(1), &x, 1, &mut y);
        let mut row = vec![0.0; k];
        for (output, y) in y.iter().enumerate() {
            linear.weight_row(output, &mut row);
            let mut exact = 0.0;
            for (stored, weight) in row.iter().zip(&w[output * k..]) {
                // Half a step of the largest scale, 1 / 7; where clipping makes the sum of squares smaller, more.
                assert!((stored - weight).abs() < 0.25, "{stored} {weight}");
            }
            for (stored, x) in row.iter().zip(&x) {
                exact += f64::from(*stored) * f64::from(*x);
            }
            assert!((f64::from(*y) - exact).abs() < 1e-5, "{y} {exact}");
        }
    }
}

#[test]
fn packing_is_the_same_on_every_path() {
    let mut random = Random::new(34);
    for scale in [1.0, 1e-3, 1e-20, 3e38, 0.0] {
        let values: Vec<f32> = random.values(320).iter().map(|v| v * scale).collect();
        for group in values.chunks(int4::GROUP) {
            let run = |isa| {
                let (mut codes, mut scale) = ([0; int4::GROUP], 0);
                // SAFETY: `isa` is available.
                unsafe { int4::quantise_group(isa, group, &mut codes, &mut scale) };
                (codes, scale)
            };
            let run_int8 = |isa| {
                let (mut codes, mut scale) = ([0; int4::GROUP + 3], 0.0);
                // SAFETY: `isa` is available.
                unsafe { int8::quantise_row(isa, group, 0x80, &mut codes, &mut scale) };
                (codes, scale.to_bits())
            };
            for &isa in Isa::available() {
                assert_eq!(run(isa), run(Isa::Scalar));
                assert_eq!(run_int8(isa), run_int8(Isa::Scalar));
                assert!(run(isa).0.iter().all(|code| (-8..8).contains(code)));
            }
        }
    }
}

#[test]
fn an_image_in_shared_memory_serves_like_one_of_its_own() {
    let mut random = Random::new(35);
    let (n, k) = (133, 70);
    let (w, x) = (random.values(n * k), random.values(3 * k));
    let source = |output: usize, row: &mut [f32]| row.copy_from_slice(&w[output * k..][..k]);
    for format in ALL {
        let own = packed(format, &w, n, k, 1);
        let size = PackedLinear::packed_bytes(format, n, k);
        assert_eq!((own.size_bytes(), size % 64), (size, 0));
        let mut memory = Buffer::<u8>::zeroed(128 + size + 64);
        let target = &mut memory[128..128 + size];
        PackedLinear::pack_into(&Pool::new(2), format, n, k, &source, target);
        assert_eq!(
            target,
            &**own.image(),
            "{format:?}: same bytes by 2 threads"
        );
        let owner: SharedMemory = Arc::new(memory);
        let image = Bytes::shared(Arc::clone(&owner), 128, size);
        let shared = PackedLinear::from_bytes(format, n, k, image);
        let (mut a, mut b) = (vec![0.0; 3 * n], vec![1.0; 3 * n]);
        own.forward(&Pool::new(1), &x, 3, &mut a);
        shared.forward(&Pool::new(1), &x, 3, &mut b);
        assert_eq!(bits(&a), bits(&b));
    }
}

#[test]
fn narrow_floats_survive_the_way_through_f32() {
    let mut random = Random::new(36);
    let (n, k) = (50, 40);
    let w = random.values(n * k);
    let brain: Vec<u16> = w.iter().map(|v| f32_to_bf16(*v)).collect();
    let half: Vec<u16> = w.iter().map(|v| f32_to_f16(*v)).collect();
    let slices = [WeightSlice::Bf16(&brain), WeightSlice::F16(&half)];
    for slice in slices {
        let linear = PackedLinear::pack(slice, n, k);
        let (mut got, mut expected) = (vec![0.0; k], vec![0.0; k]);
        for output in 0..n {
            linear.weight_row(output, &mut got);
            slice.row(output, &mut expected);
            assert_eq!(bits(&got), bits(&expected));
        }
    }
}

#[test]
#[should_panic(expected = "image of")]
fn an_image_of_another_size_is_refused() {
    let image = Buffer::<u8>::zeroed(64).into();
    let _ = PackedLinear::from_bytes(WeightFormat::F32, 48, 48, image);
}
