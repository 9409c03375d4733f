//! The one inner loop of all products: `y[m][j] = sum over k of x[m][k] * w[k][j]`.
//!
//! Invariant: each `y[m][j]` is one chain of fused multiply-adds over `k = 0, 1, 2, ...`, starting from `+0.0` (or from the `y` that is
//! there). How many rows and columns are computed side by side therefore cannot change a bit, and a chain may be
//! cut at any `k` and continued later.

use crate::isa::multiversion;
use crate::lanes::{Bf16, F16, Lanes, Weight};

/// Columns come in units of this many: the widest register, and one cache line of `f32`.
pub(crate) const UNIT: usize = 16;

/// How far ahead of its use a weight is fetched, in bytes.
const PREFETCH_BYTES: usize = 3072;

/// What is multiplied: `rows` rows of `x` with stride `x_stride`, `k` terms, `columns` (a multiple of [`UNIT`]) of `w` with stride
/// `w_stride`, into `y` with stride `y_stride`. Strides count elements.
pub(crate) struct Product<W> {
    pub rows: usize,
    pub k: usize,
    pub columns: usize,
    pub x: *const f32,
    pub x_stride: usize,
    pub w: *const W,
    pub w_stride: usize,
    pub y: *mut f32,
    pub y_stride: usize,
    /// Continue the chains that `y` holds.
    pub accumulate: bool,
}

impl<W> Product<W> {
    /// The same with other weights.
    pub fn with<V>(self, w: *const V) -> Product<V> {
        Product {
            rows: self.rows,
            k: self.k,
            columns: self.columns,
            x: self.x,
            x_stride: self.x_stride,
            w,
            w_stride: self.w_stride,
            y: self.y,
            y_stride: self.y_stride,
            accumulate: self.accumulate,
        }
    }
}

// A derive would ask for `W: Clone`.
impl<W> Clone for Product<W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W> Copy for Product<W> {}

/// `R` rows by `V` registers, all accumulators in registers.
#[inline(always)]
unsafe fn tile<L: Lanes, W: Weight, const R: usize, const V: usize>(p: Product<W>) {
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        if p.accumulate {
            for (r, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = L::load(p.y.add(r * p.y_stride + v * L::WIDTH));
                }
            }
        }
        let mut w = p.w;
        for k in 0..p.k {
            let ahead = w.cast::<u8>().wrapping_add(PREFETCH_BYTES);
            let mut line = 0;
            while line < V * L::WIDTH * size_of::<W>() {
                L::prefetch(ahead.wrapping_add(line));
                line += 64;
            }
            let mut weights = [L::splat(0.0); V];
            for (v, weight) in weights.iter_mut().enumerate() {
                *weight = W::load(w.add(v * L::WIDTH));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let x = L::splat(*p.x.add(r * p.x_stride + k));
                for (sum, weight) in row.iter_mut().zip(weights) {
                    *sum = x.fma(weight, *sum);
                }
            }
            w = w.wrapping_add(p.w_stride);
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                sum.store(p.y.add(r * p.y_stride + v * L::WIDTH));
            }
        }
    }
}

/// The part of `p` that starts at a row and a column.
#[inline(always)]
unsafe fn part<W: Weight>(p: Product<W>, row: usize, column: usize) -> Product<W> {
    unsafe {
        Product {
            x: p.x.add(row * p.x_stride),
            w: p.w.add(column),
            y: p.y.add(row * p.y_stride + column),
            ..p
        }
    }
}

/// All rows of `V` registers' columns, at most `limit` rows (1, 2, 6 or 8) at a time.
#[inline(always)]
unsafe fn columns<L: Lanes, W: Weight, const V: usize>(p: Product<W>, column: usize, limit: usize) {
    let mut row = 0;
    while row < p.rows {
        let take = (p.rows - row).min(limit);
        unsafe {
            let here = part(p, row, column);
            match take {
                8 => tile::<L, W, 8, V>(here),
                7 => tile::<L, W, 7, V>(here),
                6 => tile::<L, W, 6, V>(here),
                5 => tile::<L, W, 5, V>(here),
                4 => tile::<L, W, 4, V>(here),
                3 => tile::<L, W, 3, V>(here),
                2 => tile::<L, W, 2, V>(here),
                _ => tile::<L, W, 1, V>(here),
            }
        }
        row += take;
    }
}

/// Computes the product; three units of columns at a time where the registers allow it for this many rows.
#[inline(always)]
unsafe fn product<L: Lanes, W: Weight>(p: Product<W>) {
    let mut column = 0;
    unsafe {
        while column < p.columns {
            let wide =
                p.columns - column >= 3 * UNIT && (L::ROWS_BY_48 == 8 || p.rows <= L::ROWS_BY_48);
            match L::WIDTH {
                // `V` must be a constant: 16 or 48 columns in registers of this width.
                16 if wide => columns::<L, W, 3>(p, column, L::ROWS_BY_48),
                16 => columns::<L, W, 1>(p, column, L::ROWS_BY_16),
                8 if wide => columns::<L, W, 6>(p, column, L::ROWS_BY_48),
                8 => columns::<L, W, 2>(p, column, L::ROWS_BY_16),
                4 if wide => columns::<L, W, 12>(p, column, L::ROWS_BY_48),
                4 => columns::<L, W, 4>(p, column, L::ROWS_BY_16),
                _ => columns::<L, W, 16>(p, column, L::ROWS_BY_16),
            }
            column += if wide { 3 * UNIT } else { UNIT };
        }
    }
}

multiversion! {
    /// Weights as `f32`.
    pub(crate) fn product_f32(p: Product<f32>) => product::<f32>
}
multiversion! {
    /// Weights as bfloat16.
    pub(crate) fn product_bf16(p: Product<Bf16>) => product::<Bf16>
}
multiversion! {
    /// Weights as IEEE half.
    pub(crate) fn product_f16(p: Product<F16>) => product::<F16>
}
