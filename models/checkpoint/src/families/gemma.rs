//! Gemma 2 and 3 (text): scaled embeddings, norms by `1 + weight` on both sides of each branch, windows in most layers.

use serde_json::Value;

use super::{Decoder, Defaults, gated_mlp, sliding_layers};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::rope::{self, RopeKeys};
use crate::spec::{Activation, LayerSpec, ModelSpec, NormKind, OutputSpec, ResidualNorms};

/// The window where the key is absent.
const WINDOW: usize = 4096;
/// Gemma 3's: of so many layers, the last sees the whole context.
const PATTERN: usize = 6;
/// Theta of Gemma 3's layers with a window.
const LOCAL_THETA: f64 = 10_000.0;

fn defaults() -> Defaults {
    Defaults {
        tied: true,
        head_dim: Some(256),
        kv_heads: Some(4),
        positions: 8192,
        norm: NormKind::RmsPlusOne,
        ..Defaults::default()
    }
}

/// Gemma 2: scores and logits are capped; every other layer has a window.
pub(super) fn gemma2(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(keys, &defaults())?;
    let gemma = Gemma::read(keys, &decoder, |layer| layer.is_multiple_of(2))?;
    let score_cap = cap(keys, "attn_logit_softcapping", Some(50.0))?;
    let logit_cap = cap(keys, "final_logit_softcapping", Some(30.0))?;
    let spec = decoder.build(|index| {
        let mut layer = gemma.layer(&decoder, index);
        layer.attention.soft_cap = score_cap;
        layer
    })?;
    Ok(finished(spec, logit_cap))
}

/// Gemma 3: norms of heads instead of capped scores; layers with a window turn by a theta of their own.
pub(super) fn gemma3(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults {
        theta: 1e6,
        positions: 131_072,
        ..defaults()
    };
    let mut decoder = Decoder::without_rope(keys, &defaults)?;
    let (global, local) = ropes(keys, &decoder.rope_keys(keys, &defaults)?)?;
    decoder.ropes = vec![global, local];
    // transformers 5 writes the first name for files that had the second.
    let pattern = match keys.size_if("_sliding_window_pattern")? {
        Some(pattern) => {
            keys.ignore(&["sliding_window_pattern"]);
            pattern
        }
        None => keys.size_or("sliding_window_pattern", PATTERN)?,
    };
    let gemma = Gemma::read(keys, &decoder, |layer| !(layer + 1).is_multiple_of(pattern))?;
    // transformers reads this key and does not apply it: nobody knows what is meant.
    keys.absent("attn_logit_softcapping", "null for Gemma 3")?;
    let logit_cap = cap(keys, "final_logit_softcapping", None)?;
    let spec = decoder.build(|index| {
        let mut layer = gemma.layer(&decoder, index);
        let norm = |part: &str| {
            let name = format!("model.layers.{index}.self_attn.{part}");
            Some(decoder.norm(&name, decoder.head_dim))
        };
        layer.attention.q_norm = norm("q_norm");
        layer.attention.k_norm = norm("k_norm");
        layer.attention.rope = Some(usize::from(gemma.sliding[index]));
        layer
    })?;
    Ok(finished(spec, logit_cap))
}

/// The rotary embeddings of layers with the whole context, and of those with a window. A scaling rule is of the former only, unless the
/// file (transformers 5) gives each its own.
fn ropes(keys: &Keys<'_>, of: &RopeKeys) -> Result<(rope::RopeSpec, rope::RopeSpec), ConfigError> {
    let local = RopeKeys {
        theta_key: "rope_local_base_freq",
        theta: LOCAL_THETA,
        ..of.clone()
    };
    let old = keys.get("rope_scaling");
    let (global_rule, local_rule) = match keys.get("rope_parameters") {
        None => (old, None),
        Some(Value::Object(rules))
            if old.is_none()
                && rules
                    .keys()
                    .all(|key| key == "full_attention" || key == "sliding_attention") =>
        {
            let rule = |key: &str| rules.get(key).filter(|rule| !rule.is_null());
            (rule("full_attention"), rule("sliding_attention"))
        }
        Some(_) => {
            return Err(keys.unsupported(
                "rope_parameters",
                "one rule for \"full_attention\" and one for \"sliding_attention\", without rope_scaling",
            ));
        }
    };
    let global = rope::read_rule(keys, global_rule, of)?;
    Ok((global, rope::read_rule(keys, local_rule, &local)?))
}

/// What both have in common.
struct Gemma {
    scale: f32,
    bias: bool,
    window: Option<usize>,
    /// Which layers have the window.
    sliding: Vec<bool>,
    activation: Activation,
    inner: usize,
}

impl Gemma {
    fn read(
        keys: &Keys<'_>,
        decoder: &Decoder,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Self, ConfigError> {
        keys.absent(
            "use_bidirectional_attention",
            "false: texts are generated from left to right",
        )?;
        // The files have this key too, and no Gemma is computed by it.
        keys.ignore(&["hidden_act"]);
        Ok(Self {
            scale: keys
                .positive_or("query_pre_attn_scalar", 256.0)?
                .sqrt()
                .recip() as f32,
            bias: keys.flag_or("attention_bias", false)?,
            window: match keys.raw("sliding_window") {
                None => Some(WINDOW),
                Some(_) => keys.size_if("sliding_window")?,
            },
            sliding: sliding_layers(keys, decoder.layers, sliding)?,
            activation: super::activation(keys, "hidden_activation", Activation::GeluTanh)?,
            inner: keys.size("intermediate_size")?,
        })
    }

    fn layer(&self, decoder: &Decoder, index: usize) -> LayerSpec {
        let name = format!("model.layers.{index}");
        let mut attention = decoder.attention(&format!("{name}.self_attn"), self.bias);
        attention.scale = self.scale;
        attention.window = decoder.window(self.window.filter(|_| self.sliding[index]));
        let hidden = decoder.hidden_size;
        let mlp = gated_mlp(
            &format!("{name}.mlp"),
            hidden,
            self.inner,
            false,
            self.activation,
        );
        let norms = |input: &str, output: &str| ResidualNorms {
            input: Some(decoder.norm(&format!("{name}.{input}"), hidden)),
            output: Some(decoder.norm(&format!("{name}.{output}"), hidden)),
            sum: None,
        };
        LayerSpec {
            attention_norms: norms("input_layernorm", "post_attention_layernorm"),
            mlp_norms: norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            ..decoder.layer(&name, attention, mlp)
        }
    }
}

/// A cap: absent is the default, null is none.
fn cap(keys: &Keys<'_>, key: &str, default: Option<f64>) -> Result<Option<f32>, ConfigError> {
    match keys.raw(key) {
        None => Ok(default.map(|cap| cap as f32)),
        Some(Value::Null) => Ok(None),
        Some(_) => Ok(Some(keys.positive(key)? as f32)),
    }
}

/// Embeddings are scaled, in the width in which the model computes; the head uses them as they are.
fn finished(mut spec: ModelSpec, logit_cap: Option<f32>) -> ModelSpec {
    spec.embedding.scale = Some((spec.hidden_size as f64).sqrt() as f32);
    if let OutputSpec::Logits { soft_cap, .. } = &mut spec.output {
        *soft_cap = logit_cap;
    }
    spec
}
