//! Models on the CPU by kernels of our own: the same bits under any batching, on any machine.
//!
//! ```text
//!  checkpoint ──ModelSpec──> weights (packed, shared) ──> model ──┐
//!                                          scheduler ──Chunk──> runner ──rows──> forward ──> kernels
//! ```
//!
//! No LibTorch, no tensors: parts of a model are slices of packed memory, a step's rows lie in buffers that every step reuses.

mod breakdown;
mod checksum;
pub mod encoder;
pub mod fingerprint;
mod forward;
pub mod load;
mod mapping;
pub mod memory;
mod model;
pub mod options;
mod runner;
pub mod segment;
mod weights;

pub use load::{LoadError, LoadOptions, LoadReport, load};
pub use options::{DtypeChoice, KvMemory, Quantize};
pub use runner::CpuRunner;
