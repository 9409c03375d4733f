//! RMS normalisation, rotary embedding, gated activation, addition: everything of a decoder layer between the products.
//!
//! Invariant: an output element is a function of its own row. Sums over a row run in 16 interleaved chains that are joined in
//! one fixed order, whatever the machine's registers hold. The bodies are plain loops: Rust never reorders or fuses floating-point
//! operations, so the compiler may vectorise them for each instruction set without changing a bit.

use crate::buffer::Pieces;
use crate::isa::{Isa, multiversion};
use crate::lanes::Lanes;
use crate::math::exp;
use crate::pool::Pool;

/// Interleaved chains of a sum over a row.
const CHAINS: usize = 16;
/// Elements below which one thread does the work alone.
const MIN_TASK_ELEMENTS: usize = 1 << 14;

/// Joins the chains: first the halves pairwise, then the quarters, and so on.
#[inline(always)]
pub(crate) fn join(mut sums: [f32; CHAINS]) -> f32 {
    let mut half = CHAINS / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// Sum of squares of a row.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [0.0_f32; CHAINS];
    let (blocks, rest) = x.as_chunks::<CHAINS>();
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum = value.mul_add(*value, *sum);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum = value.mul_add(*value, *sum);
    }
    join(sums)
}

#[inline(always)]
unsafe fn rms_norm_rows<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let size = weight.len();
    for (x, y) in x.chunks_exact(size).zip(y.chunks_exact_mut(size)) {
        let scale = 1.0 / (sum_of_squares(x) / size as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    }
}

#[inline(always)]
unsafe fn silu_mul_body<L: Lanes>(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
        *y = g / (1.0 + exp(-*g)) * u;
    }
}

#[inline(always)]
unsafe fn add_body<L: Lanes>(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

#[inline(always)]
unsafe fn rotate_body<L: Lanes>(
    x: &mut [f32],
    heads: usize,
    cos: &[f32],
    sin: &[f32],
    half: usize,
) {
    for (row, x) in x.chunks_exact_mut(heads * 2 * half).enumerate() {
        let cos = &cos[row * half..][..half];
        let sin = &sin[row * half..][..half];
        for head in x.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}

#[inline(always)]
unsafe fn exp_body<L: Lanes>(values: &mut [f32]) {
    for value in values {
        *value = exp(*value);
    }
}

multiversion! { fn rms_norm_isa(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) => rms_norm_rows }
multiversion! { fn silu_mul_isa(gate: &[f32], up: &[f32], y: &mut [f32]) => silu_mul_body }
multiversion! { fn add_isa(x: &[f32], y: &mut [f32]) => add_body }
multiversion! { fn rotate_isa(x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], half: usize) => rotate_body }
multiversion! { fn exp_isa(values: &mut [f32]) => exp_body }

/// Cuts `rows` rows of `size` elements into ranges of rows, large enough to be worth a task.
fn over_rows(
    pool: &Pool,
    rows: usize,
    size: usize,
    work: &(dyn Fn(std::ops::Range<usize>) + Sync),
) {
    let per_task = MIN_TASK_ELEMENTS
        .div_ceil(size.max(1))
        .max(rows.div_ceil(2 * pool.threads()))
        .max(1);
    pool.run(rows.div_ceil(per_task), &|task| {
        work(task * per_task..((task + 1) * per_task).min(rows))
    });
}

/// `y = x / sqrt(mean(x^2) + eps) * weight` for every row of `weight.len()` elements.
///
/// # Panics
/// If the lengths do not match.
pub fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let size = weight.len();
    assert!(
        x.len() == y.len() && x.len().is_multiple_of(size),
        "rms_norm of {} by {size}",
        x.len()
    );
    let (isa, y) = (Isa::best(), Pieces::new(y));
    over_rows(pool, x.len() / size, size, &|rows| {
        let range = rows.start * size..rows.end * size;
        // SAFETY: row ranges are disjoint; the instruction set was detected.
        unsafe { rms_norm_isa(isa, &x[range.clone()], weight, eps, y.piece(range)) }
    });
}

/// `y = silu(gate) * up`, element by element, `silu(g) = g / (1 + e^-g)`.
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(pool: &Pool, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(
        gate.len() == up.len() && up.len() == y.len(),
        "silu_mul of {}, {}, {}",
        gate.len(),
        up.len(),
        y.len()
    );
    let (isa, y) = (Isa::best(), Pieces::new(y));
    over_rows(pool, gate.len(), 1, &|range| {
        // SAFETY: ranges are disjoint; the instruction set was detected.
        unsafe {
            silu_mul_isa(
                isa,
                &gate[range.clone()],
                &up[range.clone()],
                y.piece(range),
            )
        }
    });
}

/// `y += x`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn add(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "add");
    // SAFETY: the instruction set was detected.
    unsafe { add_isa(Isa::best(), x, y) }
}

/// Rotary embedding in place, "rotate half": `x` is `[rows][heads][2 half]`, `cos` and `sin` are `[rows][half]`; element `i` of a head
/// turns together with element `i + half`.
///
/// # Panics
/// If the lengths do not match.
pub fn rotate(x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], half: usize) {
    assert!(
        half > 0 && heads > 0 && cos.len() == sin.len() && cos.len().is_multiple_of(half),
        "rotate: cos of {}",
        cos.len()
    );
    assert_eq!(x.len(), cos.len() / half * heads * 2 * half, "rotate: x");
    // SAFETY: the instruction set was detected.
    unsafe { rotate_isa(Isa::best(), x, heads, cos, sin, half) }
}

/// [`exp`](crate::exp) of every element, in place; same bits as one by one.
pub fn exp_slice(values: &mut [f32]) {
    // SAFETY: the instruction set was detected.
    unsafe { exp_isa(Isa::best(), values) }
}

#[cfg(test)]
mod tests;
