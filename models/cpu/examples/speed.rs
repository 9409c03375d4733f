//! Rates of a checkpoint, with where the time goes: `cargo run --release -p understudy-cpu --example speed -- DIR [quantize] [dtype]`.

use std::time::Instant;

use understudy_cpu::{LoadOptions, load};
use understudy_engine_core::runner::{Chunk, ModelRunner};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let options = LoadOptions {
        threads: 2,
        max_sequences: 32,
        context_length: Some(1024),
        quantize: args.get(2).map_or(Default::default(), |q| q.parse().unwrap()),
        dtype: args.get(3).map_or(Default::default(), |q| q.parse().unwrap()),
        ..LoadOptions::default()
    };
    let begun = Instant::now();
    let (mut runner, report) = load(std::path::Path::new(&args[1]), &options, &mut |_| {}).unwrap();
    println!("loaded in {:?}: {report:?}", begun.elapsed());
    let blocks = 64;
    let tables: Vec<Vec<u32>> = (0..32).map(|s| (s * blocks..(s + 1) * blocks).collect()).collect();
    let mut logits = Vec::new();
    for (streams, prompt, output) in [(1, 64, 64), (4, 64, 64), (8, 64, 64), (16, 64, 48), (32, 64, 32), (1, 512, 1)] {
        let mut step = |runner: &mut dyn ModelRunner, start: usize, count: usize| {
            let tokens: Vec<Vec<u32>> = (0..streams)
                .map(|s| (start..start + count).map(|p| ((s * 31 + p * 7) % 1000) as u32).collect())
                .collect();
            let chunks: Vec<Chunk<'_>> = tokens
                .iter()
                .zip(&tables)
                .map(|(tokens, table)| Chunk { table, start, tokens, logits_for: 1 })
                .collect();
            logits.clear();
            runner.execute(&chunks, &mut logits).unwrap();
        };
        step(&mut runner, 0, prompt);
        runner.take_breakdown();
        let begun = Instant::now();
        step(&mut runner, 0, prompt);
        let prefill = (streams * prompt) as f64 / begun.elapsed().as_secs_f64();
        let first = runner.take_breakdown();
        let begun = Instant::now();
        for position in prompt..prompt + output {
            step(&mut runner, position, 1);
        }
        let decode = (streams * output) as f64 / begun.elapsed().as_secs_f64();
        println!("{streams:>3} x {prompt}: prefill {prefill:.0}/s, decode {decode:.0}/s");
        println!("    prefill {first:?}\n    decode {:?}", runner.take_breakdown());
    }
}
