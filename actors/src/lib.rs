//! The actors of a node.
//!
//! Decisions live in pure cores (`request::core`, `router::core`, `restart`, `worker::hang`): synchronous
//! `(state, event, now) → effects`. The actors around them only receive, call, and send.
//!
//! ```text
//! Node supervisor
//! ├── ClusterActor            peers and their messages
//! ├── Endpoint                this host's replicas, addressed by gateways
//! ├── Deployment supervisor   one per model served here
//! │   └── Replica supervisor  one per replica: restarts its workers
//! │       └── Worker          owns one engine process
//! ├── Router                  (gateway) picks who serves an attempt
//! ├── Token hub               (gateway) hands tokens to their requests
//! ├── Journal keeper          (gateway) closed logs, kept for clients that come back
//! └── Gateway                 (gateway) listener; one Session per connection; one Request per request
//! ```

/// Declares actor messages that never leave the process.
macro_rules! local_message {
    ($($message:ty),+ $(,)?) => { $(impl ractor::Message for $message {})+ };
}

pub mod admission;
pub mod cluster;
pub mod deployment;
pub mod endpoint;
pub mod gateway;
pub mod hub;
pub mod keeper;
pub mod node;
pub mod outbox;
pub mod owed;
pub mod peer;
pub mod replica;
pub mod request;
pub mod restart;
pub mod router;
pub mod session;
pub mod worker;
