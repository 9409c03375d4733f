//! Grouped-query attention over a block table.
//!
//! ```text
//! score[p]  = (q * scale) . k[p]       one chain over the elements of a head, 16 positions side by side
//! score[p]  = cap * tanh(score / cap)  where there is a soft cap
//! weight[p] = exp(score[p] - max)      summed in 16 interleaved chains ((p - first) mod 16), joined in a fixed order
//! out[d]    = sum of weight[p] v[p][d] one chain over p = first, first + 1, ..., then divided by the sum of weights
//! ```
//!
//! Invariant: an output row is a function of its query and of the keys and values that it sees. Other rows, their order, the block numbers
//! and what else stands in the blocks have no part in it.

use std::cell::RefCell;
use std::ops::Range;

use crate::elementwise::join;
use crate::isa::{Isa, multiversion};
use crate::kv::{BLOCK, KvBlocks, KvFormat, KvSlice};
use crate::lanes::{F16, Lanes, Weight};
use crate::math::{exp, tanh};
use crate::pool::Pool;
use crate::product::{Product, UNIT, product_f16, product_f32};

/// Query vectors (rows times heads of one group) that share a pass over the keys.
const VECTORS: usize = 8;
/// Blocks whose scores are computed side by side.
const BLOCKS: usize = 4;

/// Multiply-adds of a call below which one thread does all of it.
const MIN_PARALLEL_MULTIPLY_ADDS: usize = 1 << 16;

/// Where a query row stands, and what it sees.
#[derive(Debug, Clone, Copy)]
pub struct RowPlace<'a> {
    /// The sequence's blocks, in order.
    pub table: &'a [u32],
    pub position: usize,
    /// It sees the keys at `0 .. visible` (or the window's part of them), which must have been written.
    pub visible: usize,
}

impl<'a> RowPlace<'a> {
    /// A row that sees everything up to itself.
    #[must_use]
    pub fn causal(table: &'a [u32], position: usize) -> Self {
        Self {
            table,
            position,
            visible: position + 1,
        }
    }

    /// A row that sees its whole sequence of `length` positions.
    #[must_use]
    pub fn whole(table: &'a [u32], position: usize, length: usize) -> Self {
        Self {
            table,
            position,
            visible: length,
        }
    }
}

/// What is computed, besides where.
#[derive(Debug, Clone, Copy)]
pub struct Attend {
    pub heads: usize,
    /// Elements between the queries of two rows.
    pub q_stride: usize,
    pub scale: f32,
    pub soft_cap: Option<f32>,
    /// A row sees keys from `position + 1 - window` on only.
    pub window: Option<usize>,
}

impl Attend {
    /// Plain attention: rows of queries side by side, scaled by `1 / sqrt(head_dim)`.
    #[must_use]
    pub fn plain(heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            q_stride: heads * head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap: None,
            window: None,
        }
    }

    /// The keys that a row sees.
    fn seen(&self, place: &RowPlace<'_>) -> Range<usize> {
        let first = match self.window {
            Some(window) => (place.position + 1).saturating_sub(window),
            None => 0,
        };
        first..place.visible
    }
}

/// Kept between calls, so that a step allocates nothing: sizes follow the longest sequence and the largest call of the thread.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    runs: Vec<Range<usize>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Attention of every row: row `r` of `q` has its `[heads][head_dim]` at `r * q_stride`; `out` is `[rows][heads][head_dim]`. Rows of one
/// sequence that stand together (same table) share their passes over the keys.
///
/// # Panics
/// If lengths do not match, `heads` is no multiple of the pool's heads, a row sees nothing, or a table is too short.
pub fn attend(
    pool: &Pool,
    kv: &KvBlocks,
    places: &[RowPlace<'_>],
    call: &Attend,
    q: &[f32],
    out: &mut [f32],
) {
    attend_on(Isa::best(), pool, kv, places, call, q, out);
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
    call: &Attend,
    q: &[f32],
    out: &mut [f32],
) {
    check(isa, kv, places, call, q, out);
    let (kv_heads, dim, heads) = (kv.kv_heads(), kv.head_dim(), call.heads);
    let group = heads / kv_heads;
    let mut runs = SCRATCH.with_borrow_mut(|scratch| std::mem::take(&mut scratch.runs));
    same_sequence_runs(places, (VECTORS / group).max(1), &mut runs);
    let out = OutRows(out.as_mut_ptr());
    let task = |task: usize| {
        let (run, kv_head) = (runs[task / kv_heads].clone(), task % kv_heads);
        // All query vectors of the run that look at this key head, eight at a time, row by row.
        let vectors = run.len() * group;
        for first in (0..vectors).step_by(VECTORS) {
            let mut tile: [Vector; VECTORS] = Default::default();
            let count = (vectors - first).min(VECTORS);
            for (i, vector) in tile[..count].iter_mut().enumerate() {
                let row = run.start + (first + i) / group;
                let head = kv_head * group + (first + i) % group;
                *vector = Vector {
                    q: row * call.q_stride + head * dim,
                    out: (row * heads + head) * dim,
                    seen: call.seen(&places[row]),
                };
            }
            let job = Tile {
                isa,
                kv,
                kv_head,
                table: places[run.start].table,
                vectors: &tile[..count],
                call,
            };
            // SAFETY: each (row, head) is in exactly one tile of one task; places were checked above.
            SCRATCH.with_borrow_mut(|scratch| unsafe { job.run(q, &out, &mut scratch.scores) });
        }
    };
    let tasks = runs.len() * kv_heads;
    let seen: usize = places.iter().map(|place| call.seen(place).len()).sum();
    if 2 * seen * heads * dim < MIN_PARALLEL_MULTIPLY_ADDS {
        (0..tasks).for_each(task);
    } else {
        pool.run(tasks, &task);
    }
    SCRATCH.with_borrow_mut(|scratch| scratch.runs = runs);
}

fn check(isa: Isa, kv: &KvBlocks, places: &[RowPlace<'_>], call: &Attend, q: &[f32], out: &[f32]) {
    let (kv_heads, dim, heads) = (kv.kv_heads(), kv.head_dim(), call.heads);
    assert!(
        Isa::available().contains(&isa),
        "this machine has no {}",
        isa.name()
    );
    assert!(
        heads.is_multiple_of(kv_heads),
        "{heads} heads over {kv_heads} key heads"
    );
    let rows = places.len();
    assert!(
        call.q_stride >= heads * dim
            && (rows == 0 || q.len() >= (rows - 1) * call.q_stride + heads * dim),
        "q of {} for {rows} rows of [{heads}, {dim}] every {}",
        q.len(),
        call.q_stride
    );
    assert_eq!(
        out.len(),
        rows * heads * dim,
        "out of [{rows}, {heads}, {dim}]"
    );
    for place in places {
        let seen = call.seen(place);
        assert!(!seen.is_empty(), "position {} sees nothing", place.position);
        assert!(
            place.table.len() >= seen.end.div_ceil(BLOCK),
            "no block for position {}",
            seen.end - 1
        );
        let blocks = &place.table[seen.start / BLOCK..seen.end.div_ceil(BLOCK)];
        assert!(
            blocks.iter().all(|block| (*block as usize) < kv.blocks()),
            "a block beyond {}",
            kv.blocks()
        );
    }
}

/// Query vectors and outputs of a tile.
#[derive(Clone, Default)]
struct Vector {
    /// Of its first element in `q` and in `out`.
    q: usize,
    out: usize,
    /// Keys that it sees.
    seen: Range<usize>,
}

/// Tasks write disjoint heads of disjoint rows.
struct OutRows(*mut f32);
// SAFETY: see above.
unsafe impl Sync for OutRows {}

/// Cuts the rows into runs of at most `limit` that read the same table.
fn same_sequence_runs(places: &[RowPlace<'_>], limit: usize, runs: &mut Vec<Range<usize>>) {
    runs.clear();
    for (row, place) in places.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.len() < limit && std::ptr::eq(places[row - 1].table, place.table) => {
                run.end = row + 1;
            }
            _ => runs.push(row..row + 1),
        }
    }
}

multiversion! {
    /// Softmax numerators in place, and their sum.
    fn softmax_numerators(scores: &mut [f32], sum: &mut f32) => softmax_body
}

#[inline(always)]
unsafe fn softmax_body<L: Lanes>(row: &mut [f32], sum: &mut f32) {
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

/// Scores of `R` query vectors against the keys of some blocks, `keys[b]` being `[dim][16]`.
struct Scores<W> {
    rows: usize,
    dim: usize,
    queries: *const f32,
    keys: [*const W; BLOCKS],
    blocks: usize,
    scores: *mut f32,
    stride: usize,
}

/// `V` registers, `V * WIDTH / 16` blocks from `block` on.
#[inline(always)]
unsafe fn score_tile<L: Lanes, W: Weight, const R: usize, const V: usize>(
    job: &Scores<W>,
    row: usize,
    block: usize,
) {
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        for d in 0..job.dim {
            let mut keys = [L::splat(0.0); V];
            for (v, key) in keys.iter_mut().enumerate() {
                let lane = v * L::WIDTH;
                *key = W::load(job.keys[block + lane / BLOCK].add(d * BLOCK + lane % BLOCK));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let q = L::splat(*job.queries.add((row + r) * job.dim + d));
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = q.fma(key, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(
                    job.scores
                        .add((row + r) * job.stride + block * BLOCK + v * L::WIDTH),
                );
            }
        }
    }
}

/// All rows of `V` registers.
#[inline(always)]
unsafe fn score_rows<L: Lanes, W: Weight, const V: usize>(
    job: &Scores<W>,
    block: usize,
    limit: usize,
) {
    let mut row = 0;
    while row < job.rows {
        let take = (job.rows - row).min(limit);
        unsafe {
            match take {
                8 => score_tile::<L, W, 8, V>(job, row, block),
                7 => score_tile::<L, W, 7, V>(job, row, block),
                6 => score_tile::<L, W, 6, V>(job, row, block),
                5 => score_tile::<L, W, 5, V>(job, row, block),
                4 => score_tile::<L, W, 4, V>(job, row, block),
                3 => score_tile::<L, W, 3, V>(job, row, block),
                2 => score_tile::<L, W, 2, V>(job, row, block),
                _ => score_tile::<L, W, 1, V>(job, row, block),
            }
        }
        row += take;
    }
}

#[inline(always)]
unsafe fn score_body<L: Lanes, W: Weight>(job: &Scores<W>) {
    let mut block = 0;
    while block < job.blocks {
        let left = job.blocks - block;
        // As many independent chains as the registers hold: a chain waits for itself at every step.
        let wide = L::WIDTH == BLOCK && left >= BLOCKS;
        unsafe {
            match L::WIDTH {
                16 if wide => score_rows::<L, W, 4>(job, block, 6),
                16 => score_rows::<L, W, 1>(job, block, 8),
                8 => score_rows::<L, W, 2>(job, block, 6),
                4 => score_rows::<L, W, 4>(job, block, 6),
                _ => score_rows::<L, W, 16>(job, block, 1),
            }
        }
        block += if wide { BLOCKS } else { 1 };
    }
}

multiversion! {
    /// See [`Scores`].
    fn scores_f32(job: &Scores<f32>) => score_body::<f32>
}
multiversion! {
    /// See [`Scores`].
    fn scores_f16(job: &Scores<F16>) => score_body::<F16>
}

#[inline(always)]
unsafe fn cap_body<L: Lanes>(values: &mut [f32], cap: f32) {
    for value in values {
        *value = cap * tanh(*value / cap);
    }
}

multiversion! {
    /// `cap * tanh(x / cap)` of every element.
    pub(crate) fn cap_isa(values: &mut [f32], cap: f32) => cap_body
}

/// Up to [`VECTORS`] query vectors against one sequence's keys and values of one head.
struct Tile<'a> {
    isa: Isa,
    kv: &'a KvBlocks,
    kv_head: usize,
    table: &'a [u32],
    vectors: &'a [Vector],
    call: &'a Attend,
}

impl Tile<'_> {
    unsafe fn run(&self, q: &[f32], out: &OutRows, scratch: &mut Vec<f32>) {
        let (rows, dim) = (self.vectors.len(), self.kv.head_dim());
        let padded = dim.next_multiple_of(UNIT);
        let from = self.vectors.iter().map(|v| v.seen.start).min().unwrap_or(0);
        let to = self.vectors.iter().map(|v| v.seen.end).max().unwrap_or(0);
        // Scores stand at their positions less `base`, whole blocks of them.
        let (first_block, end_block) = (from / BLOCK, to.div_ceil(BLOCK));
        let base = first_block * BLOCK;
        let stride = (end_block - first_block) * BLOCK;
        let need = VECTORS * (stride + 2 * padded);
        if scratch.len() < need {
            scratch.resize(need, 0.0);
        }
        let (scores, rest) = scratch.split_at_mut(VECTORS * stride);
        let (queries, sums) = rest.split_at_mut(VECTORS * padded);
        for (r, vector) in self.vectors.iter().enumerate() {
            let query = &q[vector.q..][..dim];
            for (target, value) in queries[r * dim..][..dim].iter_mut().zip(query) {
                *target = value * self.call.scale;
            }
        }
        unsafe {
            self.score(
                &self.table[first_block..end_block],
                rows,
                queries,
                scores,
                stride,
            )
        };
        let mut totals = [0.0; VECTORS];
        for (r, (vector, total)) in self.vectors.iter().zip(&mut totals).enumerate() {
            let own = &mut scores[r * stride..][vector.seen.start - base..vector.seen.end - base];
            // SAFETY: `isa` was checked.
            unsafe {
                if let Some(cap) = self.call.soft_cap {
                    cap_isa(self.isa, own, cap);
                }
                softmax_numerators(self.isa, own, total);
            }
        }
        unsafe { self.weigh(scores, stride, base, sums) };
        for (r, vector) in self.vectors.iter().enumerate() {
            // SAFETY: this tile owns these heads of `out`.
            let out = unsafe { std::slice::from_raw_parts_mut(out.0.add(vector.out), dim) };
            for (target, sum) in out.iter_mut().zip(&sums[r * padded..][..dim]) {
                *target = sum / totals[r];
            }
        }
    }

    unsafe fn score(
        &self,
        blocks: &[u32],
        rows: usize,
        queries: &[f32],
        scores: &mut [f32],
        stride: usize,
    ) {
        for (group, blocks) in blocks.chunks(BLOCKS).enumerate() {
            let scores = unsafe { scores.as_mut_ptr().add(group * BLOCKS * BLOCK) };
            let queries = queries.as_ptr();
            let dim = self.kv.head_dim();
            let (mut wide, mut narrow) = ([std::ptr::null(); BLOCKS], [std::ptr::null(); BLOCKS]);
            for (index, block) in blocks.iter().enumerate() {
                match self.kv.keys(*block, self.kv_head) {
                    KvSlice::F32(keys) => wide[index] = keys.as_ptr(),
                    KvSlice::F16(keys) => narrow[index] = keys.as_ptr().cast::<F16>(),
                }
            }
            let blocks = blocks.len();
            // SAFETY: as many blocks as there are pointers of the format.
            unsafe {
                match self.kv.format() {
                    KvFormat::F32 => {
                        let job = Scores {
                            rows,
                            dim,
                            queries,
                            keys: wide,
                            blocks,
                            scores,
                            stride,
                        };
                        scores_f32(self.isa, &job);
                    }
                    KvFormat::F16 => {
                        let job = Scores {
                            rows,
                            dim,
                            queries,
                            keys: narrow,
                            blocks,
                            scores,
                            stride,
                        };
                        scores_f16(self.isa, &job);
                    }
                }
            }
        }
    }

    /// Positions that all vectors see, together; before and behind them each vector's own. A chain goes on where it was cut.
    unsafe fn weigh(&self, scores: &[f32], stride: usize, base: usize, sums: &mut [f32]) {
        let padded = self.kv.head_dim().next_multiple_of(UNIT);
        let latest = self.vectors.iter().map(|v| v.seen.start).max().unwrap_or(0);
        let shortest = self.vectors.iter().map(|v| v.seen.end).min().unwrap_or(0);
        // A chain that begins with the common part while others have begun goes on from nothing.
        sums[..self.vectors.len() * padded].fill(0.0);
        let mut accumulate = |row: usize, rows: usize, from: usize, to: usize, begins: bool| {
            let mut position = from;
            while position < to {
                let (block, offset) = (self.table[position / BLOCK], position % BLOCK);
                let take = (BLOCK - offset).min(to - position);
                let product = Product {
                    rows,
                    k: take,
                    columns: padded,
                    x: unsafe { scores.as_ptr().add(row * stride + position - base) },
                    x_stride: stride,
                    w: std::ptr::null::<f32>(),
                    w_stride: padded,
                    y: unsafe { sums.as_mut_ptr().add(row * padded) },
                    y_stride: padded,
                    accumulate: !(begins && position == from),
                };
                // SAFETY: the block's values from `offset` on are at least `take` rows.
                unsafe {
                    match self.kv.values(block, self.kv_head) {
                        KvSlice::F32(values) => {
                            product_f32(
                                self.isa,
                                product.with(values.as_ptr().add(offset * padded)),
                            );
                        }
                        KvSlice::F16(values) => {
                            let values = values.as_ptr().add(offset * padded).cast::<F16>();
                            product_f16(self.isa, product.with(values));
                        }
                    }
                }
                position += take;
            }
        };
        let rows = self.vectors.len();
        if latest >= shortest {
            for (r, vector) in self.vectors.iter().enumerate() {
                accumulate(r, 1, vector.seen.start, vector.seen.end, true);
            }
            return;
        }
        let together = self
            .vectors
            .iter()
            .all(|vector| vector.seen.start == latest);
        if !together {
            for (r, vector) in self.vectors.iter().enumerate() {
                accumulate(r, 1, vector.seen.start, latest, true);
            }
        }
        accumulate(0, rows, latest, shortest, together);
        for (r, vector) in self.vectors.iter().enumerate() {
            accumulate(r, 1, shortest, vector.seen.end, false);
        }
    }
}

#[cfg(test)]
mod tests;
