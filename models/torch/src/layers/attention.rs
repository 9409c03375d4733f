//! Grouped-query self-attention: the projections, and the seam behind which keys and values live.

use tch::Tensor;
use understudy_checkpoint::TensorError;
use understudy_checkpoint::spec::AttentionSpec;

use super::{Angles, Linear, Norm, Weights};

/// Who sees whom, and how scores become weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionRule {
    /// Scores are multiplied by it.
    pub scale: f64,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f64>,
    /// Position `p` sees the last `window` positions up to itself.
    pub window: Option<usize>,
    /// Whether a position sees only those up to itself.
    pub causal: bool,
}

impl AttentionRule {
    /// The rule of one layer.
    #[must_use]
    pub fn of(spec: &AttentionSpec) -> Self {
        Self {
            scale: f64::from(spec.scale),
            soft_cap: spec.soft_cap.map(f64::from),
            window: spec.window,
            causal: spec.causal,
        }
    }
}

/// Attention proper: who attends to what, and where keys and values are kept. Training looks at the rows of the
/// batch; serving stores the rows in the sequences' blocks and reads those.
pub trait Attend {
    /// `q` is `[rows, heads, head_dim]`, `k` and `v` are `[rows, kv_heads, head_dim]`, as they are to be multiplied; returns
    /// `[rows, heads * head_dim]`. Query head `h` belongs to key head `h / (heads / kv_heads)`. Called once per layer and step, layers in
    /// ascending order.
    fn attend(
        &mut self,
        layer: usize,
        rule: &AttentionRule,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Tensor;
}

/// The projections around an [`Attend`].
#[derive(Debug)]
pub struct SelfAttention {
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    qkv: Linear,
    output: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    rope: Option<usize>,
    rule: AttentionRule,
}

/// Queries, keys and values of a step's rows, ready for [`Attend`].
pub struct Projected {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl SelfAttention {
    /// Gets the projections.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load(spec: &AttentionSpec, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        Ok(Self {
            heads: spec.heads as i64,
            kv_heads: spec.kv_heads as i64,
            head_dim: spec.head_dim as i64,
            qkv: Linear::load(&spec.qkv, weights)?,
            output: Linear::load(&spec.output, weights)?,
            q_norm: Norm::load_if(spec.q_norm.as_ref(), weights)?,
            k_norm: Norm::load_if(spec.k_norm.as_ref(), weights)?,
            rope: spec.rope,
            rule: AttentionRule::of(spec),
        })
    }

    /// How this layer's rows attend.
    pub fn rule(&self) -> &AttentionRule {
        &self.rule
    }

    /// `[rows, hidden]` to queries, keys and values, normed and turned; `angles` are those of every rotary embedding of the model.
    pub fn project(&self, x: &Tensor, angles: &[Angles]) -> Projected {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let all = self
            .qkv
            .forward(x)
            .view([-1, heads + 2 * kv_heads, self.head_dim]);
        let part = |first, count| all.narrow(1, first, count);
        let v = part(heads + kv_heads, kv_heads);
        let (q, k) = if self.q_norm.is_none() && self.k_norm.is_none() {
            // Queries and keys lie side by side, and turn alike.
            let both = self.turned(part(0, heads + kv_heads), angles);
            (both.narrow(1, 0, heads), both.narrow(1, heads, kv_heads))
        } else {
            let q = normed(self.q_norm.as_ref(), part(0, heads));
            let k = normed(self.k_norm.as_ref(), part(heads, kv_heads));
            (self.turned(q, angles), self.turned(k, angles))
        };
        Projected { q, k, v }
    }

    /// `[rows, heads * head_dim] -> [rows, hidden]`.
    pub fn output(&self, attended: &Tensor) -> Tensor {
        self.output.forward(attended)
    }

    fn turned(&self, x: Tensor, angles: &[Angles]) -> Tensor {
        match self.rope {
            Some(rope) => angles[rope].rotate(&x),
            None => x,
        }
    }
}

fn normed(norm: Option<&Norm>, x: Tensor) -> Tensor {
    match norm {
        Some(norm) => norm.forward(&x),
        None => x,
    }
}
