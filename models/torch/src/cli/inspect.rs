//! `inspect`: what a checkpoint directory holds.

use serde_json::json;
use understudy_checkpoint::{Checkpoint, StoredType};
use understudy_engine_core::runner::BLOCK;
use understudy_engine_core::server::ExitStatus;
use understudy_torch::load::read_spec;
use understudy_torch::runner::BlockCache;

use super::Failure;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Checkpoint directory
    model: std::path::PathBuf,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Prints configuration, parameters and sizes.
pub fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let failed = |error: anyhow::Error| Failure::of(ExitStatus::LoadFailed, error);
    let checkpoint = Checkpoint::open(&args.model).map_err(|error| failed(error.into()))?;
    let spec = read_spec(&args.model, &checkpoint).map_err(|error| failed(error.into()))?;
    // Each tensor's count fits a u64 (checked with the header), all of them together need not.
    let parameters: u128 = checkpoint
        .entries()
        .map(|(_, _, shape, _)| u128::from(shape.iter().product::<u64>()))
        .sum();
    let bytes: usize = checkpoint.entries().map(|(_, _, _, bytes)| bytes).sum();
    let hash: String = checkpoint
        .value_hash()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let main_type = checkpoint.main_type().unwrap_or(StoredType::F32);
    let kv_bytes = BlockCache::block_bytes(&spec, main_type.size_bytes()) / BLOCK;
    let config = std::fs::read(args.model.join("config.json")).map_err(Failure::other)?;
    let config: serde_json::Value = serde_json::from_slice(&config).map_err(Failure::other)?;
    let summary = json!({
        "architecture": spec.architecture,
        "generates": spec.generates(),
        "layers": spec.layers.len(),
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "context_length": spec.context_length,
        "dtype": main_type.name(),
    });
    if args.json {
        let tensors: Vec<_> = checkpoint
            .entries()
            .map(|(name, dtype, shape, bytes)| json!({"name": name, "dtype": dtype, "shape": shape, "bytes": bytes}))
            .collect();
        let object = json!({
            "model": summary,
            "config": config,
            "parameters": u64::try_from(parameters).unwrap_or(u64::MAX),
            "weight_bytes": bytes,
            "weight_hash": hash,
            "kv_bytes_per_position": kv_bytes,
            "tensors": tensors,
        });
        println!("{object}");
        return Ok(());
    }
    for (key, value) in summary.as_object().into_iter().flatten() {
        println!(
            "{:<22} {}",
            key.replace('_', " "),
            value.to_string().trim_matches('"')
        );
    }
    println!("parameters             {parameters}");
    println!(
        "weights                {:.1} MB in {} tensors",
        bytes as f64 / 1e6,
        checkpoint.entries().count()
    );
    println!("weight hash            {hash}");
    println!("KV cache               {kv_bytes} bytes per position");
    println!("configuration          {config:#}");
    if args.tensors {
        for (name, dtype, shape, bytes) in checkpoint.entries() {
            println!("{name:<60} {dtype:<5} {shape:?} {bytes} bytes");
        }
    }
    Ok(())
}
