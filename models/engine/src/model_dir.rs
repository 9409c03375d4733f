//! A checkpoint directory in Hugging Face's layout, as far as text and limits go (weights are the engine's business).
//!
//! ```text
//! config.json             model_type, architectures, max_position_embeddings, vocab_size, token ids     required
//! tokenizer.json          the tokenizer                                                                required
//! tokenizer_config.json   names of the special tokens, the chat template                               optional
//! chat_template.jinja     the chat template; wins over the one above                                   optional
//! generation_config.json  end-of-sequence ids, default sampling                                        optional
//! ```
//!
//! Invariant: a file that is absent may be fine, one that is there and cannot be understood never is.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

/// Why a directory is not a checkpoint that can be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelDirError {
    #[error("model directory {path} does not exist; check the model's path in the configuration")]
    NoDirectory { path: PathBuf },
    #[error(
        "{path} is a file; the model's path must be the directory that holds config.json and tokenizer.json"
    )]
    NotADirectory { path: PathBuf },
    #[error("{path} is missing: {purpose}; copy it from where the checkpoint came from")]
    Missing {
        path: PathBuf,
        purpose: &'static str,
    },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not valid: {source}; the file may be truncated, copy it again")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{path} lacks {key}, {purpose}")]
    Key {
        path: PathBuf,
        key: &'static str,
        purpose: &'static str,
    },
}

/// `generation_config.json`: what to use where a request says nothing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationDefaults {
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<u32>,
    eos_token_id: Option<TokenIds>,
}

/// What the directory says of its model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelDir {
    pub path: PathBuf,
    /// Such as `llama`.
    pub model_type: String,
    /// Such as `LlamaForCausalLM`.
    pub architecture: String,
    /// `max_position_embeddings`: prompt plus output tokens at most.
    pub context_length: usize,
    pub vocab_size: Option<usize>,
    /// Of `generation_config.json`, else of `config.json`; may be empty.
    pub eos_token_ids: Vec<u32>,
    pub generation: GenerationDefaults,
}

/// One id or several, as checkpoints have it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
struct Config {
    model_type: Option<String>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    /// GPT-2's name for it is the other one.
    #[serde(alias = "n_positions")]
    max_position_embeddings: Option<usize>,
    vocab_size: Option<usize>,
    eos_token_id: Option<TokenIds>,
}

impl ModelDir {
    /// Reads `config.json` and `generation_config.json`.
    ///
    /// # Errors
    /// [`ModelDirError`], which says what is missing.
    pub fn open(path: &Path) -> Result<Self, ModelDirError> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(ModelDirError::NotADirectory {
                    path: path.to_owned(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ModelDirError::NoDirectory {
                    path: path.to_owned(),
                });
            }
            Err(source) => {
                return Err(ModelDirError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        }
        let config_path = path.join("config.json");
        let config: Config = read_json(&config_path)?.ok_or_else(|| ModelDirError::Missing {
            path: config_path.clone(),
            purpose: "it says what kind of model this is",
        })?;
        let key = |key, purpose| ModelDirError::Key {
            path: config_path.clone(),
            key,
            purpose,
        };
        let generation: GenerationDefaults =
            read_json(&path.join("generation_config.json"))?.unwrap_or_default();
        let eos = generation.eos_token_id.clone().or(config.eos_token_id);
        Ok(Self {
            path: path.to_owned(),
            architecture: config
                .architectures
                .and_then(|names| names.into_iter().next())
                .ok_or_else(|| key("architectures", "the name of the model's architecture"))?,
            model_type: config
                .model_type
                .ok_or_else(|| key("model_type", "the model's family"))?,
            context_length: config
                .max_position_embeddings
                .filter(|&length| length > 0)
                .ok_or_else(|| {
                    key(
                        "max_position_embeddings",
                        "the length of the model's context",
                    )
                })?,
            vocab_size: config.vocab_size,
            eos_token_ids: eos.map(TokenIds::into_vec).unwrap_or_default(),
            generation,
        })
    }

    /// Where the tokenizer is.
    #[must_use]
    pub fn tokenizer_path(&self) -> PathBuf {
        self.path.join("tokenizer.json")
    }

    /// SHA-256 of the tokenizer file in hexadecimal: part of the fingerprint, since other text means other tokens.
    ///
    /// # Errors
    /// [`ModelDirError::Missing`], [`ModelDirError::Read`].
    pub fn tokenizer_hash(&self) -> Result<String, ModelDirError> {
        let path = self.tokenizer_path();
        let Some(bytes) = read_optional(&path)? else {
            return Err(ModelDirError::Missing {
                path,
                purpose: "it turns text into token ids",
            });
        };
        Ok(Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect())
    }

    /// The chat template and the special tokens that it may print. Both may be absent.
    ///
    /// # Errors
    /// If a file is there and cannot be understood.
    pub fn chat_files(&self) -> Result<ChatFiles, ModelDirError> {
        let mut files: ChatFiles =
            read_json(&self.path.join("tokenizer_config.json"))?.unwrap_or_default();
        let path = self.path.join("chat_template.jinja");
        if let Some(bytes) = read_optional(&path)? {
            let text = String::from_utf8(bytes).map_err(|error| ModelDirError::Read {
                path,
                source: io::Error::new(io::ErrorKind::InvalidData, error),
            })?;
            files.chat_template = Some(TemplateField::One(text));
        }
        Ok(files)
    }
}

/// What `tokenizer_config.json` says that chats need.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ChatFiles {
    chat_template: Option<TemplateField>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
}

/// One template, or several by name.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Clone, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// A token's text, or an object that holds it.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl ChatFiles {
    /// The template to use: the only one, or the one named `default`.
    #[must_use]
    pub fn template(&self) -> Option<&str> {
        match self.chat_template.as_ref()? {
            TemplateField::One(text) => Some(text),
            TemplateField::Named(all) => all
                .iter()
                .find(|named| named.name == "default")
                .map(|named| named.template.as_str()),
        }
    }

    /// Special tokens by the names under which templates know them.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("pad_token", &self.pad_token),
            ("unk_token", &self.unk_token),
        ];
        all.into_iter()
            .filter_map(|(name, token)| match token.as_ref()? {
                SpecialToken::Text(text) | SpecialToken::Object { content: text } => {
                    Some((name, text.as_str()))
                }
            })
    }
}

/// Reads a file that may be absent.
fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, ModelDirError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelDirError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, ModelDirError> {
    let Some(bytes) = read_optional(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| ModelDirError::Json {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests;
