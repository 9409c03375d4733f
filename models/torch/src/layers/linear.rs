//! A linear map with Hugging Face's weight layout.

use tch::{Kind, Tensor};
use understudy_kernels::PackedLinear;

use super::GetWeight;
use crate::exact::{self, SharedPool};
use crate::tensor_error::TensorError;

/// `y = x Wᵀ + b`.
#[derive(Debug)]
pub enum Linear {
    /// Plain tensors computed by LibTorch: `weight` is `[out, in]`, `bias` is `[out]`.
    Dense {
        weight: Tensor,
        bias: Option<Tensor>,
    },
    /// Weights packed for our own kernel, on the CPU; `bias` is f32.
    Packed {
        weight: PackedLinear,
        bias: Option<Tensor>,
        pool: SharedPool,
    },
}

impl Linear {
    /// Gets `{name}.weight` and, when `bias`, `{name}.bias`.
    pub fn load(
        name: &str,
        in_features: i64,
        out_features: i64,
        bias: bool,
        get: &mut GetWeight<'_>,
    ) -> Result<Self, TensorError> {
        let weight = get(&format!("{name}.weight"), &[out_features, in_features])?;
        let bias = match bias {
            true => Some(get(&format!("{name}.bias"), &[out_features])?),
            false => None,
        };
        Ok(Self::Dense { weight, bias })
    }

    /// `[rows, in] -> [rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Dense { weight, bias } => x.linear(weight, bias.as_ref()),
            Self::Packed { weight, bias, pool } => exact::linear(pool, weight, bias.as_ref(), x),
        }
    }

    /// The same map by our own kernel; the plain tensors are dropped.
    pub fn into_exact(self, pool: &SharedPool) -> Self {
        match self {
            Self::Dense { weight, bias } => Self::Packed {
                weight: exact::pack(&weight),
                bias: bias.map(|bias| bias.to_kind(Kind::Float).contiguous()),
                pool: SharedPool::clone(pool),
            },
            packed @ Self::Packed { .. } => packed,
        }
    }
}
