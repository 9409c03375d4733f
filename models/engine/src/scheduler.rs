//! Continuous batching: which tokens of which sequences the next step computes, and what comes out of it.
//!
//! Every step takes one token of each decoding sequence first, then fills its token budget with chunks of prompts and
//! replays, oldest first. What engines died on is computed in steps of its own, every second one at most, until its first
//! token. A sequence keeps its slot until it ends. No clock, no thread, no I/O: commands in, chunks to
//! the [`ModelRunner`], tokens out.
//!
//! Invariant: scheduling decides *when* a token is computed, never *which* token it is.

use std::collections::VecDeque;

use crate::{
    frame::{AttemptError, AttemptId, StartAttempt, StepToken},
    replay::ReplayCheck,
    runner::{BLOCK, BlockId, Chunk, ModelInfo, ModelRunner, StepError},
    sampler::Sampler,
    sequence::{Limits, Sequence, Span},
};

/// Rows of logits in one step beyond one per slot: what the comparison of replayed logprobs may take at a time.
const REPLAY_ROWS_PER_STEP: usize = 64;

/// What bounds a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// Attempts that may wait for a slot; one more is refused with [`AttemptError::Full`].
    pub max_waiting: usize,
    /// Tokens that one step computes at most. Raised to the number of slots, so that every decode fits.
    pub step_tokens: usize,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self {
            max_waiting: 64,
            step_tokens: 512,
        }
    }
}

/// Tokens that have gone through the model since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub replayed_tokens: u64,
    /// Replayed logprobs that were close to the committed ones, but not bit-equal: only with a runner that is not exact.
    pub close_logprobs: u64,
}

/// What one step brought forth.
#[derive(Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// At most one per attempt.
    pub tokens: Vec<StepToken>,
    /// Attempts that ended without a further token.
    pub failed: Vec<(AttemptId, AttemptError)>,
    /// Attempts of which this step computed the first tokens.
    pub begun: Vec<AttemptId>,
    /// Tokens of prompts that went through the model.
    pub prompt_tokens: u32,
}

#[derive(Debug)]
struct Running {
    /// Its blocks: enough for a whole context.
    table: Vec<BlockId>,
    sequence: Sequence,
    /// What the current step computes of it.
    span: Option<Span>,
}

/// All attempts of one engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    options: SchedulerOptions,
    slots: usize,
    free: Vec<Vec<BlockId>>,
    /// In order of admission.
    running: Vec<Running>,
    waiting: VecDeque<Sequence>,
    sampler: Sampler,
    logits: Vec<f32>,
    totals: Totals,
    /// The suspect that the latest plan is for.
    alone: Option<AttemptId>,
}

impl Scheduler {
    /// A scheduler for one loaded model.
    #[must_use]
    pub fn new(info: &ModelInfo, options: SchedulerOptions) -> Self {
        let limits = Limits {
            context_length: info.context_length,
            vocab_size: info.vocab_size,
            eos_token_ids: info.eos_token_ids.clone(),
            replay: ReplayCheck::of(info),
        };
        let blocks = info.context_length.div_ceil(BLOCK);
        let slots = info.max_sequences.min(info.kv_blocks / blocks);
        Self {
            limits,
            options: SchedulerOptions {
                step_tokens: options.step_tokens.max(slots).max(1),
                ..options
            },
            slots,
            free: (0..slots * blocks)
                .step_by(blocks)
                .map(|first| (first as BlockId..(first + blocks) as BlockId).collect())
                .rev()
                .collect(),
            running: Vec::with_capacity(slots),
            waiting: VecDeque::new(),
            sampler: Sampler::new(),
            logits: Vec::new(),
            totals: Totals::default(),
            alone: None,
        }
    }

    /// Takes an attempt in. One that is here already is left alone; a later epoch of a request replaces an earlier one,
    /// which is returned.
    ///
    /// # Errors
    /// [`AttemptError::Invalid`] or [`AttemptError::Full`]; nothing has changed then.
    pub fn start(&mut self, start: StartAttempt) -> Result<Option<AttemptId>, AttemptError> {
        let attempt = start.attempt;
        let earlier = self
            .attempts()
            .find(|known| known.request == attempt.request);
        if let Some(known) = earlier {
            if known.epoch == attempt.epoch {
                return Ok(None);
            }
            if known.epoch > attempt.epoch {
                return Err(AttemptError::Invalid(format!(
                    "epoch {} of this request is stale, epoch {} is running",
                    attempt.epoch, known.epoch
                )));
            }
        }
        let sequence = Sequence::admit(start, &self.limits)?;
        if earlier.is_none()
            && self.free.is_empty()
            && self.waiting.len() >= self.options.max_waiting
        {
            return Err(AttemptError::Full {
                running: self.running.len() as u32,
                waiting: self.waiting.len() as u32,
                limit: self.options.max_waiting as u32,
            });
        }
        if let Some(known) = earlier {
            self.cancel(known);
        }
        self.waiting.push_back(sequence);
        self.admit_waiting();
        Ok(earlier)
    }

    /// Ends an attempt and frees its slot. Returns whether it was here.
    pub fn cancel(&mut self, attempt: AttemptId) -> bool {
        if let Some(index) = self
            .waiting
            .iter()
            .position(|sequence| sequence.attempt() == attempt)
        {
            self.waiting.remove(index);
            return true;
        }
        let Some(index) = self
            .running
            .iter()
            .position(|running| running.sequence.attempt() == attempt)
        else {
            return false;
        };
        self.remove(index);
        self.admit_waiting();
        true
    }

    /// Runs one step, or nothing (`None`) if there is no work.
    ///
    /// # Errors
    /// [`StepError`]: the runner failed, and no attempt can go on.
    pub fn step(&mut self, runner: &mut dyn ModelRunner) -> Result<Option<StepOutcome>, StepError> {
        self.plan();
        self.run(runner)
    }

    /// Fixes what the next [`Scheduler::run`] computes. Returns the attempt that it computes alone, if it is a suspect.
    pub fn plan(&mut self) -> Option<AttemptId> {
        let suspect = self
            .running
            .iter()
            .find(|running| running.sequence.is_suspect())
            .map(|running| running.sequence.attempt());
        // The others get every second step; suspects come one after the other, in order of admission.
        let others = self
            .running
            .iter()
            .any(|running| !running.sequence.is_suspect());
        self.alone = suspect.filter(|_| self.alone.is_none() || !others);
        let alone = self.alone;
        self.plan_for(|sequence| match alone {
            Some(attempt) => sequence.attempt() == attempt,
            None => !sequence.is_suspect(),
        });
        alone
    }

    /// Runs the planned step, or nothing (`None`) if there is no work.
    ///
    /// # Errors
    /// [`StepError`]: the runner failed, and no attempt can go on.
    pub fn run(&mut self, runner: &mut dyn ModelRunner) -> Result<Option<StepOutcome>, StepError> {
        if self.running.iter().all(|running| running.span.is_none()) {
            return Ok(None);
        }
        self.execute(runner)?;
        Ok(Some(self.collect()))
    }

    /// Whether a step would do anything.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.running.is_empty()
    }

    /// Attempts that hold a slot.
    #[must_use]
    pub fn running_len(&self) -> usize {
        self.running.len()
    }

    /// Attempts that wait for a slot.
    #[must_use]
    pub fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    /// Cached positions of all slots.
    #[must_use]
    pub fn kv_used_tokens(&self) -> u64 {
        self.running
            .iter()
            .map(|running| running.sequence.computed() as u64)
            .sum()
    }

    /// Counters since the start.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    fn attempts(&self) -> impl Iterator<Item = AttemptId> {
        self.running
            .iter()
            .map(|running| running.sequence.attempt())
            .chain(self.waiting.iter().map(Sequence::attempt))
    }

    fn admit_waiting(&mut self) {
        while !self.free.is_empty() {
            let Some(sequence) = self.waiting.pop_front() else {
                return;
            };
            if let Some(table) = self.free.pop() {
                self.running.push(Running {
                    table,
                    sequence,
                    span: None,
                });
            }
        }
    }

    fn remove(&mut self, index: usize) {
        let running = self.running.remove(index);
        self.free.push(running.table);
    }

    /// Fixes the spans of the sequences that take part in this step.
    fn plan_for(&mut self, takes_part: impl Fn(&Sequence) -> bool) {
        for running in &mut self.running {
            running.span = None;
        }
        let mut tokens = self.options.step_tokens;
        let mut rows = self.slots + REPLAY_ROWS_PER_STEP;
        for decoding in [true, false] {
            for running in self
                .running
                .iter_mut()
                .filter(|running| running.sequence.is_decoding() == decoding)
                .filter(|running| takes_part(&running.sequence))
            {
                running.span = running.sequence.next_span(tokens, rows);
                if let Some(span) = running.span {
                    tokens -= span.end - span.start;
                    rows -= span.logits_for;
                }
            }
        }
    }

    fn execute(&mut self, runner: &mut dyn ModelRunner) -> Result<(), StepError> {
        let mut rows = 0;
        let planned = self
            .running
            .iter()
            .filter_map(|running| Some((running, running.span?)));
        let chunks: Vec<Chunk<'_>> = planned
            .map(|(running, span)| {
                rows += span.logits_for;
                let tokens = running.sequence.tokens(span);
                Chunk {
                    table: &running.table,
                    start: span.start,
                    tokens,
                    logits_for: span.logits_for,
                }
            })
            .collect();
        self.logits.clear();
        runner.execute(&chunks, &mut self.logits)?;
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
    fn collect(&mut self) -> StepOutcome {
        let mut outcome = StepOutcome::default();
        let mut ended = Vec::new();
        let mut offset = 0;
        let vocab_size = self.limits.vocab_size;
        for (index, running) in self.running.iter_mut().enumerate() {
            let Some(span) = running.span.take() else {
                continue;
            };
            let rows = &self.logits[offset..offset + span.logits_for * vocab_size];
            offset += rows.len();
            let sequence = &mut running.sequence;
            let (prompt, replayed) = sequence.forced_in(span);
            outcome.prompt_tokens += prompt as u32;
            self.totals.prompt_tokens += prompt as u64;
            self.totals.replayed_tokens += replayed as u64;
            let attempt = sequence.attempt();
            if span.start == 0 {
                outcome.begun.push(attempt);
            }
            let advanced = sequence.advance(span, rows, vocab_size, &mut self.sampler);
            self.totals.close_logprobs += sequence.take_close();
            match advanced {
                Ok(None) => {}
                Ok(Some(token)) => {
                    self.totals.generated_tokens += 1;
                    let finish = sequence.finish_reason(&self.limits.eos_token_ids);
                    let position = sequence.output_len() as u32 - 1;
                    outcome.tokens.push(StepToken {
                        attempt,
                        position,
                        token,
                        finish,
                        waited_ms: None,
                    });
                    if finish.is_some() {
                        ended.push(index);
                    }
                }
                Err(error) => {
                    outcome.failed.push((attempt, error));
                    ended.push(index);
                }
            }
        }
        for index in ended.into_iter().rev() {
            self.remove(index);
        }
        self.admit_waiting();
        outcome
    }
}

#[cfg(test)]
mod tests;
