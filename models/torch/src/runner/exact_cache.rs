//! Keys and values for our own attention kernel: one block pool per layer, every slot owning a fixed run of blocks.

use tch::Tensor;
use understudy_engine_core::runner::{Chunk, Slot};
use understudy_kernels::{BLOCK, KvBlocks, RowPlace, attend};

use crate::config::LlamaConfig;
use crate::exact::{SharedPool, fresh, values};
use crate::llama::Attention;

/// The CPU cache. Physical memory grows with the positions in use.
pub struct ExactCache {
    layers: Vec<KvBlocks>,
    /// The blocks of each slot, in order.
    tables: Vec<Vec<u32>>,
    heads: usize,
    pool: SharedPool,
}

impl ExactCache {
    /// `slots` slots of `context_length` positions.
    #[must_use]
    pub fn new(
        config: &LlamaConfig,
        slots: usize,
        context_length: usize,
        pool: SharedPool,
    ) -> Self {
        let (kv_heads, head_dim) = (
            config.num_key_value_heads as usize,
            config.head_dim as usize,
        );
        let per_slot = context_length.div_ceil(BLOCK);
        let layers = (0..config.num_hidden_layers)
            .map(|_| KvBlocks::new(slots * per_slot, kv_heads, head_dim))
            .collect();
        let tables = (0..slots)
            .map(|slot| {
                (0..per_slot)
                    .map(|block| (slot * per_slot + block) as u32)
                    .collect()
            })
            .collect();
        Self {
            layers,
            tables,
            heads: config.num_attention_heads as usize,
            pool,
        }
    }

    /// Bytes of address space that such a cache takes when every position is in use; the largest number if a configuration asks for
    /// more than a number can say.
    #[must_use]
    pub fn size_bytes(config: &LlamaConfig, slots: usize, context_length: usize) -> u64 {
        let positions = context_length
            .checked_next_multiple_of(BLOCK)
            .unwrap_or(usize::MAX);
        KvBlocks::position_bytes(
            config.num_key_value_heads as usize,
            config.head_dim as usize,
        )
        .saturating_mul(config.num_hidden_layers)
        .saturating_mul(slots)
        .saturating_mul(positions) as u64
    }

    /// The attention of one step over these chunks.
    pub fn attention<'a>(&'a mut self, chunks: &[Chunk<'_>]) -> impl Attention + 'a {
        let tables = &self.tables;
        let places = chunks
            .iter()
            .flat_map(|chunk| {
                let Slot(slot) = chunk.slot;
                let table = tables[slot as usize].as_slice();
                (chunk.start..chunk.start + chunk.tokens.len())
                    .map(move |position| RowPlace { table, position })
            })
            .collect();
        StepAttention {
            layers: &mut self.layers,
            places,
            heads: self.heads,
            pool: &self.pool,
        }
    }
}

struct StepAttention<'a> {
    layers: &'a mut [KvBlocks],
    places: Vec<RowPlace<'a>>,
    heads: usize,
    pool: &'a SharedPool,
}

impl Attention for StepAttention<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (q, k, v) = (q.contiguous(), k.contiguous(), v.contiguous());
        let kv = &mut self.layers[layer];
        let row = kv.kv_heads() * kv.head_dim();
        let (keys, new) = (values(&k).chunks_exact(row), values(&v).chunks_exact(row));
        for ((place, key), value) in self.places.iter().zip(keys).zip(new) {
            kv.write(
                place.table[place.position / BLOCK],
                place.position % BLOCK,
                key,
                value,
            );
        }
        let width = self.heads * kv.head_dim();
        fresh(&[self.places.len() as i64, width as i64], |out| {
            attend(self.pool, kv, &self.places, self.heads, values(&q), out);
        })
    }
}
