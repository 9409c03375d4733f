//! From a checkpoint to packed weights: which matrix is kept in which format, where it lies in the image, and how it gets there.
//!
//! ```text
//!  image   | embedding | layers.0.qkv | layers.0.output | ... | head |      each part aligned to 64 bytes
//! ```
//!
//! Invariant: the layout follows from the specification and the formats alone, so an image that another process made under the same key is
//! the one that this process would have made.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use understudy_checkpoint::spec::{LinearSpec, ModelSpec, OutputSpec, RowPattern, WeightPart};
use understudy_checkpoint::{Checkpoint, StoredType, TensorError};
use understudy_kernels::buffer::Bytes;
use understudy_kernels::linear::WeightFormat;
use understudy_kernels::{PackedLinear, Pool};

use crate::fingerprint::EXACT_NUMERICS;
use crate::options::{DtypeChoice, Quantize, plain_format};
use crate::segment::{self, Key, Origin};

/// The name of the embedding's matrix in the layout.
const EMBEDDING: &str = "embedding";
/// Alignment of a part.
const ALIGN: usize = 64;

/// One matrix of the image.
struct Part {
    name: String,
    spec: LinearSpec,
    format: WeightFormat,
    offset: usize,
    bytes: usize,
}

/// Where every matrix lies.
pub struct Layout {
    parts: Vec<Part>,
    bytes: usize,
}

/// Packed matrices by name.
pub struct PackedWeights {
    parts: std::collections::BTreeMap<String, PackedLinear>,
    pub value_hash: [u8; 32],
    pub origin: Origin,
    pub bytes: usize,
}

impl Layout {
    /// Every matrix of `spec` in the format that the options give it.
    ///
    /// # Errors
    /// [`TensorError`] for a matrix that the checkpoint does not hold as described.
    pub fn of(
        spec: &ModelSpec,
        checkpoint: &Checkpoint,
        dtype: DtypeChoice,
        quantize: Quantize,
    ) -> Result<Self, TensorError> {
        let tied = matches!(spec.output, OutputSpec::Logits { head: None, .. });
        let mut layout = Self {
            parts: Vec::new(),
            bytes: 0,
        };
        let embedding = embedding_matrix(spec);
        let plain = |map: &LinearSpec| -> Result<WeightFormat, TensorError> {
            let stored = checkpoint
                .linear(map)?
                .stored_type()
                .unwrap_or(StoredType::F32);
            Ok(plain_format(dtype.of(stored)))
        };
        let table = match (tied, quantize) {
            // It is the head as well.
            (true, Quantize::Int8 | Quantize::Int4) => WeightFormat::Int8,
            _ => plain(&embedding)?,
        };
        layout.push(EMBEDDING.to_owned(), embedding, table);
        for (name, map) in spec.linears() {
            let format = match quantize {
                // A router's scores decide which experts compute at all, and it is small.
                _ if name.ends_with("router") => plain(map)?,
                Quantize::None => plain(map)?,
                Quantize::Int8 => WeightFormat::Int8,
                Quantize::Int4 if name == "head" => WeightFormat::Int8,
                Quantize::Int4 => WeightFormat::Int4,
            };
            layout.push(name, map.clone(), format);
        }
        Ok(layout)
    }

    fn push(&mut self, name: String, spec: LinearSpec, format: WeightFormat) {
        let bytes = PackedLinear::packed_bytes(format, spec.outputs, spec.inputs);
        self.parts.push(Part {
            name,
            spec,
            format,
            offset: self.bytes,
            bytes,
        });
        self.bytes = (self.bytes + bytes).next_multiple_of(ALIGN);
    }

    /// Of the whole image.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Names the image: the checkpoint's files as they are now, and the layout.
    fn key(&self, checkpoint: &Checkpoint) -> Key {
        let mut hash = Sha256::new();
        hash.update(checkpoint.stamps());
        // How numbers are rounded is no part of the layout.
        hash.update(EXACT_NUMERICS);
        for part in &self.parts {
            hash.update(format!(
                "{}|{:?}|{:?}|{}\n",
                part.name, part.spec, part.format, part.offset
            ));
        }
        hash.finalize().into()
    }

    /// The packed matrices: found in `directory`, or packed now.
    ///
    /// # Errors
    /// [`TensorError`].
    pub fn load(
        self,
        checkpoint: &Checkpoint,
        directory: Option<&Path>,
        pool: &Pool,
        progress: &mut dyn FnMut(f32),
    ) -> Result<PackedWeights, TensorError> {
        let key = self.key(checkpoint);
        let mut pack = |image: &mut [u8]| -> Result<[u8; 32], TensorError> {
            // First, so that the pages it reads are still there for the packing.
            let value_hash = checkpoint.value_hash();
            checkpoint.forget_pages();
            for part in &self.parts {
                part.pack(checkpoint, pool, &mut image[part.offset..][..part.bytes])?;
                checkpoint.forget_pages();
                progress((part.offset + part.bytes) as f32 / self.bytes.max(1) as f32);
            }
            Ok(value_hash)
        };
        let segment = segment::open_or_pack(directory, &key, self.bytes, pool, &mut pack)?;
        let parts = self.parts.into_iter().map(|part| {
            let memory = Arc::clone(&segment.memory);
            let bytes = Bytes::shared(memory, segment.payload + part.offset, part.bytes);
            let packed =
                PackedLinear::from_bytes(part.format, part.spec.outputs, part.spec.inputs, bytes);
            (part.name, packed)
        });
        Ok(PackedWeights {
            parts: parts.collect(),
            value_hash: segment.value_hash,
            origin: segment.origin,
            bytes: self.bytes,
        })
    }
}

impl Part {
    fn pack(
        &self,
        checkpoint: &Checkpoint,
        pool: &Pool,
        image: &mut [u8],
    ) -> Result<(), TensorError> {
        let reader = checkpoint.linear(&self.spec)?;
        let row = |index: usize, row: &mut [f32]| reader.row(index, row);
        PackedLinear::pack_into(
            pool,
            self.format,
            self.spec.outputs,
            self.spec.inputs,
            &row,
            image,
        );
        Ok(())
    }
}

impl PackedWeights {
    /// Takes a matrix out.
    ///
    /// # Panics
    /// If the layout has none of this name, or it was taken before: a programming error.
    pub fn take(&mut self, name: &str) -> PackedLinear {
        self.parts
            .remove(name)
            .unwrap_or_else(|| panic!("no packed matrix {name}"))
    }

    /// Takes the embedding's matrix out.
    pub fn take_embedding(&mut self) -> PackedLinear {
        self.take(EMBEDDING)
    }
}

fn embedding_matrix(spec: &ModelSpec) -> LinearSpec {
    LinearSpec {
        inputs: spec.hidden_size,
        outputs: spec.vocab_size,
        weight: vec![WeightPart {
            tensor: spec.embedding.tokens.clone(),
            stored_outputs: spec.vocab_size,
            transposed: false,
            rows: RowPattern::range(0, spec.vocab_size),
        }],
        bias: Vec::new(),
    }
}
