//! Metrics: valid for Prometheus, and there.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use understudy_tests::wait::until;
use understudy_tests::{Engine, TestClusterBuilder, ports, scrape};

use super::requests::run_all;

/// Set by continuous integration: a test that needs a tool fails without it, where it would otherwise be skipped.
const REQUIRE_TOOLS: &str = "UNDERSTUDY_REQUIRE_TOOLS";

/// A server of the test's own; it does not outlive it, however the test ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn installed(program: &str) -> bool {
    let there = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    let missing = format!("{program} is not installed (Debian's package prometheus has it)");
    assert!(
        there || std::env::var_os(REQUIRE_TOOLS).is_none(),
        "{missing}"
    );
    if !there {
        eprintln!("SKIPPED: {missing}");
    }
    there
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_dashboards_read_are_there_and_valid() {
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .start_ready()
        .await
        .expect("fake");
    run_all(&cluster.client(), 8, 20).await;
    // The age of another node's last sign of life is known with its second one.
    let gateway = until("a heartbeat", Duration::from_secs(10), || async {
        let text = scrape::text(&cluster.metrics_address(0)).await;
        text.contains("understudy_heartbeat_age_seconds{")
            .then_some(text)
    })
    .await;
    // Engines count their tokens in their heartbeats.
    let host = until("counted tokens", Duration::from_secs(10), || async {
        let text = scrape::text(&cluster.metrics_address(1)).await;
        (scrape::sum(&text, "vllm:generation_tokens_total", "") > 0.0).then_some(text)
    })
    .await;
    for (name, label) in [
        (
            "vllm:time_to_first_token_seconds_count",
            "model_name=\"demo\"",
        ),
        (
            "vllm:inter_token_latency_seconds_count",
            "model_name=\"demo\"",
        ),
        (
            "vllm:e2e_request_latency_seconds_count",
            "model_name=\"demo\"",
        ),
        (
            "vllm:request_queue_time_seconds_count",
            "model_name=\"demo\"",
        ),
        (
            "vllm:request_prefill_time_seconds_count",
            "model_name=\"demo\"",
        ),
        (
            "vllm:request_decode_time_seconds_count",
            "model_name=\"demo\"",
        ),
        (
            "vllm:request_inference_time_seconds_count",
            "model_name=\"demo\"",
        ),
        ("vllm:request_prompt_tokens_sum", "model_name=\"demo\""),
        ("vllm:request_generation_tokens_sum", "model_name=\"demo\""),
        ("vllm:request_success_total", "model_name=\"demo\""),
        ("understudy_journal_commit_seconds_count", ""),
        ("understudy_queued_bytes", "queue=\"finished\""),
    ] {
        let value = scrape::sum(&gateway, name, label);
        assert!(value > 0.0, "{name} in\n{gateway}");
    }
    for (name, label) in [
        ("vllm:cache_config_info", "block_size="),
        ("vllm:prompt_tokens_total", "engine=\"1\""),
        ("vllm:iteration_tokens_total_count", "engine=\"1\""),
        ("understudy_node_info", "fingerprint=\"fake"),
        ("understudy_replicas", "state=\"ready\""),
    ] {
        let value = scrape::sum(&host, name, label);
        assert!(value > 0.0, "{name} {label} in\n{host}");
    }
    // One token of 4 requests and more in each step: steps are counted, not the engine's reports of them.
    let steps = scrape::sum(&host, "vllm:iteration_tokens_total_count", "engine=\"1\"");
    assert!(steps >= 20.0, "{steps} steps for 20 tokens each");
    // What has not happened yet is there, at 0: a counter that comes with its first event hides it from `increase()`.
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "understudy_worker_restarts_total",
    ] {
        assert!(host.contains(&format!("\n{name}{{")), "{name} in\n{host}");
    }
    for name in [
        "understudy_recoveries_total{",
        "understudy_replayed_tokens_total{",
        "understudy_fenced_messages_total{",
        "understudy_quarantined_requests_total ",
        "understudy_request_errors_total{",
        "understudy_peer_state{",
        "understudy_heartbeat_age_seconds{",
    ] {
        assert!(
            gateway.contains(&format!("\n{name}")),
            "{name} in\n{gateway}"
        );
    }
    if installed("promtool") {
        for text in [gateway, host] {
            let mut check = Command::new("promtool")
                .args(["check", "metrics"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("promtool runs");
            std::io::Write::write_all(&mut check.stdin.take().expect("piped"), text.as_bytes())
                .expect("promtool reads");
            let output = check.wait_with_output().expect("promtool ends");
            let said = String::from_utf8_lossy(&output.stderr).into_owned()
                + &String::from_utf8_lossy(&output.stdout);
            // It also comments on style; only what it cannot read fails. vllm's own names are not to its taste.
            assert!(!said.contains("error while linting"), "{said}");
            let complaints: Vec<&str> = said
                .lines()
                .filter(|line| !line.is_empty() && !line.starts_with("vllm:"))
                .collect();
            assert!(complaints.is_empty(), "{complaints:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_scrapes_every_node() {
    if !installed("prometheus") {
        return;
    }
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .start_ready()
        .await
        .expect("fake");
    run_all(&cluster.client(), 4, 10).await;
    let directory =
        std::env::temp_dir().join(format!("understudy-prometheus-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let config = directory.join("prometheus.yml");
    let (a, b) = (cluster.metrics_address(0), cluster.metrics_address(1));
    let yaml = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: understudy\n    static_configs: [{{targets: ['{a}', '{b}']}}]\n"
    );
    std::fs::write(&config, yaml).expect("a configuration");
    let [port]: [u16; 1] = ports::free();
    let server = Command::new("prometheus")
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            directory.join("data").display()
        ))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("prometheus starts");
    let server = Server(server);
    until("scraped nodes", Duration::from_secs(40), || async {
        let up = query(port, "sum(up)").await?;
        let tokens = query(
            port,
            "sum(%7B__name__=%22vllm:generation_tokens_total%22%7D)",
        )
        .await?;
        (up.contains("\"2\"") && tokens.contains("\"value\"")).then_some(())
    })
    .await;
    drop(server);
    std::fs::remove_dir_all(&directory).ok();
}

async fn query(port: u16, expression: &str) -> Option<String> {
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .ok()?;
    let request =
        format!("GET /api/v1/query?query={expression} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    socket.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.ok()?;
    answer.starts_with("HTTP/1.0 200").then_some(answer)
}
