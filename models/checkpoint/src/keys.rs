//! Reading `config.json` key by key, with account kept of which keys were understood.
//!
//! Invariant: a key that was not asked for, and is not on the list of those that cannot change the mathematics, is refused. A model whose
//! one odd key is dropped answers well at first and talks nonsense later, and nobody knows why.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::error::ConfigError;

/// Sizes are 31-bit numbers, so that every product of two is within 64 bits.
const LARGEST_SIZE: u64 = i32::MAX as u64;

/// Keys of any family that say nothing about what is computed at inference.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_implementation",
    "attn_pdrop",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "directionality",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "embedding_dropout",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "language_model_only",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_router_logits",
    "output_scores",
    "pad_token_id",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
    "predict_special_tokens",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "sep_token_id",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// The keys of one file.
pub struct Keys<'a> {
    family: &'a str,
    map: &'a Map<String, Value>,
    asked: RefCell<BTreeSet<String>>,
    context_limit: Option<usize>,
}

impl<'a> Keys<'a> {
    /// All keys of a `config.json`; `family` is for messages.
    #[must_use]
    pub fn new(family: &'a str, map: &'a Map<String, Value>) -> Self {
        Self {
            family,
            map,
            asked: RefCell::default(),
            context_limit: None,
        }
    }

    /// The same file for a model that is run with at most `positions` positions.
    #[must_use]
    pub fn within(mut self, positions: Option<usize>) -> Self {
        self.context_limit = positions;
        self
    }

    /// Positions that the caller wants at most.
    #[must_use]
    pub fn context_limit(&self) -> Option<usize> {
        self.context_limit
    }

    /// For messages.
    #[must_use]
    pub fn family(&self) -> &'a str {
        self.family
    }

    /// The names of all keys.
    pub fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map.keys().map(String::as_str)
    }

    /// The value as it stands, null included: for the few keys where null and absence differ.
    #[must_use]
    pub fn raw(&self, key: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.map.get(key)
    }

    /// The value; `None` if it is absent or null.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        read(value).map(Some).ok_or_else(|| ConfigError::Value {
            key: key.to_owned(),
            value: value.to_string(),
            expected,
        })
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, ConfigError> {
        value.ok_or_else(|| ConfigError::Missing {
            key: key.to_owned(),
            family: self.family.to_owned(),
        })
    }

    /// A size, at least 1.
    ///
    /// # Errors
    /// [`ConfigError`] if it is no such number; an absent one is `None`.
    pub fn size_if(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(key, "a positive 31-bit number", |value| {
            let size = value.as_u64()?;
            (1..=LARGEST_SIZE).contains(&size).then_some(size as usize)
        })
    }

    /// A size that must be there.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn size(&self, key: &str) -> Result<usize, ConfigError> {
        let size = self.size_if(key)?;
        self.required(key, size)
    }

    /// A size, or its default.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.size_if(key)?.unwrap_or(default))
    }

    /// A finite number.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn number_if(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(key, "a finite number", |value| {
            value.as_f64().filter(|number| number.is_finite())
        })
    }

    /// A positive number, or its default.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn positive_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        let number = self.typed(key, "a positive number", |value| {
            value.as_f64().filter(|x| x.is_finite() && *x > 0.0)
        })?;
        Ok(number.unwrap_or(default))
    }

    /// A positive number that must be there.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn positive(&self, key: &str) -> Result<f64, ConfigError> {
        let there = self.get(key).map(|_| ());
        self.required(key, there)?;
        self.positive_or(key, 1.0)
    }

    /// true or false, or its default.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self
            .typed(key, "true or false", Value::as_bool)?
            .unwrap_or(default))
    }

    /// A text.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn text_if(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a text", Value::as_str)
    }

    /// A list.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn list_if(&self, key: &str) -> Result<Option<&'a Vec<Value>>, ConfigError> {
        self.typed(key, "a list", Value::as_array)
    }

    /// A list that must be there.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn required_list(&self, key: &str) -> Result<&'a Vec<Value>, ConfigError> {
        let list = self.list_if(key)?;
        self.required(key, list)
    }

    /// Token ids: one, a list, or none.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.typed(key, "a token id, or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// A key that this engine computes with one value only, which is also what its absence means.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`].
    pub fn only(&self, key: &str, value: &Value) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(found) if found != value => Err(self.unsupported(key, &value.to_string())),
            _ => Ok(()),
        }
    }

    /// Keys that must not be set: what this engine does not compute.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`].
    pub fn absent(&self, key: &str, supported: &str) -> Result<(), ConfigError> {
        match self.get(key) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(_) => Err(self.unsupported(key, supported)),
        }
    }

    /// Marks a key as understood whatever it says.
    pub fn ignore(&self, keys: &[&str]) {
        let mut asked = self.asked.borrow_mut();
        asked.extend(keys.iter().map(|key| (*key).to_owned()));
    }

    /// The error for a value that is not computed here.
    #[must_use]
    pub fn unsupported(&self, key: &str, supported: &str) -> ConfigError {
        ConfigError::Unsupported {
            key: key.to_owned(),
            value: self.map.get(key).unwrap_or(&Value::Null).to_string(),
            supported: supported.to_owned(),
        }
    }

    /// That nothing was left out that may matter.
    ///
    /// # Errors
    /// [`ConfigError::Unknown`].
    pub fn finish(&self) -> Result<(), ConfigError> {
        let asked = self.asked.borrow();
        let odd = self.map.iter().find(|(key, value)| {
            !asked.contains(*key)
                && !HARMLESS.contains(&key.as_str())
                && !matches!(value, Value::Null | Value::Bool(false))
        });
        match odd {
            None => Ok(()),
            Some((key, value)) => Err(ConfigError::Unknown {
                key: key.clone(),
                value: value.to_string(),
                family: self.family.to_owned(),
            }),
        }
    }
}
