use super::*;
use crate::lanes::{f16_to_f32, f32_to_f16};
use crate::testing::Random;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// One sequence's keys and values, in order, and a pool that holds them in shuffled blocks among garbage.
struct Scene {
    kv: KvBlocks,
    table: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
    heads: usize,
    length: usize,
}

fn scene(random: &mut Random, kv_heads: usize, group: usize, dim: usize, length: usize) -> Scene {
    let (heads, need) = (kv_heads * group, length.div_ceil(BLOCK));
    let mut kv = KvBlocks::new(need + 3, kv_heads, dim);
    for block in 0..need + 3 {
        for offset in 0..BLOCK {
            let garbage = vec![f32::NAN; kv_heads * dim];
            kv.write(block as u32, offset, &garbage, &garbage);
        }
    }
    let mut table: Vec<u32> = (0..need as u32 + 3).collect();
    for i in (1..table.len()).rev() {
        table.swap(i, random.below(i + 1));
    }
    let k = random.values(length * kv_heads * dim);
    let v = random.values(length * kv_heads * dim);
    let row = kv_heads * dim;
    for p in 0..length {
        kv.write(
            table[p / BLOCK],
            p % BLOCK,
            &k[p * row..][..row],
            &v[p * row..][..row],
        );
    }
    let q = random
        .values(length * heads * dim)
        .iter()
        .map(|x| x * 4.0)
        .collect();
    Scene {
        kv,
        table,
        k,
        v,
        q,
        heads,
        length,
    }
}

impl Scene {
    fn run(&self, isa: Isa, threads: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
        let places: Vec<RowPlace<'_>> = rows
            .clone()
            .map(|position| RowPlace::causal(&self.table, position))
            .collect();
        let row = self.heads * self.kv.head_dim();
        let mut out = vec![f32::NAN; rows.len() * row];
        let q = &self.q[rows.start * row..rows.end * row];
        attend_on(
            isa,
            &Pool::new(threads),
            &self.kv,
            &places,
            &Attend::plain(self.heads, self.kv.head_dim()),
            q,
            &mut out,
        );
        out
    }

    /// The definition in f64.
    fn exact(&self) -> Vec<f64> {
        let (kv_heads, dim) = (self.kv.kv_heads(), self.kv.head_dim());
        let mut out = Vec::new();
        for row in 0..self.length {
            for head in 0..self.heads {
                let q = &self.q[(row * self.heads + head) * dim..][..dim];
                let at = |p: usize| (p * kv_heads + head / (self.heads / kv_heads)) * dim;
                let weights: Vec<f64> = (0..=row)
                    .map(|p| {
                        (0..dim)
                            .map(|d| f64::from(q[d]) * f64::from(self.k[at(p) + d]))
                            .sum::<f64>()
                            / (dim as f64).sqrt()
                    })
                    .map(f64::exp)
                    .collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    out.push(
                        (0..=row)
                            .map(|p| weights[p] * f64::from(self.v[at(p) + d]))
                            .sum::<f64>()
                            / total,
                    );
                }
            }
        }
        out
    }
}

#[test]
fn prefill_decode_paths_and_threads_agree_bit_for_bit_and_with_the_definition() {
    let mut random = Random::new(7);
    for (kv_heads, group, dim, length) in [
        (1, 1, 2, 1),
        (2, 3, 8, 17),
        (1, 11, 6, 40),
        (3, 2, 20, 33),
        (2, 4, 64, 70),
        (1, 8, 128, 19),
    ] {
        let scene = scene(&mut random, kv_heads, group, dim, length);
        let whole = scene.run(Isa::Scalar, 1, 0..length);
        for (got, exact) in whole.iter().zip(scene.exact()) {
            assert!((f64::from(*got) - exact).abs() < 2e-6, "{got} {exact}");
        }
        let row = scene.heads * dim;
        for &isa in Isa::available() {
            for threads in [1, 2] {
                assert_eq!(
                    bits(&scene.run(isa, threads, 0..length)),
                    bits(&whole),
                    "{isa:?}, {threads} threads"
                );
                for _ in 0..5 {
                    let start = random.below(length);
                    let end = start + 1 + random.below(length - start);
                    let part = scene.run(isa, threads, start..end);
                    assert_eq!(
                        bits(&part),
                        bits(&whole[start * row..end * row]),
                        "{isa:?} rows {start}..{end}"
                    );
                }
            }
        }
    }
}

#[test]
fn several_sequences_in_one_call_keep_apart() {
    let mut random = Random::new(8);
    let a = scene(&mut random, 2, 2, 16, 32);
    let row = a.heads * 16;
    // A second sequence: the same two blocks in the other order.
    let other = [a.table[1], a.table[0]];
    let place = RowPlace::causal;
    let call = Attend::plain(a.heads, 16);
    let mut places: Vec<RowPlace<'_>> = [5, 29, 29, 3, 4, 0, 17]
        .map(|p| place(&a.table, p))
        .to_vec();
    places.extend(
        [6, 7, 18, 31]
            .iter()
            .flat_map(|p| [place(&other[..], *p), place(&a.table, *p)]),
    );
    let q = random.values(places.len() * row);
    let mut together = vec![0.0; q.len()];
    attend(&Pool::new(2), &a.kv, &places, &call, &q, &mut together);
    for (i, place) in places.iter().enumerate() {
        let mut alone = vec![0.0; row];
        let q = &q[i * row..][..row];
        attend(&Pool::new(1), &a.kv, &[*place], &call, q, &mut alone);
        assert_eq!(bits(&together[i * row..][..row]), bits(&alone), "row {i}");
    }
}

#[test]
#[should_panic(expected = "no block for position 16")]
fn a_table_too_short_is_refused() {
    let kv = KvBlocks::new(4, 1, 2);
    attend(
        &Pool::new(1),
        &kv,
        &[RowPlace::causal(&[0], 16)],
        &Attend::plain(1, 2),
        &[0.0; 2],
        &mut [0.0; 2],
    );
}

/// Windows, soft caps, scales, strides, rows that see their whole sequence: against the definition, and rows alone against rows together.
#[test]
fn all_kinds_of_attention_follow_the_definition_and_keep_their_bits() {
    let mut random = Random::new(9);
    for (group, dim, length, window, soft_cap, causal) in [
        (3, 20, 70, Some(7), None, true),
        (1, 16, 90, Some(16), Some(3.0), true),
        (2, 10, 40, Some(100), Some(0.5), true),
        (8, 32, 37, Some(1), None, true),
        (3, 24, 50, None, None, false),
    ] {
        let scene = scene(&mut random, 2, group, dim, length);
        let heads = scene.heads;
        let stride = heads * dim + 5;
        let mut q = vec![f32::NAN; length * stride];
        for row in 0..length {
            q[row * stride..][..heads * dim]
                .copy_from_slice(&scene.q[row * heads * dim..][..heads * dim]);
        }
        let call = Attend {
            heads,
            q_stride: stride,
            scale: 0.3,
            soft_cap,
            window,
        };
        let places: Vec<RowPlace<'_>> = (0..length)
            .map(|p| match causal {
                true => RowPlace::causal(&scene.table, p),
                false => RowPlace::whole(&scene.table, p, length),
            })
            .collect();
        let run = |isa, threads, rows: std::ops::Range<usize>| {
            let mut out = vec![f32::NAN; rows.len() * heads * dim];
            let (places, q) = (&places[rows.clone()], &q[rows.start * stride..]);
            attend_on(
                isa,
                &Pool::new(threads),
                &scene.kv,
                places,
                &call,
                q,
                &mut out,
            );
            out
        };
        let whole = run(Isa::Scalar, 1, 0..length);
        for (row, got) in whole.chunks(heads * dim).enumerate() {
            for head in 0..heads {
                let exact = scene.define(row, head, call.seen(&places[row]), &call);
                for (got, exact) in got[head * dim..][..dim].iter().zip(exact) {
                    assert!((f64::from(*got) - exact).abs() < 4e-6, "{got} {exact}");
                }
            }
        }
        for &isa in Isa::available() {
            for threads in [1, 2] {
                assert_eq!(bits(&run(isa, threads, 0..length)), bits(&whole), "{isa:?}");
                let start = random.below(length);
                let end = start + 1 + random.below(length - start);
                let expected = bits(&whole[start * heads * dim..end * heads * dim]);
                assert_eq!(
                    bits(&run(isa, threads, start..end)),
                    expected,
                    "{isa:?} {start}..{end}"
                );
            }
        }
    }
}

impl Scene {
    /// One head's output in f64.
    fn define(
        &self,
        row: usize,
        head: usize,
        seen: std::ops::Range<usize>,
        call: &Attend,
    ) -> Vec<f64> {
        let (kv_heads, dim) = (self.kv.kv_heads(), self.kv.head_dim());
        let q = &self.q[(row * self.heads + head) * dim..][..dim];
        let at = |p: usize| (p * kv_heads + head / (self.heads / kv_heads)) * dim;
        let score = |p: usize| {
            let products = (0..dim).map(|d| f64::from(q[d]) * f64::from(self.k[at(p) + d]));
            let score = products.sum::<f64>() * f64::from(call.scale);
            call.soft_cap.map_or(score, |cap| {
                f64::from(cap) * (score / f64::from(cap)).tanh()
            })
        };
        let weights: Vec<f64> = seen.clone().map(|p| score(p).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |d| {
            let parts = seen
                .clone()
                .zip(&weights)
                .map(|(p, weight)| weight * f64::from(self.v[at(p) + d]));
            parts.sum::<f64>() / total
        };
        (0..dim).map(value).collect()
    }
}

#[test]
fn many_rows_are_written_like_one_and_blocks_travel() {
    let mut random = Random::new(10);
    let scene = scene(&mut random, 3, 1, 20, 300);
    let mut kv = KvBlocks::new(scene.kv.blocks(), 3, 20);
    let stride = 3 * 20 + 7;
    let mut rows = vec![0.0; 2 * 300 * stride];
    for p in 0..300 {
        rows[p * stride..][..60].copy_from_slice(&scene.k[p * 60..][..60]);
        rows[(300 + p) * stride..][..60].copy_from_slice(&scene.v[p * 60..][..60]);
    }
    let places: Vec<RowPlace<'_>> = (0..300)
        .map(|p| RowPlace::causal(&scene.table, p))
        .collect();
    let (k, v) = rows.split_at(300 * stride);
    kv.write_rows(&Pool::new(2), &places, k, v, stride);
    // Through a copy and through bytes, to the blocks in the opposite order.
    let mut other = KvBlocks::new(kv.blocks(), 3, 20);
    let reversed: Vec<u32> = scene.table.iter().rev().copied().collect();
    for (from, to) in scene.table[..300_usize.div_ceil(BLOCK)]
        .iter()
        .zip(&reversed)
    {
        let mut bytes = Vec::new();
        kv.export(*from, &mut bytes);
        assert_eq!(bytes.len(), kv.block_bytes());
        assert_eq!(
            bytes.len(),
            KvBlocks::position_bytes(KvFormat::F32, 3, 20) * BLOCK
        );
        other.import(*to, &bytes);
    }
    let spare = scene.table[300_usize.div_ceil(BLOCK)];
    kv.copy_block(scene.table[0], spare);
    let mut copied = scene.table.clone();
    copied[0] = spare;
    let run = |kv: &KvBlocks, table: &[u32]| {
        let mut out = vec![0.0; 60];
        let call = Attend::plain(3, 20);
        attend(
            &Pool::new(1),
            kv,
            &[RowPlace::causal(table, 299)],
            &call,
            &scene.q[299 * 60..],
            &mut out,
        );
        bits(&out)
    };
    let expected = run(&scene.kv, &scene.table);
    assert_eq!(run(&kv, &copied), expected);
    assert_eq!(run(&other, &reversed), expected);
}

/// Half-precision keys and values give the bits of f32 ones that hold the same rounded numbers.
#[test]
fn narrow_keys_and_values_are_widened_exactly() {
    let mut random = Random::new(11);
    let (kv_heads, heads, dim, length) = (2, 6, 24, 60);
    let table: Vec<u32> = (0..4).rev().collect();
    let places: Vec<RowPlace<'_>> = (0..length).map(|p| RowPlace::causal(&table, p)).collect();
    let mut k = random.values(length * kv_heads * dim);
    let v = random.values(length * kv_heads * dim);
    k[5] = 1e9;
    k[7] = -1e9;
    let mut narrow = KvBlocks::of(KvFormat::F16, 4, kv_heads, dim);
    narrow.write_rows(&Pool::new(1), &places, &k, &v, kv_heads * dim);
    let rounded = |x: &f32| f16_to_f32(f32_to_f16(x.clamp(-65504.0, 65504.0)));
    let (k, v): (Vec<f32>, Vec<f32>) = (
        k.iter().map(rounded).collect(),
        v.iter().map(rounded).collect(),
    );
    let mut wide = KvBlocks::new(4, kv_heads, dim);
    wide.write_rows(&Pool::new(2), &places, &k, &v, kv_heads * dim);
    let q = random.values(length * heads * dim);
    let call = Attend {
        scale: 1e-3,
        ..Attend::plain(heads, dim)
    };
    let mut expected = vec![0.0; q.len()];
    attend_on(
        Isa::Scalar,
        &Pool::new(1),
        &wide,
        &places,
        &call,
        &q,
        &mut expected,
    );
    for &isa in Isa::available() {
        let mut out = vec![0.0; q.len()];
        attend_on(isa, &Pool::new(2), &narrow, &places, &call, &q, &mut out);
        assert_eq!(bits(&out), bits(&expected), "{isa:?}");
    }
    let (mut bytes, mut copy) = (Vec::new(), KvBlocks::of(KvFormat::F16, 4, kv_heads, dim));
    for block in 0..4 {
        bytes.clear();
        narrow.export(block, &mut bytes);
        assert_eq!(
            bytes.len(),
            KvBlocks::position_bytes(KvFormat::F16, kv_heads, dim) * BLOCK
        );
        copy.import(block, &bytes);
    }
    let mut out = vec![0.0; q.len()];
    attend(&Pool::new(1), &copy, &places, &call, &q, &mut out);
    assert_eq!(bits(&out), bits(&expected));
}
