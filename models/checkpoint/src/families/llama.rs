//! Llama 2 and 3, SmolLM, and everything else that calls itself `LlamaForCausalLM`.

use super::{Decoder, gated_mlp};
use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{Activation, ModelSpec};

pub(super) fn spec(keys: &Keys<'_>) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(keys)?;
    let attention_bias = keys.flag_or("attention_bias", false)?;
    let mlp_bias = keys.flag_or("mlp_bias", false)?;
    let activation = super::activation(keys, "hidden_act", Activation::Silu)?;
    let inner = keys.size("intermediate_size")?;
    decoder.build(|index| {
        let name = format!("model.layers.{index}");
        let attention = decoder.attention(&format!("{name}.self_attn"), attention_bias);
        decoder.layer(
            &name,
            attention,
            gated_mlp(
                &format!("{name}.mlp"),
                decoder.hidden_size,
                inner,
                mlp_bias,
                activation,
            ),
        )
    })
}
