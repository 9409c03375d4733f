//! The numeric fingerprint: what must be equal for one engine to go on with another's log.
//!
//! Always in it: the weights' values, the tokenizer, the sizes, how weights were rounded, the sampler's version. Then whose arithmetic:
//!
//! * exact: our kernels' version. Equal fingerprints mean equal bits, on any CPU and with any number of threads.
//! * stock: a *class* of hardware, since no two runs of these operators need give equal bits even on one device: the GPU's model (or the
//!   CPU's instruction set), the element type, LibTorch's release. Not which of a host's GPUs, nor how many threads: engines that differ in
//!   those alone stand in for each other. What their numbers may differ by is bounded at the replay ([`understudy_engine_core::replay`]).

use sha2::{Digest, Sha256};
use tch::Device;
use understudy_engine_core::sampler::SAMPLING_NUMERICS;
use understudy_kernels::Isa;

use crate::checkpoint::{Checkpoint, StoredType};
use crate::config::LlamaConfig;

/// Raised whenever a change to a kernel or a layer changes bits.
const EXACT_NUMERICS: &str = "exact-1";

/// Whose arithmetic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arithmetic {
    /// Our kernels.
    Exact,
    /// LibTorch's operators.
    Stock {
        /// Such as `NVIDIA H100 80GB HBM3` or `x86_64 avx2`.
        hardware: String,
        /// In which everything is computed.
        dtype: StoredType,
        /// LibTorch's release.
        libtorch: String,
    },
}

impl Arithmetic {
    /// The class of a device; `gpu_name` tells a GPU's model by its index.
    pub fn stock(
        device: Device,
        dtype: StoredType,
        libtorch: String,
        gpu_name: impl Fn(usize) -> Option<String>,
    ) -> Self {
        let hardware = match device {
            Device::Cuda(index) => gpu_name(index).unwrap_or_else(|| "a GPU".to_owned()),
            _ => format!("{} {}", std::env::consts::ARCH, Isa::best().name()),
        };
        Self::Stock {
            hardware,
            dtype,
            libtorch,
        }
    }

    /// What stands in front of the hash, for people.
    fn family(&self) -> String {
        match self {
            Self::Exact => EXACT_NUMERICS.to_owned(),
            Self::Stock { libtorch, .. } => format!("libtorch-{libtorch}"),
        }
    }

    fn update(&self, hash: &mut Sha256) {
        // Lengths keep neighbouring texts apart.
        let mut text = |text: &str| hash.update(format!("{}:{text}", text.len()));
        text(&self.family());
        if let Self::Stock {
            hardware, dtype, ..
        } = self
        {
            text(hardware);
            text(dtype.name());
        }
    }
}

/// The fingerprint of a loaded model. `kept` tells the width in which a matrix that is stored in the given one is kept;
/// `tokenizer_hash` is empty where there is no tokenizer.
pub fn fingerprint(
    checkpoint: &Checkpoint,
    config: &LlamaConfig,
    tokenizer_hash: &str,
    arithmetic: &Arithmetic,
    kept: impl Fn(StoredType) -> StoredType,
) -> String {
    let mut hash = Sha256::new();
    hash.update(checkpoint.value_hash());
    hash.update(tokenizer_hash);
    // The slots' length is no property of the arithmetic.
    let sizes = LlamaConfig {
        max_position_embeddings: 1,
        ..config.clone()
    };
    hash.update(sizes.to_json());
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
    format!("{}-{hex}", arithmetic.family())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h100(index: usize) -> Option<String> {
        (index < 2).then(|| "NVIDIA H100 80GB HBM3".to_owned())
    }

    fn print(arithmetic: &Arithmetic) -> String {
        let golden =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/f32_gqa_tied");
        let checkpoint = Checkpoint::open(&golden).unwrap();
        let config = LlamaConfig::from_file(&golden.join("config.json")).unwrap();
        fingerprint(&checkpoint, &config, "", arithmetic, |stored| stored)
    }

    #[test]
    fn engines_on_equal_gpus_stand_in_for_each_other() {
        let on = |index| {
            let device = Device::Cuda(index);
            print(&Arithmetic::stock(
                device,
                StoredType::Bf16,
                "2.11.0".to_owned(),
                h100,
            ))
        };
        assert_eq!(on(0), on(1));
        assert_ne!(on(0), on(2), "a GPU of another model");
        assert!(on(0).starts_with("libtorch-2.11.0-"), "{}", on(0));
    }

    #[test]
    fn hardware_type_and_release_are_told_apart() {
        let stock = |device, dtype, libtorch: &str| {
            print(&Arithmetic::stock(device, dtype, libtorch.to_owned(), h100))
        };
        let mut all = vec![
            print(&Arithmetic::Exact),
            stock(Device::Cuda(0), StoredType::Bf16, "2.11.0"),
            stock(Device::Cuda(0), StoredType::F16, "2.11.0"),
            stock(Device::Cuda(0), StoredType::Bf16, "2.11.1"),
            stock(Device::Cpu, StoredType::Bf16, "2.11.0"),
        ];
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 5, "{all:?}");
    }
}
