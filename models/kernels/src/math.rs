//! `exp` and `ln` of our own, so that a probability has the same bits on every CPU and with every libm.
//!
//! Invariant: both are straight-line code over IEEE operations (add, multiply, divide, fused multiply-add, integer shifts), with no
//! table and no branch on the finite path. The compiler may vectorise them, but it may not change a bit.
//! Error, over all finite inputs: `exp` at most 1 ulp (1.5 for subnormal results), `ln` at most 1 ulp; see the tests.

/// `1.5 * 2^23`: adding it rounds a small float to the nearest integer (ties to even) and leaves that integer in the low mantissa bits.
const ROUND_MAGIC: f32 = 12_582_912.0;
/// The high part of ln 2 has few enough bits that its product with any exponent is exact.
const LN2_HI: f32 = f32::from_bits(0x3f31_7180);
/// `ln 2 - LN2_HI`.
const LN2_LO: f32 = f32::from_bits(0x3717_f7d1);

/// `e^x`. Overflow gives infinity above 88.722839, underflow goes through the subnormals to 0 below -103.97; NaN stays NaN.
///
/// Cody-Waite reduction to `|r| <= ln 2 / 2`, then a minimax polynomial of degree 7 (coefficients as in the Cephes library's `expf`).
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    // Outside this interval the result is 0 or infinity anyway; the comparison form lets NaN through.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.5 { -104.5 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND_MAGIC);
    let n = shifted - ROUND_MAGIC;
    let r = n.mul_add(-LN2_HI, x);
    let r = n.mul_add(-LN2_LO, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors: n reaches from -151 to 128, one exponent field does not. The first product is exact.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND_MAGIC.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `2^n` for a normal result, `-126 <= n <= 127`; any other `n` gives some float, never a panic.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Natural logarithm. `ln(0)` is minus infinity, of a negative number NaN, of infinity infinity; NaN stays NaN.
///
/// `x = 2^k m` with `m` in `[sqrt(1/2), sqrt(2))`, then the odd series in `s = f / (2 + f)`, `f = m - 1` (FreeBSD's `logf`).
#[inline(always)]
#[must_use]
pub fn ln(x: f32) -> f32 {
    if x.is_nan() || x < 0.0 {
        return f32::NAN;
    }
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x == f32::INFINITY {
        return x;
    }
    // Subnormals are brought into the normal range first, exactly.
    let (x, bias) = if x < f32::MIN_POSITIVE {
        (x * 33_554_432.0, -25)
    } else {
        (x, 0)
    };
    let offset = x
        .to_bits()
        .wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits());
    let k = (offset as i32) >> 23;
    let f = f32::from_bits(
        (offset & 0x007f_ffff).wrapping_add(std::f32::consts::FRAC_1_SQRT_2.to_bits()),
    ) - 1.0;
    let k = (k + bias) as f32;
    let s = f / (2.0 + f);
    let z = s * s;
    let w = z * z;
    let t1 = w * 0.242_790_79_f32.mul_add(w, 0.400_009_72);
    let t2 = z * 0.284_987_87_f32.mul_add(w, 0.666_666_6);
    let half_square = 0.5 * f * f;
    let tail = k.mul_add(LN2_LO, s * (half_square + (t1 + t2)));
    k.mul_add(LN2_HI, tail - half_square + f)
}

/// Below this magnitude `1 - 2 / (e^2x + 1)` loses digits, and a polynomial does better.
const TANH_SMALL: f32 = 0.625;

/// Hyperbolic tangent, within 3 units of the last place; NaN stays NaN. Both halves are computed and one is taken, without a branch.
///
/// The polynomial is that of the Cephes library's `tanhf`.
#[inline(always)]
#[must_use]
pub fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let large = 1.0 - 2.0 / (exp(magnitude + magnitude) + 1.0);
    let z = x * x;
    let p = -5.704_988_7e-3_f32;
    let p = p.mul_add(z, 2.063_908_8e-2);
    let p = p.mul_add(z, -5.373_971_6e-2);
    let p = p.mul_add(z, 1.333_144_2e-1);
    let p = p.mul_add(z, -3.333_328e-1);
    let small = (p * z).mul_add(magnitude, magnitude);
    let value = if magnitude < TANH_SMALL { small } else { large };
    value.copysign(x)
}

/// Error function, within 5e-7; NaN stays NaN. Abramowitz and Stegun, 7.1.26.
#[inline(always)]
#[must_use]
pub fn erf(x: f32) -> f32 {
    let magnitude = x.abs();
    let t = 1.0 / 0.327_591_1_f32.mul_add(magnitude, 1.0);
    let p = 1.061_405_4_f32;
    let p = p.mul_add(t, -1.453_152_1);
    let p = p.mul_add(t, 1.421_413_8);
    let p = p.mul_add(t, -0.284_496_72);
    let p = p.mul_add(t, 0.254_829_6);
    let value = (-p * t).mul_add(exp(-(magnitude * magnitude)), 1.0);
    value.copysign(x)
}

/// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
#[inline(always)]
#[must_use]
pub fn gelu_tanh(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let cubic = (0.044_715 * x * x).mul_add(x, x);
    0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * cubic))
}

/// `x (1 + erf(x / sqrt(2))) / 2`.
#[inline(always)]
#[must_use]
pub fn gelu_erf(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance of `got` from the exact value, in units of the last place of the exact value's float.
    fn ulps(got: f32, exact: f64) -> f64 {
        let near = exact as f32;
        let ulp =
            (f64::from(f32::from_bits(near.abs().to_bits() + 1)) - f64::from(near.abs())).abs();
        (f64::from(got) - exact).abs() / ulp
    }

    /// Every `stride`-th float bit pattern; a prime stride visits all exponents and unrelated mantissas.
    fn floats(stride: usize) -> impl Iterator<Item = f32> {
        (0..=u32::MAX).step_by(stride).map(f32::from_bits)
    }

    #[test]
    fn exp_is_within_two_ulps_everywhere() {
        let mut worst = (0.0, 0.0);
        for x in floats(1009).filter(|x| (-103.9..88.72).contains(x)) {
            let error = ulps(exp(x), f64::from(x).exp());
            if error > worst.0 {
                worst = (error, x);
            }
        }
        println!("exp: worst {} ulp at {}", worst.0, worst.1);
        assert!(worst.0 <= 1.5, "{worst:?}");
    }

    #[test]
    fn exp_special_values() {
        assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(-104.1), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.73), f32::INFINITY);
        assert!(exp(88.72).is_finite());
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-100.0) > 0.0);
    }

    #[test]
    fn ln_is_within_one_ulp_everywhere() {
        let mut worst = (0.0, 0.0);
        for x in floats(1009).filter(|x| x.is_finite() && *x > 0.0) {
            let error = ulps(ln(x), f64::from(x).ln());
            if error > worst.0 {
                worst = (error, x);
            }
        }
        println!("ln: worst {} ulp at {}", worst.0, worst.1);
        assert!(worst.0 <= 1.0, "{worst:?}");
    }

    #[test]
    fn ln_special_values() {
        assert_eq!(ln(1.0), 0.0);
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(-0.0), f32::NEG_INFINITY);
        assert_eq!(ln(f32::INFINITY), f32::INFINITY);
        assert!(ln(-1.0).is_nan());
        assert!(ln(f32::NAN).is_nan());
        assert!((ln(f32::from_bits(1)) + 103.278_93).abs() < 1e-4);
    }

    /// `erf` in f64: its Taylor series below 3, from there on a continued fraction.
    fn erf_exact(x: f64) -> f64 {
        let z = x.abs();
        let value = if z < 3.0 {
            let (mut term, mut sum) = (z, z);
            for n in 1..200 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let fraction = (1..60)
                .rev()
                .fold(z, |tail, n| z + f64::from(n) / 2.0 / tail);
            1.0 - (-z * z).exp() / (fraction * std::f64::consts::PI.sqrt())
        };
        value.copysign(x)
    }

    #[test]
    fn tanh_is_within_three_ulps_everywhere() {
        let mut worst = (0.0, 0.0);
        for x in floats(1009).filter(|x| x.is_finite() && x.abs() > 1e-30) {
            let error = ulps(tanh(x), f64::from(x).tanh());
            if error > worst.0 {
                worst = (error, x);
            }
        }
        println!("tanh: worst {} ulp at {}", worst.0, worst.1);
        assert!(worst.0 <= 3.0, "{worst:?}");
        assert_eq!(tanh(0.0).to_bits(), 0);
        assert_eq!(tanh(-0.0).to_bits(), (-0.0_f32).to_bits());
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn erf_and_gelu_are_near_their_definitions() {
        for i in -80_000..=80_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x);
            let error = (f64::from(erf(x)) - erf_exact(exact)).abs();
            assert!(error < 5e-7, "erf {x}: {error}");
            let gelu = 0.5 * exact * (1.0 + erf_exact(exact / 2.0_f64.sqrt()));
            assert!((f64::from(gelu_erf(x)) - gelu).abs() < 2e-6, "gelu_erf {x}");
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (exact + 0.044_715 * exact.powi(3));
            let gelu = 0.5 * exact * (1.0 + inner.tanh());
            assert!(
                (f64::from(gelu_tanh(x)) - gelu).abs() < 2e-6,
                "gelu_tanh {x}"
            );
        }
        assert_eq!((erf(10.0), erf(f32::NEG_INFINITY)), (1.0, -1.0));
        assert!(erf(f32::NAN).is_nan());
    }
}
