//! GPT-2: learned positions, layer norms, and maps that are stored as `[inputs, outputs]`.

use super::{check_layers, context_length, head_dim, weight_type};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{
    Activation, AttentionSpec, BiasPart, DenseMlp, EmbeddingSpec, LayerSpec, LinearSpec, ModelSpec,
    NormKind, NormSpec, OutputSpec, PositionSpec, ResidualNorms, RowPattern, WeightPart,
};

pub(super) fn spec(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let hidden = keys.size("n_embd")?;
    let heads = keys.size("n_head")?;
    let head_dim = head_dim(hidden, heads, "n_head")?;
    let positions = keys.size_or("n_positions", 1024)?;
    // The older name of the same number.
    keys.ignore(&["n_ctx", "reorder_and_upcast_attn"]);
    keys.absent("add_cross_attention", "false: a decoder alone")?;
    let inner = keys.size_or("n_inner", 4 * hidden)?;
    let activation = super::activation(keys, "activation_function", Activation::GeluTanh)?;
    let eps = keys.positive_or("layer_norm_epsilon", 1e-5)? as f32;
    let scaled = keys.flag_or("scale_attn_weights", true)?;
    let scaled_by_layer = keys.flag_or("scale_attn_by_inverse_layer_idx", false)?;
    let vocab_size = keys.size("vocab_size")?;
    let tied = keys.flag_or("tie_word_embeddings", true)?;
    let layers = check_layers("n_layer", keys.size("n_layer")?)?;
    let norm = |name: &str| layer_norm(&format!("transformer.{name}"), hidden, eps);
    let layer = |index: usize| {
        let name = format!("h.{index}");
        let map = |part: &str, inputs, outputs| {
            conv1d(&format!("transformer.{name}.{part}"), inputs, outputs)
        };
        let scale = match scaled {
            true => (head_dim as f64).sqrt().recip(),
            false => 1.0,
        };
        let divisor = if scaled_by_layer { index + 1 } else { 1 };
        let attention = AttentionSpec {
            heads,
            kv_heads: heads,
            head_dim,
            qkv: map("attn.c_attn", hidden, 3 * hidden),
            output: map("attn.c_proj", hidden, hidden),
            q_norm: None,
            k_norm: None,
            scale: (scale / divisor as f64) as f32,
            soft_cap: None,
            window: None,
            rope: None,
            causal: true,
        };
        let mlp = DenseMlp {
            activation,
            gated: false,
            up: map("mlp.c_fc", hidden, inner),
            down: map("mlp.c_proj", inner, hidden),
        };
        LayerSpec {
            attention,
            attention_norms: ResidualNorms::before(norm(&format!("{name}.ln_1"))),
            mlp: mlp.into(),
            mlp_norms: ResidualNorms::before(norm(&format!("{name}.ln_2"))),
            parallel: false,
        }
    };
    Ok(ModelSpec {
        architecture: super::architecture(keys)?,
        vocab_size,
        hidden_size: hidden,
        context_length: context_length(keys, positions),
        embedding: EmbeddingSpec {
            tokens: "transformer.wte.weight".to_owned(),
            scale: None,
            positions: Some(PositionSpec {
                tensor: "transformer.wpe.weight".to_owned(),
                rows: positions,
                offset: 0,
            }),
            token_types: None,
            norm: None,
        },
        layers: (0..layers).map(layer).collect(),
        ropes: Vec::new(),
        final_norm: Some(norm("ln_f")),
        output: OutputSpec::Logits {
            head: (!tied).then(|| LinearSpec::stored("lm_head", hidden, vocab_size, false)),
            soft_cap: None,
        },
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: keys.token_ids("eos_token_id")?,
        weight_type: weight_type(keys)?,
    })
}

/// `{name}.weight` and `{name}.bias`.
pub(super) fn layer_norm(name: &str, size: usize, eps: f32) -> NormSpec {
    NormSpec {
        kind: NormKind::Layer,
        weight: format!("{name}.weight"),
        bias: Some(format!("{name}.bias")),
        size,
        eps,
    }
}

/// A map whose weight is stored the other way round, with its bias.
fn conv1d(name: &str, inputs: usize, outputs: usize) -> LinearSpec {
    LinearSpec {
        inputs,
        outputs,
        weight: vec![WeightPart {
            tensor: format!("{name}.weight"),
            stored_outputs: outputs,
            transposed: true,
            rows: RowPattern::range(0, outputs),
        }],
        bias: vec![BiasPart {
            tensor: format!("{name}.bias"),
            stored_len: outputs,
            rows: RowPattern::range(0, outputs),
        }],
    }
}
