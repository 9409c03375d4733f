//! Rotary position embedding (Su et al. 2021) in the "rotate half" layout of Hugging Face's Llama weights:
//! element `i` of a head turns together with element `i + head_dim / 2`.

use tch::{Device, Kind, Tensor};
use understudy_kernels::rope::{power, sin_cos};

use crate::config::{LlamaConfig, RopeScaling};
use crate::exact;

/// Cosine and sine of every position, `[max_position_embeddings, head_dim / 2]`.
#[derive(Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

/// Cosine and sine of the rows of one step, `[rows, 1, head_dim / 2]`; computed once and used by every layer.
#[derive(Debug)]
pub struct RopeAngles {
    cos: Tensor,
    sin: Tensor,
    /// Whether our own kernel turns.
    exact: bool,
}

impl Rope {
    /// Tables for positions below `config.max_position_embeddings`.
    ///
    /// Computed with an f32 product and our own cosine: transformers rounds the same product to f32, and a library's cosine may
    /// differ in its last bit from machine to machine (LibTorch's even with the place in the table).
    pub fn new(config: &LlamaConfig, device: Device) -> Self {
        let frequencies = inverse_frequencies(config);
        let positions = config.max_position_embeddings;
        let mut cos = Vec::with_capacity(positions * frequencies.len());
        let mut sin = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            for frequency in &frequencies {
                let (sine, cosine) = sin_cos(position as f32 * frequency);
                cos.push(cosine);
                sin.push(sine);
            }
        }
        let shape = [positions as i64, frequencies.len() as i64];
        let table = |values: &[f32]| Tensor::from_slice(values).view(shape).to_device(device);
        Self {
            cos: table(&cos),
            sin: table(&sin),
        }
    }

    /// The rows' angles; `positions` is `[rows]` i64, each below the table's length; `kind` is the activations'.
    /// `exact` turns by our own kernel; it needs f32 on the CPU.
    pub fn angles(&self, positions: &Tensor, kind: Kind, exact: bool) -> RopeAngles {
        let rows = |table: &Tensor| table.index_select(0, positions).unsqueeze(1).to_kind(kind);
        RopeAngles {
            cos: rows(&self.cos),
            sin: rows(&self.sin),
            exact,
        }
    }
}

impl RopeAngles {
    /// Turns `x`, `[rows, heads, head_dim]`.
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        if self.exact {
            return exact::rotate(x, &self.cos, &self.sin);
        }
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        let first = a * &self.cos - b * &self.sin;
        let second = b * &self.cos + a * &self.sin;
        Tensor::cat(&[first, second], -1)
    }
}

/// Radians per position of each pair, `head_dim / 2` values, rounded as transformers rounds them.
fn inverse_frequencies(config: &LlamaConfig) -> Vec<f32> {
    let dim = config.head_dim;
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            // transformers' power is of f32 numbers.
            1.0 / power(f64::from(config.rope_theta as f32), f64::from(exponent)) as f32
        })
        .map(|frequency| scaled(frequency, &config.rope_scaling))
        .collect()
}

fn scaled(frequency: f32, scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            // Long waves are stretched, short ones kept, those between blended.
            let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
            if wavelength < original_max_position_embeddings / high_freq_factor {
                frequency
            } else if wavelength > original_max_position_embeddings / low_freq_factor {
                (f64::from(frequency) / factor) as f32
            } else {
                let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                let frequency = f64::from(frequency);
                ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_depends_on_the_distance_only() {
        let config = crate::demo::model_config(64);
        let rope = Rope::new(&config, Device::Cpu);
        let dim = config.head_dim;
        let q = Tensor::arange(dim, (Kind::Float, Device::Cpu)).view([1, 1, dim]) / dim as f64;
        let k = q.flip([2]);
        for exact in [false, true] {
            let score = |p: i64, r: i64| {
                let turned = |x: &Tensor, at: i64| {
                    rope.angles(&Tensor::from_slice(&[at]), Kind::Float, exact)
                        .rotate(x)
                };
                (turned(&q, p) * turned(&k, r))
                    .sum(Kind::Double)
                    .double_value(&[])
            };
            assert!((score(0, 0) - score(40, 40)).abs() < 1e-4);
            assert!((score(7, 2) - score(105, 100)).abs() < 1e-4);
            assert!((score(7, 2) - score(9, 2)).abs() > 1e-3);
        }
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
        let rule = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        assert_eq!(scaled(1.0, &rule), 1.0);
        assert_eq!(scaled(1e-5, &rule), 1e-5 / 8.0);
        let between = scaled(2.0 * std::f32::consts::PI / 4096.0, &rule);
        assert!(between < 2.0 * std::f32::consts::PI / 4096.0);
        assert!(between > 2.0 * std::f32::consts::PI / 4096.0 / 8.0);
    }
}
