//! How fast the kernels are, beside what the machine could do at best.
//!
//! ```text
//! cargo run --release -p understudy-kernels --example rates [threads]
//! ```
//!
//! Products with few rows are bound by reading the weights; with many rows, by arithmetic.

use std::hint::black_box;
use std::time::Instant;

use understudy_kernels::{
    Attend, BLOCK, Isa, KvBlocks, PackedLinear, Pool, RowPlace, WeightFormat, attend,
};

/// Median and smallest seconds of a call.
fn timed(mut call: impl FnMut()) -> (f64, f64) {
    call();
    let mut seconds: Vec<f64> = (0..9)
        .map(|_| {
            let begun = Instant::now();
            call();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    (seconds[seconds.len() / 2], seconds[0])
}

fn median(call: impl FnMut()) -> f64 {
    timed(call).0
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

/// A model's products: 30 layers and a head, shaped like a model of 135 million parameters.
struct Products {
    layers: Vec<PackedLinear>,
    head: PackedLinear,
}

impl Products {
    fn new(pool: &Pool, format: WeightFormat) -> Self {
        let pack = |n: usize, k: usize| {
            let source = |output: usize, row: &mut [f32]| {
                for (i, value) in row.iter_mut().enumerate() {
                    *value = ((output * 7 + i * 13) % 101) as f32 * 0.002 - 0.1;
                }
            };
            PackedLinear::pack_rows(pool, format, n, k, &source)
        };
        let layer = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
        Self {
            layers: (0..30)
                .flat_map(|_| layer.map(|(n, k)| pack(n, k)))
                .collect(),
            head: pack(49_152, 576),
        }
    }

    /// One step of `rows` rows, of which `head_rows` want logits.
    fn step(&self, pool: &Pool, rows: usize, head_rows: usize, x: &[f32], y: &mut [f32]) {
        for layer in &self.layers {
            let (k, n) = (layer.in_features(), layer.out_features());
            layer.forward(pool, &x[..rows * k], rows, &mut y[..rows * n]);
        }
        let (k, n) = (self.head.in_features(), self.head.out_features());
        self.head.forward(
            pool,
            &x[..head_rows * k],
            head_rows,
            &mut y[..head_rows * n],
        );
    }
}

/// Tokens per second of the products alone: the median step, and the fastest one for a machine that others use too.
fn products(pool: &Pool) {
    let counts = [(1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (512, 1)];
    let x: Vec<f32> = (0..512 * 1536)
        .map(|i| (i % 29) as f32 * 0.07 - 1.0)
        .collect();
    let mut y = vec![0.0; 512 * 3072];
    println!("products of a 135M model, tokens/s: median (fastest) at rows");
    print!("{:<6}{:>8}", "", "pack s");
    for (rows, _) in counts {
        print!("{rows:>16}");
    }
    println!();
    for format in [
        WeightFormat::F32,
        WeightFormat::Bf16,
        WeightFormat::F16,
        WeightFormat::Int8,
        WeightFormat::Int4,
    ] {
        let begun = Instant::now();
        let model = Products::new(pool, format);
        print!(
            "{:<6}{:>8.2}",
            format!("{format:?}"),
            begun.elapsed().as_secs_f64()
        );
        for (rows, head_rows) in counts {
            let (median, best) = timed(|| model.step(pool, rows, head_rows, &x, &mut y));
            let rows = rows as f64;
            print!(
                "{:>16}",
                format!("{:.0} ({:.0})", rows / median, rows / best)
            );
        }
        println!();
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
            .map(|position| RowPlace::causal(&table, position))
            .collect();
        let q = vec![0.2; rows * heads * dim];
        let mut out = vec![0.0; q.len()];
        let seconds =
            median(|| attend(pool, &kv, &places, &Attend::plain(heads, dim), &q, &mut out));
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
