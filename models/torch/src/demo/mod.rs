//! The demo model: the data that it learns, its tokenizer, its training and its examination.
//!
//! Invariant: everything is a function of a seed. The tasks have answers that a program can check, and items whose
//! key falls into the held-out tenth (see [`tasks::held_out`]) never occur in training.

pub mod batch;
pub mod dialogue;
pub mod eval;
pub mod optimizer;
pub mod plan;
pub mod tasks;
pub mod tokenizer;
pub mod train;
pub mod weights;

pub use eval::{EvalArgs, eval};
pub use train::{TrainArgs, train};

use crate::config::{LlamaConfig, RopeScaling, WeightType};

/// The demo model's architecture for a vocabulary of `vocab_size` tokens.
pub fn model_config(vocab_size: i64) -> LlamaConfig {
    LlamaConfig {
        vocab_size,
        hidden_size: 192,
        intermediate_size: 512,
        num_hidden_layers: 4,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 32,
        max_position_embeddings: 1024,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: true,
        attention_bias: false,
        mlp_bias: false,
        bos_token_id: Some(tokenizer::BOS),
        eos_token_ids: vec![tokenizer::END],
        weight_type: Some(WeightType::F32),
    }
}

/// LibTorch's generator is the process's: tests that draw from it take turns.
#[cfg(test)]
pub(crate) fn random_numbers() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
