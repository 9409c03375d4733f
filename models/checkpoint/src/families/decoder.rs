//! What Llama and its many relatives have in common: the sizes, the norms, one rotary embedding, and the names of the tensors.

use super::{check_layers, context_length, weight_type};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::rope::{self, RopeKeys, RopeSpec};
use crate::spec::{
    AttentionSpec, EmbeddingSpec, LayerSpec, LinearSpec, MlpSpec, ModelSpec, NormKind, NormSpec,
    OutputSpec, ResidualNorms, WeightType,
};

/// What the absence of a key means in one family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    pub eps: f64,
    pub tied: bool,
    pub theta: f64,
    /// `None`: hidden size divided by heads.
    pub head_dim: Option<usize>,
    /// `None`: as many as heads.
    pub kv_heads: Option<usize>,
    pub positions: usize,
    pub norm: NormKind,
    /// Whether a part of a head may turn only, by `partial_rotary_factor`.
    pub partial_rotary: bool,
    pub yarn_is_longrope: bool,
    /// `original_max_position_embeddings`, beside the rotary rule.
    pub original_positions: Option<usize>,
}

/// Llama's.
impl Default for Defaults {
    fn default() -> Self {
        Self {
            eps: 1e-6,
            tied: false,
            theta: 10_000.0,
            head_dim: None,
            kv_heads: None,
            positions: 2048,
            norm: NormKind::Rms,
            partial_rotary: false,
            yarn_is_longrope: false,
            original_positions: None,
        }
    }
}

/// A decoder with the tensors' names of Llama: `model.layers.0.self_attn.q_proj.weight` and so on.
#[derive(Debug)]
pub(super) struct Decoder {
    architecture: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// What `max_position_embeddings` says, and the caller's limit.
    pub context_length: usize,
    pub norm: NormKind,
    pub eps: f32,
    pub tied: bool,
    /// The first is what [`Self::attention`] refers to.
    pub ropes: Vec<RopeSpec>,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    weight_type: Option<WeightType>,
}

impl Decoder {
    /// Reads the keys with Llama's defaults.
    pub fn read(keys: &Keys<'_>) -> Result<Self, ConfigError> {
        Self::read_with(keys, &Defaults::default())
    }

    pub fn read_with(keys: &Keys<'_>, defaults: &Defaults) -> Result<Self, ConfigError> {
        let mut decoder = Self::without_rope(keys, defaults)?;
        decoder.ropes = vec![rope::read(keys, &decoder.rope_keys(keys, defaults)?)?];
        Ok(decoder)
    }

    /// All but the rotary embedding, for a family that has several.
    pub fn without_rope(keys: &Keys<'_>, defaults: &Defaults) -> Result<Self, ConfigError> {
        let hidden_size = keys.size("hidden_size")?;
        let heads = keys.size("num_attention_heads")?;
        let kv_heads = keys.size_or("num_key_value_heads", defaults.kv_heads.unwrap_or(heads))?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(ConfigError::Inconsistent(format!(
                "num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
            )));
        }
        let head_dim = match (keys.size_if("head_dim")?, defaults.head_dim) {
            (Some(head_dim), _) | (None, Some(head_dim)) => head_dim,
            (None, None) => super::head_dim(hidden_size, heads, "num_attention_heads")?,
        };
        let positions = keys.size_or("max_position_embeddings", defaults.positions)?;
        Ok(Self {
            architecture: super::architecture(keys)?,
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            layers: check_layers("num_hidden_layers", keys.size("num_hidden_layers")?)?,
            heads,
            kv_heads,
            head_dim,
            context_length: context_length(keys, positions),
            norm: defaults.norm,
            eps: keys.positive_or("rms_norm_eps", defaults.eps)? as f32,
            tied: keys.flag_or("tie_word_embeddings", defaults.tied)?,
            ropes: Vec::new(),
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id")?,
            weight_type: weight_type(keys)?,
        })
    }

    /// Where this family's rotary keys are.
    pub fn rope_keys(&self, keys: &Keys<'_>, of: &Defaults) -> Result<RopeKeys, ConfigError> {
        Ok(RopeKeys {
            head_dim: self.head_dim,
            theta_key: "rope_theta",
            theta: of.theta,
            partial: of.partial_rotary.then_some(("partial_rotary_factor", 1.0)),
            max_positions: keys.size_or("max_position_embeddings", of.positions)?,
            context_length: self.context_length,
            yarn_is_longrope: of.yarn_is_longrope,
            original_positions: of.original_positions,
        })
    }

    /// `{name}.weight`, `[size]`.
    pub fn norm(&self, name: &str, size: usize) -> NormSpec {
        NormSpec {
            kind: self.norm,
            weight: format!("{name}.weight"),
            bias: None,
            size,
            eps: self.eps,
        }
    }

    /// `{name}.{q,k,v,o}_proj`, all with a bias or none of them; the whole context, the first rotary embedding.
    pub fn attention(&self, name: &str, bias: bool) -> AttentionSpec {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let names = ["q", "k", "v"].map(|part| format!("{name}.{part}_proj"));
        let parts = [(&*names[0], q), (&*names[1], kv), (&*names[2], kv)];
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            qkv: LinearSpec::stacked(&parts, self.hidden_size, bias),
            output: LinearSpec::stored(&format!("{name}.o_proj"), q, self.hidden_size, bias),
            q_norm: None,
            k_norm: None,
            scale: (self.head_dim as f64).sqrt().recip() as f32,
            soft_cap: None,
            window: None,
            rope: Some(0),
            causal: true,
        }
    }

    /// A window, unless it is as wide as the whole context.
    pub fn window(&self, window: Option<usize>) -> Option<usize> {
        window.filter(|window| *window < self.context_length)
    }

    /// `{name}.input_layernorm` before the attention and `{name}.post_attention_layernorm` before the feed-forward part.
    pub fn layer(
        &self,
        name: &str,
        attention: AttentionSpec,
        mlp: impl Into<MlpSpec>,
    ) -> LayerSpec {
        let norm = |part: &str| {
            ResidualNorms::before(self.norm(&format!("{name}.{part}"), self.hidden_size))
        };
        LayerSpec {
            attention,
            attention_norms: norm("input_layernorm"),
            mlp: mlp.into(),
            mlp_norms: norm("post_attention_layernorm"),
            parallel: false,
        }
    }

    /// The model of these layers, with `model.embed_tokens`, `model.norm` and `lm_head`.
    pub fn build(&self, layer: impl Fn(usize) -> LayerSpec) -> Result<ModelSpec, ConfigError> {
        let head = LinearSpec::stored("lm_head", self.hidden_size, self.vocab_size, false);
        Ok(ModelSpec {
            architecture: self.architecture.clone(),
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            context_length: self.context_length,
            embedding: EmbeddingSpec {
                tokens: "model.embed_tokens.weight".to_owned(),
                scale: None,
                positions: None,
                token_types: None,
                norm: None,
            },
            layers: (0..self.layers).map(layer).collect(),
            ropes: self.ropes.clone(),
            final_norm: Some(self.norm("model.norm", self.hidden_size)),
            output: OutputSpec::Logits {
                head: (!self.tied).then_some(head),
                soft_cap: None,
            },
            bos_token_id: self.bos_token_id,
            eos_token_ids: self.eos_token_ids.clone(),
            weight_type: self.weight_type,
        })
    }
}
