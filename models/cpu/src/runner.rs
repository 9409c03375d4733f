//! Executes the engine's steps on the CPU.
//!
//! Invariant: a row of logits is a function of the sequence's tokens up to it; chunks, blocks, neighbours, threads and instruction set
//! have no part in it (`tests/independence.rs`).

use std::panic::{AssertUnwindSafe, catch_unwind};

use understudy_engine_core::breakdown::{Breakdown, Measured};
use understudy_engine_core::runner::{
    BlockId, Chunk, ModelInfo, ModelRunner, StepError, Ticks, panic_text,
};
use understudy_kernels::{self as ops, BLOCK, KvBlocks, KvFormat, Pool, RowPlace};

use crate::breakdown::{Part, Stopwatch};
use crate::forward::{Arena, StepRows, forward};
use crate::model::Model;

/// A loaded model with its KV blocks. See [`crate::load`] for how one comes about.
pub struct CpuRunner {
    model: Model,
    /// One pool of blocks per layer; a block number means the same positions in all.
    kv: Vec<KvBlocks>,
    pool: Pool,
    info: ModelInfo,
    ticks: Ticks,
    arena: Arena,
    rows: Rows,
    watch: Stopwatch,
}

/// The rows of a step; empty between steps, kept for their memory.
#[derive(Default)]
struct Rows {
    ids: Vec<u32>,
    positions: Vec<usize>,
    places: Vec<RowPlace<'static>>,
    wanted: Vec<usize>,
}

/// An empty vector of another lifetime, in the same memory.
fn recycled<'a>(mut places: Vec<RowPlace<'_>>) -> Vec<RowPlace<'a>> {
    places.clear();
    places
        .into_iter()
        .map(|_| unreachable!("it is empty"))
        .collect()
}

impl CpuRunner {
    /// Puts the parts together, with `info.kv_blocks` blocks.
    #[must_use]
    pub fn new(model: Model, info: ModelInfo, kv_format: KvFormat, pool: Pool) -> Self {
        let attention = model.layers.iter().map(|layer| &layer.attention.spec);
        let kv = attention
            .map(|spec| KvBlocks::of(kv_format, info.kv_blocks, spec.kv_heads, spec.head_dim))
            .collect();
        Self {
            model,
            kv,
            pool,
            info,
            ticks: Ticks::default(),
            arena: Arena::default(),
            rows: Rows::default(),
            watch: Stopwatch::default(),
        }
    }

    /// What a step may not ask for; the scheduler never does.
    fn check(&self, chunks: &[Chunk<'_>]) -> Result<(), StepError> {
        for chunk in chunks {
            let end = chunk.start + chunk.tokens.len();
            let problem = if chunk.tokens.is_empty() || chunk.logits_for > chunk.tokens.len() {
                format!(
                    "{} tokens, logits for {}",
                    chunk.tokens.len(),
                    chunk.logits_for
                )
            } else if end > self.info.context_length {
                format!(
                    "position {end} is beyond the context of {}",
                    self.info.context_length
                )
            } else if end > chunk.table.len() * BLOCK {
                format!("{} blocks for {end} positions", chunk.table.len())
            } else if let Some(block) = chunk
                .table
                .iter()
                .find(|block| **block as usize >= self.info.kv_blocks)
            {
                format!("block {block} of {}", self.info.kv_blocks)
            } else if let Some(id) = chunk
                .tokens
                .iter()
                .find(|id| **id as usize >= self.info.vocab_size)
            {
                format!(
                    "token id {id} is beyond the vocabulary of {}",
                    self.info.vocab_size
                )
            } else {
                continue;
            };
            return Err(StepError {
                message: format!("impossible chunk: {problem}"),
            });
        }
        Ok(())
    }

    fn run(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) {
        self.watch.start();
        let rows = &mut self.rows;
        rows.ids.clear();
        rows.positions.clear();
        rows.wanted.clear();
        let mut places = recycled(std::mem::take(&mut rows.places));
        for chunk in chunks {
            let positions = chunk.start..chunk.start + chunk.tokens.len();
            rows.ids.extend_from_slice(chunk.tokens);
            rows.positions.extend(positions.clone());
            places.extend(positions.map(|position| RowPlace::causal(chunk.table, position)));
            rows.wanted
                .extend(rows.ids.len() - chunk.logits_for..rows.ids.len());
        }
        let step = StepRows {
            ids: &rows.ids,
            token_types: &[],
            positions: &rows.positions,
            places: &places,
            wanted: &rows.wanted,
        };
        let ticks = &self.ticks;
        let hidden = forward(
            &self.model,
            &mut self.kv,
            &self.pool,
            &mut self.arena,
            &step,
            &mut self.watch,
            &|| ticks.tick(),
        );
        rows_to_logits(&self.model, &self.pool, hidden, rows.wanted.len(), logits);
        self.watch.charge(Part::Matmul);
        rows.places = recycled(places);
    }

    fn check_block(&self, block: BlockId) -> Result<(), StepError> {
        if (block as usize) < self.info.kv_blocks {
            return Ok(());
        }
        Err(StepError {
            message: format!("block {block} of {}", self.info.kv_blocks),
        })
    }
}

/// Appends `[rows][vocab]` logits.
fn rows_to_logits(model: &Model, pool: &Pool, hidden: &[f32], rows: usize, logits: &mut Vec<f32>) {
    let first = logits.len();
    logits.resize(first + rows * model.spec.vocab_size, 0.0);
    let target = &mut logits[first..];
    let (head, bias) = model.head();
    head.forward(pool, hidden, rows, target);
    if let Some(bias) = bias {
        for row in target.chunks_exact_mut(bias.len()) {
            ops::add(bias, row);
        }
    }
    if let understudy_checkpoint::spec::OutputSpec::Logits {
        soft_cap: Some(cap),
        ..
    } = model.spec.output
    {
        ops::activate(pool, ops::Activation::SoftCap(cap), target);
    }
}

impl ModelRunner for CpuRunner {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn set_ticks(&mut self, ticks: Ticks) {
        self.ticks = ticks;
    }

    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError> {
        self.check(chunks)?;
        if chunks.is_empty() {
            return Ok(());
        }
        catch_unwind(AssertUnwindSafe(|| self.run(chunks, logits))).map_err(|panic| StepError {
            message: panic_text(&*panic),
        })
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError> {
        self.check_block(from)?;
        self.check_block(to)?;
        self.kv
            .iter_mut()
            .for_each(|layer| layer.copy_block(from, to));
        Ok(())
    }

    fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
        self.check_block(block)?;
        self.kv.iter().for_each(|layer| layer.export(block, out));
        Ok(())
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError> {
        self.check_block(block)?;
        if bytes.len() != self.info.kv_block_bytes {
            return Err(StepError {
                message: format!(
                    "a KV block of {} bytes; {} were expected",
                    bytes.len(),
                    self.info.kv_block_bytes
                ),
            });
        }
        let mut rest = bytes;
        for layer in &mut self.kv {
            let (part, next) = rest.split_at(layer.block_bytes());
            layer.import(block, part);
            rest = next;
        }
        Ok(())
    }
}

impl Measured for CpuRunner {
    fn measure(&mut self, on: bool) {
        self.watch = Stopwatch::new(on);
    }

    fn breakdown(&self) -> Option<Breakdown> {
        self.watch.breakdown()
    }
}
