//! Every metric that the project serves, once: name, kind, unit, help and buckets. What nothing records has no line here.
//!
//! Names with the prefix `vllm:` are those that dashboards and the Gateway API Inference Extension already read, so they
//! are emitted letter for letter; what has no counterpart there is `understudy_`. Units stand last and are base units;
//! counters end in `_total`. No label has unbounded values: no request ids, no prompts, no client addresses.

use metrics::Unit;

/// What a metric is, with the upper bounds of its buckets if it is a histogram.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by size; the bucket `+Inf` is implied.
    Histogram(&'static [f64]),
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// Name as it stands in the exposition.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Unit of its values.
    pub unit: Unit,
    /// One sentence for people.
    pub help: &'static str,
    /// Label keys that it is recorded with.
    pub labels: &'static [&'static str],
}

/// Label: name of the model.
pub const MODEL: &str = "model_name";
/// Label: number of the replica within its model.
pub const ENGINE: &str = "engine";

const REPLICA: &[&str] = &[MODEL, ENGINE];

/// Seconds to the first token.
pub const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Seconds between tokens.
pub const PER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Seconds of a whole request, or of one of its phases.
pub const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Tokens of a request or of a step.
pub const TOKEN_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0,
];
/// Seconds that a stream stands still while its request is taken over; fine where the goals lie (30 ms to 1 s).
pub const STALL_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5,
    2.0, 3.0, 5.0, 10.0, 30.0, 60.0,
];
/// Seconds to commit a batch of tokens: a memory commit takes microseconds, a slow disk tens of milliseconds.
pub const COMMIT_BUCKETS: &[f64] = &[
    0.000_001,
    0.000_002_5,
    0.000_005,
    0.000_01,
    0.000_025,
    0.000_05,
    0.000_1,
    0.000_25,
    0.000_5,
    0.001,
    0.002_5,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    1.0,
];

macro_rules! metrics_table {
    ($($constant:ident = $name:literal, $kind:expr, $unit:ident, $labels:expr, $help:literal;)*) => {
        $(#[doc = $help] pub const $constant: &str = $name;)*

        /// Every metric.
        pub const ALL: &[Metric] = &[$(Metric {
            name: $name, kind: $kind, unit: Unit::$unit, help: $help, labels: $labels,
        }),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

metrics_table! {
    REQUESTS_RUNNING = "vllm:num_requests_running", Gauge, Count, REPLICA,
        "Requests that the replica computes now.";
    REQUESTS_WAITING = "vllm:num_requests_waiting", Gauge, Count, REPLICA,
        "Requests that wait at the replica.";
    KV_CACHE_USAGE = "vllm:kv_cache_usage_perc", Gauge, Count, REPLICA,
        "Share of the replica's KV cache that is in use, from 0 to 1.";
    CACHE_CONFIG_INFO = "vllm:cache_config_info", Gauge, Count, &[MODEL, ENGINE, "block_size", "num_gpu_blocks"],
        "Shape of the replica's KV cache, on whatever device it is, as labels: tokens of a block and number of blocks; always 1.";
    PROMPT_TOKENS = "vllm:prompt_tokens_total", Counter, Count, REPLICA,
        "Prompt tokens computed.";
    GENERATION_TOKENS = "vllm:generation_tokens_total", Counter, Count, REPLICA,
        "Output tokens computed; tokens that are replayed after a fault are not counted again.";
    PREFIX_CACHE_QUERIES = "vllm:prefix_cache_queries_total", Counter, Count, REPLICA,
        "Prompt tokens looked up in the prefix cache; 0 where the engine has none.";
    PREFIX_CACHE_HITS = "vllm:prefix_cache_hits_total", Counter, Count, REPLICA,
        "Prompt tokens found in the prefix cache; 0 where the engine has none.";
    PREEMPTIONS = "vllm:num_preemptions_total", Counter, Count, REPLICA,
        "Requests set back to make room; 0 where the engine never does that.";
    REQUEST_SUCCESS = "vllm:request_success_total", Counter, Count, &[MODEL, ENGINE, "finished_reason"],
        "Requests that ended, by the reason they ended for.";
    TIME_TO_FIRST_TOKEN = "vllm:time_to_first_token_seconds", Histogram(FIRST_TOKEN_BUCKETS), Seconds, REPLICA,
        "Time from the arrival of a request to its first token.";
    INTER_TOKEN_LATENCY = "vllm:inter_token_latency_seconds", Histogram(PER_TOKEN_BUCKETS), Seconds, REPLICA,
        "Time between two tokens of a request.";
    E2E_LATENCY = "vllm:e2e_request_latency_seconds", Histogram(REQUEST_BUCKETS), Seconds, REPLICA,
        "Time from the arrival of a request to its end.";
    QUEUE_TIME = "vllm:request_queue_time_seconds", Histogram(REQUEST_BUCKETS), Seconds, REPLICA,
        "Time that a request waited before its first step.";
    PREFILL_TIME = "vllm:request_prefill_time_seconds", Histogram(REQUEST_BUCKETS), Seconds, REPLICA,
        "Time from the first step of a request to its first token.";
    DECODE_TIME = "vllm:request_decode_time_seconds", Histogram(REQUEST_BUCKETS), Seconds, REPLICA,
        "Time from the first token of a request to its last.";
    INFERENCE_TIME = "vllm:request_inference_time_seconds", Histogram(REQUEST_BUCKETS), Seconds, REPLICA,
        "Time from the first step of a request to its last token.";
    REQUEST_PROMPT_TOKENS = "vllm:request_prompt_tokens", Histogram(TOKEN_BUCKETS), Count, REPLICA,
        "Prompt tokens of a request.";
    REQUEST_GENERATION_TOKENS = "vllm:request_generation_tokens", Histogram(TOKEN_BUCKETS), Count, REPLICA,
        "Output tokens of a request.";
    ITERATION_TOKENS = "vllm:iteration_tokens_total", Histogram(TOKEN_BUCKETS), Count, REPLICA,
        "Tokens computed in one engine step.";

    RECOVERIES = "understudy_recoveries_total", Counter, Count, &["cause", "stage"],
        "Takeovers after a fault that brought the request's next token, by the fault and by how far the request had come.";
    RECOVERY_STALL = "understudy_recovery_stall_seconds", Histogram(STALL_BUCKETS), Seconds, &[],
        "Pause that a takeover made in a request's tokens: from the last token before the fault to the next one, detection included.";
    REPLAYED_TOKENS = "understudy_replayed_tokens_total", Counter, Count, &["source"],
        "Committed tokens whose state was rebuilt after a fault, from saved KV blocks or by computing again.";
    FENCED_MESSAGES = "understudy_fenced_messages_total", Counter, Count, &["source"],
        "Messages that were dropped because they came from a superseded attempt or for a wrong position.";
    WORKER_RESTARTS = "understudy_worker_restarts_total", Counter, Count, &["worker", "cause"],
        "Engine processes that were replaced.";
    QUARANTINED_REQUESTS = "understudy_quarantined_requests_total", Counter, Count, &[],
        "Requests that were ended because too many engines died on them.";
    JOURNAL_COMMIT = "understudy_journal_commit_seconds", Histogram(COMMIT_BUCKETS), Seconds, &[],
        "Time to make a batch of tokens as durable as the configuration asks.";
    HEARTBEAT_AGE = "understudy_heartbeat_age_seconds", Gauge, Seconds, &["peer"],
        "Time since the last sign of life of another node.";
    PEER_STATE = "understudy_peer_state", Gauge, Count, &["peer", "state"],
        "1 for the state that another node is in, as this node sees it, and 0 for the others.";
    CLUSTER_SESSIONS = "understudy_cluster_sessions_total", Counter, Count, &["peer", "event"],
        "Sessions with other nodes that began or ended.";
    CLUSTER_REFUSED = "understudy_cluster_refused_total", Counter, Count, &["reason"],
        "Connections to the cluster port that were refused.";
    PEERS = "understudy_peers", Gauge, Count, &["state"],
        "Other nodes by what this node thinks of them.";
    REPLICAS = "understudy_replicas", Gauge, Count, &[MODEL, "state"],
        "Replicas of this node by state.";
    QUEUED_BYTES = "understudy_queued_bytes", Gauge, Bytes, &["queue"],
        "Bytes that wait in a queue.";
    CONNECTIONS = "understudy_connections", Gauge, Count, &[],
        "Client connections that are open.";
    REQUESTS_IN_FLIGHT = "understudy_requests_in_flight", Gauge, Count, &[],
        "Requests that this gateway holds and that have not ended.";
    REQUEST_ERRORS = "understudy_request_errors_total", Counter, Count, &["code"],
        "Requests that were refused or ended with an error, by error code.";
    PROTOCOL_ERRORS = "understudy_protocol_errors_total", Counter, Count, &["code"],
        "Client connections that were closed because of what they sent, by error code.";
    NODE_INFO = "understudy_node_info", Gauge, Count, &["node", "version", "fingerprint"],
        "This node, as labels: 1 for each numeric fingerprint that it serves now (the empty one if none), 0 for those of before.";
    LOG_LINES_DROPPED = "understudy_log_lines_dropped_total", Counter, Count, &[],
        "Log lines that could not be written, or not fast enough.";
}

/// Tells the installed recorder the unit and help of every metric.
pub fn describe_all() {
    for metric in ALL {
        match metric.kind {
            Counter => metrics::describe_counter!(metric.name, metric.unit, metric.help),
            Gauge => metrics::describe_gauge!(metric.name, metric.unit, metric.help),
            Histogram(_) => metrics::describe_histogram!(metric.name, metric.unit, metric.help),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_follow_the_rules() {
        let mut seen = HashSet::new();
        for metric in ALL {
            assert!(seen.insert(metric.name), "{} stands twice", metric.name);
            assert!(
                metric.name.starts_with("vllm:") || metric.name.starts_with("understudy_"),
                "{}",
                metric.name
            );
            let tail = metric.name.trim_start_matches("vllm:");
            assert!(
                tail.chars()
                    .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'),
                "{}",
                metric.name
            );
            // vLLM's own name for a histogram ends in `_total`; nothing of ours may.
            let exempt = metric.name == ITERATION_TOKENS;
            assert_eq!(
                metric.name.ends_with("_total"),
                metric.kind == Counter || exempt,
                "{}",
                metric.name
            );
            assert_eq!(
                metric.name.ends_with("_seconds"),
                metric.unit == Unit::Seconds,
                "{}",
                metric.name
            );
            assert_eq!(
                metric.name.ends_with("_bytes"),
                metric.unit == Unit::Bytes,
                "{}",
                metric.name
            );
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
    }

    #[test]
    fn buckets_rise() {
        for metric in ALL {
            if let Histogram(buckets) = metric.kind {
                assert!(
                    buckets.windows(2).all(|pair| pair[0] < pair[1]),
                    "{}",
                    metric.name
                );
            }
        }
    }
}
