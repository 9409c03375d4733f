//! The layers of a Llama decoder. Training and serving run this same code; they differ in where the weights come
//! from (the `get` of [`crate::llama::Llama::load`]) and in the [`Attention`] that they pass.
//!
//! Invariant: every tensor here is "rows first": `[rows, …]`, one row per token, whatever sequence it belongs to.
//! Only [`Attention`] knows which rows belong together.

mod attention;
mod embedding;
mod linear;
mod mlp;
mod rms_norm;
mod rope;

pub use attention::{Attention, SelfAttention};
pub use embedding::Embedding;
pub use linear::Linear;
pub use mlp::Mlp;
pub use rms_norm::RmsNorm;
pub use rope::{Rope, RopeAngles};

use tch::Tensor;

use crate::tensor_error::TensorError;

/// Where a layer asks for its weights: `(full Hugging Face name, expected shape) -> tensor of that shape`.
pub type GetWeight<'a> = dyn FnMut(&str, &[i64]) -> Result<Tensor, TensorError> + 'a;
