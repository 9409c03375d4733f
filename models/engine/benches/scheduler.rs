//! What scheduling and sampling cost by themselves: `cargo bench -p understudy-engine-core --bench scheduler`.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use understudy_engine_core::{
    blocks::{BlockHash, BlockManager, Content},
    frame::{AttemptId, SamplingParams, StartAttempt},
    mask,
    runner::{BLOCK, BlockId, Chunk, ModelInfo, ModelRunner, StepError},
    sampler::{SampleInput, Sampler},
    scheduler::{Scheduler, SchedulerOptions},
};

const SEQUENCES: usize = 256;
/// Few, so that sampling costs next to nothing.
const TINY_VOCAB: usize = 16;
const VOCAB: usize = 49_152;
/// Steps after which the sequences begin anew, so that they keep a usual length.
const STEPS: u64 = 512;

/// A model that says the same whatever it is given.
struct Null {
    info: ModelInfo,
}

impl Null {
    fn new() -> Self {
        let info = ModelInfo {
            architecture: "Null".to_owned(),
            context_length: 8192,
            vocab_size: TINY_VOCAB,
            eos_token_ids: vec![],
            device: "null".to_owned(),
            dtype: "f32".to_owned(),
            max_sequences: SEQUENCES,
            kv_blocks: SEQUENCES * 100,
            kv_block_bytes: 1,
            fingerprint: "null".to_owned(),
            exact: true,
        };
        Self { info }
    }
}

impl ModelRunner for Null {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn execute(&mut self, chunks: &[Chunk<'_>], logits: &mut Vec<f32>) -> Result<(), StepError> {
        let rows: usize = chunks.iter().map(|chunk| chunk.logits_for).sum();
        logits.resize(rows * TINY_VOCAB, 0.5);
        Ok(())
    }

    fn copy_block(&mut self, _from: BlockId, _to: BlockId) -> Result<(), StepError> {
        Ok(())
    }

    fn export_block(&mut self, _block: BlockId, out: &mut Vec<u8>) -> Result<(), StepError> {
        out.push(0);
        Ok(())
    }

    fn import_block(&mut self, _block: BlockId, _bytes: &[u8]) -> Result<(), StepError> {
        Ok(())
    }
}

fn decoding(runner: &Null, speculate: u32) -> Scheduler {
    let options = SchedulerOptions {
        max_waiting: 0,
        step_tokens: 4096,
    };
    let mut scheduler = Scheduler::new(runner.info(), options);
    for request in 0..SEQUENCES as u128 {
        let start = StartAttempt {
            attempt: AttemptId { request, epoch: 1 },
            prompt: (0..500)
                .map(|index| (index * (request as u32 + 7)) % 13)
                .collect(),
            sampling: SamplingParams {
                max_tokens: 8000,
                speculate,
                ..SamplingParams::default()
            },
            ..StartAttempt::default()
        };
        scheduler.start(start).expect("it fits");
    }
    scheduler
}

fn step(c: &mut Criterion) {
    let mut runner = Null::new();
    for (name, speculate) in [("step/256 decodes", 0), ("step/256 decodes, drafts", 4)] {
        c.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut elapsed = Duration::ZERO;
                let mut left = iterations;
                while left > 0 {
                    let mut scheduler = decoding(&runner, speculate);
                    // Until all prompts are computed, and memory is found.
                    for _ in 0..40 {
                        let outcome = scheduler.step(&mut runner).expect("no fault");
                        scheduler.recycle(outcome.expect("work"));
                    }
                    let steps = left.min(STEPS);
                    let begins = Instant::now();
                    for _ in 0..steps {
                        let outcome = scheduler.step(&mut runner).expect("no fault");
                        scheduler.recycle(black_box(outcome.expect("work")));
                    }
                    elapsed += begins.elapsed();
                    left -= steps;
                }
                elapsed
            });
        });
    }
}

fn blocks(c: &mut Criterion) {
    let root = BlockHash::root("bench", 0);
    let mut tokens = [7; BLOCK];
    c.bench_function("blocks/hash", |bencher| {
        bencher.iter(|| black_box(root).child(black_box(&tokens)));
    });
    let mut blocks = BlockManager::new(4096);
    c.bench_function("blocks/allocate and free", |bencher| {
        bencher.iter(|| {
            let block = blocks.allocate().expect("free");
            blocks.release(black_box(block));
        });
    });
    c.bench_function("blocks/allocate, register, free, evict", |bencher| {
        bencher.iter(|| {
            tokens[0] = tokens[0].wrapping_add(1);
            let content = Content {
                hash: root.child(&tokens),
                parent: root,
                tokens,
            };
            let block = blocks.allocate().expect("free or cached");
            blocks.register(block, content);
            blocks.release(block);
        });
    });
}

fn sampler(c: &mut Criterion) {
    let logits: Vec<f32> = (0..VOCAB as u32)
        .map(|id| (id.wrapping_mul(2_654_435_761) >> 16) as f32 / 4096.0 - 8.0)
        .collect();
    let greedy = SamplingParams::default();
    let top_p = SamplingParams {
        temperature: 0.8,
        top_p: 0.95,
        seed: 1,
        ..SamplingParams::default()
    };
    let biased = SamplingParams {
        logit_bias: (0..300).map(|id| (id * 100, 1.5)).collect(),
        ..SamplingParams::default()
    };
    let half: Vec<u32> = (0..VOCAB as u32).filter(|id| id % 3 == 0).collect();
    let half = mask::bitmap_of(&half, VOCAB);
    let cases = [
        ("greedy", &greedy, None),
        ("greedy, mask", &greedy, Some(half.as_slice())),
        ("greedy, bias of 300", &biased, None),
        ("top-p", &top_p, None),
        ("top-p, mask", &top_p, Some(half.as_slice())),
    ];
    let mut sampler = Sampler::new();
    for (name, params, mask) in cases {
        let mut position = 0;
        c.bench_function(&format!("sampler/{name}"), |bencher| {
            bencher.iter(|| {
                position += 1;
                let input = SampleInput {
                    logits: &logits,
                    params,
                    history: None,
                    suppressed: &[],
                    mask,
                    position,
                };
                sampler.sample(black_box(input))
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = step, blocks, sampler
}
criterion_main!(benches);
