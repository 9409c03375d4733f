//! From a checkpoint directory to a runner.

mod memory;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};
use understudy_checkpoint::spec::{LayerSpec, ModelSpec};
use understudy_checkpoint::{
    Checkpoint, CheckpointError, ConfigError, StoredTensor, StoredType, TensorError, check_tensors,
    families,
};
use understudy_engine_core::breakdown::Measured;
use understudy_engine_core::model_dir::{ModelDir, ModelDirError};
use understudy_engine_core::runner::{ModelInfo, panic_text};
use understudy_engine_core::tokenizer::{TextTokenizer, TokenizerError};
use understudy_kernels::Isa;

use crate::device::{DeviceChoice, DeviceError, device_name};
use crate::gpu;
use crate::layers::Purpose;
use crate::libtorch::{self, WrongLibTorch};
use crate::model::Model;
use crate::options::{DtypeChoice, KvDtype, KvMemory, Numerics, Quantize, UnknownChoice};
use crate::runner::{BlockCache, TorchEncoder, TorchRunner};
use memory::{KvDemand, available_bytes};
use understudy_cpu::fingerprint::{Arithmetic, fingerprint};

/// What a caller may choose about a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    pub dtype: DtypeChoice,
    pub device: DeviceChoice,
    /// On the CPU; a GPU always computes with LibTorch's operators.
    pub numerics: Numerics,
    /// Of exact numerics only.
    pub quantize: Quantize,
    /// Compute threads; 0 takes as many as the model's size warrants, up to all cores.
    pub threads: usize,
    /// Sequences in one step at most.
    pub max_sequences: usize,
    /// Positions per sequence; `None` takes the model's own limit.
    pub context_length: Option<usize>,
    /// Of exact numerics only.
    pub kv_dtype: KvDtype,
    pub kv_memory: KvMemory,
    /// A number of blocks instead of `kv_memory`.
    pub kv_blocks: Option<usize>,
    /// Whether packed weights are shared with other engines of this host; of exact numerics only.
    pub share_weights: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: DtypeChoice::Auto,
            device: DeviceChoice::Cpu,
            numerics: Numerics::Exact,
            quantize: Quantize::None,
            threads: 0,
            max_sequences: 16,
            context_length: None,
            kv_dtype: KvDtype::Auto,
            kv_memory: KvMemory::default(),
            kv_blocks: None,
            share_weights: true,
        }
    }
}

impl LoadOptions {
    /// The same for the executor of exact numerics.
    #[must_use]
    pub fn on_the_cpu(&self) -> understudy_cpu::LoadOptions {
        understudy_cpu::LoadOptions {
            dtype: self.dtype,
            quantize: self.quantize,
            threads: self.threads,
            max_sequences: self.max_sequences,
            context_length: self.context_length,
            kv_dtype: self.kv_dtype,
            kv_memory: self.kv_memory,
            kv_blocks: self.kv_blocks,
            share_weights: self.share_weights,
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
    Cpu(#[from] understudy_cpu::LoadError),
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
    Choice(#[from] UnknownChoice),
    #[error(transparent)]
    Directory(#[from] ModelDirError),
    #[error("{architecture} is an encoder: it has no next token to sample")]
    Encoder { architecture: String },
    #[error("{architecture} generates text: it has no encoding of a whole sequence")]
    Generator { architecture: String },
    #[error(
        "the KV cache of one sequence of {context_length} positions takes {} MiB, and its budget is {} MiB of the {} MiB that {device} has to give; lower context_length, or raise kv_memory",
        .needed_bytes >> 20, .budget_bytes >> 20, .available_bytes >> 20
    )]
    KvMemory {
        needed_bytes: u64,
        context_length: usize,
        budget_bytes: u64,
        available_bytes: u64,
        device: String,
    },
    #[error(
        "the KV cache takes {} MiB, which {device} does not give; lower kv_memory, max_sequences or context_length", .bytes >> 20
    )]
    KvRefused { bytes: u64, device: String },
    #[error("LibTorch failed while the model was loaded: {0}")]
    LibTorch(String),
}

impl ModelError {
    /// What the failed allocation of a cache is to be called.
    fn of_cache(self, info: &ModelInfo) -> Self {
        let is_memory = |reason: &str| {
            let words = ["allocate", "out of memory"];
            words.iter().any(|words| reason.contains(words))
        };
        match self {
            Self::LibTorch(reason) if is_memory(&reason) => Self::KvRefused {
                bytes: info.kv_blocks as u64 * info.kv_block_bytes as u64,
                device: info.device.clone(),
            },
            other => other,
        }
    }
}

/// Loads the model in `directory` for whoever executes it as `options` ask; `progress` hears of 0.0 ..= 1.0.
///
/// # Errors
/// [`ModelError`], in words for whoever configured the model.
pub fn load(
    directory: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(f32),
) -> Result<Box<dyn Measured>, ModelError> {
    let device = options.device.resolve()?;
    if device == Device::Cpu && options.numerics == Numerics::Exact {
        let (runner, _) = understudy_cpu::load(directory, &options.on_the_cpu(), progress)?;
        return Ok(Box::new(runner));
    }
    Ok(Box::new(load_stock(directory, options, progress)?))
}

/// Loads the model in `directory` to be computed by LibTorch's operators.
///
/// # Errors
/// [`ModelError`], in words for whoever configured the model.
pub fn load_stock(
    directory: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(f32),
) -> Result<TorchRunner, ModelError> {
    let source = Source::open(directory, options)?;
    let (spec, device) = (&source.spec, source.device);
    if !spec.generates() {
        let architecture = spec.architecture.clone();
        return Err(ModelError::Encoder { architecture });
    }
    if spec.layers.iter().any(|layer| !layer.attention.causal) {
        let reason = format!(
            "{} generates without causal attention, which is not computed here",
            spec.architecture
        );
        return Err(ModelError::Option(reason));
    }
    if options.max_sequences == 0 {
        let reason = "at least one sequence must be allowed";
        return Err(ModelError::Option(reason.to_owned()));
    }
    if options.quantize != Quantize::None {
        let reason = "quantized weights are computed with numerics = exact on the CPU only";
        return Err(ModelError::Option(reason.to_owned()));
    }
    let described = ModelDir::open(directory)?;
    let tokenizer_hash = tokenizer_hash(&described, spec)?;
    let demand = KvDemand {
        block_bytes: BlockCache::block_bytes(spec, source.stored().size_bytes()),
        context_length: spec.context_length,
        max_sequences: options.max_sequences,
        device,
    };
    let budget = match options.kv_blocks {
        Some(blocks) => KvMemory::Bytes((blocks as u64).saturating_mul(demand.block_bytes as u64)),
        None => options.kv_memory,
    };
    // Once before anything is allocated: what could not fit an empty device will not fit later.
    demand.blocks(budget, available_bytes(device))?;
    tch::set_num_threads(source.threads(options) as i32);
    progress(0.05);

    let model = source.model()?;
    progress(0.7);
    let kv_blocks = demand.blocks(budget, available_bytes(device))?;
    let info = ModelInfo {
        architecture: described.architecture,
        context_length: model.spec().context_length,
        vocab_size: model.spec().vocab_size,
        eos_token_ids: described.eos_token_ids,
        device: device_name(device),
        dtype: source.stored().name().to_owned(),
        max_sequences: options.max_sequences,
        kv_blocks,
        kv_block_bytes: demand.block_bytes,
        fingerprint: source.fingerprint(&tokenizer_hash),
        exact: false,
    };
    // What is left to allocate is the cache.
    let asked = info.clone();
    let runner = caught(|| TorchRunner::new(model, info));
    let runner = runner.map_err(|error| error.of_cache(&asked))?;
    progress(1.0);
    Ok(runner)
}

/// Loads the encoder in `directory`.
///
/// # Errors
/// [`ModelError`], in words for whoever configured the model.
pub fn load_encoder(directory: &Path, options: &LoadOptions) -> Result<TorchEncoder, ModelError> {
    let source = Source::open(directory, options)?;
    if source.spec.generates() {
        let architecture = source.spec.architecture;
        return Err(ModelError::Generator { architecture });
    }
    let windowed = |layer: &LayerSpec| !layer.attention.causal && layer.attention.window.is_some();
    if source.spec.layers.iter().any(windowed) {
        let reason = "windows of layers that see ahead are not computed here";
        return Err(ModelError::Option(reason.to_owned()));
    }
    tch::set_num_threads(source.threads(options) as i32);
    source.model().map(TorchEncoder::new)
}

/// Reads what the model in `directory` computes, with the names of its checkpoint.
///
/// # Errors
/// [`ModelError::Config`].
pub fn read_spec(directory: &Path, checkpoint: &Checkpoint) -> Result<ModelSpec, ModelError> {
    spec_within(directory, checkpoint, None)
}

fn spec_within(
    directory: &Path,
    checkpoint: &Checkpoint,
    positions: Option<usize>,
) -> Result<ModelSpec, ModelError> {
    families::read_within(directory, positions)
        .map(|spec| spec.with_names_of(checkpoint))
        .map_err(|source| ModelError::Config {
            path: directory.join("config.json"),
            source,
        })
}

/// Ids that the model has no row for would only be found out by the request that meets one.
fn tokenizer_hash(described: &ModelDir, spec: &ModelSpec) -> Result<String, ModelError> {
    let hash = match described.tokenizer_hash() {
        Ok(hash) => hash,
        Err(ModelDirError::Missing { .. }) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    let path = described.tokenizer_path();
    let ids = TextTokenizer::from_file(&path)?.vocab_size();
    if ids <= spec.vocab_size {
        return Ok(hash);
    }
    Err(ModelError::ForeignTokenizer {
        path,
        highest: ids - 1,
        vocab_size: spec.vocab_size,
    })
}

/// Weight bytes that are worth a thread of their own: below, waking it costs more than it saves.
const BYTES_PER_THREAD: usize = 16 << 20;

/// A checked checkpoint, and how its tensors become a model's.
struct Source {
    directory: PathBuf,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: DtypeChoice,
    device: Device,
}

impl Source {
    fn open(directory: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        libtorch::check_loaded()?;
        let checkpoint = Checkpoint::open(directory)?;
        let most = read_spec(directory, &checkpoint)?.context_length;
        if let Some(length) = options.context_length
            && !(1..=most).contains(&length)
        {
            return Err(ModelError::Option(format!(
                "context length {length} is not possible; this model allows 1 to {most}"
            )));
        }
        let source = Self {
            spec: spec_within(directory, &checkpoint, options.context_length)?,
            directory: directory.to_owned(),
            checkpoint,
            dtype: options.dtype,
            device: options.device.resolve()?,
        };
        check_tensors(&source.checkpoint, &source.spec).map_err(|error| source.weights(error))?;
        Ok(source)
    }

    fn weights(&self, source: TensorError) -> ModelError {
        ModelError::Weights {
            directory: self.directory.clone(),
            source,
        }
    }

    fn threads(&self, options: &LoadOptions) -> usize {
        if options.threads > 0 {
            return options.threads;
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let bytes: usize = self.checkpoint.entries().map(|(.., bytes)| bytes).sum();
        bytes.div_ceil(BYTES_PER_THREAD).clamp(1, cores)
    }

    fn model(&self) -> Result<Model, ModelError> {
        let _no_gradients = tch::no_grad_guard();
        let loaded = caught(|| {
            Model::load(self.spec.clone(), Purpose::Serving, &mut |name, shape| {
                Ok(self.convert(&self.checkpoint.tensor(name, shape)?))
            })
        })?;
        loaded.map_err(|source| self.weights(source))
    }

    /// The type in which everything is kept and computed.
    fn stored(&self) -> StoredType {
        let main = self.checkpoint.main_type().unwrap_or(StoredType::F32);
        self.dtype.of(main)
    }

    fn convert(&self, stored: &StoredTensor<'_>) -> Tensor {
        let tensor = view(stored);
        // Widened where it is needed: a narrow tensor crosses to a device in half the time.
        let moved = tensor.to_device(self.device).to_kind(kind(self.stored()));
        match moved.data_ptr() == tensor.data_ptr() {
            true => moved.copy(),
            false => moved,
        }
    }

    fn fingerprint(&self, tokenizer_hash: &str) -> String {
        let hardware = match self.device {
            Device::Cuda(index) => gpu::name(index).unwrap_or_else(|| "a GPU".to_owned()),
            _ => format!("{} {}", std::env::consts::ARCH, Isa::best().name()),
        };
        let release = libtorch::loaded_version();
        let arithmetic = Arithmetic::stock(hardware, self.stored(), &release);
        let kept = |_| self.stored();
        fingerprint(
            &self.checkpoint.value_hash(),
            &self.checkpoint,
            &self.spec,
            tokenizer_hash,
            &arithmetic,
            kept,
        )
    }
}

/// LibTorch's errors arrive as panics of tch.
fn caught<T>(run: impl FnOnce() -> T) -> Result<T, ModelError> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| ModelError::LibTorch(panic_text(&*panic)))
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
    // SAFETY: as many elements as the shape says (checked by `Checkpoint`), aligned; `Source` copies the tensor before the mapping goes.
    unsafe { Tensor::from_blob(stored.bytes.as_ptr(), &shape, &strides, kind, Device::Cpu) }
}
