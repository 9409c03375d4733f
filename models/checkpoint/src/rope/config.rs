//! The rotary embedding's part of a `config.json`: theta, the turning part, and the rule by which frequencies are stretched.
//!
//! Two spellings: transformers 4 has `rope_theta` and `rope_scaling` at the top, with the rule's name in `rope_type` or (older) `type`;
//! transformers 5 has `rope_parameters`, theta and the rule together. A model without its rule answers well at first and talks nonsense beyond
//! some position, and nobody knows why; so what is not understood is refused.

use serde_json::{Map, Value};

use super::{RopeScaling, RopeSpec, ln};
use crate::error::ConfigError;
use crate::keys::Keys;

const ROPE_TYPES: &str = "\"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\", \"longrope\"";

/// Keys that some rule has. In a rule of another type transformers leaves them out, with a warning.
const RULE_KEYS: &[&str] = &[
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
];

/// Where a family keeps its rotary keys, and what their absence means.
#[derive(Debug, Clone)]
pub struct RopeKeys {
    /// Elements of a head.
    pub head_dim: usize,
    pub theta_key: &'static str,
    pub theta: f64,
    /// Key and default of the share of a head that turns; `None` if the family turns whole heads.
    pub partial: Option<(&'static str, f64)>,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// Positions that the model will be run with, at most `max_positions`: LongRoPE has factors for long and for short contexts.
    pub context_length: usize,
    /// In Phi-3's files, `su` and `yarn` are older names of LongRoPE.
    pub yarn_is_longrope: bool,
    /// What stands for `original_max_position_embeddings` at the top where it is absent; `None`: what the rule says, or `max_positions`.
    pub original_positions: Option<usize>,
}

/// The one rotary embedding of a model.
///
/// # Errors
/// [`ConfigError`] for a rule that is not understood, or two that differ.
pub fn read(keys: &Keys<'_>, of: &RopeKeys) -> Result<RopeSpec, ConfigError> {
    let (new, old) = (keys.get("rope_parameters"), keys.get("rope_scaling"));
    if let (Some(new), Some(old)) = (new, old)
        && without_theta(new) != without_theta(old)
    {
        return Err(ConfigError::Inconsistent(
            "rope_parameters and rope_scaling are two rules that differ; keep the one that the model was trained with".to_owned(),
        ));
    }
    read_rule(keys, new.or(old), of)
}

/// The embedding that `rule` describes, with the keys at the top for what it leaves out.
///
/// # Errors
/// [`ConfigError`] for a rule that is not understood.
pub fn read_rule(
    keys: &Keys<'_>,
    rule: Option<&Value>,
    of: &RopeKeys,
) -> Result<RopeSpec, ConfigError> {
    let nothing = Map::new();
    let rule = match rule {
        None => &nothing,
        Some(Value::Object(rule)) => rule,
        Some(other) => return Err(unusable(other)),
    };
    let rule = Keys::new("rope rule", rule);
    let theta = match rule.number_if("rope_theta")? {
        Some(_) => rule.positive_or("rope_theta", of.theta)?,
        None => keys.positive_or(of.theta_key, of.theta)?,
    };
    // The rule's win, as in transformers.
    keys.ignore(&[of.theta_key, of.partial.map_or("", |(key, _)| key)]);
    let rotary_dim = rotary_dim(keys, &rule, of)?;
    let scaling = Rule {
        keys,
        rule: &rule,
        of,
        rotary_dim,
    }
    .scaling()?;
    rule.ignore(RULE_KEYS);
    rule.finish()?;
    Ok(RopeSpec {
        theta,
        rotary_dim,
        scaling,
    })
}

/// A rule as far as it scales, in one spelling.
fn without_theta(rule: &Value) -> Value {
    let mut rule = rule.clone();
    if let Some(keys) = rule.as_object_mut() {
        keys.remove("rope_theta");
        if let Some(name) = keys.remove("type") {
            keys.entry("rope_type").or_insert(name);
        }
    }
    rule
}

fn unusable(value: &Value) -> ConfigError {
    ConfigError::Unsupported {
        key: "rope_type".to_owned(),
        value: value.to_string(),
        supported: ROPE_TYPES.to_owned(),
    }
}

fn rotary_dim(keys: &Keys<'_>, rule: &Keys<'_>, of: &RopeKeys) -> Result<usize, ConfigError> {
    let (key, default) = of.partial.unwrap_or(("partial_rotary_factor", 1.0));
    let share = match rule.number_if("partial_rotary_factor")? {
        Some(share) => share,
        None => keys.number_if(key)?.unwrap_or(default),
    };
    if of.partial.is_none() && share != 1.0 {
        return Err(ConfigError::Unsupported {
            key: key.to_owned(),
            value: share.to_string(),
            supported: "1 (whole heads turn in this family)".to_owned(),
        });
    }
    // transformers cuts off what is behind the point.
    let dim = (of.head_dim as f64 * share) as usize;
    if !(0.0..=1.0).contains(&share) || dim == 0 || !dim.is_multiple_of(2) {
        return Err(ConfigError::Inconsistent(format!(
            "head_dim = {} and {key} = {share} make {dim} elements that turn; rotary embedding turns pairs",
            of.head_dim
        )));
    }
    Ok(dim)
}

/// A rule while it is read.
struct Rule<'a> {
    keys: &'a Keys<'a>,
    rule: &'a Keys<'a>,
    of: &'a RopeKeys,
    rotary_dim: usize,
}

impl<'a> Rule<'a> {
    /// The name of the rule. One that says anything but theta and has no usable name must not pass for no rule.
    fn name(&self) -> Result<&'a str, ConfigError> {
        // "type" is the spelling before transformers 4.43; some files have both.
        match (self.rule.raw("rope_type"), self.rule.raw("type")) {
            (Some(new), Some(old)) if new != old => Err(ConfigError::Inconsistent(format!(
                "a rope rule has rope_type = {new} and type = {old}"
            ))),
            (Some(name), _) | (None, Some(name)) => name.as_str().ok_or_else(|| unusable(name)),
            (None, None)
                if self
                    .rule
                    .names()
                    .all(|key| key == "rope_theta" || key == "partial_rotary_factor") =>
            {
                Ok("default")
            }
            (None, None) => Err(ConfigError::Missing {
                key: "rope_type".to_owned(),
                family: "rope rule".to_owned(),
            }),
        }
    }

    fn scaling(&self) -> Result<RopeScaling, ConfigError> {
        match self.name()? {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear {
                factor: self.number("factor")?,
            }),
            // The rule stretches only from max_position_embeddings on, and no sequence is longer than that here: nothing to compute.
            "dynamic" => self.number("factor").map(|_| RopeScaling::None),
            "llama3" => self.llama3(),
            "longrope" | "su" => self.longrope(),
            "yarn" if self.of.yarn_is_longrope => self.longrope(),
            "yarn" => self.yarn(),
            other => Err(unusable(&Value::from(other))),
        }
    }

    fn llama3(&self) -> Result<RopeScaling, ConfigError> {
        let (low, high) = (
            self.number("low_freq_factor")?,
            self.number("high_freq_factor")?,
        );
        if high <= low {
            return Err(ConfigError::Inconsistent(format!(
                "high_freq_factor = {high} is not above low_freq_factor = {low}"
            )));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.number("factor")?,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: self.number("original_max_position_embeddings")?,
        })
    }

    fn number(&self, key: &str) -> Result<f64, ConfigError> {
        self.rule.positive(key)
    }

    /// Positions of pre-training: at the top (Phi-3), in the rule, or all.
    fn original(&self) -> Result<f64, ConfigError> {
        let key = "original_max_position_embeddings";
        let of_rule = self.rule.positive_or(key, self.of.max_positions as f64)?;
        let default = self.of.original_positions.map_or(of_rule, |n| n as f64);
        let original = self.keys.positive_or(key, default)?;
        if original <= 1.0 {
            return Err(ConfigError::Inconsistent(format!(
                "{key} = {original}; a rotary rule needs more than one position"
            )));
        }
        Ok(original)
    }

    fn yarn(&self) -> Result<RopeScaling, ConfigError> {
        let original = self.original()?;
        let factor = self
            .rule
            .positive_or("factor", self.of.max_positions as f64 / original)?;
        let mscale = self.rule.number_if("mscale")?.filter(|x| *x != 0.0);
        let all_dim = self.rule.number_if("mscale_all_dim")?.filter(|x| *x != 0.0);
        let scale = |mscale: f64| match factor > 1.0 {
            true => 0.1 * mscale * ln(factor) + 1.0,
            false => 1.0,
        };
        let attention_factor = match (mscale, all_dim) {
            (Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
            _ => scale(1.0),
        };
        // 0 is transformers' "not given" too.
        let beta = |key, default| -> Result<f64, ConfigError> {
            Ok(self
                .rule
                .number_if(key)?
                .filter(|x| *x != 0.0)
                .unwrap_or(default))
        };
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: beta("beta_fast", 32.0)?,
            beta_slow: beta("beta_slow", 1.0)?,
            original_max_position_embeddings: original,
            attention_factor: self
                .rule
                .positive_or("attention_factor", attention_factor)?,
            truncate: self.rule.flag_or("truncate", true)?,
        })
    }

    /// transformers takes the long factors once a sequence is longer than the original context, and computes all of its keys anew. Here the
    /// length that the model is run with decides, once: keys that are computed stay valid, and a sequence's text does not depend on when it
    /// grew. Within the original context give that as the limit, to have the short factors.
    fn longrope(&self) -> Result<RopeScaling, ConfigError> {
        let original = self.original()?;
        let (long, short) = (self.factors("long_factor")?, self.factors("short_factor")?);
        let factor = self
            .rule
            .positive_or("factor", self.of.max_positions as f64 / original)?;
        let attention_factor = match factor > 1.0 {
            true => (1.0 + ln(factor) / ln(original)).sqrt(),
            false => 1.0,
        };
        Ok(RopeScaling::PerFrequency {
            factors: match self.of.context_length as f64 > original {
                true => long,
                false => short,
            },
            attention_factor: self
                .rule
                .positive_or("attention_factor", attention_factor)?,
        })
    }

    /// One factor per pair.
    fn factors(&self, key: &str) -> Result<Vec<f64>, ConfigError> {
        let factors: Option<Vec<f64>> = self
            .rule
            .required_list(key)?
            .iter()
            .map(|factor| factor.as_f64().filter(|x| x.is_finite() && *x > 0.0))
            .collect();
        let factors = factors.ok_or_else(|| self.rule.unsupported(key, "positive numbers"))?;
        if factors.len() != self.rotary_dim / 2 {
            return Err(ConfigError::Inconsistent(format!(
                "{key} has {} numbers, but {} pairs of a head turn",
                factors.len(),
                self.rotary_dim / 2
            )));
        }
        Ok(factors)
    }
}
