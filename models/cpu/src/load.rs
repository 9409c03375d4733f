//! From a checkpoint directory to a runner.

use std::path::{Path, PathBuf};

use understudy_checkpoint::check_tensors;
use understudy_checkpoint::spec::ModelSpec;
use understudy_checkpoint::{
    Checkpoint, CheckpointError, ConfigError, StoredType, TensorError, families,
};
use understudy_engine_core::model_dir::{ModelDir, ModelDirError};
use understudy_engine_core::runner::ModelInfo;
use understudy_engine_core::tokenizer::{TextTokenizer, TokenizerError};
use understudy_kernels::{BLOCK, KvBlocks, KvFormat, Pool};

use crate::fingerprint::{Arithmetic, fingerprint};
use crate::memory::{KvDemand, available_bytes};
use crate::model::Model;
use crate::options::{DtypeChoice, KvDtype, KvMemory, Quantize};
use crate::runner::CpuRunner;
use crate::segment::{self, Origin};
use crate::weights::Layout;

/// Weight bytes that are worth a thread of their own: below, waking it costs more than it saves. Threads never change bits.
const BYTES_PER_THREAD: usize = 16 << 20;

/// What a caller may choose about a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    pub dtype: DtypeChoice,
    pub quantize: Quantize,
    /// Compute threads; 0 takes as many as the model's size warrants, up to all cores.
    pub threads: usize,
    /// Sequences that are computed at the same time.
    pub max_sequences: usize,
    /// Positions per sequence; `None` takes the model's own limit.
    pub context_length: Option<usize>,
    pub kv_dtype: KvDtype,
    pub kv_memory: KvMemory,
    /// A number of blocks instead of `kv_memory`.
    pub kv_blocks: Option<usize>,
    /// Whether packed weights are shared with other engines of this host.
    pub share_weights: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: DtypeChoice::Auto,
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

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
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
    Directory(#[from] ModelDirError),
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
    #[error("context length {asked} is not possible; this model allows 1 to {most}")]
    ContextLength { asked: usize, most: usize },
    #[error("at least one sequence must be allowed")]
    NoSequences,
    #[error(
        "{architecture} is an encoder: it has no next token to sample; it can be inspected, but not served"
    )]
    Encoder { architecture: String },
    #[error(
        "the KV cache of one sequence of {context_length} positions takes {} MiB, and its budget is {} MiB of the {} MiB that are available; lower context_length, or raise kv_memory",
        .needed_bytes >> 20, .budget_bytes >> 20, .available_bytes >> 20
    )]
    KvMemory {
        needed_bytes: u64,
        context_length: usize,
        budget_bytes: u64,
        available_bytes: u64,
    },
    #[error(
        "the KV cache would take {} MiB, and {} MiB are available; lower kv_memory, max_sequences or context_length",
        .taken_bytes >> 20, .available_bytes >> 20
    )]
    KvBudget {
        taken_bytes: u64,
        available_bytes: u64,
    },
}

/// What loading found, for logs.
#[derive(Debug, Clone, Copy)]
pub struct LoadReport {
    pub weights: Origin,
    pub weight_bytes: usize,
    pub kv_bytes: u64,
    pub threads: usize,
}

/// Reads what the model computes.
///
/// # Errors
/// [`LoadError::Config`].
pub fn read_spec(
    directory: &Path,
    checkpoint: &Checkpoint,
    positions: Option<usize>,
) -> Result<ModelSpec, LoadError> {
    families::read_within(directory, positions)
        .map(|spec| spec.with_names_of(checkpoint))
        .map_err(|source| LoadError::Config {
            path: directory.join("config.json"),
            source,
        })
}

/// Loads the model in `directory`; `progress` hears of 0.0 ..= 1.0.
///
/// # Errors
/// [`LoadError`], in words for whoever configured the model.
pub fn load(
    directory: &Path,
    options: &LoadOptions,
    progress: &mut dyn FnMut(f32),
) -> Result<(CpuRunner, LoadReport), LoadError> {
    let checkpoint = Checkpoint::open(directory)?;
    let most = read_spec(directory, &checkpoint, None)?.context_length;
    let context_length = context_length(most, options)?;
    let spec = read_spec(directory, &checkpoint, options.context_length)?;
    let described = ModelDir::open(directory)?;
    if !spec.generates() {
        return Err(LoadError::Encoder {
            architecture: spec.architecture,
        });
    }
    if options.max_sequences == 0 {
        return Err(LoadError::NoSequences);
    }
    let tokenizer_hash = tokenizer_hash(&described, &spec)?;
    let kv_format = options.kv_dtype.format(options.quantize);
    let block_bytes = kv_block_bytes(&spec, kv_format);
    let demand = KvDemand {
        block_bytes,
        block_positions: BLOCK,
        context_length,
        max_sequences: options.max_sequences,
    };
    let budget = match options.kv_blocks {
        Some(blocks) => KvMemory::Bytes((blocks as u64).saturating_mul(block_bytes as u64)),
        None => options.kv_memory,
    };
    // Once before anything is allocated: what could not fit now will not fit later.
    demand.blocks(budget, available_bytes())?;
    let (model, pool, weights) = load_model(
        directory,
        &checkpoint,
        spec,
        context_length,
        options,
        progress,
    )?;
    let kv_blocks = demand.blocks(budget, available_bytes())?;
    let info = ModelInfo {
        architecture: described.architecture,
        context_length,
        vocab_size: model.spec.vocab_size,
        eos_token_ids: described.eos_token_ids,
        device: "cpu".to_owned(),
        dtype: dtype_name(&checkpoint, options),
        max_sequences: options.max_sequences,
        kv_blocks,
        kv_block_bytes: block_bytes,
        fingerprint: fingerprint(
            &weights.value_hash,
            &checkpoint,
            &model.spec,
            &tokenizer_hash,
            &Arithmetic::exact(options.quantize, kv_format),
            |stored| options.dtype.of(stored),
        ),
        exact: true,
    };
    let report = LoadReport {
        weights: weights.origin,
        weight_bytes: weights.bytes,
        kv_bytes: kv_blocks as u64 * block_bytes as u64,
        threads: pool.threads(),
    };
    progress(1.0);
    Ok((CpuRunner::new(model, info, kv_format, pool), report))
}

/// What is known of the weights once they are packed.
pub struct LoadedWeights {
    pub value_hash: [u8; 32],
    pub origin: Origin,
    pub bytes: usize,
}

/// The model alone, of any kind, without a cache.
///
/// # Errors
/// [`LoadError::Weights`].
pub fn load_model(
    directory: &Path,
    checkpoint: &Checkpoint,
    spec: ModelSpec,
    context_length: usize,
    options: &LoadOptions,
    progress: &mut dyn FnMut(f32),
) -> Result<(Model, Pool, LoadedWeights), LoadError> {
    let wrong = |source| LoadError::Weights {
        directory: directory.to_owned(),
        source,
    };
    check_tensors(checkpoint, &spec).map_err(wrong)?;
    let layout = Layout::of(&spec, checkpoint, options.dtype, options.quantize).map_err(wrong)?;
    let pool = Pool::new(threads(options, layout.bytes()));
    let segments = segment::directory().filter(|_| options.share_weights);
    let packed = layout
        .load(checkpoint, segments.as_deref(), &pool, &mut |part| {
            progress(0.05 + 0.9 * part)
        })
        .map_err(wrong)?;
    // Behind the load: our own, however long ago it was mapped last, is in use now.
    if let Some(segments) = &segments {
        segment::sweep(segments, segment::IDLE);
    }
    let weights = LoadedWeights {
        value_hash: packed.value_hash,
        origin: packed.origin,
        bytes: packed.bytes,
    };
    let model = Model::build(spec, checkpoint, packed, context_length).map_err(wrong)?;
    checkpoint.forget_pages();
    Ok((model, pool, weights))
}

/// Bytes of a block in all layers.
#[must_use]
pub fn kv_block_bytes(spec: &ModelSpec, format: KvFormat) -> usize {
    let layers = spec.layers.iter().map(|layer| &layer.attention);
    layers
        .map(|attention| {
            KvBlocks::position_bytes(format, attention.kv_heads, attention.head_dim)
                .saturating_mul(BLOCK)
        })
        .fold(0, usize::saturating_add)
}

fn context_length(most: usize, options: &LoadOptions) -> Result<usize, LoadError> {
    match options.context_length {
        None => Ok(most),
        Some(length) if (1..=most).contains(&length) => Ok(length),
        Some(asked) => Err(LoadError::ContextLength { asked, most }),
    }
}

fn threads(options: &LoadOptions, weight_bytes: usize) -> usize {
    if options.threads > 0 {
        return options.threads;
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    weight_bytes.div_ceil(BYTES_PER_THREAD).clamp(1, cores)
}

/// Ids that the model has no row for would only be found out by the request that meets one.
fn tokenizer_hash(described: &ModelDir, spec: &ModelSpec) -> Result<String, LoadError> {
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
    Err(LoadError::ForeignTokenizer {
        path,
        highest: ids - 1,
        vocab_size: spec.vocab_size,
    })
}

fn dtype_name(checkpoint: &Checkpoint, options: &LoadOptions) -> String {
    let stored = checkpoint.main_type().unwrap_or(StoredType::F32);
    match options.quantize {
        Quantize::None => options.dtype.of(stored).name().to_owned(),
        Quantize::Int8 => "int8".to_owned(),
        Quantize::Int4 => "int4".to_owned(),
    }
}
