//! Signals and closed pipes end a command at once, without leaving its request running.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Child;
use tokio::time::{sleep, timeout};

use crate::fake::{Cluster, Fault, Gateway};
use crate::program::{Ran, finish, run_with, understudy};

/// A stream that stops after five tokens and stays open.
async fn halting() -> Gateway {
    let gateway = Cluster::new(9).gateway().await;
    gateway.fault(5, Fault::Pause);
    gateway
}

fn spawn(gateway: &Gateway, arguments: &[&str]) -> Child {
    let address = gateway.address.to_string();
    let mut command = understudy();
    command.args(arguments).args(["--addr", &address]);
    command.spawn().expect("the program starts")
}

/// Sends the signal when the output holds `count` lines, and adds these lines to the rest of the output.
async fn signal_after_lines(mut child: Child, count: usize, signal: Signal) -> Ran {
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut text = String::new();
    for _ in 0..count {
        stdout.read_line(&mut text).await.expect("a line");
    }
    send(&child, signal);
    stdout.read_to_string(&mut text).await.expect("the rest");
    let ran = finish(child).await;
    Ran {
        stdout: text,
        ..ran
    }
}

fn send(child: &Child, signal: Signal) {
    let pid = child.id().expect("it runs");
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), signal).expect("signalled");
}

/// Waits until the gateway has seen so many cancellations.
async fn cancelled(gateway: &Gateway, count: u32) {
    let seen = async {
        while gateway.script.lock().expect("not poisoned").cancels < count {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(Duration::from_secs(10), seen)
        .await
        .expect("the request is cancelled");
}

#[tokio::test]
async fn ctrl_c_cancels_and_shows_the_end() {
    for (signal, status) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let gateway = halting().await;
        let child = spawn(&gateway, &["generate", "--prompt", "x", "--json"]);
        let ran = signal_after_lines(child, 5, signal).await;
        assert_eq!((ran.status, ran.stderr.as_str()), (Some(status), ""));
        let mut objects = ran.json();
        let last = objects.pop().expect("a last object");
        assert_eq!(last["finish_reason"], "cancelled");
        // What was under way when the signal came still counts, and is shown.
        assert!(objects.len() >= 5);
        assert_eq!(last["usage"]["completion_tokens"], objects.len());
        cancelled(&gateway, 1).await;
    }
}

#[tokio::test]
async fn a_closed_pipe_cancels_and_ends_quietly() {
    let gateway = Cluster::new(u32::MAX).gateway().await;
    let mut child = spawn(&gateway, &["generate", "--prompt", "x", "--json"]);
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    stdout.read_line(&mut String::new()).await.expect("a line");
    drop(stdout);
    let ran = finish(child).await;
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
    cancelled(&gateway, 1).await;
}

#[tokio::test]
async fn bench_reports_what_it_has_when_interrupted() {
    let gateway = Cluster::new(50).gateway().await;
    let child = spawn(
        &gateway,
        &["bench", "--concurrency", "1", "--duration", "1h", "--json"],
    );
    let running = async {
        while gateway.script.lock().expect("not poisoned").submits < 5 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(Duration::from_secs(10), running)
        .await
        .expect("requests are sent");
    let ran = signal_after_lines(child, 0, Signal::SIGINT).await;
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(130), ""));
    let report = &ran.json()[0];
    assert_eq!(
        (&report["interrupted"], &report["failed"]),
        (&true.into(), &0.into())
    );
    assert!(
        report["succeeded"].as_u64().is_some_and(|count| count >= 4),
        "{report}"
    );
}

#[tokio::test]
async fn status_watch_goes_on_until_a_signal() {
    let gateway = Cluster::new(1).gateway().await;
    let child = spawn(
        &gateway,
        &["status", "--watch", "--json", "--interval", "10ms"],
    );
    let ran = signal_after_lines(child, 3, Signal::SIGINT).await;
    assert_eq!(ran.status, Some(130), "{ran:?}");
    assert!(ran.json().iter().all(|status| status["cluster"] == "fake"));
}

#[tokio::test]
async fn a_gateway_that_never_answers_holds_nobody() {
    // A listener that takes the connection and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = silent.local_addr().expect("an address").to_string();
    let arguments = [
        "generate",
        "--prompt",
        "x",
        "--addr",
        &address,
        "--connect-timeout",
        "60s",
    ];
    let child = understudy()
        .args(arguments)
        .spawn()
        .expect("the program starts");
    let (_held, _) = silent.accept().await.expect("it connects");
    let ran = signal_after_lines(child, 0, Signal::SIGINT).await;
    assert_eq!(
        (ran.status, ran.stdout.as_str(), ran.stderr.as_str()),
        (Some(130), "", "")
    );
    // And without a signal the wait has an end of its own.
    let ran = run_with(&[
        "generate",
        "--prompt",
        "x",
        "--addr",
        &address,
        "--connect-timeout",
        "100ms",
    ])
    .await;
    assert_eq!(ran.status, Some(3), "{ran:?}");
}
