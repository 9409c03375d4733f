//! A deterministic [`ModelRunner`] without a model, for tests of everything around one.
//!
//! Its logits are a hash of the *whole* token prefix: one wrong, missing or repeated token anywhere in a replay changes
//! every token after it. Its "keys and values" are the hashes of all prefixes, one a position of a block, so that a wrong
//! table, a copy that was not made or a stale block of the prefix cache is an error or other tokens. It checks the
//! scheduler's side of the contract, and can be told to fail in the ways real engines fail ([`Faults`]).

mod faults;

use std::time::Duration;

pub use faults::{FaultError, Faults};

use crate::runner::{BLOCK, BlockId, Chunk, ModelInfo, ModelRunner, StepError, Ticks};
use crate::sampler::SAMPLING_NUMERICS;

/// Logits lie in `-LOGIT_SPAN ..= LOGIT_SPAN`.
const LOGIT_SPAN: f32 = 8.0;

/// The shape of a fake model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeOptions {
    pub vocab_size: usize,
    pub context_length: usize,
    pub max_sequences: usize,
    /// Blocks of the cache; `None` is room for `max_sequences` whole contexts.
    pub kv_blocks: Option<usize>,
    /// Check every cached position that a chunk builds on, not only those at the edges of blocks.
    pub check_all: bool,
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
            max_sequences: 16,
            kv_blocks: None,
            check_all: false,
            eos_token_ids: Vec::new(),
            salt: 0,
            step_delay: Duration::ZERO,
            step_ticks: 0,
        }
    }
}

/// What a position of a block holds. A hash of 0 means nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cell {
    token: u32,
    /// The hash of the prefix that ends here.
    hash: u64,
}

/// Bytes of an exported [`Cell`].
const CELL_BYTES: usize = 12;

/// The runner. Its "cache" is one [`Cell`] per position.
#[derive(Debug)]
pub struct FakeRunner {
    info: ModelInfo,
    salt: u64,
    step_delay: Duration,
    step_ticks: u32,
    ticks: Ticks,
    faults: Faults,
    cells: Vec<[Cell; BLOCK]>,
    /// Per block, the latest step in which a chunk wrote to it.
    written: Vec<u64>,
    check_all: bool,
    steps: u64,
}

impl FakeRunner {
    /// A fake of this shape.
    #[must_use]
    pub fn new(options: FakeOptions, faults: Faults) -> Self {
        let kv_blocks = options
            .kv_blocks
            .unwrap_or(options.max_sequences * options.context_length.div_ceil(BLOCK));
        let info = ModelInfo {
            architecture: "FakeForCausalLM".to_owned(),
            context_length: options.context_length,
            vocab_size: options.vocab_size,
            eos_token_ids: options.eos_token_ids,
            device: "fake".to_owned(),
            dtype: "f32".to_owned(),
            max_sequences: options.max_sequences,
            kv_blocks,
            kv_block_bytes: BLOCK * CELL_BYTES,
            fingerprint: format!(
                "fake-{SAMPLING_NUMERICS}-{:016x}-{}",
                options.salt, options.vocab_size
            ),
            exact: true,
        };
        Self {
            info,
            salt: options.salt,
            step_delay: options.step_delay,
            step_ticks: options.step_ticks,
            ticks: Ticks::default(),
            faults,
            cells: vec![[Cell::default(); BLOCK]; kv_blocks],
            written: vec![0; kv_blocks],
            check_all: options.check_all,
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

    fn cell(&self, table: &[BlockId], position: usize) -> Cell {
        self.cells[table[position / BLOCK] as usize][position % BLOCK]
    }

    fn run_chunk(&mut self, chunk: &Chunk<'_>, logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.check(chunk)
            .and_then(|()| self.check_cache(chunk))
            .and_then(|()| self.mark_written(chunk))
            .map_err(|message| StepError { message })?;
        let mut prefix = (chunk.start > 0).then(|| self.cell(chunk.table, chunk.start - 1).hash);
        let first_row = chunk.tokens.len() - chunk.logits_for;
        for (index, &token) in chunk.tokens.iter().enumerate() {
            let position = chunk.start + index;
            self.faults.at_token(position, token);
            let hash = self.extend_hash(prefix, token);
            prefix = Some(hash);
            self.cells[chunk.table[position / BLOCK] as usize][position % BLOCK] =
                Cell { token, hash };
            if index >= first_row {
                logits.extend((0..self.info.vocab_size as u64).map(|id| logit(hash, id)));
            }
        }
        Ok(())
    }

    /// Each position that is looked at must hold the hash that follows from the position before it.
    fn check_cache(&self, chunk: &Chunk<'_>) -> Result<(), String> {
        let stride = if self.check_all { 1 } else { BLOCK };
        let last = chunk.start.checked_sub(1);
        for position in (0..chunk.start).step_by(stride).chain(last) {
            let prefix = position
                .checked_sub(1)
                .map(|before| self.cell(chunk.table, before).hash);
            let cell = self.cell(chunk.table, position);
            if cell.hash != self.extend_hash(prefix, cell.token) {
                return Err(format!(
                    "chunk starts at {}, but block {} does not hold position {position}",
                    chunk.start,
                    chunk.table[position / BLOCK]
                ));
            }
        }
        Ok(())
    }

    /// No two chunks of a step write to one block.
    fn mark_written(&mut self, chunk: &Chunk<'_>) -> Result<(), String> {
        let end = chunk.start + chunk.tokens.len();
        for &block in &chunk.table[chunk.start / BLOCK..end.div_ceil(BLOCK)] {
            let written = &mut self.written[block as usize];
            if *written == self.steps {
                return Err(format!("two chunks of a step write to block {block}"));
            }
            *written = self.steps;
        }
        Ok(())
    }

    /// What a real runner would answer with garbage, the fake answers with an error.
    fn check(&self, chunk: &Chunk<'_>) -> Result<(), String> {
        let blocks = (chunk.start + chunk.tokens.len()).div_ceil(BLOCK);
        if chunk.table.len() < blocks {
            return Err(format!(
                "{blocks} blocks are needed, and the table has {}",
                chunk.table.len()
            ));
        }
        if let Some(block) = chunk
            .table
            .iter()
            .find(|&&block| block as usize >= self.cells.len())
        {
            return Err(format!("no block {block}"));
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
        if chunks.len() > self.info.max_sequences {
            return Err(StepError {
                message: format!("{} sequences in a step", chunks.len()),
            });
        }
        for chunk in chunks {
            self.run_chunk(chunk, logits)?;
        }
        self.faults.spoil(self.steps, logits);
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError> {
        self.cells[to as usize] = self.cells[from as usize];
        Ok(())
    }

    fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
        for cell in &self.cells[block as usize] {
            out.extend(cell.token.to_le_bytes());
            out.extend(cell.hash.to_le_bytes());
        }
        Ok(())
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError> {
        let (cells, rest) = bytes.as_chunks::<CELL_BYTES>();
        if cells.len() != BLOCK || !rest.is_empty() {
            return Err(StepError {
                message: format!("a block of {} bytes", bytes.len()),
            });
        }
        for (cell, bytes) in self.cells[block as usize].iter_mut().zip(cells) {
            let [a, b, c, d, hash @ ..] = *bytes;
            cell.token = u32::from_le_bytes([a, b, c, d]);
            cell.hash = u64::from_le_bytes(hash);
        }
        Ok(())
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

    const TABLE: [BlockId; 128] = {
        let mut table = [0; 128];
        let mut index = 0;
        while index < 128 {
            table[index] = 127 - index as BlockId;
            index += 1;
        }
        table
    };

    fn run_in(
        runner: &mut FakeRunner,
        table: &[BlockId],
        start: usize,
        tokens: &[u32],
    ) -> Result<Vec<f32>, StepError> {
        let mut logits = Vec::new();
        let chunk = Chunk {
            table,
            start,
            tokens,
            logits_for: 1,
        };
        runner.execute(&[chunk], &mut logits)?;
        Ok(logits)
    }

    fn run(runner: &mut FakeRunner, start: usize, tokens: &[u32]) -> Result<Vec<f32>, StepError> {
        run_in(runner, &TABLE, start, tokens)
    }

    fn fake() -> FakeRunner {
        FakeRunner::new(FakeOptions::default(), Faults::default())
    }

    #[test]
    fn rows_depend_on_the_whole_prefix_and_not_on_its_cuts() {
        let mut runner = fake();
        let whole = run(&mut runner, 0, &[1, 2, 3]).unwrap();
        run(&mut runner, 0, &[1]).unwrap();
        assert_eq!(run(&mut runner, 1, &[2, 3]).unwrap(), whole);
        for other in [[0, 2, 3], [1, 1, 3], [1, 2, 4], [2, 1, 3]] {
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
        let mut runner = fake();
        run(&mut runner, 0, &[1, 2]).unwrap();
        for (start, tokens) in [
            (3, &[2_u32][..]),
            (2, &[]),
            (2, &[512]),
            (2, &[0; 2047]),
            (17, &[1]),
        ] {
            assert!(
                run(&mut runner, start, tokens).is_err(),
                "{start} {tokens:?}"
            );
        }
        assert!(run_in(&mut runner, &[127], 0, &[0; 17]).is_err(), "short");
        assert!(run_in(&mut runner, &[9999], 0, &[0]).is_err(), "no block");
        let chunk = Chunk {
            table: &TABLE,
            start: 0,
            tokens: &[1],
            logits_for: 0,
        };
        let twice = runner.execute(&[chunk.clone(), chunk], &mut Vec::new());
        assert!(twice.unwrap_err().message.contains("two chunks"));
    }

    #[test]
    fn a_table_with_a_block_of_another_prefix_is_an_error() {
        let mut runner = fake();
        run_in(&mut runner, &[0, 1], 0, &[5; 20]).unwrap();
        run_in(&mut runner, &[2, 3], 0, &[[6; 16], [5; 16]].concat()).unwrap();
        run_in(&mut runner, &[0, 1], 20, &[5]).unwrap();
        for table in [[2, 1], [0, 3], [1, 0]] {
            assert!(run_in(&mut runner, &table, 20, &[5]).is_err(), "{table:?}");
        }
    }

    #[test]
    fn blocks_can_be_copied_and_carried_to_another_fake() {
        let (mut one, mut other) = (fake(), fake());
        run_in(&mut one, &[0], 0, &[5; 16]).unwrap();
        let next = run_in(&mut one, &[0, 1], 16, &[7]).unwrap();
        one.copy_block(0, 9).unwrap();
        assert_eq!(run_in(&mut one, &[9, 8], 16, &[7]).unwrap(), next);
        let mut bytes = Vec::new();
        one.export_block(0, &mut bytes).unwrap();
        assert_eq!(bytes.len(), one.info().kv_block_bytes);
        other.import_block(4, &bytes).unwrap();
        assert_eq!(run_in(&mut other, &[4, 5], 16, &[7]).unwrap(), next);
        assert!(other.import_block(4, &bytes[1..]).is_err());
    }
}
