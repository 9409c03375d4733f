//! One step through the model: rows of any mixture of sequences in, hidden states of the wanted rows out.
//!
//! Invariant: a row is a function of its own token, position and sequence; every kernel called here keeps it. Buffers are reused: a step
//! that is no larger than an earlier one allocates nothing.

use understudy_checkpoint::spec::Activation;
use understudy_kernels::{self as ops, Attend, ColumnsMut, KvBlocks, Pool, RowPlace, attend};

use crate::breakdown::{Part, Stopwatch};
use crate::model::{Attention, Experts, FeedForward, Layer, Linear, Mlp, Model, Norm, Norms};

/// Memory that steps share. Each is `[rows][something]`, as large as the largest step so far.
#[derive(Default)]
pub struct Arena {
    /// The residual stream.
    pub x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    delta: Vec<f32>,
    /// Of the second branch, where both read the same input.
    second: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
    /// Per rotary embedding, the rows' angles.
    angles: Vec<(Vec<f32>, Vec<f32>)>,
    routing: Routing,
}

/// Which rows go to which expert.
#[derive(Default)]
struct Routing {
    scores: Vec<f32>,
    /// `(expert, row, weight)`, by expert, then row.
    choices: Vec<(u32, u32, f32)>,
    order: Vec<(f32, u32)>,
    gathered: Vec<f32>,
    result: Vec<f32>,
}

/// What a step computes.
pub struct StepRows<'a> {
    pub ids: &'a [u32],
    /// Of each row; empty where all are 0.
    pub token_types: &'a [usize],
    pub positions: &'a [usize],
    pub places: &'a [RowPlace<'a>],
    /// Rows whose hidden states are wanted, ascending.
    pub wanted: &'a [usize],
}

/// `len` elements of a buffer that only grows.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Runs the step; `tick` is called between parts that may take long. Returns the wanted rows, `[wanted][hidden]`, after the final norm.
pub fn forward<'a>(
    model: &Model,
    kv: &mut [KvBlocks],
    pool: &Pool,
    arena: &'a mut Arena,
    step: &StepRows<'_>,
    watch: &mut Stopwatch,
    tick: &dyn Fn(),
) -> &'a mut [f32] {
    let hidden = model.spec.hidden_size;
    let mut rows = step.ids.len();
    embed(model, pool, arena, step);
    angles(model, arena, step.positions);
    watch.charge(Part::Embedding);
    let last = model.layers.len().saturating_sub(1);
    for (index, (layer, kv)) in model.layers.iter().zip(kv).enumerate() {
        let call = LayerCall {
            model,
            layer,
            pool,
            places: step.places,
        };
        tick();
        call.attention_part(kv, arena, rows, watch);
        if index == last && step.wanted.len() < rows {
            // Nobody reads the other rows any more: their keys and values are stored.
            call.keep(arena, step.wanted);
            rows = step.wanted.len();
            if rows == 0 {
                break;
            }
        }
        tick();
        call.rest(arena, rows, watch);
    }
    if model.layers.is_empty() {
        keep_rows(&mut arena.x, hidden, step.wanted);
        rows = step.wanted.len();
    }
    let Arena { x, normed, .. } = arena;
    let hidden_states = match &model.final_norm {
        Some(norm) => {
            normalise(
                pool,
                norm,
                &x[..rows * hidden],
                sized(normed, rows * hidden),
            );
            &mut normed[..rows * hidden]
        }
        None => &mut x[..rows * hidden],
    };
    watch.charge(Part::Elementwise);
    hidden_states
}

fn embed(model: &Model, pool: &Pool, arena: &mut Arena, step: &StepRows<'_>) {
    let hidden = model.spec.hidden_size;
    let x = sized(&mut arena.x, step.ids.len() * hidden);
    for (index, (row, id)) in x.chunks_exact_mut(hidden).zip(step.ids).enumerate() {
        model.embedding.weight_row(*id as usize, row);
        if let Some(scale) = model.spec.embedding.scale {
            row.iter_mut().for_each(|value| *value *= scale);
        }
        if let Some(table) = &model.positions {
            ops::add(&table[step.positions[index] * hidden..][..hidden], row);
        }
        if let Some(table) = &model.token_types {
            let kind = step.token_types.get(index).copied().unwrap_or(0);
            ops::add(&table[kind * hidden..][..hidden], row);
        }
    }
    if let Some(norm) = &model.embedding_norm {
        let rows = step.ids.len() * hidden;
        let normed = sized(&mut arena.normed, rows);
        normalise(pool, norm, &arena.x[..rows], normed);
        std::mem::swap(&mut arena.x, &mut arena.normed);
    }
}

/// The rows' angles of every rotary embedding.
fn angles(model: &Model, arena: &mut Arena, positions: &[usize]) {
    arena
        .angles
        .resize_with(model.ropes.len(), Default::default);
    for (rope, (cos, sin)) in model.ropes.iter().zip(&mut arena.angles) {
        let half = rope.rotary_dim / 2;
        cos.clear();
        sin.clear();
        for position in positions {
            cos.extend_from_slice(&rope.cos[position * half..][..half]);
            sin.extend_from_slice(&rope.sin[position * half..][..half]);
        }
    }
}

fn normalise(pool: &Pool, norm: &Norm, x: &[f32], y: &mut [f32]) {
    if norm.layer {
        ops::layer_norm(pool, x, &norm.weight, norm.bias.as_deref(), norm.eps, y);
    } else {
        ops::rms_norm(pool, x, &norm.weight, norm.eps, y);
    }
}

fn linear(pool: &Pool, map: &Linear, x: &[f32], rows: usize, y: &mut [f32]) {
    map.weight.forward(pool, x, rows, y);
    if let Some(bias) = &map.bias {
        for row in y.chunks_exact_mut(bias.len()) {
            ops::add(bias, row);
        }
    }
}

/// Rows `wanted` (ascending) move to the front.
fn keep_rows(rows: &mut [f32], size: usize, wanted: &[usize]) {
    for (to, from) in wanted.iter().enumerate() {
        rows.copy_within(from * size..(from + 1) * size, to * size);
    }
}

/// One layer of one step.
struct LayerCall<'a> {
    model: &'a Model,
    layer: &'a Layer,
    pool: &'a Pool,
    places: &'a [RowPlace<'a>],
}

impl LayerCall<'_> {
    /// Up to and with attention proper: fills `attended`, and stores keys and values.
    fn attention_part(
        &self,
        kv: &mut KvBlocks,
        arena: &mut Arena,
        rows: usize,
        watch: &mut Stopwatch,
    ) {
        let (pool, attention) = (self.pool, &self.layer.attention);
        let spec = &attention.spec;
        let hidden = self.model.spec.hidden_size;
        let Arena {
            x,
            normed,
            qkv,
            attended,
            angles,
            ..
        } = arena;
        let input = match &self.layer.attention_norms.input {
            Some(norm) => {
                normalise(
                    pool,
                    norm,
                    &x[..rows * hidden],
                    sized(normed, rows * hidden),
                );
                &normed[..rows * hidden]
            }
            None => &x[..rows * hidden],
        };
        watch.charge(Part::Elementwise);
        let width = spec.qkv.outputs;
        let qkv = sized(qkv, rows * width);
        linear(pool, &attention.qkv, input, rows, qkv);
        watch.charge(Part::Matmul);
        self.turn(attention, qkv, angles);
        watch.charge(Part::Elementwise);
        let (q_size, kv_size) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        kv.write_rows(
            pool,
            self.places,
            &qkv[q_size..],
            &qkv[q_size + kv_size..],
            width,
        );
        let call = Attend {
            heads: spec.heads,
            q_stride: width,
            scale: spec.scale,
            soft_cap: spec.soft_cap,
            window: spec.window,
        };
        attend(
            pool,
            kv,
            self.places,
            &call,
            qkv,
            sized(attended, rows * q_size),
        );
        watch.charge(Part::Attention);
    }

    /// Norms and rotary embedding of queries and keys, in place.
    fn turn(&self, attention: &Attention, qkv: &mut [f32], angles: &[(Vec<f32>, Vec<f32>)]) {
        let spec = &attention.spec;
        let (stride, q_size) = (spec.qkv.outputs, spec.heads * spec.head_dim);
        let k_end = q_size + spec.kv_heads * spec.head_dim;
        if let Some(norm) = &attention.q_norm {
            let queries = ColumnsMut::of(qkv, stride, 0..q_size);
            ops::rms_norm_heads(self.pool, queries, &norm.weight, norm.eps);
        }
        if let Some(norm) = &attention.k_norm {
            let keys = ColumnsMut::of(qkv, stride, q_size..k_end);
            ops::rms_norm_heads(self.pool, keys, &norm.weight, norm.eps);
        }
        if let Some(rope) = spec.rope {
            let (cos, sin) = &angles[rope];
            // Keys stand right behind the queries: one pass turns both.
            let both = ColumnsMut::of(qkv, stride, 0..k_end);
            ops::rotate_heads(self.pool, both, spec.head_dim, cos, sin);
        }
    }

    /// Only these rows go on.
    fn keep(&self, arena: &mut Arena, wanted: &[usize]) {
        let spec = &self.layer.attention.spec;
        keep_rows(&mut arena.x, self.model.spec.hidden_size, wanted);
        keep_rows(&mut arena.attended, spec.heads * spec.head_dim, wanted);
    }

    /// Everything behind attention proper.
    fn rest(&self, arena: &mut Arena, rows: usize, watch: &mut Stopwatch) {
        let (pool, layer) = (self.pool, self.layer);
        let size = rows * self.model.spec.hidden_size;
        let width = layer.attention.spec.heads * layer.attention.spec.head_dim;
        let delta = sized(&mut arena.delta, size);
        linear(
            pool,
            &layer.attention.output,
            &arena.attended[..rows * width],
            rows,
            delta,
        );
        watch.charge(Part::Matmul);
        if layer.parallel {
            // The second branch reads what the first one read.
            self.feed_forward(arena, rows, watch);
            self.add_branch(&layer.attention_norms, arena, size, false);
            self.add_branch(&layer.mlp_norms, arena, size, true);
        } else {
            self.add_branch(&layer.attention_norms, arena, size, false);
            watch.charge(Part::Elementwise);
            self.feed_forward(arena, rows, watch);
            self.add_branch(&layer.mlp_norms, arena, size, true);
        }
        watch.charge(Part::Elementwise);
    }

    /// `x = sum_norm(x + output_norm(delta))`.
    fn add_branch(&self, norms: &Norms, arena: &mut Arena, size: usize, second: bool) {
        let Arena {
            x,
            normed,
            delta,
            second: other,
            ..
        } = arena;
        let delta = if second {
            &other[..size]
        } else {
            &delta[..size]
        };
        match &norms.output {
            Some(norm) => {
                normalise(self.pool, norm, delta, sized(normed, size));
                ops::add(&normed[..size], &mut x[..size]);
            }
            None => ops::add(delta, &mut x[..size]),
        }
        if let Some(norm) = &norms.sum {
            normalise(self.pool, norm, &x[..size], sized(normed, size));
            std::mem::swap(x, normed);
        }
    }

    /// The feed-forward part of `x`, to `second`.
    fn feed_forward(&self, arena: &mut Arena, rows: usize, watch: &mut Stopwatch) {
        let hidden = self.model.spec.hidden_size;
        let Arena {
            x,
            normed,
            second,
            up,
            inner,
            routing,
            ..
        } = arena;
        let input = match &self.layer.mlp_norms.input {
            Some(norm) => {
                normalise(
                    self.pool,
                    norm,
                    &x[..rows * hidden],
                    sized(normed, rows * hidden),
                );
                &normed[..rows * hidden]
            }
            None => &x[..rows * hidden],
        };
        watch.charge(Part::Elementwise);
        let y = sized(second, rows * hidden);
        match &self.layer.feed_forward {
            FeedForward::Dense(mlp) => dense(self.pool, mlp, input, rows, up, inner, y, watch),
            FeedForward::Experts(mixture) => {
                let mut scratch = Scratch { up, inner, routing };
                experts(
                    self.pool,
                    mixture,
                    input,
                    rows,
                    hidden,
                    &mut scratch,
                    y,
                    watch,
                );
            }
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn dense(
    pool: &Pool,
    mlp: &Mlp,
    x: &[f32],
    rows: usize,
    up: &mut Vec<f32>,
    inner: &mut Vec<f32>,
    y: &mut [f32],
    watch: &mut Stopwatch,
) {
    let width = mlp.up.weight.out_features();
    let up = sized(up, rows * width);
    linear(pool, &mlp.up, x, rows, up);
    watch.charge(Part::Matmul);
    let activation = kernel(mlp.activation);
    let inner = if mlp.gated {
        let inner = sized(inner, rows * width / 2);
        ops::gated(pool, activation, up, width / 2, inner);
        inner
    } else {
        ops::activate(pool, activation, up);
        up
    };
    watch.charge(Part::Elementwise);
    linear(pool, &mlp.down, inner, rows, y);
    watch.charge(Part::Matmul);
}

/// The kernels' name of an activation.
pub fn kernel(activation: Activation) -> ops::Activation {
    match activation {
        Activation::Silu => ops::Activation::Silu,
        Activation::GeluTanh => ops::Activation::GeluTanh,
        Activation::GeluErf => ops::Activation::GeluErf,
        Activation::Relu => ops::Activation::Relu,
        Activation::Tanh => ops::Activation::Tanh,
    }
}

struct Scratch<'a> {
    up: &'a mut Vec<f32>,
    inner: &'a mut Vec<f32>,
    routing: &'a mut Routing,
}

/// Every expert computes all of its rows at once; a row's sum runs over its experts in ascending order.
#[allow(clippy::too_many_arguments)]
fn experts(
    pool: &Pool,
    mixture: &Experts,
    x: &[f32],
    rows: usize,
    hidden: usize,
    scratch: &mut Scratch<'_>,
    y: &mut [f32],
    watch: &mut Stopwatch,
) {
    let count = mixture.experts.len();
    let Routing {
        scores,
        choices,
        order,
        gathered,
        result,
    } = &mut *scratch.routing;
    let scores = sized(scores, rows * count);
    linear(pool, &mixture.router, x, rows, scores);
    watch.charge(Part::Matmul);
    choices.clear();
    for (row, scores) in scores.chunks_exact_mut(count).enumerate() {
        route(mixture, scores, order);
        choices.extend(
            order
                .iter()
                .map(|(weight, expert)| (*expert, row as u32, *weight)),
        );
    }
    choices.sort_unstable_by_key(|(expert, row, _)| (*expert, *row));
    y.fill(0.0);
    watch.charge(Part::Elementwise);
    for chosen in choices.chunk_by(|a, b| a.0 == b.0) {
        let mlp = &mixture.experts[chosen[0].0 as usize];
        let gathered = sized(gathered, chosen.len() * hidden);
        for (target, (_, row, _)) in gathered.chunks_exact_mut(hidden).zip(chosen) {
            target.copy_from_slice(&x[*row as usize * hidden..][..hidden]);
        }
        let result = sized(result, chosen.len() * hidden);
        dense(
            pool,
            mlp,
            gathered,
            chosen.len(),
            scratch.up,
            scratch.inner,
            result,
            watch,
        );
        for (part, (_, row, weight)) in result.chunks_exact(hidden).zip(chosen) {
            let sum = &mut y[*row as usize * hidden..][..hidden];
            for (sum, value) in sum.iter_mut().zip(part) {
                *sum += weight * value;
            }
        }
        watch.charge(Part::Elementwise);
    }
}

/// The `top_k` best experts of a row with their weights, to `order`: softmax over all, ties to the lowest number.
fn route(mixture: &Experts, scores: &mut [f32], order: &mut Vec<(f32, u32)>) {
    softmax(scores);
    order.clear();
    order.extend(scores.iter().copied().zip(0..));
    order.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    order.truncate(mixture.top_k);
    if mixture.normalised {
        let sum: f32 = order.iter().map(|(weight, _)| weight).sum();
        order.iter_mut().for_each(|(weight, _)| *weight /= sum);
    }
}

/// Softmax in place, summed in order: rows of experts are short.
fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score -= max);
    ops::exp_slice(scores);
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= sum);
}
