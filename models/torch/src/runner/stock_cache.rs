//! Keys and values as LibTorch tensors, attention by its `scaled_dot_product_attention`, one call per chunk: CUDA, and the CPU's
//! fast-but-batch-dependent mode.

use tch::{Device, Kind, Tensor};
use understudy_engine_core::runner::{Chunk, Slot};

use crate::checkpoint::StoredType;
use crate::config::LlamaConfig;
use crate::llama::{Attention, Llama};

/// One `[slots, kv_heads, context, head_dim]` tensor each for keys and values, per layer.
pub struct StockCache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
}

impl StockCache {
    /// In the model's element type, on its device.
    #[must_use]
    pub fn new(model: &Llama, slots: usize, context_length: usize) -> Self {
        let config = model.config();
        let shape = [
            slots as i64,
            config.num_key_value_heads,
            context_length as i64,
            config.head_dim,
        ];
        let tensors = || -> Vec<Tensor> {
            (0..config.num_hidden_layers)
                .map(|_| Tensor::empty(shape, (model.kind(), model.device())))
                .collect()
        };
        Self {
            keys: tensors(),
            values: tensors(),
        }
    }

    /// Bytes that such a cache takes in the given element type, whether used or not; the largest number if a configuration asks for
    /// more than a number can say.
    #[must_use]
    pub fn size_bytes(
        config: &LlamaConfig,
        slots: usize,
        context_length: usize,
        dtype: StoredType,
    ) -> u64 {
        // Keys and values.
        (2 * dtype.size_bytes() as u64)
            .saturating_mul(config.num_key_value_heads as u64)
            .saturating_mul(config.head_dim as u64)
            .saturating_mul(config.num_hidden_layers as u64)
            .saturating_mul(slots as u64)
            .saturating_mul(context_length as u64)
    }

    /// The attention of one step over these chunks.
    pub fn attention<'a>(&'a mut self, chunks: &[Chunk<'_>]) -> impl Attention + 'a {
        let spans = chunks
            .iter()
            .map(|chunk| {
                let Slot(slot) = chunk.slot;
                Span {
                    slot: i64::from(slot),
                    start: chunk.start as i64,
                    rows: chunk.tokens.len() as i64,
                }
            })
            .collect();
        StepAttention { cache: self, spans }
    }
}

#[derive(Clone, Copy)]
struct Span {
    slot: i64,
    start: i64,
    rows: i64,
}

struct StepAttention<'a> {
    cache: &'a mut StockCache,
    spans: Vec<Span>,
}

impl Attention for StepAttention<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (keys, values) = (&self.cache.keys[layer], &self.cache.values[layer]);
        let mut first = 0;
        let parts: Vec<Tensor> = self
            .spans
            .iter()
            .map(|span| {
                let rows = |x: &Tensor| x.narrow(0, first, span.rows).transpose(0, 1);
                let end = span.start + span.rows;
                let (slot_keys, slot_values) = (keys.get(span.slot), values.get(span.slot));
                slot_keys.narrow(1, span.start, span.rows).copy_(&rows(k));
                slot_values.narrow(1, span.start, span.rows).copy_(&rows(v));
                let part = attend_span(
                    *span,
                    &rows(q),
                    &slot_keys.narrow(1, 0, end),
                    &slot_values.narrow(1, 0, end),
                );
                first += span.rows;
                part
            })
            .collect();
        Tensor::cat(&parts, 0)
    }
}

/// `q` is `[heads, rows, head_dim]`, `k` and `v` are `[kv_heads, end, head_dim]`; returns `[rows, heads * head_dim]`.
fn attend_span(span: Span, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let grouped = q.size()[0] != k.size()[0];
    let from_start = span.start == 0 && span.rows > 1;
    let mask = (span.rows > 1 && !from_start).then(|| causal_mask(span, q.device()));
    let out = Tensor::scaled_dot_product_attention(
        &q.unsqueeze(0),
        &k.unsqueeze(0),
        &v.unsqueeze(0),
        mask.as_ref(),
        0.0,
        from_start,
        None,
        grouped,
    );
    out.squeeze_dim(0).transpose(0, 1).reshape([span.rows, -1])
}

/// `[rows, start + rows]`: row `i` sees positions `0 ..= start + i`.
fn causal_mask(span: Span, device: Device) -> Tensor {
    Tensor::ones([span.rows, span.start + span.rows], (Kind::Bool, device)).tril(span.start)
}
