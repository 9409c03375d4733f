//! A deterministic [`ModelRunner`] without a model, for tests of everything around one.
//!
//! Its logits are a hash of the *whole* token prefix: one wrong, missing or repeated token anywhere in a replay changes
//! every token after it. It checks the scheduler's side of the contract (each chunk must begin where its slot's cache
//! ends), and can be told to fail in the ways real engines fail ([`Faults`]).

mod faults;

use std::time::Duration;

pub use faults::{FaultError, Faults};

use crate::runner::{Chunk, ModelInfo, ModelRunner, Slot, StepError, Ticks};
use crate::sampler::SAMPLING_NUMERICS;

/// Logits lie in `-LOGIT_SPAN ..= LOGIT_SPAN`.
const LOGIT_SPAN: f32 = 8.0;

/// The shape of a fake model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeOptions {
    pub vocab_size: usize,
    pub context_length: usize,
    /// Number of slots.
    pub slots: usize,
    pub eos_token_ids: Vec<u32>,
    /// Stands for the weights: two fakes with different salts are different models.
    pub salt: u64,
    /// How long a step takes.
    pub step_delay: Duration,
    /// In how many parts a step reports its delay; 0 reports none.
    pub step_ticks: u32,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            vocab_size: 512,
            context_length: 2048,
            slots: 16,
            eos_token_ids: Vec::new(),
            salt: 0,
            step_delay: Duration::ZERO,
            step_ticks: 0,
        }
    }
}

/// The runner. Its "cache" is one hash per position.
#[derive(Debug)]
pub struct FakeRunner {
    info: ModelInfo,
    salt: u64,
    step_delay: Duration,
    step_ticks: u32,
    ticks: Ticks,
    faults: Faults,
    /// Per slot, the hash of every prefix that it holds.
    caches: Vec<Vec<u64>>,
    steps: u64,
}

impl FakeRunner {
    /// A fake of this shape.
    #[must_use]
    pub fn new(options: FakeOptions, faults: Faults) -> Self {
        let info = ModelInfo {
            architecture: "FakeForCausalLM".to_owned(),
            context_length: options.context_length,
            vocab_size: options.vocab_size,
            eos_token_ids: options.eos_token_ids,
            device: "fake".to_owned(),
            dtype: "f32".to_owned(),
            slots: options.slots,
            fingerprint: format!(
                "fake-{SAMPLING_NUMERICS}-{:016x}-{}",
                options.salt, options.vocab_size
            ),
            exact: true,
        };
        let caches = vec![Vec::new(); options.slots];
        Self {
            info,
            salt: options.salt,
            step_delay: options.step_delay,
            step_ticks: options.step_ticks,
            ticks: Ticks::default(),
            faults,
            caches,
            steps: 0,
        }
    }

    /// The hash of a prefix of `length` tokens that ends with `token`.
    fn extend_hash(&self, prefix: Option<u64>, token: u32) -> u64 {
        mix(prefix
            .unwrap_or(self.salt ^ 0x5eed)
            .wrapping_add(u64::from(token) + 1))
    }

    /// Takes as long as it is told to, and says how it gets on.
    fn take_time(&self) {
        if self.step_delay.is_zero() {
            return;
        }
        let parts = self.step_ticks.max(1);
        for _ in 0..parts {
            std::thread::sleep(self.step_delay / parts);
            if self.step_ticks > 0 {
                self.ticks.tick();
            }
        }
    }

    fn run_chunk(&mut self, chunk: &Chunk<'_>, logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.check(chunk).map_err(|message| StepError { message })?;
        let mut cache = std::mem::take(&mut self.caches[chunk.slot.0 as usize]);
        let first_row = chunk.tokens.len() - chunk.logits_for;
        for (index, &token) in chunk.tokens.iter().enumerate() {
            self.faults.at_token(chunk.start + index, token);
            let hash = self.extend_hash(cache.last().copied(), token);
            cache.push(hash);
            if index >= first_row {
                logits.extend((0..self.info.vocab_size as u64).map(|id| logit(hash, id)));
            }
        }
        self.caches[chunk.slot.0 as usize] = cache;
        Ok(())
    }

    /// What a real runner would answer with garbage, the fake answers with an error.
    fn check(&self, chunk: &Chunk<'_>) -> Result<(), String> {
        let cached = self
            .caches
            .get(chunk.slot.0 as usize)
            .ok_or_else(|| format!("no slot {}", chunk.slot.0))?
            .len();
        if chunk.start != cached {
            return Err(format!(
                "chunk starts at {}, but slot {} holds {cached}",
                chunk.start, chunk.slot.0
            ));
        }
        if chunk.tokens.is_empty() || chunk.logits_for > chunk.tokens.len() {
            return Err(format!(
                "{} rows of {} tokens",
                chunk.logits_for,
                chunk.tokens.len()
            ));
        }
        if chunk.start + chunk.tokens.len() > self.info.context_length {
            return Err(format!(
                "position {} is beyond the context",
                chunk.start + chunk.tokens.len()
            ));
        }
        match chunk
            .tokens
            .iter()
            .find(|&&id| id as usize >= self.info.vocab_size)
        {
            Some(_) => Err("a token is outside the vocabulary".to_owned()),
            None => Ok(()),
        }
    }
}

impl ModelRunner for FakeRunner {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn set_ticks(&mut self, ticks: Ticks) {
        self.ticks = ticks;
    }

    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.steps += 1;
        self.faults
            .at_step(self.steps)
            .map_err(|message| StepError { message })?;
        self.take_time();
        for (index, chunk) in chunks.iter().enumerate() {
            if chunks[..index].iter().any(|other| other.slot == chunk.slot) {
                return Err(StepError {
                    message: format!("slot {} stands twice in a step", chunk.slot.0),
                });
            }
            self.run_chunk(chunk, logits)?;
        }
        self.faults.spoil(self.steps, logits);
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        if let Some(cache) = self.caches.get_mut(slot.0 as usize) {
            cache.clear();
        }
    }
}

/// SplitMix64's finalizer.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn logit(hash: u64, id: u64) -> f32 {
    let bits = mix(hash ^ id.wrapping_mul(0xd134_2543_de82_ef95));
    let unit = (bits >> 40) as f32 / (1_u32 << 24) as f32;
    (unit * 2.0 - 1.0) * LOGIT_SPAN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(runner: &mut FakeRunner, start: usize, tokens: &[u32]) -> Result<Vec<f32>, StepError> {
        let mut logits = Vec::new();
        runner.execute(
            &[Chunk {
                slot: Slot(0),
                start,
                tokens,
                logits_for: 1,
            }],
            &mut logits,
        )?;
        Ok(logits)
    }

    #[test]
    fn rows_depend_on_the_whole_prefix_and_not_on_its_cuts() {
        let mut runner = FakeRunner::new(FakeOptions::default(), Faults::default());
        let whole = run(&mut runner, 0, &[1, 2, 3]).unwrap();
        runner.release(Slot(0));
        run(&mut runner, 0, &[1]).unwrap();
        assert_eq!(run(&mut runner, 1, &[2, 3]).unwrap(), whole);
        for other in [[0, 2, 3], [1, 1, 3], [1, 2, 4], [2, 1, 3]] {
            runner.release(Slot(0));
            assert_ne!(run(&mut runner, 0, &other).unwrap(), whole);
        }
        let mut salted = FakeRunner::new(
            FakeOptions {
                salt: 1,
                ..FakeOptions::default()
            },
            Faults::default(),
        );
        assert_ne!(run(&mut salted, 0, &[1, 2, 3]).unwrap(), whole);
    }

    #[test]
    fn breaches_of_the_contract_are_errors() {
        let mut runner = FakeRunner::new(FakeOptions::default(), Faults::default());
        run(&mut runner, 0, &[1, 2]).unwrap();
        for (start, tokens) in [
            (1, &[2_u32][..]),
            (3, &[2]),
            (0, &[1]),
            (2, &[]),
            (2, &[512]),
            (2, &[0; 2047]),
        ] {
            assert!(
                run(&mut runner, start, tokens).is_err(),
                "{start} {tokens:?}"
            );
        }
    }
}
