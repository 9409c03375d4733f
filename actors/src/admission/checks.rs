//! What a request may ask for. Whatever an engine would refuse is refused here, before the client is told `accepted`.

use understudy_engine_core::text::TextModel;
use understudy_protocol::ErrorBody;
use understudy_protocol::message::{Input, Sampling};

use super::{Model, invalid};

/// Stop ids of one request at most.
pub const MAX_STOP_IDS: usize = 256;

/// Alternatives per position at most.
pub const MAX_TOP_LOGPROBS: u32 = 20;

/// Biased token ids of one request at most.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Allowed token ids of one request at most.
pub const MAX_ALLOWED_TOKEN_IDS: usize = 65_536;
/// Tokens that may be guessed ahead at most.
pub const MAX_SPECULATE: u32 = 16;

/// Bytes of text that have to be tokenized.
pub(super) fn text_bytes(input: &Input) -> usize {
    match input {
        Input::Prompt(text) => text.len(),
        Input::Messages(messages) => messages.iter().map(|m| m.content.len()).sum(),
        Input::TokenIds(_) => 0,
    }
}

/// Before the text is looked at: a text of many times the context's size would take seconds of a processor.
pub(super) fn check_size(input: &Input, name: &str, model: &Model) -> Result<(), ErrorBody> {
    let (given, max) = (text_bytes(input), model.max_text_bytes);
    match given <= max {
        true => Ok(()),
        false => Err(invalid(format!(
            "the prompt has {given} bytes, and the context of {name}, {} tokens, holds {max} at most; shorten it",
            model.context_length
        ))),
    }
}

/// An engine would refuse these too, but only after the client has been told that the request is accepted.
pub(super) fn check_ids(sampling: &Sampling, model: &TextModel) -> Result<(), ErrorBody> {
    let ids = &sampling.stop_token_ids;
    if ids.len() > MAX_STOP_IDS {
        let given = ids.len();
        return Err(invalid(format!(
            "{given} stop_token_ids, and at most {MAX_STOP_IDS} are allowed"
        )));
    }
    let known = |name: &str, ids: &[u32]| {
        model
            .check_tokens(ids)
            .map_err(|error| invalid(format!("{name}: {error}")))
    };
    known("stop_token_ids", ids)?;
    known(
        "allowed_token_ids",
        sampling.allowed_token_ids.as_deref().unwrap_or_default(),
    )?;
    let biased: Vec<u32> = sampling.logit_bias.iter().map(|(id, _)| *id).collect();
    known("logit_bias", &biased)
}

pub(super) fn check_sampling(
    sampling: &Sampling,
    asked_max_tokens: u32,
    room: u32,
) -> Result<(), ErrorBody> {
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
    if sampling.min_tokens > Some(room) {
        let min = sampling.min_tokens.unwrap_or_default();
        return Err(invalid(format!(
            "min_tokens {min} is more than the {room} tokens that the context has room for behind the prompt"
        )));
    }
    if sampling.top_logprobs > MAX_TOP_LOGPROBS {
        let given = sampling.top_logprobs;
        return Err(invalid(format!(
            "top_logprobs {given}, and at most {MAX_TOP_LOGPROBS} are allowed"
        )));
    }
    check_choice(sampling)
}

/// Which tokens may be chosen, and how far ahead they may be guessed.
fn check_choice(sampling: &Sampling) -> Result<(), ErrorBody> {
    let at_most = |what: &str, given: usize, limit: usize| match given > limit {
        true => Err(invalid(format!(
            "{given} {what}, and at most {limit} are allowed"
        ))),
        false => Ok(()),
    };
    at_most(
        "logit_bias entries",
        sampling.logit_bias.len(),
        MAX_LOGIT_BIAS,
    )?;
    if let Some(allowed) = &sampling.allowed_token_ids {
        at_most("allowed_token_ids", allowed.len(), MAX_ALLOWED_TOKEN_IDS)?;
        if allowed.is_empty() {
            return Err(invalid(
                "allowed_token_ids is empty, so that no token could be chosen; leave it out to allow all",
            ));
        }
        if let Some(id) = repeated(allowed.iter().copied()) {
            return Err(invalid(format!("allowed_token_ids names token {id} twice")));
        }
    }
    if let Some(id) = repeated(sampling.logit_bias.iter().map(|(id, _)| *id)) {
        return Err(invalid(format!("logit_bias names token {id} twice")));
    }
    at_most(
        "tokens to speculate",
        sampling.speculate as usize,
        MAX_SPECULATE as usize,
    )?;
    for (id, bias) in &sampling.logit_bias {
        within(
            &format!("the logit_bias of token {id}"),
            Some(*bias),
            -100.0,
            100.0,
        )?;
    }
    Ok(())
}

/// The first id that occurs again.
fn repeated(mut ids: impl Iterator<Item = u32>) -> Option<u32> {
    let mut seen = std::collections::HashSet::new();
    ids.find(|id| !seen.insert(*id))
}

/// Whoever may go before others can hold them up for ever.
pub(super) fn check_priority(priority: i32, most: u32) -> Result<(), ErrorBody> {
    if i64::from(priority) > i64::from(most) {
        return Err(invalid(format!(
            "priority is {priority}, and must be at most {most} (max_priority of the gateway)"
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
