//! The oracle: what a client saw of a request, to be compared with the fault-free run, bit for bit.

use std::time::{Duration, Instant};

use understudy_client::{Client, Error, Event, FinishReason, Request, Usage};

/// Every stream of a test ends within this time, or the test fails: nothing may hang.
pub const STREAM_DEADLINE: Duration = Duration::from_secs(120);

/// What a client saw of one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Transcript {
    pub ids: Vec<u32>,
    /// Bits of the logprobs, which have to be equal too.
    pub logprob_bits: Vec<u32>,
    pub text: String,
    pub finish_reason: FinishReason,
    pub usage: Usage,
}

/// A transcript, and when each token came.
#[derive(Debug)]
pub struct Observed {
    pub transcript: Transcript,
    pub started: Instant,
    pub arrivals: Vec<Instant>,
}

impl Observed {
    /// The longest pause between two tokens.
    pub fn longest_gap(&self) -> Duration {
        self.arrivals
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .max()
            .unwrap_or_default()
    }
}

/// Runs a request to its end.
///
/// # Errors
/// If it ends with an error.
///
/// # Panics
/// If positions are not 0, 1, 2, …; if anything follows the terminal event; or if the stream hangs.
pub async fn collect(client: &Client, request: Request) -> Result<Transcript, Error> {
    observe(client, request)
        .await
        .map(|observed| observed.transcript)
}

/// As [`collect`], with times.
///
/// # Errors
/// As [`collect`].
///
/// # Panics
/// As [`collect`].
pub async fn observe(client: &Client, request: Request) -> Result<Observed, Error> {
    let run = run(client, request);
    tokio::time::timeout(STREAM_DEADLINE, run)
        .await
        .expect("a stream must not hang")
}

async fn run(client: &Client, mut request: Request) -> Result<Observed, Error> {
    request.sampling.logprobs = true;
    let started = Instant::now();
    let mut stream = client.submit(request).await?;
    let (mut ids, mut logprob_bits, mut text, mut arrivals) =
        (Vec::new(), Vec::new(), String::new(), Vec::new());
    let mut end = None;
    while let Some(event) = stream.next().await? {
        assert!(end.is_none(), "an event after the terminal one: {event:?}");
        match event {
            Event::Accepted(_) => {}
            Event::Token(token) => {
                assert_eq!(
                    token.position as usize,
                    ids.len(),
                    "positions without gap or repeat"
                );
                arrivals.push(Instant::now());
                ids.push(token.id);
                logprob_bits.push(token.logprob.expect("logprobs were asked for").to_bits());
                text.push_str(&token.text);
            }
            Event::Finished(finished) => {
                text.push_str(&finished.text);
                end = Some(finished);
            }
        }
    }
    let end = end.expect("a stream ends with a terminal event or an error");
    assert_eq!(
        end.usage.completion_tokens as usize,
        ids.len(),
        "usage counts what was shown"
    );
    let transcript = Transcript {
        ids,
        logprob_bits,
        text,
        finish_reason: end.finish_reason,
        usage: end.usage,
    };
    Ok(Observed {
        transcript,
        started,
        arrivals,
    })
}
