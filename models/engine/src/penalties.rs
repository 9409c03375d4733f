//! Token counts of one sequence, and what they do to its logits.
//!
//! Invariant: a [`History`] is a fold over prompt and output in order, so that a replay rebuilds it exactly. The result
//! of [`History::apply`] does not depend on the order in which the table is walked: each entry touches its own logit.

use std::collections::HashMap;

use crate::frame::SamplingParams;

/// Whether these parameters need token counts at all.
#[must_use]
pub fn has_penalties(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0
        || params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
}

/// How often each token has occurred. Tokens of the prompt stand in the table with an output count of 0.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Token id → occurrences in the output.
    counts: HashMap<u32, u32>,
}

impl History {
    /// The history before the first output token.
    #[must_use]
    pub fn of_prompt(prompt: &[u32]) -> Self {
        Self {
            counts: prompt.iter().map(|&id| (id, 0)).collect(),
        }
    }

    /// Makes room, so that `tokens` more output tokens need no allocation.
    pub fn reserve(&mut self, tokens: usize) {
        self.counts.reserve(tokens);
    }

    /// Adds one output token.
    pub fn push(&mut self, id: u32) {
        *self.counts.entry(id).or_insert(0) += 1;
    }

    /// Changes the logits of the tokens seen: repetition (prompt and output; divides positive logits, multiplies
    /// negative ones), then frequency (per occurrence in the output), then presence (once). vLLM's order and meaning.
    /// Ids beyond the row are ignored.
    pub fn apply(&self, params: &SamplingParams, logits: &mut [f32]) {
        for (&id, &count) in &self.counts {
            let Some(logit) = logits.get_mut(id as usize) else {
                continue;
            };
            let penalty = params.repetition_penalty;
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
            if count > 0 {
                *logit -= params.frequency_penalty * count as f32;
                *logit -= params.presence_penalty;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_tokens_count_for_repetition_only() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.25,
            frequency_penalty: 0.5,
            ..SamplingParams::default()
        };
        let mut history = History::of_prompt(&[0, 1]);
        history.push(1);
        history.push(1);
        history.push(3);
        history.push(700);
        let mut logits = [1.0, -1.0, 5.0, 4.0];
        history.apply(&params, &mut logits);
        assert_eq!(logits, [0.5, -2.0 - 1.0 - 0.25, 5.0, 2.0 - 0.5 - 0.25]);
    }

    #[test]
    fn neutral_values_need_no_history() {
        assert!(!has_penalties(&SamplingParams::default()));
        assert!(has_penalties(&SamplingParams {
            presence_penalty: -0.1,
            ..SamplingParams::default()
        }));
        assert!(has_penalties(&SamplingParams {
            frequency_penalty: 0.1,
            ..SamplingParams::default()
        }));
        assert!(has_penalties(&SamplingParams {
            repetition_penalty: 1.1,
            ..SamplingParams::default()
        }));
    }
}
