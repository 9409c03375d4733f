//! Weights of four bits: groups of 32 along `k`, one scale per group and output; activations stay `f32`.
//!
//! Invariant: an output is, group by group, one chain of fused multiply-adds over `x[k] * code[k]` from `+0.0`, and then
//! `total = fma(chain, scale, total)`, whatever the instruction set and whether codes were widened before.

use crate::isa::multiversion;
use crate::lanes::{Lanes, bf16_to_f32, f32_to_bf16};
use crate::product::UNIT;

/// Weights that share a scale.
pub(super) const GROUP: usize = 32;
/// Codes in a word.
const OCTET: usize = 8;
const PREFETCH_BYTES: usize = 2048;
/// See `math::exp`: adding it rounds to the nearest integer, ties to even.
const ROUND_MAGIC: f32 = 12_582_912.0;
/// What the largest weight of a group may become; the scale with the smallest squared error wins, the first of equals.
const CANDIDATES: [f32; 7] = [-8.0, -8.5, -9.0, -7.5, 7.0, 7.5, 8.0];

multiversion! {
    /// Codes of -8 ..= 7 and the scale (bf16) of a group. An infinity or NaN makes the scale NaN.
    pub(super) fn quantise_group(group: &[f32], codes: &mut [i32; GROUP], scale: &mut u16) => quantise_body
}

#[inline(always)]
unsafe fn quantise_body<L: Lanes>(group: &[f32], codes: &mut [i32; GROUP], scale: &mut u16) {
    let mut values = [0.0_f32; GROUP];
    values.copy_from_slice(group);
    // The largest magnitude, with its sign; the positive one of equals.
    let (mut high, mut low) = (0.0_f32, 0.0_f32);
    for value in values {
        high = if value > high { value } else { high };
        low = if value < low { value } else { low };
    }
    let largest = if high >= -low { high } else { low };
    let mut best = f32::INFINITY;
    (*scale, *codes) = (0, [0; GROUP]);
    if values.iter().any(|value| !value.is_finite()) {
        *scale = f32_to_bf16(f32::NAN);
        return;
    }
    if largest == 0.0 {
        return;
    }
    for target in CANDIDATES {
        let bits = f32_to_bf16(largest / target);
        let step = bf16_to_f32(bits);
        let inverse = 1.0 / step;
        if !inverse.is_finite() {
            continue;
        }
        let mut trial = [0_i32; GROUP];
        let mut errors = [0.0_f32; GROUP];
        for i in 0..GROUP {
            let code = values[i] * inverse;
            let code = if code > 7.0 { 7.0 } else { code };
            let code = if code < -8.0 { -8.0 } else { code };
            let shifted = code + ROUND_MAGIC;
            let rounded = shifted - ROUND_MAGIC;
            trial[i] = (shifted.to_bits() as i32).wrapping_sub(ROUND_MAGIC.to_bits() as i32);
            let error = (-rounded).mul_add(step, values[i]);
            errors[i] = error * error;
        }
        let mut half = GROUP / 2;
        while half > 0 {
            for i in 0..half {
                errors[i] += errors[i + half];
            }
            half /= 2;
        }
        if errors[0] < best {
            (best, *scale, *codes) = (errors[0], bits, trial);
        }
    }
}

/// One panel's columns and some rows; widths and strides count elements.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub rows: usize,
    pub k: usize,
    pub width: usize,
    pub x: *const f32,
    pub x_stride: usize,
    /// `[k / 8][width]` words.
    pub words: *const u32,
    /// `[k][width]` codes as `f32`, or null: then `words` are used.
    pub wide: *const f32,
    /// `[k / 32][width]`, bf16.
    pub scales: *const u16,
    pub y: *mut f32,
    pub y_stride: usize,
}

/// One term of every chain. (A closure called from two places would not be inlined, and without its registers it is slow.)
#[inline(always)]
unsafe fn step<L: Lanes, const WIDE: bool, const R: usize, const V: usize>(
    job: &Job,
    x: *const f32,
    wide: *const f32,
    words: &mut [L::Words; V],
    sums: &mut [[L; V]; R],
) {
    unsafe {
        let mut weights = [L::splat(0.0); V];
        for (v, weight) in weights.iter_mut().enumerate() {
            if WIDE {
                *weight = L::load(wide.add(v * L::WIDTH));
            } else {
                *weight = L::lowest_code(words[v]);
                words[v] = L::next_code(words[v]);
            }
        }
        for (r, row) in sums.iter_mut().enumerate() {
            let x = L::splat(*x.add(r * job.x_stride));
            for (sum, weight) in row.iter_mut().zip(weights) {
                *sum = x.fma(weight, *sum);
            }
        }
    }
}

/// `R` rows by `V` registers of outputs.
#[inline(always)]
unsafe fn tile<L: Lanes, const WIDE: bool, const R: usize, const V: usize>(
    job: &Job,
    row: usize,
    column: usize,
) {
    unsafe {
        let mut totals = [[L::splat(0.0); V]; R];
        let x = job.x.add(row * job.x_stride);
        for first in (0..job.k).step_by(GROUP) {
            let mut sums = [[L::splat(0.0); V]; R];
            for octet in (first..job.k.min(first + GROUP)).step_by(OCTET) {
                let at = job.words.wrapping_add(octet / OCTET * job.width + column);
                let mut words = [L::words(0); V];
                if !WIDE {
                    let ahead = at.cast::<u8>().wrapping_add(PREFETCH_BYTES);
                    let mut line = 0;
                    while line < V * L::WIDTH * 4 {
                        L::prefetch(ahead.wrapping_add(line));
                        line += 64;
                    }
                    for (v, words) in words.iter_mut().enumerate() {
                        *words = L::load_words(at.add(v * L::WIDTH));
                    }
                }
                let wide = job.wide.wrapping_add(octet * job.width + column);
                if octet + OCTET <= job.k {
                    for k in 0..OCTET {
                        let wide = wide.wrapping_add(k * job.width);
                        step::<L, WIDE, R, V>(job, x.add(octet + k), wide, &mut words, &mut sums);
                    }
                } else {
                    for k in 0..job.k - octet {
                        let wide = wide.wrapping_add(k * job.width);
                        step::<L, WIDE, R, V>(job, x.add(octet + k), wide, &mut words, &mut sums);
                    }
                }
            }
            let scales = job.scales.add(first / GROUP * job.width + column);
            for v in 0..V {
                let scale = L::load_bf16(scales.add(v * L::WIDTH));
                for (totals, sums) in totals.iter_mut().zip(&sums) {
                    totals[v] = sums[v].fma(scale, totals[v]);
                }
            }
        }
        for (r, totals) in totals.iter().enumerate() {
            for (v, total) in totals.iter().enumerate() {
                total.store(job.y.add((row + r) * job.y_stride + column + v * L::WIDTH));
            }
        }
    }
}

#[inline(always)]
unsafe fn columns<L: Lanes, const WIDE: bool, const V: usize>(
    job: &Job,
    column: usize,
    limit: usize,
) {
    let mut row = 0;
    while row < job.rows {
        let take = (job.rows - row).min(limit);
        unsafe {
            match take {
                8 => tile::<L, WIDE, 8, V>(job, row, column),
                7 => tile::<L, WIDE, 7, V>(job, row, column),
                6 => tile::<L, WIDE, 6, V>(job, row, column),
                5 => tile::<L, WIDE, 5, V>(job, row, column),
                4 => tile::<L, WIDE, 4, V>(job, row, column),
                3 => tile::<L, WIDE, 3, V>(job, row, column),
                2 => tile::<L, WIDE, 2, V>(job, row, column),
                _ => tile::<L, WIDE, 1, V>(job, row, column),
            }
        }
        row += take;
    }
}

#[inline(always)]
unsafe fn product<L: Lanes, const WIDE: bool>(job: &Job) {
    let mut column = 0;
    while column < job.width {
        let three = job.width - column >= 3 * UNIT && L::WIDTH == 16;
        // Totals and sums both want registers; what is too much goes to the stack once a group.
        unsafe {
            match L::WIDTH {
                16 if three => columns::<L, WIDE, 3>(job, column, 8),
                16 => columns::<L, WIDE, 1>(job, column, 8),
                8 => columns::<L, WIDE, 2>(job, column, 4),
                4 => columns::<L, WIDE, 4>(job, column, 4),
                _ => columns::<L, WIDE, 16>(job, column, 1),
            }
        }
        column += if three { 3 * UNIT } else { UNIT };
    }
}

#[inline(always)]
unsafe fn product_any<L: Lanes>(job: Job) {
    unsafe {
        if job.wide.is_null() {
            product::<L, false>(&job);
        } else {
            product::<L, true>(&job);
        }
    }
}

/// Codes of `words` as floats, `[k][width]`, for whole octets of `k`.
#[inline(always)]
unsafe fn widen_body<L: Lanes>(words: &[u32], width: usize, wide: &mut [f32]) {
    let lines = words
        .chunks_exact(width)
        .zip(wide.chunks_exact_mut(OCTET * width));
    for (words, wide) in lines {
        for column in (0..width).step_by(L::WIDTH) {
            unsafe {
                let mut words = L::load_words(words.as_ptr().add(column));
                for k in 0..OCTET {
                    L::lowest_code(words).store(wide.as_mut_ptr().add(k * width + column));
                    words = L::next_code(words);
                }
            }
        }
    }
}

multiversion! {
    /// All rows of a panel.
    pub(super) fn product_int4(job: Job) => product_any
}
multiversion! {
    /// Codes as floats.
    pub(super) fn widen_codes(words: &[u32], width: usize, wide: &mut [f32]) => widen_body
}

/// Weight `k` of an output of a panel.
pub(super) fn weight(words: &[u32], scales: &[u16], width: usize, column: usize, k: usize) -> f32 {
    let word = words[k / OCTET * width + column];
    let code = ((word >> (k % OCTET * 4)) as i32) << 28 >> 28;
    code as f32 * bf16_to_f32(scales[k / GROUP * width + column])
}
