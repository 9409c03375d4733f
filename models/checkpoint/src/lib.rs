//! A checkpoint on disk: its tensors ([`reader`]), and what the model computes with them ([`spec`], [`families`]).
//!
//! Nothing here computes, and nothing here knows LibTorch: executors take a [`spec::ModelSpec`] and a [`reader::Checkpoint`].

pub mod error;
pub mod families;
#[cfg(feature = "hub")]
pub mod hub;
pub mod keys;
mod names;
pub mod reader;
pub mod rope;
pub mod spec;
pub mod tensor_error;
pub mod unused;

pub use error::ConfigError;
pub use reader::{Checkpoint, CheckpointError, LinearReader, StoredTensor, StoredType};
pub use spec::ModelSpec;
pub use tensor_error::TensorError;
pub use unused::{check_all_used, check_tensors};
