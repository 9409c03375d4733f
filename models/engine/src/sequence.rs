//! One attempt at one request inside an engine: its tokens, how far they are computed, and when it ends.
//!
//! ```text
//!  tokens   | prompt ............ | committed ... | generated ... |
//!           0                 prompt_len      forced_len     tokens.len()
//!  cache    | computed .................|  (what its blocks hold)
//! ```
//!
//! Invariant: forced tokens (prompt and committed) are never sampled, only run through the model; what is generated
//! after them is the same whether they were committed before or generated here. Penalties are a fold over `tokens`.
//! A sequence that loses its blocks keeps its tokens: from then on they are forced. A draft is never among the tokens.

mod cache;
mod check;

pub use check::{MAX_LOGIT_BIAS, MAX_LOGIT_BIAS_VALUE, MAX_STOP_TOKEN_IDS, MAX_TOP_LOGPROBS};
use check::{check_log_fits, check_sampling, check_tokens};

use crate::{
    blocks::BlockHash,
    frame::{
        AttemptError, AttemptId, FinishReason, OutputToken, SamplingParams, StartAttempt, StepToken,
    },
    mask::{self, TokenMask},
    penalties::{History, has_penalties},
    replay::{ReplayCheck, Verdict},
    runner::{BLOCK, ModelInfo},
    sampler::{SampleError, SampleInput, Sampler},
    speculate::Drafter,
};

/// Room reserved ahead at most; longer outputs grow by doubling, which is rare enough.
const RESERVE_TOKENS: usize = 4096;

/// What a model allows.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Prompt plus output tokens at most: of the model's context, or of the whole KV cache if that is smaller.
    pub context_length: usize,
    /// Which of them, in words.
    pub bounded_by: &'static str,
    pub vocab_size: usize,
    pub eos_token_ids: Vec<u32>,
    pub replay: ReplayCheck,
    pub fingerprint: String,
    /// Whether drafts may be computed together with what they follow: only if that changes no bit.
    pub exact: bool,
}

impl Limits {
    /// Those of a loaded model.
    #[must_use]
    pub fn of(info: &ModelInfo) -> Self {
        let capacity = info.kv_blocks * BLOCK;
        let bounded_by = if capacity < info.context_length {
            "engine's KV cache"
        } else {
            "model's context"
        };
        Self {
            context_length: info.context_length.min(capacity),
            bounded_by,
            vocab_size: info.vocab_size,
            eos_token_ids: info.eos_token_ids.clone(),
            replay: ReplayCheck::of(info),
            fingerprint: info.fingerprint.clone(),
            exact: info.exact,
        }
    }
}

/// Part of a sequence that one step computes. Positions count from the start of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: usize,
    pub end: usize,
    /// For how many of the last positions logits are wanted.
    pub logits_for: usize,
}

impl Span {
    /// Positions in it.
    #[must_use]
    pub fn length(self) -> usize {
        self.end - self.start
    }
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
    priority: i32,
    fork_of: Option<AttemptId>,
    /// Whether some step has computed anything of it.
    begun: bool,
    /// Parent of the first block's hash.
    root: BlockHash,
    /// Hashes of its full blocks, as far as they were needed.
    hashes: Vec<BlockHash>,
    /// Bitmap of `allowed_token_ids`; empty without.
    allowed: Vec<u32>,
    grammar: Option<Box<dyn TokenMask>>,
    /// Scratch: the bitmap for the next position.
    mask: Vec<u32>,
    drafter: Option<Drafter>,
    /// The last token and the drafts after it, while a step computes them.
    drafted: Vec<u32>,
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
            priority,
            fork_of,
            cache_salt,
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
            priority,
            fork_of,
            begun: false,
            root: BlockHash::root(&limits.fingerprint, cache_salt),
            hashes: Vec::new(),
            allowed: Vec::new(),
            grammar: None,
            mask: Vec::new(),
            drafter: None,
            drafted: Vec::new(),
            sampling,
            tokens,
        };
        if let Some(reason) = sequence.finish_reason(&limits.eos_token_ids) {
            let committed = sequence.output_len();
            return Err(AttemptError::Invalid(format!(
                "the {committed} committed tokens already end the request (finish reason {reason:?}); nothing is left to generate"
            )));
        }
        sequence.prepare(limits);
        Ok(sequence)
    }

    /// Builds what the admission does not need: the history, and room so that no token allocates.
    fn prepare(&mut self, limits: &Limits) {
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
        let expected_len = self.tokens.len() + room.min(RESERVE_TOKENS);
        self.hashes.reserve_exact(expected_len / BLOCK + 1);
        if let Some(allowed) = self.sampling.allowed_token_ids.take() {
            self.allowed = mask::bitmap_of(&allowed, limits.vocab_size);
        }
        if self.sampling.speculate > 0 && limits.exact {
            let max_drafts = self.sampling.speculate;
            self.drafter = Some(Drafter::new(max_drafts, expected_len));
            self.drafted.reserve_exact(1 + max_drafts as usize);
        }
    }

    /// Narrows what may be generated. The grammar must not have seen any token yet; it is given the committed ones.
    pub fn set_grammar(&mut self, mut grammar: Box<dyn TokenMask>, vocab_size: usize) {
        let committed = &self.tokens[self.prompt_len..];
        committed.iter().for_each(|&id| grammar.accept(id));
        self.mask.resize(mask::words_for(vocab_size), 0);
        self.grammar = Some(grammar);
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

    /// The tokens of a span, drafts included.
    #[must_use]
    pub fn tokens(&self, span: Span) -> &[u32] {
        if span.end > self.tokens.len() {
            &self.drafted[..span.length()]
        } else {
            &self.tokens[span.start..span.end]
        }
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
        let first_row = self.first_row();
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

    /// The row of position p predicts token p + 1. Wanted are those that predict a checked or an unknown token.
    fn first_row(&self) -> usize {
        self.forced_len - 1 - self.expect_logprobs.len()
    }

    /// Guesses what follows the last token: makes the span of a decoding sequence longer by up to `max_drafts` tokens, each
    /// with logits of its own.
    #[must_use]
    pub fn with_drafts(&mut self, span: Span, max_drafts: usize) -> Span {
        let Some(drafter) = &mut self.drafter else {
            return span;
        };
        // The last draft leaves room for the token after it.
        let left = (self.sampling.max_tokens as usize)
            .min(self.context_length - self.prompt_len)
            .saturating_sub(self.tokens.len() - self.prompt_len + 1);
        self.drafted.clear();
        self.drafted.extend(self.tokens.last());
        drafter.draft(&self.tokens, left.min(max_drafts), &mut self.drafted);
        let drafts = self.drafted.len() - 1;
        Span {
            end: span.end + drafts,
            logits_for: span.logits_for + drafts,
            ..span
        }
    }

    /// Takes the rows of a computed span: compares forced tokens with the log, samples the next ones that are due and
    /// appends them to `out`, several if drafts were right. Returns why it is over, if it is.
    ///
    /// `rows` holds `span.logits_for` rows of `vocab_size` logits.
    ///
    /// # Errors
    /// [`AttemptError::ReplayMismatch`], [`AttemptError::NotFinite`], [`AttemptError::Invalid`]: the attempt is over.
    pub fn advance(
        &mut self,
        span: Span,
        rows: &[f32],
        limits: &Limits,
        sampler: &mut Sampler,
        out: &mut Vec<StepToken>,
    ) -> Result<Option<FinishReason>, AttemptError> {
        self.begun = true;
        let known = self.tokens.len();
        self.computed = span.end.min(known);
        let drafts = span.end - self.computed;
        for (row, position) in rows
            .chunks_exact(limits.vocab_size)
            .zip(span.end - span.logits_for..)
        {
            let predicted = position + 1;
            if predicted < known {
                self.check_replay(predicted, row, sampler)?;
                continue;
            }
            let token = self.sample(row, sampler)?;
            // The row was computed after the right tokens only; the last one sampled is not in the cache as such.
            self.computed = predicted;
            let guess = self.drafted.get(predicted + 1 - known);
            let right = predicted < span.end && guess == Some(&token.id);
            let finish = self.finish_reason(&limits.eos_token_ids);
            out.push(StepToken {
                attempt: self.attempt,
                position: (predicted - self.prompt_len) as u32,
                token,
                finish,
                waited_ms: None,
            });
            if finish.is_some() || !right {
                self.learn(drafts, predicted - known);
                return Ok(finish);
            }
        }
        Ok(None)
    }

    fn learn(&mut self, drafts: usize, accepted: usize) {
        if let Some(drafter) = self.drafter.as_mut().filter(|_| drafts > 0) {
            drafter.learn(drafts, accepted);
        }
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
        if let Some(grammar) = &mut self.grammar {
            grammar.mask(&mut self.mask);
            if !self.allowed.is_empty() {
                mask::intersect(&mut self.mask, &self.allowed);
            }
        }
        let mask = match &self.grammar {
            Some(_) => Some(self.mask.as_slice()),
            None => Some(self.allowed.as_slice()).filter(|allowed| !allowed.is_empty()),
        };
        let input = SampleInput {
            logits: row,
            params: &self.sampling,
            history: self.history.as_ref(),
            suppressed,
            mask,
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
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(token.id);
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
