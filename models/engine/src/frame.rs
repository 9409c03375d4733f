//! The messages between a node and one engine process.
//!
//! ```text
//!  0        4                    4 + length
//!  +--------+--------------------+
//!  | length |  MessagePack map   |      length: u32, big-endian, bytes of the map
//!  +--------+--------------------+
//! ```
//!
//! The socket is private to a worker and its child: both ends come from one build of this repository, so there is no
//! version negotiation beyond [`ENGINE_PROTOCOL`], which the engine states in [`EngineEvent::Ready`].
//! Token ids only: text never crosses this socket.

use serde::{Deserialize, Serialize};

use crate::replay::NOT_COMPUTED_BITS;

/// Raised by one whenever a message changes incompatibly.
pub const ENGINE_PROTOCOL: u32 = 3;

/// The largest frame either side sends or accepts, in bytes: a prompt of 1 M tokens fits, a garbage length does not.
pub const MAX_FRAME_BYTES: usize = 16 * 1024 * 1024;

/// What names one attempt at one request inside an engine: the request's id and the attempt's epoch.
///
/// Tokens carry both back, so that a late token of an earlier attempt is recognised and dropped.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
pub struct AttemptId {
    /// The request, unique in the cluster (128 random bits).
    pub request: u128,
    /// The attempt, counted from 1 by the request's gateway.
    pub epoch: u32,
}

/// How tokens are chosen. Every field has the neutral value as its default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Finite, 0 ..= 100.
    pub temperature: f32,
    /// Nucleus: the smallest set of most likely tokens whose probability reaches this. (0, 1]; 1 is off.
    pub top_p: f32,
    /// Only the k most likely tokens; 0 is off.
    pub top_k: u32,
    /// Only tokens at least this fraction as likely as the most likely one. [0, 1]; 0 is off.
    pub min_p: f32,
    /// Divides (or multiplies, if negative) the logits of tokens in prompt or output. > 0; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output. [-2, 2]; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output. [-2, 2]; 0 is off.
    pub frequency_penalty: f32,
    /// Keys the counter-based generator together with the position. Chosen at admission when the client gives none.
    pub seed: u64,
    /// Output tokens at most. At least 1.
    pub max_tokens: u32,
    /// No end-of-sequence or stop id before this many output tokens.
    pub min_tokens: u32,
    /// Token ids that end the request (finish reason `stop`), besides the model's end-of-sequence ids.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's end-of-sequence ids.
    pub ignore_eos: bool,
    /// How many most likely alternatives to report per position; the chosen token's own logprob is always reported.
    pub top_logprobs: u32,
    /// Added to the logits of single tokens, before penalties. At most 1024 ids, each once; finite, -100 ..= 100.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be chosen; `None` allows all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_token_ids: Option<Vec<u32>>,
    /// How many tokens to draft at most by looking up what followed the same tokens earlier on, and to check in one step.
    /// Changes how fast tokens come, never which; only engines that are exact do it. 0 (off) ..= 16.
    #[serde(skip_serializing_if = "is_zero")]
    pub speculate: u32,
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            max_tokens: 256,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            top_logprobs: 0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            speculate: 0,
        }
    }
}

/// One output token as it was computed. Logprobs are of the raw logits (before penalties and temperature), natural
/// log, kept as `f32` so that their bits can be compared between runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputToken {
    pub id: u32,
    pub logprob: f32,
    /// The most likely tokens at this position, best first; empty unless asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<(u32, f32)>,
}

/// Work for the engine: a prompt, and the output tokens that are already committed and must be forced, not resampled.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StartAttempt {
    pub attempt: AttemptId,
    pub prompt: Vec<u32>,
    /// Committed output so far; empty at first. The engine goes on at position `committed.len()`.
    pub committed: Vec<u32>,
    /// Logprobs of the last few committed tokens. The engine recomputes them during the replay and answers
    /// [`AttemptError::ReplayMismatch`] if they differ by more than its numerics may ([`crate::replay`]).
    pub expect_logprobs: Vec<f32>,
    /// Engines died on the request: until its first new token it is computed alone, each step announced by
    /// [`EngineEvent::Alone`], so that another death shows whose it is.
    #[serde(default)]
    pub suspect: bool,
    /// Higher ones are computed first; equal ones in order of arrival.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i32,
    /// Another attempt with the same prompt, one of several completions of one request: if it is here, its computed prompt is
    /// shared. Only a hint: the tokens are the same with or without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fork_of: Option<AttemptId>,
    /// Cached prefixes are shared only among attempts with the same salt, so that tenants cannot probe each other's prompts.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cache_salt: u128,
    pub sampling: SamplingParams,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End-of-sequence id, stop id or stop string.
    Stop,
    /// `max_tokens` reached, or the context is full.
    Length,
}

/// Node → engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineCommand {
    Start(StartAttempt),
    /// Stops an attempt and frees its blocks; unknown attempts are ignored (they may just have finished).
    Cancel {
        attempt: AttemptId,
    },
    /// Finish nothing more, exit 0.
    Shutdown,
}

/// One token of one attempt, as part of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepToken {
    pub attempt: AttemptId,
    /// Output position of this token, counted from 0.
    pub position: u32,
    pub token: OutputToken,
    /// Set on the attempt's last token. The token that ended the request (end-of-sequence, stop id) is included.
    pub finish: Option<FinishReason>,
    /// Set on the attempt's first token in this engine: how long it waited from its arrival until the first step that
    /// computed anything of it, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waited_ms: Option<u32>,
}

/// Why one attempt cannot go on in this engine, while the engine itself is well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum AttemptError {
    /// Prompt, committed tokens or parameters that this model cannot serve. Final.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// Every place among the running and the waiting is taken. Try another replica, or later.
    #[error("engine is full: {running} running, {waiting} waiting (limit {limit})")]
    Full {
        running: u32,
        waiting: u32,
        limit: u32,
    },
    /// The recomputed logprob of a committed token differs, or nothing could be recomputed since the log does not fit this engine's
    /// context (`actual` is [`NOT_COMPUTED_BITS`] then): this engine must not serve this log, another may.
    #[error("{}", mismatch_text(.position, .expected, .actual))]
    ReplayMismatch {
        position: u32,
        expected: u32,
        actual: u32,
    },
    /// A logit is NaN or plus infinity, or all are minus infinity: damaged weights, or a number format too narrow for them.
    #[error(
        "logits at output position {position} are not finite; check the weights, or use a wider dtype"
    )]
    NotFinite { position: u32 },
}

fn mismatch_text(position: &u32, expected: &u32, actual: &u32) -> String {
    if *actual == NOT_COMPUTED_BITS {
        return format!(
            "the log cannot be replayed here: this engine's context or KV cache has room for {position} output tokens, and no fewer are committed; give all replicas of a model the same context_length and as large a cache"
        );
    }
    format!(
        "replay mismatch at output position {position}: committed logprob bits {expected:#010x}, recomputed {actual:#010x}"
    )
}

/// What an engine says of itself once its weights are loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineInfo {
    pub protocol: u32,
    pub pid: u32,
    /// Architecture name of `config.json`, such as `LlamaForCausalLM`.
    pub architecture: String,
    /// Prompt plus output tokens at most.
    pub context_length: u32,
    pub vocab_size: u32,
    pub eos_token_ids: Vec<u32>,
    /// `cpu`, `cuda:0`, `fake`.
    pub device: String,
    /// `f32`, `bf16`, `f16`.
    pub dtype: String,
    /// Requests computed at the same time at most.
    pub max_sequences: u32,
    /// Tokens that the KV cache holds in all.
    pub kv_capacity_tokens: u64,
    /// Numeric fingerprint: two engines with the same one compute the same bits.
    pub fingerprint: String,
    /// Wall time from process start to ready, in milliseconds.
    pub load_ms: u64,
}

/// A snapshot for load balancing, hang detection and metrics.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineHealth {
    /// Watermark of work: steps finished since start, plus the parts of steps that the runner has reported. Busy and not
    /// moving means hung.
    pub steps: u64,
    /// Whether the model thread has work.
    pub busy: bool,
    pub running: u32,
    pub waiting: u32,
    /// Positions of all blocks that sequences hold.
    pub kv_used_tokens: u64,
    /// Totals since start.
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub replayed_tokens: u64,
    /// Replayed logprobs that were close to the committed ones, but not bit-equal; 0 from engines that are exact.
    #[serde(default)]
    pub close_logprobs: u64,
    /// Blocks that sequences hold, those that only the prefix cache holds, and all there are.
    #[serde(default)]
    pub kv_blocks_used: u32,
    #[serde(default)]
    pub kv_blocks_cached: u32,
    #[serde(default)]
    pub kv_blocks_total: u32,
    /// Tokens that were found in the prefix cache instead of being computed.
    #[serde(default)]
    pub prefix_hit_tokens: u64,
    /// Sequences that had to give their blocks to others.
    #[serde(default)]
    pub preemptions: u64,
    /// Tokens that were drafted, and those of them that were the right ones.
    #[serde(default)]
    pub drafted_tokens: u64,
    #[serde(default)]
    pub accepted_tokens: u64,
    pub rss_bytes: u64,
}

/// Engine → node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineEvent {
    /// Loading goes on; 0.0 ..= 1.0. Also proves life during a long load.
    Loading {
        progress: f32,
    },
    Ready(EngineInfo),
    /// The step that begins now computes this attempt and no other.
    Alone {
        attempt: AttemptId,
    },
    /// One step is done. Sent for every step, also for those that run prompts only.
    Step {
        step: u64,
        /// Tokens of prompts that it ran through the model.
        #[serde(default)]
        prompt_tokens: u32,
        /// Every token that came out of it: several of an attempt whose drafts were right, then at consecutive positions.
        tokens: Vec<StepToken>,
    },
    /// The attempt is over here; no tokens of it follow.
    AttemptFailed {
        attempt: AttemptId,
        error: AttemptError,
    },
    /// Sent every [`HEARTBEAT_INTERVAL_MS`] by a thread of its own.
    Heartbeat(EngineHealth),
    /// The engine as a whole cannot go on (weights missing, out of memory); it exits non-zero right after.
    Fatal {
        message: String,
    },
}

/// How often an engine sends a heartbeat, in milliseconds.
pub const HEARTBEAT_INTERVAL_MS: u64 = 100;
