//! Encoders: whole sequences in, hidden states or scores out. No cache, no scheduler.

use tch::{Device, Kind, Tensor};
use understudy_checkpoint::spec::ModelSpec;
use understudy_engine_core::runner::StepError;

use super::caught;
use crate::layers::{Attend, AttentionRule, Visible, dot_product};
use crate::meter::Meter;
use crate::model::Model;

/// What an encoder makes of one sequence, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// A row per token, `[tokens * hidden]`.
    pub hidden: Vec<f32>,
    /// The pooled first row, if the model has a pooler.
    pub pooled: Option<Vec<f32>>,
    /// The classifier's scores, if it has one.
    pub scores: Option<Vec<f32>>,
}

/// A loaded encoder.
pub struct TorchEncoder {
    model: Model,
}

impl TorchEncoder {
    #[must_use]
    pub fn new(model: Model) -> Self {
        Self { model }
    }

    pub fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    /// Encodes each sequence for itself, all in one pass through the layers.
    ///
    /// # Errors
    /// [`StepError`] if a sequence is empty, too long or has an id that there is none of, or LibTorch failed.
    pub fn encode(&mut self, sequences: &[&[u32]]) -> Result<Vec<Encoded>, StepError> {
        self.check(sequences)?;
        if sequences.is_empty() {
            return Ok(Vec::new());
        }
        caught(|| self.forward(sequences))
    }

    fn check(&self, sequences: &[&[u32]]) -> Result<(), StepError> {
        let spec = self.model.spec();
        let most = spec.context_length;
        for (index, ids) in sequences.iter().enumerate() {
            let wrong_id = ids.iter().find(|id| **id as usize >= spec.vocab_size);
            let problem = match wrong_id {
                _ if ids.is_empty() || ids.len() > most => {
                    format!("{} tokens; 1 to {most} are possible", ids.len())
                }
                Some(id) => format!("token id {id} is beyond the vocabulary"),
                None => continue,
            };
            return Err(StepError {
                message: format!("impossible sequence {index}: {problem}"),
            });
        }
        Ok(())
    }

    fn forward(&self, sequences: &[&[u32]]) -> Vec<Encoded> {
        let model = &self.model;
        let index = |values: Vec<i64>| Tensor::from_slice(&values).to_device(model.device());
        let ids = sequences.iter().flat_map(|ids| ids.iter());
        let ids = index(ids.map(|id| i64::from(*id)).collect());
        let positions = sequences.iter().flat_map(|ids| 0..ids.len() as i64);
        let positions = index(positions.collect());
        let mut attention = Whole {
            lengths: sequences.iter().map(|ids| ids.len()).collect(),
        };
        let mut first = 0;
        let firsts = attention.lengths.iter().map(|length| {
            let row = first;
            first += *length as i64;
            row
        });
        let firsts = index(firsts.collect());
        let hidden = model.forward(&ids, &positions, &mut attention, &Meter::default());
        let first_rows = hidden.index_select(0, &firsts);
        let pooled = model.pooled(&first_rows).map(|rows| by_row(&rows));
        let scores = model.scores(&first_rows).map(|rows| by_row(&rows));
        let mut values = values(&hidden).into_iter();
        let width = model.spec().hidden_size;
        let of = |rows: &Option<Vec<Vec<f32>>>, index: usize| Some(rows.as_ref()?[index].clone());
        (0..sequences.len())
            .map(|index| Encoded {
                hidden: values
                    .by_ref()
                    .take(sequences[index].len() * width)
                    .collect(),
                pooled: of(&pooled, index),
                scores: of(&scores, index),
            })
            .collect()
    }
}

fn values(rows: &Tensor) -> Vec<f32> {
    let rows = rows
        .to_kind(Kind::Float)
        .to_device(Device::Cpu)
        .contiguous();
    let mut values = vec![0.0; rows.numel()];
    rows.copy_data(&mut values, rows.numel());
    values
}

fn by_row(rows: &Tensor) -> Vec<Vec<f32>> {
    let width = rows.size()[1] as usize;
    values(rows).chunks(width).map(<[f32]>::to_vec).collect()
}

/// Each sequence attends to itself; there is nothing before it.
struct Whole {
    lengths: Vec<usize>,
}

impl Attend for Whole {
    fn attend(
        &mut self,
        _layer: usize,
        rule: &AttentionRule,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Tensor {
        let mut first = 0;
        let outputs = self.lengths.iter().map(|length| {
            let own = |x: &Tensor| x.narrow(0, first, *length as i64).unsqueeze(0);
            let visible = Visible::within(rule, *length, (q.kind(), q.device()));
            let out = dot_product(rule, &own(q), &own(k), &own(v), &visible);
            first += *length as i64;
            out
        });
        Tensor::cat(&outputs.collect::<Vec<_>>(), 0)
    }
}
