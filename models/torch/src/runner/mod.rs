//! Executes the engine's steps: a Llama model with one KV slot per running sequence.
//!
//! ```text
//!  chunks ──rows──> embedding, layers ──Attention──> KV cache of the chunks' slots
//!                          └──wanted rows──> logits
//! ```
//!
//! All chunks of a step run as one batch of rows; only attention knows which rows belong together. Invariant ([`Numerics::Exact`]): a row of
//! logits is a function of the sequence's tokens up to it, whatever the chunks, slots and neighbours; see `tests/independence.rs`.

mod exact_cache;
mod stock_cache;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{Device, Tensor};
use understudy_engine_core::runner::{
    Chunk, ModelInfo, ModelRunner, Slot, StepError, Ticks, panic_text,
};

pub use exact_cache::ExactCache;
pub use stock_cache::StockCache;

use crate::exact::SharedPool;
use crate::llama::{Attention, Llama};

/// Whose arithmetic a model runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numerics {
    /// Our kernels, CPU only: bits depend on nothing but the sequence.
    Exact,
    /// LibTorch's operators, any device: bits may change with the batch.
    Stock,
}

/// Keys and values of all slots.
pub enum Cache {
    Exact(ExactCache),
    Stock(StockCache),
}

/// A loaded model with its slots. See [`crate::load`] for how one comes about.
pub struct LlamaRunner {
    model: Llama,
    cache: Cache,
    info: ModelInfo,
    ticks: Ticks,
}

impl LlamaRunner {
    /// Puts the parts together; `info.slots` slots of `info.context_length` positions.
    ///
    /// With a `pool`, the model must have been made exact on it; keys and values are then kept for the kernels.
    #[must_use]
    pub fn new(model: Llama, info: ModelInfo, pool: Option<SharedPool>) -> Self {
        let cache = match pool {
            Some(pool) => Cache::Exact(ExactCache::new(
                model.config(),
                info.slots,
                info.context_length,
                pool,
            )),
            None => Cache::Stock(StockCache::new(&model, info.slots, info.context_length)),
        };
        Self {
            model,
            cache,
            info,
            ticks: Ticks::default(),
        }
    }

    /// What a step may not ask for; the scheduler never does.
    fn check(&self, chunks: &[Chunk<'_>]) -> Result<(), StepError> {
        let mut slots = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let Slot(slot) = chunk.slot;
            let end = chunk.start + chunk.tokens.len();
            let problem = if slot as usize >= self.info.slots {
                format!("there are {} slots", self.info.slots)
            } else if slots.contains(&slot) {
                "the slot occurs twice in one step".to_owned()
            } else if chunk.tokens.is_empty() || chunk.logits_for > chunk.tokens.len() {
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
                slots.push(slot);
                continue;
            };
            return Err(StepError {
                message: format!("impossible chunk for slot {slot}: {problem}"),
            });
        }
        Ok(())
    }

    fn forward(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) {
        let device = self.model.device();
        let mut ids = Vec::new();
        let mut positions = Vec::new();
        let mut wanted = Vec::new();
        for chunk in chunks {
            ids.extend(chunk.tokens.iter().map(|id| i64::from(*id)));
            positions.extend(
                (chunk.start..chunk.start + chunk.tokens.len()).map(|position| position as i64),
            );
            wanted.extend((ids.len() - chunk.logits_for..ids.len()).map(|row| row as i64));
        }
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let (ids, positions) = (tensor(&ids), tensor(&positions));
        let attention: Box<dyn Attention + '_> = match &mut self.cache {
            Cache::Exact(cache) => Box::new(cache.attention(chunks)),
            Cache::Stock(cache) => Box::new(cache.attention(chunks)),
        };
        let mut attention = Ticking {
            inner: attention,
            ticks: &self.ticks,
        };
        let hidden = self.model.forward(&ids, &positions, &mut attention);
        if wanted.is_empty() {
            // A device's faults show when its work is waited for: they must not show in the next step.
            if let Device::Cuda(index) = device {
                tch::Cuda::synchronize(index as i64);
            }
            return;
        }
        let all_wanted = wanted.len() as i64 == hidden.size()[0];
        let hidden = if all_wanted {
            hidden
        } else {
            hidden.index_select(0, &tensor(&wanted))
        };
        let rows = self
            .model
            .logits(&hidden)
            .to_device(Device::Cpu)
            .contiguous();
        logits.extend_from_slice(crate::exact::values(&rows));
    }
}

/// Tells the owner of the process, at every layer's attention, that the step gets on: a prompt through a large model on a CPU may take
/// longer than an engine may stand still.
struct Ticking<'a> {
    inner: Box<dyn Attention + 'a>,
    ticks: &'a Ticks,
}

impl Attention for Ticking<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        self.ticks.tick();
        let attended = self.inner.attend(layer, q, k, v);
        self.ticks.tick();
        attended
    }
}

impl ModelRunner for LlamaRunner {
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
        let _no_gradients = tch::no_grad_guard();
        // LibTorch's errors (out of memory, a lost device) arrive as panics of tch.
        catch_unwind(AssertUnwindSafe(|| self.forward(chunks, logits))).map_err(|panic| StepError {
            message: panic_text(&*panic),
        })
    }

    fn release(&mut self, _slot: Slot) {
        // A later sequence overwrites positions before it reads them; nothing to do.
    }
}
