//! The SwiGLU feed-forward block (Shazeer 2020).

use tch::Tensor;

use super::{GetWeight, Linear};
use crate::config::LlamaConfig;
use crate::exact::{self, SharedPool};
use crate::tensor_error::TensorError;

/// `down(silu(gate(x)) · up(x))`.
#[derive(Debug)]
pub struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    /// Gets `{name}.{gate,up,down}_proj`.
    pub fn load(
        name: &str,
        config: &LlamaConfig,
        get: &mut GetWeight<'_>,
    ) -> Result<Self, TensorError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let mut linear = |part: &str, from, to| {
            Linear::load(&format!("{name}.{part}"), from, to, config.mlp_bias, get)
        };
        Ok(Self {
            gate_proj: linear("gate_proj", hidden, inner)?,
            up_proj: linear("up_proj", hidden, inner)?,
            down_proj: linear("down_proj", inner, hidden)?,
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (gate, up) = (self.gate_proj.forward(x), self.up_proj.forward(x));
        let gated = match &self.gate_proj {
            Linear::Dense { .. } => gate.silu() * up,
            Linear::Packed { pool, .. } => exact::silu_mul(pool, &gate, &up),
        };
        self.down_proj.forward(&gated)
    }

    /// The same block by our own kernels.
    pub fn into_exact(self, pool: &SharedPool) -> Self {
        Self {
            gate_proj: self.gate_proj.into_exact(pool),
            up_proj: self.up_proj.into_exact(pool),
            down_proj: self.down_proj.into_exact(pool),
        }
    }
}
