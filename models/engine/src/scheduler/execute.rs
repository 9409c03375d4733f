//! A planned step, carried out: copies, chunks, and what the rows of logits mean for each sequence.

use super::{Scheduler, StepOutcome};
use crate::{
    runner::{BLOCK, Chunk, ModelRunner, StepError},
    sequence::Span,
};

impl Scheduler {
    pub(super) fn make_copies(&mut self, runner: &mut dyn ModelRunner) -> Result<(), StepError> {
        self.copies
            .drain(..)
            .try_for_each(|(from, to)| runner.copy_block(from, to))
    }

    pub(super) fn execute(&mut self, runner: &mut dyn ModelRunner) -> Result<(), StepError> {
        let mut rows = 0;
        let mut chunks = reuse(std::mem::take(&mut self.chunks));
        for running in &self.running {
            let Some(span) = running.span else {
                continue;
            };
            rows += span.logits_for;
            chunks.push(Chunk {
                table: &running.table,
                start: span.start,
                tokens: running.sequence.tokens(span),
                logits_for: span.logits_for,
            });
        }
        self.logits.clear();
        let executed = runner.execute(&chunks, &mut self.logits);
        self.chunks = reuse(chunks);
        executed?;
        if self.logits.len() != rows * self.limits.vocab_size {
            return Err(StepError {
                message: format!(
                    "the model returned {} logits for {rows} rows of {}",
                    self.logits.len(),
                    self.limits.vocab_size
                ),
            });
        }
        Ok(())
    }

    /// Hands every sequence its rows, and removes those that have ended.
    pub(super) fn collect(&mut self) -> StepOutcome {
        let mut outcome = std::mem::take(&mut self.outcome);
        let mut ended = std::mem::take(&mut self.ended);
        let mut offset = 0;
        for index in 0..self.running.len() {
            if let Some(span) = self.running[index].span.take() {
                let end = offset + span.logits_for * self.limits.vocab_size;
                if self.advance(index, span, offset..end, &mut outcome) {
                    ended.push(index);
                }
                offset = end;
            }
        }
        for index in ended.drain(..).rev() {
            self.remove(index);
        }
        self.ended = ended;
        self.admit_waiting();
        outcome
    }

    /// One sequence takes its rows. Returns whether it is over.
    fn advance(
        &mut self,
        index: usize,
        span: Span,
        rows: std::ops::Range<usize>,
        outcome: &mut StepOutcome,
    ) -> bool {
        let sequence = &mut self.running[index].sequence;
        let attempt = sequence.attempt();
        let (prompt, replayed) = sequence.forced_in(span);
        outcome.prompt_tokens += prompt as u32;
        self.totals.prompt_tokens += prompt as u64;
        self.totals.replayed_tokens += replayed as u64;
        let drafts = span.end.saturating_sub(sequence.known_len());
        if !sequence.has_begun() {
            outcome.begun.push(attempt);
        }
        let before = outcome.tokens.len();
        let advanced = sequence.advance(
            span,
            &self.logits[rows],
            &self.limits,
            &mut self.sampler,
            &mut outcome.tokens,
        );
        let sampled = outcome.tokens.len() - before;
        self.totals.close_logprobs += sequence.take_close();
        self.totals.generated_tokens += sampled as u64;
        self.totals.drafted_tokens += drafts as u64;
        self.totals.accepted_tokens += sampled.saturating_sub(1) as u64;
        match advanced {
            Ok(finish) => {
                self.register_full_blocks(index, drafts);
                finish.is_some()
            }
            Err(error) => {
                outcome.failed.push((attempt, error));
                true
            }
        }
    }

    /// Makes what is computed known to those who come later.
    fn register_full_blocks(&mut self, index: usize, _drafts: usize) {
        let running = &mut self.running[index];
        let computed = running.sequence.computed();
        #[cfg(test)]
        let computed = match self.blocks.sabotage {
            Some(crate::blocks::Sabotage::RegisterRejectedDrafts) if _drafts > 0 => {
                running.sequence.known_len()
            }
            _ => computed,
        };
        for place in running.registered..computed / BLOCK {
            let content = running.sequence.content(place, &self.blocks);
            self.blocks.register(running.table[place], content);
        }
        running.registered = running.registered.max(computed / BLOCK);
    }
}

/// An empty vector in the memory of another one.
fn reuse<'to>(mut chunks: Vec<Chunk<'_>>) -> Vec<Chunk<'to>> {
    chunks.clear();
    // Collecting in place keeps the memory: source and target have one layout, and nothing is ever mapped.
    chunks
        .into_iter()
        .map(|chunk| Chunk {
            table: &[],
            tokens: &[],
            ..chunk
        })
        .collect()
}
