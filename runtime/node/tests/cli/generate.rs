//! `generate` and `resume`.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, BufReader};
use understudy_protocol::ErrorCode;

use crate::fake::{Cluster, Fault, Gateway, token};
use crate::program::{Ran, finish, run, run_piped, run_with, understudy};

/// The JSON line of the fake's token.
fn token_line(seed: u64, position: u32) -> String {
    let event = token(0, seed, position);
    let alternative = &event.top_logprobs[0];
    format!(
        r#"{{"position":{position},"id":{},"text":"t{position} ","logprob":{},"top_logprobs":[{{"id":{},"logprob":-0.0}}]}}"#,
        event.id,
        serde_json::to_string(&event.logprob).expect("a number"),
        alternative.id,
    )
}

async fn generate(gateway: &Gateway, arguments: &[&str]) -> Ran {
    let address = gateway.address.to_string();
    let base = [
        "generate", "--addr", &address, "--prompt", "x", "--seed", "7",
    ];
    run_with(&[&base, arguments].concat()).await
}

#[tokio::test]
async fn json_lines_are_golden() {
    let cluster = Cluster::new(3);
    let gateway = cluster.gateway().await;
    let ran = generate(&gateway, &["--json"]).await;
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
    let lines: Vec<&str> = ran.stdout.lines().collect();
    let tokens: Vec<String> = (0..3).map(|position| token_line(7, position)).collect();
    assert_eq!(lines[..3], tokens);
    let id = ran.json()[3]["request_id"]
        .as_str()
        .expect("an id")
        .to_owned();
    assert_eq!(id.len(), 32);
    let end = format!(
        r#"{{"finish_reason":"length","usage":{{"prompt_tokens":3,"completion_tokens":3}},"text":"end","request_id":"{id}","seed":7}}"#
    );
    assert_eq!(lines[3..], [end]);
}

#[tokio::test]
async fn text_is_the_answer_alone() {
    let cluster = Cluster::new(3);
    let gateway = cluster.gateway().await;
    let ran = generate(&gateway, &[]).await;
    assert_eq!(ran.stdout, "t0 t1 t2 end\n");
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn a_lost_connection_is_not_seen_in_the_output() {
    let cluster = Cluster::new(40);
    let whole = cluster.gateway().await;
    let expected = generate(&whole, &["--json"]).await;
    let cut = cluster.gateway().await;
    for position in [0, 7, 8, 39] {
        cut.fault(position, Fault::Cut);
    }
    let ran = generate(&cut, &["--json"]).await;
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
    assert_eq!(ran.stdout.lines().count(), 41);
    // All but the last line, which bears the id of the request.
    assert!(
        ran.stdout
            .lines()
            .take(40)
            .eq(expected.stdout.lines().take(40))
    );
    assert_eq!(ran.json()[40]["usage"], expected.json()[40]["usage"]);
}

#[tokio::test]
async fn another_gateway_takes_over() {
    let cluster = Cluster::new(20);
    let (first, second) = (cluster.gateway().await, cluster.gateway().await);
    first.fault(5, Fault::Refuse(ErrorCode::ShuttingDown));
    first.fault(5, Fault::Fail(ErrorCode::ShuttingDown));
    let addresses = format!("{},{}", first.address, second.address);
    let ran = run_with(&[
        "generate", "--addr", &addresses, "--prompt", "x", "--seed", "7",
    ])
    .await;
    let expected: String = (0..20).map(|position| format!("t{position} ")).collect();
    assert_eq!(ran.stdout, format!("{expected}end\n"));
    assert_eq!(ran.status, Some(0));
}

#[tokio::test]
async fn a_refused_request_says_why_and_whether_to_try_again() {
    for (code, status, retriable) in [
        (ErrorCode::Overloaded, 4, true),
        (ErrorCode::InvalidRequest, 1, false),
        (ErrorCode::DeadlineExceeded, 1, false),
    ] {
        let cluster = Cluster::new(9);
        let gateway = cluster.gateway().await;
        gateway.fault(2, Fault::Fail(code));
        let ran = generate(&gateway, &["--json"]).await;
        assert_eq!(ran.status, Some(status), "{ran:?}");
        let last = ran.json().pop().expect("a last object");
        assert_eq!(last["error"]["code"], code.as_str());
        assert_eq!(last["error"]["retriable"], retriable);
        assert_eq!(last["next_position"], 2);
        assert_eq!(ran.stdout.lines().count(), 3);
        assert!(
            ran.stderr
                .starts_with(&format!("error: {}: scripted", code.as_str())),
            "{}",
            ran.stderr
        );
    }
}

#[tokio::test]
async fn a_gateway_lost_for_good_leaves_what_resume_needs() {
    let cluster = Cluster::new(9);
    let gateway = cluster.gateway().await;
    gateway.fault(4, Fault::Pause);
    let address = gateway.address.to_string();
    let arguments = ["--prompt", "x", "--json", "--recovery-timeout", "100ms"];
    let mut child = understudy()
        .args(["generate", "--addr", &address])
        .args(arguments)
        .spawn()
        .expect("the program starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    for _ in 0..4 {
        stdout.next_line().await.expect("read").expect("a token");
    }
    gateway.kill();
    let last = stdout.next_line().await.expect("read").expect("an error");
    let last: serde_json::Value = serde_json::from_str(&last).expect("JSON");
    assert_eq!(last["error"]["code"], "not_recovered");
    assert_eq!(last["next_position"], 4);
    let ran = finish(child).await;
    assert_eq!(ran.status, Some(4), "{ran:?}");
    let id = last["request_id"].as_str().expect("an id");
    let command = format!("understudy resume {id} --next-position 4");
    assert!(ran.stderr.contains(&command), "{}", ran.stderr);

    let second = cluster.gateway().await;
    let again = second.address.to_string();
    let rest = run_with(&["resume", id, "--next-position", "4", "--addr", &again]).await;
    assert_eq!(
        (rest.status, rest.stdout.as_str()),
        (Some(0), "t4 t5 t6 t7 t8 end\n")
    );
}

#[tokio::test]
async fn no_gateway_is_told_with_what_to_do() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    drop(listener);
    let ran = run_with(&["generate", "--addr", &address, "--prompt", "x"]).await;
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(3), ""));
    assert!(
        ran.stderr.contains(&address) && ran.stderr.contains("is the cluster running?"),
        "{}",
        ran.stderr
    );
    assert!(!ran.stderr.contains("backtrace"));
}

#[tokio::test]
async fn tokens_open_the_door() {
    let mut cluster = Cluster::new(2);
    Arc::get_mut(&mut cluster)
        .expect("no gateway has it yet")
        .token = Some("open-sesame".to_owned());
    let gateway = cluster.gateway().await;
    let ran = generate(&gateway, &[]).await;
    assert_eq!(ran.status, Some(3), "{ran:?}");
    assert!(
        ran.stderr.contains("asks for a token: give --token-file"),
        "{}",
        ran.stderr
    );

    let file = temporary("token", "open-sesame\n");
    let ran = generate(&gateway, &["--token-file", file.to_str().expect("UTF-8")]).await;
    assert_eq!(ran.status, Some(0), "{ran:?}");

    let address = gateway.address.to_string();
    let with_environment = |token: &str| {
        let mut command = understudy();
        command.args(["generate", "--prompt", "x"]);
        command
            .env("UNDERSTUDY_ADDR", &address)
            .env("UNDERSTUDY_TOKEN", token);
        command
    };
    assert_eq!(
        run(&mut with_environment("open-sesame")).await.status,
        Some(0)
    );
    let ran = run(&mut with_environment("guess")).await;
    assert_eq!(ran.status, Some(3), "{ran:?}");
    assert!(
        ran.stderr.contains("does not know this token") && !ran.stderr.contains("guess"),
        "{}",
        ran.stderr
    );
    std::fs::remove_file(file).expect("removed");
}

#[tokio::test]
async fn an_announced_request_can_be_resumed() {
    let cluster = Cluster::new(10);
    let gateway = cluster.gateway().await;
    let whole = generate(&gateway, &["--json", "--announce"]).await;
    let first = &whole.json()[0];
    assert_eq!(
        (&first["seed"], &first["prompt_tokens"]),
        (&7.into(), &3.into())
    );
    let id = first["request_id"].as_str().expect("an id");
    let address = gateway.address.to_string();
    let rest = run_with(&[
        "resume",
        id,
        "--next-position",
        "6",
        "--addr",
        &address,
        "--json",
    ])
    .await;
    assert_eq!(rest.status, Some(0), "{rest:?}");
    let expected: Vec<&str> = whole.stdout.lines().skip(7).collect();
    assert_eq!(rest.stdout.lines().collect::<Vec<_>>(), expected);

    let unknown = run_with(&[
        "resume",
        &"0".repeat(32),
        "--next-position",
        "0",
        "--addr",
        &address,
    ])
    .await;
    assert_eq!(unknown.status, Some(1), "{unknown:?}");
    assert!(
        unknown.stderr.contains("unknown_request"),
        "{}",
        unknown.stderr
    );
    let malformed = run_with(&["resume", "12", "--next-position", "0", "--addr", &address]).await;
    assert_eq!(malformed.status, Some(2));
    assert!(
        malformed.stderr.contains("32 hexadecimal digits"),
        "{}",
        malformed.stderr
    );
}

#[tokio::test]
async fn prompts_come_from_files_and_standard_input() {
    let cluster = Cluster::new(1);
    let gateway = cluster.gateway().await;
    let address = gateway.address.to_string();
    let mut command = understudy();
    command.args(["generate", "--addr", &address, "--prompt-file", "-"]);
    let ran = run_piped(&mut command, "a prompt\n").await;
    assert_eq!((ran.status, ran.stdout.as_str()), (Some(0), "t0 end\n"));

    let ran = run_with(&[
        "generate",
        "--addr",
        &address,
        "--prompt-file",
        "/no/such/file",
    ])
    .await;
    assert_eq!(ran.status, Some(2));
    assert!(
        ran.stderr
            .contains("cannot read the prompt from /no/such/file"),
        "{}",
        ran.stderr
    );

    let long = "x".repeat(10_000);
    let ran = run_with(&["generate", "--addr", &address, "--prompt", &long]).await;
    assert_eq!(ran.status, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("shorten the prompt"), "{}", ran.stderr);
}

/// A file of this process alone.
pub fn temporary(name: &str, content: &str) -> PathBuf {
    let file = std::env::temp_dir().join(format!("understudy-cli-{}-{name}", std::process::id()));
    std::fs::write(&file, content).expect("written");
    file
}
