//! Telemetry: metric names, recording, the Prometheus exporter, and log set-up.
//!
//! Invariant: prompts, tokens and secrets are in no metric and no log line, whatever the configuration or `RUST_LOG`
//! say. Hence the closed label sets of [`record`], and the pinned targets of [`logging`].

mod exporter;
pub mod gauges;
mod http;
mod line;
pub mod logging;
pub mod names;
mod panics;
pub mod process;
pub mod record;
mod sink;

pub use exporter::{MetricsError, MetricsHandle, install_metrics};
pub use http::MAX_CONNECTIONS;
pub use line::NODE_FIELD;
pub use logging::{LogError, LogFormat, LogGuard, LogOptions, install_logging};
pub use panics::install_panic_hook;
pub use sink::{FLUSH_TIMEOUT, MAX_QUEUED_BYTES, dropped_lines};
