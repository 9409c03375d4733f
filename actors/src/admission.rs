//! Admission: from a client's submission to a request that can be served, or a clear refusal.
//!
//! Everything about a request is decided here and written into its log: token ids, resolved sampling, the seed.

use std::collections::BTreeMap;
use std::sync::Arc;

use understudy_config::ModelSettings;
use understudy_engine_core::chat::ChatMessage;
use understudy_engine_core::text::{TextModel, TextModelError};
use understudy_journal::Admission;
use understudy_protocol::message::{Input, Sampling, Submit};
use understudy_protocol::{ErrorBody, ErrorCode, RequestId};

use crate::request::text::TextFold;

/// Stop ids of one request at most.
pub const MAX_STOP_IDS: usize = 256;

/// Alternatives per position at most.
pub const MAX_TOP_LOGPROBS: u32 = 20;

/// Texts from this size on are tokenized on a thread of their own, so that they do not hold up other requests.
const LARGE_TEXT_BYTES: usize = 8 * 1024;

/// Gateway-wide values for what a submission leaves out.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    pub deadline_ms: u64,
    pub max_deadline_ms: u64,
    pub max_tokens: u32,
}

/// The models of the cluster, as admission needs them.
pub struct Admissions {
    models: BTreeMap<String, Arc<TextModel>>,
    context_limits: BTreeMap<String, Option<u32>>,
    defaults: Defaults,
}

impl Admissions {
    /// Reads tokenizer, chat template and limits of every model.
    ///
    /// # Errors
    /// If a model's directory lacks what a gateway needs, or cannot be understood.
    pub fn load(models: &[ModelSettings], defaults: Defaults) -> Result<Self, TextModelError> {
        let mut loaded = BTreeMap::new();
        let mut context_limits = BTreeMap::new();
        for model in models {
            loaded.insert(model.name.clone(), Arc::new(TextModel::load(&model.path)?));
            context_limits.insert(model.name.clone(), model.context_length);
        }
        Ok(Self {
            models: loaded,
            context_limits,
            defaults,
        })
    }

    /// Decides everything about a request.
    ///
    /// # Errors
    /// `unknown_model`, or `invalid_request` with what is wrong and what is allowed.
    pub async fn admit(&self, submit: Submit) -> Result<(Admission, TextFold), ErrorBody> {
        let (name, model) = self.model(submit.model.as_deref())?;
        check_stop_ids(&submit.sampling)?;
        let prompt = tokenize(model.clone(), submit.input).await?;
        let context = self.context_length(name, model);
        if prompt.is_empty() {
            return Err(invalid("the prompt has no tokens; give at least one"));
        }
        if prompt.len() >= context {
            let message = format!(
                "the prompt has {} tokens, and the context of {name} holds {context}, output included; shorten it",
                prompt.len()
            );
            return Err(invalid(message));
        }
        model
            .check_tokens(&prompt)
            .map_err(|error| invalid(error.to_string()))?;
        let room = u32::try_from(context - prompt.len()).unwrap_or(u32::MAX);
        let sampling = self.resolve(submit.sampling, model, room)?;
        let wanted = submit.deadline_ms.unwrap_or(self.defaults.deadline_ms);
        let admission = Admission {
            request: RequestId(random()?),
            model: name.to_owned(),
            prompt,
            sampling,
            stop: submit.stop,
            include_stop: submit.include_stop,
            deadline_ms: wanted.clamp(1, self.defaults.max_deadline_ms),
            resumable: submit.resumable,
        };
        let text = TextFold::new(model, &admission).map_err(|error| invalid(error.to_string()))?;
        Ok((admission, text))
    }

    /// The text fold of a request that was admitted before.
    ///
    /// # Errors
    /// `unknown_model` if its model is not served any more.
    pub fn text_fold(&self, admission: &Admission) -> Result<TextFold, ErrorBody> {
        let (_, model) = self.model(Some(&admission.model))?;
        TextFold::new(model, admission).map_err(|error| invalid(error.to_string()))
    }

    fn model(&self, wanted: Option<&str>) -> Result<(&str, &Arc<TextModel>), ErrorBody> {
        let known = || {
            self.models
                .keys()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", ")
        };
        match wanted {
            Some(name) => self
                .models
                .get_key_value(name)
                .map(|(name, model)| (name.as_str(), model))
                .ok_or_else(|| {
                    let message = format!(
                        "no model {name:?} is deployed; this cluster serves {}",
                        known()
                    );
                    ErrorBody::new(ErrorCode::UnknownModel, message)
                }),
            None if self.models.len() == 1 => {
                let (name, model) = self.models.iter().next().expect("one model");
                Ok((name, model))
            }
            None => Err(invalid(format!(
                "name a model: this cluster serves {}",
                known()
            ))),
        }
    }

    fn context_length(&self, name: &str, model: &TextModel) -> usize {
        let configured = self.context_limits.get(name).copied().flatten();
        configured.map_or(model.context_length(), |limit| {
            model.context_length().min(limit as usize)
        })
    }

    /// Client's values, else the model's, else the neutral ones; all checked.
    fn resolve(
        &self,
        asked: Sampling,
        model: &TextModel,
        room: u32,
    ) -> Result<Sampling, ErrorBody> {
        let own = model.generation_defaults();
        // transformers ignores the temperature of a model that says do_sample = false.
        let own_temperature = if own.do_sample == Some(true) {
            own.temperature.unwrap_or(1.0)
        } else {
            0.0
        };
        let max_tokens = asked
            .max_tokens
            .or(own.max_new_tokens)
            .unwrap_or(self.defaults.max_tokens);
        let resolved = Sampling {
            temperature: Some(asked.temperature.unwrap_or(own_temperature)),
            top_p: Some(asked.top_p.or(own.top_p).unwrap_or(1.0)),
            top_k: Some(asked.top_k.or(own.top_k).unwrap_or(0)),
            min_p: Some(asked.min_p.or(own.min_p).unwrap_or(0.0)),
            repetition_penalty: Some(
                asked
                    .repetition_penalty
                    .or(own.repetition_penalty)
                    .unwrap_or(1.0),
            ),
            presence_penalty: Some(asked.presence_penalty.unwrap_or(0.0)),
            frequency_penalty: Some(asked.frequency_penalty.unwrap_or(0.0)),
            seed: Some(match asked.seed {
                Some(seed) => seed,
                None => random()? as u64,
            }),
            max_tokens: Some(max_tokens.min(room)),
            min_tokens: Some(asked.min_tokens.unwrap_or(0)),
            ..asked
        };
        check_sampling(&resolved, max_tokens)?;
        Ok(resolved)
    }
}

async fn tokenize(model: Arc<TextModel>, input: Input) -> Result<Vec<u32>, ErrorBody> {
    let large = match &input {
        Input::Prompt(text) => text.len() > LARGE_TEXT_BYTES,
        Input::Messages(messages) => {
            messages.iter().map(|m| m.content.len()).sum::<usize>() > LARGE_TEXT_BYTES
        }
        Input::TokenIds(_) => false,
    };
    if !large {
        return encode(&model, input);
    }
    match tokio::task::spawn_blocking(move || encode(&model, input)).await {
        Ok(ids) => ids,
        Err(_) => Err(ErrorBody::new(
            ErrorCode::Internal,
            "the prompt could not be tokenized",
        )),
    }
}

fn encode(model: &TextModel, input: Input) -> Result<Vec<u32>, ErrorBody> {
    let encoded = match input {
        Input::TokenIds(ids) => return Ok(ids),
        Input::Prompt(text) => model.encode_prompt(&text),
        Input::Messages(messages) => {
            let messages: Vec<ChatMessage> = messages
                .into_iter()
                .map(|m| ChatMessage {
                    role: m.role,
                    content: m.content,
                })
                .collect();
            model.encode_chat(&messages)
        }
    };
    encoded.map_err(|error| invalid(error.to_string()))
}

fn check_stop_ids(sampling: &Sampling) -> Result<(), ErrorBody> {
    match sampling.stop_token_ids.len() {
        0..=MAX_STOP_IDS => Ok(()),
        given => Err(invalid(format!(
            "{given} stop_token_ids, and at most {MAX_STOP_IDS} are allowed"
        ))),
    }
}

fn check_sampling(sampling: &Sampling, asked_max_tokens: u32) -> Result<(), ErrorBody> {
    within("temperature", sampling.temperature, 0.0, 100.0)?;
    within("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0)?;
    within("min_p", sampling.min_p, 0.0, 1.0)?;
    within(
        "repetition_penalty",
        sampling.repetition_penalty,
        f32::MIN_POSITIVE,
        100.0,
    )?;
    within("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
    within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
    if asked_max_tokens == 0 {
        return Err(invalid("max_tokens must be at least 1"));
    }
    if sampling.min_tokens > Some(asked_max_tokens) {
        let min = sampling.min_tokens.unwrap_or_default();
        return Err(invalid(format!(
            "min_tokens {min} is more than max_tokens {asked_max_tokens}"
        )));
    }
    if sampling.top_logprobs > MAX_TOP_LOGPROBS {
        let given = sampling.top_logprobs;
        return Err(invalid(format!(
            "top_logprobs {given}, and at most {MAX_TOP_LOGPROBS} are allowed"
        )));
    }
    Ok(())
}

fn within(name: &str, value: Option<f32>, low: f32, high: f32) -> Result<(), ErrorBody> {
    match value {
        // Also refuses what is not a number.
        Some(value) if !(low..=high).contains(&value) => {
            let low = if low == f32::MIN_POSITIVE {
                "above 0".to_owned()
            } else {
                format!("from {low}")
            };
            Err(invalid(format!(
                "{name} is {value}, and must be {low} up to {high}"
            )))
        }
        _ => Ok(()),
    }
}

fn invalid(message: impl Into<String>) -> ErrorBody {
    ErrorBody::new(ErrorCode::InvalidRequest, message)
}

/// From the system's generator: a request's id is the permission to read it.
fn random() -> Result<u128, ErrorBody> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        ErrorBody::new(
            ErrorCode::Internal,
            format!("no randomness from the system: {error}"),
        )
    })?;
    Ok(u128::from_ne_bytes(bytes))
}
