//! Reading a checkpoint directory's safetensors files: one `model.safetensors`, or shards named by an index.
//!
//! ```text
//!  0        8                   8 + n                       safetensors
//!  +--------+-------------------+---------------------+
//!  | n: u64 | JSON header       | tensor bytes        |     little-endian; offsets in the header count from 8 + n
//!  +--------+-------------------+---------------------+
//! ```
//!
//! Files are memory-mapped. Invariant: what a header claims is checked against the file before it is used, so a truncated or
//! hostile file is an error with a name, never a panic, and never an allocation of the claimed size.

mod header;
mod linear;

pub use linear::LinearReader;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::tensor_error::TensorError;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Why a checkpoint's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("model directory {0} does not exist or is no directory")]
    NoDirectory(PathBuf),
    #[error(
        "{0} holds no weights: expected model.safetensors, or model.safetensors.index.json with its shards"
    )]
    NoWeights(PathBuf),
    #[error("{0} holds weights in PyTorch's pickle format only; convert them to safetensors")]
    Pickle(PathBuf),
    #[error("cannot read {path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path} is truncated: it holds {found_bytes} bytes, its header describes {expected_bytes}; fetch the file again"
    )]
    Truncated {
        path: PathBuf,
        expected_bytes: u64,
        found_bytes: u64,
    },
    #[error("{path} is no safetensors file: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Index { path: PathBuf, reason: String },
}

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StoredType {
    F32,
    Bf16,
    F16,
}

impl StoredType {
    /// Bytes of an element.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// `f32`, `bf16`, `f16`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// By safetensors' name.
    #[must_use]
    pub fn of(dtype: &str) -> Option<Self> {
        match dtype {
            "F32" => Some(Self::F32),
            "BF16" => Some(Self::Bf16),
            "F16" => Some(Self::F16),
            _ => None,
        }
    }
}

/// A tensor as it lies in the file: row-major, little-endian, of no particular alignment.
#[derive(Debug, Clone, Copy)]
pub struct StoredTensor<'a> {
    pub dtype: StoredType,
    pub shape: &'a [u64],
    pub bytes: &'a [u8],
}

/// Where one tensor lies.
#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: String,
    shape: Vec<u64>,
    /// Of its bytes, from the start of the file; checked to lie within it.
    start: usize,
    end: usize,
}

/// The mapped files of a checkpoint and what they hold.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    files: Vec<Mmap>,
    stamps: Vec<u8>,
    tensors: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Maps the weights in `directory` and checks every header.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        if !directory.is_dir() {
            return Err(CheckpointError::NoDirectory(directory.to_owned()));
        }
        let mut checkpoint = Self {
            directory: directory.to_owned(),
            files: Vec::new(),
            stamps: Vec::new(),
            tensors: BTreeMap::new(),
        };
        if directory.join(SINGLE).exists() {
            checkpoint.add_file(SINGLE)?;
        } else if directory.join(INDEX).exists() {
            checkpoint.add_shards()?;
        } else if directory.join("pytorch_model.bin").exists()
            || directory.join("pytorch_model.bin.index.json").exists()
        {
            return Err(CheckpointError::Pickle(directory.to_owned()));
        } else {
            return Err(CheckpointError::NoWeights(directory.to_owned()));
        }
        Ok(checkpoint)
    }

    /// Maps one file and takes in all of its tensors.
    fn add_file(&mut self, name: &str) -> Result<(), CheckpointError> {
        let path = self.directory.join(name);
        let io = |source| CheckpointError::Io {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        let stamp = format!(
            "{}|{}|{}|{}|{}.{:09}|{}.{:09}\n",
            path.canonicalize()
                .unwrap_or_else(|_| path.clone())
                .display(),
            metadata.dev(),
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            // A copy may bring its time of writing along; this one nobody can set.
            metadata.ctime(),
            metadata.ctime_nsec()
        );
        self.stamps.extend_from_slice(stamp.as_bytes());
        // SAFETY: the mapping is read-only. A file that someone shortens while it is mapped can kill this process (SIGBUS), which its owner
        // answers with a fresh one; weights are read once, at load.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let index = self.files.len();
        for (name, raw, data_start) in header::parse_header(&path, &map)? {
            let entry = header::locate(&path, &map, index, &name, raw, data_start)?;
            // Which of two would count is nobody's to guess.
            if self.tensors.contains_key(&name) {
                let reason = format!("tensor \"{name}\" is in another shard too");
                return Err(CheckpointError::Index { path, reason });
            }
            self.tensors.insert(name, entry);
        }
        self.files.push(map);
        Ok(())
    }

    /// Reads the index, maps each shard once, and checks that the shards hold what the index promises.
    fn add_shards(&mut self) -> Result<(), CheckpointError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let path = self.directory.join(INDEX);
        let text = std::fs::read(&path).map_err(|source| CheckpointError::Io {
            path: path.clone(),
            source,
        })?;
        let wrong = |reason: String| CheckpointError::Index {
            path: path.clone(),
            reason,
        };
        let index: Index = serde_json::from_slice(&text)
            .map_err(|error| wrong(format!("not a shard index: {error}")))?;
        let mut shards: Vec<&String> = index.weight_map.values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            // A shard is a file beside the index; anything that could lead elsewhere is refused.
            if shard.is_empty() || shard.contains(['/', '\\']) || shard.starts_with('.') {
                return Err(wrong(format!(
                    "the shard name {shard:?} is no plain file name"
                )));
            }
            if !self.directory.join(shard).exists() {
                return Err(wrong(format!(
                    "the shard {shard} is missing; fetch the checkpoint again"
                )));
            }
            self.add_file(shard)?;
        }
        match index
            .weight_map
            .iter()
            .find(|(name, _)| !self.tensors.contains_key(*name))
        {
            Some((name, shard)) => Err(wrong(format!(
                "tensor \"{name}\" is not in {shard}, where the index says it is"
            ))),
            None => Ok(()),
        }
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor `name`, which must have the shape `expected`.
    ///
    /// # Errors
    /// [`TensorError`] if it is missing, quantized, of another shape or of an element type that the engine does not compute with.
    pub fn tensor(&self, name: &str, expected: &[i64]) -> Result<StoredTensor<'_>, TensorError> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(self.missing(name));
        };
        // Before the shape: packed formats change both, and the element type says what is going on.
        let Some(dtype) = StoredType::of(&entry.dtype) else {
            return Err(TensorError::Dtype {
                name: name.to_owned(),
                dtype: entry.dtype.clone(),
            });
        };
        let same = entry.shape.len() == expected.len()
            && entry
                .shape
                .iter()
                .zip(expected)
                .all(|(f, e)| i64::try_from(*f) == Ok(*e));
        if !same {
            return Err(TensorError::Shape {
                name: name.to_owned(),
                expected: expected.to_vec(),
                found: entry
                    .shape
                    .iter()
                    .map(|size| i64::try_from(*size).unwrap_or(i64::MAX))
                    .collect(),
            });
        }
        Ok(StoredTensor {
            dtype,
            shape: &entry.shape,
            bytes: &self.files[entry.file][entry.start..entry.end],
        })
    }

    fn missing(&self, name: &str) -> TensorError {
        let stem = name.strip_suffix("weight").unwrap_or(name);
        let quantized = ["qweight", "weight_packed", "weight_scale", "scales"]
            .iter()
            .any(|part| self.tensors.contains_key(&format!("{stem}{part}")));
        if quantized {
            TensorError::Quantized(name.to_owned())
        } else {
            TensorError::Missing(name.to_owned())
        }
    }

    /// The element type of most bytes of the checkpoint; `None` if none of the supported ones occurs.
    #[must_use]
    pub fn main_type(&self) -> Option<StoredType> {
        let mut bytes = BTreeMap::<StoredType, usize>::new();
        for entry in self.tensors.values() {
            if let Some(dtype) = StoredType::of(&entry.dtype) {
                *bytes.entry(dtype).or_default() += entry.end - entry.start;
            }
        }
        bytes
            .into_iter()
            .max_by_key(|(_, bytes)| *bytes)
            .map(|(dtype, _)| dtype)
    }

    /// Names, element types, shapes and sizes in bytes, sorted by name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &str, &[u64], usize)> {
        self.tensors.iter().map(|(name, e)| {
            (
                name.as_str(),
                e.dtype.as_str(),
                e.shape.as_slice(),
                e.end - e.start,
            )
        })
    }

    /// Gives the pages that were read back to the system: they count as this process's memory while they are mapped, and reading them again
    /// finds them in the page cache.
    pub fn forget_pages(&self) {
        for file in &self.files {
            // SAFETY: a read-only mapping of a file: what is dropped is read again when it is needed. A refusal costs memory only.
            let _ = unsafe { file.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }

    /// Names, sizes and times of change of the files, as far as the system tells: equal stamps mean the same values, without reading them.
    #[must_use]
    pub fn stamps(&self) -> &[u8] {
        &self.stamps
    }

    /// A hash of all names, types, shapes and values: equal exactly if the weights are, however they are cut into files.
    #[must_use]
    pub fn value_hash(&self) -> [u8; 32] {
        let threads = std::thread::available_parallelism()
            .map_or(1, |n| n.get())
            .min(8);
        let entries: Vec<(&String, &Entry)> = self.tensors.iter().collect();
        let next = std::sync::atomic::AtomicUsize::new(0);
        let digests = std::sync::Mutex::new(vec![[0_u8; 32]; entries.len()]);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let Some((name, entry)) = entries.get(index) else {
                            break;
                        };
                        let digest = entry.digest(name, &self.files[entry.file]);
                        digests
                            .lock()
                            .unwrap_or_else(std::sync::PoisonError::into_inner)[index] = digest;
                    }
                });
            }
        });
        let mut hash = Sha256::new();
        for digest in digests
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            hash.update(digest);
        }
        hash.finalize().into()
    }
}

impl Entry {
    fn digest(&self, name: &str, file: &[u8]) -> [u8; 32] {
        let mut hash = Sha256::new();
        // Zero bytes end the two texts, a length the shape: no two tensors have the same input.
        hash.update(format!("{name}\0{}\0{}:", self.dtype, self.shape.len()));
        for size in &self.shape {
            hash.update(size.to_le_bytes());
        }
        hash.update(&file[self.start..self.end]);
        hash.finalize().into()
    }
}
