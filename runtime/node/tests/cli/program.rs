//! Running the program.

use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// No run takes longer; a hang becomes a failure.
const LIMIT: Duration = Duration::from_secs(30);

/// The program, without the variables that it reads.
pub fn understudy() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    for name in [
        "UNDERSTUDY_ADDR",
        "UNDERSTUDY_TOKEN",
        "UNDERSTUDY_TOKEN_FILE",
        "NO_COLOR",
    ] {
        command.env_remove(name);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// What a run left.
#[derive(Debug)]
pub struct Ran {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Standard output as one JSON value a line.
    pub fn json(&self) -> Vec<Value> {
        let parse =
            |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        self.stdout.lines().map(parse).collect()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
        }
    }
}

/// Runs to the end.
pub async fn run(command: &mut Command) -> Ran {
    finish(command.spawn().expect("the program starts")).await
}

/// Runs with arguments only.
pub async fn run_with(arguments: &[&str]) -> Ran {
    run(understudy().args(arguments)).await
}

/// Runs with `input` on standard input.
pub async fn run_piped(command: &mut Command, input: &str) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    // It may leave without reading all of it.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    finish(child).await
}

/// Waits for the end.
pub async fn finish(child: Child) -> Ran {
    timeout(LIMIT, child.wait_with_output())
        .await
        .expect("the program ends")
        .expect("the program is waited for")
        .into()
}
