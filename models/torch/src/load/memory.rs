//! How many KV blocks fit a budget, and how much memory there is to take it from.

use tch::Device;
use understudy_engine_core::runner::BLOCK;

use super::ModelError;
use crate::device::device_name;
use crate::gpu;
use crate::options::KvMemory;

/// What sequences need, and where.
#[derive(Debug, Clone, Copy)]
pub struct KvDemand {
    pub block_bytes: usize,
    pub context_length: usize,
    pub max_sequences: usize,
    pub device: Device,
}

impl KvDemand {
    /// How many blocks `budget` holds; never more than all sequences could fill, plus one context's for prefixes that are kept.
    ///
    /// # Errors
    /// [`ModelError::KvMemory`] if not even one sequence of the whole context fits, or the budget is more than there is.
    pub fn blocks(&self, budget: KvMemory, available_bytes: u64) -> Result<usize, ModelError> {
        let budget_bytes = match budget {
            KvMemory::Fraction(fraction) => (available_bytes as f64 * fraction) as u64,
            KvMemory::Bytes(bytes) => bytes,
        };
        let context = self.context_length.div_ceil(BLOCK) as u64;
        let fit = budget_bytes / self.block_bytes.max(1) as u64;
        if fit < context || budget_bytes > available_bytes {
            return Err(ModelError::KvMemory {
                needed_bytes: context.saturating_mul(self.block_bytes as u64),
                context_length: self.context_length,
                budget_bytes,
                available_bytes,
                device: device_name(self.device),
            });
        }
        let useful = context.saturating_mul((self.max_sequences as u64).saturating_add(1));
        // Block numbers have 32 bits.
        Ok(fit.min(useful).min(u64::from(u32::MAX)) as usize)
    }
}

/// Bytes that may still be taken on a device; before anything was put there, all that it has.
#[must_use]
pub fn available_bytes(device: Device) -> u64 {
    match device {
        Device::Cuda(index) => gpu::free_bytes(index)
            .or_else(|| gpu::memory_bytes(index))
            .unwrap_or(u64::MAX),
        _ => understudy_cpu::memory::available_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use understudy_checkpoint::families;

    use super::*;
    use crate::runner::BlockCache;

    const DEMAND: KvDemand = KvDemand {
        block_bytes: 1000,
        context_length: 100,
        max_sequences: 4,
        device: Device::Cpu,
    };
    const GIB: u64 = 1 << 30;

    #[test]
    fn a_budget_buys_blocks_up_to_what_is_of_use() {
        assert_eq!(DEMAND.blocks(KvMemory::Bytes(9_999), 20_000).unwrap(), 9);
        assert_eq!(DEMAND.blocks(KvMemory::Fraction(0.5), 20_000).unwrap(), 10);
        assert_eq!(DEMAND.blocks(KvMemory::Fraction(1.0), 1 << 40).unwrap(), 35);
    }

    #[test]
    fn less_than_one_context_or_more_than_there_is_is_refused_with_numbers() {
        for budget in [
            KvMemory::Bytes(6_999),
            KvMemory::Fraction(0.3),
            KvMemory::Bytes(30_000),
        ] {
            let error = DEMAND.blocks(budget, 20_000).unwrap_err().to_string();
            for part in ["100 positions", "kv_memory", "cpu"] {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_bytes(Device::Cpu) > 1 << 20);
    }

    /// meta-llama/Llama-3.2-1B, as published.
    const LLAMA_3_2_1B: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072}"#;

    /// The number behind `key =` in the model's part of the shipped profile.
    fn of_profile(key: &str) -> Option<usize> {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../config/profiles/cluster.toml"
        );
        let text = std::fs::read_to_string(path).unwrap();
        let model = text
            .split("[[model]]")
            .find(|part| part.contains("llama-3.2-1b"))
            .expect("the profile serves this model");
        model.lines().find_map(|line| {
            let value = line.strip_prefix(key)?.trim_start().strip_prefix('=')?;
            value.split('#').next()?.trim().parse().ok()
        })
    }

    /// What people copy must fit a common GPU beside 2.5 GB of weights, every sequence at its longest.
    #[test]
    fn the_profile_for_a_cluster_fits_a_gpu_of_16_gib() {
        let spec = families::from_json(LLAMA_3_2_1B).unwrap();
        let max_sequences = of_profile("max_sequences").expect("set in the profile");
        let demand = KvDemand {
            block_bytes: BlockCache::block_bytes(&spec, 2),
            context_length: of_profile("context_length").unwrap_or(spec.context_length),
            max_sequences,
            device: Device::Cuda(0),
        };
        let blocks = demand.blocks(KvMemory::Bytes(10 * GIB), 13 * GIB).unwrap();
        let all = demand.context_length.div_ceil(BLOCK) * max_sequences;
        assert!(blocks >= all, "{blocks} of {all}");
        // A block of a position's 2 * 8 * 64 elements of 2 bytes in 16 layers.
        assert_eq!(demand.block_bytes, 16 * 2 * 8 * 64 * 2 * 16);
    }

    #[test]
    fn hostile_sizes_are_large_numbers() {
        let mut spec = families::from_json(LLAMA_3_2_1B).unwrap();
        for layer in &mut spec.layers {
            layer.attention.kv_heads = usize::MAX / 2;
        }
        assert_eq!(BlockCache::block_bytes(&spec, 4), usize::MAX);
        let demand = KvDemand {
            block_bytes: usize::MAX,
            context_length: usize::MAX,
            max_sequences: usize::MAX,
            device: Device::Cpu,
        };
        assert!(demand.blocks(KvMemory::Fraction(1.0), u64::MAX).is_err());
    }
}
