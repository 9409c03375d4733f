//! What a log is made of.

use serde::{Deserialize, Serialize};
use understudy_protocol::message::{FinishReason, Sampling};
use understudy_protocol::{ErrorBody, RequestId};

use crate::log::TokenLog;

/// Everything that was decided when a request was accepted. Never changes afterwards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Admission {
    pub request: RequestId,
    pub model: String,
    /// Prompt token ids, as the model sees them.
    pub prompt: Vec<u32>,
    /// Resolved: every field is set, the seed included.
    pub sampling: Sampling,
    /// Stop strings, folded over the text of the committed tokens.
    pub stop: Vec<String>,
    pub include_stop: bool,
    /// Milliseconds from admission until the request ends with `deadline_exceeded`.
    pub deadline_ms: u64,
    /// Whether the request goes on without a client.
    pub resumable: bool,
    /// Higher ones go first at an engine.
    #[serde(default)]
    pub priority: i32,
}

/// One committed output token. Logprobs are kept bit for bit: they are compared when the log is replayed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub id: u32,
    pub logprob: f32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<(u32, f32)>,
}

impl Entry {
    /// Bytes of memory, for retention limits.
    pub fn size_bytes(&self) -> usize {
        size_of::<Self>() + self.top.len() * size_of::<(u32, f32)>()
    }
}

/// How a request ended. Exactly one per request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Finished(FinishReason),
    Failed(ErrorBody),
}

/// A closed log, kept so that a client can read it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FinishedRequest {
    pub admission: Admission,
    pub log: TokenLog,
    pub outcome: Outcome,
}

impl FinishedRequest {
    /// Bytes of memory, for retention limits.
    pub fn size_bytes(&self) -> usize {
        let stops: usize = self.admission.stop.iter().map(String::len).sum();
        size_of::<Self>()
            + self.admission.prompt.len() * size_of::<u32>()
            + stops
            + self.log.size_bytes()
    }
}
