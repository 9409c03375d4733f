//! Continuous batching: which tokens of which sequences the next step computes, and what comes out of it.
//!
//! ```text
//!  start ──> waiting ── blocks for its next chunk ──> running ──> ended
//!              ^                                         │
//!              └── preempted: somebody before it needs ──┘
//!                  its blocks; its tokens are kept
//! ```
//!
//! Sequences stand in one order, by priority and then by arrival ([`Rank`]). Every step takes one token of each decoding
//! sequence first (and drafts after it, where they are asked for), then fills its token budget with chunks of prompts and
//! replays, in that order. What engines died on is computed in steps of its own, every second one at most, until its first
//! token. Blocks are allocated as positions are computed; when none is left, the last one of the order gives up its own,
//! but only to those before it. So the first of all always gets on, whatever the others want.
//! No clock, no thread, no I/O: commands in, chunks to the [`ModelRunner`], tokens out.
//!
//! Invariant: scheduling decides *when* a token is computed, never *which* token it is.

mod admission;
mod plan;
mod transfer;

use std::cmp::Reverse;

use crate::{
    blocks::{BlockCounts, BlockManager},
    frame::{AttemptError, AttemptId, StartAttempt, StepToken},
    mask::TokenMask,
    runner::{BLOCK, BlockId, Chunk, ModelInfo, ModelRunner, StepError},
    sampler::Sampler,
    sequence::{Limits, Sequence, Span},
};

/// Rows of logits in one step beyond one per sequence: what the comparison of replayed logprobs may take at a time.
const REPLAY_ROWS_PER_STEP: usize = 64;
/// And what drafts may take.
const DRAFT_ROWS_PER_STEP: usize = 64;

/// What bounds a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerOptions {
    /// Attempts that may wait in addition to those that can run; one more is refused with [`AttemptError::Full`].
    pub max_waiting: usize,
    /// Tokens that one step computes at most. Raised to the number of sequences, so that every decode fits.
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

/// Tokens that have gone through the model since the start, and how they fared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    /// Output that was known already: of logs, and of sequences that were preempted.
    pub replayed_tokens: u64,
    /// Replayed logprobs that were close to the committed ones, but not bit-equal: only with a runner that is not exact.
    pub close_logprobs: u64,
    /// Tokens whose keys and values were there already, in the prefix cache or in another sequence.
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
    /// Tokens guessed, and guessed right.
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
}

/// What one step brought forth.
#[derive(Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Several of one attempt if its drafts were right, then at consecutive positions.
    pub tokens: Vec<StepToken>,
    /// Attempts that ended without a further token.
    pub failed: Vec<(AttemptId, AttemptError)>,
    /// Attempts of which this step computed the first tokens.
    pub begun: Vec<AttemptId>,
    /// Tokens of prompts that went through the model.
    pub prompt_tokens: u32,
}

/// Place in the order of all attempts; the smallest is first. No two are equal.
type Rank = (Reverse<i32>, u64);

#[derive(Debug)]
struct Running {
    rank: Rank,
    sequence: Sequence,
    /// Its blocks, in order; maybe some more than it needs yet.
    table: Vec<BlockId>,
    /// How many of them are known to be registered, or to hold what others have registered.
    registered: usize,
    /// What the current step computes of it.
    span: Option<Span>,
}

#[derive(Debug)]
struct Waiting {
    rank: Rank,
    sequence: Sequence,
    /// Whether it has been running, and comes back only when all that it had fits.
    preempted: bool,
}

/// All attempts of one engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    options: SchedulerOptions,
    max_sequences: usize,
    /// Bytes of an exported block.
    block_bytes: usize,
    blocks: BlockManager,
    /// In order of rank, as are those that wait.
    running: Vec<Running>,
    waiting: Vec<Waiting>,
    arrivals: u64,
    /// Copies that the plan needs, to be made in this order before anything is computed.
    copies: Vec<(BlockId, BlockId)>,
    sampler: Sampler,
    logits: Vec<f32>,
    totals: Totals,
    /// The suspect that the latest plan is for.
    alone: Option<AttemptId>,
    /// Memory that is used again: chunks (always empty), an outcome, blocks of a prefix, places that ended.
    chunks: Vec<Chunk<'static>>,
    outcome: StepOutcome,
    hits: Vec<BlockId>,
    ended: Vec<usize>,
}

impl Scheduler {
    /// A scheduler for one loaded model.
    #[must_use]
    pub fn new(info: &ModelInfo, options: SchedulerOptions) -> Self {
        let max_sequences = info.max_sequences;
        Self {
            limits: Limits::of(info),
            options: SchedulerOptions {
                step_tokens: options.step_tokens.max(max_sequences).max(1),
                ..options
            },
            max_sequences,
            block_bytes: info.kv_block_bytes,
            blocks: BlockManager::new(info.kv_blocks),
            running: Vec::with_capacity(max_sequences),
            waiting: Vec::with_capacity(max_sequences + options.max_waiting),
            arrivals: 0,
            copies: Vec::with_capacity(max_sequences),
            sampler: Sampler::new(),
            logits: Vec::new(),
            totals: Totals::default(),
            alone: None,
            chunks: Vec::with_capacity(max_sequences),
            outcome: StepOutcome::default(),
            hits: Vec::new(),
            ended: Vec::with_capacity(max_sequences),
        }
    }

    /// Takes an attempt in. One that is here already is left alone; a later epoch of a request replaces an earlier one,
    /// which is returned.
    ///
    /// # Errors
    /// [`AttemptError::Invalid`] or [`AttemptError::Full`]; nothing has changed then.
    pub fn start(&mut self, start: StartAttempt) -> Result<Option<AttemptId>, AttemptError> {
        self.start_with(start, None)
    }

    /// As [`Self::start`], for an attempt whose output a grammar narrows. The grammar must be at its beginning: it is given
    /// the committed tokens.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        &mut self,
        start: StartAttempt,
        grammar: Option<Box<dyn TokenMask>>,
    ) -> Result<Option<AttemptId>, AttemptError> {
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
        let mut sequence = Sequence::admit(start, &self.limits)?;
        let live = self.running.len() + self.waiting.len();
        if earlier.is_none() && live >= self.max_sequences + self.options.max_waiting {
            return Err(AttemptError::Full {
                running: self.running.len() as u32,
                waiting: self.waiting.len() as u32,
                limit: self.options.max_waiting as u32,
            });
        }
        if let Some(grammar) = grammar {
            sequence.set_grammar(grammar, self.limits.vocab_size);
        }
        if let Some(known) = earlier {
            self.cancel(known);
        }
        self.arrivals += 1;
        let rank = (Reverse(sequence.priority()), self.arrivals);
        self.enqueue(Waiting {
            rank,
            sequence,
            preempted: false,
        });
        self.admit_waiting();
        Ok(earlier)
    }

    /// Ends an attempt and frees its blocks. Returns whether it was here.
    pub fn cancel(&mut self, attempt: AttemptId) -> bool {
        if let Some(index) = self
            .waiting
            .iter()
            .position(|waiting| waiting.sequence.attempt() == attempt)
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

    /// Runs the planned step, or nothing (`None`) if there is no work.
    ///
    /// # Errors
    /// [`StepError`]: the runner failed, and no attempt can go on.
    pub fn run(&mut self, runner: &mut dyn ModelRunner) -> Result<Option<StepOutcome>, StepError> {
        self.make_copies(runner)?;
        if self.running.iter().all(|running| running.span.is_none()) {
            return Ok(None);
        }
        self.execute(runner)?;
        Ok(Some(self.collect()))
    }

    /// Gives an outcome's memory back, so that the next one need not allocate any.
    pub fn recycle(&mut self, mut outcome: StepOutcome) {
        outcome.tokens.clear();
        outcome.failed.clear();
        outcome.begun.clear();
        outcome.prompt_tokens = 0;
        self.outcome = outcome;
    }

    /// Whether a step would do anything.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// Attempts that steps compute.
    #[must_use]
    pub fn running_len(&self) -> usize {
        self.running.len()
    }

    /// Attempts that wait for a place or for blocks.
    #[must_use]
    pub fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    /// Positions of all blocks that sequences hold.
    #[must_use]
    pub fn kv_used_tokens(&self) -> u64 {
        (self.blocks.counts().used * BLOCK) as u64
    }

    /// How many blocks are free, used, cached.
    #[must_use]
    pub fn block_counts(&self) -> BlockCounts {
        self.blocks.counts()
    }

    /// Cached blocks that had to go, since the start.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.blocks.evictions()
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
            .chain(
                self.waiting
                    .iter()
                    .map(|waiting| waiting.sequence.attempt()),
            )
    }

    fn make_copies(&mut self, runner: &mut dyn ModelRunner) -> Result<(), StepError> {
        self.copies
            .drain(..)
            .try_for_each(|(from, to)| runner.copy_block(from, to))
    }

    fn execute(&mut self, runner: &mut dyn ModelRunner) -> Result<(), StepError> {
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
    fn collect(&mut self) -> StepOutcome {
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

#[cfg(test)]
mod tests;
