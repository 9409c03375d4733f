//! From a checkpoint directory to a runner.

mod cache_size;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use understudy_engine_core::model_dir::{ModelDir, ModelDirError};
use understudy_engine_core::runner::{ModelInfo, panic_text};
use understudy_engine_core::tokenizer::{TextTokenizer, TokenizerError};
use understudy_kernels::Pool;

use crate::checkpoint::{Checkpoint, CheckpointError, StoredTensor, StoredType};
use crate::config::{ConfigError, LlamaConfig};
use crate::device::{DeviceChoice, DeviceError, device_name};
use crate::fingerprint::{Arithmetic, fingerprint};
use crate::gpu;
use crate::libtorch::{self, WrongLibTorch};
use crate::llama::Llama;
use crate::runner::{LlamaRunner, Numerics};
use crate::tensor_error::{TensorError, check_all_used};
use cache_size::CacheSize;

/// In which width weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeChoice {
    /// As the checkpoint stores them.
    Auto,
    F32,
    Bf16,
    F16,
}

impl FromStr for DtypeChoice {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            _ => Err(ModelError::Option(format!(
                "dtype {text:?} is not known; allowed: auto, f32, bf16, f16"
            ))),
        }
    }
}

/// What a caller may choose about a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    pub dtype: DtypeChoice,
    pub device: DeviceChoice,
    /// On the CPU; a GPU always computes with LibTorch's operators.
    pub numerics: Numerics,
    /// Compute threads; 0 takes as many as the model's size warrants, up to all cores.
    pub threads: usize,
    /// Slots.
    pub max_sequences: usize,
    /// Positions per slot; `None` takes the model's `max_position_embeddings`.
    pub context_length: Option<usize>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: DtypeChoice::Auto,
            device: DeviceChoice::Cpu,
            numerics: Numerics::Exact,
            threads: 0,
            max_sequences: 16,
            context_length: None,
        }
    }
}

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{path}: {source}")]
    Config { path: PathBuf, source: ConfigError },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("{directory}: {source}")]
    Weights {
        directory: PathBuf,
        source: TensorError,
    },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    WrongLibTorch(#[from] WrongLibTorch),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(
        "{path} has ids up to {highest}, but vocab_size in config.json is {vocab_size}; are they of one checkpoint?"
    )]
    ForeignTokenizer {
        path: PathBuf,
        highest: usize,
        vocab_size: usize,
    },
    #[error("{0}")]
    Option(String),
    #[error(transparent)]
    Directory(#[from] ModelDirError),
    #[error(
        "the KV cache of {slots} sequences of {context_length} positions takes {} MiB, and {available}; lower max_sequences or context_length",
        .needed_bytes >> 20
    )]
    CacheTooLarge {
        slots: usize,
        context_length: usize,
        needed_bytes: u64,
        /// What the device has.
        available: String,
    },
    #[error("LibTorch failed while the model was loaded: {0}")]
    LibTorch(String),
}

/// Loads the model in `directory`; `progress` hears of 0.0 ..= 1.0.
///
/// # Errors
/// [`ModelError`], in words for whoever configured the model.
pub fn load(
    directory: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(f32),
) -> Result<LlamaRunner, ModelError> {
    libtorch::check_loaded()?;
    let checkpoint = Checkpoint::open(directory)?;
    let mut config = read_config(directory)?;
    let described = ModelDir::open(directory)?;
    let device = options.device.resolve()?;
    let exact = device == Device::Cpu && options.numerics == Numerics::Exact;
    // The rotary table need not be longer than the slots.
    config.max_position_embeddings = context_length(&config, options)?;
    let cache = CacheSize::of(&config, options, device, exact, &checkpoint)?;
    cache.check()?;
    let threads = threads(options, &checkpoint);
    tch::set_num_threads(if exact { 1 } else { threads as i32 });
    progress(0.05);

    let tokenizer_hash = match described.tokenizer_hash() {
        Ok(hash) => {
            check_tokenizer(&described.tokenizer_path(), &config)?;
            hash
        }
        Err(ModelDirError::Missing { .. }) => String::new(),
        Err(error) => return Err(error.into()),
    };
    let weights = Weights {
        checkpoint: &checkpoint,
        dtype: options.dtype,
        device,
        exact,
    };
    let loaded = catch_unwind(AssertUnwindSafe(|| weights.model(config.clone())));
    let model = loaded
        .map_err(|panic| ModelError::LibTorch(panic_text(&*panic)))?
        .map_err(|source| ModelError::Weights {
            directory: directory.to_owned(),
            source,
        })?;
    progress(0.3);
    let pool = exact.then(|| Arc::new(Pool::new(threads)));
    let model = match &pool {
        Some(pool) => model.into_exact(pool),
        None => model,
    };
    progress(0.7);
    let info = ModelInfo {
        architecture: described.architecture,
        context_length: config.max_position_embeddings,
        vocab_size: config.vocab_size as usize,
        eos_token_ids: described.eos_token_ids,
        device: device_name(device),
        dtype: weights.stored().name().to_owned(),
        slots: options.max_sequences,
        fingerprint: fingerprint(
            &checkpoint,
            &config,
            &tokenizer_hash,
            &weights.arithmetic(),
            |stored| chosen(options.dtype, stored),
        ),
        exact,
    };
    // What is left to allocate is the cache.
    let runner = catch_unwind(AssertUnwindSafe(|| LlamaRunner::new(model, info, pool)));
    let runner = runner.map_err(|panic| cache.refused(&panic_text(&*panic)))?;
    progress(1.0);
    Ok(runner)
}

/// Reads and checks `config.json`.
///
/// # Errors
/// [`ModelError::Config`].
pub fn read_config(directory: &Path) -> Result<LlamaConfig, ModelError> {
    let path = directory.join("config.json");
    LlamaConfig::from_file(&path).map_err(|source| ModelError::Config { path, source })
}

fn context_length(config: &LlamaConfig, options: &LoadOptions) -> Result<usize, ModelError> {
    let most = config.max_position_embeddings;
    match options.context_length {
        None => Ok(most),
        Some(length) if (1..=most).contains(&length) => Ok(length),
        Some(length) => Err(ModelError::Option(format!(
            "context length {length} is not possible; this model allows 1 to {most}"
        ))),
    }
}

/// Ids that the model has no row for would only be found out by the request that meets one.
fn check_tokenizer(path: &Path, config: &LlamaConfig) -> Result<(), ModelError> {
    let ids = TextTokenizer::from_file(path)?.vocab_size();
    let vocab_size = config.vocab_size as usize;
    if ids <= vocab_size {
        return Ok(());
    }
    Err(ModelError::ForeignTokenizer {
        path: path.to_owned(),
        highest: ids - 1,
        vocab_size,
    })
}

/// Weight bytes that are worth a thread of their own: below, waking it costs more than it saves. Threads never change bits of the exact
/// arithmetic, so this may depend on the machine.
const BYTES_PER_THREAD: usize = 16 << 20;

fn threads(options: &LoadOptions, checkpoint: &Checkpoint) -> usize {
    if options.threads > 0 {
        return options.threads;
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let bytes: usize = checkpoint.entries().map(|(_, _, _, bytes)| bytes).sum();
    bytes.div_ceil(BYTES_PER_THREAD).clamp(1, cores)
}

/// How a checkpoint's tensors become a model's.
struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    dtype: DtypeChoice,
    device: Device,
    exact: bool,
}

impl Weights<'_> {
    fn model(&self, config: LlamaConfig) -> Result<Llama, TensorError> {
        let _no_gradients = tch::no_grad_guard();
        let mut asked = BTreeSet::new();
        let model = Llama::load(config, &mut |name, shape| {
            asked.insert(name.to_owned());
            let stored = self.checkpoint.tensor(name, shape)?;
            Ok(self.convert(&stored))
        })?;
        let names = self.checkpoint.entries().map(|(name, ..)| name);
        check_all_used(names, &asked, model.config())?;
        Ok(model)
    }

    fn arithmetic(&self) -> Arithmetic {
        if self.exact {
            return Arithmetic::Exact;
        }
        let release = libtorch::loaded_version();
        Arithmetic::stock(self.device, self.stored(), release, gpu::name)
    }

    /// The type in which most weights are kept.
    fn stored(&self) -> StoredType {
        main_type(self.dtype, self.checkpoint)
    }

    /// Exact: a matrix in its chosen width (until it is packed, possibly still in the mapped file), a vector widened to f32. Else: everything
    /// in one width, on the device.
    fn convert(&self, stored: &StoredTensor<'_>) -> Tensor {
        let tensor = view(stored);
        if !self.exact {
            return tensor
                .to_kind(kind(self.stored()))
                .to_device(self.device)
                .copy();
        }
        match stored.shape.len() {
            1 => tensor.to_kind(Kind::Float).copy(),
            _ => tensor.to_kind(kind(chosen(self.dtype, stored.dtype))),
        }
    }
}

fn main_type(dtype: DtypeChoice, checkpoint: &Checkpoint) -> StoredType {
    chosen(dtype, checkpoint.main_type().unwrap_or(StoredType::F32))
}

fn chosen(dtype: DtypeChoice, stored: StoredType) -> StoredType {
    match dtype {
        DtypeChoice::Auto => stored,
        DtypeChoice::F32 => StoredType::F32,
        DtypeChoice::Bf16 => StoredType::Bf16,
        DtypeChoice::F16 => StoredType::F16,
    }
}

fn kind(stored: StoredType) -> Kind {
    match stored {
        StoredType::F32 => Kind::Float,
        StoredType::Bf16 => Kind::BFloat16,
        StoredType::F16 => Kind::Half,
    }
}

/// A tensor over the file's bytes where they are aligned, else a copy. Whoever keeps it beyond the checkpoint copies it.
fn view(stored: &StoredTensor<'_>) -> Tensor {
    let shape: Vec<i64> = stored.shape.iter().map(|size| *size as i64).collect();
    let kind = kind(stored.dtype);
    if !stored
        .bytes
        .as_ptr()
        .addr()
        .is_multiple_of(stored.dtype.size_bytes())
    {
        return Tensor::from_data_size(stored.bytes, &shape, kind);
    }
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    // SAFETY: as many elements as the shape says (checked by `Checkpoint`), aligned; `load` drops or copies the tensor before the mapping.
    unsafe { Tensor::from_blob(stored.bytes.as_ptr(), &shape, &strides, kind, Device::Cpu) }
}
