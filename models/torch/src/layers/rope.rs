//! Rotary position embedding (Su et al. 2021) in the "rotate half" layout of Hugging Face's weights: element `i` of the turning part of a
//! head turns together with element `i + rotary_dim / 2`.

use tch::{Device, Kind, Tensor};
use understudy_checkpoint::rope::RopeSpec;

/// Cosine and sine of every position, `[context, rotary_dim]`: each value stands twice, so that a head turns by two products.
#[derive(Debug)]
pub struct Rope {
    cos: Tensor,
    /// The first half is negative.
    sin: Tensor,
}

/// Cosine and sine of the rows of one step, `[rows, 1, rotary_dim]`; computed once and used by every layer.
#[derive(Debug)]
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Tables for positions below `context_length`.
    pub fn new(spec: &RopeSpec, context_length: usize, device: Device) -> Self {
        let (cos, sin) = spec.table(context_length);
        let table = |values: &[f32]| {
            let half = Tensor::from_slice(values).view([context_length as i64, -1]);
            half.to_device(device)
        };
        let (cos, sin) = (table(&cos), table(&sin));
        Self {
            cos: Tensor::cat(&[&cos, &cos], 1),
            sin: Tensor::cat(&[&sin.neg(), &sin], 1),
        }
    }

    /// The rows' angles; `positions` is `[rows]` i64, each below the table's length; `kind` is the activations'.
    pub fn angles(&self, positions: &Tensor, kind: Kind) -> Angles {
        let rows = |table: &Tensor| table.index_select(0, positions).unsqueeze(1).to_kind(kind);
        Angles {
            cos: rows(&self.cos),
            sin: rows(&self.sin),
        }
    }
}

impl Angles {
    /// Turns `x`, `[rows, heads, head_dim]`; elements beyond the turning part stay.
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        let (whole, turning) = (x.size()[2], self.cos.size()[2]);
        if turning == whole {
            return self.turn(x);
        }
        let still = x.narrow(2, turning, whole - turning);
        Tensor::cat(&[self.turn(&x.narrow(2, 0, turning)), still], 2)
    }

    fn turn(&self, x: &Tensor) -> Tensor {
        let half = x.size()[2] / 2;
        let other = x.roll([half], [2]);
        (x * &self.cos).addcmul(&other, &self.sin)
    }
}
