//! `bench`.

use understudy_protocol::ErrorCode;

use crate::fake::{Cluster, Fault, Gateway};
use crate::program::{Ran, run_with};

async fn bench(gateway: &Gateway, arguments: &[&str]) -> Ran {
    let address = gateway.address.to_string();
    run_with(&[&["bench", "--addr", &address], arguments].concat()).await
}

#[tokio::test]
async fn every_request_is_measured() {
    let gateway = Cluster::new(12).gateway().await;
    let arguments = [
        "--concurrency",
        "4",
        "--requests",
        "25",
        "--warmup",
        "3",
        "--connections",
        "2",
        "--json",
    ];
    let ran = bench(&gateway, &arguments).await;
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
    let report = &ran.json()[0];
    assert_eq!(
        (
            &report["settings"]["warmup"],
            &report["settings"]["requests"]
        ),
        (&3.into(), &25.into())
    );
    assert_eq!(
        (&report["succeeded"], &report["failed"], &report["requests"]),
        (&25.into(), &0.into(), &25.into())
    );
    assert_eq!(
        (&report["output_tokens"], &report["prompt_tokens"]),
        (&300.into(), &75.into())
    );
    assert_eq!(report["ttft_ms"]["count"], 25);
    assert_eq!(report["inter_token_ms"]["count"], 25 * 11);
    assert_eq!(report["e2e_ms"]["count"], 25);
    assert_eq!(report["finish_reasons"]["length"], 25);
    let p = |name: &str| report["e2e_ms"][name].as_f64().expect("a number");
    assert!(p("p50") <= p("p90") && p("p90") <= p("p99") && p("p99") <= p("max"));
    let script = gateway.script.lock().expect("not poisoned");
    assert_eq!((script.submits, script.connections), (28, 2));
}

#[tokio::test]
async fn rates_and_durations_end_the_run() {
    let gateway = Cluster::new(2).gateway().await;
    let ran = bench(
        &gateway,
        &[
            "--rate",
            "400",
            "--duration",
            "250ms",
            "--seed",
            "3",
            "--json",
        ],
    )
    .await;
    assert_eq!(ran.status, Some(0), "{ran:?}");
    let report = &ran.json()[0];
    let sent = report["succeeded"].as_u64().expect("a number");
    // 100 arrivals are expected; the seed fixes them, and five standard deviations are allowed for another generator.
    assert!((50..=150).contains(&sent), "{sent}");
    assert_eq!(report["settings"]["rate"], 400.0);
    assert_eq!(report["settings"].get("concurrency"), None);
    assert_eq!(report["settings"]["max_in_flight"], 4096);
    assert_eq!(report["settings"]["duration_seconds"], 0.25);
    assert_eq!(report["settings"].get("requests"), None);
}

#[tokio::test]
async fn failures_are_counted_by_code_and_change_the_exit_status() {
    let gateway = Cluster::new(12).gateway().await;
    gateway.fault(3, Fault::Fail(ErrorCode::Overloaded));
    gateway.fault(4, Fault::Skip(2));
    let ran = bench(
        &gateway,
        &["--concurrency", "1", "--requests", "6", "--json"],
    )
    .await;
    assert_eq!(ran.status, Some(1), "{ran:?}");
    let report = &ran.json()[0];
    assert_eq!(
        (&report["succeeded"], &report["failed"]),
        (&4.into(), &2.into())
    );
    let codes: Vec<_> = report["errors"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|error| &error["code"])
        .collect();
    assert_eq!(codes, ["overloaded", "protocol"]);
}

#[tokio::test]
async fn a_lost_connection_is_a_reconnect_and_no_failure() {
    let gateway = Cluster::new(12).gateway().await;
    gateway.fault(6, Fault::Cut);
    let ran = bench(
        &gateway,
        &["--concurrency", "1", "--requests", "3", "--json"],
    )
    .await;
    assert_eq!(ran.status, Some(0), "{ran:?}");
    assert_eq!(ran.json()[0]["reconnects"], 1);
}

#[tokio::test]
async fn the_table_is_for_people() {
    let gateway = Cluster::new(5).gateway().await;
    let ran = bench(&gateway, &["--requests", "4"]).await;
    assert_eq!(ran.status, Some(0), "{ran:?}");
    assert!(
        ran.stdout.contains("4 ok, 0 failed") && ran.stdout.contains("inter-token"),
        "{}",
        ran.stdout
    );
}

#[tokio::test]
async fn contradictions_are_refused_before_anything_is_sent() {
    for arguments in [
        &["--rate", "5", "--concurrency", "2"][..],
        &["--rate", "0"],
        &["--output-tokens", "0"],
        &["--prompt-tokens", "9..3"],
        &["--prompt", "x", "--prompt-tokens", "5"],
        &["--requests", "0"],
    ] {
        let ran = run_with(&[&["bench", "--addr", "127.0.0.1:1"], arguments].concat()).await;
        assert_eq!(ran.status, Some(2), "{arguments:?}: {ran:?}");
    }
}
