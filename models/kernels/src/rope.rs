//! Sine, cosine and powers for rotary embedding tables: computed once per model, in f64, by operations that every machine
//! rounds the same way. A C library's `cos` or `powf` may differ in the last bit from release to release.

/// High, middle and low part of pi / 2; their sum has about 150 bits.
const HALF_PI: [f64; 3] = [
    std::f64::consts::FRAC_PI_2,
    6.123_233_995_736_766e-17,
    -1.497_384_904_859_169_8e-33,
];
/// `x + ROUND - ROUND` is the nearest integer for `|x| < 2^51`.
const ROUND: f64 = 6_755_399_441_055_744.0;

/// Taylor coefficients of `sin(r) / r - 1` in `r^2`, highest first; exact enough below pi / 4 for 1e-17.
const SIN: [f64; 8] = [
    1.0 / 355_687_428_096_000.0,
    -1.0 / 1_307_674_368_000.0,
    1.0 / 6_227_020_800.0,
    -1.0 / 39_916_800.0,
    1.0 / 362_880.0,
    -1.0 / 5_040.0,
    1.0 / 120.0,
    -1.0 / 6.0,
];
/// The same of `cos(r) - 1`.
const COS: [f64; 9] = [
    -1.0 / 6_402_373_705_728_000.0,
    1.0 / 20_922_789_888_000.0,
    -1.0 / 87_178_291_200.0,
    1.0 / 479_001_600.0,
    -1.0 / 3_628_800.0,
    1.0 / 40_320.0,
    -1.0 / 720.0,
    1.0 / 24.0,
    -0.5,
];

fn polynomial(coefficients: &[f64], z: f64) -> f64 {
    coefficients.iter().fold(0.0, |sum, c| sum.mul_add(z, *c))
}

/// Sine and cosine of `angle` in radians, rounded to f32. `|angle|` up to 2^30: beyond every position times frequency.
#[must_use]
pub fn sin_cos(angle: f32) -> (f32, f32) {
    let angle = f64::from(angle);
    let quarters = angle * std::f64::consts::FRAC_2_PI + ROUND - ROUND;
    let r = HALF_PI
        .iter()
        .fold(angle, |r, part| (-quarters).mul_add(*part, r));
    let z = r * r;
    let sin = (r * z).mul_add(polynomial(&SIN, z), r);
    let cos = z.mul_add(polynomial(&COS, z), 1.0);
    let (sin, cos) = match (quarters as i64) & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    };
    (sin as f32, cos as f32)
}

/// `base^exponent` for a positive, finite `base`, to about 14 digits.
#[must_use]
pub fn power(base: f64, exponent: f64) -> f64 {
    exp_f64(ln_f64(base) * exponent)
}

/// `base = 2^k m`, `m` in `[sqrt(1/2), sqrt(2))`, and `ln m = 2 artanh((m - 1) / (m + 1))`.
fn ln_f64(base: f64) -> f64 {
    let mut m = base;
    let mut k = 0.0_f64;
    while m >= std::f64::consts::SQRT_2 {
        m *= 0.5;
        k += 1.0;
    }
    while m < std::f64::consts::FRAC_1_SQRT_2 {
        m *= 2.0;
        k -= 1.0;
    }
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    // 1/(2i+1), highest first; s^2 < 0.03, so 13 terms reach f64's precision.
    let series = (0..13).rev().fold(0.0, |sum: f64, i| {
        sum.mul_add(z, 1.0 / f64::from(2 * i + 1))
    });
    k.mul_add(std::f64::consts::LN_2, 2.0 * s * series)
}

/// Taylor series on `|r| <= ln 2 / 2`, then the power of two by repeated multiplication (exact).
fn exp_f64(x: f64) -> f64 {
    let n = x * std::f64::consts::LOG2_E + ROUND - ROUND;
    let r = (-n).mul_add(std::f64::consts::LN_2, x);
    let mut value = (1..=18)
        .rev()
        .fold(1.0, |sum: f64, i| (sum * (r / f64::from(i))) + 1.0);
    let step = if n < 0.0 { 0.5 } else { 2.0 };
    let mut left = n.abs().min(2000.0);
    while left >= 1.0 {
        value *= step;
        left -= 1.0;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn sin_cos_are_rounded_like_the_libraries() {
        let mut random = Random::new(21);
        let mut differing = 0;
        for i in 0..200_000_i32 {
            let scale = [1.0, 100.0, 10_000.0, 1_000_000.0][i as usize % 4];
            let angle = random.values(1)[0] * scale;
            let (sin, cos) = sin_cos(angle);
            let exact = f64::from(angle).sin_cos();
            assert!((f64::from(sin) - exact.0).abs() < 3.1e-8, "sin {angle}");
            assert!((f64::from(cos) - exact.1).abs() < 3.1e-8, "cos {angle}");
            differing += u32::from(sin != exact.0 as f32) + u32::from(cos != exact.1 as f32);
        }
        assert!(
            differing <= 2,
            "{differing} results are rounded differently"
        );
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
    }

    #[test]
    fn powers_are_rounded_like_the_libraries() {
        for theta in [2.0, 100.0, 10_000.0, 500_000.0, 1e6, 1e-3] {
            for i in 0..128 {
                let exponent = f64::from(i) / 128.0;
                let exact = f64::powf(theta, exponent);
                assert!((power(theta, exponent) / exact - 1.0).abs() < 1e-13);
            }
        }
        assert_eq!(power(10_000.0, 0.0), 1.0);
        assert!((power(10_000.0, -0.5) - 0.01).abs() < 1e-15);
    }
}
