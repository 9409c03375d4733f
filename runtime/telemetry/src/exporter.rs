//! The metrics recorder of the process, and its exposition as Prometheus text.
//!
//! Invariant: names come out letter for letter as `names.rs` has them (no unit or `_total` is appended), and every
//! histogram has its stated buckets, never a summary: quantiles of several nodes cannot be added up, buckets can.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::http;
use crate::names::{ALL, Kind, LOG_LINES_DROPPED, describe_all};
use crate::process::ProcessStats;
use crate::record::register_all;
use crate::sink::dropped_lines;

/// Interval at which recorded samples are folded into their buckets; between scrapes they would pile up.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The address is taken, or not one of this machine.
    #[error(
        "cannot serve metrics on {address}: {source}; change the node's `metrics_port`, or stop what listens there"
    )]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The recorder cannot be built.
    #[error("cannot set up the metrics recorder: {0}")]
    Build(#[from] BuildError),
    /// A process has one recorder, and it is there already.
    #[error("metrics are already installed in this process")]
    AlreadyInstalled,
}

impl MetricsError {
    /// Whether the same call may succeed later: the port may become free.
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::Listen { .. })
    }
}

/// Serves metrics as long as it lives.
#[derive(Debug)]
pub struct MetricsHandle {
    address: SocketAddr,
    prometheus: PrometheusHandle,
    tasks: [JoinHandle<()>; 2],
}

impl MetricsHandle {
    /// The address that is listened on; the real port if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// What a scrape would get now.
    pub fn render(&self) -> String {
        render(&self.prometheus)
    }
}

impl Drop for MetricsHandle {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Makes the recorder of the process and serves it at `http://<listen>/metrics` (and `/health`).
///
/// # Errors
/// The port is taken, or a recorder is installed already. A taken port leaves no recorder behind, so that the caller
/// may try again.
pub async fn install_metrics(listen: SocketAddr) -> Result<MetricsHandle, MetricsError> {
    let in_use = |source| MetricsError::Listen {
        address: listen,
        source,
    };
    let listener = TcpListener::bind(listen).await.map_err(in_use)?;
    let address = listener.local_addr().map_err(in_use)?;
    let recorder = recorder()?;
    let prometheus = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|_| MetricsError::AlreadyInstalled)?;
    describe_all();
    register_all();
    let rendered = prometheus.clone();
    let server = tokio::spawn(http::serve(listener, Arc::new(move || render(&rendered))));
    let upkeep = tokio::spawn(upkeep(prometheus.clone()));
    Ok(MetricsHandle {
        address,
        prometheus,
        tasks: [server, upkeep],
    })
}

/// A recorder with the buckets of every histogram.
pub(crate) fn recorder() -> Result<PrometheusRecorder, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for metric in ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.into()), buckets)?;
        }
    }
    Ok(builder.build_recorder())
}

fn render(prometheus: &PrometheusHandle) -> String {
    metrics::counter!(LOG_LINES_DROPPED).absolute(dropped_lines());
    let mut text = prometheus.render();
    ProcessStats::read().write_prometheus(&mut text);
    text
}

async fn upkeep(prometheus: PrometheusHandle) {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        ticks.tick().await;
        prometheus.run_upkeep();
    }
}
