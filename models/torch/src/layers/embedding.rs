//! From token ids to the rows that the first layer reads.

use tch::{Device, Kind, Tensor};
use understudy_checkpoint::TensorError;
use understudy_checkpoint::spec::ModelSpec;

use super::{Norm, Weights};

/// A row per token id, and what is added to it.
#[derive(Debug)]
pub struct Embedding {
    /// `[vocab, hidden]`.
    tokens: Tensor,
    /// In the element type of the activations: rounding it first is what transformers does.
    scale: Option<Tensor>,
    /// `[rows, hidden]`, and how far position 0 is from its row 0.
    positions: Option<(Tensor, i64)>,
    /// `[types, hidden]`.
    token_types: Option<Tensor>,
    norm: Option<Norm>,
}

impl Embedding {
    /// Gets the tables.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load(model: &ModelSpec, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        let (spec, hidden) = (&model.embedding, model.hidden_size);
        let tokens = weights.get(&spec.tokens, &[model.vocab_size, hidden])?;
        let positions = match &spec.positions {
            Some(table) => {
                let tensor = weights.get(&table.tensor, &[table.rows, hidden])?;
                Some((tensor, table.offset as i64))
            }
            None => None,
        };
        let token_types = match &spec.token_types {
            Some((name, types)) => Some(weights.get(name, &[*types, hidden])?),
            None => None,
        };
        let scale = spec.scale.map(|scale| {
            Tensor::from(scale)
                .to_kind(tokens.kind())
                .to_device(tokens.device())
        });
        Ok(Self {
            tokens,
            scale,
            positions,
            token_types,
            norm: Norm::load_if(spec.norm.as_ref(), weights)?,
        })
    }

    /// `ids` and `positions` are `[rows]` i64, each within its table `-> [rows, hidden]`.
    pub fn forward(&self, ids: &Tensor, positions: &Tensor) -> Tensor {
        let mut x = Tensor::embedding(&self.tokens, ids, -1, false, false);
        if let Some(scale) = &self.scale {
            x *= scale;
        }
        if let Some(types) = &self.token_types {
            x += types.narrow(0, 0, 1);
        }
        if let Some((table, offset)) = &self.positions {
            x += Tensor::embedding(table, &(positions + *offset), -1, false, false);
        }
        match &self.norm {
            Some(norm) => norm.forward(&x),
            None => x,
        }
    }

    /// The matrix as a head: `[rows, hidden] -> [rows, vocab]`.
    pub fn as_head(&self, hidden: &Tensor) -> Tensor {
        hidden.linear(&self.tokens, None::<&Tensor>)
    }

    /// Element type of the activations.
    pub fn kind(&self) -> Kind {
        self.tokens.kind()
    }

    /// Where the model lies.
    pub fn device(&self) -> Device {
        self.tokens.device()
    }
}
