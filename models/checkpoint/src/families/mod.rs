//! Model families: one file each, which turns a `config.json` into a [`ModelSpec`].
//!
//! Invariant: a description that is returned is one that executors compute correctly. What a family's file says that has no place in a
//! description is refused with a message that names the key; nothing is dropped ([`Keys::finish`]).

mod bert;
mod decoder;
mod gemma;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod moe;
mod phi3;
mod qwen;
mod smollm3;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::ConfigError;
use crate::keys::Keys;
use crate::spec::{Activation, DenseMlp, LinearSpec, MlpSpec, ModelSpec, WeightType};
use decoder::{Decoder, Defaults};

/// Layers at most: far beyond every model, and few enough that a hostile number allocates little.
const MAX_LAYERS: usize = 4096;

type Read = fn(&Keys<'_>) -> Result<ModelSpec, ConfigError>;

/// Architecture (in `architectures`), its `model_type`, and the function that reads it.
const FAMILIES: &[(&str, &str, Read)] = &[
    ("LlamaForCausalLM", "llama", llama::spec),
    ("MistralForCausalLM", "mistral", mistral::spec),
    ("MixtralForCausalLM", "mixtral", moe::mixtral),
    ("Qwen2ForCausalLM", "qwen2", qwen::qwen2),
    ("Qwen3ForCausalLM", "qwen3", qwen::qwen3),
    ("Qwen3MoeForCausalLM", "qwen3_moe", moe::qwen3),
    ("Gemma2ForCausalLM", "gemma2", gemma::gemma2),
    ("Gemma3ForCausalLM", "gemma3_text", gemma::gemma3),
    ("Phi3ForCausalLM", "phi3", phi3::spec),
    ("SmolLM3ForCausalLM", "smollm3", smollm3::spec),
    ("GPT2LMHeadModel", "gpt2", gpt2::spec),
    ("GPTNeoXForCausalLM", "gpt_neox", gpt_neox::spec),
    ("BertModel", "bert", bert::bert),
    ("BertForMaskedLM", "bert", bert::bert),
    ("BertForPreTraining", "bert", bert::bert),
    ("BertForSequenceClassification", "bert", bert::bert),
    ("RobertaModel", "roberta", bert::roberta),
    ("RobertaForMaskedLM", "roberta", bert::roberta),
    ("RobertaForSequenceClassification", "roberta", bert::roberta),
    ("XLMRobertaModel", "xlm-roberta", bert::roberta),
    ("XLMRobertaForMaskedLM", "xlm-roberta", bert::roberta),
    (
        "XLMRobertaForSequenceClassification",
        "xlm-roberta",
        bert::roberta,
    ),
];

/// Architectures that are asked for and refused, with the reason.
const REFUSED: &[(&str, &str)] = &[(
    "Gemma3ForConditionalGeneration",
    "it reads images too; use a text-only checkpoint (Gemma3ForCausalLM)",
)];

/// Reads and checks `config.json` in a checkpoint's directory.
///
/// # Errors
/// [`ConfigError`], which names the file or the key.
pub fn read(directory: &Path) -> Result<ModelSpec, ConfigError> {
    read_within(directory, None)
}

/// The same for a model that is run with at most `positions` positions; `None` for all that the file allows.
///
/// # Errors
/// [`ConfigError`], which names the file or the key.
pub fn read_within(directory: &Path, positions: Option<usize>) -> Result<ModelSpec, ConfigError> {
    let path = directory.join("config.json");
    match std::fs::read_to_string(&path) {
        Ok(text) => from_json_within(&text, positions),
        Err(source) => Err(ConfigError::Read { path, source }),
    }
}

/// Parses and checks the text of a `config.json`.
///
/// # Errors
/// [`ConfigError`], which names the key.
pub fn from_json(text: &str) -> Result<ModelSpec, ConfigError> {
    from_json_within(text, None)
}

/// The same for a model that is run with at most `positions` positions.
///
/// # Errors
/// [`ConfigError`], which names the key.
pub fn from_json_within(text: &str, positions: Option<usize>) -> Result<ModelSpec, ConfigError> {
    let map: Map<String, Value> = serde_json::from_str(text)?;
    let (family, read) = family_of(&Keys::new("supported", &map))?;
    let keys = Keys::new(family, &map).within(positions);
    if keys.get("quantization_config").is_some() {
        return Err(ConfigError::Unsupported {
            key: "quantization_config".to_owned(),
            value: "(set)".to_owned(),
            supported: "checkpoints in f32, bf16 or f16; GPTQ, AWQ and their relatives are not computed here".to_owned(),
        });
    }
    let spec = read(&keys)?;
    keys.finish()?;
    Ok(spec)
}

/// Names of all architectures that can be read.
pub fn supported() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(architecture, _, _)| *architecture)
}

/// By the architecture, or, if the file has none, the first of its `model_type`; the two must agree.
fn family_of(keys: &Keys<'_>) -> Result<(&'static str, Read), ConfigError> {
    let architecture = first_architecture(keys)?;
    let model_type = keys.text_if("model_type")?;
    let found = FAMILIES
        .iter()
        .find(|(name, family, _)| match architecture {
            Some(architecture) => *name == architecture,
            None => Some(*family) == model_type,
        });
    let (name, family, read) = match (found, architecture, model_type) {
        (Some(found), _, _) => *found,
        (None, Some(name), _) => return Err(unknown_architecture(name)),
        (None, None, Some(_)) => return Err(keys.unsupported("model_type", &families())),
        (None, None, None) => {
            return Err(ConfigError::Missing {
                key: "architectures".to_owned(),
                family: "supported".to_owned(),
            });
        }
    };
    match model_type {
        Some(other) if other != family => Err(ConfigError::Unsupported {
            key: "model_type".to_owned(),
            value: format!("\"{other}\""),
            supported: format!("\"{family}\" for {name}"),
        }),
        Some(_) => Ok((family, read)),
        None => Err(ConfigError::Missing {
            key: "model_type".to_owned(),
            family: family.to_owned(),
        }),
    }
}

fn unknown_architecture(name: &str) -> ConfigError {
    let reason = REFUSED.iter().find(|(refused, _)| *refused == name);
    ConfigError::Unsupported {
        key: "architectures".to_owned(),
        value: format!("\"{name}\""),
        supported: match reason {
            Some((_, reason)) => {
                format!("{}; {reason}", supported().collect::<Vec<_>>().join(", "))
            }
            None => supported().collect::<Vec<_>>().join(", "),
        },
    }
}

fn families() -> String {
    let mut families: Vec<&str> = FAMILIES.iter().map(|(_, family, _)| *family).collect();
    families.dedup();
    families.join(", ")
}

fn first_architecture<'a>(keys: &Keys<'a>) -> Result<Option<&'a str>, ConfigError> {
    let Some(first) = keys.list_if("architectures")?.and_then(|list| list.first()) else {
        return Ok(None);
    };
    let name = first.as_str();
    name.map(Some)
        .ok_or_else(|| keys.unsupported("architectures", "a list of names"))
}

/// The architecture's name, for the description; the first of its family if the file has none.
fn architecture(keys: &Keys<'_>) -> Result<String, ConfigError> {
    let of_family = || {
        let mut all = FAMILIES.iter();
        all.find(|(_, family, _)| *family == keys.family())
            .map_or("", |(name, _, _)| name)
    };
    Ok(first_architecture(keys)?
        .unwrap_or_else(of_family)
        .to_owned())
}

/// Positions that the model is run with: what the file allows, and what the caller wants.
fn context_length(keys: &Keys<'_>, positions: usize) -> usize {
    keys.context_limit()
        .map_or(positions, |limit| limit.min(positions))
}

/// A number of layers that can be described without harm.
fn check_layers(key: &str, layers: usize) -> Result<usize, ConfigError> {
    if layers > MAX_LAYERS {
        return Err(ConfigError::Inconsistent(format!(
            "{key} = {layers}; no model has more than {MAX_LAYERS} layers"
        )));
    }
    Ok(layers)
}

/// Elements of a head where no key says so.
fn head_dim(hidden_size: usize, heads: usize, key: &str) -> Result<usize, ConfigError> {
    if !hidden_size.is_multiple_of(heads) {
        return Err(ConfigError::Inconsistent(format!(
            "the hidden size {hidden_size} is not a multiple of {key} = {heads}, and there is no head_dim"
        )));
    }
    Ok(hidden_size / heads)
}

/// The element type that the file names, in `dtype` (transformers 5) or `torch_dtype`.
fn weight_type(keys: &Keys<'_>) -> Result<Option<WeightType>, ConfigError> {
    let (new, old) = (keys.text_if("dtype")?, keys.text_if("torch_dtype")?);
    let key = if new.is_some() {
        "dtype"
    } else {
        "torch_dtype"
    };
    match new.or(old) {
        None => Ok(None),
        Some("float32") => Ok(Some(WeightType::F32)),
        Some("bfloat16") => Ok(Some(WeightType::Bf16)),
        Some("float16") => Ok(Some(WeightType::F16)),
        Some(_) => Err(keys.unsupported(key, "\"float32\", \"bfloat16\", \"float16\"")),
    }
}

/// The activation that `key` names.
fn activation(keys: &Keys<'_>, key: &str, default: Activation) -> Result<Activation, ConfigError> {
    match keys.text_if(key)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu") => Ok(Activation::GeluErf),
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_tanh" | "gelu_fast" | "gelu_python_tanh") => {
            Ok(Activation::GeluTanh)
        }
        Some("relu") => Ok(Activation::Relu),
        Some(_) => Err(keys.unsupported(
            key,
            "\"silu\", \"gelu\", \"gelu_new\", \"gelu_pytorch_tanh\", \"gelu_fast\", \"relu\"",
        )),
    }
}

/// Which layers have a window: what `layer_types` says, or the family's rule.
fn sliding_layers(
    keys: &Keys<'_>,
    layers: usize,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, ConfigError> {
    let Some(types) = keys.list_if("layer_types")? else {
        return Ok((0..layers).map(rule).collect());
    };
    let sliding: Option<Vec<bool>> = types
        .iter()
        .map(|name| match name.as_str() {
            Some("sliding_attention") => Some(true),
            Some("full_attention") => Some(false),
            _ => None,
        })
        .collect();
    sliding
        .filter(|sliding| sliding.len() == layers)
        .ok_or_else(|| {
            let supported = "\"full_attention\" or \"sliding_attention\" for each layer";
            keys.unsupported("layer_types", supported)
        })
}

/// `{name}.{gate,up,down}_proj`.
fn gated_mlp(
    name: &str,
    hidden_size: usize,
    inner: usize,
    bias: bool,
    activation: Activation,
) -> DenseMlp {
    let (gate, up) = (format!("{name}.gate_proj"), format!("{name}.up_proj"));
    DenseMlp {
        activation,
        gated: true,
        up: LinearSpec::stacked(&[(&gate, inner), (&up, inner)], hidden_size, bias),
        down: LinearSpec::stored(&format!("{name}.down_proj"), inner, hidden_size, bias),
    }
}

impl From<DenseMlp> for MlpSpec {
    fn from(mlp: DenseMlp) -> Self {
        Self::Dense(mlp)
    }
}
