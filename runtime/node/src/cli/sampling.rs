//! Sampling options shared by `generate` and `chat`, and their translation to the protocol's [`Sampling`].
//!
//! Only what the person gave is sent; the server fills in the model's own defaults and checks the ranges.

use std::time::Duration;

use clap::Args;
use understudy_protocol::message::Sampling;

/// How tokens are chosen, and when the answer ends.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Most tokens to generate
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// Fewest tokens before an end-of-sequence token or a stop id may end the answer
    #[arg(long, value_name = "N")]
    pub min_tokens: Option<u32>,
    /// 0 = always the most likely token; higher = more varied
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample from the smallest set of tokens whose probabilities add up to P
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Sample from the K most likely tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Drop tokens less likely than P times the most likely one
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divide (or multiply) the logits of tokens seen before; 1 = off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtract X from the logit of each token that was generated already; 0 = off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtract X times its count from the logit of each generated token; 0 = off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Same seed, same request: same tokens. Drawn by the server where none is given
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Text that ends the answer when it appears; give it again for several
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Send the text of the matched stop string too
    #[arg(long)]
    pub include_stop: bool,
    /// Token ids that end the answer, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub stop_token_ids: Vec<u32>,
    /// Go on past the end-of-sequence token, up to --max-tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Add BIAS to the logit of token ID, -100 to 100; separated by commas
    #[arg(long, value_name = "ID:BIAS", value_delimiter = ',', value_parser = parse_bias, allow_negative_numbers = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Choose among these token ids only, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub allowed_token_ids: Vec<u32>,
    /// Guess up to N tokens ahead from repetitions and check them together: faster on text that repeats itself, never other tokens
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub speculate: u32,
    /// Go before requests of a lower one where an engine has not room for all
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    pub priority: i32,
    /// Time until the request ends with an error, such as 30s, 1500ms or 2m
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub deadline: Option<Duration>,
}

impl SamplingArgs {
    /// The protocol's parameters. `logprobs` and `top_logprobs` are the caller's to set.
    pub fn to_sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            logprobs: false,
            top_logprobs: 0,
            logit_bias: self.logit_bias.clone(),
            allowed_token_ids: (!self.allowed_token_ids.is_empty())
                .then(|| self.allowed_token_ids.clone()),
            speculate: self.speculate,
        }
    }

    /// The deadline in the protocol's unit. [`parse_duration`] keeps it within `u64`.
    pub fn deadline_ms(&self) -> Option<u64> {
        self.deadline
            .map(|deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Reads `17:-2.5`.
fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once(':');
    parts
        .and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)))
        .ok_or_else(|| format!("{text:?} is no ID:BIAS, such as 17:-2.5"))
}

/// Longest time that an option takes: a week.
const MAX_DURATION: Duration = Duration::from_secs(7 * 24 * 3600);

/// Reads `250ms`, `1.5s`, `2m`, `1h`, or a bare number of seconds; above zero, at most a week.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds_per_unit = match unit.trim() {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}: use ms, s, m or h")),
    };
    let seconds = number
        .parse::<f64>()
        .map_err(|_| "not a time: write a number and a unit, such as 30s or 500ms".to_owned())?
        * seconds_per_unit;
    let time = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    if time < Duration::from_millis(1) || time > MAX_DURATION {
        return Err("out of range: at least 1ms, at most a week (168h)".to_owned());
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        for bad in [
            "",
            "s",
            "-1s",
            "1 day",
            "0",
            "0.0001s",
            "99999999h",
            "1.2.3s",
            "1e9",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn what_is_not_given_is_not_sent() {
        assert_eq!(SamplingArgs::default().to_sampling(), Sampling::default());
        assert_eq!(SamplingArgs::default().deadline_ms(), None);
    }
}
