//! The layers that a [`ModelSpec`](understudy_checkpoint::ModelSpec) is made of. Training and serving run this same code; they differ in
//! where the weights come from, in whether stacked weights are joined at load ([`Weights`]), and in the [`Attend`] that they pass.
//!
//! Invariant: every tensor here is "rows first": `[rows, …]`, one row per token, whatever sequence it belongs to.
//! Only [`Attend`] knows which rows belong together.

mod attention;
mod dot_product;
mod embedding;
mod experts;
mod linear;
mod mlp;
mod norm;
mod rope;
mod weights;

pub use attention::{Attend, AttentionRule, Projected, SelfAttention};
pub use dot_product::{Visible, dot_product, mask};
pub use embedding::Embedding;
pub use experts::Experts;
pub use linear::Linear;
pub use mlp::{Mlp, activate};
pub use norm::Norm;
pub use rope::{Angles, Rope};
pub use weights::{GetWeight, Purpose, Weights};
