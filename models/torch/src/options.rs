//! What a caller chooses about a model.

use std::str::FromStr;

pub use understudy_cpu::options::{DtypeChoice, KvDtype, KvMemory, Quantize, UnknownChoice};

/// Whose arithmetic a model runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numerics {
    /// Our kernels, CPU only: bits depend on nothing but the sequence.
    #[default]
    Exact,
    /// LibTorch's operators, any device: bits may change with the batch.
    Stock,
}

impl FromStr for Numerics {
    type Err = UnknownChoice;

    fn from_str(text: &str) -> Result<Self, UnknownChoice> {
        match text {
            "exact" => Ok(Self::Exact),
            "fast" => Ok(Self::Stock),
            _ => Err(UnknownChoice {
                what: "numerics",
                found: text.to_owned(),
                allowed: "exact, fast",
            }),
        }
    }
}
