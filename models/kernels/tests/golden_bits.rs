//! The bits themselves: one digest over every kernel's results on fixed inputs, the same on x86-64 and on Arm.
//!
//! A change of this digest means that logs written by an older build cannot be replayed bit for bit: then raise `EXACT_NUMERICS` in
//! `models/torch/src/load.rs`, which is part of the fingerprint, and put the new digest here.

use understudy_kernels::{
    Attend, BLOCK, KvBlocks, PackedLinear, Pool, RowPlace, WeightSlice, attend, exp, f32_to_bf16,
    f32_to_f16, ln, rms_norm, rope, rotate, silu_mul,
};

const DIGEST: u64 = 0x9329_183d_db0c_821b;

/// Deterministic inputs in [-1, 1).
struct Inputs(u64);

impl Inputs {
    fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|_| {
                self.0 = self
                    .0
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (self.0 >> 40) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
    }
}

/// FNV-1a over the bits.
fn digest(hash: u64, values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|value| value.to_bits().to_le_bytes())
        .fold(hash, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

fn products(inputs: &mut Inputs, pool: &Pool, hash: u64) -> u64 {
    let (rows, n, k) = (13, 101, 57);
    let (x, w) = (inputs.take(rows * k), inputs.take(n * k));
    let brain: Vec<u16> = w.iter().map(|value| f32_to_bf16(*value)).collect();
    let half: Vec<u16> = w.iter().map(|value| f32_to_f16(*value)).collect();
    [
        WeightSlice::F32(&w),
        WeightSlice::Bf16(&brain),
        WeightSlice::F16(&half),
    ]
    .iter()
    .fold(hash, |hash, weights| {
        let mut y = vec![0.0; rows * n];
        PackedLinear::pack(*weights, n, k).forward(pool, &x, rows, &mut y);
        digest(hash, &y)
    })
}

fn attention(inputs: &mut Inputs, pool: &Pool, hash: u64) -> u64 {
    let (kv_heads, heads, dim, length) = (2, 6, 22, 75_usize);
    let mut kv = KvBlocks::new(length.div_ceil(BLOCK), kv_heads, dim);
    let table: Vec<u32> = (0..length.div_ceil(BLOCK) as u32).rev().collect();
    for position in 0..length {
        let (k, v) = (inputs.take(kv_heads * dim), inputs.take(kv_heads * dim));
        kv.write(table[position / BLOCK], position % BLOCK, &k, &v);
    }
    let places: Vec<RowPlace<'_>> = (0..length)
        .map(|position| RowPlace::causal(&table, position))
        .collect();
    let q: Vec<f32> = inputs
        .take(length * heads * dim)
        .iter()
        .map(|value| value * 5.0)
        .collect();
    let mut out = vec![0.0; q.len()];
    attend(pool, &kv, &places, &Attend::plain(heads, dim), &q, &mut out);
    digest(hash, &out)
}

fn row_kernels(inputs: &mut Inputs, pool: &Pool, hash: u64) -> u64 {
    let (rows, size) = (7, 90);
    let (mut x, w) = (inputs.take(rows * size), inputs.take(size));
    let mut y = vec![0.0; rows * size];
    rms_norm(pool, &x, &w, 1e-5, &mut y);
    let hash = digest(hash, &y);
    let gate: Vec<f32> = y.iter().map(|value| value * 9.0).collect();
    silu_mul(pool, &gate, &x, &mut y);
    let hash = digest(hash, &y);
    let angles: Vec<f32> = (0..rows * 5)
        .map(|i| i as f32 * 3.7 / rope::power(500_000.0, 0.3) as f32)
        .collect();
    let (sin, cos): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| rope::sin_cos(*angle)).unzip();
    rotate(&mut x, size / 10, &cos, &sin, 5);
    let hash = digest(hash, &x);
    let values: Vec<f32> = gate
        .iter()
        .flat_map(|value| [exp(*value * 10.0), ln(value.abs())])
        .collect();
    digest(hash, &values)
}

#[test]
fn the_bits_are_the_same_on_every_machine_and_thread_count() {
    for threads in [1, 3] {
        let (pool, mut inputs) = (Pool::new(threads), Inputs(42));
        let hash = products(&mut inputs, &pool, 0xcbf2_9ce4_8422_2325);
        let hash = attention(&mut inputs, &pool, hash);
        let hash = row_kernels(&mut inputs, &pool, hash);
        assert_eq!(hash, DIGEST, "{threads} threads: digest {hash:#018x}");
    }
}
