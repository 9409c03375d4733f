//! Grouped-query self-attention: the projections, and the seam behind which keys and values live.

use tch::Tensor;

use super::{GetWeight, Linear, RopeAngles};
use crate::config::LlamaConfig;
use crate::exact::SharedPool;
use crate::tensor_error::TensorError;

/// Attention proper: who attends to what, and where keys and values are kept. Training looks at the rows of the
/// batch; serving stores the rows in the sequences' KV slots and reads those.
pub trait Attention {
    /// `q` is `[rows, heads, head_dim]`, `k` and `v` are `[rows, kv_heads, head_dim]`, both after RoPE; returns
    /// `[rows, heads * head_dim]`. Query head `h` belongs to key head `h / (heads / kv_heads)`; scores are scaled
    /// by `1 / sqrt(head_dim)`. Called once per layer and step, layers in ascending order.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor;
}

/// The four projections around an [`Attention`].
#[derive(Debug)]
pub struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    head_dim: i64,
}

impl SelfAttention {
    /// Gets `{name}.{q,k,v,o}_proj`.
    pub fn load(
        name: &str,
        config: &LlamaConfig,
        get: &mut GetWeight<'_>,
    ) -> Result<Self, TensorError> {
        let hidden = config.hidden_size;
        let q_size = config.num_attention_heads * config.head_dim;
        let kv_size = config.num_key_value_heads * config.head_dim;
        let bias = config.attention_bias;
        let mut linear =
            |part: &str, from, to| Linear::load(&format!("{name}.{part}"), from, to, bias, get);
        Ok(Self {
            q_proj: linear("q_proj", hidden, q_size)?,
            k_proj: linear("k_proj", hidden, kv_size)?,
            v_proj: linear("v_proj", hidden, kv_size)?,
            o_proj: linear("o_proj", q_size, hidden)?,
            head_dim: config.head_dim,
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`.
    pub fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        angles: &RopeAngles,
        attention: &mut dyn Attention,
    ) -> Tensor {
        let heads = |x: Tensor| x.view([x.size()[0], -1, self.head_dim]);
        let q = angles.rotate(&heads(self.q_proj.forward(x)));
        let k = angles.rotate(&heads(self.k_proj.forward(x)));
        let v = heads(self.v_proj.forward(x));
        self.o_proj.forward(&attention.attend(layer, &q, &k, &v))
    }

    /// The same projections by our own kernel.
    pub fn into_exact(self, pool: &SharedPool) -> Self {
        Self {
            q_proj: self.q_proj.into_exact(pool),
            k_proj: self.k_proj.into_exact(pool),
            v_proj: self.v_proj.into_exact(pool),
            o_proj: self.o_proj.into_exact(pool),
            head_dim: self.head_dim,
        }
    }
}
