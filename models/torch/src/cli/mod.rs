//! The subcommands.

pub mod bench;
pub mod inspect;
pub mod run;
pub mod serve;

use std::path::PathBuf;

use understudy_engine_core::breakdown::Measured;
use understudy_engine_core::server::ExitStatus;
use understudy_torch::device::DeviceChoice;
use understudy_torch::load::{LoadOptions, ModelError, load};
use understudy_torch::options::{DtypeChoice, KvDtype, KvMemory, Numerics, Quantize};

/// Why a subcommand failed, and the exit code for it.
pub struct Failure {
    pub code: u8,
    pub error: anyhow::Error,
}

impl Failure {
    /// Code 1.
    pub fn other(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: 1,
            error: error.into(),
        }
    }

    /// The code of an engine's exit status.
    pub fn of(status: ExitStatus, error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: status.code(),
            error: error.into(),
        }
    }
}

/// How a model is loaded; the same words as in a cluster's configuration.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// Checkpoint directory (config.json, *.safetensors)
    pub model: PathBuf,
    /// Width in which weights are kept: auto (as stored), f32, bf16, f16
    #[arg(long, default_value = "auto")]
    pub dtype: DtypeChoice,
    /// auto, cpu, cuda:N
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Compute threads; 0 takes as many as the model's size warrants, up to all cores
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Positions per sequence; the model's own limit by default
    #[arg(long)]
    pub context_length: Option<usize>,
    /// exact: bits depend on nothing but the tokens; fast: LibTorch's operators (always so on a GPU)
    #[arg(long, default_value = "exact")]
    pub numerics: Numerics,
    /// Quantize the weights at load: none, int8, int4 (exact numerics only)
    #[arg(long = "quantization", default_value = "none")]
    pub quantize: Quantize,
    /// Width of keys and values: auto (f16 with quantized weights, else f32), f32, f16 (exact numerics only)
    #[arg(long, default_value = "auto")]
    pub kv_dtype: KvDtype,
    /// Memory for keys and values: a fraction of what is free once the weights are loaded (0.5), or an amount (2GiB)
    #[arg(long, default_value = "0.5")]
    pub kv_memory: KvMemory,
}

impl ModelArgs {
    /// Loads the model with room for `max_sequences`.
    pub fn load(&self, max_sequences: usize) -> Result<Box<dyn Measured>, Failure> {
        let options = LoadOptions {
            dtype: self.dtype,
            device: self.device,
            numerics: self.numerics,
            threads: self.threads,
            max_sequences,
            context_length: self.context_length,
            quantize: self.quantize,
            kv_dtype: self.kv_dtype,
            kv_memory: self.kv_memory,
            kv_blocks: None,
            share_weights: true,
        };
        load(&self.model, &options, &mut |_| {})
            .map_err(|error: ModelError| Failure::of(ExitStatus::LoadFailed, error))
    }
}

/// Before anything is computed: that LibTorch is the one that the engine was built for.
pub fn check_libtorch() -> Result<(), Failure> {
    understudy_torch::libtorch::check_loaded()
        .map_err(|error| Failure::of(ExitStatus::LoadFailed, error))
}
