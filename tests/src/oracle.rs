//! The oracle: what a client saw of a request, to be compared with the fault-free run, bit for bit.

use std::time::{Duration, Instant};

use understudy_client::{Client, Error, Event, FinishReason, Request, RequestId, Usage};

/// Every stream of a test ends within this time, or the test fails: nothing may hang.
pub const STREAM_DEADLINE: Duration = Duration::from_secs(120);

/// What a client saw of one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Transcript {
    pub ids: Vec<u32>,
    /// Bits of the logprobs, which have to be equal too.
    pub logprob_bits: Vec<u32>,
    /// Alternatives of each position: ids, and the bits of their logprobs.
    pub top: Vec<Vec<(u32, u32)>>,
    pub text: String,
    pub finish_reason: FinishReason,
    pub usage: Usage,
}

/// A transcript, and when each token came.
#[derive(Debug)]
pub struct Observed {
    pub transcript: Transcript,
    pub request: RequestId,
    pub started: Instant,
    pub arrivals: Vec<Instant>,
}

impl Observed {
    /// The longest pause between two tokens.
    pub fn longest_gap(&self) -> Duration {
        let pauses = self.arrivals.windows(2).map(|pair| pair[1] - pair[0]);
        pauses.max().unwrap_or_default()
    }

    /// The longest pause that ended after `fault`: from the last token before it to the first one after it.
    pub fn longest_gap_after(&self, fault: Instant) -> Option<Duration> {
        let pauses = self.arrivals.windows(2).filter(|pair| pair[1] > fault);
        pauses.map(|pair| pair[1] - pair[0]).max()
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
    let observed = observe(client, request).await?;
    Ok(observed.transcript)
}

/// As [`collect`], with times.
///
/// # Errors
/// As [`collect`].
///
/// # Panics
/// As [`collect`].
pub async fn observe(client: &Client, request: Request) -> Result<Observed, Error> {
    observe_with(client, request, |_| ()).await
}

/// As [`observe`]; `seen` is told how many tokens the client has: 0 once the request is accepted, then after each one.
///
/// # Errors
/// As [`collect`].
///
/// # Panics
/// As [`collect`].
pub async fn observe_with(
    client: &Client,
    request: Request,
    seen: impl FnMut(u32),
) -> Result<Observed, Error> {
    tokio::time::timeout(STREAM_DEADLINE, run(client, request, seen))
        .await
        .expect("a stream must not hang")
}

async fn run(
    client: &Client,
    mut request: Request,
    mut seen: impl FnMut(u32),
) -> Result<Observed, Error> {
    request.sampling.logprobs = true;
    let started = Instant::now();
    let mut stream = client.submit(request).await?;
    let (mut ids, mut logprob_bits, mut top) = (Vec::new(), Vec::new(), Vec::new());
    let (mut text, mut arrivals, mut end) = (String::new(), Vec::new(), None);
    while let Some(event) = stream.next().await? {
        assert!(end.is_none(), "an event after the terminal one: {event:?}");
        match event {
            Event::Accepted(_) => seen(0),
            Event::Token(token) => {
                assert_eq!(
                    token.position as usize,
                    ids.len(),
                    "positions without gap or repeat"
                );
                arrivals.push(Instant::now());
                ids.push(token.id);
                logprob_bits.push(token.logprob.expect("logprobs were asked for").to_bits());
                let alternatives = token.top_logprobs.iter();
                top.push(alternatives.map(|t| (t.id, t.logprob.to_bits())).collect());
                text.push_str(&token.text);
                seen(ids.len() as u32);
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
    Ok(Observed {
        transcript: Transcript {
            ids,
            logprob_bits,
            top,
            text,
            finish_reason: end.finish_reason,
            usage: end.usage,
        },
        request: stream.request_id().expect("an accepted request has an id"),
        started,
        arrivals,
    })
}
