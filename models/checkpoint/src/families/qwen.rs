//! Qwen 2, 2.5 and 3: Llama with biases of its own, norms of heads (3), and a window for the upper layers when `use_sliding_window` says so.

use super::{Decoder, Defaults, gated_mlp, sliding_layers};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{Activation, AttentionSpec, ModelSpec};

/// The window where only `use_sliding_window` is set.
const WINDOW: usize = 4096;
/// `max_window_layers` where it is absent.
const WINDOW_FROM_LAYER: usize = 28;

pub(super) fn defaults() -> Defaults {
    Defaults {
        kv_heads: Some(32),
        positions: 32_768,
        ..Defaults::default()
    }
}

/// Qwen 2 and 2.5: a bias in the query, key and value maps, whatever the file says, and none in the output's.
pub(super) fn qwen2(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(keys, &defaults())?;
    dense(keys, &decoder, |name| {
        let mut attention = decoder.attention(name, true);
        attention.output.bias.clear();
        attention
    })
}

/// Qwen 3: each head's queries and keys are normalised before they turn.
pub(super) fn qwen3(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(
        keys,
        &Defaults {
            head_dim: Some(128),
            ..defaults()
        },
    )?;
    let bias = keys.flag_or("attention_bias", false)?;
    dense(keys, &decoder, |name| {
        normed_attention(&decoder, name, bias)
    })
}

/// Attention with a norm of each head's queries and keys.
pub(super) fn normed_attention(decoder: &Decoder, name: &str, bias: bool) -> AttentionSpec {
    let mut attention = decoder.attention(name, bias);
    attention.q_norm = Some(decoder.norm(&format!("{name}.q_norm"), decoder.head_dim));
    attention.k_norm = Some(decoder.norm(&format!("{name}.k_norm"), decoder.head_dim));
    attention
}

/// The window, if windows are used at all: old files have a number that counts only with `use_sliding_window`.
pub(super) fn window(keys: &Keys<'_>) -> Result<Option<usize>, ConfigError> {
    let used = keys.flag_or("use_sliding_window", false)?;
    // Whatever stands there otherwise, even 0.
    match keys.raw("sliding_window") {
        _ if !used => Ok(None),
        None => Ok(Some(WINDOW)),
        Some(_) => keys.size_if("sliding_window"),
    }
}

fn dense(
    keys: &Keys<'_>,
    decoder: &Decoder,
    attention: impl Fn(&str) -> AttentionSpec,
) -> Result<ModelSpec, ConfigError> {
    let window = window(keys)?;
    let from = match keys
        .get("max_window_layers")
        .and_then(serde_json::Value::as_u64)
    {
        // 0 is a value here: all layers.
        Some(0) => 0,
        _ => keys.size_or("max_window_layers", WINDOW_FROM_LAYER)?,
    };
    let sliding = sliding_layers(keys, decoder.layers, |layer| {
        window.is_some() && layer >= from
    })?;
    let activation = super::activation(keys, "hidden_act", Activation::Silu)?;
    let inner = keys.size("intermediate_size")?;
    decoder.build(|index| {
        let name = format!("model.layers.{index}");
        let mut attention = attention(&format!("{name}.self_attn"));
        attention.window = decoder.window(window.filter(|_| sliding[index]));
        let mlp = gated_mlp(
            &format!("{name}.mlp"),
            decoder.hidden_size,
            inner,
            false,
            activation,
        );
        decoder.layer(&name, attention, mlp)
    })
}
