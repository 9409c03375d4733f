//! Phi-3, Phi-3.5 and Phi-4 mini: Llama with fused maps, and LongRoPE.

use serde_json::Value;

use super::{Decoder, Defaults};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{Activation, DenseMlp, LinearSpec, ModelSpec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(
        keys,
        &Defaults {
            eps: 1e-5,
            positions: 4096,
            partial_rotary: true,
            yarn_is_longrope: true,
            original_positions: Some(4096),
            ..Defaults::default()
        },
    )?;
    // What plain rotary embedding was trained with; for LongRoPE the rule has read it.
    keys.ignore(&["original_max_position_embeddings"]);
    let window = keys.size_if("sliding_window")?;
    let activation = super::activation(keys, "hidden_act", Activation::Silu)?;
    let inner = keys.size("intermediate_size")?;
    let hidden = decoder.hidden_size;
    let qkv = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim;
    // Phi-4 mini's file has these, with the one value that means nothing.
    keys.only("full_attn_mod", &Value::from(1))?;
    keys.only("interpolate_factor", &Value::from(1))?;
    decoder.build(|index| {
        let name = format!("model.layers.{index}");
        let stored = |part: &str, inputs, outputs| {
            LinearSpec::stored(&format!("{name}.{part}"), inputs, outputs, false)
        };
        let mut attention = decoder.attention(&format!("{name}.self_attn"), false);
        // In the file as in the description: queries, keys, values.
        attention.qkv = stored("self_attn.qkv_proj", hidden, qkv);
        attention.window = decoder.window(window);
        let mlp = DenseMlp {
            activation,
            gated: true,
            up: stored("mlp.gate_up_proj", hidden, 2 * inner),
            down: stored("mlp.down_proj", inner, hidden),
        };
        decoder.layer(&name, attention, mlp)
    })
}
