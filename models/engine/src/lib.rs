//! Everything of the engine that needs no LibTorch.
//!
//! ```text
//!  node ──frames──> server ──commands──> scheduler ──chunks──> ModelRunner (fake, or LibTorch's)
//!       <─events──         <──tokens────  sampler  <──logits──
//! ```
//!
//! The engine side works on token ids only ([`frame`], [`codec`], [`sequence`], [`blocks`], [`scheduler`], [`sampler`], [`server`]).
//! The text side ([`model_dir`], [`tokenizer`], [`chat`], [`detokenizer`], [`stop`]) runs in the gateway, folded over the
//! committed token ids.
//!
//! Invariant: an output token is a pure function of (model, prompt, output before it, sampling parameters). Nothing here
//! depends on time, threads, blocks, neighbours or how a prompt was cut into chunks.

pub mod args;
pub mod blocks;
pub mod breakdown;
pub mod chat;
pub mod codec;
pub mod detokenizer;
pub mod fake;
pub mod frame;
pub mod kv_frame;
pub mod mask;
pub mod model_dir;
pub mod penalties;
pub mod replay;
pub mod rng;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod server;
pub mod softmax;
pub mod speculate;
pub mod stop;
#[cfg(test)]
mod testing;
pub mod text;
pub mod tokenizer;
