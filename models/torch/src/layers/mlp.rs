//! The feed-forward part of a layer.

use tch::Tensor;
use understudy_checkpoint::TensorError;
use understudy_checkpoint::spec::{Activation, DenseMlp};

use super::{Linear, Weights};

/// `down(act(gate(x)) · up(x))` (Shazeer 2020), or `down(act(up(x)))`.
#[derive(Debug)]
pub struct Mlp {
    activation: Activation,
    /// The gate, if there is one, and `up`, in one map.
    up: Linear,
    down: Linear,
    /// Outputs of the gate; `None` if there is none.
    gate: Option<i64>,
}

impl Mlp {
    /// Gets the maps.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load(spec: &DenseMlp, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        Ok(Self {
            activation: spec.activation,
            up: Linear::load(&spec.up, weights)?,
            down: Linear::load(&spec.down, weights)?,
            gate: spec.gated.then_some(spec.down.inputs as i64),
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let inner = self.up.forward(x);
        let inner = match self.gate {
            Some(width) => {
                activate(self.activation, &inner.narrow(-1, 0, width))
                    * inner.narrow(-1, width, width)
            }
            None => activate(self.activation, &inner),
        };
        self.down.forward(&inner)
    }
}

/// An activation function, element by element.
pub fn activate(activation: Activation, x: &Tensor) -> Tensor {
    match activation {
        Activation::Silu => x.silu(),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::GeluErf => x.gelu("none"),
        Activation::Relu => x.relu(),
        Activation::Tanh => x.tanh(),
    }
}
