//! Why a tensor of a checkpoint cannot become a part of the model.

use std::collections::BTreeSet;

use crate::config::LlamaConfig;

/// Why one tensor cannot be used, or why one that is there must not be left out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error(
        "the checkpoint lacks the tensor \"{0}\"; its files are incomplete or of another model"
    )]
    Missing(String),
    #[error(
        "tensor \"{0}\" is quantized in this checkpoint (GPTQ, AWQ or a relative), which this engine does not support; use the f32, bf16 or f16 weights"
    )]
    Quantized(String),
    #[error("tensor \"{name}\" has shape {found:?}, but config.json implies {expected:?}")]
    Shape {
        name: String,
        expected: Vec<i64>,
        found: Vec<i64>,
    },
    #[error("tensor \"{name}\" is stored as {dtype}; supported: F32, BF16, F16")]
    Dtype { name: String, dtype: String },
    /// Left out, it would make another model than the one that was trained.
    #[error(
        "the checkpoint holds the tensor \"{name}\", which the model of its config.json does not use: {reason}"
    )]
    Unused { name: String, reason: String },
}

/// The first of a checkpoint's tensors that nobody asked for and that means something.
///
/// # Errors
/// [`TensorError::Unused`], with the key of `config.json` that would explain it.
pub fn check_all_used<'a>(
    names: impl IntoIterator<Item = &'a str>,
    asked: &BTreeSet<String>,
    config: &LlamaConfig,
) -> Result<(), TensorError> {
    let unused = names
        .into_iter()
        .find(|name| !asked.contains(*name) && !means_nothing(name, config));
    match unused {
        None => Ok(()),
        Some(name) => Err(TensorError::Unused {
            name: name.to_owned(),
            reason: explanation(name, config),
        }),
    }
}

/// What old checkpoints carry along and every loader drops: rotary frequencies, which follow from the configuration, and a copy of the
/// embedding where it is the head.
fn means_nothing(name: &str, config: &LlamaConfig) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || (name == "lm_head.weight" && config.tie_word_embeddings)
}

fn explanation(name: &str, config: &LlamaConfig) -> String {
    let layer = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let layers = config.num_hidden_layers;
    if layer.is_some_and(|layer| layer >= layers) {
        return format!("num_hidden_layers is {layers}; is it too small?");
    }
    let key = if name.ends_with(".bias") && name.contains(".self_attn.") {
        "attention_bias is false; should it be true?"
    } else if name.ends_with(".bias") && name.contains(".mlp.") {
        "mlp_bias is false; should it be true?"
    } else if ["_scale", ".scales", ".qzeros", ".g_idx", "_zero_point"]
        .iter()
        .any(|part| name.contains(part))
    {
        "it belongs to quantized weights (quantization_config), which this engine does not support; use the f32, bf16 or f16 weights"
    } else {
        "architectures and model_type say Llama, which has no such tensor; are they another model's?"
    };
    key.to_owned()
}
