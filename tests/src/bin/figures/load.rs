//! The streams that faults strike: many at once, of the greatest length, each of another kind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::task::JoinHandle;
use understudy_client::{Client, Request};
use understudy_tests::oracle::{Observed, Transcript, observe, observe_with};

#[derive(Debug, Clone, clap::Args)]
pub struct LoadArgs {
    /// Streams at once, over both replicas
    #[arg(long, default_value_t = 8)]
    pub streams: u32,
    /// Tokens of each stream
    #[arg(long, default_value_t = 900)]
    pub tokens: u32,
}

/// The requests, and what each of them gives when nothing fails.
pub struct Load {
    args: LoadArgs,
    expected: Vec<Transcript>,
}

/// One run of all of them.
pub struct Round {
    streams: Vec<(Arc<AtomicU32>, JoinHandle<Observed>)>,
}

impl Load {
    /// Runs every request once, without faults.
    ///
    /// # Panics
    /// If one of them fails.
    pub async fn reference(client: &Client, args: &LoadArgs) -> Self {
        let mut expected = Vec::new();
        for n in 0..args.streams {
            let run = observe(client, request(n, args.tokens)).await;
            expected.push(run.expect("the fault-free run").transcript);
        }
        Self {
            args: args.clone(),
            expected,
        }
    }

    /// Starts every request, each on a task.
    pub fn start(&self, client: &Client) -> Round {
        let streams = (0..self.args.streams).map(|n| {
            let seen = Arc::new(AtomicU32::new(0));
            let (client, count) = (client.clone(), seen.clone());
            let request = request(n, self.args.tokens);
            let task = tokio::spawn(async move {
                let count = |tokens| count.store(tokens, Ordering::Relaxed);
                let ended = observe_with(&client, request, count).await;
                ended.unwrap_or_else(|error| panic!("stream {n}: {error}"))
            });
            (seen, task)
        });
        Round {
            streams: streams.collect(),
        }
    }

    /// How many of the streams are bit-equal to the fault-free runs.
    pub fn equal(&self, seen: &[Observed]) -> usize {
        let pairs = self.expected.iter().zip(seen);
        pairs
            .filter(|(expected, seen)| **expected == seen.transcript)
            .count()
    }
}

impl Round {
    /// Tokens that the slowest stream has.
    pub fn least(&self) -> u32 {
        let counts = self
            .streams
            .iter()
            .map(|(seen, _)| seen.load(Ordering::Relaxed));
        counts.min().unwrap_or_default()
    }

    /// Waits for the end of every stream.
    ///
    /// # Panics
    /// If one of them fails or hangs.
    pub async fn end(self) -> Vec<Observed> {
        let mut ended = Vec::new();
        for (_, task) in self.streams {
            ended.push(task.await.expect("a stream"));
        }
        ended
    }
}

/// Greedy, sampled, and sampled with penalties, in turns.
fn request(n: u32, tokens: u32) -> Request {
    let mut request = Request::prompt(format!("Count from {} to 300:", n % 7));
    let sampling = &mut request.sampling;
    sampling.max_tokens = Some(tokens);
    sampling.ignore_eos = true;
    sampling.seed = Some(u64::from(n));
    sampling.temperature = Some(if n.is_multiple_of(3) { 0.0 } else { 1.0 });
    if n % 3 == 2 {
        sampling.repetition_penalty = Some(1.1);
        sampling.frequency_penalty = Some(0.2);
    }
    request
}
