//! Keys and values in blocks, and the attention of a step over them.
//!
//! ```text
//!  per layer: [blocks, 16 positions, keys' heads then values' heads, head_dim]
//! ```
//!
//! Keys and values of a position lie together, so that a block is read in one piece. Rows are written by one indexed copy for the whole
//! step, and a group's blocks are gathered by one indexed read.

use tch::{Device, Kind, Tensor};
use understudy_checkpoint::spec::ModelSpec;
use understudy_engine_core::runner::BLOCK;

use super::plan::{Group, Plan, Read};
use crate::layers::{Attend, AttentionRule, Visible, dot_product, mask};

/// The blocks of all layers.
#[derive(Debug)]
pub struct BlockCache {
    layers: Vec<LayerBlocks>,
}

#[derive(Debug)]
struct LayerBlocks {
    /// See the module's diagram.
    pool: Tensor,
    kv_heads: i64,
}

const BLOCK_LEN: i64 = BLOCK as i64;

impl BlockCache {
    /// `blocks` blocks in the given element type and place. Their contents are no one's business until they are written.
    #[must_use]
    pub fn new(spec: &ModelSpec, blocks: usize, options: (Kind, Device)) -> Self {
        let layers = spec.layers.iter().map(|layer| {
            let (kv_heads, head_dim) = (
                layer.attention.kv_heads as i64,
                layer.attention.head_dim as i64,
            );
            let shape = [blocks as i64, BLOCK_LEN, 2 * kv_heads, head_dim];
            LayerBlocks {
                pool: Tensor::empty(shape, options),
                kv_heads,
            }
        });
        Self {
            layers: layers.collect(),
        }
    }

    /// Bytes of a block in all layers; the largest number if a description asks for more than a number can say.
    #[must_use]
    pub fn block_bytes(spec: &ModelSpec, element_bytes: usize) -> usize {
        let per_layer = spec.layers.iter().map(|layer| {
            (2 * BLOCK * element_bytes)
                .saturating_mul(layer.attention.kv_heads)
                .saturating_mul(layer.attention.head_dim)
        });
        per_layer.fold(0, usize::saturating_add)
    }

    /// Copies a block in all layers.
    pub fn copy(&mut self, from: u32, to: u32) {
        for layer in &mut self.layers {
            let from = layer.pool.get(i64::from(from));
            layer.pool.get(i64::from(to)).copy_(&from);
        }
    }

    /// Appends a block of all layers, layer after layer, as the elements lie in memory.
    pub fn export(&self, block: u32, out: &mut Vec<u8>) {
        let parts = self
            .layers
            .iter()
            .map(|layer| layer.pool.get(i64::from(block)).view(-1));
        let all = Tensor::cat(&parts.collect::<Vec<_>>(), 0).to_device(Device::Cpu);
        let first = out.len();
        let elements = all.numel();
        out.resize(first + elements * all.kind().elt_size_in_bytes(), 0);
        all.copy_data_u8(&mut out[first..], elements);
    }

    /// Fills a block with what [`Self::export`] gave; `bytes` are as many as it gives.
    pub fn import(&mut self, block: u32, bytes: &[u8]) {
        let Some(first) = self.layers.first() else {
            return;
        };
        let kind = first.pool.kind();
        let count = bytes.len() / kind.elt_size_in_bytes();
        let all =
            Tensor::from_data_size(bytes, &[count as i64], kind).to_device(first.pool.device());
        let mut start = 0;
        for layer in &mut self.layers {
            let mut target = layer.pool.get(i64::from(block));
            let count = target.numel() as i64;
            target.copy_(&all.narrow(0, start, count).view(&target.size()[..]));
            start += count;
        }
    }

    /// The attention of one step; `indices` are the plan's, on the device.
    pub fn attention<'a>(
        &'a mut self,
        plan: &'a Plan,
        indices: &Tensor,
        windows: &'a [Option<usize>],
        kind: Kind,
    ) -> StepAttention<'a> {
        let part = |range: &std::ops::Range<usize>| {
            indices.narrow(0, range.start as i64, range.len() as i64)
        };
        let positions = part(&plan.positions);
        let views = plan
            .groups
            .iter()
            .zip(&plan.reads)
            .map(|(group, reads)| {
                reads
                    .iter()
                    .zip(windows)
                    .map(|(read, window)| View::of(group, read, *window, &positions, &part, kind))
                    .collect()
            })
            .collect();
        StepAttention {
            slots: part(&plan.slots),
            begun: (!plan.begun.is_empty()).then(|| part(&plan.begun)),
            groups: &plan.groups,
            views,
            windows,
            cache: self,
        }
    }
}

impl LayerBlocks {
    /// `k` and `v` are `[rows, kv_heads, head_dim]`.
    fn write(&mut self, slots: &Tensor, begun: Option<&Tensor>, k: &Tensor, v: &Tensor) {
        if let Some(begun) = begun {
            let _ = self.pool.index_fill_(0, begun, 0.0);
        }
        let size = self.pool.size();
        let flat = self.pool.view([size[0] * size[1], size[2], size[3]]);
        for (first, rows) in [(0, k), (self.kv_heads, v)] {
            let _ = flat
                .narrow(1, first, self.kv_heads)
                .index_copy_(0, slots, rows);
        }
    }

    /// Keys and values, each `[batch, keys, kv_heads, head_dim]`.
    fn read(&self, blocks: &Tensor, batch: i64, keys: i64) -> (Tensor, Tensor) {
        let size = self.pool.size();
        let all = self
            .pool
            .index_select(0, blocks)
            .view([batch, -1, size[2], size[3]])
            .narrow(1, 0, keys);
        let part = |first| all.narrow(2, first, self.kv_heads);
        (part(0), part(self.kv_heads))
    }
}

/// A [`Read`] on the device.
struct View {
    /// Block numbers and the keys of each sequence; `None` reads the step's own rows.
    cached: Option<(Tensor, i64)>,
    visible: Option<Visible>,
}

impl View {
    fn of(
        group: &Group,
        read: &Read,
        window: Option<usize>,
        positions: &Tensor,
        part: &dyn Fn(&std::ops::Range<usize>) -> Tensor,
        kind: Kind,
    ) -> Self {
        let Read::Cached {
            blocks,
            bases,
            keys,
            masked,
        } = read
        else {
            // Follows from the layer's rule alone.
            return Self {
                cached: None,
                visible: None,
            };
        };
        let (batch, rows, keys) = (group.members.len() as i64, group.rows as i64, *keys as i64);
        let visible = if *masked {
            let rows = positions
                .narrow(0, group.first_row as i64, batch * rows)
                .view([batch, rows, 1]);
            let offsets = Tensor::arange(keys, (Kind::Int64, positions.device()));
            let keys = part(bases).view([batch, 1, 1]) + offsets;
            Visible::Mask(mask(&rows, &keys, window, kind))
        } else {
            Visible::All
        };
        Self {
            cached: Some((part(blocks), keys)),
            visible: Some(visible),
        }
    }
}

/// See [`BlockCache::attention`].
pub struct StepAttention<'a> {
    cache: &'a mut BlockCache,
    slots: Tensor,
    begun: Option<Tensor>,
    groups: &'a [Group],
    /// For each group, for each window.
    views: Vec<Vec<View>>,
    windows: &'a [Option<usize>],
}

impl Attend for StepAttention<'_> {
    fn attend(
        &mut self,
        layer: usize,
        rule: &AttentionRule,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Tensor {
        let blocks = &mut self.cache.layers[layer];
        blocks.write(&self.slots, self.begun.as_ref(), k, v);
        let window = self.windows.iter().position(|w| *w == rule.window);
        let window = window.expect("the runner collects the windows of all layers");
        let mut outputs: Vec<Tensor> = self
            .groups
            .iter()
            .zip(&self.views)
            .map(|(group, views)| attend_group(rule, blocks, group, &views[window], [q, k, v]))
            .collect();
        match outputs.len() {
            1 => outputs.swap_remove(0),
            _ => Tensor::cat(&outputs, 0),
        }
    }
}

fn attend_group(
    rule: &AttentionRule,
    blocks: &LayerBlocks,
    group: &Group,
    view: &View,
    [q, k, v]: [&Tensor; 3],
) -> Tensor {
    let (batch, rows) = (group.members.len() as i64, group.rows as i64);
    let own = |x: &Tensor| {
        let size = x.size();
        x.narrow(0, group.first_row as i64, batch * rows)
            .view([batch, rows, size[1], size[2]])
    };
    let q = own(q);
    let (k, v) = match &view.cached {
        Some((numbers, keys)) => blocks.read(numbers, batch, *keys),
        None => (own(k), own(v)),
    };
    match &view.visible {
        Some(visible) => dot_product(rule, &q, &k, &v, visible),
        None => {
            let visible = Visible::within(rule, group.rows, (q.kind(), q.device()));
            dot_product(rule, &q, &k, &v, &visible)
        }
    }
}
