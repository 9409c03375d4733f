//! The token embedding.

use tch::{Device, Kind, Tensor};
use understudy_kernels::PackedLinear;

use super::GetWeight;
use crate::exact::{self, SharedPool};
use crate::tensor_error::TensorError;

/// One row of `hidden_size` per token id.
#[derive(Debug)]
pub enum Embedding {
    /// `[vocab, hidden]`.
    Dense { weight: Tensor },
    /// The same matrix packed for our own kernels, so that it can serve as the head too.
    Packed {
        weight: PackedLinear,
        pool: SharedPool,
    },
}

impl Embedding {
    /// Gets `{name}.weight`.
    pub fn load(
        name: &str,
        vocab_size: i64,
        hidden_size: i64,
        get: &mut GetWeight<'_>,
    ) -> Result<Self, TensorError> {
        let weight = get(&format!("{name}.weight"), &[vocab_size, hidden_size])?;
        Ok(Self::Dense { weight })
    }

    /// `[rows]` i64, each below the vocabulary's size `-> [rows, hidden]`.
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        match self {
            Self::Dense { weight } => Tensor::embedding(weight, ids, -1, false, false),
            Self::Packed { weight, .. } => exact::embed(weight, ids),
        }
    }

    /// The matrix as a head: `[rows, hidden] -> [rows, vocab]`.
    pub fn as_head(&self, hidden: &Tensor) -> Tensor {
        match self {
            Self::Dense { weight } => hidden.linear(weight, None::<&Tensor>),
            Self::Packed { weight, pool } => exact::linear(pool, weight, None, hidden),
        }
    }

    /// Where the matrix lies, and the element type of the activations.
    pub fn options(&self) -> (Kind, Device) {
        match self {
            Self::Dense { weight } => (weight.kind(), weight.device()),
            Self::Packed { .. } => (Kind::Float, Device::Cpu),
        }
    }

    /// The same embedding for our own kernels; the plain tensor is dropped.
    pub fn into_exact(self, pool: &SharedPool) -> Self {
        match self {
            Self::Dense { weight } => Self::Packed {
                weight: exact::pack(&weight),
                pool: SharedPool::clone(pool),
            },
            packed @ Self::Packed { .. } => packed,
        }
    }
}
