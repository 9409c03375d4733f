//! Normalisation, rotary embedding, gated activation, addition: everything of a decoder layer between the products.
//!
//! Invariant: an output element is a function of its own row. Sums over a row run in 16 interleaved chains that are joined in
//! one fixed order, whatever the machine's registers hold. The bodies are plain loops: Rust never reorders or fuses floating-point
//! operations, so the compiler may vectorise them for each instruction set without changing a bit.

use crate::buffer::Pieces;
use crate::isa::{Isa, multiversion};
use crate::lanes::Lanes;
use crate::math::exp;
use crate::pool::Pool;
use crate::rows::ColumnsMut;

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

/// Sum over a row; `term(value, sum)` adds to a chain.
#[inline(always)]
fn sum(x: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0_f32; CHAINS];
    let (blocks, rest) = x.as_chunks::<CHAINS>();
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum = term(*value, *sum);
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum = term(*value, *sum);
    }
    join(sums)
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x, |value, sum| value.mul_add(value, sum)) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
unsafe fn rms_norm_rows<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let size = weight.len();
    for (x, y) in x.chunks_exact(size).zip(y.chunks_exact_mut(size)) {
        let scale = rms_scale(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = x * scale * w;
        }
    }
}

#[inline(always)]
unsafe fn rms_norm_in_place<L: Lanes>(x: &mut [f32], weight: &[f32], eps: f32) {
    for x in x.chunks_exact_mut(weight.len()) {
        let scale = rms_scale(x, eps);
        for (x, w) in x.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    }
}

#[inline(always)]
unsafe fn add_rms_norm_rows<L: Lanes>(
    y: &[f32],
    x: &mut [f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let size = weight.len();
    let rows = x.chunks_exact_mut(size).zip(y.chunks_exact(size));
    for ((x, y), out) in rows.zip(out.chunks_exact_mut(size)) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
        let scale = rms_scale(x, eps);
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = *x * scale * w;
        }
    }
}

#[inline(always)]
unsafe fn layer_norm_rows<L: Lanes>(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
) {
    let size = weight.len();
    for (x, y) in x.chunks_exact(size).zip(y.chunks_exact_mut(size)) {
        let mean = sum(x, |value, sum| sum + value) / size as f32;
        let squares = sum(x, |value, sum| (value - mean).mul_add(value - mean, sum));
        let scale = 1.0 / (squares / size as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = (x - mean) * scale * w;
        }
        for (y, bias) in y.iter_mut().zip(bias.unwrap_or(&[])) {
            *y += bias;
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

/// The heads of one row.
#[inline(always)]
unsafe fn rotate_body<L: Lanes>(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let sin = &sin[..half];
    for head in x.chunks_exact_mut(head_dim) {
        let (first, second) = head[..2 * half].split_at_mut(half);
        for i in 0..half {
            let (a, b) = (first[i], second[i]);
            first[i] = a * cos[i] - b * sin[i];
            second[i] = b * cos[i] + a * sin[i];
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
multiversion! { fn rms_norm_in_place_isa(x: &mut [f32], weight: &[f32], eps: f32) => rms_norm_in_place }
multiversion! { fn add_rms_norm_isa(y: &[f32], x: &mut [f32], weight: &[f32], eps: f32, out: &mut [f32]) => add_rms_norm_rows }
multiversion! { fn layer_norm_isa(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, y: &mut [f32]) => layer_norm_rows }
multiversion! { fn rotate_isa(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) => rotate_body }
multiversion! { fn exp_isa(values: &mut [f32]) => exp_body }

/// Cuts `rows` rows of `size` elements into ranges of rows, large enough to be worth a task.
pub(crate) fn over_rows(
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

/// `x += y`, then `out = x / sqrt(mean(x^2) + eps) * weight`: the residual and the norm behind it in one pass over the rows.
///
/// # Panics
/// If the lengths do not match.
pub fn add_rms_norm(
    pool: &Pool,
    y: &[f32],
    x: &mut [f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let size = weight.len();
    assert!(
        x.len() == y.len() && x.len() == out.len() && x.len().is_multiple_of(size),
        "add_rms_norm of {}, {}, {} by {size}",
        y.len(),
        x.len(),
        out.len()
    );
    let (isa, rows) = (Isa::best(), x.len() / size);
    let (x, out) = (Pieces::new(x), Pieces::new(out));
    over_rows(pool, rows, size, &|rows| {
        let range = rows.start * size..rows.end * size;
        // SAFETY: row ranges are disjoint; the instruction set was detected.
        unsafe {
            let (x, out) = (x.piece(range.clone()), out.piece(range.clone()));
            add_rms_norm_isa(isa, &y[range], x, weight, eps, out);
        }
    });
}

/// `y = (x - mean) / sqrt(variance + eps) * weight + bias` for every row of `weight.len()` elements. The mean first, then the variance.
///
/// # Panics
/// If the lengths do not match.
pub fn layer_norm(
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
) {
    let size = weight.len();
    assert!(
        x.len() == y.len()
            && x.len().is_multiple_of(size)
            && bias.is_none_or(|bias| bias.len() == size),
        "layer_norm of {} by {size}",
        x.len()
    );
    let (isa, y) = (Isa::best(), Pieces::new(y));
    over_rows(pool, x.len() / size, size, &|rows| {
        let range = rows.start * size..rows.end * size;
        // SAFETY: row ranges are disjoint; the instruction set was detected.
        unsafe { layer_norm_isa(isa, &x[range.clone()], weight, bias, eps, y.piece(range)) }
    });
}

/// Runs `work(row, its columns)` for every row, several at a time.
fn over_columns(pool: &Pool, x: ColumnsMut<'_>, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let (rows, size, stride, first) = (x.rows(), x.size(), x.stride, x.columns.0);
    let x = Pieces::new(x.values);
    over_rows(pool, rows, size, &|rows| {
        for row in rows {
            let start = row * stride + first;
            // SAFETY: each row is visited once.
            work(row, unsafe { x.piece(start..start + size) });
        }
    });
}

/// [`rms_norm`] in place of every `weight.len()` elements of the columns: of each head of the queries, say.
///
/// # Panics
/// If the columns are no whole number of heads.
pub fn rms_norm_heads(pool: &Pool, x: ColumnsMut<'_>, weight: &[f32], eps: f32) {
    assert!(
        x.size().is_multiple_of(weight.len()),
        "rms_norm_heads: {} columns by {}",
        x.size(),
        weight.len()
    );
    let isa = Isa::best();
    over_columns(pool, x, &|_, x| {
        // SAFETY: the instruction set was detected.
        unsafe { rms_norm_in_place_isa(isa, x, weight, eps) }
    });
}

/// Rotary embedding in place, "rotate half": element `i` of each head turns together with element `i + half`, where `cos` and `sin` are
/// `[rows][half]`; what a head has beyond `2 half` elements stays as it is (partial rotary embedding).
///
/// # Panics
/// If the columns are no whole number of heads, or the lengths do not match.
pub fn rotate_heads(pool: &Pool, x: ColumnsMut<'_>, head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = cos.len() / x.rows().max(1);
    assert!(
        x.size().is_multiple_of(head_dim)
            && 2 * half <= head_dim
            && cos.len() == x.rows() * half
            && sin.len() == cos.len(),
        "rotate_heads: {} rows of {} columns, heads of {head_dim}, cos of {}, sin of {}",
        x.rows(),
        x.size(),
        cos.len(),
        sin.len()
    );
    let isa = Isa::best();
    over_columns(pool, x, &|row, x| {
        let angles = row * half..(row + 1) * half;
        // SAFETY: the instruction set was detected.
        unsafe { rotate_isa(isa, x, head_dim, &cos[angles.clone()], &sin[angles]) }
    });
}

/// [`rotate_heads`] of whole rows and heads by one thread: `x` is `[rows][heads][2 half]`, `cos` and `sin` are `[rows][half]`.
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
    let rows = x.chunks_exact_mut(heads * 2 * half);
    for ((x, cos), sin) in rows.zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)) {
        // SAFETY: the instruction set was detected.
        unsafe { rotate_isa(Isa::best(), x, 2 * half, cos, sin) }
    }
}

/// [`exp`](crate::exp) of every element, in place; same bits as one by one.
pub fn exp_slice(values: &mut [f32]) {
    // SAFETY: the instruction set was detected.
    unsafe { exp_isa(Isa::best(), values) }
}

#[cfg(test)]
mod tests;
