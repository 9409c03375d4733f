//! Which instruction set a kernel runs on, and how one body is compiled for each.
//!
//! Invariant: the choice changes speed only. Every kernel body is written once, over [`Lanes`](crate::lanes::Lanes) or over plain
//! loops, and performs the same IEEE operations in the same order per output element on every path.

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with AVX-512F: 16 floats at once.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C: 8 floats at once.
    Avx2,
    /// 64-bit Arm: 4 floats at once.
    Neon,
    /// Any other machine, and the reference of the tests: one float at a time, `f32::mul_add`.
    Scalar,
}

impl Isa {
    /// The fastest set that this machine has.
    #[must_use]
    pub fn best() -> Self {
        Self::available()[0]
    }

    /// All sets that this machine can run, fastest first; the last one is always [`Isa::Scalar`].
    #[must_use]
    pub fn available() -> &'static [Isa] {
        #[cfg(target_arch = "x86_64")]
        {
            // The standard library caches these answers in an atomic.
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2 && is_x86_feature_detected!("avx512f");
            match (avx512, avx2) {
                (true, _) => &[Isa::Avx512, Isa::Avx2, Isa::Scalar],
                (_, true) => &[Isa::Avx2, Isa::Scalar],
                _ => &[Isa::Scalar],
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            &[Isa::Neon, Isa::Scalar]
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            &[Isa::Scalar]
        }
    }

    /// Lower-case name for logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Scalar => "scalar",
        }
    }
}

/// Compiles the generic, `#[inline(always)]` body `$body::<L: Lanes>` once per instruction set behind one function that takes an [`Isa`].
///
/// The generated function is unsafe: the caller passes an `Isa` out of [`Isa::available`] and meets the body's own conditions.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) => $body:ident $(::<$($extra:ty),*>)?) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512($($arg: $ty),*) {
                unsafe { $body::<$crate::lanes::Avx512 $($(, $extra)*)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2($($arg: $ty),*) {
                unsafe { $body::<$crate::lanes::Avx2 $($(, $extra)*)?>($($arg),*) }
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                $crate::isa::Isa::Neon => unsafe { $body::<$crate::lanes::Neon $($(, $extra)*)?>($($arg),*) },
                _ => unsafe { $body::<$crate::lanes::Scalar $($(, $extra)*)?>($($arg),*) },
            }
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scalar_reference_is_always_there_and_last() {
        assert_eq!(Isa::available().last(), Some(&Isa::Scalar));
        assert_eq!(Isa::best(), Isa::available()[0]);
    }
}
