//! Normalisations over the last dimension.

use tch::{Kind, Tensor};
use understudy_checkpoint::TensorError;
use understudy_checkpoint::spec::{NormKind, NormSpec};

use super::Weights;

/// One of [`NormKind`]. Statistics are in f32 for every element type.
#[derive(Debug)]
pub struct Norm {
    kind: NormKind,
    /// `[size]`; as stored.
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
    /// `1 + weight` in f32, where it is made once.
    gain: Option<Tensor>,
}

impl Norm {
    /// Gets the weight and the bias.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load(spec: &NormSpec, weights: &mut Weights<'_>) -> Result<Self, TensorError> {
        let weight = weights.get(&spec.weight, &[spec.size])?;
        let bias = match &spec.bias {
            Some(name) => Some(weights.get(name, &[spec.size])?),
            None => None,
        };
        let fixed = spec.kind == NormKind::RmsPlusOne && !weights.is_training();
        Ok(Self {
            kind: spec.kind,
            gain: fixed.then(|| plus_one(&weight)),
            weight,
            bias,
            eps: f64::from(spec.eps),
        })
    }

    /// The norm, if there is one.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load_if(
        spec: Option<&NormSpec>,
        weights: &mut Weights<'_>,
    ) -> Result<Option<Self>, TensorError> {
        spec.map(|spec| Self::load(spec, weights)).transpose()
    }

    /// `[…, size] -> […, size]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let size = self.weight.size();
        match self.kind {
            NormKind::Rms => x.rms_norm(&size[..], Some(&self.weight), self.eps),
            NormKind::RmsPlusOne => {
                let made = self.gain.is_none().then(|| plus_one(&self.weight));
                let gain = self.gain.as_ref().or(made.as_ref());
                // The gain is rounded with the result only: 1 + weight has few digits left in a narrow type.
                x.to_kind(Kind::Float)
                    .rms_norm(&size[..], gain, self.eps)
                    .to_kind(x.kind())
            }
            NormKind::Layer => x.layer_norm(
                &size[..],
                Some(&self.weight),
                self.bias.as_ref(),
                self.eps,
                false,
            ),
        }
    }
}

fn plus_one(weight: &Tensor) -> Tensor {
    weight.to_kind(Kind::Float) + 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::Purpose;

    fn normed(kind: NormKind, purpose: Purpose, bias: bool) -> Vec<f32> {
        let spec = NormSpec {
            kind,
            weight: "w".to_owned(),
            bias: bias.then(|| "b".to_owned()),
            size: 2,
            eps: 0.0,
        };
        let mut get = |name: &str, _: &[i64]| {
            Ok(match name {
                "w" => Tensor::from_slice(&[2.0_f32, 3.0]),
                _ => Tensor::from_slice(&[0.5_f32, 0.25]),
            })
        };
        let norm = Norm::load(&spec, &mut Weights::new(&mut get, purpose)).unwrap();
        let x = Tensor::from_slice(&[1.0_f32, 7.0]).view([1, 2]);
        Vec::try_from(norm.forward(&x).view(-1)).unwrap()
    }

    #[test]
    fn every_kind_is_its_formula() {
        let close = |a: &[f32], b: [f32; 2]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        for purpose in [Purpose::Serving, Purpose::Training] {
            // The mean of 1 and 49 is 25.
            assert!(close(&normed(NormKind::Rms, purpose, false), [0.4, 4.2]));
            assert!(close(
                &normed(NormKind::RmsPlusOne, purpose, false),
                [0.6, 5.6]
            ));
            assert!(close(&normed(NormKind::Layer, purpose, true), [-1.5, 3.25]));
        }
    }
}
