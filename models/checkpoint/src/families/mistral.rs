//! Mistral: Llama without biases, whose every layer sees a window.

use super::{Decoder, Defaults, gated_mlp};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{Activation, ModelSpec};

/// The window where the key is absent; null is none.
const WINDOW: usize = 4096;

pub(super) fn spec(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(
        keys,
        &Defaults {
            kv_heads: Some(8),
            positions: 4096 * 32,
            ..Defaults::default()
        },
    )?;
    let window = match keys.raw("sliding_window") {
        None => Some(WINDOW),
        Some(_) => keys.size_if("sliding_window")?,
    };
    let activation = super::activation(keys, "hidden_act", Activation::Silu)?;
    let inner = keys.size("intermediate_size")?;
    decoder.build(|index| {
        let name = format!("model.layers.{index}");
        let mut attention = decoder.attention(&format!("{name}.self_attn"), false);
        attention.window = decoder.window(window);
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
