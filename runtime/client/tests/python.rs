//! The Python example client against fake gateways. Skipped, and said so, where there is no `python3`.

mod fake;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use fake::{Cluster, Fault, Gateway};
use serde_json::Value;
use tokio::process::Command;
use understudy_client::protocol::ErrorCode;

const TOTAL: u32 = 100;
const SEED: u64 = 7;

async fn has_python() -> bool {
    let found = Command::new("python3")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .await;
    let found = found.is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: no python3");
    }
    found
}

struct Run {
    events: Vec<Value>,
    errors: String,
    success: bool,
}

async fn python(gateways: &[&Gateway], arguments: &[&str]) -> Run {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python/understudy_client.py");
    let mut command = Command::new("python3");
    command.arg(script).kill_on_drop(true);
    for gateway in gateways {
        command.arg("--addr").arg(gateway.address.to_string());
    }
    command.args(arguments);
    let output = tokio::time::timeout(Duration::from_secs(60), command.output())
        .await
        .expect("done within 60 s")
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    Run {
        events: text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
        errors: String::from_utf8(output.stderr).unwrap(),
        success: output.status.success(),
    }
}

fn check(run: &Run) {
    assert!(run.success, "{}", run.errors);
    let (first, rest) = run.events.split_first().unwrap();
    let (last, tokens) = rest.split_last().unwrap();
    assert_eq!(
        (&first["type"], first["seed"].as_u64()),
        (&"accepted".into(), Some(SEED))
    );
    assert_eq!(tokens.len(), TOTAL as usize);
    for (position, token) in (0..).zip(tokens) {
        let expected = fake::token(0, SEED, position);
        assert_eq!(token["position"], position);
        assert_eq!(token["id"], expected.id);
        assert_eq!(token["text"], expected.text);
        let logprob = token["logprob"].as_f64().unwrap() as f32;
        assert_eq!(Some(logprob.to_bits()), expected.logprob.map(f32::to_bits));
    }
    assert_eq!(last["finish_reason"], "length");
    assert_eq!(last["usage"]["completion_tokens"], TOTAL);
}

#[tokio::test]
async fn it_streams_resumes_and_reports() {
    if !has_python().await {
        return;
    }
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    let arguments = [
        "--prompt",
        "Grüße",
        "--seed",
        "7",
        "--json",
        "--max-tokens",
        "300",
        "--temperature",
        "0.5",
    ];

    check(&python(&[&one], &arguments).await);

    for position in [0, 1, 40, 99, 100] {
        one.fault(position, Fault::Cut);
    }
    one.script.lock().unwrap().repeat = 3;
    check(&python(&[&one], &arguments).await);
    assert!(one.script.lock().unwrap().resumes >= 4);

    one.fault(50, Fault::Fail(ErrorCode::ShuttingDown));
    two.fault(70, Fault::Refuse(ErrorCode::Timeout));
    check(&python(&[&one, &two], &arguments).await);

    one.fault(50, Fault::Fail(ErrorCode::DeadlineExceeded));
    let run = python(&[&one], &arguments).await;
    assert!(!run.success);
    assert_eq!(run.events.last().unwrap()["code"], "deadline_exceeded");
    assert!(run.errors.contains("deadline_exceeded"), "{}", run.errors);

    let run = python(&[&one], &["--status", "--json"]).await;
    assert_eq!(run.events[0]["cluster"], "fake");
}

#[tokio::test]
async fn it_leaves_a_gateway_that_falls_silent_or_does_not_know_the_request() {
    if !has_python().await {
        return;
    }
    let cluster = Cluster::new(TOTAL);
    let (one, two) = (cluster.gateway().await, cluster.gateway().await);
    one.fault(30, Fault::Hang);
    let arguments = ["--token-ids", "1,2,300,70000", "--seed", "7", "--json"];
    check(&python(&[&one, &two], &arguments).await);
    assert_eq!(two.script.lock().unwrap().resumes, 1);

    two.script.lock().unwrap().forgets = true;
    one.fault(30, Fault::Fail(ErrorCode::ShuttingDown));
    check(&python(&[&one, &two], &arguments).await);
}
