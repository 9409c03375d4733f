//! One attempt at one request inside an engine: its tokens, how far they are computed, and when it ends.
//!
//! ```text
//!  tokens   | prompt ............ | committed ... | generated ... |
//!           0                 prompt_len      forced_len     tokens.len()
//!  cache    | computed .................|  (what the slot holds)
//! ```
//!
//! Invariant: forced tokens (prompt and committed) are never sampled, only run through the model; what is generated
//! after them is the same whether they were committed before or generated here. Penalties are a fold over `tokens`.

use crate::{
    frame::{AttemptError, AttemptId, FinishReason, OutputToken, SamplingParams, StartAttempt},
    penalties::{History, has_penalties},
    replay::{NOT_COMPUTED_BITS, ReplayCheck, Verdict},
    sampler::{SampleError, SampleInput, Sampler},
};

/// Alternatives that may be asked for per position.
pub const MAX_TOP_LOGPROBS: u32 = 64;
/// Stop ids that one request may name.
pub const MAX_STOP_TOKEN_IDS: usize = 256;

/// What a model allows.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Prompt plus output tokens at most.
    pub context_length: usize,
    pub vocab_size: usize,
    pub eos_token_ids: Vec<u32>,
    pub replay: ReplayCheck,
}

/// Part of a sequence that one step computes. Positions count from the start of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub end: usize,
    /// For how many of the last positions logits are wanted.
    pub logits_for: usize,
}

/// An admitted attempt.
#[derive(Debug)]
pub struct Sequence {
    attempt: AttemptId,
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Prompt plus committed.
    forced_len: usize,
    /// Positions that the cache holds.
    computed: usize,
    /// Logprobs of the last committed tokens, to be found again.
    expect_logprobs: Vec<f32>,
    /// Whether engines died on it, and this one has not given it a token yet.
    suspect: bool,
    replay: ReplayCheck,
    /// How many of them were found again only approximately, since [`Self::take_close`].
    close: u64,
    sampling: SamplingParams,
    history: Option<History>,
    /// Every end-of-sequence and stop id; suppressed before `min_tokens`.
    ending_ids: Vec<u32>,
    context_length: usize,
}

impl Sequence {
    /// Checks an attempt against the model and prepares it.
    ///
    /// # Errors
    /// [`AttemptError::Invalid`], with the numbers; [`AttemptError::ReplayMismatch`] for a log that another engine began and this
    /// one has no room to go on with.
    pub fn admit(start: StartAttempt, limits: &Limits) -> Result<Self, AttemptError> {
        check_log_fits(&start, limits)?;
        check_tokens(&start, limits).map_err(AttemptError::Invalid)?;
        check_sampling(&start.sampling, limits).map_err(AttemptError::Invalid)?;
        let StartAttempt {
            attempt,
            prompt,
            committed,
            expect_logprobs,
            suspect,
            sampling,
        } = start;
        let mut ending_ids = limits.eos_token_ids.clone();
        ending_ids.extend(&sampling.stop_token_ids);
        let prompt_len = prompt.len();
        let mut tokens = prompt;
        tokens.extend(committed);
        let mut sequence = Self {
            attempt,
            prompt_len,
            forced_len: tokens.len(),
            computed: 0,
            expect_logprobs,
            suspect,
            replay: limits.replay,
            close: 0,
            history: None,
            ending_ids,
            context_length: limits.context_length,
            sampling,
            tokens,
        };
        if let Some(reason) = sequence.finish_reason(&limits.eos_token_ids) {
            let committed = sequence.output_len();
            return Err(AttemptError::Invalid(format!(
                "the {committed} committed tokens already end the request (finish reason {reason:?}); nothing is left to generate"
            )));
        }
        sequence.prepare();
        Ok(sequence)
    }

    /// Builds what the admission does not need: the history, and room so that no token allocates.
    fn prepare(&mut self) {
        let room = (self.sampling.max_tokens as usize).min(self.context_length - self.prompt_len);
        self.tokens
            .reserve_exact(room.saturating_sub(self.output_len()).min(RESERVE_TOKENS));
        if has_penalties(&self.sampling) {
            let (prompt, output) = self.tokens.split_at(self.prompt_len);
            let mut history = History::of_prompt(prompt);
            history.reserve(room.min(RESERVE_TOKENS));
            output.iter().for_each(|&id| history.push(id));
            self.history = Some(history);
        }
    }

    /// Who this is.
    #[must_use]
    pub fn attempt(&self) -> AttemptId {
        self.attempt
    }

    /// Whether it may be what engines died of, and must be computed alone.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.suspect
    }

    /// Positions that the cache holds.
    #[must_use]
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Output tokens known so far, committed ones included.
    #[must_use]
    pub fn output_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether one more token is all there is to compute.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        self.tokens.len() - self.computed == 1
    }

    /// The tokens of a span.
    #[must_use]
    pub fn tokens(&self, span: Span) -> &[u32] {
        &self.tokens[span.start..span.end]
    }

    /// How many tokens of a span belong to the prompt, and how many are replayed output.
    #[must_use]
    pub fn forced_in(&self, span: Span) -> (usize, usize) {
        let prompt = span.end.min(self.prompt_len).saturating_sub(span.start);
        let forced = span.end.min(self.forced_len).saturating_sub(span.start);
        (prompt, forced - prompt)
    }

    /// The next part to compute, of at most `max_tokens` tokens and `max_rows` rows of logits; `None` if no token fits.
    #[must_use]
    pub fn next_span(&self, max_tokens: usize, max_rows: usize) -> Option<Span> {
        // The row of position p predicts token p + 1. Wanted are those that predict a checked or an unknown token.
        let first_row = self.forced_len - 1 - self.expect_logprobs.len();
        let start = self.computed;
        let end = self
            .tokens
            .len()
            .min(start + max_tokens)
            .min(start.max(first_row) + max_rows);
        (end > start).then(|| Span {
            start,
            end,
            logits_for: end.saturating_sub(start.max(first_row)),
        })
    }

    /// Takes the rows of a computed span: compares forced tokens with the log, samples the next one if it is due.
    ///
    /// `rows` holds `span.logits_for` rows of `vocab_size` logits.
    ///
    /// # Errors
    /// [`AttemptError::ReplayMismatch`], [`AttemptError::NotFinite`], [`AttemptError::Invalid`]: the attempt is over.
    pub fn advance(
        &mut self,
        span: Span,
        rows: &[f32],
        vocab_size: usize,
        sampler: &mut Sampler,
    ) -> Result<Option<OutputToken>, AttemptError> {
        self.computed = span.end;
        let mut sampled = None;
        for (row, position) in rows
            .chunks_exact(vocab_size)
            .zip(span.end - span.logits_for..)
        {
            let predicted = position + 1;
            if predicted < self.tokens.len() {
                self.check_replay(predicted, row, sampler)?;
            } else {
                sampled = Some(self.sample(row, sampler)?);
            }
        }
        Ok(sampled)
    }

    /// How many logprobs were found again only approximately since the last call.
    pub fn take_close(&mut self) -> u64 {
        std::mem::take(&mut self.close)
    }

    fn check_replay(
        &mut self,
        index: usize,
        row: &[f32],
        sampler: &Sampler,
    ) -> Result<(), AttemptError> {
        let position = (index - self.prompt_len) as u32;
        let expected = self.expect_logprobs[index + self.expect_logprobs.len() - self.forced_len];
        let actual = sampler
            .logprob(row, self.tokens[index])
            .map_err(|_| AttemptError::NotFinite { position })?;
        match self.replay.verdict(expected, actual) {
            Verdict::Same => Ok(()),
            Verdict::Close => {
                self.close += 1;
                Ok(())
            }
            Verdict::Different => Err(AttemptError::ReplayMismatch {
                position,
                expected: expected.to_bits(),
                actual: actual.to_bits(),
            }),
        }
    }

    fn sample(&mut self, row: &[f32], sampler: &mut Sampler) -> Result<OutputToken, AttemptError> {
        let position = self.output_len() as u32;
        let suppressed: &[u32] = if position < self.sampling.min_tokens {
            &self.ending_ids
        } else {
            &[]
        };
        let input = SampleInput {
            logits: row,
            params: &self.sampling,
            history: self.history.as_ref(),
            suppressed,
            position,
        };
        let token = sampler.sample(input).map_err(|error| match error {
            SampleError::NotFinite => AttemptError::NotFinite { position },
            SampleError::NothingLeft => AttemptError::Invalid(error.to_string()),
        })?;
        self.tokens.push(token.id);
        self.suspect = false;
        if let Some(history) = &mut self.history {
            history.push(token.id);
        }
        Ok(token)
    }

    /// Whether the output so far is a complete answer, and why. `None` before the first output token.
    #[must_use]
    pub fn finish_reason(&self, eos_token_ids: &[u32]) -> Option<FinishReason> {
        let (output, last) = match self.output_len() {
            0 => return None,
            output => (output, self.tokens[self.tokens.len() - 1]),
        };
        let ends = self.sampling.stop_token_ids.contains(&last)
            || (!self.sampling.ignore_eos && eos_token_ids.contains(&last));
        if ends && output > self.sampling.min_tokens as usize {
            Some(FinishReason::Stop)
        } else if output >= self.sampling.max_tokens as usize
            || self.tokens.len() >= self.context_length
        {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// Room reserved ahead at most; longer outputs grow by doubling, which is rare enough.
const RESERVE_TOKENS: usize = 4096;

/// A log with output was once admitted, by an engine with a longer context: the request is well, and another replica can go on with it.
/// So the refusal must not be final.
fn check_log_fits(start: &StartAttempt, limits: &Limits) -> Result<(), AttemptError> {
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

fn check_tokens(start: &StartAttempt, limits: &Limits) -> Result<(), String> {
    let (prompt, committed) = (start.prompt.len(), start.committed.len());
    if prompt == 0 {
        return Err(
            "the prompt is empty; give at least one token, such as the beginning-of-text id"
                .to_owned(),
        );
    }
    if prompt >= limits.context_length {
        return Err(format!(
            "the prompt has {prompt} tokens, and the model's context of {} tokens must hold at least one more for the output; shorten the prompt by {} tokens",
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

fn check_sampling(sampling: &SamplingParams, limits: &Limits) -> Result<(), String> {
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
    match s
        .stop_token_ids
        .iter()
        .find(|&&id| id as usize >= limits.vocab_size)
    {
        Some(id) => Err(format!(
            "stop token id {id} is not in the vocabulary of {} ids",
            limits.vocab_size
        )),
        None => Ok(()),
    }
}
