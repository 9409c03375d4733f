//! Why a tensor of a checkpoint cannot become a part of the model.

/// Why one tensor cannot be used, or why one that is there must not be left out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error(
        "the checkpoint lacks the tensor \"{0}\"; its files are incomplete or of another model"
    )]
    Missing(String),
    #[error(
        "tensor \"{0}\" is quantized in this checkpoint (GPTQ, AWQ or a relative), which this engine does not support; use the f32, bf16 or f16 weights"
    )]
    Quantized(String),
    #[error("tensor \"{name}\" has shape {found:?}, but config.json implies {expected:?}")]
    Shape {
        name: String,
        expected: Vec<i64>,
        found: Vec<i64>,
    },
    #[error("tensor \"{name}\" is stored as {dtype}; supported: F32, BF16, F16")]
    Dtype { name: String, dtype: String },
    /// Left out, it would make another model than the one that was trained.
    #[error(
        "the checkpoint holds the tensor \"{name}\", which the model of its config.json does not use: {reason}"
    )]
    Unused { name: String, reason: String },
}
