//! Why a `config.json` cannot be used.

use std::path::PathBuf;

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read model configuration {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The text is not a JSON object.
    #[error("model configuration is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A key that every checkpoint of the family has is absent.
    #[error(
        "model configuration lacks the key \"{key}\"; is this the config.json of a {family} checkpoint?"
    )]
    Missing { key: String, family: String },
    /// A value of the wrong type or out of its range.
    #[error("model configuration has {key} = {value}; {expected} was expected")]
    Value {
        key: String,
        value: String,
        expected: &'static str,
    },
    /// A value that is well formed but outside of what this engine computes.
    #[error(
        "model configuration has {key} = {value}, which this engine does not support; supported: {supported}"
    )]
    Unsupported {
        key: String,
        value: String,
        supported: String,
    },
    /// A key that nobody here knows: it may change the mathematics.
    #[error(
        "model configuration has {key} = {value}, a key that this engine does not know for {family}; it may change what the model computes, so it is not ignored. If it does not, remove it from config.json"
    )]
    Unknown {
        key: String,
        value: String,
        family: String,
    },
    /// Sizes that contradict each other.
    #[error("model configuration contradicts itself: {0}")]
    Inconsistent(String),
}
