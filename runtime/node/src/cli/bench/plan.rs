//! What the load generator sends and when: pure functions of the seed.
//!
//! Request `i` has the same prompt, length and sampling seed whatever the concurrency, the rate or the order of
//! completion, so that two runs compare the servers and not the workloads. Arrival times have a generator of their own.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number, or an inclusive range drawn from uniformly: `128` or `64..256`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub low: u32,
    /// At least `low`.
    pub high: u32,
}

impl Span {
    fn draw(self, random: &mut fastrand::Rng) -> u32 {
        random.u32(self.low..=self.high)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            part.parse::<u32>()
                .map_err(|_| "write a number, such as 128, or a range, such as 64..256".to_owned())
        };
        let (low, high) = match text.split_once("..") {
            Some((low, high)) => (
                number(low)?,
                number(high.strip_prefix('=').unwrap_or(high))?,
            ),
            None => (number(text)?, number(text)?),
        };
        if low > high {
            return Err(format!("the range is empty: {low} is above {high}"));
        }
        Ok(Self { low, high })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high {
            write!(f, "{}", self.low)
        } else {
            write!(f, "{}..{}", self.low, self.high)
        }
    }
}

/// The prompts of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompts {
    /// One text for every request.
    Text(String),
    /// Random token ids: how many, and out of which ids.
    Random { length: Span, ids: Span },
}

/// The prompt of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    TokenIds(Vec<u32>),
}

/// Everything that decides the requests of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub seed: u64,
    pub prompts: Prompts,
    /// `max_tokens` of each request.
    pub output: Span,
}

/// One request of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub prompt: Prompt,
    pub max_tokens: u32,
    /// Sampling seed.
    pub seed: u64,
}

/// Keeps the generators of a run apart: arrivals never shift the prompts.
const ARRIVALS: u64 = 0x6172_7269_7661_6c73;

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): neighbouring request numbers get unrelated generators.
fn mix(seed: u64, stream: u64) -> u64 {
    let mut z = seed.wrapping_add(stream.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Workload {
    /// Request number `index`, counted from 0.
    pub fn request(&self, index: u64) -> Planned {
        let mut random = fastrand::Rng::with_seed(mix(self.seed, index));
        let max_tokens = self.output.draw(&mut random);
        let seed = random.u64(..);
        let prompt = match &self.prompts {
            Prompts::Text(text) => Prompt::Text(text.clone()),
            Prompts::Random { length, ids } => {
                let length = length.draw(&mut random);
                Prompt::TokenIds((0..length).map(|_| ids.draw(&mut random)).collect())
            }
        };
        Planned {
            prompt,
            max_tokens,
            seed,
        }
    }
}

/// Arrival times of a Poisson process: independent, exponentially distributed gaps.
#[derive(Debug)]
pub struct Arrivals {
    random: fastrand::Rng,
    mean_gap_s: f64,
    at: Duration,
}

impl Arrivals {
    /// `rate` requests a second on average; above zero and finite, which the command line checks.
    pub fn new(seed: u64, rate: f64) -> Self {
        Self {
            random: fastrand::Rng::with_seed(mix(seed, ARRIVALS)),
            mean_gap_s: 1.0 / rate,
            at: Duration::ZERO,
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    /// The next arrival, counted from the start of the run.
    fn next(&mut self) -> Option<Duration> {
        // 1 - u lies in (0, 1], so that the logarithm is finite.
        let gap_s = -(1.0 - self.random.f64()).ln() * self.mean_gap_s;
        self.at = self
            .at
            .saturating_add(Duration::try_from_secs_f64(gap_s).unwrap_or(Duration::MAX));
        Some(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(seed: u64) -> Workload {
        Workload {
            seed,
            prompts: Prompts::Random {
                length: Span { low: 3, high: 9 },
                ids: Span { low: 16, high: 199 },
            },
            output: Span { low: 5, high: 7 },
        }
    }

    #[test]
    fn spans_are_read_and_shown() {
        assert_eq!(
            "128".parse(),
            Ok(Span {
                low: 128,
                high: 128
            })
        );
        assert_eq!("64..256".parse(), Ok(Span { low: 64, high: 256 }));
        assert_eq!("64..=256".parse(), Ok(Span { low: 64, high: 256 }));
        assert_eq!(
            "64..256".parse::<Span>().map(|span| span.to_string()),
            Ok("64..256".to_owned())
        );
        for bad in ["", "..", "9..3", "-1", "1...2", "x"] {
            assert!(bad.parse::<Span>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_request_depends_on_seed_and_index_only() {
        let plan = workload(1);
        let forwards: Vec<_> = (0..50).map(|i| plan.request(i)).collect();
        let mut backwards: Vec<_> = (0..50).rev().map(|i| workload(1).request(i)).collect();
        backwards.reverse();
        assert_eq!(forwards, backwards);
        assert_ne!(forwards[0], workload(2).request(0));
        for (a, b) in forwards.iter().zip(&forwards[1..]) {
            assert_ne!(a.prompt, b.prompt);
            assert_ne!(a.seed, b.seed);
        }
    }

    #[test]
    fn requests_stay_within_their_spans_and_reach_both_ends() {
        let plan = workload(3);
        let mut lengths = std::collections::BTreeSet::new();
        let mut outputs = std::collections::BTreeSet::new();
        for index in 0..500 {
            let Planned {
                prompt: Prompt::TokenIds(ids),
                max_tokens,
                ..
            } = plan.request(index)
            else {
                panic!("a random prompt is token ids");
            };
            assert!(ids.iter().all(|id| (16..=199).contains(id)));
            lengths.insert(ids.len());
            outputs.insert(max_tokens);
        }
        assert_eq!(
            lengths.into_iter().collect::<Vec<_>>(),
            [3, 4, 5, 6, 7, 8, 9]
        );
        assert_eq!(outputs.into_iter().collect::<Vec<_>>(), [5, 6, 7]);
    }

    #[test]
    fn arrivals_are_poisson_at_the_rate_and_repeat_with_the_seed() {
        let times: Vec<_> = Arrivals::new(5, 200.0).take(20_000).collect();
        assert_eq!(
            times[..9],
            Arrivals::new(5, 200.0).take(9).collect::<Vec<_>>()
        );
        assert!(times.is_sorted());
        let total = times[times.len() - 1].as_secs_f64();
        assert!(
            (95.0..105.0).contains(&total),
            "20,000 arrivals at 200/s took {total} s"
        );
        // An exponential distribution's standard deviation equals its mean; evenly spaced arrivals would have none.
        let gaps: Vec<f64> = times
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
            .collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((0.95..1.05).contains(&(variance.sqrt() / mean)));
    }
}
