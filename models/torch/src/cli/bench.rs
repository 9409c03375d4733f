//! `bench`: prefill and decode rates of a checkpoint, the runner alone: no sampling, no sockets.

use std::time::Instant;

use serde_json::json;
use understudy_engine_core::breakdown::{Breakdown, Measured};
use understudy_engine_core::runner::{BLOCK, BlockId, Chunk};
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
    /// Also where a decoding step's time goes (measured apart: watching a device slows it)
    #[arg(long)]
    breakdown: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Steps that are watched for the breakdown.
const WATCHED_STEPS: usize = 16;

/// Measures and prints one row per number of sequences.
pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    let most = args.sequences.iter().copied().max().unwrap_or(1).max(1);
    let mut runner = args.model.load(most)?;
    for sequences in &args.sequences {
        let mut work = Work::new(&mut *runner, *sequences, args)?;
        let (prefill_s, decode_s) = work.rates()?;
        let breakdown = match args.breakdown {
            true => work.breakdown()?,
            false => None,
        };
        let prefill = (sequences * args.prompt_tokens) as f64 / prefill_s;
        let decode = (sequences * args.output_tokens) as f64 / decode_s;
        if args.json {
            let mut row = json!({"sequences": sequences, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode});
            if let Some(breakdown) = breakdown {
                row["breakdown"] = json!(breakdown);
            }
            println!("{row}");
            continue;
        }
        let step_ms = decode_s * 1e3 / args.output_tokens as f64;
        println!(
            "{sequences:>4} sequences: prefill {prefill:>9.0} tokens/s, decode {decode:>9.0} tokens/s ({step_ms:.2} ms a step)"
        );
        if let Some(parts) = breakdown {
            println!(
                "     of which in ms: matmul {:.2}, attention {:.2}, norms {:.2}, embedding {:.2}, other {:.2}",
                parts.matmul, parts.attention, parts.norms, parts.embedding, parts.other
            );
        }
    }
    Ok(())
}

/// So many sequences of made-up tokens.
struct Work<'a> {
    runner: &'a mut dyn Measured,
    tables: Vec<Vec<BlockId>>,
    prompt_tokens: usize,
    output_tokens: usize,
    logits: Vec<f32>,
}

impl<'a> Work<'a> {
    fn new(
        runner: &'a mut dyn Measured,
        sequences: usize,
        args: &BenchArgs,
    ) -> Result<Self, Failure> {
        let info = runner.info();
        let positions = args.prompt_tokens + args.output_tokens;
        let each = positions.div_ceil(BLOCK);
        let usage = |reason: String| Failure::of(ExitStatus::Usage, anyhow::anyhow!(reason));
        if args.prompt_tokens == 0 || args.output_tokens == 0 || sequences == 0 {
            return Err(usage("sequences and tokens must be at least 1".to_owned()));
        }
        if positions > info.context_length {
            return Err(usage(format!(
                "{positions} positions are more than the context of {}",
                info.context_length
            )));
        }
        if each * sequences > info.kv_blocks {
            return Err(usage(format!(
                "{sequences} sequences of {positions} positions take {} blocks, but the KV cache has {}; raise --kv-memory",
                each * sequences,
                info.kv_blocks
            )));
        }
        let table =
            |sequence: usize| (sequence * each..(sequence + 1) * each).map(|b| b as BlockId);
        Ok(Self {
            tables: (0..sequences).map(|s| table(s).collect()).collect(),
            runner,
            prompt_tokens: args.prompt_tokens,
            output_tokens: args.output_tokens,
            logits: Vec::new(),
        })
    }

    /// One step of all sequences.
    fn step(&mut self, start: usize, count: usize) -> Result<(), Failure> {
        let vocab = self.runner.info().vocab_size as u32;
        let token =
            |sequence: usize, position: usize| (sequence * 31 + position * 7) as u32 % vocab;
        let tokens: Vec<Vec<u32>> = (0..self.tables.len())
            .map(|s| (start..start + count).map(|p| token(s, p)).collect())
            .collect();
        let chunks = self.tables.iter().zip(&tokens);
        let chunks: Vec<Chunk<'_>> = chunks
            .map(|(table, tokens)| Chunk {
                table,
                start,
                tokens,
                logits_for: 1,
            })
            .collect();
        self.logits.clear();
        self.runner
            .execute(&chunks, &mut self.logits)
            .map_err(|error| Failure::of(ExitStatus::StepFailed, error))
    }

    fn decode(&mut self, steps: usize) -> Result<(), Failure> {
        let first = self.prompt_tokens;
        (first..first + steps).try_for_each(|position| self.step(position, 1))
    }

    /// Seconds of prefill and of decode.
    fn rates(&mut self) -> Result<(f64, f64), Failure> {
        self.step(0, self.prompt_tokens)?;
        let begun = Instant::now();
        self.step(0, self.prompt_tokens)?;
        let prefill_s = begun.elapsed().as_secs_f64();
        // A first step of a kind takes longer: kernels are chosen and memory is had.
        self.decode(1)?;
        let begun = Instant::now();
        self.decode(self.output_tokens)?;
        Ok((prefill_s, begun.elapsed().as_secs_f64()))
    }

    fn breakdown(&mut self) -> Result<Option<Breakdown>, Failure> {
        self.runner.measure(true);
        self.decode(self.output_tokens.min(WATCHED_STEPS))?;
        let found = self.runner.breakdown();
        self.runner.measure(false);
        Ok(found)
    }
}
