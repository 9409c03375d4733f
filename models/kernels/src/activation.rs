//! Activations and gates.
//!
//! Invariant: each element by itself, by straight-line IEEE operations ([`math`](crate::math)).

use crate::buffer::Pieces;
use crate::elementwise::over_rows;
use crate::isa::{Isa, multiversion};
use crate::lanes::Lanes;
use crate::math::{exp, gelu_erf, gelu_tanh, tanh};
use crate::pool::Pool;

/// A function of one element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
    GeluTanh,
    /// `x (1 + erf(x / sqrt(2))) / 2`.
    GeluErf,
    /// `max(x, 0)`.
    Relu,
    /// `tanh(x)`.
    Tanh,
    /// `cap tanh(x / cap)`.
    SoftCap(f32),
}

#[inline(always)]
fn map(values: &mut [f32], function: impl Fn(f32) -> f32) {
    for value in values {
        *value = function(*value);
    }
}

#[inline(always)]
fn gate(gates: &[f32], ups: &[f32], y: &mut [f32], function: impl Fn(f32) -> f32) {
    for ((y, gate), up) in y.iter_mut().zip(gates).zip(ups) {
        *y = function(*gate) * up;
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
fn relu(x: f32) -> f32 {
    // This way round, NaN stays NaN.
    if x < 0.0 { 0.0 } else { x }
}

/// `cap tanh(x / cap)`.
#[inline(always)]
#[must_use]
pub fn soft_cap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

#[inline(always)]
unsafe fn activate_body<L: Lanes>(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::Silu => map(values, silu),
        Activation::GeluTanh => map(values, gelu_tanh),
        Activation::GeluErf => map(values, gelu_erf),
        Activation::Relu => map(values, relu),
        Activation::Tanh => map(values, tanh),
        Activation::SoftCap(cap) => map(values, |x| soft_cap(x, cap)),
    }
}

#[inline(always)]
unsafe fn gated_body<L: Lanes>(
    activation: Activation,
    gate_up: &[f32],
    y: &mut [f32],
    inner: usize,
) {
    for (gate_up, y) in gate_up
        .chunks_exact(2 * inner)
        .zip(y.chunks_exact_mut(inner))
    {
        let (gates, ups) = gate_up.split_at(inner);
        match activation {
            Activation::Silu => gate(gates, ups, y, silu),
            Activation::GeluTanh => gate(gates, ups, y, gelu_tanh),
            Activation::GeluErf => gate(gates, ups, y, gelu_erf),
            Activation::Relu => gate(gates, ups, y, relu),
            Activation::Tanh => gate(gates, ups, y, tanh),
            Activation::SoftCap(cap) => gate(gates, ups, y, |x| soft_cap(x, cap)),
        }
    }
}

multiversion! { fn activate_isa(activation: Activation, values: &mut [f32]) => activate_body }
multiversion! { fn gated_isa(activation: Activation, gate_up: &[f32], y: &mut [f32], inner: usize) => gated_body }

/// Applies `activation` to every element, in place.
pub fn activate(pool: &Pool, activation: Activation, values: &mut [f32]) {
    let (isa, len, values) = (Isa::best(), values.len(), Pieces::new(values));
    over_rows(pool, len, 1, &|range| {
        // SAFETY: ranges are disjoint; the instruction set was detected.
        unsafe { activate_isa(isa, activation, values.piece(range)) }
    });
}

/// `y [rows][inner] = activation(gate) * up`, where a row of `gate_up` is `inner` gates, then `inner` ups: what one fused product gives.
///
/// # Panics
/// If the lengths do not match.
pub fn gated(pool: &Pool, activation: Activation, gate_up: &[f32], inner: usize, y: &mut [f32]) {
    assert!(
        inner > 0 && y.len().is_multiple_of(inner) && gate_up.len() == 2 * y.len(),
        "gated: {} by {inner} from {}",
        y.len(),
        gate_up.len()
    );
    let (isa, rows, y) = (Isa::best(), y.len() / inner, Pieces::new(y));
    over_rows(pool, rows, inner, &|rows| {
        let gate_up = &gate_up[rows.start * 2 * inner..rows.end * 2 * inner];
        // SAFETY: ranges are disjoint; the instruction set was detected.
        unsafe {
            let y = y.piece(rows.start * inner..rows.end * inner);
            gated_isa(isa, activation, gate_up, y, inner);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    const ALL: [Activation; 6] = [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::GeluErf,
        Activation::Relu,
        Activation::Tanh,
        Activation::SoftCap(30.0),
    ];

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn activations_and_gates_are_the_same_on_every_path_and_thread_count() {
        let mut random = Random::new(41);
        for (rows, inner) in [(1, 1), (3, 17), (2, 64), (9, 5000)] {
            let x: Vec<f32> = random
                .values(rows * 2 * inner)
                .iter()
                .map(|x| x * 20.0)
                .collect();
            for activation in ALL {
                let mut expected = x.clone();
                // SAFETY: the scalar path is everywhere.
                unsafe { activate_isa(Isa::Scalar, activation, &mut expected) };
                for &isa in Isa::available() {
                    let mut got = x.clone();
                    // SAFETY: `isa` is available.
                    unsafe { activate_isa(isa, activation, &mut got) };
                    assert_eq!(bits(&got), bits(&expected), "{activation:?} {isa:?}");
                }
                let gates: Vec<f32> = x
                    .chunks(2 * inner)
                    .zip(expected.chunks(2 * inner))
                    .flat_map(|(x, a)| {
                        (0..inner)
                            .map(|i| a[i] * x[inner + i])
                            .collect::<Vec<f32>>()
                    })
                    .collect();
                for threads in [1, 2] {
                    let pool = Pool::new(threads);
                    let (mut all, mut y) = (x.clone(), vec![0.0; rows * inner]);
                    activate(&pool, activation, &mut all);
                    assert_eq!(bits(&all), bits(&expected));
                    gated(&pool, activation, &x, inner, &mut y);
                    assert_eq!(bits(&y), bits(&gates), "{activation:?}");
                }
            }
        }
    }

    #[test]
    fn special_values() {
        for (activation, x, y) in [
            (Activation::Silu, -200.0, 0.0),
            (Activation::GeluTanh, 50.0, 50.0),
            (Activation::GeluTanh, -50.0, 0.0),
            (Activation::GeluErf, 50.0, 50.0),
            (Activation::GeluErf, -50.0, 0.0),
            (Activation::Relu, -1.0, 0.0),
            (Activation::SoftCap(30.0), 1e30, 30.0),
            (Activation::SoftCap(30.0), f32::NEG_INFINITY, -30.0),
        ] {
            let mut values = [x, f32::NAN];
            activate(&Pool::new(1), activation, &mut values);
            assert!(
                values[0] == y && values[1].is_nan(),
                "{activation:?} {values:?}"
            );
        }
    }
}
