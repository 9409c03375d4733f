use sha2::{Digest, Sha256};

use super::*;
use crate::testing::Dice;

fn input<'a>(logits: &'a [f32], params: &'a SamplingParams, position: u32) -> SampleInput<'a> {
    SampleInput {
        logits,
        params,
        history: None,
        suppressed: &[],
        mask: None,
        position,
    }
}

fn random_row(dice: &mut Dice, length: usize) -> Vec<f32> {
    // Few distinct values, so that ties are common.
    (0..length)
        .map(|_| dice.throw(40) as f32 / 4.0 - 5.0)
        .collect()
}

/// Sampling spelled out: full sort, double precision, no scratch memory, no partial selection.
fn by_definition(logits: &[f32], params: &SamplingParams, position: u32) -> u32 {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let mut kept: Vec<(u32, f32, f64)> = (0..logits.len())
        .map(|id| {
            (
                id as u32,
                logits[id],
                f64::from(understudy_kernels::exp(
                    (logits[id] - max) / params.temperature,
                )),
            )
        })
        .filter(|&(_, _, weight)| weight >= f64::from(params.min_p) && weight > 0.0)
        .collect();
    kept.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let total: f64 = kept.iter().map(|token| token.2).sum();
        let mut sum = 0.0;
        let count = kept.iter().take_while(|token| {
            let before = sum;
            sum += token.2;
            before < f64::from(params.top_p) * total
        });
        let count = count.count().max(1);
        kept.truncate(count);
    }
    kept.sort_by_key(|token| token.0);
    let total: f64 = kept.iter().map(|token| token.2).sum();
    let target = uniform(params.seed, u64::from(position), 0, Domain::Token) * total;
    let mut sum = 0.0;
    kept.iter()
        .find(|token| {
            sum += token.2;
            sum > target
        })
        .or(kept.last())
        .unwrap()
        .0
}

#[test]
fn every_combination_of_filters_follows_the_definition() {
    let mut dice = Dice::new(1);
    let mut sampler = Sampler::new();
    for round in 0..4000 {
        let logits = random_row(&mut dice, 1 + round % 700);
        let params = SamplingParams {
            temperature: dice.pick(&[0.01, 0.5, 1.0, 1.7, 50.0]),
            top_k: dice.pick(&[0, 1, 2, 7, 130, 5000]),
            top_p: dice.pick(&[1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
            min_p: dice.pick(&[0.0, 0.0, 0.05, 0.5, 1.0]),
            seed: round as u64,
            ..SamplingParams::default()
        };
        let got = sampler.sample(input(&logits, &params, 3)).unwrap().id;
        assert_eq!(
            got,
            by_definition(&logits, &params, 3),
            "round {round}: {params:?}"
        );
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [0.0, 1.0, 2.0, -1.0, 0.5];
    let params = SamplingParams {
        temperature: 0.8,
        seed: 9,
        ..SamplingParams::default()
    };
    let weights: Vec<f64> = logits
        .iter()
        .map(|&x: &f32| (f64::from(x) / 0.8).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mut sampler = Sampler::new();
    let mut counts = [0.0; 5];
    let rounds = 40_000;
    for position in 0..rounds {
        counts[sampler
            .sample(input(&logits, &params, position))
            .unwrap()
            .id as usize] += 1.0;
    }
    let chi_square: f64 = (0..5)
        .map(|id| {
            let expected = weights[id] / total * f64::from(rounds);
            (counts[id] - expected) * (counts[id] - expected) / expected
        })
        .sum();
    assert!(
        chi_square < 18.5,
        "4 degrees of freedom, 0.1 %: {chi_square}, {counts:?}"
    );
}

#[test]
fn greedy_takes_the_lowest_of_equals_and_draws_nothing() {
    let mut sampler = Sampler::new();
    let logits = [1.0, 5.0, 5.0, -2.0];
    for seed in 0..50 {
        let params = SamplingParams {
            seed,
            top_k: 3,
            top_p: 0.5,
            ..SamplingParams::default()
        };
        assert_eq!(sampler.sample(input(&logits, &params, 0)).unwrap().id, 1);
    }
    let top_1 = SamplingParams {
        temperature: 2.0,
        top_k: 1,
        seed: 4,
        ..SamplingParams::default()
    };
    assert_eq!(sampler.sample(input(&logits, &top_1, 0)).unwrap().id, 1);
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let mut sampler = Sampler::new();
    let logits = [1.0, 2.0, 2.0, 0.0];
    let mut history = History::of_prompt(&[]);
    history.push(1);
    let params = SamplingParams {
        frequency_penalty: 1.5,
        top_logprobs: 3,
        ..SamplingParams::default()
    };
    let token = sampler
        .sample(SampleInput {
            history: Some(&history),
            ..input(&logits, &params, 0)
        })
        .unwrap();
    assert_eq!(token.id, 2, "id 1 is penalised");
    assert_eq!(
        token.top.iter().map(|top| top.0).collect::<Vec<_>>(),
        [1, 2, 0]
    );
    assert_eq!(token.top[1].1.to_bits(), token.logprob.to_bits());
    assert_eq!(
        sampler.logprob(&logits, 2).unwrap().to_bits(),
        token.logprob.to_bits()
    );
    let sum: f64 = token
        .top
        .iter()
        .map(|top| f64::from(top.1).exp())
        .sum::<f64>()
        + 0.0_f64;
    assert!(sum < 1.0 && sum > 0.9);
}

#[test]
fn top_logprobs_are_sorted_and_ties_go_to_the_lowest_id() {
    let mut dice = Dice::new(6);
    for _ in 0..300 {
        let length = 1 + dice.throw(60);
        let logits = random_row(&mut dice, length);
        let log_softmax = LogSoftmax::of(&logits, finite_max(&logits).unwrap());
        let mut expected: Vec<u32> = (0..length as u32).collect();
        expected.sort_by(|&a, &b| {
            logits[b as usize]
                .total_cmp(&logits[a as usize])
                .then(a.cmp(&b))
        });
        for count in [1, 5, 64] {
            let got: Vec<u32> = top_tokens(&logits, count, log_softmax)
                .iter()
                .map(|top| top.0)
                .collect();
            assert_eq!(got, expected[..count.min(length)]);
        }
    }
}

#[test]
fn suppressed_ids_are_never_chosen() {
    let mut sampler = Sampler::new();
    let logits = [9.0, 8.0, 1.0];
    for seed in 0..200 {
        for temperature in [0.0, 1.0, 100.0] {
            let params = SamplingParams {
                temperature,
                seed,
                ..SamplingParams::default()
            };
            let suppressed = &[0, 1, 77][..];
            let token = sampler
                .sample(SampleInput {
                    suppressed,
                    ..input(&logits, &params, 0)
                })
                .unwrap();
            assert_eq!(token.id, 2);
        }
    }
    let params = SamplingParams::default();
    let error = sampler
        .sample(SampleInput {
            suppressed: &[0, 1, 2],
            ..input(&logits, &params, 0)
        })
        .unwrap_err();
    assert_eq!(error, SampleError::NothingLeft);
}

#[test]
fn bad_logits_are_an_error() {
    let mut sampler = Sampler::new();
    let sampled = SamplingParams {
        temperature: 1.0,
        top_p: 0.9,
        ..SamplingParams::default()
    };
    for bad in [f32::NAN, f32::INFINITY] {
        for params in [&SamplingParams::default(), &sampled] {
            assert_eq!(
                sampler.sample(input(&[0.0, bad, 1.0], params, 0)),
                Err(SampleError::NotFinite)
            );
        }
        assert!(sampler.logprob(&[0.0, bad], 0).is_err());
    }
    assert!(sampler.sample(input(&[], &sampled, 0)).is_err());
    assert!(sampler.logprob(&[0.0], 1).is_err());
    let extreme = [f32::MAX, f32::MIN, 0.0];
    assert_eq!(sampler.sample(input(&extreme, &sampled, 0)).unwrap().id, 0);
}

/// Models mask tokens (padding of the vocabulary, say) with minus infinity: that is no fault, and they are never chosen or shown.
#[test]
fn tokens_at_minus_infinity_are_ruled_out() {
    let mut sampler = Sampler::new();
    let logits = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 0.5];
    for seed in 0..200 {
        for temperature in [0.0, 1.0, 100.0] {
            for (top_k, top_p) in [(0, 1.0), (3, 1.0), (0, 0.99)] {
                let params = SamplingParams {
                    temperature,
                    seed,
                    top_k,
                    top_p,
                    repetition_penalty: 1.2,
                    top_logprobs: 4,
                    ..SamplingParams::default()
                };
                let mut history = History::of_prompt(&[0, 2]);
                history.push(0);
                let token = sampler
                    .sample(SampleInput {
                        history: Some(&history),
                        ..input(&logits, &params, 0)
                    })
                    .unwrap();
                assert!(token.id % 2 == 1 && token.logprob.is_finite());
                let top: Vec<u32> = token.top.iter().map(|top| top.0).collect();
                assert_eq!(top, [1, 3]);
            }
        }
    }
    assert_eq!(sampler.logprob(&logits, 0).unwrap(), f32::NEG_INFINITY);
    let nothing = [f32::NEG_INFINITY; 3];
    let error = sampler.sample(input(&nothing, &SamplingParams::default(), 0));
    assert_eq!(error, Err(SampleError::NotFinite));
}

/// The eight small weights count only if they are added before the large ones: with them half of the mass is above 1.
#[test]
fn the_mass_of_a_nucleus_is_summed_in_id_order() {
    let logits = [&[-37.0; 8][..], &[0.0, 0.0]].concat();
    let mut chosen: Vec<u32> = (0..64)
        .map(|seed| {
            let params = SamplingParams {
                temperature: 1.0,
                top_p: 0.5,
                seed,
                ..SamplingParams::default()
            };
            Sampler::new()
                .sample(input(&logits, &params, 0))
                .unwrap()
                .id
        })
        .collect();
    chosen.sort_unstable();
    chosen.dedup();
    assert_eq!(chosen, [8, 9]);
}

#[test]
fn a_draw_sums_in_id_order() {
    let tiny = 2.0_f32.powi(-53);
    let weights = [&[tiny; 4][..], &[1.0, 1.0]].concat();
    assert_eq!(draw(&weights, 0..6, 0.5 + 2.0_f64.powi(-53)), Some(5));
}

/// Every id and every logprob bit over settings that between them use all of the sampler. A change here is a change of what a
/// resumed stream says: raise [`SAMPLING_NUMERICS`] with it.
#[test]
fn the_bits_of_sampling_are_those_of_its_version() {
    const DIGEST: (&str, &str) = ("sampling-1", "662921701608940625bef6fc0e5d235e");
    // No round numbers: those would hide the order of roundings.
    let mut state = 12_345_u32;
    let logits: Vec<f32> = (0..997)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 1.3e6 - 6.4
        })
        .collect();
    let warm = SamplingParams {
        temperature: 0.8,
        seed: 7,
        ..SamplingParams::default()
    };
    let settings = [
        SamplingParams::default(),
        warm.clone(),
        SamplingParams {
            top_k: 40,
            ..warm.clone()
        },
        SamplingParams {
            top_p: 0.9,
            top_logprobs: 3,
            ..warm.clone()
        },
        SamplingParams {
            min_p: 0.05,
            ..warm.clone()
        },
        SamplingParams {
            top_k: 300,
            top_p: 0.7,
            min_p: 0.001,
            temperature: 1.7,
            seed: u64::MAX,
            ..warm.clone()
        },
        SamplingParams {
            repetition_penalty: 1.2,
            frequency_penalty: 0.3,
            presence_penalty: -0.4,
            ..warm
        },
    ];
    let mut hash = Sha256::new();
    let mut sampler = Sampler::new();
    for params in &settings {
        let mut history = History::of_prompt(&[1, 5, 900]);
        for position in 0..200 {
            let token = sampler
                .sample(SampleInput {
                    history: Some(&history),
                    ..input(&logits, params, position)
                })
                .unwrap();
            history.push(token.id);
            for (id, logprob) in std::iter::once((token.id, token.logprob)).chain(token.top) {
                hash.update(id.to_le_bytes());
                hash.update(logprob.to_bits().to_le_bytes());
            }
        }
    }
    let digest: String = hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!((SAMPLING_NUMERICS, digest.as_str()), DIGEST);
}

#[test]
fn no_state_passes_from_one_row_to_the_next() {
    let mut dice = Dice::new(7);
    let mut used = Sampler::new();
    for round in 0..500 {
        let length = 1 + dice.throw(300);
        let logits = random_row(&mut dice, length);
        let params = SamplingParams {
            temperature: dice.pick(&[0.0, 1.0]),
            top_k: dice.pick(&[0, 5]),
            top_p: dice.pick(&[0.7, 1.0]),
            ..SamplingParams::default()
        };
        let fresh = Sampler::new()
            .sample(input(&logits, &params, round))
            .unwrap();
        assert_eq!(used.sample(input(&logits, &params, round)).unwrap(), fresh);
    }
}

fn bias_and_mask<'a>(params: &'a SamplingParams, mask: &'a [u32]) -> SampleInput<'a> {
    SampleInput {
        mask: Some(mask),
        ..input(&[9.0, 8.0, 1.0, -4.0], params, 0)
    }
}

#[test]
fn a_bias_is_added_before_penalties_and_does_not_reach_logprobs() {
    let mut sampler = Sampler::new();
    let mut history = History::of_prompt(&[]);
    history.push(3);
    // (-4 + 14) / 2 = 5 is below 9 - 3.5; after the penalty, -4 * 2 + 14 = 6 would be above it.
    let params = SamplingParams {
        logit_bias: vec![(3, 14.0), (0, -3.5), (1, -8.0), (77, 1.0)],
        repetition_penalty: 2.0,
        ..SamplingParams::default()
    };
    let row = [9.0, 8.0, 1.0, -4.0];
    let token = sampler
        .sample(SampleInput {
            history: Some(&history),
            ..input(&row, &params, 0)
        })
        .unwrap();
    assert_eq!(token.id, 0);
    let plain = sampler.logprob(&row, 0).unwrap();
    assert_eq!(token.logprob.to_bits(), plain.to_bits());
}

#[test]
fn only_what_the_mask_allows_is_chosen_and_nothing_else_is_an_error() {
    let mut sampler = Sampler::new();
    for temperature in [0.0, 1.0, 100.0] {
        for seed in 0..100 {
            let params = SamplingParams {
                temperature,
                seed,
                logit_bias: vec![(0, 100.0)],
                ..SamplingParams::default()
            };
            let id = sampler
                .sample(bias_and_mask(&params, &[0b1100]))
                .unwrap()
                .id;
            assert!(id == 2 || id == 3 && temperature > 0.0, "{id}");
            let suppressed = SampleInput {
                suppressed: &[2],
                ..bias_and_mask(&params, &[0b1100])
            };
            assert_eq!(sampler.sample(suppressed).unwrap().id, 3);
        }
    }
    let params = SamplingParams::default();
    for mask in [&[0][..], &[]] {
        let error = sampler.sample(bias_and_mask(&params, mask)).unwrap_err();
        assert_eq!(error, SampleError::NothingLeft);
    }
}
