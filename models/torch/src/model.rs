//! A model as LibTorch's operators compute it, built from its description.
//!
//! ```text
//! x = embedding(id, position)
//! each layer:  x = residual(x, attention)    x = residual(x, mlp)
//!     residual(x, f) = sum_norm( x + output_norm( f( input_norm(x) ) ) )        every norm may be absent
//!     parallel: x + attention(input_norm(x)) + mlp(mlp's input_norm(x))
//! hidden = final_norm(x);  logits = soft_cap( head(hidden) )
//! ```
//!
//! Invariant: weight names and layouts are the checkpoint's, so that what training writes loads elsewhere. The model keeps no state
//! between calls; keys and values live behind [`Attend`].

use tch::{Device, Kind, Tensor};
use understudy_checkpoint::TensorError;
use understudy_checkpoint::spec::{
    Activation, LayerSpec, MlpSpec, ModelSpec, OutputSpec, ResidualNorms,
};

use crate::layers::{
    Angles, Embedding, Experts, GetWeight, Linear, Mlp, Norm, Purpose, Rope, SelfAttention,
    Weights, activate,
};
pub use crate::layers::{Attend, AttentionRule};
use crate::meter::{Meter, Part};

/// The whole model.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    embedding: Embedding,
    layers: Vec<Layer>,
    ropes: Vec<Rope>,
    final_norm: Option<Norm>,
    output: Output,
}

#[derive(Debug)]
struct Layer {
    attention: SelfAttention,
    attention_norms: Norms,
    mlp: FeedForward,
    mlp_norms: Norms,
    parallel: bool,
}

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Experts(Experts),
}

/// The norms around one branch.
#[derive(Debug)]
struct Norms {
    input: Option<Norm>,
    output: Option<Norm>,
    sum: Option<Norm>,
}

#[derive(Debug)]
enum Output {
    Logits {
        /// `None`: the embedding's matrix.
        head: Option<Linear>,
        soft_cap: Option<f64>,
    },
    Hidden {
        pooler: Option<(Linear, Activation)>,
        classifier: Option<Linear>,
    },
}

/// What the layers of one step share.
struct Step<'a> {
    angles: Vec<Angles>,
    attention: &'a mut dyn Attend,
    meter: &'a Meter,
}

impl Model {
    /// Builds the model from what `get(name, expected shape)` returns. Serving reads safetensors there, training
    /// makes parameters. The weights' device and element type are the model's.
    ///
    /// # Errors
    /// [`TensorError`] of the first weight that cannot be had.
    pub fn load(
        spec: ModelSpec,
        purpose: Purpose,
        get: &mut GetWeight<'_>,
    ) -> Result<Self, TensorError> {
        let weights = &mut Weights::new(get, purpose);
        let embedding = Embedding::load(&spec, weights)?;
        let layers = spec.layers.iter().map(|layer| Layer::load(layer, weights));
        let layers = layers.collect::<Result<_, _>>()?;
        let final_norm = Norm::load_if(spec.final_norm.as_ref(), weights)?;
        let output = Output::load(&spec.output, weights)?;
        let device = embedding.device();
        let ropes = spec.ropes.iter();
        let ropes = ropes.map(|rope| Rope::new(rope, spec.context_length, device));
        Ok(Self {
            ropes: ropes.collect(),
            spec,
            embedding,
            layers,
            final_norm,
            output,
        })
    }

    /// What the model was built from.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Where the weights lie; inputs must be there.
    pub fn device(&self) -> Device {
        self.embedding.device()
    }

    /// Element type of the activations.
    pub fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    /// `ids` and `positions` are `[rows]` i64 (id below the vocabulary's size, position below the context's length);
    /// returns `[rows, hidden]`, after the final norm. Rows may belong to any mixture of sequences.
    pub fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attend,
        meter: &Meter,
    ) -> Tensor {
        let mut x = meter.time(Part::Embedding, || self.embedding.forward(ids, positions));
        let ropes = self.ropes.iter();
        let mut step = Step {
            angles: ropes.map(|rope| rope.angles(positions, x.kind())).collect(),
            attention,
            meter,
        };
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(index, x, &mut step);
        }
        normed(meter, self.final_norm.as_ref(), x)
    }

    /// `[n, hidden] -> [n, vocab]` in f32. Callers pass only the rows whose next token they want.
    ///
    /// # Panics
    /// If the model is an encoder.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let Output::Logits { head, soft_cap } = &self.output else {
            panic!("{} has no logits", self.spec.architecture);
        };
        let logits = match head {
            Some(head) => head.forward(hidden),
            None => self.embedding.as_head(hidden),
        };
        let logits = logits.to_kind(Kind::Float);
        match soft_cap {
            Some(cap) => (logits / *cap).tanh() * *cap,
            None => logits,
        }
    }

    /// An encoder's pooled rows, `[n, hidden]` of first tokens `-> [n, hidden]`; `None` if it has no pooler.
    pub fn pooled(&self, first: &Tensor) -> Option<Tensor> {
        match &self.output {
            Output::Hidden {
                pooler: Some((map, activation)),
                ..
            } => Some(activate(*activation, &map.forward(first))),
            _ => None,
        }
    }

    /// An encoder's scores, `[n, hidden]` of first tokens `-> [n, labels]` in f32; `None` if it has no classifier.
    pub fn scores(&self, first: &Tensor) -> Option<Tensor> {
        let Output::Hidden {
            classifier: Some(classifier),
            ..
        } = &self.output
        else {
            return None;
        };
        let pooled = self.pooled(first);
        let rows = pooled.as_ref().unwrap_or(first);
        Some(classifier.forward(rows).to_kind(Kind::Float))
    }
}

impl Layer {
    fn load(spec: &LayerSpec, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        let attention_norms = Norms::load(&spec.attention_norms, weights)?;
        let attention = SelfAttention::load(&spec.attention, weights)?;
        let mlp_norms = Norms::load(&spec.mlp_norms, weights)?;
        let mlp = match &spec.mlp {
            MlpSpec::Dense(mlp) => FeedForward::Dense(Mlp::load(mlp, weights)?),
            MlpSpec::Experts(experts) => FeedForward::Experts(Experts::load(experts, weights)?),
        };
        Ok(Self {
            attention,
            attention_norms,
            mlp,
            mlp_norms,
            parallel: spec.parallel,
        })
    }

    fn forward(&self, index: usize, x: Tensor, step: &mut Step<'_>) -> Tensor {
        let meter = step.meter;
        if self.parallel {
            let attended = self.attend(index, &x, step);
            return x.shallow_clone() + attended + self.feed(&x, meter);
        }
        let x = &x + self.attend(index, &x, step);
        let x = normed(meter, self.attention_norms.sum.as_ref(), x);
        let x = &x + self.feed(&x, meter);
        normed(meter, self.mlp_norms.sum.as_ref(), x)
    }

    /// The attention's branch, up to the sum.
    fn attend(&self, index: usize, x: &Tensor, step: &mut Step<'_>) -> Tensor {
        let (meter, norms) = (step.meter, &self.attention_norms);
        let read = normed(meter, norms.input.as_ref(), x.shallow_clone());
        let projected = meter.time(Part::Matmul, || self.attention.project(&read, &step.angles));
        let attended = meter.time(Part::Attention, || {
            let (q, k, v) = (&projected.q, &projected.k, &projected.v);
            let rule = self.attention.rule();
            step.attention.attend(index, rule, q, k, v)
        });
        let out = meter.time(Part::Matmul, || self.attention.output(&attended));
        normed(meter, norms.output.as_ref(), out)
    }

    /// The feed-forward branch, up to the sum.
    fn feed(&self, x: &Tensor, meter: &Meter) -> Tensor {
        let read = normed(meter, self.mlp_norms.input.as_ref(), x.shallow_clone());
        let out = meter.time(Part::Matmul, || match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(&read),
            FeedForward::Experts(experts) => experts.forward(&read),
        });
        normed(meter, self.mlp_norms.output.as_ref(), out)
    }
}

impl Norms {
    fn load(spec: &ResidualNorms, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        Ok(Self {
            input: Norm::load_if(spec.input.as_ref(), weights)?,
            output: Norm::load_if(spec.output.as_ref(), weights)?,
            sum: Norm::load_if(spec.sum.as_ref(), weights)?,
        })
    }
}

impl Output {
    fn load(spec: &OutputSpec, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        Ok(match spec {
            OutputSpec::Logits { head, soft_cap } => Self::Logits {
                head: match head {
                    Some(head) => Some(Linear::load(head, weights)?),
                    None => None,
                },
                soft_cap: soft_cap.map(f64::from),
            },
            OutputSpec::Hidden { pooler, classifier } => Self::Hidden {
                pooler: match pooler {
                    Some((map, activation)) => Some((Linear::load(map, weights)?, *activation)),
                    None => None,
                },
                classifier: match classifier {
                    Some(map) => Some(Linear::load(map, weights)?),
                    None => None,
                },
            },
        })
    }
}

fn normed(meter: &Meter, norm: Option<&Norm>, x: Tensor) -> Tensor {
    match norm {
        Some(norm) => meter.time(Part::Norms, || norm.forward(&x)),
        None => x,
    }
}

#[cfg(test)]
mod tests {
    use understudy_checkpoint::families;

    use super::*;

    fn spec() -> ModelSpec {
        families::from_json(&crate::demo::config_json(300)).unwrap()
    }

    fn zeros(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let error = Model::load(spec(), Purpose::Serving, &mut |name, shape| {
            if name == "model.layers.1.mlp.up_proj.weight" {
                return Err(TensorError::Missing(name.to_owned()));
            }
            Ok(zeros(shape))
        })
        .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("model.layers.1.mlp.up_proj.weight"));
    }

    #[test]
    fn a_wrong_shape_is_named_with_both_shapes() {
        let error = Model::load(spec(), Purpose::Serving, &mut |name, shape| {
            Ok(match name {
                "model.norm.weight" => zeros(&[7]),
                _ => zeros(shape),
            })
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("model.norm.weight") && error.contains("[7]"),
            "{error}"
        );
    }

    /// What is asked for is what the description lists, no more and no less.
    #[test]
    fn every_tensor_of_the_description_is_asked_for() {
        let mut names = Vec::new();
        Model::load(spec(), Purpose::Serving, &mut |name, shape| {
            names.push(name.to_owned());
            Ok(zeros(shape))
        })
        .unwrap();
        names.sort();
        let described: Vec<String> = spec().tensors().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, described);
    }
}
