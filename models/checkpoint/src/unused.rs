//! Tensors of a checkpoint that its description does not name.
//!
//! Invariant: one that means something is refused. Left out, it would make another model than the one that was trained, and nothing but its
//! nonsense would tell.

use std::collections::BTreeSet;

use crate::reader::Checkpoint;
use crate::spec::{ModelSpec, OutputSpec};
use crate::tensor_error::TensorError;

/// That every tensor of the checkpoint is one that the description names, or one that no loader uses.
///
/// # Errors
/// [`TensorError::Unused`] with the first one that is neither, and the key of `config.json` that would explain it.
pub fn check_all_used<'a>(
    names: impl IntoIterator<Item = &'a str>,
    spec: &ModelSpec,
) -> Result<(), TensorError> {
    let used: BTreeSet<String> = spec.tensors().into_iter().map(|(name, _)| name).collect();
    let unused = names
        .into_iter()
        .find(|name| !used.contains(*name) && !means_nothing(name, spec));
    match unused {
        None => Ok(()),
        Some(name) => Err(TensorError::Unused {
            name: name.to_owned(),
            reason: explanation(name, spec),
        }),
    }
}

/// That the checkpoint holds every tensor of the description in its shape, and none that means something besides: before anything is
/// computed from a size.
///
/// # Errors
/// [`TensorError`], naming the tensor.
pub fn check_tensors(checkpoint: &Checkpoint, spec: &ModelSpec) -> Result<(), TensorError> {
    for (name, shape) in &spec.tensors() {
        let shape: Vec<i64> = shape
            .iter()
            .map(|size| i64::try_from(*size).unwrap_or(i64::MAX))
            .collect();
        checkpoint.tensor(name, &shape)?;
    }
    check_all_used(checkpoint.names(), spec)
}

/// What checkpoints carry along and every loader drops: numbers that follow from the configuration, masks, a copy of the embedding where it
/// is the head, and what sits on top of an encoder whose hidden states are wanted.
fn means_nothing(name: &str, spec: &ModelSpec) -> bool {
    let follows = name.ends_with("rotary_emb.inv_freq") || name.ends_with("position_ids");
    let mask = [
        ".attn.bias",
        ".attn.masked_bias",
        ".attention.bias",
        ".attention.masked_bias",
    ]
    .iter()
    .any(|ending| name.ends_with(ending))
        && spec.architecture.starts_with("GPT");
    let on_top = match &spec.output {
        OutputSpec::Logits { head: None, .. } => {
            name == "lm_head.weight" || name == "embed_out.weight"
        }
        OutputSpec::Logits { .. } => false,
        // A pooler that is used has been found in the description.
        OutputSpec::Hidden { .. } => {
            name.starts_with("cls.")
                || name.starts_with("lm_head.")
                || name.contains("pooler.dense.")
        }
    };
    follows || mask || on_top
}

fn explanation(name: &str, spec: &ModelSpec) -> String {
    let layers = spec.layers.len();
    if layer_of(name).is_some_and(|layer| layer >= layers) {
        return format!("num_hidden_layers is {layers}; is it too small?");
    }
    let key = if QUANTIZED.iter().any(|part| name.contains(part)) {
        "it belongs to quantized weights (quantization_config: GPTQ, AWQ or a relative), which this engine does not support; use the f32, bf16 or f16 weights"
    } else if name.ends_with(".bias") && name.contains(".self_attn.") {
        "attention_bias is false; should it be true?"
    } else if name.ends_with(".bias") && name.contains(".mlp.") {
        "mlp_bias is false; should it be true?"
    } else {
        return format!(
            "architectures says {}, which has no such tensor; is it another model's?",
            spec.architecture
        );
    };
    key.to_owned()
}

/// Parts of names of packed weights.
const QUANTIZED: &[&str] = &[
    "_scale",
    ".scales",
    ".qweight",
    ".qzeros",
    ".g_idx",
    "_zero_point",
    "weight_packed",
];

/// The number of the layer that a tensor belongs to, whatever its family calls layers.
fn layer_of(name: &str) -> Option<usize> {
    let mut parts = name.split('.');
    parts.find(|part| matches!(*part, "layers" | "layer" | "h"))?;
    parts.next()?.parse().ok()
}
