//! The mathematics of every family against Hugging Face transformers, on tiny random checkpoints of odd sizes.

mod common;

use common::{
    all_logits, argmax, expected, floats, golden, goldens_with, log_softmax, open, options, table,
    worst,
};
use understudy_checkpoint::Checkpoint;
use understudy_cpu::LoadOptions;
use understudy_cpu::encoder::{Encoder, Input};
use understudy_engine_core::runner::ModelRunner;

/// Largest difference of a prompt logit, in absolute terms; the logits of these models reach about ten.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// The same of a reported logprob.
const LOGPROB_TOLERANCE: f64 = 1e-3;
/// Greedy tokens that are compared.
const GREEDY: usize = 64;

fn check_decoder(name: &str) {
    let expected = expected(name);
    let logits = floats(&golden(name).join("logits.f32"));
    // LongRoPE takes its short factors only where no position lies beyond the original context.
    let context_length = name.ends_with("longrope_short").then_some(96);
    let options = LoadOptions {
        context_length,
        ..options()
    };
    let mut runner = open(name, &options);
    let vocab = runner.info().vocab_size;
    let blocks = table(0, expected.prompt.len() + expected.greedy.len());
    let mut last = all_logits(&mut runner, &blocks, 0, &expected.prompt);
    let difference = worst(&last, &logits);
    println!("{name}: largest difference of a logit {difference:e}");
    assert!(difference <= LOGIT_TOLERANCE, "{name}: {difference:e}");
    for (step, want) in expected.greedy.iter().enumerate() {
        let row = &last[last.len() - vocab..];
        let id = argmax(row);
        assert_eq!(id, *want, "{name}: greedy token {step}");
        if let Some(top) = expected.top5.get(step) {
            let logprobs = log_softmax(row);
            for (id, logprob) in top {
                let difference = (logprobs[*id as usize] - f64::from(*logprob)).abs();
                assert!(
                    difference <= LOGPROB_TOLERANCE,
                    "{name}: step {step}, id {id}: {difference:e}"
                );
            }
        }
        last = all_logits(&mut runner, &blocks, expected.prompt.len() + step, &[id]);
    }
}

#[test]
fn decoders_match_transformers() {
    let names = goldens_with("logits.f32");
    assert!(names.len() >= 25, "{} checkpoints", names.len());
    for name in &names {
        check_decoder(name);
    }
    let compared: usize = names
        .iter()
        .filter(|name| expected(name).greedy.len() >= GREEDY)
        .count();
    assert!(compared >= names.len() - 6, "{compared} of {}", names.len());
}

#[test]
fn encoders_match_transformers() {
    let names = goldens_with("hidden.f32");
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        let expected = expected(&name);
        let directory = golden(&name);
        let mut encoder =
            Encoder::load(&directory, &options()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let hidden = floats(&directory.join("hidden.f32"));
        // Among others, so that a neighbour's rows would show.
        let other = [expected.prompt[1], expected.prompt[0], expected.prompt[2]];
        let second = expected
            .token_types
            .iter()
            .position(|kind| *kind == 1)
            .unwrap_or(expected.prompt.len());
        let inputs = [
            Input::text(&other),
            Input::text(&expected.prompt),
            Input::pair(&expected.prompt, second),
        ];
        let encoded = encoder.encode(&inputs).unwrap();
        let difference = worst(&encoded[1].hidden, &hidden);
        println!("{name}: largest difference of a hidden state {difference:e}");
        assert!(difference <= LOGIT_TOLERANCE, "{name}: {difference:e}");
        for (score, encoded) in [
            (expected.score, &encoded[1]),
            (expected.score_with_token_types, &encoded[2]),
        ] {
            if let Some(score) = score {
                assert!(
                    worst(encoded.scores.as_ref().unwrap(), &[score]) <= LOGIT_TOLERANCE,
                    "{name}"
                );
            }
        }
    }
}

/// transformers 4 and 5 write the same model's configuration differently.
#[test]
fn both_spellings_of_a_configuration_are_one_model() {
    let names = goldens_with("config.alt.json");
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        let directory = golden(&name);
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let spec = understudy_cpu::load::read_spec(&directory, &checkpoint, None).unwrap();
        let text = std::fs::read_to_string(directory.join("config.alt.json")).unwrap();
        let other = understudy_checkpoint::families::from_json(&text)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
            .with_names_of(&checkpoint);
        assert_eq!(spec, other, "{name}");
    }
}
