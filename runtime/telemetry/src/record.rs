//! Recording: one typed function for each thing that happens, so that no actor spells a metric's name or a label.
//!
//! All of them are cheap, never block and never fail; without an installed recorder they do nothing. What happens per
//! token or per step goes through [`ReplicaMetrics`] and [`RequestMetrics`], which look their series up once.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::names::{self, ENGINE, MODEL};

/// Declares a closed set of label values.
macro_rules! labels {
    ($($(#[doc = $doc:literal])* $name:ident { $($(#[doc = $vdoc:literal])* $variant:ident = $label:literal),+ $(,)? })+) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[doc = $vdoc])* $variant),+ }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The label's text.
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label),+ }
            }
        }
    )+};
}

labels! {
    /// The fault for which a request was taken over.
    RecoveryCause {
        /// The engine process exited or was killed.
        EngineExit = "engine_exit",
        /// The engine process was alive but sent no heartbeat, or finished no step.
        EngineHang = "engine_hang",
        /// The engine reported an error for the request.
        EngineError = "engine_error",
        /// The node of the replica was lost.
        NodeLost = "node_lost",
        /// The replica refused the request, or had no room.
        Refused = "refused",
        /// The replica's recomputed values differed from the log.
        Mismatch = "mismatch",
        /// The replica is being drained.
        Drain = "drain",
        /// Tokens of the attempt were lost on the way.
        Gap = "gap",
    }
    /// How far a request had come.
    Stage {
        /// Not yet computed.
        Queue = "queue",
        /// Before its first token.
        Prefill = "prefill",
        /// After its first token.
        Decode = "decode",
    }
    /// Where replayed state came from.
    ReplaySource {
        /// Computed again from the token log.
        Recompute = "recompute",
    }
    /// Who dropped a message.
    FenceSource {
        /// The request that it was for.
        Request = "request",
        /// The gateway, which knows no such request any more.
        Hub = "hub",
        /// The cluster layer, because the session that carried it was over.
        Cluster = "cluster",
    }
    /// Why an engine process was replaced.
    RestartCause {
        /// It exited or was killed by someone else.
        Exit = "exit",
        /// It sent no heartbeat.
        Heartbeat = "heartbeat",
        /// It finished no step.
        Step = "step",
        /// It did not become ready.
        Start = "start",
        /// It broke the protocol.
        Protocol = "protocol",
    }
    /// Why a request ended.
    FinishedReason {
        /// An end token, stop id or stop string.
        Stop = "stop",
        /// The token limit or the context length.
        Length = "length",
        /// Cancelled by its client or by its deadline.
        Abort = "abort",
        /// A fault that could not be recovered from.
        Error = "error",
    }
    /// What a node thinks of another one.
    PeerState {
        /// Heartbeats come.
        Alive = "alive",
        /// Silent for a while: it gets no new requests.
        Suspect = "suspect",
        /// Silent for too long, or disconnected.
        Dead = "dead",
    }
    /// State of a replica.
    ReplicaState {
        /// Loading.
        Starting = "starting",
        /// In service.
        Ready = "ready",
        /// Waiting for its next start.
        Backoff = "backoff",
        /// Restarted too often, or turned off.
        Down = "down",
    }
    /// A queue whose bytes are counted.
    Queue {
        /// Events on their way to clients.
        ClientOut = "client_out",
        /// Messages on their way to other nodes.
        ClusterSend = "cluster_send",
        /// Messages from other nodes that nobody has taken yet.
        ClusterReceive = "cluster_receive",
        /// Finished requests kept for clients that come back.
        Finished = "finished",
    }
}

/// Makes every series of a closed set of labels, at 0. A counter that appears with its first event hides that event from
/// `increase()` and `rate()`, which need a sample from before it.
pub(crate) fn register_all() {
    for cause in RecoveryCause::ALL {
        for stage in Stage::ALL {
            counter!(names::RECOVERIES, "cause" => cause.label(), "stage" => stage.label())
                .increment(0);
        }
    }
    for source in ReplaySource::ALL {
        replayed_tokens(*source, 0);
    }
    for source in FenceSource::ALL {
        fenced_messages(*source, 0);
    }
    counter!(names::QUARANTINED_REQUESTS).increment(0);
}

/// The same for the codes of [`request_error`] and [`protocol_error`], which the protocol knows and this crate does not.
pub fn register_error_codes(request: &[&'static str], protocol: &[&'static str]) {
    for code in request {
        counter!(names::REQUEST_ERRORS, "code" => *code).increment(0);
    }
    for code in protocol {
        counter!(names::PROTOCOL_ERRORS, "code" => *code).increment(0);
    }
}

/// A takeover after a fault has brought the request's next token.
pub fn recovery(cause: RecoveryCause, stage: Stage) {
    counter!(names::RECOVERIES, "cause" => cause.label(), "stage" => stage.label()).increment(1);
}

/// The first new token after a recovery came `stall` after the fault was seen or suspected.
pub fn recovery_stall(stall: Duration) {
    histogram!(names::RECOVERY_STALL).record(stall);
}

/// The state of `count` committed tokens was rebuilt.
pub fn replayed_tokens(source: ReplaySource, count: u64) {
    counter!(names::REPLAYED_TOKENS, "source" => source.label()).increment(count);
}

/// Messages of superseded attempts, or for wrong positions, were dropped.
pub fn fenced_messages(source: FenceSource, count: u64) {
    counter!(names::FENCED_MESSAGES, "source" => source.label()).increment(count);
}

/// The engine process of `worker` (`model/replica`) was replaced.
pub fn worker_restart(worker: &str, cause: RestartCause) {
    counter!(names::WORKER_RESTARTS, "worker" => worker.to_owned(), "cause" => cause.label())
        .increment(1);
}

/// A request was ended because too many engines died on it.
pub fn quarantined_request() {
    counter!(names::QUARANTINED_REQUESTS).increment(1);
}

/// Number of other nodes in a state.
pub fn peers(state: PeerState, count: usize) {
    gauge!(names::PEERS, "state" => state.label()).set(count as f64);
}

/// Number of this node's replicas of a model in a state.
pub fn replicas(model: &str, state: ReplicaState, count: usize) {
    gauge!(names::REPLICAS, MODEL => model.to_owned(), "state" => state.label()).set(count as f64);
}

/// Bytes that wait in a queue now.
pub fn queued_bytes(queue: Queue, bytes: u64) {
    gauge!(names::QUEUED_BYTES, "queue" => queue.label()).set(bytes as f64);
}

/// Client connections open now.
pub fn connections(count: usize) {
    gauge!(names::CONNECTIONS).set(count as f64);
}

/// Requests held by this gateway now.
pub fn requests_in_flight(count: usize) {
    gauge!(names::REQUESTS_IN_FLIGHT).set(count as f64);
}

/// A request was refused or ended with an error; `code` is one of the protocol's closed set of codes.
pub fn request_error(code: &'static str) {
    counter!(names::REQUEST_ERRORS, "code" => code).increment(1);
}

/// A client connection was closed for what it sent; `code` is one of the protocol's closed set of codes.
pub fn protocol_error(code: &'static str) {
    counter!(names::PROTOCOL_ERRORS, "code" => code).increment(1);
}

/// Series that the host of a replica records, looked up once for each replica.
#[derive(Clone)]
pub struct ReplicaMetrics {
    model: String,
    engine: String,
    running: Gauge,
    waiting: Gauge,
    kv_cache_usage: Gauge,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    iteration_tokens: Histogram,
    prefix_queries: Counter,
    prefix_hits: Counter,
    preemptions: Counter,
}

impl ReplicaMetrics {
    /// The series of a replica; its gauges start at 0, as do the restarts of its worker.
    pub fn new(model: &str, replica: u32) -> Self {
        for cause in RestartCause::ALL {
            let worker = format!("{model}/{replica}");
            counter!(names::WORKER_RESTARTS, "worker" => worker, "cause" => cause.label())
                .increment(0);
        }
        let (model, engine) = (model.to_owned(), replica.to_string());
        let labels = [(MODEL, model.clone()), (ENGINE, engine.clone())];
        let metrics = Self {
            running: gauge!(names::REQUESTS_RUNNING, &labels),
            waiting: gauge!(names::REQUESTS_WAITING, &labels),
            kv_cache_usage: gauge!(names::KV_CACHE_USAGE, &labels),
            prompt_tokens: counter!(names::PROMPT_TOKENS, &labels),
            generation_tokens: counter!(names::GENERATION_TOKENS, &labels),
            iteration_tokens: histogram!(names::ITERATION_TOKENS, &labels),
            prefix_queries: counter!(names::PREFIX_CACHE_QUERIES, &labels),
            prefix_hits: counter!(names::PREFIX_CACHE_HITS, &labels),
            preemptions: counter!(names::PREEMPTIONS, &labels),
            model,
            engine,
        };
        metrics.load(0, 0, 0.0);
        metrics.kv_cache(0, 0, 0);
        metrics
    }

    /// What the replica holds now: requests computed, requests waiting, share of the KV cache in use (0 to 1). All 0
    /// when its engine is gone.
    pub fn load(&self, running: usize, waiting: usize, kv_cache_usage: f64) {
        self.running.set(running as f64);
        self.waiting.set(waiting as f64);
        self.kv_cache_usage.set(kv_cache_usage);
    }

    /// The shape of the replica's KV cache, known when its engine is ready.
    pub fn cache_config(&self, block_size: u32, num_blocks: u32) {
        gauge!(names::CACHE_CONFIG_INFO,
            MODEL => self.model.clone(), ENGINE => self.engine.clone(),
            "block_size" => block_size.to_string(), "num_gpu_blocks" => num_blocks.to_string())
        .set(1.0);
    }

    /// Since the last call: prompt tokens that were looked for in the prefix cache, those that were found there, and sequences that had to
    /// give up their blocks.
    pub fn kv_cache(&self, queries: u64, hits: u64, preemptions: u64) {
        self.prefix_queries.increment(queries);
        self.prefix_hits.increment(hits);
        self.preemptions.increment(preemptions);
    }

    /// Tokens computed since the last call: of prompts, and of output.
    pub fn computed(&self, prompt_tokens: u64, generation_tokens: u64) {
        self.prompt_tokens.increment(prompt_tokens);
        self.generation_tokens.increment(generation_tokens);
    }

    /// One engine step computed this many tokens, of prompts and of output together.
    pub fn iteration(&self, tokens: u64) {
        self.iteration_tokens.record(tokens as f64);
    }

    /// One engine step, for who is told of each: [`ReplicaMetrics::computed`] and [`ReplicaMetrics::iteration`] in one.
    pub fn step(&self, prompt_tokens: u64, generation_tokens: u64) {
        self.computed(prompt_tokens, generation_tokens);
        self.iteration(prompt_tokens + generation_tokens);
    }
}

/// Series that a gateway records about requests, by the replica that served them. Look them up once for each replica
/// and keep them: cloning is cheap, looking up takes microseconds.
#[derive(Clone)]
pub struct RequestMetrics {
    first_token: Histogram,
    inter_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    finished: [Counter; FinishedReason::ALL.len()],
}

/// How a request went, from its arrival at the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestSummary {
    /// Why it ended.
    pub reason: FinishedReason,
    /// From arrival to end.
    pub e2e: Duration,
    /// From arrival to the first step, if there was one.
    pub queue: Option<Duration>,
    /// From the first step to the first token, if there was one.
    pub prefill: Option<Duration>,
    /// From the first token to the last, if there was one.
    pub decode: Option<Duration>,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the output.
    pub generation_tokens: u64,
}

impl RequestMetrics {
    /// The series of requests that a replica serves.
    pub fn new(model: &str, replica: u32) -> Self {
        let labels = [(MODEL, model.to_owned()), (ENGINE, replica.to_string())];
        Self {
            first_token: histogram!(names::TIME_TO_FIRST_TOKEN, &labels),
            inter_token: histogram!(names::INTER_TOKEN_LATENCY, &labels),
            e2e: histogram!(names::E2E_LATENCY, &labels),
            queue: histogram!(names::QUEUE_TIME, &labels),
            prefill: histogram!(names::PREFILL_TIME, &labels),
            decode: histogram!(names::DECODE_TIME, &labels),
            inference: histogram!(names::INFERENCE_TIME, &labels),
            prompt_tokens: histogram!(names::REQUEST_PROMPT_TOKENS, &labels),
            generation_tokens: histogram!(names::REQUEST_GENERATION_TOKENS, &labels),
            finished: std::array::from_fn(|at| {
                let reason = FinishedReason::ALL[at].label();
                counter!(names::REQUEST_SUCCESS,
                    MODEL => model.to_owned(), ENGINE => replica.to_string(), "finished_reason" => reason)
            }),
        }
    }

    /// The first token came this long after the request.
    pub fn first_token(&self, after_arrival: Duration) {
        self.first_token.record(after_arrival);
    }

    /// A further token came this long after the one before it.
    pub fn inter_token(&self, gap: Duration) {
        self.inter_token.record(gap);
    }

    /// The request ended.
    pub fn finished(&self, summary: &RequestSummary) {
        self.finished[summary.reason as usize].increment(1);
        self.e2e.record(summary.e2e);
        self.prompt_tokens.record(summary.prompt_tokens as f64);
        self.generation_tokens
            .record(summary.generation_tokens as f64);
        if let Some(queue) = summary.queue {
            self.queue.record(queue);
        }
        if let Some(prefill) = summary.prefill {
            self.prefill.record(prefill);
            self.inference
                .record(prefill + summary.decode.unwrap_or_default());
        }
        if let Some(decode) = summary.decode {
            self.decode.record(decode);
        }
    }
}
