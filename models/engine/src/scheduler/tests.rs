//! What the tests of the scheduler share: a laboratory around the fake runner, and the oracle.

mod batching;
mod endings;
mod resume;
mod schedules;
mod sharing;
mod speculation;

use std::collections::HashMap;

use super::*;
use crate::{
    fake::{FakeOptions, FakeRunner, Faults},
    frame::{FinishReason, SamplingParams},
    testing::Dice,
};

/// A scheduler with its runner, and everything that came out.
struct Lab {
    scheduler: Scheduler,
    runner: Recorder,
    tokens: HashMap<AttemptId, Vec<StepToken>>,
    failed: HashMap<AttemptId, AttemptError>,
}

/// A runner that notes what it is given.
struct Recorder {
    inner: FakeRunner,
    /// Per step, per chunk: first block, start, length, rows.
    steps: Vec<Vec<(BlockId, usize, usize, usize)>>,
}

impl ModelRunner for Recorder {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.steps.push(
            chunks
                .iter()
                .map(|c| (c.table[0], c.start, c.tokens.len(), c.logits_for))
                .collect(),
        );
        self.inner.execute(chunks, logits)
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError> {
        self.inner.copy_block(from, to)
    }

    fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
        self.inner.export_block(block, out)
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError> {
        self.inner.import_block(block, bytes)
    }
}

fn model() -> FakeOptions {
    FakeOptions {
        vocab_size: 48,
        context_length: 200,
        max_sequences: 4,
        check_all: true,
        eos_token_ids: vec![7],
        ..FakeOptions::default()
    }
}

impl Lab {
    fn new(model: FakeOptions, options: SchedulerOptions) -> Self {
        let inner = FakeRunner::new(model, Faults::default());
        let scheduler = Scheduler::new(inner.info(), options);
        let runner = Recorder {
            inner,
            steps: Vec::new(),
        };
        Self {
            scheduler,
            runner,
            tokens: HashMap::new(),
            failed: HashMap::new(),
        }
    }

    fn start(&mut self, start: &StartAttempt) {
        if let Err(error) = self.scheduler.start(start.clone()) {
            self.failed.insert(start.attempt, error);
        }
    }

    /// Returns whether there was work.
    fn step(&mut self) -> bool {
        self.scheduler.plan();
        self.run_planned()
    }

    /// The step that is planned already.
    fn run_planned(&mut self) -> bool {
        let Some(outcome) = self.scheduler.run(&mut self.runner).unwrap() else {
            return false;
        };
        for token in outcome.tokens {
            self.tokens.entry(token.attempt).or_default().push(token);
        }
        self.failed.extend(outcome.failed);
        true
    }

    fn run(&mut self) {
        while self.step() {}
    }

    fn output(&self, attempt: AttemptId) -> &[StepToken] {
        self.tokens.get(&attempt).map_or(&[], Vec::as_slice)
    }
}

fn attempt(request: u128, epoch: u32) -> AttemptId {
    AttemptId { request, epoch }
}

fn start(request: u128, prompt: &[u32], sampling: &SamplingParams) -> StartAttempt {
    StartAttempt {
        attempt: attempt(request, 1),
        prompt: prompt.to_vec(),
        committed: vec![],
        expect_logprobs: vec![],
        suspect: false,
        priority: 0,
        fork_of: None,
        cache_salt: 0,
        sampling: sampling.clone(),
    }
}

/// The same request, resumed after `cut` tokens of `whole`, comparing the last `compare` of them.
fn resumed(start: &StartAttempt, whole: &[StepToken], cut: usize, compare: usize) -> StartAttempt {
    StartAttempt {
        attempt: attempt(start.attempt.request, 2),
        committed: whole[..cut].iter().map(|token| token.token.id).collect(),
        expect_logprobs: whole[cut - compare..cut]
            .iter()
            .map(|token| token.token.logprob)
            .collect(),
        ..start.clone()
    }
}

fn settings() -> Vec<SamplingParams> {
    let neutral = SamplingParams {
        max_tokens: 30,
        seed: 11,
        ..SamplingParams::default()
    };
    let warm = SamplingParams {
        temperature: 0.9,
        ..neutral.clone()
    };
    vec![
        neutral.clone(),
        SamplingParams {
            ignore_eos: true,
            top_logprobs: 3,
            ..neutral.clone()
        },
        warm.clone(),
        SamplingParams {
            seed: u64::MAX,
            ..warm.clone()
        },
        SamplingParams {
            top_k: 5,
            ..warm.clone()
        },
        SamplingParams {
            top_p: 0.8,
            ..warm.clone()
        },
        SamplingParams {
            min_p: 0.1,
            ..warm.clone()
        },
        SamplingParams {
            top_k: 9,
            top_p: 0.7,
            min_p: 0.02,
            temperature: 1.5,
            top_logprobs: 2,
            ..warm.clone()
        },
        SamplingParams {
            repetition_penalty: 1.3,
            ..neutral.clone()
        },
        SamplingParams {
            presence_penalty: 1.5,
            ..warm.clone()
        },
        SamplingParams {
            frequency_penalty: -0.7,
            ..neutral.clone()
        },
        SamplingParams {
            frequency_penalty: 0.5,
            presence_penalty: -0.5,
            repetition_penalty: 0.8,
            ..warm.clone()
        },
        SamplingParams {
            min_tokens: 12,
            stop_token_ids: vec![3, 9, 20, 21, 22],
            ..warm.clone()
        },
        SamplingParams {
            ignore_eos: true,
            max_tokens: 500,
            ..warm
        },
    ]
}

/// The oracle: the request alone, whole prompt in one chunk.
fn alone(model: &FakeOptions, start: &StartAttempt) -> Vec<StepToken> {
    let mut lab = Lab::new(
        model.clone(),
        SchedulerOptions {
            max_waiting: 0,
            step_tokens: 4096,
        },
    );
    lab.start(start);
    lab.run();
    assert_eq!(lab.failed.get(&start.attempt), None);
    lab.output(start.attempt).to_vec()
}
