//! From a checkpoint directory to a runner.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use understudy_engine_core::model_dir::{ModelDir, ModelDirError};
use understudy_engine_core::runner::ModelInfo;
use understudy_kernels::Pool;

use crate::checkpoint::{Checkpoint, CheckpointError, StoredTensor, StoredType};
use crate::config::{ConfigError, LlamaConfig};
use crate::device::{DeviceChoice, DeviceError, device_name};
use crate::llama::{Llama, LoadError};
use crate::runner::{ExactCache, LlamaRunner, Numerics, panic_text};

/// Raised whenever a change to a kernel or a layer changes bits; part of the fingerprint.
const EXACT_NUMERICS: &str = "exact-1";

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
        source: LoadError,
    },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{0}")]
    Option(String),
    #[error(transparent)]
    Directory(#[from] ModelDirError),
    #[error(
        "the KV cache of {slots} sequences of {context_length} positions takes {} MB, and the machine has {} MB of memory; lower max_sequences or context_length",
        .needed_bytes >> 20, .memory_bytes >> 20
    )]
    CacheTooLarge {
        slots: usize,
        context_length: usize,
        needed_bytes: u64,
        memory_bytes: u64,
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
    let checkpoint = Checkpoint::open(directory)?;
    let mut config = read_config(directory)?;
    let described = ModelDir::open(directory)?;
    let device = options.device.resolve()?;
    let exact = device == Device::Cpu && options.numerics == Numerics::Exact;
    // The rotary table need not be longer than the slots.
    config.max_position_embeddings = context_length(&config, options)?;
    check_cache_size(&config, options, device)?;
    let threads = threads(options, &checkpoint);
    tch::set_num_threads(if exact { 1 } else { threads as i32 });
    progress(0.05);

    let tokenizer_hash = match described.tokenizer_hash() {
        Ok(hash) => hash,
        Err(ModelDirError::Missing { .. }) => String::new(),
        Err(error) => return Err(error.into()),
    };
    let weights = Weights {
        checkpoint: &checkpoint,
        dtype: options.dtype,
        device,
        exact,
        threads,
        tokenizer_hash,
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
        fingerprint: weights.fingerprint(&config),
        exact,
    };
    let runner = catch_unwind(AssertUnwindSafe(|| LlamaRunner::new(model, info, pool)));
    let runner = runner.map_err(|panic| ModelError::LibTorch(panic_text(&*panic)))?;
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

/// Physical memory is taken as positions are used; a cache that could never fit is refused before the first request.
fn check_cache_size(
    config: &LlamaConfig,
    options: &LoadOptions,
    device: Device,
) -> Result<(), ModelError> {
    let (slots, context_length) = (options.max_sequences, config.max_position_embeddings);
    if slots == 0 {
        return Err(ModelError::Option(
            "at least one sequence must be allowed".to_owned(),
        ));
    }
    let needed_bytes = ExactCache::size_bytes(config, slots, context_length);
    // SAFETY: plain queries.
    let memory_bytes = unsafe {
        libc::sysconf(libc::_SC_PHYS_PAGES) as u64 * libc::sysconf(libc::_SC_PAGESIZE) as u64
    };
    if device == Device::Cpu && needed_bytes > memory_bytes {
        return Err(ModelError::CacheTooLarge {
            slots,
            context_length,
            needed_bytes,
            memory_bytes,
        });
    }
    Ok(())
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
    threads: usize,
    /// Of tokenizer.json; other text means other tokens. Empty where there is none.
    tokenizer_hash: String,
}

impl Weights<'_> {
    fn model(&self, config: LlamaConfig) -> Result<Llama, LoadError> {
        let _no_gradients = tch::no_grad_guard();
        Llama::load(config, &mut |name, shape| {
            let stored = self.checkpoint.tensor(name, shape)?;
            Ok(self.convert(&stored))
        })
    }

    /// The type in which most weights are kept.
    fn stored(&self) -> StoredType {
        let checkpoint = self.checkpoint.main_type().unwrap_or(StoredType::F32);
        chosen(self.dtype, checkpoint)
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

    /// Equal fingerprints mean equal bits: what is computed (values, sizes), and by whose arithmetic.
    fn fingerprint(&self, config: &LlamaConfig) -> String {
        let mut hash = Sha256::new();
        hash.update(self.checkpoint.value_hash());
        hash.update(&self.tokenizer_hash);
        // The slots' length is no property of the arithmetic.
        hash.update(
            LlamaConfig {
                max_position_embeddings: 1,
                ..config.clone()
            }
            .to_json(),
        );
        let stored = self.checkpoint.main_type().unwrap_or(StoredType::F32);
        // Widening is exact, so it leaves the fingerprint alone; narrowing rounds.
        let rounding = match chosen(self.dtype, stored) {
            StoredType::F32 => "as-stored",
            chosen if chosen == stored => "as-stored",
            narrower => narrower.name(),
        };
        hash.update(rounding);
        let arithmetic = if self.exact {
            EXACT_NUMERICS.to_owned()
        } else {
            format!(
                "libtorch-2.11/{}/{}/{}/{}",
                self.stored().name(),
                device_name(self.device),
                self.threads,
                std::env::consts::ARCH
            )
        };
        hash.update(&arithmetic);
        let digest = hash.finalize();
        let hex: String = digest[..16]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!("{}-{hex}", arithmetic.split('/').next().unwrap_or_default())
    }
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
