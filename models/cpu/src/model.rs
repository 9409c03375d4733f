//! A model with its weights in place: the specification's parts, each beside what it computes with.

use understudy_checkpoint::spec::{
    Activation, AttentionSpec, DenseMlp, LinearSpec, MlpSpec, ModelSpec, NormKind, NormSpec,
    OutputSpec, ResidualNorms, RowPattern, WeightPart,
};
use understudy_checkpoint::{Checkpoint, TensorError};
use understudy_kernels::PackedLinear;

use crate::weights::PackedWeights;

/// `y = x W^T + b`.
pub struct Linear {
    pub weight: PackedLinear,
    pub bias: Option<Vec<f32>>,
}

/// A normalisation; of [`NormKind::RmsPlusOne`] the one is added already.
pub struct Norm {
    pub layer: bool,
    pub weight: Vec<f32>,
    /// Of a LayerNorm.
    pub bias: Option<Vec<f32>>,
    pub eps: f32,
}

/// See [`ResidualNorms`].
pub struct Norms {
    pub input: Option<Norm>,
    pub output: Option<Norm>,
    pub sum: Option<Norm>,
}

pub struct Attention {
    pub spec: AttentionSpec,
    pub qkv: Linear,
    pub output: Linear,
    pub q_norm: Option<Norm>,
    pub k_norm: Option<Norm>,
}

pub struct Mlp {
    pub activation: Activation,
    pub gated: bool,
    pub up: Linear,
    pub down: Linear,
}

pub struct Experts {
    pub router: Linear,
    pub experts: Vec<Mlp>,
    pub top_k: usize,
    pub normalised: bool,
}

pub enum FeedForward {
    Dense(Mlp),
    Experts(Experts),
}

pub struct Layer {
    pub attention: Attention,
    pub attention_norms: Norms,
    pub feed_forward: FeedForward,
    pub mlp_norms: Norms,
    pub parallel: bool,
}

/// Cosines and sines of one rotary embedding, `[positions][rotary_dim / 2]`.
pub struct RopeTable {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub rotary_dim: usize,
}

/// A whole model.
pub struct Model {
    pub spec: ModelSpec,
    pub embedding: PackedLinear,
    /// `[rows][hidden]`, added by position; the offset of position 0 is taken off already.
    pub positions: Option<Vec<f32>>,
    /// `[types][hidden]`, added by the token's type.
    pub token_types: Option<Vec<f32>>,
    pub embedding_norm: Option<Norm>,
    pub layers: Vec<Layer>,
    pub ropes: Vec<RopeTable>,
    pub final_norm: Option<Norm>,
    /// `None`: the embedding's matrix.
    pub head: Option<Linear>,
    pub pooler: Option<(Linear, Activation)>,
    pub classifier: Option<Linear>,
}

/// Takes parts out of a checkpoint.
struct Builder<'a> {
    checkpoint: &'a Checkpoint,
    packed: PackedWeights,
}

impl Model {
    /// Puts a model together; `context_length` positions at most are asked of it.
    ///
    /// # Errors
    /// [`TensorError`] for a vector that is missing or of another length.
    pub fn build(
        spec: ModelSpec,
        checkpoint: &Checkpoint,
        packed: PackedWeights,
        context_length: usize,
    ) -> Result<Self, TensorError> {
        let hidden = spec.hidden_size;
        let mut builder = Builder { checkpoint, packed };
        let positions = match &spec.embedding.positions {
            None => None,
            Some(positions) => {
                let mut table = builder.matrix(&positions.tensor, positions.rows, hidden)?;
                table.drain(..positions.offset * hidden);
                Some(table)
            }
        };
        let token_types = match &spec.embedding.token_types {
            None => None,
            Some((tensor, types)) => Some(builder.matrix(tensor, *types, hidden)?),
        };
        let embedding_norm = builder.norm_if(spec.embedding.norm.as_ref())?;
        let layers = (0..spec.layers.len())
            .map(|index| builder.layer(&spec, index))
            .collect::<Result<_, _>>()?;
        let ropes = spec.ropes.iter().map(|rope| {
            let (cos, sin) = rope.table(context_length);
            RopeTable {
                cos,
                sin,
                rotary_dim: rope.rotary_dim,
            }
        });
        let ropes = ropes.collect();
        let final_norm = builder.norm_if(spec.final_norm.as_ref())?;
        let (mut head, mut pooler, mut classifier) = (None, None, None);
        match &spec.output {
            OutputSpec::Logits {
                head: Some(map), ..
            } => head = Some(builder.linear("head", map)?),
            OutputSpec::Logits { head: None, .. } => {}
            OutputSpec::Hidden {
                pooler: pooled,
                classifier: classified,
            } => {
                if let Some((map, activation)) = pooled {
                    pooler = Some((builder.linear("pooler", map)?, *activation));
                }
                if let Some(map) = classified {
                    classifier = Some(builder.linear("classifier", map)?);
                }
            }
        }
        Ok(Self {
            embedding: builder.packed.take_embedding(),
            positions,
            token_types,
            embedding_norm,
            layers,
            ropes,
            final_norm,
            head,
            pooler,
            classifier,
            spec,
        })
    }

    /// Logits of the next token from a row of hidden states: the map, which may be the embedding's.
    #[must_use]
    pub fn head(&self) -> (&PackedLinear, Option<&[f32]>) {
        match &self.head {
            Some(head) => (&head.weight, head.bias.as_deref()),
            None => (&self.embedding, None),
        }
    }
}

impl Builder<'_> {
    fn linear(&mut self, name: &str, map: &LinearSpec) -> Result<Linear, TensorError> {
        let bias = self.checkpoint.linear(map)?.bias().map(<[f32]>::to_vec);
        Ok(Linear {
            weight: self.packed.take(name),
            bias,
        })
    }

    fn matrix(&self, tensor: &str, rows: usize, columns: usize) -> Result<Vec<f32>, TensorError> {
        let map = LinearSpec {
            inputs: columns,
            outputs: rows,
            weight: vec![WeightPart {
                tensor: tensor.to_owned(),
                stored_outputs: rows,
                transposed: false,
                rows: RowPattern::range(0, rows),
            }],
            bias: Vec::new(),
        };
        let mut values = vec![0.0; rows * columns];
        self.checkpoint.linear(&map)?.rows(0, &mut values);
        Ok(values)
    }

    fn norm_if(&self, norm: Option<&NormSpec>) -> Result<Option<Norm>, TensorError> {
        let Some(spec) = norm else { return Ok(None) };
        let mut weight = self.checkpoint.vector(&spec.weight, spec.size)?;
        if spec.kind == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|weight| *weight += 1.0);
        }
        let layer = spec.kind == NormKind::Layer;
        let bias = match &spec.bias {
            Some(bias) => Some(self.checkpoint.vector(bias, spec.size)?),
            None => None,
        };
        Ok(Some(Norm {
            layer,
            weight,
            bias,
            eps: spec.eps,
        }))
    }

    fn norms(&self, norms: &ResidualNorms) -> Result<Norms, TensorError> {
        Ok(Norms {
            input: self.norm_if(norms.input.as_ref())?,
            output: self.norm_if(norms.output.as_ref())?,
            sum: self.norm_if(norms.sum.as_ref())?,
        })
    }

    fn mlp(&mut self, name: &str, spec: &DenseMlp) -> Result<Mlp, TensorError> {
        Ok(Mlp {
            activation: spec.activation,
            gated: spec.gated,
            up: self.linear(&format!("{name}up"), &spec.up)?,
            down: self.linear(&format!("{name}down"), &spec.down)?,
        })
    }

    fn layer(&mut self, spec: &ModelSpec, index: usize) -> Result<Layer, TensorError> {
        let layer = &spec.layers[index];
        let name = format!("layers.{index}.");
        let attention = &layer.attention;
        let feed_forward = match &layer.mlp {
            MlpSpec::Dense(mlp) => FeedForward::Dense(self.mlp(&name, mlp)?),
            MlpSpec::Experts(mixture) => {
                let experts = mixture.experts.iter().enumerate();
                FeedForward::Experts(Experts {
                    router: self.linear(&format!("{name}router"), &mixture.router)?,
                    experts: experts
                        .map(|(expert, mlp)| self.mlp(&format!("{name}experts.{expert}."), mlp))
                        .collect::<Result<_, _>>()?,
                    top_k: mixture.top_k,
                    normalised: mixture.normalised,
                })
            }
        };
        Ok(Layer {
            attention: Attention {
                qkv: self.linear(&format!("{name}qkv"), &attention.qkv)?,
                output: self.linear(&format!("{name}output"), &attention.output)?,
                q_norm: self.norm_if(attention.q_norm.as_ref())?,
                k_norm: self.norm_if(attention.k_norm.as_ref())?,
                spec: attention.clone(),
            },
            attention_norms: self.norms(&layer.attention_norms)?,
            feed_forward,
            mlp_norms: self.norms(&layer.mlp_norms)?,
            parallel: layer.parallel,
        })
    }
}
