//! Rotary embedding: theta, the part of a head that turns, and the rule by which frequencies are stretched.
//!
//! Invariant: a rule is understood or refused, never dropped.

use serde_json::Value;
use understudy_kernels::rope::power;

use crate::error::ConfigError;
use crate::keys::Keys;

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
