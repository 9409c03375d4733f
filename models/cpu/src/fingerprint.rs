//! The numeric fingerprint: what must be equal for one engine to go on with another's log.
//!
//! Always in it: the weights' values, the tokenizer, what is computed with them, how weights were rounded, the sampler's version. Then whose
//! arithmetic, which the executor states: exact kernels by their version (equal fingerprints mean equal bits, on any CPU and with any number
//! of threads), LibTorch's operators by a *class* of hardware. No two runs of those need give equal bits even on one device, so the class is
//! the GPU's model (or the CPU's instruction set), the element type, and LibTorch's release; not which of a host's GPUs, nor how many
//! threads: engines that differ in those alone stand in for each other. What their numbers may differ by is bounded at the replay
//! ([`understudy_engine_core::replay`]).

use sha2::{Digest, Sha256};
use understudy_checkpoint::{Checkpoint, ModelSpec, StoredType};
use understudy_engine_core::sampler::SAMPLING_NUMERICS;
use understudy_kernels::KvFormat;

use crate::options::Quantize;

/// Raised whenever a change to a kernel or to the order of a model's operations changes bits.
pub const EXACT_NUMERICS: &str = "exact-2";

/// Whose arithmetic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arithmetic {
    /// Stands in front of the hash, for people: `exact-1`, `libtorch-2.11.0`.
    pub family: String,
    /// What else must be equal, such as `NVIDIA H100 80GB HBM3` and `bf16`.
    pub class: Vec<String>,
}

impl Arithmetic {
    /// Our kernels: what is not rounded as stored is told apart.
    #[must_use]
    pub fn exact(quantize: Quantize, kv: KvFormat) -> Self {
        let mut class = Vec::new();
        if quantize != Quantize::None {
            class.push(format!("{quantize:?}"));
        }
        if kv != KvFormat::F32 {
            class.push(format!("kv {kv:?}"));
        }
        Self {
            family: EXACT_NUMERICS.to_owned(),
            class,
        }
    }

    /// LibTorch's operators; `hardware` is such as `NVIDIA H100 80GB HBM3` or `x86_64 avx2`, `dtype` that in which everything is computed.
    #[must_use]
    pub fn stock(hardware: String, dtype: StoredType, libtorch: &str) -> Self {
        Self {
            family: format!("libtorch-{libtorch}"),
            class: vec![hardware, dtype.name().to_owned()],
        }
    }

    fn update(&self, hash: &mut Sha256) {
        for text in std::iter::once(&self.family).chain(&self.class) {
            // Lengths keep neighbouring texts apart.
            hash.update(format!("{}:{text}", text.len()));
        }
    }
}

/// The fingerprint of a loaded model. `value_hash` is the checkpoint's; `kept` tells the width in which a matrix that is stored in the given one is kept;
/// `tokenizer_hash` is empty where there is no tokenizer.
pub fn fingerprint(
    value_hash: &[u8; 32],
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    tokenizer_hash: &str,
    arithmetic: &Arithmetic,
    kept: impl Fn(StoredType) -> StoredType,
) -> String {
    let mut hash = Sha256::new();
    hash.update(value_hash);
    hash.update(tokenizer_hash);
    // How long a context an engine allows is no property of the arithmetic.
    let computed = ModelSpec {
        context_length: 1,
        ..spec.clone()
    };
    hash.update(format!("{computed:?}"));
    for (name, dtype, shape, _) in checkpoint.entries() {
        let Some(stored) = StoredType::of(dtype).filter(|_| shape.len() > 1) else {
            continue;
        };
        // Widening is exact, so it leaves the fingerprint alone; narrowing rounds, each matrix by itself.
        let kept = kept(stored);
        if kept != stored && kept != StoredType::F32 {
            hash.update(format!("{name}\0{}\0", kept.name()));
        }
    }
    hash.update(SAMPLING_NUMERICS);
    arithmetic.update(&mut hash);
    let hex: String = hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{}-{hex}", arithmetic.family)
}

#[cfg(test)]
mod tests {
    use understudy_checkpoint::families;

    use super::*;

    fn print(arithmetic: &Arithmetic, change: impl FnOnce(&mut ModelSpec)) -> String {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../cpu/tests/golden/f32_gqa_tied");
        let checkpoint = Checkpoint::open(&golden).unwrap();
        let mut spec = families::read(&golden).unwrap();
        change(&mut spec);
        fingerprint(
            &checkpoint.value_hash(),
            &checkpoint,
            &spec,
            "",
            arithmetic,
            |stored| stored,
        )
    }

    #[test]
    fn hardware_type_and_release_are_told_apart() {
        let stock = |hardware: &str, dtype, libtorch| {
            print(
                &Arithmetic::stock(hardware.to_owned(), dtype, libtorch),
                |_| {},
            )
        };
        let h100 = "NVIDIA H100 80GB HBM3";
        let mut all = vec![
            stock(h100, StoredType::Bf16, "2.11.0"),
            stock(h100, StoredType::F16, "2.11.0"),
            stock(h100, StoredType::Bf16, "2.11.1"),
            stock("x86_64 avx2", StoredType::Bf16, "2.11.0"),
        ];
        assert!(all[0].starts_with("libtorch-2.11.0-"), "{}", all[0]);
        assert_eq!(all[0], stock(h100, StoredType::Bf16, "2.11.0"));
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 4, "{all:?}");
    }

    #[test]
    fn what_is_computed_counts_and_how_long_it_may_be_does_not() {
        let arithmetic = Arithmetic::stock("a GPU".to_owned(), StoredType::F32, "2.11.0");
        let plain = print(&arithmetic, |_| {});
        assert_eq!(plain, print(&arithmetic, |spec| spec.context_length = 7));
        let windowed = print(&arithmetic, |spec| {
            spec.layers[0].attention.window = Some(4);
        });
        assert_ne!(plain, windowed);
    }
}
