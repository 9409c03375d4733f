//! What a caller chooses about a model on the CPU.

use std::str::FromStr;

use understudy_checkpoint::StoredType;
use understudy_kernels::{KvFormat, WeightFormat};

/// In which width weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DtypeChoice {
    /// As the checkpoint stores them.
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

/// Whether linear maps are quantized at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantize {
    #[default]
    None,
    /// 8-bit weights with a scale per output, 8-bit activations with a scale per row, exact integer sums.
    Int8,
    /// 4-bit weights with a scale per group of 32 inputs; activations stay f32. The head stays int8.
    Int4,
}

/// How much memory keys and values may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvMemory {
    /// Of what is available once the weights are loaded.
    Fraction(f64),
    Bytes(u64),
}

impl Default for KvMemory {
    fn default() -> Self {
        Self::Fraction(0.5)
    }
}

/// A word that is none of those allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {found:?} is not known; allowed: {allowed}")]
pub struct UnknownChoice {
    pub what: &'static str,
    pub found: String,
    pub allowed: &'static str,
}

/// In which width keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// f16 with quantized weights, whose rounding is coarser than that, else f32.
    #[default]
    Auto,
    F32,
    F16,
}

impl KvDtype {
    /// The kernels' format for weights that are quantized so.
    #[must_use]
    pub fn format(self, quantize: Quantize) -> KvFormat {
        match (self, quantize) {
            (Self::F32, _) | (Self::Auto, Quantize::None) => KvFormat::F32,
            (Self::F16 | Self::Auto, _) => KvFormat::F16,
        }
    }
}

impl FromStr for KvDtype {
    type Err = UnknownChoice;

    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            _ => Err(UnknownChoice {
                what: "KV dtype",
                found: text.to_owned(),
                allowed: "auto, f32, f16",
            }),
        }
    }
}

impl FromStr for DtypeChoice {
    type Err = UnknownChoice;

    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            _ => Err(UnknownChoice {
                what: "dtype",
                found: text.to_owned(),
                allowed: "auto, f32, bf16, f16",
            }),
        }
    }
}

impl FromStr for Quantize {
    type Err = UnknownChoice;

    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        match text {
            "none" => Ok(Self::None),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            _ => Err(UnknownChoice {
                what: "quantization",
                found: text.to_owned(),
                allowed: "none, int8, int4",
            }),
        }
    }
}

impl FromStr for KvMemory {
    type Err = UnknownChoice;

    /// A fraction such as `0.5`, or bytes with a unit such as `512MiB` or `2GiB`.
    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        let unknown = || UnknownChoice {
            what: "KV memory",
            found: text.to_owned(),
            allowed: "a fraction above 0 and up to 1 (0.5), or a number of bytes with MiB or GiB (512MiB)",
        };
        for (unit, bytes) in [("GiB", 1_u64 << 30), ("MiB", 1 << 20)] {
            if let Some(number) = text.strip_suffix(unit) {
                let number: u64 = number.trim().parse().map_err(|_| unknown())?;
                return number
                    .checked_mul(bytes)
                    .filter(|bytes| *bytes > 0)
                    .map(Self::Bytes)
                    .ok_or_else(unknown);
            }
        }
        match text.parse::<f64>() {
            Ok(fraction) if fraction > 0.0 && fraction <= 1.0 => Ok(Self::Fraction(fraction)),
            _ => Err(unknown()),
        }
    }
}

impl DtypeChoice {
    /// The width in which a matrix that is stored in `stored` is kept.
    #[must_use]
    pub fn of(self, stored: StoredType) -> StoredType {
        match self {
            Self::Auto => stored,
            Self::F32 => StoredType::F32,
            Self::Bf16 => StoredType::Bf16,
            Self::F16 => StoredType::F16,
        }
    }
}

/// The kernels' name of a width.
#[must_use]
pub fn plain_format(dtype: StoredType) -> WeightFormat {
    match dtype {
        StoredType::F32 => WeightFormat::F32,
        StoredType::Bf16 => WeightFormat::Bf16,
        StoredType::F16 => WeightFormat::F16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_fraction_or_bytes() {
        assert_eq!("0.25".parse(), Ok(KvMemory::Fraction(0.25)));
        assert_eq!("1".parse(), Ok(KvMemory::Fraction(1.0)));
        assert_eq!("3 MiB".parse(), Ok(KvMemory::Bytes(3 << 20)));
        assert_eq!("2GiB".parse(), Ok(KvMemory::Bytes(2 << 30)));
        for wrong in [
            "0",
            "-1",
            "1.5",
            "",
            "2GB",
            "0MiB",
            "xMiB",
            "99999999999999GiB",
            "nan",
        ] {
            let error = wrong.parse::<KvMemory>().unwrap_err().to_string();
            assert!(error.contains("512MiB"), "{wrong}: {error}");
        }
    }
}
