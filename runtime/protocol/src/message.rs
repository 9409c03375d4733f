//! The messages of the client protocol, version 1: MessagePack maps with named fields, one per frame.
//!
//! A connection opens with [`ClientMessage::Hello`], answered by [`ServerMessage::Welcome`]. After that any number of
//! requests share it. Every message about a request names the `stream`: a number the client chooses, unique among the
//! requests in flight on this connection.

use serde::{Deserialize, Serialize};

use crate::error::ErrorBody;
use crate::id::{Position, RequestId};
use crate::strict;

/// Client → server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientMessage {
    /// First message of a connection.
    Hello {
        /// Highest protocol version the client speaks; the server answers with the one that is used.
        version: u32,
        /// Free text for the operator's logs, such as `understudy-client/0.1.0`. At most 128 bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        client: Option<String>,
        /// The access token, where the server asks for one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        token: Option<String>,
    },
    Submit(Submit),
    Cancel {
        stream: u32,
    },
    /// Go on with a request that was submitted on another connection, or on this one.
    Resume {
        stream: u32,
        request: RequestId,
        /// The first position the client lacks.
        next_position: Position,
        /// Token events the server may send before more [`ClientMessage::Credit`].
        credit: u32,
    },
    /// Allows `tokens` further token events on a stream.
    Credit {
        stream: u32,
        tokens: u32,
    },
    Ping {
        nonce: u64,
    },
    Status {},
}

/// A request for a completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    pub stream: u32,
    /// Name of a deployed model; may be left out where the cluster serves one only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(deserialize_with = "strict::map")]
    pub input: Input,
    #[serde(default, deserialize_with = "strict::map")]
    pub sampling: Sampling,
    /// Text that ends the request when it appears in the output. At most 16 strings of at most 256 bytes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Whether the text of a matched stop string is sent too.
    #[serde(default)]
    pub include_stop: bool,
    /// Milliseconds until the request ends with `deadline_exceeded`; the server has a default and a maximum.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Whether the request goes on when this connection closes, for a later `resume`; otherwise it is cancelled.
    #[serde(default)]
    pub resumable: bool,
    /// Token events the server may send before more `credit`.
    #[serde(default = "default_credit")]
    pub credit: u32,
    /// Requests with a higher one go first where an engine has not room for all; 0 is ordinary.
    #[serde(default, skip_serializing_if = "is_ordinary")]
    pub priority: i32,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_ordinary(priority: &i32) -> bool {
    *priority == 0
}

/// Initial credit where a client names none.
pub fn default_credit() -> u32 {
    64
}

/// What to complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// Text, tokenized by the server, with the special tokens that the tokenizer adds.
    Prompt(String),
    /// Token ids, taken as they are. At least one.
    TokenIds(Vec<u32>),
    /// Messages, rendered by the model's chat template with the assistant's turn opened.
    Messages(#[serde(deserialize_with = "strict::maps")] Vec<ChatMessage>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`, as the model's template knows them.
    pub role: String,
    pub content: String,
}

/// Sampling parameters; whatever is left out takes the model's `generation_config.json`, then the neutral value.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop_token_ids: Vec<u32>,
    pub ignore_eos: bool,
    /// Whether token events carry `logprob`.
    pub logprobs: bool,
    /// How many alternatives per position, 0 ..= 20; implies `logprobs`.
    pub top_logprobs: u32,
    /// Added to the logits of these token ids before anything else. At most 1024, each from -100 to 100.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Only these token ids may be chosen; at least one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Tokens that may be guessed ahead from repetitions in prompt and output and then checked together; 0 is off. Changes the speed only.
    #[serde(skip_serializing_if = "is_zero")]
    pub speculate: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Server → client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerMessage {
    Welcome {
        version: u32,
        /// Name of the node, for messages to people.
        node: String,
        server: String,
        limits: Limits,
    },
    /// The request has a log; from here on it can be resumed by its id.
    Accepted {
        stream: u32,
        request: RequestId,
        prompt_tokens: u32,
        /// The seed in use, whether the client gave it or the server drew it.
        seed: u64,
    },
    Token(TokenEvent),
    /// The terminal event of a request that ended well. Nothing follows on this stream.
    Finished {
        stream: u32,
        finish_reason: FinishReason,
        usage: Usage,
        /// Text that was held back (it might have become a stop string, or was an incomplete character) and now counts.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        text: String,
    },
    /// The terminal event of a request that failed, or, without a stream, of the connection.
    Error {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stream: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        request: Option<RequestId>,
        #[serde(flatten)]
        error: ErrorBody,
    },
    Pong {
        nonce: u64,
    },
    Status(ClusterStatus),
}

/// One committed token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenEvent {
    pub stream: u32,
    /// Output position, counted from 0, without gap or repeat.
    pub position: Position,
    pub id: u32,
    /// The text that this token completes: whole characters only, possibly empty.
    pub text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    pub id: u32,
    pub logprob: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// `max_tokens`, or the context is full.
    Length,
    /// The client cancelled.
    Cancelled,
    /// End-of-sequence, a stop id or a stop string; and any reason that this version of the crate does not know.
    #[serde(other)]
    Stop,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
}

/// What the server holds a connection to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Largest frame the server accepts, in bytes, without the length field.
    pub max_frame_bytes: u32,
    /// Requests in flight on one connection.
    pub max_streams: u32,
    /// Token events of credit one stream can hold.
    pub max_credit: u32,
}

/// The cluster as one gateway sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub cluster: String,
    /// The gateway that answers.
    pub node: String,
    pub version: String,
    pub nodes: Vec<NodeStatus>,
    pub replicas: Vec<ReplicaStatus>,
    /// Requests in flight at this gateway.
    pub requests_in_flight: u32,
    /// Finished requests kept for `resume`, and the bytes they take.
    pub requests_kept: u32,
    pub requests_kept_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub name: String,
    /// Changes with every start of the node.
    pub incarnation: String,
    /// `self`, `alive`, `suspect`, `dead` or `never_seen`.
    pub state: String,
    pub roles: Vec<String>,
    pub address: String,
    /// Milliseconds since the last heartbeat; absent for the answering node and nodes never seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heard_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    pub model: String,
    pub node: String,
    /// Number of the replica within its model, unique in the cluster.
    pub replica: u32,
    /// `starting`, `ready`, `suspect`, `backoff`, `stopping`, `down`, `unreachable`.
    pub state: String,
    pub in_flight: u32,
    pub workers: Vec<WorkerStatus>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub shard: u32,
    pub state: String,
    /// Absent while no engine process runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_pid: Option<u32>,
    pub device: String,
    pub restarts: u32,
    /// Why the last engine ended, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    #[serde(default)]
    pub running: u32,
    #[serde(default)]
    pub waiting: u32,
    #[serde(default)]
    pub kv_used_tokens: u64,
    #[serde(default)]
    pub kv_capacity_tokens: u64,
    #[serde(default)]
    pub rss_bytes: u64,
    #[serde(default)]
    pub fingerprint: String,
}
