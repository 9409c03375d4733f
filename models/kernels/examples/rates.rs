//! How fast the kernels are, beside what the machine could do at best.
//!
//! ```text
//! cargo run --release -p understudy-kernels --example rates [threads]
//! ```
//!
//! Products with few rows are bound by reading the weights: their GB/s stand beside the machine's plain reading rate. Products with many
//! rows are bound by arithmetic: GFLOP/s.

use std::hint::black_box;
use std::time::Instant;

use understudy_kernels::{BLOCK, Isa, KvBlocks, PackedLinear, Pool, RowPlace, WeightSlice, attend};

/// Median seconds of a call.
fn median(mut call: impl FnMut()) -> f64 {
    call();
    let mut seconds: Vec<f64> = (0..9)
        .map(|_| {
            let begun = Instant::now();
            call();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn reading_rate(pool: &Pool) -> f64 {
    let memory = vec![1_u64; 32 << 20];
    let parts = 64;
    let seconds = median(|| {
        pool.run(parts, &|part| {
            let slice = &memory[part * memory.len() / parts..(part + 1) * memory.len() / parts];
            black_box(slice.iter().fold(0, |sum: u64, value| sum ^ value));
        });
    });
    memory.len() as f64 * 8.0 / seconds / 1e9
}

fn products(pool: &Pool) {
    let (n, k, copies) = (1536, 576, 24);
    let wide: Vec<f32> = (0..n * k).map(|i| (i % 13) as f32 * 0.01).collect();
    let narrow: Vec<u16> = wide
        .iter()
        .map(|value| understudy_kernels::f32_to_bf16(*value))
        .collect();
    for (name, weights) in [
        ("f32", WeightSlice::F32(&wide)),
        ("bf16", WeightSlice::Bf16(&narrow)),
    ] {
        // Many copies, so that the caches do not hold them.
        let layers: Vec<PackedLinear> = (0..copies)
            .map(|_| PackedLinear::pack(weights, n, k))
            .collect();
        for rows in [1, 4, 8, 16, 32, 128] {
            let x = vec![0.5; rows * k];
            let mut y = vec![0.0; rows * n];
            let seconds = median(|| {
                layers
                    .iter()
                    .for_each(|layer| layer.forward(pool, &x, rows, &mut y))
            });
            let bytes: usize = layers.iter().map(PackedLinear::size_bytes).sum();
            println!(
                "product {name:<4} {rows:>4} rows: {:>6.1} GB/s of weights, {:>6.0} GFLOP/s",
                bytes as f64 / seconds / 1e9,
                2.0 * (rows * n * k * copies) as f64 / seconds / 1e9,
            );
        }
    }
}

fn attention(pool: &Pool) {
    let (kv_heads, heads, dim, length) = (3, 9, 64, 1024);
    let mut kv = KvBlocks::new(length / BLOCK, kv_heads, dim);
    let row = vec![0.1; kv_heads * dim];
    let table: Vec<u32> = (0..(length / BLOCK) as u32).collect();
    for position in 0..length {
        kv.write(table[position / BLOCK], position % BLOCK, &row, &row);
    }
    for rows in [1, 16, 256] {
        let places: Vec<RowPlace<'_>> = (length - rows..length)
            .map(|position| RowPlace {
                table: &table,
                position,
            })
            .collect();
        let q = vec![0.2; rows * heads * dim];
        let mut out = vec![0.0; q.len()];
        let seconds = median(|| attend(pool, &kv, &places, heads, &q, &mut out));
        let flops = 4.0 * (rows * heads * dim * length) as f64;
        println!(
            "attention over {length} keys, {rows:>4} rows: {:>8.1} us, {:>6.0} GFLOP/s",
            seconds * 1e6,
            flops / seconds / 1e9
        );
    }
}

fn main() {
    let threads = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    let pool = Pool::new(threads);
    println!("{} threads, {}", pool.threads(), Isa::best().name());
    println!("plain reading: {:.1} GB/s", reading_rate(&pool));
    products(&pool);
    attention(&pool);
}
