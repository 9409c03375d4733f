//! The LibTorch side of the engine: loading a checkpoint and running its model on a device.
//!
//! ```text
//!  checkpoint ──tensors──> llama (layers) ──> runner (ModelRunner: slots, KV cache) ──> understudy-engine-core's server
//! ```
//!
//! Invariant: this is the one crate that links LibTorch. One OS thread owns every tensor.

pub mod checkpoint;
pub mod config;
pub mod demo;
pub mod device;
pub mod exact;
pub mod fingerprint;
pub mod gpu;
pub mod layers;
pub mod libtorch;
pub mod llama;
pub mod load;
pub mod runner;
pub mod tensor_error;
