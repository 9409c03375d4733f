//! Rotary embedding: theta, the part of a head that turns, and the rule by which frequencies are stretched.
//!
//! Invariant: a rule is understood or refused, never dropped ([`config`] reads it). Tables are the same bits on every machine: every operation
//! is one that machines round alike, in the order and the width in which transformers rounds them.

mod config;

pub use config::{RopeKeys, read, read_rule};

use understudy_kernels::rope::{power, sin_cos};

/// One rotary embedding. Element `i` of the turning part turns with element `i + rotary_dim / 2`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    /// Elements of a head that turn, the first ones; even.
    pub rotary_dim: usize,
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for contexts longer than those of pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// Every frequency divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1's piecewise rule (transformers' `rope_type = "llama3"`).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al. 2023): long waves are interpolated, short ones kept, those between blended.
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_max_position_embeddings: f64,
        /// Sines and cosines are multiplied by it.
        attention_factor: f64,
        /// Whether the bounds of the blend are rounded outwards.
        truncate: bool,
    },
    /// LongRoPE (Phi-3): each frequency divided by its own factor.
    PerFrequency {
        factors: Vec<f64>,
        /// Sines and cosines are multiplied by it.
        attention_factor: f64,
    },
}

impl RopeSpec {
    /// Cosines and sines of the positions `0 .. positions`, each `[positions, rotary_dim / 2]`, times the rule's attention factor.
    #[must_use]
    pub fn table(&self, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let frequencies = self.inverse_frequencies();
        let scale = self.attention_factor() as f32;
        let mut cos = Vec::with_capacity(positions * frequencies.len());
        let mut sin = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            for frequency in &frequencies {
                // transformers rounds the same product to f32 before it takes the cosine.
                let (sine, cosine) = sin_cos(position as f32 * frequency);
                cos.push(cosine * scale);
                sin.push(sine * scale);
            }
        }
        (cos, sin)
    }

    /// What sines and cosines are multiplied by.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::PerFrequency {
                attention_factor, ..
            } => *attention_factor,
            _ => 1.0,
        }
    }

    /// Radians per position of each pair, `rotary_dim / 2` values.
    #[must_use]
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let waves = self.waves();
        match &self.scaling {
            RopeScaling::None => waves.iter().map(|wave| 1.0 / wave).collect(),
            RopeScaling::Linear { factor } => {
                let factor = *factor as f32;
                waves.iter().map(|wave| 1.0 / wave / factor).collect()
            }
            RopeScaling::PerFrequency { factors, .. } => {
                let factored = |(wave, factor): (&f32, &f64)| 1.0 / (*factor as f32 * wave);
                waves.iter().zip(factors).map(factored).collect()
            }
            RopeScaling::Llama3 { .. } => waves.iter().map(|w| self.llama3(1.0 / w)).collect(),
            RopeScaling::Yarn { .. } => self.yarn(&waves),
        }
    }

    /// `theta^(2 i / rotary_dim)`; transformers' power is of f32 numbers.
    fn waves(&self) -> Vec<f32> {
        let dim = self.rotary_dim;
        let base = f64::from(self.theta as f32);
        (0..dim / 2)
            .map(|i| power(base, f64::from((2 * i) as f32 / dim as f32)) as f32)
            .collect()
    }

    /// Long waves are stretched, short ones kept, those between blended.
    fn llama3(&self, frequency: f32) -> f32 {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        } = self.scaling
        else {
            return frequency;
        };
        // In f32, and a number divided by a tensor is the reciprocal times the number there.
        let wavelength = 1.0 / frequency * std::f32::consts::TAU;
        if wavelength < (original / high_freq_factor) as f32 {
            return frequency;
        }
        let factor = factor as f32;
        if wavelength > (original / low_freq_factor) as f32 {
            return frequency / factor;
        }
        let turns = 1.0 / wavelength * original as f32;
        let smooth = (turns - low_freq_factor as f32) / (high_freq_factor - low_freq_factor) as f32;
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }

    fn yarn(&self, waves: &[f32]) -> Vec<f32> {
        let RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings: original,
            truncate,
            ..
        } = self.scaling
        else {
            return Vec::new();
        };
        let dim = self.rotary_dim as f64;
        // The pair that makes so many turns within the original context.
        let pair_of = |turns: f64| {
            dim * ln(original / (turns * std::f64::consts::TAU)) / (2.0 * ln(self.theta))
        };
        let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        low = low.max(0.0);
        high = high.min(dim - 1.0);
        if low == high {
            high += 0.001;
        }
        let blend = |(i, wave): (usize, &f32)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            1.0 / (factor as f32 * wave) * (1.0 - kept) + 1.0 / wave * kept
        };
        waves.iter().enumerate().map(blend).collect()
    }
}

/// The natural logarithm of a positive, finite number: the kernels' power, inverted by Newton's rule from the library's logarithm, so that
/// a library that rounds differently does not change a table.
pub(crate) fn ln(x: f64) -> f64 {
    // Two steps: whatever the last bits of the start are, they are gone.
    (0..2).fold(x.ln(), |y, _| {
        y + (x * power(std::f64::consts::E, -y) - 1.0)
    })
}
