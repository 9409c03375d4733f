//! Causal grouped-query attention over a block table.
//!
//! ```text
//! scores[p] = (q / sqrt(d)) . k[p]     one chain over the elements of a head, 16 positions side by side
//! weight[p] = exp(scores[p] - max)     summed in 16 interleaved chains (p mod 16), joined in a fixed order
//! out[d]    = sum of weight[p] v[p][d] one chain over p = 0, 1, 2, ..., then divided by the sum of weights
//! ```
//!
//! Invariant: an output row is a function of its query and of the keys and values at positions `0 ..= position`. Other rows, their order,
//! the block numbers and what stands behind `position` in the last block have no part in it.

use std::cell::RefCell;

use crate::elementwise::join;
use crate::isa::{Isa, multiversion};
use crate::kv::{BLOCK, KvBlocks};
use crate::lanes::Lanes;
use crate::math::exp;
use crate::pool::Pool;
use crate::product::{Product, UNIT, product_f32};

/// Query vectors (rows times heads of one group) that share a pass over the keys.
const VECTORS: usize = 8;

/// Multiply-adds of a call below which one thread does all of it.
const MIN_PARALLEL_MULTIPLY_ADDS: usize = 1 << 16;

/// Where a query row stands.
#[derive(Debug, Clone, Copy)]
pub struct RowPlace<'a> {
    /// The sequence's blocks, in order.
    pub table: &'a [u32],
    /// The row's position; it sees the keys at `0 ..= position`, which must have been written.
    pub position: usize,
}

thread_local! {
    /// Scores of [`VECTORS`] queries, kept between calls: its size follows the longest sequence that the thread has seen.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Attention of every row: `q` and `out` are `[rows][heads][head_dim]`. Rows of one sequence that stand together (same table)
/// share their passes over the keys.
///
/// # Panics
/// If lengths do not match, `heads` is no multiple of the pool's heads, or a table is too short for its position.
pub fn attend(
    pool: &Pool,
    kv: &KvBlocks,
    places: &[RowPlace<'_>],
    heads: usize,
    q: &[f32],
    out: &mut [f32],
) {
    attend_on(Isa::best(), pool, kv, places, heads, q, out);
}

/// [`attend`] on a chosen instruction set, which must be one of [`Isa::available`].
///
/// # Panics
/// As [`attend`], and if the machine lacks `isa`.
pub fn attend_on(
    isa: Isa,
    pool: &Pool,
    kv: &KvBlocks,
    places: &[RowPlace<'_>],
    heads: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let (kv_heads, dim) = (kv.kv_heads(), kv.head_dim());
    assert!(
        Isa::available().contains(&isa),
        "this machine has no {}",
        isa.name()
    );
    assert!(
        heads.is_multiple_of(kv_heads),
        "{heads} heads over {kv_heads} key heads"
    );
    assert_eq!(
        q.len(),
        places.len() * heads * dim,
        "q of [{}, {heads}, {dim}]",
        places.len()
    );
    assert_eq!(out.len(), q.len(), "out like q");
    for place in places {
        let last = place.table.get(place.position / BLOCK);
        assert!(
            last.is_some_and(|block| (*block as usize) < kv.blocks()),
            "no block for position {}",
            place.position
        );
    }
    let group = heads / kv_heads;
    let runs = same_sequence_runs(places, (VECTORS / group).max(1));
    let out = OutRows(out.as_mut_ptr());
    let task = |task: usize| {
        let (run, kv_head) = (runs[task / kv_heads].clone(), task % kv_heads);
        // All query vectors of the run that look at this key head, eight at a time, row by row.
        let vectors = run.len() * group;
        for first in (0..vectors).step_by(VECTORS) {
            let mut tile = [Vector::default(); VECTORS];
            let count = (vectors - first).min(VECTORS);
            for (i, vector) in tile[..count].iter_mut().enumerate() {
                let row = run.start + (first + i) / group;
                let head = kv_head * group + (first + i) % group;
                *vector = Vector {
                    offset: (row * heads + head) * dim,
                    len: places[row].position + 1,
                };
            }
            // SAFETY: each (row, head) is in exactly one tile of one task; places were checked above.
            SCORES.with_borrow_mut(|scores| unsafe {
                attend_tile(
                    isa,
                    kv,
                    kv_head,
                    places[run.start].table,
                    &tile[..count],
                    q,
                    &out,
                    scores,
                );
            });
        }
    };
    let tasks = runs.len() * kv_heads;
    let seen: usize = places.iter().map(|place| place.position + 1).sum();
    if 2 * seen * heads * dim < MIN_PARALLEL_MULTIPLY_ADDS {
        (0..tasks).for_each(task);
    } else {
        pool.run(tasks, &task);
    }
}

/// Query vectors and outputs of a tile.
#[derive(Clone, Copy, Default)]
struct Vector {
    /// Of its first element in `q` and `out`.
    offset: usize,
    /// Keys that it sees.
    len: usize,
}

/// Tasks write disjoint heads of disjoint rows.
struct OutRows(*mut f32);
// SAFETY: see above.
unsafe impl Sync for OutRows {}

/// Cuts the rows into runs of at most `limit` that read the same table.
fn same_sequence_runs(places: &[RowPlace<'_>], limit: usize) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (row, place) in places.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.len() < limit && std::ptr::eq(places[row - 1].table, place.table) => {
                run.end = row + 1;
            }
            _ => runs.push(row..row + 1),
        }
    }
    runs
}

multiversion! {
    /// Softmax numerators in place, `[rows]` with stride `stride`, the first `lens[r]` of each; sums to `sums`.
    fn softmax_numerators(scores: &mut [f32], stride: usize, lens: &[usize], sums: &mut [f32]) => softmax_body
}

#[inline(always)]
unsafe fn softmax_body<L: Lanes>(
    scores: &mut [f32],
    stride: usize,
    lens: &[usize],
    sums: &mut [f32],
) {
    for (r, (len, sum)) in lens.iter().zip(sums).enumerate() {
        let row = &mut scores[r * stride..][..*len];
        // A maximum is the same in any order; 16 at a time for speed.
        let mut tops = [f32::NEG_INFINITY; UNIT];
        let (blocks, rest) = row.as_chunks::<UNIT>();
        for block in blocks {
            for (top, value) in tops.iter_mut().zip(block) {
                *top = if *value > *top { *value } else { *top };
            }
        }
        for (top, value) in tops.iter_mut().zip(rest) {
            *top = if *value > *top { *value } else { *top };
        }
        let mut max = tops[0];
        for top in tops {
            max = if top > max { top } else { max };
        }
        let mut parts = [0.0_f32; UNIT];
        let (blocks, rest) = row.as_chunks_mut::<UNIT>();
        for block in blocks {
            for (part, value) in parts.iter_mut().zip(block) {
                *value = exp(*value - max);
                *part += *value;
            }
        }
        for (part, value) in parts.iter_mut().zip(rest) {
            *value = exp(*value - max);
            *part += *value;
        }
        *sum = join(parts);
    }
}

/// Up to [`VECTORS`] query vectors against one sequence's keys and values of one head.
#[allow(clippy::too_many_arguments)]
unsafe fn attend_tile(
    isa: Isa,
    kv: &KvBlocks,
    kv_head: usize,
    table: &[u32],
    tile: &[Vector],
    q: &[f32],
    out: &OutRows,
    scratch: &mut Vec<f32>,
) {
    let (rows, dim) = (tile.len(), kv.head_dim());
    let padded = dim.next_multiple_of(UNIT);
    let longest = tile.iter().map(|v| v.len).max().unwrap_or(0);
    let shortest = tile.iter().map(|v| v.len).min().unwrap_or(0);
    let stride = longest.next_multiple_of(BLOCK);
    scratch.resize((VECTORS * (stride + 2 * padded)).max(scratch.len()), 0.0);
    let (scores, rest) = scratch.split_at_mut(VECTORS * stride);
    let (queries, sums) = rest.split_at_mut(VECTORS * padded);

    let scale = 1.0 / (dim as f32).sqrt();
    for (r, vector) in tile.iter().enumerate() {
        for (target, value) in queries[r * dim..][..dim]
            .iter_mut()
            .zip(&q[vector.offset..])
        {
            *target = value * scale;
        }
    }
    for (b, block) in table[..longest.div_ceil(BLOCK)].iter().enumerate() {
        let product = Product {
            rows,
            k: dim,
            columns: BLOCK,
            x: queries.as_ptr(),
            x_stride: dim,
            w: kv.keys(*block, kv_head).as_ptr(),
            w_stride: BLOCK,
            y: unsafe { scores.as_mut_ptr().add(b * BLOCK) },
            y_stride: stride,
            accumulate: false,
        };
        unsafe { product_f32(isa, product) };
    }

    let mut lens = [0; VECTORS];
    let mut totals = [0.0; VECTORS];
    for (len, vector) in lens.iter_mut().zip(tile) {
        *len = vector.len;
    }
    unsafe { softmax_numerators(isa, scores, stride, &lens[..rows], &mut totals[..rows]) };

    // Positions that all vectors see, together; then each vector's own last ones. A chain goes on where it was cut.
    let mut accumulate = |first: usize, rows: usize, from: usize, to: usize| {
        let mut position = from;
        while position < to {
            let (block, offset) = (table[position / BLOCK], position % BLOCK);
            let take = (BLOCK - offset).min(to - position);
            let product = Product {
                rows,
                k: take,
                columns: padded,
                x: unsafe { scores.as_ptr().add(first * stride + position) },
                x_stride: stride,
                w: unsafe { kv.values(block, kv_head).as_ptr().add(offset * padded) },
                w_stride: padded,
                y: unsafe { sums.as_mut_ptr().add(first * padded) },
                y_stride: padded,
                accumulate: position > 0,
            };
            unsafe { product_f32(isa, product) };
            position += take;
        }
    };
    accumulate(0, rows, 0, shortest);
    for (r, vector) in tile.iter().enumerate() {
        accumulate(r, 1, shortest, vector.len);
    }
    for (r, vector) in tile.iter().enumerate() {
        // SAFETY: this tile owns these heads of `out`.
        let out = unsafe { std::slice::from_raw_parts_mut(out.0.add(vector.offset), dim) };
        for (target, sum) in out.iter_mut().zip(&sums[r * padded..][..dim]) {
            *target = sum / totals[r];
        }
    }
}

#[cfg(test)]
mod tests;
