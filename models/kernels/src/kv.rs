//! Keys and values of one layer, in blocks of 16 positions.
//!
//! ```text
//! keys     [blocks][kv_heads][head_dim][16]          16 positions side by side: one register of scores per element of q
//! values   [blocks][kv_heads][16][padded head_dim]   a position's elements side by side, padded to a multiple of 16
//! ```
//!
//! A sequence is a list of block numbers (its table); position `p` lies in block `table[p / 16]` at offset `p % 16`.
//! Invariant: memory is touched only where positions were written, so a large pool costs what is used.

use crate::attention::RowPlace;
use crate::buffer::{Buffer, Pieces};
use crate::pool::Pool;
use crate::product::UNIT;

/// Elements below which one thread does the work alone.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 14;

/// Positions per block.
pub const BLOCK: usize = UNIT;

/// The block pool of one layer.
pub struct KvBlocks {
    keys: Buffer<f32>,
    values: Buffer<f32>,
    kv_heads: usize,
    head_dim: usize,
    blocks: usize,
}

impl KvBlocks {
    /// A pool of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: usize, kv_heads: usize, head_dim: usize) -> Self {
        let padded = head_dim.next_multiple_of(UNIT);
        Self {
            keys: Buffer::zeroed(blocks * kv_heads * head_dim * BLOCK),
            values: Buffer::zeroed(blocks * kv_heads * BLOCK * padded),
            kv_heads,
            head_dim,
            blocks,
        }
    }

    /// Bytes that a position takes in one layer; the largest number if that is more than a number can say.
    #[must_use]
    pub fn position_bytes(kv_heads: usize, head_dim: usize) -> usize {
        head_dim
            .checked_next_multiple_of(UNIT)
            .and_then(|padded| padded.checked_add(head_dim)?.checked_mul(size_of::<f32>()))
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
        let padded = dim.next_multiple_of(UNIT);
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
        for head in 0..heads {
            let index = block as usize * heads + head;
            let keys = &mut self.keys[index * dim * BLOCK..][..dim * BLOCK];
            for (d, value) in k[head * dim..][..dim].iter().enumerate() {
                keys[d * BLOCK + offset] = *value;
            }
            self.values[(index * BLOCK + offset) * padded..][..dim]
                .copy_from_slice(&v[head * dim..][..dim]);
        }
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
        let (heads, dim, blocks) = (self.kv_heads, self.head_dim, self.blocks);
        let padded = dim.next_multiple_of(UNIT);
        let keys = Pieces::new(&mut self.keys);
        let values = Pieces::new(&mut self.values);
        let head_of_all_rows = |head: usize| {
            for (row, place) in places.iter().enumerate() {
                let (block, offset) = (place.table[place.position / BLOCK], place.position % BLOCK);
                assert!((block as usize) < blocks, "block {block} of {blocks}");
                let index = block as usize * heads + head;
                let from = row * stride + head * dim;
                // SAFETY: a task writes its own head's part of every block.
                let (keys, values) = unsafe {
                    (
                        keys.piece(index * dim * BLOCK..(index + 1) * dim * BLOCK),
                        values.piece(
                            (index * BLOCK + offset) * padded
                                ..(index * BLOCK + offset) * padded + dim,
                        ),
                    )
                };
                for (d, value) in k[from..][..dim].iter().enumerate() {
                    keys[d * BLOCK + offset] = *value;
                }
                values.copy_from_slice(&v[from..][..dim]);
            }
        };
        if places.len() * heads * dim < MIN_PARALLEL_ELEMENTS {
            (0..heads).for_each(head_of_all_rows);
        } else {
            pool.run(heads, &head_of_all_rows);
        }
    }

    /// Copies a block.
    ///
    /// # Panics
    /// If a block is out of range.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let (keys, values) = (self.block_keys(), self.block_values());
        let (from, to) = (from as usize, to as usize);
        self.keys
            .copy_within(from * keys..(from + 1) * keys, to * keys);
        self.values
            .copy_within(from * values..(from + 1) * values, to * values);
    }

    /// Bytes of an exported block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        (self.block_keys() + self.block_values()) * size_of::<f32>()
    }

    /// Appends a block's keys, then its values, as little-endian numbers in the layout of the module's diagram.
    ///
    /// # Panics
    /// If the block is out of range.
    pub fn export(&self, block: u32, out: &mut Vec<u8>) {
        let (keys, values) = (self.block_keys(), self.block_values());
        let block = block as usize;
        for part in [
            &self.keys[block * keys..][..keys],
            &self.values[block * values..][..values],
        ] {
            out.extend(part.iter().flat_map(|value| value.to_le_bytes()));
        }
    }

    /// Takes in what [`KvBlocks::export`] gave.
    ///
    /// # Panics
    /// If the block is out of range or `bytes` is not [`KvBlocks::block_bytes`] long.
    pub fn import(&mut self, block: u32, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.block_bytes(), "bytes of a block");
        let (keys, values) = (self.block_keys(), self.block_values());
        let block = block as usize;
        let (first, second) = bytes.split_at(keys * size_of::<f32>());
        let parts = [
            (&mut self.keys[block * keys..][..keys], first),
            (&mut self.values[block * values..][..values], second),
        ];
        for (part, bytes) in parts {
            for (value, bytes) in part.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
    }

    fn block_keys(&self) -> usize {
        self.kv_heads * self.head_dim * BLOCK
    }

    fn block_values(&self) -> usize {
        self.kv_heads * self.head_dim.next_multiple_of(UNIT) * BLOCK
    }

    /// `[head_dim][16]` keys of a block.
    pub(crate) fn keys(&self, block: u32, head: usize) -> &[f32] {
        let size = self.head_dim * BLOCK;
        &self.keys[(block as usize * self.kv_heads + head) * size..][..size]
    }

    /// `[16][padded head_dim]` values of a block.
    pub(crate) fn values(&self, block: u32, head: usize) -> &[f32] {
        let size = self.head_dim.next_multiple_of(UNIT) * BLOCK;
        &self.values[(block as usize * self.kv_heads + head) * size..][..size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_of_any_claimed_size_has_a_number_of_bytes() {
        assert_eq!(KvBlocks::position_bytes(2, 20), 2 * (20 + 32) * 4);
        for (heads, dim) in [(usize::MAX, 2), (2, usize::MAX), (1 << 31, 1 << 31)] {
            assert_eq!(KvBlocks::position_bytes(heads, dim), usize::MAX);
        }
    }
}
