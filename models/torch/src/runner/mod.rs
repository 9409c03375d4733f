//! Executes the engine's steps with LibTorch's operators, on a GPU or a CPU.
//!
//! ```text
//!  chunks ──Plan──> rows ──> embedding, layers ──Attend──> blocks of keys and values
//!                                   └──wanted rows──> logits
//! ```
//!
//! All chunks of a step run as one batch of rows; only attention knows which rows belong together. A step sends one list of indices to the
//! device and fetches the wanted logits; nothing between waits for the device (but a mixture of experts, see
//! [`crate::layers::Experts`]).

mod cache;
mod encode;
mod plan;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{Device, Tensor};
use understudy_engine_core::breakdown::{Breakdown, Measured};
use understudy_engine_core::runner::{
    BLOCK, BlockId, Chunk, ModelInfo, ModelRunner, StepError, Ticks, panic_text,
};

pub use cache::BlockCache;
pub use encode::{Encoded, TorchEncoder};

use crate::layers::{Attend, AttentionRule};
use crate::meter::Meter;
use crate::model::Model;
use plan::Plan;

/// A loaded model with its blocks. See [`crate::load`] for how one comes about.
pub struct TorchRunner {
    model: Model,
    cache: BlockCache,
    /// Those that occur in the model's layers.
    windows: Vec<Option<usize>>,
    info: ModelInfo,
    ticks: Ticks,
    meter: Meter,
}

impl TorchRunner {
    /// Puts the parts together; allocates `info.kv_blocks` blocks.
    #[must_use]
    pub fn new(model: Model, info: ModelInfo) -> Self {
        let cache = BlockCache::new(model.spec(), info.kv_blocks, (model.kind(), model.device()));
        let mut windows = Vec::new();
        for layer in &model.spec().layers {
            if !windows.contains(&layer.attention.window) {
                windows.push(layer.attention.window);
            }
        }
        Self {
            model,
            cache,
            windows,
            info,
            ticks: Ticks::default(),
            meter: Meter::default(),
        }
    }

    /// What a step may not ask for; the scheduler never does.
    fn check(&self, chunks: &[Chunk<'_>]) -> Result<(), StepError> {
        let mut written = HashSet::new();
        for (index, chunk) in chunks.iter().enumerate() {
            let problem = self
                .problem(chunk)
                .or_else(|| overlap(chunk, &mut written))
                .or_else(|| {
                    (index >= self.info.max_sequences)
                        .then(|| format!("{} sequences are a step's most", self.info.max_sequences))
                });
            if let Some(problem) = problem {
                return Err(StepError {
                    message: format!("impossible chunk {index}: {problem}"),
                });
            }
        }
        Ok(())
    }

    fn problem(&self, chunk: &Chunk<'_>) -> Option<String> {
        let (count, info) = (chunk.tokens.len(), &self.info);
        let end = chunk.start + count;
        if count == 0 || chunk.logits_for > count {
            return Some(format!("{count} tokens, logits for {}", chunk.logits_for));
        }
        if end > info.context_length {
            let context = info.context_length;
            return Some(format!("position {end} is beyond the context of {context}"));
        }
        if end > chunk.table.len() * BLOCK {
            return Some(format!("{} blocks for {end} positions", chunk.table.len()));
        }
        let mut blocks = chunk.table.iter();
        if let Some(block) = blocks.find(|block| **block as usize >= info.kv_blocks) {
            return Some(format!("block {block} of {}", info.kv_blocks));
        }
        let mut ids = chunk.tokens.iter();
        let beyond = ids.find(|id| **id as usize >= info.vocab_size)?;
        Some(format!(
            "token id {beyond} is beyond the vocabulary of {}",
            info.vocab_size
        ))
    }

    fn forward(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>, meter: &Meter) {
        let device = self.model.device();
        let plan = Plan::of(chunks, &self.windows);
        let indices = Tensor::from_slice(&plan.indices).to_device(device);
        let part = |range: &std::ops::Range<usize>| {
            indices.narrow(0, range.start as i64, range.len() as i64)
        };
        let kind = self.model.kind();
        let mut attention = Ticking {
            inner: self.cache.attention(&plan, &indices, &self.windows, kind),
            ticks: &self.ticks,
        };
        let (ids, positions) = (part(&plan.ids), part(&plan.positions));
        let hidden = self.model.forward(&ids, &positions, &mut attention, meter);
        if plan.wanted.is_empty() {
            // A device's faults show when its work is waited for: they must not show in the next step.
            if let Device::Cuda(index) = device {
                tch::Cuda::synchronize(index as i64);
            }
            return;
        }
        let wanted = hidden.index_select(0, &part(&plan.wanted));
        let rows = self.model.logits(&wanted).to_device(Device::Cpu);
        let first = logits.len();
        logits.resize(first + rows.numel(), 0.0);
        rows.contiguous()
            .copy_data(&mut logits[first..], rows.numel());
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

/// Two chunks that write the same block.
fn overlap(chunk: &Chunk<'_>, written: &mut HashSet<BlockId>) -> Option<String> {
    let end = chunk.start + chunk.tokens.len();
    let mut blocks = chunk.table[chunk.start / BLOCK..end.div_ceil(BLOCK)].iter();
    blocks
        .find(|block| !written.insert(**block))
        .map(|block| format!("block {block} is written twice in one step"))
}

/// LibTorch's errors (out of memory, a lost device) arrive as panics of tch.
fn caught<T>(run: impl FnOnce() -> T) -> Result<T, StepError> {
    let _no_gradients = tch::no_grad_guard();
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| StepError {
        message: panic_text(&*panic),
    })
}

/// Tells the owner of the process, at every layer's attention, that the step gets on: a prompt through a large model on a CPU may take
/// longer than an engine may stand still.
struct Ticking<'a, A> {
    inner: A,
    ticks: &'a Ticks,
}

impl<A: Attend> Attend for Ticking<'_, A> {
    fn attend(
        &mut self,
        layer: usize,
        rule: &AttentionRule,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Tensor {
        self.ticks.tick();
        let attended = self.inner.attend(layer, rule, q, k, v);
        self.ticks.tick();
        attended
    }
}

impl ModelRunner for TorchRunner {
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
        let meter = std::mem::take(&mut self.meter);
        let done = caught(|| meter.step(|| self.forward(chunks, logits, &meter)));
        self.meter = meter;
        done
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), StepError> {
        self.check_block(from)?;
        self.check_block(to)?;
        caught(|| self.cache.copy(from, to))
    }

    fn export_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
        self.check_block(block)?;
        caught(|| self.cache.export(block, out))
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), StepError> {
        self.check_block(block)?;
        if bytes.len() != self.info.kv_block_bytes {
            return Err(StepError {
                message: format!(
                    "a block has {} bytes, not {}",
                    self.info.kv_block_bytes,
                    bytes.len()
                ),
            });
        }
        caught(|| self.cache.import(block, bytes))
    }
}

impl Measured for TorchRunner {
    fn measure(&mut self, on: bool) {
        self.meter = if on {
            Meter::on(self.model.device())
        } else {
            Meter::default()
        };
    }

    fn breakdown(&self) -> Option<Breakdown> {
        self.meter.breakdown()
    }
}
