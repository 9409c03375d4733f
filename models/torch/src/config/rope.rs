//! The rotary embedding's part of a `config.json`: theta, and the rule by which frequencies are stretched.
//!
//! Invariant: a rule is understood or refused, never dropped. A model without its rule answers well at first and talks nonsense beyond
//! some position, and nobody knows why.

use serde_json::Value;

use super::{ConfigError, RawConfig};

const ROPE_TYPES: &str = "\"default\", \"linear\", \"llama3\"";

/// How rotary frequencies are stretched for contexts longer than those of pre-training.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// Every frequency divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1's piecewise rule (transformers' `rope_type = "llama3"`).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
}

/// The name of a rule. A rule that says anything but theta and has no usable name must not pass for no rule.
fn rope_type(rule: &Value) -> Result<&str, ConfigError> {
    let unusable = |value: &Value| ConfigError::Unsupported {
        key: "rope_type",
        value: value.to_string(),
        supported: ROPE_TYPES,
    };
    let Some(keys) = rule.as_object() else {
        return Err(unusable(rule));
    };
    // "type" is the spelling before transformers 4.43; some files have both.
    match (keys.get("rope_type"), keys.get("type")) {
        (Some(new), Some(old)) if new != old => Err(ConfigError::Inconsistent(format!(
            "a rope rule has rope_type = {new} and type = {old}"
        ))),
        (Some(name), _) | (None, Some(name)) => name.as_str().ok_or_else(|| unusable(name)),
        (None, None) if keys.keys().all(|key| key == "rope_theta") => Ok("default"),
        (None, None) => Err(ConfigError::Missing("rope_type")),
    }
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

/// Theta and the scaling rule; `rope_parameters` (transformers 5) wins over the older keys.
pub(super) fn rope_of(raw: &RawConfig) -> Result<(f64, RopeScaling), ConfigError> {
    const DEFAULT_THETA: f64 = 10_000.0;
    let rules: Vec<&Value> = [&raw.rope_parameters, &raw.rope_scaling]
        .into_iter()
        .flatten()
        .filter(|value| !value.is_null())
        .collect();
    if let [new, old] = rules[..]
        && without_theta(new) != without_theta(old)
    {
        return Err(ConfigError::Inconsistent(
            "rope_parameters and rope_scaling are two rules that differ; keep the one that the model was trained with".to_owned(),
        ));
    }
    let Some(rule) = rules.first() else {
        return Ok((raw.rope_theta.unwrap_or(DEFAULT_THETA), RopeScaling::None));
    };
    let number = |key: &'static str| {
        rule.get(key)
            .and_then(Value::as_f64)
            .filter(|x| x.is_finite() && *x > 0.0)
            .ok_or(ConfigError::Missing(key))
    };
    let theta = match rule.get("rope_theta") {
        Some(_) => number("rope_theta")?,
        None => raw.rope_theta.unwrap_or(DEFAULT_THETA),
    };
    let scaling = match rope_type(rule)? {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear {
            factor: number("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")?,
        },
        other => {
            return Err(ConfigError::Unsupported {
                key: "rope_type",
                value: format!("\"{other}\""),
                supported: ROPE_TYPES,
            });
        }
    };
    Ok((theta, scaling))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{
        LlamaConfig,
        tests::{V4, with},
    };
    use super::*;

    #[test]
    fn a_rope_rule_is_understood_or_refused() {
        let rule = json!({"rope_type": "linear", "factor": 2.0});
        let both = |new: Value, old: Value| {
            let mut config: Value = serde_json::from_str(V4).unwrap();
            config["rope_parameters"] = new;
            config["rope_scaling"] = old;
            config.to_string()
        };
        for (text, part) in [
            (with("rope_scaling", json!({"factor": 2.0})), "rope_type"),
            (
                with("rope_scaling", json!({"type": 3, "factor": 2.0})),
                "rope_type = 3",
            ),
            (
                with("rope_scaling", json!({"rope_type": null, "factor": 2.0})),
                "rope_type = null",
            ),
            (
                with("rope_parameters", json!({"rope_theta": 1e4, "factor": 2.0})),
                "rope_type",
            ),
            (with("rope_scaling", json!("linear")), "rope_type"),
            (
                with(
                    "rope_scaling",
                    json!({"rope_type": "linear", "type": "llama3", "factor": 2.0}),
                ),
                "type = \"llama3\"",
            ),
            (
                both(rule.clone(), json!({"rope_type": "linear", "factor": 4.0})),
                "rope_parameters and rope_scaling",
            ),
        ] {
            let error = LlamaConfig::from_json(&text).unwrap_err().to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
        let linear = RopeScaling::Linear { factor: 2.0 };
        for text in [
            both(rule.clone(), json!({"type": "linear", "factor": 2.0})),
            both(rule, Value::Null),
            with(
                "rope_scaling",
                json!({"type": "linear", "rope_type": "linear", "factor": 2.0}),
            ),
        ] {
            assert_eq!(LlamaConfig::from_json(&text).unwrap().rope_scaling, linear);
        }
        for none in [
            json!({}),
            json!({"rope_theta": 9.0}),
            json!({"rope_type": "default"}),
        ] {
            let config = LlamaConfig::from_json(&with("rope_parameters", none)).unwrap();
            assert_eq!(config.rope_scaling, RopeScaling::None);
        }
    }
}
