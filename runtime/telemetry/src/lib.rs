//! Telemetry: metric names, recording, the Prometheus exporter, and log set-up.
//!
//! Invariant: prompts, tokens and secrets are in no metric and no log line, whatever the configuration or `RUST_LOG`
//! say. Hence the closed label sets of [`record`], and the pinned targets of [`logging`].

mod exporter;
mod http;
pub mod logging;
pub mod names;
pub mod process;
pub mod record;

pub use exporter::{MetricsError, MetricsHandle, install_metrics};
pub use http::MAX_CONNECTIONS;
pub use logging::{LogError, LogFormat, LogOptions, install_logging};
