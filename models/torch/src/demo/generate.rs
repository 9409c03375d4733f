//! Greedy generation for the examination: a plain KV cache, all prompts of a batch side by side.
//!
//! This is not the serving engine: it knows no sampling, no eviction, no recovery. It exists so that the examination
//! depends on nothing but the layers.

use tch::{Device, Kind, Tensor};

use super::tokenizer::END;
use crate::config::LlamaConfig;
use crate::layers::Attention;
use crate::llama::Llama;

/// Keys and values of `slots` sequences, `[slots * capacity, kv_heads, head_dim]` per layer.
struct Cache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    capacity: i64,
}

/// What a forward pass computes: one whole prompt, or the next token of several sequences.
enum Pass<'a> {
    Prompt {
        slot: i64,
    },
    Next {
        slots: &'a [i64],
        lengths: &'a [i64],
    },
}

struct CachedAttention<'a> {
    cache: &'a mut Cache,
    pass: Pass<'a>,
}

impl Cache {
    fn new(config: &LlamaConfig, slots: i64, capacity: i64) -> Self {
        let shape = [
            slots * capacity,
            config.num_key_value_heads,
            config.head_dim,
        ];
        let zeros = || {
            (0..config.num_hidden_layers)
                .map(|_| Tensor::zeros(shape, (Kind::Float, Device::Cpu)))
                .collect()
        };
        Self {
            keys: zeros(),
            values: zeros(),
            capacity,
        }
    }
}

impl Attention for CachedAttention<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let (rows, heads, dim) = (q.size()[0], q.size()[1], q.size()[2]);
        let share = heads / k.size()[1];
        let capacity = self.cache.capacity;
        let places: Vec<i64> = match &self.pass {
            Pass::Prompt { slot } => (0..rows).map(|at| slot * capacity + at).collect(),
            Pass::Next { slots, lengths } => slots
                .iter()
                .zip(*lengths)
                .map(|(slot, length)| slot * capacity + length)
                .collect(),
        };
        let places = Tensor::from_slice(&places);
        let _ = self.cache.keys[layer].index_copy_(0, &places, k);
        let _ = self.cache.values[layer].index_copy_(0, &places, v);
        match &self.pass {
            Pass::Prompt { .. } => {
                // `[rows, heads, dim] -> [1, heads, rows, dim]`
                let spread = |x: &Tensor| x.repeat_interleave_self_int(share, 1, None);
                let sides = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
                let (k, v) = (sides(&spread(k)), sides(&spread(v)));
                attention(&sides(q), &k, &v, None, true)
                    .squeeze_dim(0)
                    .transpose(0, 1)
                    .reshape([rows, heads * dim])
            }
            Pass::Next { slots, lengths } => {
                let longest = lengths.iter().max().map_or(0, |length| length + 1);
                let slots = Tensor::from_slice(slots);
                // `[slots, longest, kv_heads, dim] -> [rows, heads, longest, dim]`
                let gather = |x: &Tensor| {
                    x.view([-1, capacity, heads / share, dim])
                        .narrow(1, 0, longest)
                        .index_select(0, &slots)
                        .repeat_interleave_self_int(share, 2, None)
                        .transpose(1, 2)
                };
                let (k, v) = (
                    gather(&self.cache.keys[layer]),
                    gather(&self.cache.values[layer]),
                );
                let places = Tensor::arange(longest, (Kind::Int64, Device::Cpu));
                let mask = places
                    .unsqueeze(0)
                    .le_tensor(&Tensor::from_slice(lengths).unsqueeze(1))
                    .view([rows, 1, 1, longest]);
                attention(&q.unsqueeze(2), &k, &v, Some(&mask), false).reshape([rows, heads * dim])
            }
        }
    }
}

fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, false)
}

/// One sequence under way.
struct Sequence {
    slot: i64,
    length: i64,
    output: Vec<u32>,
    done: bool,
}

/// Continues every prompt greedily until `<|end|>`, `max_tokens`, or the end of the context; the end token is not
/// in the result. `progress` is called with the number of running sequences at every step.
pub fn greedy(
    model: &Llama,
    prompts: &[Vec<u32>],
    max_tokens: usize,
    progress: &mut dyn FnMut(usize),
) -> Vec<Vec<u32>> {
    let context = model.config().max_position_embeddings;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let capacity = (longest + max_tokens + 1).min(context) as i64;
    let mut cache = Cache::new(model.config(), prompts.len() as i64, capacity);
    tch::no_grad(|| {
        let mut sequences: Vec<Sequence> = prompts
            .iter()
            .enumerate()
            .map(|(slot, prompt)| prefill(model, &mut cache, slot as i64, prompt))
            .collect();
        loop {
            for sequence in &mut sequences {
                sequence.done |= sequence.length >= capacity
                    || sequence.output.last() == Some(&END)
                    || sequence.output.len() >= max_tokens;
            }
            let running: Vec<&mut Sequence> = sequences.iter_mut().filter(|s| !s.done).collect();
            progress(running.len());
            if running.is_empty() {
                break;
            }
            advance(model, &mut cache, running);
        }
        sequences
            .into_iter()
            .map(|sequence| sequence.output)
            .map(|mut output| {
                if output.last() == Some(&END) {
                    output.pop();
                }
                output
            })
            .collect()
    })
}

fn prefill(model: &Llama, cache: &mut Cache, slot: i64, prompt: &[u32]) -> Sequence {
    let ids: Vec<i64> = prompt.iter().map(|id| i64::from(*id)).collect();
    let rows = ids.len() as i64;
    let positions = Tensor::arange(rows, (Kind::Int64, Device::Cpu));
    let mut attention = CachedAttention {
        cache,
        pass: Pass::Prompt { slot },
    };
    let hidden = model.forward(&Tensor::from_slice(&ids), &positions, &mut attention);
    let first = best(model, &hidden.narrow(0, rows - 1, 1));
    Sequence {
        slot,
        length: rows,
        output: first,
        done: false,
    }
}

fn advance(model: &Llama, cache: &mut Cache, mut running: Vec<&mut Sequence>) {
    let slots: Vec<i64> = running.iter().map(|s| s.slot).collect();
    let lengths: Vec<i64> = running.iter().map(|s| s.length).collect();
    let ids: Vec<i64> = running
        .iter()
        .map(|s| s.output.last().map_or(0, |id| i64::from(*id)))
        .collect();
    let mut attention = CachedAttention {
        cache,
        pass: Pass::Next {
            slots: &slots,
            lengths: &lengths,
        },
    };
    let positions = Tensor::from_slice(&lengths);
    let hidden = model.forward(&Tensor::from_slice(&ids), &positions, &mut attention);
    for (sequence, id) in running.iter_mut().zip(best(model, &hidden)) {
        sequence.output.push(id);
        sequence.length += 1;
    }
}

fn best(model: &Llama, hidden: &Tensor) -> Vec<u32> {
    let ids = model.logits(hidden).argmax(-1, false);
    let ids: Vec<i64> = Vec::try_from(&ids).unwrap_or_default();
    ids.into_iter().map(|id| id as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::batch::{Group, GroupedAttention};

    /// The cache must not change what the model says: greedy tokens are the arg-max of a plain causal pass.
    #[test]
    fn cached_generation_equals_a_full_pass() {
        tch::manual_seed(3);
        let config = crate::demo::model_config(300);
        let model = Llama::load(config, &mut |_, shape| {
            Ok(Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.3)
        })
        .unwrap();
        let prompts = vec![vec![5, 9, 77], vec![8], vec![100, 7, 3, 250, 41]];
        let outputs = greedy(&model, &prompts, 12, &mut |_| {});
        for (prompt, output) in prompts.iter().zip(&outputs) {
            assert!(!output.is_empty());
            let whole: Vec<i64> = prompt
                .iter()
                .chain(output)
                .map(|id| i64::from(*id))
                .collect();
            let length = whole.len();
            let groups = [Group { samples: 1, length }];
            let hidden = tch::no_grad(|| {
                model.forward(
                    &Tensor::from_slice(&whole),
                    &Tensor::arange(length as i64, (Kind::Int64, Device::Cpu)),
                    &mut GroupedAttention { groups: &groups },
                )
            });
            let said = best(&model, &hidden);
            assert_eq!(said[prompt.len() - 1..length - 1], output[..]);
        }
    }
}
