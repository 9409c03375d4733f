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

use serde_json::json;

/// The demo model's `config.json` for a vocabulary of `vocab_size` tokens, in spellings that transformers 4 and 5 both read.
pub fn config_json(vocab_size: usize) -> String {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": tokenizer::BOS,
        "eos_token_id": [tokenizer::END],
        "torch_dtype": "float32",
    });
    format!("{config:#}\n")
}

/// LibTorch's generator is the process's: tests that draw from it take turns.
#[cfg(test)]
pub(crate) fn random_numbers() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_configuration_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/config.json");
        let shipped = std::fs::read_to_string(path).unwrap();
        let text = tokenizer::build().unwrap();
        let size = tokenizer::load(&text).unwrap().get_vocab_size(true);
        assert_eq!(config_json(size), shipped);
    }
}
