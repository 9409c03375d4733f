//! Which attempts a model can serve at all, and what to say to the others.

use std::collections::HashSet;

use super::Limits;
use crate::{
    frame::{AttemptError, SamplingParams, StartAttempt},
    replay::NOT_COMPUTED_BITS,
    speculate::MAX_DRAFT_TOKENS,
};

/// Alternatives that may be asked for per position.
pub const MAX_TOP_LOGPROBS: u32 = 64;
/// Stop ids that one request may name.
pub const MAX_STOP_TOKEN_IDS: usize = 256;
/// Tokens that one request may bias.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// The largest bias, either way.
pub const MAX_LOGIT_BIAS_VALUE: f32 = 100.0;

/// A log with output was once admitted, by an engine with a longer context: the request is well, and another replica can go on with it.
/// So the refusal must not be final.
pub(super) fn check_log_fits(start: &StartAttempt, limits: &Limits) -> Result<(), AttemptError> {
    let committed = start.committed.len();
    let room = limits.context_length.saturating_sub(start.prompt.len());
    if committed == 0 || committed < room {
        return Ok(());
    }
    Err(AttemptError::ReplayMismatch {
        position: room as u32,
        expected: start
            .expect_logprobs
            .last()
            .map_or(NOT_COMPUTED_BITS, |logprob| logprob.to_bits()),
        actual: NOT_COMPUTED_BITS,
    })
}

pub(super) fn check_tokens(start: &StartAttempt, limits: &Limits) -> Result<(), String> {
    let (prompt, committed) = (start.prompt.len(), start.committed.len());
    if prompt == 0 {
        return Err(
            "the prompt is empty; give at least one token, such as the beginning-of-text id"
                .to_owned(),
        );
    }
    if prompt >= limits.context_length {
        return Err(format!(
            "the prompt has {prompt} tokens, and the {} of {} tokens must hold at least one more for the output; shorten the prompt by {} tokens",
            limits.bounded_by,
            limits.context_length,
            prompt + 1 - limits.context_length
        ));
    }
    let foreign = start
        .prompt
        .iter()
        .chain(&start.committed)
        .position(|&id| id as usize >= limits.vocab_size);
    if let Some(index) = foreign {
        return Err(format!(
            "the token at index {index} is not in the vocabulary of {} ids",
            limits.vocab_size
        ));
    }
    if start.expect_logprobs.len() > committed {
        return Err(format!(
            "{} logprobs are to be compared, but only {committed} tokens are committed",
            start.expect_logprobs.len()
        ));
    }
    Ok(())
}

pub(super) fn check_sampling(sampling: &SamplingParams, limits: &Limits) -> Result<(), String> {
    let range = |name: &str, value: f32, ok: bool, allowed: &str| {
        if ok {
            Ok(())
        } else {
            Err(format!("{name} is {value}; allowed is {allowed}"))
        }
    };
    let s = sampling;
    range(
        "temperature",
        s.temperature,
        (0.0..=100.0).contains(&s.temperature),
        "0 to 100",
    )?;
    range(
        "top_p",
        s.top_p,
        s.top_p > 0.0 && s.top_p <= 1.0,
        "above 0, at most 1",
    )?;
    range("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "0 to 1")?;
    let repetition = s.repetition_penalty;
    range(
        "repetition_penalty",
        repetition,
        repetition > 0.0 && repetition <= 100.0,
        "above 0, at most 100",
    )?;
    range(
        "presence_penalty",
        s.presence_penalty,
        (-2.0..=2.0).contains(&s.presence_penalty),
        "-2 to 2",
    )?;
    range(
        "frequency_penalty",
        s.frequency_penalty,
        (-2.0..=2.0).contains(&s.frequency_penalty),
        "-2 to 2",
    )?;
    if s.max_tokens == 0 {
        return Err("max_tokens is 0; ask for at least 1".to_owned());
    }
    if s.min_tokens > s.max_tokens {
        return Err(format!(
            "min_tokens ({}) is above max_tokens ({})",
            s.min_tokens, s.max_tokens
        ));
    }
    if s.top_logprobs > MAX_TOP_LOGPROBS {
        return Err(format!(
            "top_logprobs is {}; allowed is 0 to {MAX_TOP_LOGPROBS}",
            s.top_logprobs
        ));
    }
    if s.stop_token_ids.len() > MAX_STOP_TOKEN_IDS {
        return Err(format!(
            "{} stop token ids; allowed are {MAX_STOP_TOKEN_IDS}",
            s.stop_token_ids.len()
        ));
    }
    if s.speculate > MAX_DRAFT_TOKENS {
        return Err(format!(
            "speculate is {}; allowed is 0 to {MAX_DRAFT_TOKENS}",
            s.speculate
        ));
    }
    check_ids("stop token id", s.stop_token_ids.iter(), limits)?;
    check_bias(&s.logit_bias, limits)?;
    check_allowed(s.allowed_token_ids.as_deref(), limits)
}

fn check_ids<'a>(
    name: &str,
    mut ids: impl Iterator<Item = &'a u32>,
    limits: &Limits,
) -> Result<(), String> {
    match ids.find(|&&id| id as usize >= limits.vocab_size) {
        Some(id) => Err(format!(
            "{name} {id} is not in the vocabulary of {} ids",
            limits.vocab_size
        )),
        None => Ok(()),
    }
}

fn check_bias(bias: &[(u32, f32)], limits: &Limits) -> Result<(), String> {
    if bias.len() > MAX_LOGIT_BIAS {
        return Err(format!(
            "logit_bias has {} entries; allowed are {MAX_LOGIT_BIAS}",
            bias.len()
        ));
    }
    check_ids(
        "logit_bias: token id",
        bias.iter().map(|(id, _)| id),
        limits,
    )?;
    let allowed = -MAX_LOGIT_BIAS_VALUE..=MAX_LOGIT_BIAS_VALUE;
    // A NaN is in no range.
    if let Some((id, value)) = bias.iter().find(|(_, value)| !allowed.contains(value)) {
        return Err(format!(
            "logit_bias of token id {id} is {value}; allowed is -{MAX_LOGIT_BIAS_VALUE} to {MAX_LOGIT_BIAS_VALUE}"
        ));
    }
    let mut seen = HashSet::with_capacity(bias.len());
    match bias.iter().find(|(id, _)| !seen.insert(id)) {
        Some((id, _)) => Err(format!("logit_bias names token id {id} twice")),
        None => Ok(()),
    }
}

fn check_allowed(allowed: Option<&[u32]>, limits: &Limits) -> Result<(), String> {
    let Some(allowed) = allowed else {
        return Ok(());
    };
    if allowed.is_empty() {
        return Err("allowed_token_ids is empty; name at least one id, or leave it out".to_owned());
    }
    if allowed.len() > limits.vocab_size {
        return Err(format!(
            "allowed_token_ids has {} entries; the vocabulary has {} ids",
            allowed.len(),
            limits.vocab_size
        ));
    }
    check_ids("allowed_token_ids: token id", allowed.iter(), limits)
}
