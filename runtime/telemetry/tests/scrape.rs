//! A real scrape over TCP: names, buckets and labels come out as stated, `promtool` accepts them, a Prometheus server
//! reads them.
//!
//! A process has one recorder, so everything here is one test with one installation.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use understudy_telemetry::gauges::{JournalMetrics, NodeInfo};
use understudy_telemetry::names::{
    ALL, CLUSTER_REFUSED, CLUSTER_SESSIONS, HEARTBEAT_AGE, Kind, PEER_STATE,
};
use understudy_telemetry::record::*;
use understudy_telemetry::{MAX_CONNECTIONS, MetricsError, install_metrics};

fn request(address: SocketAddr, text: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    stream.write_all(text.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn scrape(address: SocketAddr) -> String {
    let answer = request(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(
        head.contains("Content-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    body.to_owned()
}

/// Records each metric at least once.
fn record_everything() {
    let replica = ReplicaMetrics::new("demo", 0);
    replica.load(3, 2, 0.5);
    replica.cache_config(16, 512);
    replica.computed(20, 4);
    replica.iteration(24);
    let requests = RequestMetrics::new("demo", 0);
    requests.first_token(Duration::from_millis(15));
    requests.inter_token(Duration::from_millis(3));
    let second = Duration::from_secs(1);
    requests.finished(&RequestSummary {
        reason: FinishedReason::Length,
        e2e: 2 * second,
        queue: Some(second / 10),
        prefill: Some(second / 2),
        decode: Some(second),
        prompt_tokens: 20,
        generation_tokens: 100,
    });
    recovery(RecoveryCause::EngineExit, Stage::Decode);
    recovery_stall(Duration::from_millis(25));
    replayed_tokens(ReplaySource::Recompute, 7);
    fenced_messages(FenceSource::Hub, 1);
    // Recorded by the cluster layer, which knows of this crate no more than its names.
    metrics::gauge!(HEARTBEAT_AGE, "peer" => "b").set(0.15);
    metrics::gauge!(PEER_STATE, "peer" => "b", "state" => "alive").set(1.0);
    metrics::counter!(CLUSTER_SESSIONS, "peer" => "b", "event" => "up").increment(1);
    metrics::counter!(CLUSTER_REFUSED, "reason" => "cookie").increment(1);
    worker_restart("demo/0", RestartCause::Step);
    JournalMetrics::new().committed(Duration::from_micros(3));
    peers(PeerState::Alive, 1);
    replicas("demo", ReplicaState::Ready, 2);
    queued_bytes(Queue::ClientOut, 1000);
    connections(4);
    requests_in_flight(5);
    request_error("overloaded");
    protocol_error("frame_too_large");
    NodeInfo::new("a", "0.1.0").serves(["f00d \"quoted\" \\ \n line"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_scraped_as_they_are_named() {
    let listen: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let taken = std::net::TcpListener::bind(listen).expect("a port");
    let refused = install_metrics(taken.local_addr().expect("its address"))
        .await
        .expect_err("the port is taken");
    assert!(
        refused.is_retriable()
            && refused
                .to_string()
                .contains("change the node's `metrics_port`"),
        "{refused}"
    );

    let handle = install_metrics(listen).await.expect("metrics");
    let second = install_metrics(listen)
        .await
        .expect_err("one recorder a process");
    assert!(matches!(second, MetricsError::AlreadyInstalled), "{second}");
    let address = handle.local_addr();
    let text = tokio::task::spawn_blocking(move || {
        let before = scrape(address);
        for line in [
            "understudy_recoveries_total{cause=\"node_lost\",stage=\"queue\"} 0",
            "understudy_log_lines_dropped_total 0",
        ] {
            assert!(
                before.lines().any(|found| found == line),
                "{line} is not in\n{before}"
            );
        }
        record_everything();
        scrape(address)
    })
    .await
    .expect("a scrape");
    every_metric_is_there(&text);
    values_are_right(&text);
    promtool_accepts(&text);
    tokio::task::spawn_blocking(move || {
        other_requests(address);
        prometheus_reads(address);
    })
    .await
    .expect("requests");
    assert!(handle.render().contains("vllm:num_requests_running"));
    drop(handle);
    closes(address).await;
}

fn every_metric_is_there(text: &str) {
    for metric in ALL {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        assert!(
            text.contains(&format!("# TYPE {} {kind}\n", metric.name)),
            "{} is not a {kind} in\n{text}",
            metric.name
        );
        assert!(
            text.contains(&format!("# HELP {} {}\n", metric.name, metric.help)),
            "{}",
            metric.name
        );
        if let Kind::Histogram(buckets) = metric.kind {
            let prefix = format!("{}_bucket{{", metric.name);
            let lines = text
                .lines()
                .filter(|line| line.starts_with(&prefix))
                .count();
            assert_eq!(lines, buckets.len() + 1, "{}", metric.name);
        }
        let samples: Vec<&str> = text
            .lines()
            .filter(|line| is_sample_of(line, metric.name))
            .collect();
        assert!(!samples.is_empty(), "{} has no sample", metric.name);
        for sample in samples {
            assert_eq!(
                label_keys(sample),
                metric.labels.iter().map(|key| (*key).to_owned()).collect(),
                "{sample}"
            );
        }
    }
    assert!(!text.contains("quantile="), "a summary in\n{text}");
}

fn is_sample_of(line: &str, name: &str) -> bool {
    let series = line.split(['{', ' ']).next().unwrap_or_default();
    series == name
        || ["_bucket", "_sum", "_count"]
            .iter()
            .any(|end| series.strip_suffix(end) == Some(name))
}

/// The label keys of a sample, but for `le`. Values of these tests hold no `,x="`.
fn label_keys(sample: &str) -> std::collections::BTreeSet<String> {
    let Some((_, labels)) = sample.split_once('{') else {
        return Default::default();
    };
    let mut keys: std::collections::BTreeSet<String> = labels
        .split("=\"")
        .filter_map(|part| part.rsplit(['"', ',']).next())
        .map(str::to_owned)
        .collect();
    keys.retain(|key| {
        key != "le" && key.chars().all(|c| c.is_ascii_lowercase() || c == '_') && !key.is_empty()
    });
    keys
}

fn values_are_right(text: &str) {
    for line in [
        "vllm:num_requests_running{model_name=\"demo\",engine=\"0\"} 3",
        "vllm:kv_cache_usage_perc{model_name=\"demo\",engine=\"0\"} 0.5",
        "vllm:prompt_tokens_total{model_name=\"demo\",engine=\"0\"} 20",
        "vllm:request_success_total{model_name=\"demo\",engine=\"0\",finished_reason=\"length\"} 1",
        "vllm:request_success_total{model_name=\"demo\",engine=\"0\",finished_reason=\"stop\"} 0",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"demo\",engine=\"0\",le=\"0.01\"} 0",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"demo\",engine=\"0\",le=\"0.02\"} 1",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"demo\",engine=\"0\",le=\"2560\"} 1",
        "vllm:time_to_first_token_seconds_sum{model_name=\"demo\",engine=\"0\"} 0.015",
        "vllm:request_inference_time_seconds_sum{model_name=\"demo\",engine=\"0\"} 1.5",
        "understudy_recoveries_total{cause=\"engine_exit\",stage=\"decode\"} 1",
        "understudy_recovery_stall_seconds_bucket{le=\"0.02\"} 0",
        "understudy_recovery_stall_seconds_bucket{le=\"0.03\"} 1",
        "understudy_queued_bytes{queue=\"client_out\"} 1000",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in\n{text}"
        );
    }
    for name in [
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
        "process_open_fds",
    ] {
        assert!(
            text.lines()
                .any(|line| line.starts_with(&format!("{name} "))),
            "{name}"
        );
    }
}

/// Set where the tools must be there: a check that did not run has not passed.
const REQUIRE_TOOLS: &str = "UNDERSTUDY_REQUIRE_TOOLS";

fn skipped(tool: &str, unchecked: &str) {
    let message = format!("{tool} is not installed (Debian's package `prometheus`); {unchecked}");
    assert!(
        std::env::var_os(REQUIRE_TOOLS).is_none_or(|value| value != "1"),
        "{message}"
    );
    eprintln!("SKIPPED: {message}");
}

/// `promtool check metrics` parses the text and lints it. Its one complaint that may stand is the colon in vLLM's names,
/// which other programs read and which therefore must stay.
fn promtool_accepts(text: &str) {
    let spawned = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = spawned else {
        return skipped("promtool", "the exposition was not linted");
    };
    child
        .stdin
        .take()
        .expect("its input")
        .write_all(text.as_bytes())
        .expect("written");
    let output = child.wait_with_output().expect("its end");
    let complaints = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let is_known = |line: &&str| {
        let vllms_own =
            "vllm:iteration_tokens_total non-counter metrics should not have \"_total\" suffix";
        line.starts_with("vllm:") && line.ends_with(" metric names should not contain ':'")
            || *line == vllms_own
    };
    let unknown: Vec<&str> = complaints.lines().filter(|line| !is_known(line)).collect();
    assert!(
        unknown.is_empty(),
        "promtool complains:\n{}",
        unknown.join("\n")
    );
    // 0: nothing, 3: lint only. 1 would mean that it cannot be parsed.
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "{:?}\n{complaints}",
        output.status
    );
}

fn other_requests(address: SocketAddr) {
    for (sent, wanted) in [
        ("GET /health HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404 "),
        (
            "POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
            "HTTP/1.1 405 ",
        ),
        ("nonsense\r\n\r\n", "HTTP/1.1 400 "),
    ] {
        let answer = request(address, sent);
        assert!(answer.starts_with(wanted), "{sent:?}: {answer}");
    }
    let head = request(address, "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200 OK") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(9000));
    assert!(request(address, &long).starts_with("HTTP/1.1 431 "));
    // Connections that say nothing take every place for a short while, and do not stop a scrape.
    let _silent: Vec<TcpStream> = (0..2 * MAX_CONNECTIONS)
        .map(|_| TcpStream::connect(address).expect("a connection"))
        .collect();
    scrape(address);
}

/// A Prometheus server of its own scrapes the node, and answers a query about it.
fn prometheus_reads(address: SocketAddr) {
    let directory =
        std::env::temp_dir().join(format!("understudy-prometheus-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let config = directory.join("prometheus.yml");
    let text = format!(
        "global:\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\nscrape_configs:\n  - job_name: understudy\n    static_configs:\n      - targets: ['{address}']\n"
    );
    std::fs::write(&config, text).expect("its configuration");
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|it| it.local_addr())
        .expect("a port");
    let spawned = Command::new("prometheus")
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            directory.join("data").display()
        ))
        .arg(format!("--web.listen-address={port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    match spawned {
        Err(_) => skipped("prometheus", "no server scraped the node"),
        Ok(mut server) => {
            let answer =
                wait_for_query(port, "vllm:num_requests_running{model_name=\"demo\"} == 3");
            let _ = server.kill();
            let _ = server.wait();
            answer.expect("Prometheus has the metric within 30 s");
        }
    }
    let _ = std::fs::remove_dir_all(&directory);
}

fn wait_for_query(server: SocketAddr, query: &str) -> Option<String> {
    let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        if let Ok(mut stream) = TcpStream::connect(server) {
            let sent = format!("GET /api/v1/query?query={encoded} HTTP/1.0\r\nHost: x\r\n\r\n");
            let mut answer = String::new();
            let asked = stream
                .write_all(sent.as_bytes())
                .and_then(|()| stream.read_to_string(&mut answer));
            if asked.is_ok() && answer.contains("\"__name__\":\"vllm:num_requests_running\"") {
                return Some(answer);
            }
        }
        std::thread::sleep(Duration::from_millis(50)); // between two polls of the condition, not in place of one
    }
    None
}

/// The port is free again once the handle is gone.
async fn closes(address: SocketAddr) {
    let freed = async {
        while tokio::net::TcpListener::bind(address).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), freed)
        .await
        .expect("the port is free");
}
