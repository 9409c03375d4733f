//! A vector register of floats, per instruction set, and the three widths in which weights are stored.
//!
//! Invariant: each operation acts on each lane by itself and rounds once, so that the number of lanes cannot change a result.
//! Everything is `#[inline(always)]`: the bodies must end up inside a function that enables the instruction set
//! (see [`multiversion`](crate::isa)).

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A register of `WIDTH` floats. All functions are unsafe: the instruction set must be there, pointers valid for `WIDTH` elements.
pub(crate) trait Lanes: Copy {
    const WIDTH: usize;
    /// Up to this many rows at once in the product of three 16-column units, as registers allow.
    const ROWS_BY_48: usize;
    /// The same for one 16-column unit.
    const ROWS_BY_16: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn load_bf16(p: *const u16) -> Self;
    unsafe fn load_f16(p: *const u16) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// A hint; never faults, so any address is allowed.
    unsafe fn prefetch(p: *const u8);
    /// `WIDTH` words of eight signed four-bit codes each, lowest bits first.
    type Words: Copy;
    /// The same word in every lane.
    unsafe fn words(word: u32) -> Self::Words;
    unsafe fn load_words(p: *const u32) -> Self::Words;
    /// The lowest codes as floats.
    unsafe fn lowest_code(words: Self::Words) -> Self;
    /// The words without their lowest codes.
    unsafe fn next_code(words: Self::Words) -> Self::Words;
}

/// How a weight is stored. The arithmetic is always `f32`: widening is exact.
pub(crate) trait Weight: Copy {
    unsafe fn load<L: Lanes>(p: *const Self) -> L;
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const f32) -> L {
        unsafe { L::load(p) }
    }
}

/// The upper half of an `f32`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(pub u16);

impl Weight for Bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Bf16) -> L {
        unsafe { L::load_bf16(p.cast()) }
    }
}

/// IEEE half precision.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct F16(pub u16);

impl Weight for F16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const F16) -> L {
        unsafe { L::load_f16(p.cast()) }
    }
}

/// Exact widening of a bfloat16 bit pattern.
#[inline(always)]
#[must_use]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Exact widening of an IEEE half bit pattern.
#[inline(always)]
#[must_use]
pub fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let sign = u32::from(bits & 0x8000) << 16;
    // Exponent and mantissa moved into place and rescaled by 2^112: exact for normals and subnormals alike.
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
    let value = if magnitude >= 0x7c00 {
        (magnitude << 13) | 0x7f80_0000
    } else {
        scaled.to_bits()
    };
    f32::from_bits(value | sign)
}

/// Rounds to the nearest bfloat16, ties to even. NaN stays NaN.
#[must_use]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return ((bits >> 16) | 0x40) as u16;
    }
    let rounding = 0x7fff + ((bits >> 16) & 1);
    (bits.wrapping_add(rounding) >> 16) as u16
}

/// Rounds to the nearest IEEE half, ties to even; overflow gives infinity. NaN stays NaN.
#[must_use]
pub fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = f32::from_bits(bits & 0x7fff_ffff);
    if x.is_nan() {
        return sign | 0x7e00;
    }
    if magnitude >= 65_520.0 {
        return sign | 0x7c00;
    }
    if magnitude < 6.103_515_6e-5 {
        // Adding 1/2 leaves the subnormal half's mantissa, rounded by the addition itself, in the low bits.
        return sign | (magnitude + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits()) as u16;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0xfff + ((bits >> 13) & 1);
    sign | ((rounded - (112 << 23)) >> 13) as u16
}

/// The reference: one float.
#[derive(Clone, Copy)]
pub(crate) struct Scalar(f32);

impl Lanes for Scalar {
    const WIDTH: usize = 1;
    const ROWS_BY_48: usize = 0;
    const ROWS_BY_16: usize = 1;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { *p })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(bf16_to_f32(unsafe { *p }))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(f16_to_f32(unsafe { *p }))
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(self.0.mul_add(b.0, c.0))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { *p = self.0 }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    type Words = u32;
    #[inline(always)]
    unsafe fn words(word: u32) -> u32 {
        word
    }
    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> u32 {
        unsafe { *p }
    }
    #[inline(always)]
    unsafe fn lowest_code(words: u32) -> Self {
        Self(((words << 28) as i32 >> 28) as f32)
    }
    #[inline(always)]
    unsafe fn next_code(words: u32) -> u32 {
        words >> 4
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    const WIDTH: usize = 16;
    const ROWS_BY_48: usize = 8;
    const ROWS_BY_16: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(
                _mm256_loadu_si256(p.cast()),
            )))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    type Words = __m512i;
    #[inline(always)]
    unsafe fn words(word: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(word as i32) }
    }
    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn lowest_code(words: __m512i) -> Self {
        // The permutation looks at the lowest four bits only.
        Self(unsafe {
            let codes = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0,
                -1.0,
            );
            _mm512_permutexvar_ps(words, codes)
        })
    }
    #[inline(always)]
    unsafe fn next_code(words: __m512i) -> __m512i {
        unsafe { _mm512_srli_epi32::<4>(words) }
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    const WIDTH: usize = 8;
    const ROWS_BY_48: usize = 2;
    const ROWS_BY_16: usize = 6;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
                _mm_loadu_si128(p.cast()),
            )))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    type Words = __m256i;
    #[inline(always)]
    unsafe fn words(word: u32) -> __m256i {
        unsafe { _mm256_set1_epi32(word as i32) }
    }
    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn lowest_code(words: __m256i) -> Self {
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<28>(words))) })
    }
    #[inline(always)]
    unsafe fn next_code(words: __m256i) -> __m256i {
        unsafe { _mm256_srli_epi32::<4>(words) }
    }
}

#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy)]
pub(crate) struct Neon(float32x4_t);

#[cfg(target_arch = "aarch64")]
impl Lanes for Neon {
    const WIDTH: usize = 4;
    const ROWS_BY_48: usize = 2;
    const ROWS_BY_16: usize = 6;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(unsafe { vld1q_f32(p) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p))) })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // The half-precision intrinsics are not stable in Rust; four exact widenings cost little beside the products.
        let wide = unsafe {
            [
                f16_to_f32(*p),
                f16_to_f32(*p.add(1)),
                f16_to_f32(*p.add(2)),
                f16_to_f32(*p.add(3)),
            ]
        };
        Self(unsafe { vld1q_f32(wide.as_ptr()) })
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(unsafe { vfmaq_f32(c.0, self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { vst1q_f32(p, self.0) }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    type Words = uint32x4_t;
    #[inline(always)]
    unsafe fn words(word: u32) -> uint32x4_t {
        unsafe { vdupq_n_u32(word) }
    }
    #[inline(always)]
    unsafe fn load_words(p: *const u32) -> uint32x4_t {
        unsafe { vld1q_u32(p) }
    }
    #[inline(always)]
    unsafe fn lowest_code(words: uint32x4_t) -> Self {
        Self(unsafe {
            let signed = vreinterpretq_s32_u32(vshlq_n_u32::<28>(words));
            vcvtq_f32_s32(vshrq_n_s32::<28>(signed))
        })
    }
    #[inline(always)]
    unsafe fn next_code(words: uint32x4_t) -> uint32x4_t {
        unsafe { vshrq_n_u32::<4>(words) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let wide = f16_to_f32(bits);
            if wide.is_nan() {
                assert!(f16_to_f32(f32_to_f16(wide)).is_nan());
            } else {
                assert_eq!(f32_to_f16(wide), bits, "{bits:#06x} -> {wide}");
            }
        }
        assert_eq!(f16_to_f32(0x3c00), 1.0);
        assert_eq!(f16_to_f32(0x0001), 5.960_464_5e-8);
        assert_eq!(f16_to_f32(0xfbff), -65504.0);
    }

    #[test]
    fn every_bf16_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let wide = bf16_to_f32(bits);
            assert!(wide.is_nan() || f32_to_bf16(wide) == bits);
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even() {
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(f32_to_f16(f32::from_bits(0x3f80_1000)), 0x3c00);
        assert_eq!(f32_to_f16(f32::from_bits(0x3f80_3000)), 0x3c02);
        assert_eq!(f32_to_f16(65_519.9), 0x7bff);
        assert_eq!(f32_to_f16(65_520.0), 0x7c00);
        assert_eq!(f32_to_f16(2.980_232_2e-8), 0x0000);
        assert_eq!(f32_to_f16(2.980_233e-8), 0x0001);
    }
}
