//! Encoders: sequences in, hidden states out; for embeddings and reranking.
//!
//! Every row sees its whole sequence, so keys and values live for one call only.

use std::path::Path;

use understudy_checkpoint::Checkpoint;
use understudy_kernels::{self as ops, BLOCK, KvBlocks, Pool, RowPlace};

use crate::breakdown::Stopwatch;
use crate::forward::{Arena, StepRows, forward, kernel};
use crate::load::{LoadError, LoadOptions, load_model, read_spec};
use crate::model::{Linear, Model};

/// A loaded encoder.
pub struct Encoder {
    model: Model,
    pool: Pool,
    arena: Arena,
    kv: Vec<KvBlocks>,
    context_length: usize,
}

/// A text, or two of them.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    pub ids: &'a [u32],
    /// Tokens from here on are of type 1: the second text of a pair, for models that tell them apart.
    pub second: usize,
}

impl<'a> Input<'a> {
    /// One text.
    #[must_use]
    pub fn text(ids: &'a [u32]) -> Self {
        Self {
            ids,
            second: ids.len(),
        }
    }

    /// Two texts; the second begins at `second`.
    #[must_use]
    pub fn pair(ids: &'a [u32], second: usize) -> Self {
        Self { ids, second }
    }
}

/// What a sequence becomes.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// `[tokens][hidden]`.
    pub hidden: Vec<f32>,
    /// `[hidden]`, if the model has a pooler.
    pub pooled: Option<Vec<f32>>,
    /// `[classes]`, if the model has a classifier: one for a reranker.
    pub scores: Option<Vec<f32>>,
}

/// A sequence that cannot be encoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EncodeError {
    #[error("sequence {index} has {tokens} tokens; from 1 to {most} are possible")]
    Length {
        index: usize,
        tokens: usize,
        most: usize,
    },
    #[error("sequence {index} has the token id {id}; the vocabulary has {vocab_size}")]
    Token {
        index: usize,
        id: u32,
        vocab_size: usize,
    },
}

impl Encoder {
    /// Loads an encoder, or a decoder as one (its hidden states see only what came before).
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(directory: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        let checkpoint = Checkpoint::open(directory)?;
        let spec = read_spec(directory, &checkpoint, options.context_length)?;
        let context_length = options
            .context_length
            .unwrap_or(spec.context_length)
            .min(spec.context_length);
        let (model, pool, _) = load_model(
            directory,
            &checkpoint,
            spec,
            context_length,
            options,
            &mut |_| {},
        )?;
        Ok(Self {
            model,
            pool,
            arena: Arena::default(),
            kv: Vec::new(),
            context_length,
        })
    }

    /// Encodes all sequences as one batch; each result is a function of its own sequence.
    ///
    /// # Errors
    /// [`EncodeError`], naming the sequence.
    pub fn encode(&mut self, inputs: &[Input<'_>]) -> Result<Vec<Encoded>, EncodeError> {
        let sequences: Vec<&[u32]> = inputs.iter().map(|input| input.ids).collect();
        self.check(&sequences)?;
        let mut blocks = 0;
        let tables: Vec<Vec<u32>> = sequences
            .iter()
            .map(|tokens| {
                let first = blocks;
                blocks += tokens.len().div_ceil(BLOCK);
                (first as u32..blocks as u32).collect()
            })
            .collect();
        self.make_room(blocks);
        let ids: Vec<u32> = sequences.concat();
        let positions: Vec<usize> = sequences
            .iter()
            .flat_map(|tokens| 0..tokens.len())
            .collect();
        let types = self
            .model
            .spec
            .embedding
            .token_types
            .as_ref()
            .map_or(1, |(_, types)| *types);
        let token_types: Vec<usize> = inputs
            .iter()
            .flat_map(|input| {
                (0..input.ids.len()).map(|at| usize::from(at >= input.second).min(types - 1))
            })
            .collect();
        let causal = self
            .model
            .layers
            .first()
            .is_some_and(|layer| layer.attention.spec.causal);
        let places: Vec<RowPlace<'_>> = sequences
            .iter()
            .zip(&tables)
            .flat_map(|(tokens, table)| {
                (0..tokens.len()).map(move |position| match causal {
                    true => RowPlace::causal(table, position),
                    false => RowPlace::whole(table, position, tokens.len()),
                })
            })
            .collect();
        let wanted: Vec<usize> = (0..ids.len()).collect();
        let step = StepRows {
            ids: &ids,
            token_types: &token_types,
            positions: &positions,
            places: &places,
            wanted: &wanted,
        };
        let mut watch = Stopwatch::default();
        let hidden = forward(
            &self.model,
            &mut self.kv,
            &self.pool,
            &mut self.arena,
            &step,
            &mut watch,
            &|| {},
        );
        let size = self.model.spec.hidden_size;
        let mut rest = &hidden[..];
        let encoded = sequences.iter().map(|tokens| {
            let (own, others) = rest.split_at(tokens.len() * size);
            rest = others;
            finish(&self.model, &self.pool, own)
        });
        Ok(encoded.collect())
    }

    fn check(&self, sequences: &[&[u32]]) -> Result<(), EncodeError> {
        let (most, vocab_size) = (self.context_length, self.model.spec.vocab_size);
        for (index, tokens) in sequences.iter().enumerate() {
            if tokens.is_empty() || tokens.len() > most {
                return Err(EncodeError::Length {
                    index,
                    tokens: tokens.len(),
                    most,
                });
            }
            if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab_size) {
                return Err(EncodeError::Token {
                    index,
                    id: *id,
                    vocab_size,
                });
            }
        }
        Ok(())
    }

    fn make_room(&mut self, blocks: usize) {
        if self.kv.first().is_none_or(|layer| layer.blocks() < blocks) {
            let attention = self.model.layers.iter().map(|layer| &layer.attention.spec);
            self.kv = attention
                .map(|spec| KvBlocks::new(blocks, spec.kv_heads, spec.head_dim))
                .collect();
        }
    }
}

/// One sequence's result from its hidden states.
fn finish(model: &Model, pool: &Pool, hidden: &[f32]) -> Encoded {
    let row = |map: &Linear, x: &[f32]| {
        let mut y = vec![0.0; map.weight.out_features()];
        map.weight.forward(pool, x, 1, &mut y);
        if let Some(bias) = &map.bias {
            ops::add(bias, &mut y);
        }
        y
    };
    let first = &hidden[..model.spec.hidden_size];
    let pooled = model.pooler.as_ref().map(|(map, activation)| {
        let mut pooled = row(map, first);
        ops::activate(pool, kernel(*activation), &mut pooled);
        pooled
    });
    let scores = model
        .classifier
        .as_ref()
        .map(|map| row(map, pooled.as_deref().unwrap_or(first)));
    Encoded {
        hidden: hidden.to_vec(),
        pooled,
        scores,
    }
}
