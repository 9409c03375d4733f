//! Other clients than the Rust library: the Python example, and whoever does not keep to the protocol.

use std::process::Command;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use understudy_tests::{Engine, TestClusterBuilder, collect, programs};

use super::requests::nth;

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_streams_the_same_tokens() {
    if Command::new("python3").arg("--version").output().is_err() {
        eprintln!("SKIPPED: python3 is not installed");
        return;
    }
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .start_ready()
        .await
        .expect("fake");
    let mut request = understudy_client::Request::prompt("Count from 1 to 9:");
    request.sampling.max_tokens = Some(40);
    request.sampling.temperature = Some(0.0);
    let expected = collect(&cluster.client(), request).await.expect("a stream");
    let script = programs::repository().join("runtime/client/examples/python/understudy_client.py");
    let address = cluster.address();
    let output = tokio::task::spawn_blocking(move || {
        Command::new("python3")
            .arg(script)
            .args([
                "--addr",
                &address,
                "--prompt",
                "Count from 1 to 9:",
                "--max-tokens",
                "40",
                "--temperature",
                "0",
                "--json",
            ])
            .output()
            .expect("python runs")
    })
    .await
    .expect("python's thread");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{stdout}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let events: Vec<serde_json::Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("a JSON line"))
        .collect();
    let ids: Vec<u32> = events
        .iter()
        .filter(|e| e.get("position").is_some())
        .filter_map(|e| e["id"].as_u64())
        .map(|id| id as u32)
        .collect();
    assert_eq!(ids, expected.ids);
}

/// Garbage, oversized and untimely frames: a typed error, a closed connection, and a gateway that goes on.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_protocol_is_answered_and_closed() {
    let cluster = TestClusterBuilder::new(Engine::Fake)
        .one_node()
        .replicas(1)
        .start_ready()
        .await
        .expect("fake");
    let hello_too_new: &[u8] = b"\x00\x00\x00\x15\x82\xa4type\xa5hello\xa7version\x00";
    let submit_first: &[u8] = b"\x00\x00\x00\x0d\x81\xa4type\xa6status";
    let cases: [(&str, &[u8], &str); 4] = [
        ("a length of 4 GiB", b"\xff\xff\xff\xff", "frame_too_large"),
        (
            "no MessagePack",
            b"\x00\x00\x00\x04\xc1\xc1\xc1\xc1",
            "malformed",
        ),
        (
            "no version that is spoken",
            hello_too_new,
            "unsupported_version",
        ),
        ("a message before hello", submit_first, "out_of_order"),
    ];
    for (what, bytes, code) in cases {
        let mut socket = TcpStream::connect(cluster.address())
            .await
            .expect("a connection");
        socket.write_all(bytes).await.expect("sent");
        let mut answer = Vec::new();
        let read =
            tokio::time::timeout(Duration::from_secs(10), socket.read_to_end(&mut answer)).await;
        read.expect("the connection is closed").ok();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.contains(code), "{what}: {answer:?}");
    }
    let rss_before = understudy_rss(cluster.node_pid(0));
    for _ in 0..50 {
        let mut socket = TcpStream::connect(cluster.address())
            .await
            .expect("a connection");
        socket.write_all(b"\x00\x3f\xff\xff").await.expect("sent");
    }
    let grown = understudy_rss(cluster.node_pid(0)).saturating_sub(rss_before);
    assert!(grown < 20 << 20, "claimed lengths cost {grown} bytes");
    collect(&cluster.client(), nth(0, 5))
        .await
        .expect("the gateway still serves");
    assert!(!cluster.log(0).contains("panicked"));
}

fn understudy_rss(pid: u32) -> usize {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).expect("the process runs");
    statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok())
        .expect("pages")
        * 4096
}
