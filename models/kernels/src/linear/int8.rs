//! Products of eight-bit integers: `y = (sum over k of q[k] w[k]) * (x_scale * w_scale)`.
//!
//! Invariant: sums of integers are exact in any order, as long as none leaves 32 bits ([`MAX_TERMS`]); quantising a row and scaling a sum are the
//! same few IEEE operations everywhere.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes: there a row is stored as `q + 128`, and `128 * sum of w` is taken off afterwards.

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::PANEL;
use crate::isa::{Isa, multiversion};
use crate::lanes::Lanes;
use crate::product::UNIT;

/// Terms that an output may have: `127 * 127 * MAX_TERMS < 2^31`.
pub(super) const MAX_TERMS: usize = 1 << 17;
const MAX_CODE: f32 = 127.0;
/// Below this, `127 / max` is no finite float, and the row counts as zero.
const MIN_MAX: f32 = 1e-36;
/// See `math::exp`: adding it rounds to the nearest integer, ties to even.
const ROUND_MAGIC: f32 = 12_582_912.0;
const PREFETCH_BYTES: usize = 3072;

multiversion! {
    /// `codes[i] = round(row[i] * (127 / max |row|)) xor flip`, padded with `flip`; `scale = max |row| / 127`. A row with an infinity or NaN gets
    /// the scale NaN, so that all that is computed from it is NaN.
    pub(super) fn quantise_row(row: &[f32], flip: u8, codes: &mut [u8], scale: &mut f32) => quantise_body
}

#[inline(always)]
unsafe fn quantise_body<L: Lanes>(row: &[f32], flip: u8, codes: &mut [u8], scale: &mut f32) {
    // The order of magnitudes is that of their bits, NaN above all.
    let mut tops = [0_u32; UNIT];
    let (blocks, rest) = row.as_chunks::<UNIT>();
    for block in blocks {
        for (top, value) in tops.iter_mut().zip(block) {
            *top = (*top).max(value.to_bits() & 0x7fff_ffff);
        }
    }
    for (top, value) in tops.iter_mut().zip(rest) {
        *top = (*top).max(value.to_bits() & 0x7fff_ffff);
    }
    let max = f32::from_bits(tops.into_iter().fold(0, u32::max));
    let (codes, padding) = codes.split_at_mut(row.len());
    padding.fill(flip);
    if !max.is_finite() || max < MIN_MAX {
        codes.fill(flip);
        *scale = if max.is_finite() { 0.0 } else { f32::NAN };
        return;
    }
    let inverse = MAX_CODE / max;
    for (code, value) in codes.iter_mut().zip(row) {
        *code = (value * inverse + ROUND_MAGIC).to_bits() as u8 ^ flip;
    }
    *scale = max / MAX_CODE;
}

/// What a row's codes are xored with for a kernel on this instruction set.
pub(super) fn flip(isa: Isa) -> u8 {
    if unsigned_rows(isa) { 0x80 } else { 0 }
}

/// Whether the kernel wants `q + 128`.
fn unsigned_rows(isa: Isa) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        isa == Isa::Avx512 && is_x86_feature_detected!("avx512vnni")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        false
    }
}

/// One panel and all rows.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    /// `[rows][padded k]`, quantised with [`flip`].
    pub codes: &'a [u8],
    pub row_scales: &'a [f32],
    /// Padded to a multiple of 4.
    pub k: usize,
    /// `[k / 4][width][4]`.
    pub weights: &'a [u8],
    pub scales: &'a [f32],
    pub sums: &'a [i32],
    /// Outputs that exist.
    pub valid: usize,
    pub y: *mut f32,
    pub y_stride: usize,
}

/// Sums of products of `COLUMNS` outputs, four terms at a time.
trait Dot {
    const COLUMNS: usize;
    /// Rows at once for 48 outputs; 0 if 16 outputs at a time are all that fits.
    const ROWS_BY_48: usize;
    const ROWS_BY_16: usize;
    const OFFSET: i32;
    type Sum: Copy;
    type Weights: Copy;
    type Codes: Copy;
    unsafe fn zero() -> Self::Sum;
    unsafe fn weights(p: *const u8) -> Self::Weights;
    unsafe fn codes(p: *const u8) -> Self::Codes;
    unsafe fn add(sum: Self::Sum, codes: Self::Codes, weights: Self::Weights) -> Self::Sum;
    unsafe fn store(sum: Self::Sum, p: *mut i32);
    unsafe fn prefetch(p: *const u8);
}

struct Scalar;

impl Dot for Scalar {
    const COLUMNS: usize = 1;
    const ROWS_BY_48: usize = 0;
    const ROWS_BY_16: usize = 1;
    const OFFSET: i32 = 0;
    type Sum = i32;
    type Weights = [i8; 4];
    type Codes = [i8; 4];
    #[inline(always)]
    unsafe fn zero() -> i32 {
        0
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> [i8; 4] {
        unsafe { *p.cast() }
    }
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> [i8; 4] {
        unsafe { *p.cast() }
    }
    #[inline(always)]
    unsafe fn add(sum: i32, codes: [i8; 4], weights: [i8; 4]) -> i32 {
        codes.iter().zip(weights).fold(sum, |sum, (code, weight)| {
            sum.wrapping_add(i32::from(*code) * i32::from(weight))
        })
    }
    #[inline(always)]
    unsafe fn store(sum: i32, p: *mut i32) {
        unsafe { *p = sum }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
struct Vnni;

#[cfg(target_arch = "x86_64")]
impl Dot for Vnni {
    const COLUMNS: usize = 16;
    const ROWS_BY_48: usize = 8;
    const ROWS_BY_16: usize = 8;
    const OFFSET: i32 = 128;
    type Sum = __m512i;
    type Weights = __m512i;
    type Codes = __m512i;
    #[inline(always)]
    unsafe fn zero() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> __m512i {
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn add(sum: __m512i, codes: __m512i, weights: __m512i) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, codes, weights) }
    }
    #[inline(always)]
    unsafe fn store(sum: __m512i, p: *mut i32) {
        unsafe { _mm512_storeu_si512(p.cast(), sum) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// `|q|` times `w` with the sign of `q`: a pair of products is at most `2 * 127 * 127 < 2^15`, so that `vpmaddubsw` does not saturate.
#[cfg(target_arch = "x86_64")]
struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Dot for Avx2 {
    const COLUMNS: usize = 8;
    const ROWS_BY_48: usize = 1;
    const ROWS_BY_16: usize = 4;
    const OFFSET: i32 = 0;
    type Sum = __m256i;
    type Weights = __m256i;
    type Codes = (__m256i, __m256i);
    #[inline(always)]
    unsafe fn zero() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> (__m256i, __m256i) {
        unsafe {
            let codes = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
            (_mm256_abs_epi8(codes), codes)
        }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256i, codes: (__m256i, __m256i), weights: __m256i) -> __m256i {
        unsafe {
            let pairs = _mm256_maddubs_epi16(codes.0, _mm256_sign_epi8(weights, codes.1));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn store(sum: __m256i, p: *mut i32) {
        unsafe { _mm256_storeu_si256(p.cast(), sum) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

#[cfg(target_arch = "aarch64")]
struct Neon;

#[cfg(target_arch = "aarch64")]
impl Dot for Neon {
    const COLUMNS: usize = 4;
    const ROWS_BY_48: usize = 1;
    const ROWS_BY_16: usize = 3;
    const OFFSET: i32 = 0;
    /// Two partial sums of each output.
    type Sum = (int32x4_t, int32x4_t);
    type Weights = int8x16_t;
    type Codes = int8x16_t;
    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        unsafe { (vdupq_n_s32(0), vdupq_n_s32(0)) }
    }
    #[inline(always)]
    unsafe fn weights(p: *const u8) -> int8x16_t {
        unsafe { vld1q_s8(p.cast()) }
    }
    #[inline(always)]
    unsafe fn codes(p: *const u8) -> int8x16_t {
        unsafe { vreinterpretq_s8_s32(vdupq_n_s32(p.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn add(sum: Self::Sum, codes: int8x16_t, weights: int8x16_t) -> Self::Sum {
        unsafe {
            let low = vmull_s8(vget_low_s8(codes), vget_low_s8(weights));
            let high = vmull_high_s8(codes, weights);
            (vpadalq_s16(sum.0, low), vpadalq_s16(sum.1, high))
        }
    }
    #[inline(always)]
    unsafe fn store(sum: Self::Sum, p: *mut i32) {
        unsafe { vst1q_s32(p, vpaddq_s32(sum.0, sum.1)) }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

/// `R` rows by `V` registers of outputs.
#[inline(always)]
unsafe fn tile<D: Dot, const R: usize, const V: usize>(job: &Job<'_>, row: usize, column: usize) {
    unsafe {
        let width = job.scales.len();
        let mut sums = [[D::zero(); V]; R];
        let mut weights_at = job.weights.as_ptr().wrapping_add(column * 4);
        let mut codes_at = job.codes.as_ptr().wrapping_add(row * job.k);
        for _ in 0..job.k / 4 {
            let ahead = weights_at.wrapping_add(PREFETCH_BYTES);
            let mut line = 0;
            while line < V * D::COLUMNS * 4 {
                D::prefetch(ahead.wrapping_add(line));
                line += 64;
            }
            let mut weights = [D::weights(weights_at); V];
            for (v, weights) in weights.iter_mut().enumerate().skip(1) {
                *weights = D::weights(weights_at.wrapping_add(v * D::COLUMNS * 4));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let codes = D::codes(codes_at.wrapping_add(r * job.k));
                for (sum, weights) in row.iter_mut().zip(weights) {
                    *sum = D::add(*sum, codes, weights);
                }
            }
            weights_at = weights_at.wrapping_add(width * 4);
            codes_at = codes_at.wrapping_add(4);
        }
        let columns = V * D::COLUMNS;
        let valid = columns.min(job.valid.saturating_sub(column));
        let (scales, offsets) = (
            &job.scales[column..][..columns],
            &job.sums[column..][..columns],
        );
        for (r, sums) in sums.iter().enumerate() {
            let mut totals = [0_i32; PANEL];
            for (v, sum) in sums.iter().enumerate() {
                D::store(*sum, totals.as_mut_ptr().add(v * D::COLUMNS));
            }
            let mut results = [0.0_f32; PANEL];
            let row_scale = job.row_scales[row + r];
            for i in 0..columns {
                let total = totals[i].wrapping_sub(offsets[i].wrapping_mul(D::OFFSET));
                results[i] = total as f32 * (row_scale * scales[i]);
            }
            let y = job.y.add((row + r) * job.y_stride + column);
            y.copy_from_nonoverlapping(results.as_ptr(), valid);
        }
    }
}

/// All rows of `V` registers' outputs.
#[inline(always)]
unsafe fn columns<D: Dot, const V: usize>(job: &Job<'_>, column: usize, limit: usize) {
    let (rows, mut row) = (job.row_scales.len(), 0);
    while row < rows {
        let take = (rows - row).min(limit);
        unsafe {
            match take {
                8 => tile::<D, 8, V>(job, row, column),
                7 => tile::<D, 7, V>(job, row, column),
                6 => tile::<D, 6, V>(job, row, column),
                5 => tile::<D, 5, V>(job, row, column),
                4 => tile::<D, 4, V>(job, row, column),
                3 => tile::<D, 3, V>(job, row, column),
                2 => tile::<D, 2, V>(job, row, column),
                _ => tile::<D, 1, V>(job, row, column),
            }
        }
        row += take;
    }
}

#[inline(always)]
unsafe fn product<D: Dot>(job: Job<'_>) {
    let width = job.scales.len();
    let wide = width == PANEL && (D::ROWS_BY_48 == 8 || job.row_scales.len() <= D::ROWS_BY_48);
    for column in (0..width).step_by(if wide { PANEL } else { UNIT }) {
        unsafe {
            match (D::COLUMNS, wide) {
                (16, true) => columns::<D, 3>(&job, column, D::ROWS_BY_48),
                (16, false) => columns::<D, 1>(&job, column, D::ROWS_BY_16),
                (8, true) => columns::<D, 6>(&job, column, D::ROWS_BY_48),
                (8, false) => columns::<D, 2>(&job, column, D::ROWS_BY_16),
                (4, true) => columns::<D, 12>(&job, column, D::ROWS_BY_48),
                (4, false) => columns::<D, 4>(&job, column, D::ROWS_BY_16),
                _ => columns::<D, 16>(&job, column, D::ROWS_BY_16),
            }
        }
    }
}

/// # Safety
/// `isa` is there, all lengths of `job` match, and nobody else uses its outputs.
pub(super) unsafe fn product_int8(isa: Isa, job: Job<'_>) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
    unsafe fn vnni(job: Job<'_>) {
        unsafe { product::<Vnni>(job) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2(job: Job<'_>) {
        unsafe { product::<Avx2>(job) }
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if unsigned_rows(isa) => unsafe { vnni(job) },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => unsafe { avx2(job) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { product::<Neon>(job) },
        _ => unsafe { product::<Scalar>(job) },
    }
}
