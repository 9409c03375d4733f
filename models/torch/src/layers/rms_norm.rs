//! Root-mean-square normalisation (Zhang & Sennrich 2019).

use tch::{Kind, Tensor};

use super::GetWeight;
use crate::exact::{self, SharedPool};
use crate::tensor_error::TensorError;

/// `x / sqrt(mean(x²) + eps) · weight`, over the last dimension.
#[derive(Debug)]
pub struct RmsNorm {
    pub weight: Tensor,
    pub eps: f64,
    /// Set when our own kernel computes it.
    pub pool: Option<SharedPool>,
}

impl RmsNorm {
    /// Gets `{name}.weight`, `[size]`.
    pub fn load(
        name: &str,
        size: i64,
        eps: f64,
        get: &mut GetWeight<'_>,
    ) -> Result<Self, TensorError> {
        let weight = get(&format!("{name}.weight"), &[size])?;
        Ok(Self {
            weight,
            eps,
            pool: None,
        })
    }

    /// `[rows, size] -> [rows, size]`. Statistics are in f32 for every element type, as in transformers.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if let Some(pool) = &self.pool {
            return exact::rms_norm(pool, x, &self.weight, self.eps);
        }
        let size = self.weight.size();
        if x.kind() == Kind::Float {
            return x.rms_norm(&size[..], Some(&self.weight), self.eps);
        }
        let normed = x
            .to_kind(Kind::Float)
            .rms_norm(&size[..], None::<&Tensor>, self.eps);
        normed.to_kind(x.kind()) * &self.weight
    }

    /// The same norm by our own kernel.
    pub fn into_exact(self, pool: &SharedPool) -> Self {
        Self {
            weight: self.weight.detach().to_kind(Kind::Float).contiguous(),
            eps: self.eps,
            pool: Some(SharedPool::clone(pool)),
        }
    }
}
