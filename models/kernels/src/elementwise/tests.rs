use super::*;
use crate::testing::Random;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Runs `kernel` into a fresh output on every path and compares with the scalar one.
fn same_on_every_path(outputs: usize, kernel: impl Fn(Isa, &mut [f32])) -> Vec<f32> {
    let run = |isa| {
        let mut y = vec![f32::NAN; outputs];
        kernel(isa, &mut y);
        y
    };
    let expected = run(Isa::Scalar);
    for &isa in Isa::available() {
        assert_eq!(bits(&run(isa)), bits(&expected), "{isa:?}");
    }
    expected
}

#[test]
fn rms_norm_is_right_and_the_same_everywhere() {
    let mut random = Random::new(1);
    for size in [1, 3, 16, 17, 48, 100, 577] {
        let (x, w) = (random.values(5 * size), random.values(size));
        let y = same_on_every_path(x.len(), |isa, y| unsafe {
            rms_norm_isa(isa, &x, &w, 1e-5, y)
        });
        for (x, y) in x.chunks(size).zip(y.chunks(size)) {
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / size as f64;
            for i in 0..size {
                let exact = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
                assert!((f64::from(y[i]) - exact).abs() < 1e-6 * exact.abs().max(1.0));
            }
        }
        for threads in [1, 2] {
            let mut again = vec![0.0; x.len()];
            rms_norm(&Pool::new(threads), &x, &w, 1e-5, &mut again);
            assert_eq!(bits(&again), bits(&y));
        }
    }
}

#[test]
fn silu_mul_is_right_and_the_same_everywhere() {
    let mut random = Random::new(2);
    for n in [1, 15, 16, 33, 70_000] {
        let gate: Vec<f32> = random.values(n).iter().map(|v| v * 30.0).collect();
        let up = random.values(n);
        let y = same_on_every_path(n, |isa, y| unsafe { silu_mul_isa(isa, &gate, &up, y) });
        for i in 0..n {
            let g = f64::from(gate[i]);
            let exact = g / (1.0 + (-g).exp()) * f64::from(up[i]);
            assert!((f64::from(y[i]) - exact).abs() <= 1e-6 * exact.abs().max(1e-6));
        }
        let mut again = vec![0.0; n];
        silu_mul(&Pool::new(2), &gate, &up, &mut again);
        assert_eq!(bits(&again), bits(&y));
    }
    let mut extremes = [0.0; 3];
    silu_mul(
        &Pool::new(1),
        &[-200.0, 200.0, 0.0],
        &[1.0; 3],
        &mut extremes,
    );
    assert_eq!(extremes.map(|v| v + 0.0), [0.0, 200.0, 0.0]);
}

#[test]
fn rotate_keeps_lengths_and_is_the_same_everywhere() {
    let mut random = Random::new(3);
    for (rows, heads, half) in [(1, 1, 1), (3, 5, 7), (2, 3, 32), (4, 2, 16)] {
        let x = random.values(rows * heads * 2 * half);
        let angles = random.values(rows * half);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let y = same_on_every_path(x.len(), |isa, y| {
            y.copy_from_slice(&x);
            let rows = y.chunks_mut(heads * 2 * half);
            for ((y, cos), sin) in rows.zip(cos.chunks(half)).zip(sin.chunks(half)) {
                unsafe { rotate_isa(isa, y, 2 * half, cos, sin) }
            }
        });
        for (i, (before, after)) in x.chunks(2 * half).zip(y.chunks(2 * half)).enumerate() {
            for j in 0..half {
                let length = |h: &[f32]| h[j].hypot(h[j + half]);
                assert!((length(before) - length(after)).abs() < 1e-5);
                let angle = angles[i / heads * half + j];
                assert!(
                    (after[j] - (before[j] * angle.cos() - before[j + half] * angle.sin())).abs()
                        < 1e-6
                );
            }
        }
    }
}

#[test]
fn slices_of_exp_and_add_match_the_scalars() {
    let mut random = Random::new(4);
    let x: Vec<f32> = random
        .values(1000)
        .iter()
        .map(|v| v * 110.0)
        .chain([f32::INFINITY, f32::NEG_INFINITY, 0.0])
        .collect();
    let expected: Vec<f32> = x.iter().map(|v| exp(*v)).collect();
    for &isa in Isa::available() {
        let mut y = x.clone();
        unsafe { exp_isa(isa, &mut y) }
        assert_eq!(bits(&y), bits(&expected), "{isa:?}");
    }
    let mut sum = x[..1000].to_vec();
    add(&x[..1000], &mut sum);
    assert!(sum.iter().zip(&x).all(|(s, v)| *s == v + v));
}

#[test]
fn layer_norm_is_right_and_the_same_everywhere() {
    let mut random = Random::new(5);
    for size in [1, 3, 16, 17, 100, 577] {
        let (x, w, b) = (
            random.values(5 * size),
            random.values(size),
            random.values(size),
        );
        for bias in [None, Some(&b[..])] {
            let y = same_on_every_path(x.len(), |isa, y| unsafe {
                layer_norm_isa(isa, &x, &w, bias, 1e-5, y)
            });
            for (x, y) in x.chunks(size).zip(y.chunks(size)) {
                let of = |f: &dyn Fn(f64) -> f64| {
                    x.iter().map(|v| f(f64::from(*v))).sum::<f64>() / size as f64
                };
                let mean = of(&|v| v);
                let variance = of(&|v| (v - mean).powi(2));
                for i in 0..size {
                    let exact = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt()
                        * f64::from(w[i])
                        + bias.map_or(0.0, |b| f64::from(b[i]));
                    assert!((f64::from(y[i]) - exact).abs() < 4e-6, "{} {exact}", y[i]);
                }
            }
            for threads in [1, 2] {
                let mut again = vec![0.0; x.len()];
                layer_norm(&Pool::new(threads), &x, &w, bias, 1e-5, &mut again);
                assert_eq!(bits(&again), bits(&y));
            }
        }
    }
}

#[test]
fn the_fused_residual_norm_is_an_addition_and_a_norm() {
    let mut random = Random::new(6);
    for (rows, size) in [(1, 1), (3, 17), (70, 576)] {
        let (x, y, w) = (
            random.values(rows * size),
            random.values(rows * size),
            random.values(size),
        );
        let (mut sum, mut norm) = (x.clone(), vec![0.0; x.len()]);
        add(&y, &mut sum);
        rms_norm(&Pool::new(1), &sum, &w, 1e-6, &mut norm);
        for &isa in Isa::available() {
            let (mut x, mut out) = (x.clone(), vec![0.0; x.len()]);
            unsafe { add_rms_norm_isa(isa, &y, &mut x, &w, 1e-6, &mut out) };
            assert_eq!((bits(&x), bits(&out)), (bits(&sum), bits(&norm)), "{isa:?}");
        }
        for threads in [1, 2] {
            let (mut x, mut out) = (x.clone(), vec![0.0; x.len()]);
            add_rms_norm(&Pool::new(threads), &y, &mut x, &w, 1e-6, &mut out);
            assert_eq!((bits(&x), bits(&out)), (bits(&sum), bits(&norm)));
        }
    }
}

#[test]
fn heads_inside_fused_rows_are_normed_and_turned_in_place() {
    let mut random = Random::new(7);
    let (rows, stride, first, heads) = (41, 700, 13, 5);
    for (head_dim, half) in [(2, 1), (20, 10), (64, 32), (64, 8), (96, 24)] {
        let columns = first..first + heads * head_dim;
        let (x, w) = (random.values(rows * stride), random.values(head_dim));
        let (cos, sin) = (random.values(rows * half), random.values(rows * half));
        let mut expected = x.clone();
        for (row, x) in expected.chunks_mut(stride).enumerate() {
            for head in x[columns.clone()].chunks_mut(head_dim) {
                let before = head.to_vec();
                rms_norm(&Pool::new(1), &before, &w, 1e-6, head);
                let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
                rotate(&mut head[..2 * half], 1, cos, sin, half);
            }
        }
        for &isa in Isa::available() {
            let mut got = x.clone();
            for (row, x) in got.chunks_mut(stride).enumerate() {
                let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
                unsafe {
                    rms_norm_in_place_isa(isa, &mut x[columns.clone()], &w, 1e-6);
                    rotate_isa(isa, &mut x[columns.clone()], head_dim, cos, sin);
                }
            }
            assert_eq!(bits(&got), bits(&expected), "{isa:?}");
        }
        for threads in [1, 2] {
            let (pool, mut got) = (Pool::new(threads), x.clone());
            let part = ColumnsMut::of(&mut got, stride, columns.clone());
            rms_norm_heads(&pool, part, &w, 1e-6);
            let part = ColumnsMut::of(&mut got, stride, columns.clone());
            rotate_heads(&pool, part, head_dim, &cos, &sin);
            assert_eq!(bits(&got), bits(&expected), "{threads} threads");
        }
    }
}
