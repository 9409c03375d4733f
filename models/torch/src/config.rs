//! `config.json` of a Llama-architecture checkpoint, as transformers 4 and 5 write it.
//!
//! Invariant: a [`LlamaConfig`] that exists is one that [`crate::llama::Llama`] computes correctly. What this
//! crate cannot compute (another model family, an unknown activation or RoPE scaling, sizes that do not divide)
//! is refused here with a message that names the key.

mod rope;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

pub use rope::RopeScaling;
use rope::rope_of;

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read model configuration {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The text is not JSON, or a key has the wrong type.
    #[error("model configuration is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A key that every Llama checkpoint has is absent.
    #[error(
        "model configuration lacks the key \"{0}\"; is this the config.json of a Llama checkpoint?"
    )]
    Missing(&'static str),
    /// A value that is well formed but outside of what this engine computes.
    #[error(
        "model configuration has {key} = {value}, which this engine does not support; supported: {supported}"
    )]
    Unsupported {
        key: &'static str,
        value: String,
        supported: &'static str,
    },
    /// Sizes that contradict each other.
    #[error("model configuration contradicts itself: {0}")]
    Inconsistent(String),
}

/// What this engine computes.
const ARCHITECTURE: &str = "LlamaForCausalLM";

/// Element type in which the checkpoint says its weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    F32,
    Bf16,
    F16,
}

/// The architecture of one Llama checkpoint; sizes are in elements.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub num_key_value_heads: i64,
    pub head_dim: i64,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub bos_token_id: Option<u32>,
    /// Every id that ends a text; empty when the file names none.
    pub eos_token_ids: Vec<u32>,
    /// `None` when the file does not say; the tensors themselves always do.
    pub weight_type: Option<WeightType>,
}

/// transformers writes one id, a list, or null.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// The keys as they stand in the file; all optional, so that absence gets our own message.
#[derive(Deserialize)]
struct RawConfig {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<i64>,
    hidden_size: Option<i64>,
    intermediate_size: Option<i64>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<i64>,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    /// transformers 4: absent, null, or the scaling rule.
    rope_scaling: Option<Value>,
    /// transformers 5: theta and the scaling rule together.
    rope_parameters: Option<Value>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    bos_token_id: Option<OneOrMany>,
    eos_token_id: Option<OneOrMany>,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    quantization_config: Option<Value>,
}

impl LlamaConfig {
    /// Reads and checks `path`, a checkpoint's `config.json`.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_json(&text)
    }

    /// Parses and checks the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = serde_json::from_str(text)?;
        check_family(&raw)?;
        let num_attention_heads = required(raw.num_attention_heads, "num_attention_heads")?;
        let hidden_size = required(raw.hidden_size, "hidden_size")?;
        let (rope_theta, rope_scaling) = rope_of(&raw)?;
        let config = Self {
            vocab_size: required(raw.vocab_size, "vocab_size")?,
            hidden_size,
            intermediate_size: required(raw.intermediate_size, "intermediate_size")?,
            num_hidden_layers: required(raw.num_hidden_layers, "num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads.unwrap_or(num_attention_heads),
            head_dim: raw
                .head_dim
                .unwrap_or(hidden_size / num_attention_heads.max(1)),
            max_position_embeddings: raw.max_position_embeddings.unwrap_or(2048),
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            attention_bias: raw.attention_bias.unwrap_or(false),
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            bos_token_id: ids(raw.bos_token_id).first().copied(),
            eos_token_ids: ids(raw.eos_token_id),
            weight_type: weight_type(raw.dtype.or(raw.torch_dtype))?,
        };
        config.check_sizes()?;
        Ok(config)
    }

    /// The file's text, in spellings that transformers 4 and 5 both read.
    pub fn to_json(&self) -> String {
        let dtype = match self.weight_type {
            Some(WeightType::Bf16) => "bfloat16",
            Some(WeightType::F16) => "float16",
            _ => "float32",
        };
        let mut value = json!({
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids,
            "torch_dtype": dtype,
        });
        match &self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                value["rope_scaling"] = json!({"rope_type": "linear", "factor": factor});
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                value["rope_scaling"] = json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                });
            }
        }
        format!("{value:#}\n")
    }

    fn check_sizes(&self) -> Result<(), ConfigError> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers as i64),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            (
                "max_position_embeddings",
                self.max_position_embeddings as i64,
            ),
        ];
        for (key, value) in positive {
            // 2^31 bounds every product of two sizes within i64.
            if !(1..=i64::from(i32::MAX)).contains(&value) {
                return Err(ConfigError::Inconsistent(format!(
                    "{key} = {value} is not a positive 31-bit number"
                )));
            }
        }
        if self.num_attention_heads % self.num_key_value_heads != 0 {
            return Err(ConfigError::Inconsistent(format!(
                "num_attention_heads = {} is not a multiple of num_key_value_heads = {}",
                self.num_attention_heads, self.num_key_value_heads
            )));
        }
        if self.head_dim % 2 != 0 {
            return Err(ConfigError::Inconsistent(format!(
                "head_dim = {} is odd; rotary embedding turns pairs",
                self.head_dim
            )));
        }
        let finite_positive = |x: f64| x.is_finite() && x > 0.0;
        if !finite_positive(self.rms_norm_eps) || !finite_positive(self.rope_theta) {
            return Err(ConfigError::Inconsistent(format!(
                "rms_norm_eps = {} and rope_theta = {} must be positive",
                self.rms_norm_eps, self.rope_theta
            )));
        }
        Ok(())
    }
}

fn required<T>(value: Option<T>, key: &'static str) -> Result<T, ConfigError> {
    value.ok_or(ConfigError::Missing(key))
}

fn ids(value: Option<OneOrMany>) -> Vec<u32> {
    match value {
        None => Vec::new(),
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) => ids,
    }
}

fn check_family(raw: &RawConfig) -> Result<(), ConfigError> {
    let family = raw
        .model_type
        .as_deref()
        .ok_or(ConfigError::Missing("model_type"))?;
    if family != "llama" {
        return Err(ConfigError::Unsupported {
            key: "model_type",
            value: format!("\"{family}\""),
            supported: "\"llama\"",
        });
    }
    // One model type has several architectures: with a classifier on top, or without a head.
    let architecture = raw.architectures.iter().flatten().next();
    if let Some(other) = architecture.filter(|name| *name != ARCHITECTURE) {
        return Err(ConfigError::Unsupported {
            key: "architectures",
            value: format!("\"{other}\""),
            supported: "\"LlamaForCausalLM\", a decoder with a language-model head",
        });
    }
    match raw.hidden_act.as_deref() {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(ConfigError::Unsupported {
                key: "hidden_act",
                value: format!("\"{other}\""),
                supported: "\"silu\"",
            });
        }
    }
    if raw
        .quantization_config
        .as_ref()
        .is_some_and(|q| !q.is_null())
    {
        return Err(ConfigError::Unsupported {
            key: "quantization_config",
            value: "(set)".to_owned(),
            supported: "checkpoints in f32, bf16 or f16",
        });
    }
    Ok(())
}

fn weight_type(name: Option<String>) -> Result<Option<WeightType>, ConfigError> {
    match name.as_deref() {
        None => Ok(None),
        Some("float32") => Ok(Some(WeightType::F32)),
        Some("bfloat16") => Ok(Some(WeightType::Bf16)),
        Some("float16") => Ok(Some(WeightType::F16)),
        Some(other) => Err(ConfigError::Unsupported {
            key: "torch_dtype",
            value: format!("\"{other}\""),
            supported: "\"float32\", \"bfloat16\", \"float16\"",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const V4: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":100,"hidden_size":64,
        "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,
        "max_position_embeddings":128,"rms_norm_eps":1e-5,"rope_theta":5000.0,"rope_scaling":null,
        "tie_word_embeddings":true,"bos_token_id":1,"eos_token_id":[2,3],"torch_dtype":"bfloat16"}"#;

    pub(super) fn with(key: &str, value: Value) -> String {
        let mut config: Value = serde_json::from_str(V4).unwrap();
        config[key] = value;
        config.to_string()
    }

    fn without(key: &str) -> String {
        let mut config: Value = serde_json::from_str(V4).unwrap();
        config.as_object_mut().unwrap().remove(key);
        config.to_string()
    }

    #[test]
    fn reads_transformers_4() {
        let config = LlamaConfig::from_json(V4).unwrap();
        assert_eq!(config.head_dim, 16);
        assert_eq!(config.num_key_value_heads, 2);
        assert_eq!(config.rope_theta, 5000.0);
        assert_eq!(config.eos_token_ids, [2, 3]);
        assert_eq!(config.weight_type, Some(WeightType::Bf16));
        assert!(config.tie_word_embeddings && !config.attention_bias);
    }

    #[test]
    fn reads_transformers_5() {
        let mut value: Value = serde_json::from_str(&without("rope_theta")).unwrap();
        value["rope_parameters"] = json!({"rope_theta": 7000.0, "rope_type": "default"});
        value["dtype"] = json!("float32");
        value["head_dim"] = json!(32);
        value["eos_token_id"] = json!(9);
        let config = LlamaConfig::from_json(&value.to_string()).unwrap();
        assert_eq!(config.rope_theta, 7000.0);
        assert_eq!(config.weight_type, Some(WeightType::F32));
        assert_eq!(config.head_dim, 32);
        assert_eq!(config.eos_token_ids, [9]);
    }

    #[test]
    fn absent_optional_keys_take_transformers_defaults() {
        let config = LlamaConfig::from_json(&without("num_key_value_heads")).unwrap();
        assert_eq!(config.num_key_value_heads, 4);
        let config = LlamaConfig::from_json(&without("eos_token_id")).unwrap();
        assert!(config.eos_token_ids.is_empty());
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut config = LlamaConfig::from_json(V4).unwrap();
        assert_eq!(LlamaConfig::from_json(&config.to_json()).unwrap(), config);
        config.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        assert_eq!(LlamaConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn refusals_name_the_key() {
        let cases = [
            (with("model_type", json!("mistral")), "model_type"),
            (without("model_type"), "model_type"),
            (
                with("architectures", json!(["LlamaForSequenceClassification"])),
                "architectures",
            ),
            (without("hidden_size"), "hidden_size"),
            (with("hidden_act", json!("gelu")), "hidden_act"),
            (with("num_key_value_heads", json!(3)), "num_key_value_heads"),
            (with("num_key_value_heads", json!(0)), "num_key_value_heads"),
            (with("num_attention_heads", json!(0)), "num_attention_heads"),
            (with("vocab_size", json!(-5)), "vocab_size"),
            (with("head_dim", json!(7)), "head_dim"),
            (with("rms_norm_eps", json!(0.0)), "rms_norm_eps"),
            (with("torch_dtype", json!("float8")), "torch_dtype"),
            (
                with("quantization_config", json!({"bits": 4})),
                "quantization_config",
            ),
            (
                with("rope_scaling", json!({"rope_type": "yarn"})),
                "rope_type",
            ),
            (with("rope_scaling", json!({"type": "linear"})), "factor"),
        ];
        for (text, key) in cases {
            let error = LlamaConfig::from_json(&text).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
        assert!(LlamaConfig::from_json("{").is_err());
        assert!(LlamaConfig::from_json("[1]").is_err());
    }
}
