//! From a row of logits to an output token: a pure function of (logits, history, parameters, position).
//!
//! ```text
//! raw logits ──> logprobs (log-softmax of the raw row)
//!      └─> logit bias ─> penalties ─> suppressed ids, mask ─> greedy: argmax
//!                                                        └──> temperature ─> min-p ─> top-k ─> top-p ─> draw
//! ```
//!
//! The mask holds what `allowed_token_ids` and a grammar leave ([`crate::mask`]).
//!
//! Order and meaning of the steps are vLLM's. The draw is an inverse CDF over the tokens that are left, in id order,
//! at one uniform number keyed (seed, position): see [`crate::rng`].
//!
//! Invariant: same inputs, same bits, on every CPU. Sums run in a fixed order ([`crate::softmax`]); ties go to the
//! lowest id; no algorithm whose result depends on the partition order of a selection feeds a sum.

use crate::{
    frame::{OutputToken, SamplingParams},
    mask,
    penalties::{History, has_penalties},
    rng::{Domain, uniform},
    softmax::{LogSoftmax, Row, finite_max, masked_max, weights_into},
};

/// Raised whenever a change here, in [`crate::softmax`], [`crate::rng`] or [`crate::penalties`] changes an id or a logprob bit; part of
/// every fingerprint. A digest in the tests tells when it is due.
pub const SAMPLING_NUMERICS: &str = "sampling-1";

/// Temperatures below this are greedy, as in vLLM: dividing by them says the same.
pub const GREEDY_TEMPERATURE: f32 = 1e-5;

/// How many of the best tokens a nucleus search sorts at first; most nuclei are smaller.
const NUCLEUS_FIRST: usize = 128;
/// By how much it widens the search each time the mass does not suffice.
const NUCLEUS_GROWTH: usize = 8;

/// Why a row gives no token. Both mean that this model cannot serve this request, not that the engine is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// NaN or plus infinity in the row, or nothing above minus infinity.
    #[error("logits are not finite")]
    NotFinite,
    /// Every token of the vocabulary is suppressed.
    #[error(
        "no token is left to choose from: min_tokens, allowed_token_ids and the grammar between them rule out the whole vocabulary"
    )]
    NothingLeft,
}

/// One row to sample from.
#[derive(Debug, Clone, Copy)]
pub struct SampleInput<'a> {
    /// The model's logits, one per token id.
    pub logits: &'a [f32],
    pub params: &'a SamplingParams,
    /// Tokens so far; `None` where no penalty needs them.
    pub history: Option<&'a History>,
    /// Ids that may not be chosen here (end-of-sequence before `min_tokens`).
    pub suppressed: &'a [u32],
    /// The only ids that may be chosen here, as a bitmap of 32 ids a word, lowest bit first; `None` allows all.
    pub mask: Option<&'a [u32]>,
    /// Output position, counted from 0.
    pub position: u32,
}

/// Samples rows, one at a time. Holds scratch memory only: no state passes from one row to the next.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Logits after bias, penalties and masks.
    adjusted: Vec<f32>,
    /// Unnormalised probabilities, the largest being 1.
    weights: Vec<f32>,
    /// Sort keys of candidates, see [`key_of`].
    keys: Vec<u64>,
}

impl Sampler {
    /// A sampler without scratch memory yet; it grows to the vocabulary with the first row.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the token at `input.position`. Allocates only for top logprobs, which travel with the token.
    ///
    /// # Errors
    /// [`SampleError`].
    pub fn sample(&mut self, input: SampleInput<'_>) -> Result<OutputToken, SampleError> {
        let raw = finite_max(input.logits).ok_or(SampleError::NotFinite)?;
        let log_softmax = LogSoftmax::of(input.logits, raw);
        let id = self.choose(input, raw)?;
        let top = if input.params.top_logprobs == 0 {
            Vec::new()
        } else {
            top_tokens(
                input.logits,
                input.params.top_logprobs as usize,
                log_softmax,
            )
        };
        Ok(OutputToken {
            id,
            logprob: log_softmax.logprob(input.logits[id as usize]),
            top,
        })
    }

    /// Logprob of a token that is already chosen: the same bits as [`Self::sample`] reported for it.
    ///
    /// # Errors
    /// [`SampleError::NotFinite`]. An `id` outside the row is one too.
    pub fn logprob(&self, logits: &[f32], id: u32) -> Result<f32, SampleError> {
        let raw = finite_max(logits).ok_or(SampleError::NotFinite)?;
        let logit = logits.get(id as usize).ok_or(SampleError::NotFinite)?;
        Ok(LogSoftmax::of(logits, raw).logprob(*logit))
    }

    fn choose(&mut self, input: SampleInput<'_>, raw: Row) -> Result<u32, SampleError> {
        let penalties = input.history.filter(|_| has_penalties(input.params));
        let bias = &input.params.logit_bias;
        let as_it_is = penalties.is_none()
            && bias.is_empty()
            && input.suppressed.is_empty()
            && input.mask.is_none();
        if as_it_is {
            return Ok(self.choose_from(input.logits, raw, input));
        }
        let mut adjusted = std::mem::take(&mut self.adjusted);
        adjusted.clear();
        adjusted.extend_from_slice(input.logits);
        for &(id, bias) in bias {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit += bias;
            }
        }
        if let Some(history) = penalties {
            history.apply(input.params, &mut adjusted);
        }
        for &id in input.suppressed {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Some(mask) = input.mask {
            mask::apply(mask, &mut adjusted);
        }
        let chosen = masked_max(&adjusted).map(|row| self.choose_from(&adjusted, row, input));
        self.adjusted = adjusted;
        chosen
    }

    fn choose_from(&mut self, logits: &[f32], row: Row, input: SampleInput<'_>) -> u32 {
        let params = input.params;
        if params.temperature < GREEDY_TEMPERATURE {
            return row.argmax(logits);
        }
        weights_into(logits, row, params.temperature, &mut self.weights);
        if params.min_p > 0.0 {
            for weight in &mut self.weights {
                *weight = if *weight < params.min_p { 0.0 } else { *weight };
            }
        }
        let u = uniform(params.seed, u64::from(input.position), 0, Domain::Token);
        let top_k = if params.top_k == 0 {
            usize::MAX
        } else {
            params.top_k as usize
        };
        if top_k >= logits.len() && params.top_p >= 1.0 {
            let all = 0..self.weights.len() as u32;
            return draw(&self.weights, all, u).unwrap_or_else(|| row.argmax(logits));
        }
        self.restrict(logits, top_k, params.top_p);
        draw(&self.weights, self.keys.iter().map(|&key| id_of(key)), u)
            .unwrap_or_else(|| row.argmax(logits))
    }

    /// Leaves in `keys` the tokens that top-k and then top-p keep, in id order.
    fn restrict(&mut self, logits: &[f32], top_k: usize, top_p: f32) {
        let Self { weights, keys, .. } = self;
        keys.clear();
        let candidates = logits
            .iter()
            .zip(weights.iter())
            .enumerate()
            .filter(|(_, (_, weight))| **weight > 0.0);
        keys.extend(candidates.map(|(id, (&logit, _))| key_of(logit, id as u32)));
        if top_k < keys.len() {
            keys.select_nth_unstable(top_k - 1);
            keys.truncate(top_k);
        }
        if top_p < 1.0 {
            // Summed in id order: the order that a selection leaves behind must not reach the bits of a sum.
            keys.sort_unstable_by_key(|&key| id_of(key));
            let total: f64 = keys
                .iter()
                .map(|&key| f64::from(weights[id_of(key) as usize]))
                .sum();
            let kept = nucleus(keys, weights, f64::from(top_p) * total);
            keys.truncate(kept);
        }
        keys.sort_unstable_by_key(|&key| id_of(key));
    }
}

/// Moves the most likely tokens to the front, best first, and returns how many of them reach `mass` (at least 1).
fn nucleus(keys: &mut [u64], weights: &[f32], mass: f64) -> usize {
    let mut sorted = 0;
    let mut sum = 0.0;
    let mut width = NUCLEUS_FIRST;
    while sorted < keys.len() {
        let rest = &mut keys[sorted..];
        let width_now = width.min(rest.len());
        if width_now < rest.len() {
            rest.select_nth_unstable(width_now - 1);
        }
        rest[..width_now].sort_unstable();
        for (index, &key) in rest[..width_now].iter().enumerate() {
            sum += f64::from(weights[id_of(key) as usize]);
            if sum >= mass {
                return sorted + index + 1;
            }
        }
        sorted += width_now;
        width *= NUCLEUS_GROWTH;
    }
    keys.len()
}

/// Inverse CDF over `ids` at `u`; `None` only if every weight is 0.
fn draw(weights: &[f32], ids: impl Iterator<Item = u32> + Clone, u: f64) -> Option<u32> {
    let total: f64 = ids.clone().map(|id| f64::from(weights[id as usize])).sum();
    let target = u * total;
    let mut sum = 0.0;
    let mut last = None;
    for id in ids {
        let weight = f64::from(weights[id as usize]);
        if weight > 0.0 {
            sum += weight;
            last = Some(id);
            if sum > target {
                break;
            }
        }
    }
    last
}

/// The `count` most likely tokens, best first, ties to the lowest id; none that the model rules out.
fn top_tokens(logits: &[f32], count: usize, log_softmax: LogSoftmax) -> Vec<(u32, f32)> {
    let count = count.min(logits.len());
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in logits.iter().enumerate() {
        let too_low = top.len() == count && top.last().is_some_and(|&(_, worst)| logit <= worst);
        if too_low || logit == f32::NEG_INFINITY {
            continue;
        }
        let place = top.partition_point(|&(_, better)| better >= logit);
        top.insert(place, (id as u32, logit));
        top.truncate(count);
    }
    for entry in &mut top {
        entry.1 = log_softmax.logprob(entry.1);
    }
    top
}

/// A key whose ascending order is: higher logit first, then lower id. The logit must not be NaN.
fn key_of(logit: f32, id: u32) -> u64 {
    // Adding 0 makes -0 and 0 one value, so that they tie.
    let bits = (logit + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 {
        bits | 0x8000_0000
    } else {
        !bits
    };
    u64::from(!ascending) << 32 | u64::from(id)
}

fn id_of(key: u64) -> u32 {
    key as u32
}

#[cfg(test)]
mod tests;
