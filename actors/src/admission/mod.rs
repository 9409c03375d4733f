//! Admission: from a client's submission to a request that can be served, or a clear refusal.
//!
//! Everything about a request is decided here and written into its log: token ids, resolved sampling, the seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;
use understudy_config::ModelSettings;
use understudy_engine_core::chat::ChatMessage;
use understudy_engine_core::text::{TextModel, TextModelError};
use understudy_journal::Admission;
use understudy_protocol::message::{Input, Sampling, Submit};
use understudy_protocol::{ErrorBody, ErrorCode, RequestId};

use self::checks::{check_ids, check_priority, check_sampling, check_size, text_bytes};
use crate::request::text::TextFold;

mod checks;
#[cfg(test)]
mod tests;

pub use self::checks::{MAX_STOP_IDS, MAX_TOP_LOGPROBS};

/// Texts from this size on are tokenized on a thread of their own, so that they do not hold up other requests.
const LARGE_TEXT_BYTES: usize = 8 * 1024;

/// Large texts that are tokenized at the same time: each takes a processor, and tokens of other requests need some too.
const LARGE_TEXTS_AT_ONCE: usize = 4;

/// How long a large text waits for its turn.
const TURN_DEADLINE: Duration = Duration::from_secs(30);

/// What a client should wait before it tries again after that, in milliseconds.
const RETRY_AFTER_MS: u64 = 1000;

/// Gateway-wide values for what a submission leaves out.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    pub deadline_ms: u64,
    pub max_deadline_ms: u64,
    pub max_tokens: u32,
    pub max_priority: u32,
}

/// The models of the cluster, as admission needs them.
pub struct Admissions {
    models: BTreeMap<String, Model>,
    defaults: Defaults,
    /// One permit a large text that is being tokenized.
    turns: Semaphore,
}

struct Model {
    text: Arc<TextModel>,
    /// Prompt plus output tokens at most, as the deployment has it.
    context_length: usize,
    /// A text of more bytes cannot be a prompt, whatever is in it.
    max_text_bytes: usize,
}

impl Model {
    fn load(settings: &ModelSettings) -> Result<Self, TextModelError> {
        let text = TextModel::load(&settings.path)?;
        let own = text.context_length();
        let context_length = settings
            .context_length
            .map_or(own, |limit| own.min(limit as usize));
        let vocabulary = text.tokenizer().inner().get_vocab(true);
        let longest = vocabulary.keys().map(String::len).max().unwrap_or(0);
        Ok(Self {
            text: Arc::new(text),
            context_length,
            max_text_bytes: context_length.saturating_mul(longest),
        })
    }
}

impl Admissions {
    /// Reads tokenizer, chat template and limits of every model.
    ///
    /// # Errors
    /// If a model's directory lacks what a gateway needs, or cannot be understood.
    pub fn load(models: &[ModelSettings], defaults: Defaults) -> Result<Self, TextModelError> {
        let mut loaded = BTreeMap::new();
        for model in models {
            loaded.insert(model.name.clone(), Model::load(model)?);
        }
        Ok(Self {
            models: loaded,
            defaults,
            turns: Semaphore::new(LARGE_TEXTS_AT_ONCE),
        })
    }

    /// Decides everything about a request.
    ///
    /// # Errors
    /// `unknown_model`, `overloaded`, or `invalid_request` with what is wrong and what is allowed.
    pub async fn admit(&self, submit: Submit) -> Result<(Admission, TextFold), ErrorBody> {
        let (name, model) = self.model(submit.model.as_deref())?;
        check_ids(&submit.sampling, &model.text)?;
        check_size(&submit.input, name, model)?;
        let prompt = self.tokenize(&model.text, submit.input).await?;
        let (context, model) = (model.context_length, &model.text);
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
        check_priority(submit.priority, self.defaults.max_priority)?;
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
            priority: submit.priority,
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
        TextFold::new(&model.text, admission).map_err(|error| invalid(error.to_string()))
    }

    fn model(&self, wanted: Option<&str>) -> Result<(&str, &Model), ErrorBody> {
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

    /// For tests that need an admission to take as long as they like.
    #[cfg(test)]
    pub(crate) async fn hold_all_turns(&self) -> tokio::sync::SemaphorePermit<'_> {
        let all = self.turns.acquire_many(LARGE_TEXTS_AT_ONCE as u32);
        all.await.expect("never closed")
    }

    async fn tokenize(&self, model: &Arc<TextModel>, input: Input) -> Result<Vec<u32>, ErrorBody> {
        if text_bytes(&input) <= LARGE_TEXT_BYTES {
            return encode(model, input);
        }
        let Ok(Ok(_turn)) = timeout(TURN_DEADLINE, self.turns.acquire()).await else {
            let message = "too many long prompts are being tokenized at this gateway";
            return Err(ErrorBody {
                retry_after_ms: Some(RETRY_AFTER_MS),
                ..ErrorBody::new(ErrorCode::Overloaded, message)
            });
        };
        let model = model.clone();
        match tokio::task::spawn_blocking(move || encode(&model, input)).await {
            Ok(ids) => ids,
            Err(_) => Err(ErrorBody::new(
                ErrorCode::Internal,
                "the prompt could not be tokenized",
            )),
        }
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
        check_sampling(&resolved, max_tokens, room)?;
        Ok(resolved)
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
