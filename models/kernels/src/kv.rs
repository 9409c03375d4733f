//! Keys and values of one layer, in blocks of 16 positions.
//!
//! ```text
//! keys     [blocks][kv_heads][head_dim][16]          16 positions side by side: one register of scores per element of q
//! values   [blocks][kv_heads][16][padded head_dim]   a position's elements side by side, padded to a multiple of 16
//! ```
//!
//! Elements are f32, or IEEE half where half the memory, and half the traffic per token, is worth eleven bits: rounded once when they are
//! written (to nearest, beyond the range to the largest finite half), widened exactly when they are read.
//!
//! A sequence is a list of block numbers (its table); position `p` lies in block `table[p / 16]` at offset `p % 16`.
//! Invariant: memory is touched only where positions were written, so a large pool costs what is used.

use crate::attention::RowPlace;
use crate::buffer::{Buffer, Element, Pieces};
use crate::lanes::f32_to_f16;
use crate::pool::Pool;
use crate::product::UNIT;

/// Elements below which one thread does the work alone.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 14;

/// Positions per block.
pub const BLOCK: usize = UNIT;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvFormat {
    #[default]
    F32,
    F16,
}

impl KvFormat {
    /// Bytes of an element.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// Keys and values of one width.
struct Memory<T> {
    keys: Buffer<T>,
    values: Buffer<T>,
}

enum Stored {
    F32(Memory<f32>),
    F16(Memory<u16>),
}

/// The block pool of one layer.
pub struct KvBlocks {
    stored: Stored,
    kv_heads: usize,
    head_dim: usize,
    blocks: usize,
}

impl KvBlocks {
    /// A pool of `blocks` blocks of f32.
    #[must_use]
    pub fn new(blocks: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self::of(KvFormat::F32, blocks, kv_heads, head_dim)
    }

    /// A pool of `blocks` blocks.
    #[must_use]
    pub fn of(format: KvFormat, blocks: usize, kv_heads: usize, head_dim: usize) -> Self {
        let keys = blocks * kv_heads * head_dim * BLOCK;
        let values = blocks * kv_heads * BLOCK * head_dim.next_multiple_of(UNIT);
        let stored = match format {
            KvFormat::F32 => Stored::F32(Memory::zeroed(keys, values)),
            KvFormat::F16 => Stored::F16(Memory::zeroed(keys, values)),
        };
        Self {
            stored,
            kv_heads,
            head_dim,
            blocks,
        }
    }

    /// Bytes that a position takes in one layer; the largest number if that is more than a number can say.
    #[must_use]
    pub fn position_bytes(format: KvFormat, kv_heads: usize, head_dim: usize) -> usize {
        head_dim
            .checked_next_multiple_of(UNIT)
            .and_then(|padded| {
                padded
                    .checked_add(head_dim)?
                    .checked_mul(format.size_bytes())
            })
            .and_then(|head_bytes| head_bytes.checked_mul(kv_heads))
            .unwrap_or(usize::MAX)
    }

    /// Key-value heads.
    #[must_use]
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Elements of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Stores one position: `k` and `v` are `[kv_heads][head_dim]`, `k` after rotary embedding.
    ///
    /// # Panics
    /// If `block`, `offset` or a length is out of range.
    pub fn write(&mut self, block: u32, offset: usize, k: &[f32], v: &[f32]) {
        let (heads, dim) = (self.kv_heads, self.head_dim);
        assert!(
            offset < BLOCK && (block as usize) < self.blocks,
            "position {offset} of block {block}"
        );
        assert!(
            k.len() == heads * dim && v.len() == heads * dim,
            "k of {}, v of {}",
            k.len(),
            v.len()
        );
        let place = RowPlace::causal(std::slice::from_ref(&block), offset);
        self.write_rows(&Pool::new(1), &[place], k, v, heads * dim);
    }

    /// Stores the rows' positions: row `r` has its `[kv_heads][head_dim]` keys at `r * stride` in `k`, values likewise in `v`.
    ///
    /// # Panics
    /// If a place has no block, or a length is too short.
    pub fn write_rows(
        &mut self,
        pool: &Pool,
        places: &[RowPlace<'_>],
        k: &[f32],
        v: &[f32],
        stride: usize,
    ) {
        let shape = Shape {
            heads: self.kv_heads,
            dim: self.head_dim,
            blocks: self.blocks,
        };
        match &mut self.stored {
            Stored::F32(memory) => memory.write_rows(pool, shape, places, k, v, stride, |x| x),
            Stored::F16(memory) => memory.write_rows(pool, shape, places, k, v, stride, finite_f16),
        }
    }

    /// Copies a block.
    ///
    /// # Panics
    /// If a block is out of range.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let (keys, values) = (self.block_keys(), self.block_values());
        match &mut self.stored {
            Stored::F32(memory) => memory.copy(keys, values, from as usize, to as usize),
            Stored::F16(memory) => memory.copy(keys, values, from as usize, to as usize),
        }
    }

    /// Bytes of an exported block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        (self.block_keys() + self.block_values()) * self.format().size_bytes()
    }

    /// Appends a block's keys, then its values, as little-endian numbers in the layout of the module's diagram.
    ///
    /// # Panics
    /// If the block is out of range.
    pub fn export(&self, block: u32, out: &mut Vec<u8>) {
        let (keys, values) = (self.block_keys(), self.block_values());
        match &self.stored {
            Stored::F32(memory) => {
                for part in memory.parts(keys, values, block as usize) {
                    out.extend(part.iter().flat_map(|value| value.to_le_bytes()));
                }
            }
            Stored::F16(memory) => {
                for part in memory.parts(keys, values, block as usize) {
                    out.extend(part.iter().flat_map(|value| value.to_le_bytes()));
                }
            }
        }
    }

    /// Takes in what [`KvBlocks::export`] gave.
    ///
    /// # Panics
    /// If the block is out of range or `bytes` is not [`KvBlocks::block_bytes`] long.
    pub fn import(&mut self, block: u32, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.block_bytes(), "bytes of a block");
        let (keys, values) = (self.block_keys(), self.block_values());
        let (first, second) = bytes.split_at(keys * self.format().size_bytes());
        match &mut self.stored {
            Stored::F32(memory) => {
                let parts = memory.parts_mut(keys, values, block as usize);
                for (part, bytes) in parts.into_iter().zip([first, second]) {
                    for (value, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                        *value = f32::from_le_bytes(*bytes);
                    }
                }
            }
            Stored::F16(memory) => {
                let parts = memory.parts_mut(keys, values, block as usize);
                for (part, bytes) in parts.into_iter().zip([first, second]) {
                    for (value, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                        *value = u16::from_le_bytes(*bytes);
                    }
                }
            }
        }
    }

    /// How elements are stored.
    #[must_use]
    pub fn format(&self) -> KvFormat {
        match &self.stored {
            Stored::F32(_) => KvFormat::F32,
            Stored::F16(_) => KvFormat::F16,
        }
    }

    fn block_keys(&self) -> usize {
        self.kv_heads * self.head_dim * BLOCK
    }

    fn block_values(&self) -> usize {
        self.kv_heads * self.head_dim.next_multiple_of(UNIT) * BLOCK
    }

    /// `[head_dim][16]` keys of a block.
    pub(crate) fn keys(&self, block: u32, head: usize) -> KvSlice<'_> {
        let size = self.head_dim * BLOCK;
        let start = (block as usize * self.kv_heads + head) * size;
        match &self.stored {
            Stored::F32(memory) => KvSlice::F32(&memory.keys[start..][..size]),
            Stored::F16(memory) => KvSlice::F16(&memory.keys[start..][..size]),
        }
    }

    /// `[16][padded head_dim]` values of a block.
    pub(crate) fn values(&self, block: u32, head: usize) -> KvSlice<'_> {
        let size = self.head_dim.next_multiple_of(UNIT) * BLOCK;
        let start = (block as usize * self.kv_heads + head) * size;
        match &self.stored {
            Stored::F32(memory) => KvSlice::F32(&memory.values[start..][..size]),
            Stored::F16(memory) => KvSlice::F16(&memory.values[start..][..size]),
        }
    }
}

/// One head's part of a block, as it is stored.
pub(crate) enum KvSlice<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
}

#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    dim: usize,
    blocks: usize,
}

/// The nearest half; an overflow stays finite, since one infinite score would make a whole row NaN.
fn finite_f16(x: f32) -> u16 {
    const LARGEST: f32 = 65504.0;
    f32_to_f16(x.clamp(-LARGEST, LARGEST))
}

impl<T: Element + Send> Memory<T> {
    fn zeroed(keys: usize, values: usize) -> Self {
        Self {
            keys: Buffer::zeroed(keys),
            values: Buffer::zeroed(values),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn write_rows(
        &mut self,
        pool: &Pool,
        shape: Shape,
        places: &[RowPlace<'_>],
        k: &[f32],
        v: &[f32],
        stride: usize,
        narrow: impl Fn(f32) -> T + Sync,
    ) {
        let Shape { heads, dim, blocks } = shape;
        let padded = dim.next_multiple_of(UNIT);
        let keys = Pieces::new(&mut self.keys);
        let values = Pieces::new(&mut self.values);
        let head_of_all_rows = |head: usize| {
            for (row, place) in places.iter().enumerate() {
                let (block, offset) = (place.table[place.position / BLOCK], place.position % BLOCK);
                assert!((block as usize) < blocks, "block {block} of {blocks}");
                let index = block as usize * heads + head;
                let from = row * stride + head * dim;
                let value = (index * BLOCK + offset) * padded;
                // SAFETY: a task writes its own head's part of every block.
                let (keys, values) = unsafe {
                    (
                        keys.piece(index * dim * BLOCK..(index + 1) * dim * BLOCK),
                        values.piece(value..value + dim),
                    )
                };
                for (d, value) in k[from..][..dim].iter().enumerate() {
                    keys[d * BLOCK + offset] = narrow(*value);
                }
                for (target, value) in values.iter_mut().zip(&v[from..][..dim]) {
                    *target = narrow(*value);
                }
            }
        };
        if places.len() * heads * dim < MIN_PARALLEL_ELEMENTS {
            (0..heads).for_each(head_of_all_rows);
        } else {
            pool.run(heads, &head_of_all_rows);
        }
    }

    fn copy(&mut self, keys: usize, values: usize, from: usize, to: usize) {
        self.keys
            .copy_within(from * keys..(from + 1) * keys, to * keys);
        self.values
            .copy_within(from * values..(from + 1) * values, to * values);
    }

    /// Keys, then values, of a block.
    fn parts(&self, keys: usize, values: usize, block: usize) -> [&[T]; 2] {
        [
            &self.keys[block * keys..][..keys],
            &self.values[block * values..][..values],
        ]
    }

    fn parts_mut(&mut self, keys: usize, values: usize, block: usize) -> [&mut [T]; 2] {
        [
            &mut self.keys[block * keys..][..keys],
            &mut self.values[block * values..][..values],
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_of_any_claimed_size_has_a_number_of_bytes() {
        assert_eq!(
            KvBlocks::position_bytes(KvFormat::F32, 2, 20),
            2 * (20 + 32) * 4
        );
        for (heads, dim) in [(usize::MAX, 2), (2, usize::MAX), (1 << 31, 1 << 31)] {
            assert_eq!(
                KvBlocks::position_bytes(KvFormat::F16, heads, dim),
                usize::MAX
            );
        }
    }
}
