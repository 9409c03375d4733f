//! SmolLM3: Llama, some of whose layers have no rotary embedding.

use super::{Decoder, Defaults, gated_mlp, sliding_layers};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{Activation, ModelSpec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read_with(
        keys,
        &Defaults {
            tied: true,
            theta: 2e6,
            kv_heads: Some(4),
            positions: 32_768,
            ..Defaults::default()
        },
    )?;
    let turning = turning_layers(keys, decoder.layers)?;
    let windows = keys.flag_or("use_sliding_window", false)?;
    let window = keys.size_if("sliding_window")?.filter(|_| windows);
    let sliding = sliding_layers(keys, decoder.layers, |layer| {
        window.is_some() && !turning[layer]
    })?;
    let attention_bias = keys.flag_or("attention_bias", false)?;
    let mlp_bias = keys.flag_or("mlp_bias", false)?;
    let activation = super::activation(keys, "hidden_act", Activation::Silu)?;
    let inner = keys.size("intermediate_size")?;
    decoder.build(|index| {
        let name = format!("model.layers.{index}");
        let mut attention = decoder.attention(&format!("{name}.self_attn"), attention_bias);
        attention.window = decoder.window(window.filter(|_| sliding[index]));
        attention.rope = turning[index].then_some(0);
        let mlp = gated_mlp(
            &format!("{name}.mlp"),
            decoder.hidden_size,
            inner,
            mlp_bias,
            activation,
        );
        decoder.layer(&name, attention, mlp)
    })
}

/// Which layers turn. The list's name is the wrong way round: 1 is a layer with rotary embedding, 0 one without.
fn turning_layers(keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let key = "no_rope_layers";
    let interval = keys.size_or("no_rope_layer_interval", 4)?;
    let Some(list) = keys.list_if(key)? else {
        return Ok((0..layers)
            .map(|layer| !(layer + 1).is_multiple_of(interval))
            .collect());
    };
    let turning: Option<Vec<bool>> = list
        .iter()
        .map(|flag| {
            flag.as_u64()
                .filter(|flag| *flag <= 1)
                .map(|flag| flag == 1)
        })
        .collect();
    turning
        .filter(|turning| turning.len() >= layers)
        .ok_or_else(|| keys.unsupported(key, &format!("0 or 1 for each of {layers} layers")))
}
