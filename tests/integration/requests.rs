//! The requests that every fault is tried with: one of each kind of state that a replay has to rebuild.

use understudy_client::{Client, ErrorCode, Request, Sampling};
use understudy_tests::{Transcript, collect};

/// Kinds of requests in [`nth`].
pub const KINDS: u32 = 6;

/// Request number `n`: kinds take turns, prompts and seeds differ.
pub fn nth(n: u32, max_tokens: u32) -> Request {
    let mut request = Request::prompt(format!("Count from {} to {}:", n, n + 200));
    let sampling = &mut request.sampling;
    sampling.max_tokens = Some(max_tokens);
    sampling.ignore_eos = true;
    match n % KINDS {
        0 => sampling.temperature = Some(0.0),
        1 => {
            sampling.temperature = Some(1.0);
            sampling.seed = Some(u64::from(n));
        }
        2 => {
            *sampling = Sampling {
                temperature: Some(0.8),
                seed: Some(u64::from(n)),
                repetition_penalty: Some(1.2),
                presence_penalty: Some(0.5),
                frequency_penalty: Some(0.3),
                ..sampling.clone()
            };
        }
        3 => {
            *sampling = Sampling {
                temperature: Some(1.3),
                seed: Some(u64::from(n)),
                top_k: Some(40),
                top_p: Some(0.9),
                min_p: Some(0.01),
                top_logprobs: 3,
                ..sampling.clone()
            };
        }
        // Strings that may or may not come: what is held back while they might is state, too.
        4 => {
            sampling.temperature = Some(1.0);
            sampling.seed = Some(u64::from(n));
            request.stop = vec!["7 1".into(), "zebra crossing".into(), "  ".into()];
        }
        _ => {
            sampling.temperature = Some(0.0);
            sampling.ignore_eos = false;
            sampling.min_tokens = Some(max_tokens / 2);
        }
    }
    request
}

/// Runs `count` requests at once.
///
/// # Panics
/// If one of them ends with an error.
pub async fn run_all(client: &Client, count: u32, max_tokens: u32) -> Vec<Transcript> {
    let tasks: Vec<_> = (0..count)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { collect(&client, nth(n, max_tokens)).await })
        })
        .collect();
    let mut transcripts = Vec::new();
    for (n, task) in tasks.into_iter().enumerate() {
        let ended = task.await.expect("the stream's task");
        transcripts.push(ended.unwrap_or_else(|error| panic!("request {n}: {error}")));
    }
    transcripts
}

/// Compares two runs of the same requests.
///
/// # Panics
/// At the first difference.
pub fn assert_same(expected: &[Transcript], got: &[Transcript]) {
    assert_eq!(expected.len(), got.len());
    for (n, (expected, got)) in expected.iter().zip(got).enumerate() {
        let same = expected
            .ids
            .iter()
            .zip(&got.ids)
            .take_while(|(a, b)| a == b)
            .count();
        assert_eq!(
            expected.ids, got.ids,
            "request {n}: ids differ from position {same} on"
        );
        assert_eq!(
            expected.logprob_bits, got.logprob_bits,
            "request {n}: logprob bits"
        );
        assert_eq!(expected, got, "request {n}");
    }
}

/// The error code that a request ended with.
///
/// # Panics
/// If it ended well.
pub async fn refused(client: &Client, request: Request) -> ErrorCode {
    let error = collect(client, request).await.expect_err("a refusal");
    error
        .code()
        .unwrap_or_else(|| panic!("an error without a code: {error}"))
}
