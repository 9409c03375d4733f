//! Whether the KV cache that a configuration asks for can be had, in numbers, before and when it is allocated.

use tch::Device;

use super::{LoadOptions, ModelError, main_type};
use crate::checkpoint::Checkpoint;
use crate::config::LlamaConfig;
use crate::device::device_name;
use crate::gpu;
use crate::runner::{ExactCache, StockCache};

/// What a cache takes, and what there is.
pub struct CacheSize {
    slots: usize,
    context_length: usize,
    needed_bytes: u64,
    /// `None` if the device does not say.
    memory_bytes: Option<u64>,
    device: Device,
}

impl CacheSize {
    /// The cache of `config.max_position_embeddings` positions in each slot.
    ///
    /// # Errors
    /// [`ModelError::Option`] if there is not even one slot.
    pub fn of(
        config: &LlamaConfig,
        options: &LoadOptions,
        device: Device,
        exact: bool,
        checkpoint: &Checkpoint,
    ) -> Result<Self, ModelError> {
        let (slots, context_length) = (options.max_sequences, config.max_position_embeddings);
        if slots == 0 {
            return Err(ModelError::Option(
                "at least one sequence must be allowed".to_owned(),
            ));
        }
        let needed_bytes = if exact {
            ExactCache::size_bytes(config, slots, context_length)
        } else {
            let dtype = main_type(options.dtype, checkpoint);
            StockCache::size_bytes(config, slots, context_length, dtype)
        };
        let memory_bytes = match device {
            Device::Cuda(index) => gpu::memory_bytes(index),
            _ => Some(machine_bytes()),
        };
        Ok(Self {
            slots,
            context_length,
            needed_bytes,
            memory_bytes,
            device,
        })
    }

    /// Physical memory is taken as positions are used, so a cache may be allocated and never fit: one that could not is refused before
    /// the first request.
    ///
    /// # Errors
    /// [`ModelError::CacheTooLarge`].
    pub fn check(&self) -> Result<(), ModelError> {
        match self.memory_bytes {
            Some(memory_bytes) if self.needed_bytes > memory_bytes => Err(self.too_large()),
            _ => Ok(()),
        }
    }

    /// The error for an allocation that has failed; weights and other processes take memory as well.
    pub fn refused(&self, reason: &str) -> ModelError {
        let is_memory = ["allocate", "out of memory"]
            .iter()
            .any(|words| reason.contains(words));
        if is_memory {
            self.too_large()
        } else {
            ModelError::LibTorch(reason.to_owned())
        }
    }

    fn too_large(&self) -> ModelError {
        let place = match self.device {
            Device::Cpu => "the machine".to_owned(),
            device => device_name(device),
        };
        let available = match self.memory_bytes {
            Some(bytes) => format!("{place} has {} MiB of memory in all", bytes >> 20),
            None => format!("{place} has less to give"),
        };
        ModelError::CacheTooLarge {
            slots: self.slots,
            context_length: self.context_length,
            needed_bytes: self.needed_bytes,
            available,
        }
    }
}

/// Physical memory.
fn machine_bytes() -> u64 {
    // SAFETY: plain queries.
    unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) as u64 * libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::StoredType;
    use crate::runner::StockCache;

    const GIB: u64 = 1 << 30;

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

    /// What people copy must fit a common GPU beside 2.5 GB of weights.
    #[test]
    fn the_profile_for_a_cluster_fits_a_gpu_of_16_gib() {
        let config = LlamaConfig::from_json(LLAMA_3_2_1B).unwrap();
        let slots = of_profile("max_sequences").expect("set in the profile");
        let positions = of_profile("context_length").unwrap_or(config.max_position_embeddings);
        let bytes = StockCache::size_bytes(&config, slots, positions, StoredType::Bf16);
        assert!(
            bytes <= 10 * GIB,
            "{} GiB for {slots} x {positions}",
            bytes / GIB
        );
        let whole = config.max_position_embeddings;
        let all = StockCache::size_bytes(&config, 32, whole, StoredType::Bf16);
        assert_eq!(all, 128 * GIB, "what it would be without context_length");
    }

    #[test]
    fn hostile_sizes_are_large_numbers() {
        let mut config = LlamaConfig::from_json(LLAMA_3_2_1B).unwrap();
        let most = i64::from(i32::MAX);
        (config.num_key_value_heads, config.head_dim) = (most, most - 1);
        config.num_hidden_layers = most as usize;
        let positions = usize::MAX / 2;
        assert_eq!(
            ExactCache::size_bytes(&config, positions, positions),
            u64::MAX
        );
        assert_eq!(
            StockCache::size_bytes(&config, positions, positions, StoredType::F32),
            u64::MAX
        );
    }
}
