//! Muon for the matrices inside the blocks, AdamW for everything else.
//!
//! Muon (Jordan et al. 2024) applies the nearest semi-orthogonal matrix to the momentum of the gradient, found by
//! five Newton–Schulz steps; on models of this size it needs about half of AdamW's tokens. AdamW is Loshchilov &
//! Hutter 2019, with decoupled decay.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

/// Peak learning rates and the constants of both rules.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    pub muon: f64,
    pub adam: f64,
    pub weight_decay: f64,
    /// Largest norm of the whole gradient.
    pub clip: f64,
}

const MOMENTUM: f64 = 0.95;
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.98;
const EPSILON: f64 = 1e-10;

/// The constants of both rules, for a run's description.
pub fn constants() -> String {
    format!("muon {MOMENTUM:?}, adamw {BETA1:?} {BETA2:?} {EPSILON:?}")
}

#[derive(Debug)]
enum Moments {
    Muon { momentum: Tensor },
    Adam { first: Tensor, second: Tensor },
}

#[derive(Debug)]
struct Parameter {
    name: String,
    value: Tensor,
    moments: Moments,
}

/// Parameters with their moments.
#[derive(Debug)]
pub struct Optimizer {
    parameters: Vec<Parameter>,
    rates: Rates,
    steps: i32,
}

impl Optimizer {
    /// `parameters` are leaves that require gradients.
    pub fn new(parameters: Vec<(String, Tensor)>, rates: Rates) -> Self {
        let parameters = parameters
            .into_iter()
            .map(|(name, value)| {
                let zeros = || value.detach().zeros_like();
                let inside = name.contains(".layers.") && value.dim() == 2;
                let moments = match inside {
                    true => Moments::Muon { momentum: zeros() },
                    false => Moments::Adam {
                        first: zeros(),
                        second: zeros(),
                    },
                };
                Parameter {
                    name,
                    value,
                    moments,
                }
            })
            .collect();
        Self {
            parameters,
            rates,
            steps: 0,
        }
    }

    /// The parameters by name.
    pub fn values(&self) -> Vec<(String, &Tensor)> {
        self.parameters
            .iter()
            .map(|p| (p.name.clone(), &p.value))
            .collect()
    }

    /// Updates so far; a step with a gradient that is not finite is none.
    pub fn updates(&self) -> i32 {
        self.steps
    }

    /// Parameters and moments by name, to be stored; [`Optimizer::restore`] takes them back.
    pub fn state(&self) -> Vec<(String, &Tensor)> {
        let mut state = self.values();
        for parameter in &self.parameters {
            let name = |kind: &str| format!("{kind}/{}", parameter.name);
            match &parameter.moments {
                Moments::Muon { momentum } => state.push((name("momentum"), momentum)),
                Moments::Adam { first, second } => {
                    state.push((name("first"), first));
                    state.push((name("second"), second));
                }
            }
        }
        state
    }

    /// Goes on from a stored state after `steps` steps; fails with the name of a tensor that is absent or differs
    /// in shape.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>, steps: i32) -> Result<(), String> {
        let copy = |name: String, into: &mut Tensor| match state.get(&name) {
            Some(tensor) if tensor.size() == into.size() => {
                tch::no_grad(|| into.copy_(tensor));
                Ok(())
            }
            _ => Err(name),
        };
        for parameter in &mut self.parameters {
            let name = &parameter.name;
            copy(name.clone(), &mut parameter.value)?;
            match &mut parameter.moments {
                Moments::Muon { momentum } => copy(format!("momentum/{name}"), momentum)?,
                Moments::Adam { first, second } => {
                    copy(format!("first/{name}"), first)?;
                    copy(format!("second/{name}"), second)?;
                }
            }
        }
        self.steps = steps;
        Ok(())
    }

    /// One update from the gradients that stand on the parameters, which are cleared; `scale` multiplies the peak
    /// rates. Returns the gradient's norm before clipping.
    pub fn step(&mut self, scale: f64) -> f64 {
        tch::no_grad(|| {
            let norm = self.gradient_norm();
            // A step whose loss overflowed teaches nothing.
            if norm.is_finite() {
                self.steps += 1;
                let shrink = (self.rates.clip / (norm + 1e-6)).min(1.0);
                for parameter in &mut self.parameters {
                    parameter.update(self.rates, self.steps, scale, shrink);
                }
            }
            for parameter in &mut self.parameters {
                parameter.value.zero_grad();
            }
            norm
        })
    }

    fn gradient_norm(&self) -> f64 {
        let squares: f64 = self
            .parameters
            .iter()
            .map(|p| p.value.grad().square().sum(Kind::Double).double_value(&[]))
            .sum();
        squares.sqrt()
    }
}

impl Parameter {
    fn update(&mut self, rates: Rates, steps: i32, scale: f64, shrink: f64) {
        let gradient = self.value.grad() * shrink;
        match &mut self.moments {
            Moments::Muon { momentum } => {
                let rate = rates.muon * scale;
                let _ = momentum.g_mul_scalar_(MOMENTUM);
                *momentum += &gradient;
                let ahead = gradient + &*momentum * MOMENTUM;
                let size = self.value.size();
                let tall = (size[0] as f64 / size[1] as f64).max(1.0).sqrt();
                let _ = self.value.g_mul_scalar_(1.0 - rate * rates.weight_decay);
                self.value -= orthogonalized(&ahead) * (rate * tall);
            }
            Moments::Adam { first, second } => {
                let rate = rates.adam * scale;
                let _ = first.lerp_(&gradient, 1.0 - BETA1);
                let _ = second.lerp_(&gradient.square(), 1.0 - BETA2);
                let corrected = second.divide_scalar(1.0 - BETA2.powi(steps)).sqrt() + EPSILON;
                let update = &*first / (1.0 - BETA1.powi(steps)) / corrected;
                // Norm gains and other vectors are not decayed.
                if size_is_matrix(&self.value) {
                    let _ = self.value.g_mul_scalar_(1.0 - rate * rates.weight_decay);
                }
                self.value -= update * rate;
            }
        }
    }
}

fn size_is_matrix(tensor: &Tensor) -> bool {
    tensor.dim() == 2
}

/// About the nearest matrix with singular values near 1, by the quintic Newton–Schulz iteration.
fn orthogonalized(matrix: &Tensor) -> Tensor {
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let size = matrix.size();
    let tall = size[0] > size[1];
    let mut x = if tall {
        matrix.tr()
    } else {
        matrix.shallow_clone()
    };
    x = &x / (x.norm() + 1e-7);
    for _ in 0..5 {
        let square = x.mm(&x.tr());
        let polynomial = &square * B + square.mm(&square) * C;
        x = &x * A + polynomial.mm(&x);
    }
    if tall { x.tr() } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn orthogonalized_has_singular_values_near_one() {
        let _turn = crate::demo::random_numbers();
        tch::manual_seed(1);
        for shape in [[8, 24], [24, 8]] {
            let x = orthogonalized(&Tensor::randn(shape, (Kind::Float, Device::Cpu)));
            let x = if shape[0] > shape[1] { x.tr() } else { x };
            let gram = x.mm(&x.tr());
            let diagonal: Vec<f64> =
                Vec::try_from(gram.diagonal(0, 0, 1).to_kind(Kind::Double)).unwrap();
            assert!(
                diagonal.iter().all(|d| (0.3..1.7).contains(d)),
                "{diagonal:?}"
            );
        }
    }

    #[test]
    fn both_rules_descend() {
        let make = || Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let rates = Rates {
            muon: 0.05,
            adam: 0.05,
            weight_decay: 0.0,
            clip: 1.0,
        };
        let named = vec![("a.layers.0".to_owned(), make()), ("b".to_owned(), make())];
        let mut optimizer = Optimizer::new(named, rates);
        let loss = |optimizer: &Optimizer| {
            let values = optimizer.values();
            (values[0].1.square() + values[1].1.square()).sum(Kind::Float)
        };
        let before = loss(&optimizer).double_value(&[]);
        for _ in 0..20 {
            loss(&optimizer).backward();
            optimizer.step(1.0);
        }
        assert!(loss(&optimizer).double_value(&[]) < before / 2.0);
    }
}
