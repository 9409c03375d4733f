//! How a request ends, and which requests do not even begin.

use super::*;

#[test]
fn the_context_ends_an_output() {
    let sampling = SamplingParams {
        ignore_eos: true,
        max_tokens: 500,
        ..SamplingParams::default()
    };
    for prompt in [1, 150, 198, 199] {
        let output = alone(&model(), &start(1, &vec![1; prompt], &sampling));
        assert_eq!(output.len(), 200 - prompt);
        assert_eq!(output.last().unwrap().finish, Some(FinishReason::Length));
    }
}

#[test]
fn ending_ids_end_and_min_tokens_keeps_them_away() {
    // With this many stop ids the first token is one of them, unless it is suppressed.
    let stops: Vec<u32> = (0..40).collect();
    let sampling = |min_tokens| SamplingParams {
        min_tokens,
        stop_token_ids: stops.clone(),
        max_tokens: 50,
        ..settings()[2].clone()
    };
    for min_tokens in [0, 1, 5] {
        let output = alone(&model(), &start(1, &[1], &sampling(min_tokens)));
        assert!(output.len() > min_tokens as usize && output.len() < 50);
        let (last, before) = output.split_last().unwrap();
        assert_eq!(last.finish, Some(FinishReason::Stop));
        assert!(last.token.id < 40);
        assert!(
            before
                .iter()
                .all(|token| token.token.id >= 40 && token.finish.is_none())
        );
    }
    let eos = SamplingParams {
        max_tokens: 150,
        ..settings()[2].clone()
    };
    let output = alone(&model(), &start(1, &[1], &eos));
    assert_eq!(output.last().unwrap().token.id, 7);
    let output = alone(
        &model(),
        &start(
            1,
            &[1],
            &SamplingParams {
                ignore_eos: true,
                ..eos
            },
        ),
    );
    assert_eq!(output.len(), 150);
    assert!(
        output.iter().any(|token| token.token.id == 7),
        "it may be chosen, and changes nothing"
    );
}

#[test]
fn requests_that_cannot_be_served_say_why() {
    let base = start(1, &[1], &SamplingParams::default());
    let with = |change: &dyn Fn(&mut StartAttempt)| {
        let mut start = base.clone();
        change(&mut start);
        start
    };
    let cases = [
        (with(&|s| s.prompt.clear()), "empty"),
        (with(&|s| s.prompt = vec![1; 200]), "200 tokens"),
        (
            with(&|s| s.prompt = vec![1; 250]),
            "shorten the prompt by 51",
        ),
        (with(&|s| s.prompt = vec![1, 48]), "index 1"),
        (with(&|s| s.committed = vec![48]), "index 1"),
        (with(&|s| s.expect_logprobs = vec![0.0]), "1 logprobs"),
        (with(&|s| s.committed = vec![7]), "already end"),
        (
            with(&|s| (s.committed, s.sampling.max_tokens) = (vec![1, 1], 2)),
            "already end",
        ),
        (with(&|s| s.sampling.temperature = f32::NAN), "temperature"),
        (with(&|s| s.sampling.temperature = -1.0), "temperature"),
        (with(&|s| s.sampling.top_p = 0.0), "top_p"),
        (with(&|s| s.sampling.min_p = 1.5), "min_p"),
        (
            with(&|s| s.sampling.repetition_penalty = 0.0),
            "repetition_penalty",
        ),
        (
            with(&|s| s.sampling.presence_penalty = 3.0),
            "presence_penalty",
        ),
        (
            with(&|s| s.sampling.frequency_penalty = f32::INFINITY),
            "frequency_penalty",
        ),
        (with(&|s| s.sampling.max_tokens = 0), "max_tokens"),
        (with(&|s| s.sampling.min_tokens = 900), "min_tokens"),
        (with(&|s| s.sampling.top_logprobs = 65), "top_logprobs"),
        (
            with(&|s| s.sampling.stop_token_ids = vec![48]),
            "stop token id 48",
        ),
        (with(&|s| s.sampling.speculate = 17), "speculate is 17"),
        (
            with(&|s| s.sampling.logit_bias = vec![(48, 1.0)]),
            "token id 48",
        ),
        (
            with(&|s| s.sampling.logit_bias = vec![(4, 100.5)]),
            "-100 to 100",
        ),
        (
            with(&|s| s.sampling.logit_bias = vec![(4, f32::NAN)]),
            "token id 4",
        ),
        (
            with(&|s| s.sampling.logit_bias = vec![(4, 1.0), (5, 1.0), (4, 1.0)]),
            "4 twice",
        ),
        (
            with(&|s| s.sampling.logit_bias = vec![(4, 1.0); 1025]),
            "1025 entries",
        ),
        (
            with(&|s| s.sampling.allowed_token_ids = Some(vec![])),
            "allowed_token_ids is empty",
        ),
        (
            with(&|s| s.sampling.allowed_token_ids = Some(vec![1, 48])),
            "token id 48",
        ),
        (
            with(&|s| s.sampling.allowed_token_ids = Some(vec![1; 49])),
            "49 entries",
        ),
    ];
    for (start, part) in cases {
        let mut lab = Lab::new(model(), SchedulerOptions::default());
        lab.start(&start);
        let error = lab
            .failed
            .remove(&start.attempt)
            .unwrap_or_else(|| panic!("{part}: accepted"));
        assert!(
            matches!(&error, AttemptError::Invalid(text) if text.contains(part)),
            "{part}: {error}"
        );
    }
    let mut lab = Lab::new(model(), SchedulerOptions::default());
    lab.start(&with(&|s| {
        (s.sampling.min_tokens, s.sampling.stop_token_ids) = (2, (0..48).collect())
    }));
    lab.run();
    assert!(
        matches!(&lab.failed[&base.attempt], AttemptError::Invalid(text) if text.contains("whole vocabulary"))
    );
}

/// A replica that came back with a shorter context than the one that began the log: the request is well, this place is not.
#[test]
fn a_log_without_room_is_another_replicas() {
    let base = start(1, &[1; 150], &SamplingParams::default());
    for committed in [50, 51, 90] {
        let mut lab = Lab::new(model(), SchedulerOptions::default());
        lab.start(&StartAttempt {
            committed: vec![1; committed],
            expect_logprobs: vec![-1.0],
            ..base.clone()
        });
        let error = &lab.failed[&base.attempt];
        assert!(
            matches!(error, AttemptError::ReplayMismatch { position: 50, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("same context_length"), "{error}");
    }
    let mut lab = Lab::new(model(), SchedulerOptions::default());
    lab.start(&StartAttempt {
        prompt: vec![1; 250],
        committed: vec![1],
        ..base.clone()
    });
    assert!(matches!(
        lab.failed[&base.attempt],
        AttemptError::ReplayMismatch { position: 0, .. }
    ));
}
