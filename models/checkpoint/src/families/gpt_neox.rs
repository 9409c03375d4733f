//! GPT-NeoX and Pythia: both branches read the layer's input, a part of each head turns, and the file has each head's query, key and value
//! rows together.

use super::{check_layers, context_length, gpt2::layer_norm, head_dim, weight_type};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::rope::{self, RopeKeys};
use crate::spec::{
    Activation, AttentionSpec, BiasPart, DenseMlp, EmbeddingSpec, LayerSpec, LinearSpec, ModelSpec,
    OutputSpec, ResidualNorms, RowPattern, WeightPart,
};

pub(super) fn spec(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let hidden = keys.size("hidden_size")?;
    let heads = keys.size("num_attention_heads")?;
    let head_dim = head_dim(hidden, heads, "num_attention_heads")?;
    let positions = keys.size_or("max_position_embeddings", 2048)?;
    let context_length = context_length(keys, positions);
    let rope = rope::read(
        keys,
        &RopeKeys {
            head_dim,
            theta_key: "rotary_emb_base",
            theta: 10_000.0,
            partial: Some(("rotary_pct", 0.25)),
            max_positions: positions,
            context_length,
            yarn_is_longrope: false,
            original_positions: None,
        },
    )?;
    // Whether the model is one half of another; this one is always a decoder.
    keys.ignore(&["is_decoder"]);
    let bias = keys.flag_or("attention_bias", true)?;
    let parallel = keys.flag_or("use_parallel_residual", true)?;
    let activation = super::activation(keys, "hidden_act", Activation::GeluErf)?;
    let inner = keys.size("intermediate_size")?;
    let eps = keys.positive_or("layer_norm_eps", 1e-5)? as f32;
    let vocab_size = keys.size("vocab_size")?;
    let tied = keys.flag_or("tie_word_embeddings", false)?;
    let layers = check_layers("num_hidden_layers", keys.size("num_hidden_layers")?)?;
    let layer = |index: usize| {
        let name = format!("gpt_neox.layers.{index}");
        let norm =
            |part: &str| ResidualNorms::before(layer_norm(&format!("{name}.{part}"), hidden, eps));
        let map = |part: &str, inputs, outputs, bias| {
            LinearSpec::stored(&format!("{name}.{part}"), inputs, outputs, bias)
        };
        let attention = AttentionSpec {
            heads,
            kv_heads: heads,
            head_dim,
            qkv: interleaved(
                &format!("{name}.attention.query_key_value"),
                heads,
                head_dim,
                bias,
            ),
            output: map("attention.dense", hidden, hidden, bias),
            q_norm: None,
            k_norm: None,
            scale: (head_dim as f64).sqrt().recip() as f32,
            soft_cap: None,
            window: None,
            rope: Some(0),
            causal: true,
        };
        let mlp = DenseMlp {
            activation,
            gated: false,
            up: map("mlp.dense_h_to_4h", hidden, inner, true),
            down: map("mlp.dense_4h_to_h", inner, hidden, true),
        };
        LayerSpec {
            attention,
            attention_norms: norm("input_layernorm"),
            mlp: mlp.into(),
            mlp_norms: norm("post_attention_layernorm"),
            parallel,
        }
    };
    Ok(ModelSpec {
        architecture: super::architecture(keys)?,
        vocab_size,
        hidden_size: hidden,
        context_length,
        embedding: EmbeddingSpec {
            tokens: "gpt_neox.embed_in.weight".to_owned(),
            scale: None,
            positions: None,
            token_types: None,
            norm: None,
        },
        layers: (0..layers).map(layer).collect(),
        ropes: vec![rope],
        final_norm: Some(layer_norm("gpt_neox.final_layer_norm", hidden, eps)),
        output: OutputSpec::Logits {
            head: (!tied).then(|| LinearSpec::stored("embed_out", hidden, vocab_size, false)),
            soft_cap: None,
        },
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: keys.token_ids("eos_token_id")?,
        weight_type: weight_type(keys)?,
    })
}

/// Stored as `[heads, (query, key, value), head_dim]` rows; described as all queries, all keys, all values.
fn interleaved(name: &str, heads: usize, head_dim: usize, bias: bool) -> LinearSpec {
    let outputs = 3 * heads * head_dim;
    let patterns = [0, 1, 2].map(|part| RowPattern {
        first: part * head_dim,
        len: head_dim,
        stride: 3 * head_dim,
        count: heads,
    });
    let weight = patterns.map(|rows| WeightPart {
        tensor: format!("{name}.weight"),
        stored_outputs: outputs,
        transposed: false,
        rows,
    });
    let biases = patterns.map(|rows| BiasPart {
        tensor: format!("{name}.bias"),
        stored_len: outputs,
        rows,
    });
    LinearSpec {
        inputs: heads * head_dim,
        outputs,
        weight: weight.to_vec(),
        bias: if bias { biases.to_vec() } else { Vec::new() },
    }
}
