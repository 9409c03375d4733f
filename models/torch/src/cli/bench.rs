//! `bench`: prefill and decode rates of a checkpoint, the runner alone: no sampling, no sockets.

use std::time::Instant;

use serde_json::json;
use understudy_engine_core::runner::{Chunk, ModelRunner, Slot};
use understudy_engine_core::server::ExitStatus;

use super::{Failure, ModelArgs};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Numbers of sequences to decode at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16])]
    sequences: Vec<usize>,
    /// Prompt tokens of each sequence
    #[arg(long, default_value_t = 64)]
    prompt_tokens: usize,
    /// Tokens to decode of each sequence
    #[arg(long, default_value_t = 128)]
    output_tokens: usize,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Measures and prints one row per number of sequences.
pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    let most = args.sequences.iter().copied().max().unwrap_or(1).max(1);
    let mut runner = args.model.load(most)?;
    for sequences in &args.sequences {
        let (prefill_s, decode_s) = measure(&mut runner, *sequences, args)?;
        let prefill = (sequences * args.prompt_tokens) as f64 / prefill_s;
        let decode = (sequences * args.output_tokens) as f64 / decode_s;
        if args.json {
            println!(
                "{}",
                json!({"sequences": sequences, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode})
            );
        } else {
            let step_ms = decode_s * 1e3 / args.output_tokens as f64;
            println!(
                "{sequences:>4} sequences: prefill {prefill:>9.0} tokens/s, decode {decode:>9.0} tokens/s ({step_ms:.2} ms a step)"
            );
        }
    }
    Ok(())
}

/// Seconds of prefill and of decode.
fn measure(
    runner: &mut dyn ModelRunner,
    sequences: usize,
    args: &BenchArgs,
) -> Result<(f64, f64), Failure> {
    let vocab = runner.info().vocab_size as u32;
    let token = |sequence: usize, position: usize| (sequence * 31 + position * 7) as u32 % vocab;
    let mut logits = Vec::new();
    let mut step = |start: usize, count: usize| -> Result<(), Failure> {
        let tokens: Vec<Vec<u32>> = (0..sequences)
            .map(|s| (start..start + count).map(|p| token(s, p)).collect())
            .collect();
        let chunks: Vec<Chunk<'_>> = tokens
            .iter()
            .enumerate()
            .map(|(s, tokens)| Chunk {
                slot: Slot(s as u32),
                start,
                tokens,
                logits_for: 1,
            })
            .collect();
        logits.clear();
        runner
            .execute(&chunks, &mut logits)
            .map_err(|error| Failure::of(ExitStatus::StepFailed, error))
    };
    step(0, args.prompt_tokens)?;
    let begun = Instant::now();
    step(0, args.prompt_tokens)?;
    let prefill_s = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    for position in args.prompt_tokens..args.prompt_tokens + args.output_tokens {
        step(position, 1)?;
    }
    Ok((prefill_s, begun.elapsed().as_secs_f64()))
}
