//! The options of `understudy bench`, and the checks between them.

use std::time::Duration;

use clap::Args;

use super::super::exit::Failure;
use super::super::gateways::GatewayArgs;
use super::super::sampling::parse_duration;
use super::plan::{Prompts, Span, Workload};
use super::report::Settings;

/// Requests sent where neither `--requests` nor `--duration` says otherwise.
const DEFAULT_REQUESTS: u64 = 100;
/// Streams in flight where neither `--concurrency` nor `--rate` says otherwise.
const DEFAULT_CONCURRENCY: u32 = 16;
/// Connections opened at most where `--connections` is not given.
const DEFAULT_MAX_CONNECTIONS: u32 = 8;

/// Put load on a cluster and measure it
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub gateways: GatewayArgs,
    /// Model to use; may be left out where the cluster serves one only
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Keep N requests in flight [default: 16]
    #[arg(long, value_name = "N", conflicts_with = "rate", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub concurrency: Option<u32>,
    /// Start R requests a second on average, at random times (Poisson arrivals), however long they take
    #[arg(long, value_name = "R", value_parser = parse_rate)]
    pub rate: Option<f64>,
    /// With --rate: arrivals beyond N in flight are not sent, and count as failed
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_in_flight: u32,
    /// Stop after N requests [default: 100, unless --duration is given]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,
    /// Start no request after this time, such as 30s; those in flight are waited for
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub duration: Option<Duration>,
    /// Requests to send before measuring begins
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup: u64,
    /// Length of the random prompts in tokens: a number, or a range such as 16..64
    #[arg(
        long,
        value_name = "SPAN",
        default_value = "32",
        conflicts_with = "prompt"
    )]
    pub prompt_tokens: Span,
    /// Token ids that random prompts are drawn from; they must be in the model's vocabulary
    #[arg(
        long,
        value_name = "SPAN",
        default_value = "16..199",
        conflicts_with = "prompt"
    )]
    pub prompt_ids: Span,
    /// Text to send in place of random prompts
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Most tokens to generate per request: a number, or a range such as 16..256
    #[arg(long, value_name = "SPAN", default_value = "64")]
    pub output_tokens: Span,
    /// Go on past the end-of-sequence token, so that every request has its full length
    #[arg(long)]
    pub ignore_eos: bool,
    /// 0 = greedy
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Decides prompts, lengths, arrival times and the requests' sampling seeds
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Connections to spread the requests over [default: as many as the concurrency, at most 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub connections: Option<u32>,
    /// Deadline of each request
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub deadline: Option<Duration>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// When requests start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// As soon as one ends, the next begins; so many at a time.
    Concurrency(u32),
    /// At random times, so many a second.
    Rate { per_second: f64, max_in_flight: u32 },
}

impl BenchArgs {
    /// How requests are paced.
    pub fn pace(&self) -> Pace {
        match self.rate {
            Some(per_second) => Pace::Rate {
                per_second,
                max_in_flight: self.max_in_flight,
            },
            None => Pace::Concurrency(self.concurrency.unwrap_or(DEFAULT_CONCURRENCY)),
        }
    }

    /// How many requests to start at most, after the warm-up; `None` where only time limits them.
    pub fn request_limit(&self) -> Option<u64> {
        match (self.requests, self.duration) {
            (Some(requests), _) => Some(requests),
            (None, Some(_)) => None,
            (None, None) => Some(DEFAULT_REQUESTS),
        }
    }

    /// How many connections to open.
    pub fn connection_count(&self) -> u32 {
        self.connections.unwrap_or_else(|| match self.pace() {
            Pace::Concurrency(streams) => streams.min(DEFAULT_MAX_CONNECTIONS),
            Pace::Rate { .. } => DEFAULT_MAX_CONNECTIONS,
        })
    }

    /// The requests.
    pub fn workload(&self) -> Result<Workload, Failure> {
        let prompts = match &self.prompt {
            Some(text) => Prompts::Text(text.clone()),
            None => Prompts::Random {
                length: self.prompt_tokens,
                ids: self.prompt_ids,
            },
        };
        for (name, span) in [
            ("--prompt-tokens", self.prompt_tokens),
            ("--output-tokens", self.output_tokens),
        ] {
            if span.low == 0 {
                return Err(Failure::usage(format!(
                    "{name}: at least 1 token, got {span}"
                )));
            }
        }
        Ok(Workload {
            seed: self.seed,
            prompts,
            output: self.output_tokens,
        })
    }

    /// The deadline in the protocol's unit.
    pub fn deadline_ms(&self) -> Option<u64> {
        self.deadline
            .map(|deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX))
    }

    /// The settings as the report shows them.
    pub fn settings(&self) -> Settings {
        let (concurrency, max_in_flight) = match self.pace() {
            Pace::Concurrency(streams) => (Some(streams), None),
            Pace::Rate { max_in_flight, .. } => (None, Some(max_in_flight)),
        };
        Settings {
            model: self.model.clone(),
            concurrency,
            rate: self.rate,
            max_in_flight,
            requests: self.request_limit(),
            duration_seconds: self.duration.map(|time| time.as_secs_f64()),
            warmup: self.warmup,
            connections: self.connection_count(),
            prompt_tokens: match self.prompt {
                Some(_) => "text".to_owned(),
                None => self.prompt_tokens.to_string(),
            },
            output_tokens: self.output_tokens.to_string(),
            ignore_eos: self.ignore_eos,
            temperature: self.temperature,
            deadline_ms: self.deadline_ms(),
            seed: self.seed,
        }
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && (0.001..=1e6).contains(&rate) => Ok(rate),
        _ => Err("write requests a second, between 0.001 and 1000000".to_owned()),
    }
}
