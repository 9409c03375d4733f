//! The Python example client against fake gateways. Skipped, and said so, where there is no `python3`.

mod fake;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fake::{Cluster, Fault, Gateway, until};
use serde_json::Value;
use tokio::process::{Child, Command};
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
    status: Option<i32>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python")
}

/// The client's command line.
fn command(gateways: &[&Gateway], arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command
        .arg(folder().join("understudy_client.py"))
        .kill_on_drop(true)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // Whoever runs the tests in the background may have told them to ignore a Ctrl-C, which Python would inherit.
    // SAFETY: between fork and exec only signal is called, which may be.
    unsafe {
        command.pre_exec(|| match libc::signal(libc::SIGINT, libc::SIG_DFL) {
            libc::SIG_ERR => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    for gateway in gateways {
        command.arg("--addr").arg(gateway.address.to_string());
    }
    command.args(arguments);
    command
}

/// A program that has the client as its module `u`.
fn program(text: &str) -> Command {
    let mut command = Command::new("python3");
    command
        .arg("-B")
        .arg("-c")
        .arg(format!("import understudy_client as u\n{text}"))
        .env("PYTHONPATH", folder())
        .kill_on_drop(true)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

async fn python(gateways: &[&Gateway], arguments: &[&str]) -> Run {
    end(command(gateways, arguments)).await
}

async fn end(mut command: Command) -> Run {
    ended(command.spawn().unwrap()).await
}

async fn ended(child: Child) -> Run {
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output())
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
        status: output.status.code(),
    }
}

fn check(run: &Run) {
    assert_eq!(run.status, Some(0), "{}", run.errors);
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
    assert_eq!(run.status, Some(1));
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

#[tokio::test]
async fn what_it_does_not_read_to_the_end_is_cancelled() {
    if !has_python().await {
        return;
    }
    let cluster = Cluster::new(1_000_000);
    let gateway = cluster.gateway().await;
    let cancels = || gateway.script.lock().unwrap().cancels;
    let address = gateway.address;
    let stops = format!(
        "for event in u.Stream(['{address}'], {{'input': {{'prompt': 'x'}}}}):\n    if event.get('position') == 100: break"
    );
    let run = end(program(&stops)).await;
    assert_eq!((run.status, cancels()), (Some(0), 1), "{}", run.errors);
    assert!(!cluster.is_read_at_all());

    // Interrupted while it waits for a token.
    gateway.script.lock().unwrap().holds = true;
    let waiting = command(&[&gateway], &["--prompt", "x", "--json"])
        .spawn()
        .unwrap();
    until(|| cluster.is_read_at_all()).await;
    // No token is sent before the gateway hears of something: of the cancel, unless the client is slow.
    gateway.script.lock().unwrap().holds = false;
    interrupt(&waiting).await;
    let run = ended(waiting).await;
    assert_eq!((run.status, cancels()), (Some(130), 2), "{}", run.errors);

    // Interrupted while no gateway has the request.
    gateway.script.lock().unwrap().holds = true;
    let waiting = command(&[&gateway], &["--prompt", "x", "--json"])
        .spawn()
        .unwrap();
    until(|| cluster.is_read_at_all()).await;
    gateway.script.lock().unwrap().holds = false;
    gateway.script.lock().unwrap().resumes_to_refuse = 1_000_000;
    gateway.cut_connections();
    until(|| gateway.script.lock().unwrap().resumes > 6).await;
    gateway.script.lock().unwrap().resumes_to_refuse = 0;
    interrupt(&waiting).await;
    // Python may be interrupted in the middle of a line: what it has printed does not matter here.
    let output = tokio::time::timeout(Duration::from_secs(60), waiting.wait_with_output());
    let output = output.await.expect("done within 60 s").unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), cancels()), (Some(130), 3), "{said}");
}

/// As Ctrl-C does.
async fn interrupt(child: &Child) {
    let pid = child.id().unwrap().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().await;
    assert!(sent.unwrap().success());
}

#[tokio::test]
async fn its_recovery_begins_with_the_loss_and_outlasts_refusals() {
    if !has_python().await {
        return;
    }
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    // The first token comes later than a recovery may take.
    let limit = Duration::from_millis(300);
    gateway.script.lock().unwrap().holds = true;
    let arguments = [
        "--prompt",
        "x",
        "--seed",
        "7",
        "--json",
        "--recovery-timeout",
        "0.3",
    ];
    let waiting = command(&[&gateway], &arguments).spawn().unwrap();
    until(|| cluster.is_read_at_all()).await;
    let begun = Instant::now();
    until(|| begun.elapsed() > limit).await;
    gateway.script.lock().unwrap().holds = false;
    gateway.cut_connections();
    check(&ended(waiting).await);

    // Refused for now, and given up because it did not read.
    gateway.script.lock().unwrap().resumes_to_refuse = 3;
    gateway.fault(30, Fault::Cut);
    gateway.fault(60, Fault::Fail(ErrorCode::Timeout));
    let arguments = ["--prompt", "x", "--seed", "7", "--json"];
    check(&python(&[&gateway], &arguments).await);
    assert_eq!(gateway.script.lock().unwrap().resumes, 6);

    gateway.script.lock().unwrap().submits_to_lose = 1_000_000;
    let submits = gateway.script.lock().unwrap().submits;
    let run = python(&[&gateway], &arguments).await;
    assert_eq!(run.status, Some(1));
    assert_eq!(gateway.script.lock().unwrap().submits, submits + 4);
}

#[tokio::test]
async fn a_request_that_others_cancelled_is_no_success() {
    if !has_python().await {
        return;
    }
    let mut cluster = Cluster::new(TOTAL);
    Arc::get_mut(&mut cluster).unwrap().resume_grace = Some(Duration::ZERO);
    let gateway = cluster.gateway().await;
    gateway.fault(30, Fault::Cut);
    let run = python(&[&gateway], &["--prompt", "x", "--json"]).await;
    assert_eq!(run.status, Some(1), "{}", run.errors);
    assert!(run.errors.contains("not by this client"), "{}", run.errors);
}

#[tokio::test]
async fn it_says_what_is_wrong() {
    if !has_python().await {
        return;
    }
    let cluster = Cluster::new(TOTAL);
    let gateway = cluster.gateway().await;
    let long = "x".repeat(5000);
    let run = python(&[&gateway], &["--prompt", &long]).await;
    assert_eq!(run.status, Some(1));
    assert!(run.errors.contains("limit of 4096"), "{}", run.errors);
    assert_eq!(gateway.script.lock().unwrap().submits, 0);

    for arguments in [
        ["--prompt", "x", "--seed", "18446744073709551616"],
        ["--prompt", "x", "--max-tokens", "-1"],
        ["--token-ids", "1,4294967296", "--seed", "1"],
        ["--message", "no role", "--seed", "1"],
    ] {
        let run = python(&[&gateway], &arguments).await;
        assert_eq!(run.status, Some(2), "{arguments:?}: {}", run.errors);
        assert!(!run.errors.contains("Traceback"), "{}", run.errors);
    }

    gateway.script.lock().unwrap().garbles = true;
    let run = python(&[&gateway], &["--prompt", "x"]).await;
    assert_eq!(run.status, Some(1));
    assert!(run.errors.contains("no message"), "{}", run.errors);

    let text = "try: u.unpack(b'\\xa1\\xff')\nexcept u.ProtocolError: print('true')";
    let run = end(program(text)).await;
    assert_eq!(run.events, [Value::Bool(true)], "{}", run.errors);
}
