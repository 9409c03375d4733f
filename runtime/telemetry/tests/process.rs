//! Logging at the end of a process: whole, and without what clients sent. Each case is a process of its own, because the
//! panic hook and the subscriber belong to the process.

use std::process::{Command, Output};

use understudy_telemetry::{LogFormat, LogOptions, install_logging, install_panic_hook};

/// Set in the environment of the processes that the tests start: what they shall do.
const CASE: &str = "TELEMETRY_CASE";
const SECRET: &str = "what a client asked";

/// Not a test: the body of the processes.
#[test]
fn case_process() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let options = LogOptions {
        format: LogFormat::Json,
        node: Some("a".into()),
        ..LogOptions::default()
    };
    let logs = install_logging(&options).expect("logging");
    install_panic_hook(&logs);
    match case.as_str() {
        "exit" => (0..5000).for_each(|number| tracing::info!(number, "line")),
        "thread" => {
            let quoting = || panic!("no token in {SECRET:?}");
            let thread = std::thread::Builder::new().name("worker".into());
            thread
                .spawn(quoting)
                .expect("a thread")
                .join()
                .expect_err("it panics");
            // Nothing is flushed here: the hook has done it.
            std::mem::forget(logs);
            std::process::abort();
        }
        "main" => {
            tracing::info!("before");
            panic!("called unwrap() on an Err value: {SECRET:?}");
        }
        other => unreachable!("{other}"),
    }
}

fn run(case: &str) -> (Output, String) {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["case_process", "--exact", "--nocapture"])
        .env(CASE, case)
        .env_remove("RUST_LOG")
        .output()
        .expect("runs");
    let log = String::from_utf8(output.stderr.clone()).expect("text");
    (output, log)
}

#[test]
fn a_process_that_ends_has_written_every_line() {
    let (_, log) = run("exit");
    let lines = log
        .lines()
        .filter(|line| line.contains("\"message\":\"line\""))
        .count();
    assert_eq!(lines, 5000);
    assert!(log.contains("\"number\":4999"));
}

#[test]
fn a_panic_is_logged_with_thread_and_place_but_without_its_message() {
    for (case, thread) in [("thread", "\"thread\":\"worker\""), ("main", "\"thread\":")] {
        let (output, log) = run(case);
        assert!(!output.status.success(), "{case}");
        let line = log
            .lines()
            .find(|line| line.contains("a thread panicked"))
            .unwrap_or_else(|| panic!("{case}: {log}"));
        for part in [
            thread,
            "tests/process.rs:",
            "\"node\":\"a\"",
            "\"level\":\"ERROR\"",
        ] {
            assert!(line.contains(part), "{case}: {part} in {line}");
        }
        let everything = log + &String::from_utf8_lossy(&output.stdout);
        let quoted = everything
            .lines()
            .filter(|line| line.contains(SECRET))
            .count();
        assert_eq!(quoted, 0, "{case}: {everything}");
    }
}
