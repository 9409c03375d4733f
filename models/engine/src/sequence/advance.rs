//! A sequence takes the rows of a step: logs are compared, tokens sampled, drafts kept or dropped.

use super::{Limits, Sequence, Span};
use crate::{
    frame::{AttemptError, FinishReason, OutputToken, StepToken},
    mask,
    replay::Verdict,
    sampler::{SampleError, SampleInput, Sampler},
};

impl Sequence {
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
}
