//! The LibTorch side of the engine: loading a checkpoint and running its model on a device.
//!
//! ```text
//!  checkpoint ──ModelSpec──> model (layers) ──> runner (ModelRunner: blocks of keys and values) ──> understudy-engine-core's server
//! ```
//!
//! Invariant: this is the one crate that links LibTorch. One OS thread owns every tensor.

pub mod demo;
pub mod device;
pub mod gpu;
pub mod layers;
pub mod libtorch;
pub mod load;
pub mod meter;
pub mod model;
pub mod options;
pub mod runner;
