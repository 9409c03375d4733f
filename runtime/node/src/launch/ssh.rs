//! Scripts that run on other machines, over ssh.
//!
//! Everything goes as a POSIX shell script through the standard input of `ssh DESTINATION sh -s`: no secret stands in an
//! argument list, and the login shell of the other side has nothing to quote.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

/// Output of a script that is kept; more is a fault of the other side.
const MAX_OUTPUT_BYTES: u64 = 256 << 10;
/// ssh's own exit status for "no connection".
const SSH_FAILED: i32 = 255;

/// How ssh is called.
#[derive(Debug, Clone)]
pub struct Ssh {
    /// The program, then arguments of the person's own.
    words: Vec<String>,
}

/// Why a script gave no answer, for a person.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("cannot run {program}: {error}; install ssh")]
    NoSsh {
        program: String,
        error: std::io::Error,
    },
    #[error(
        "ssh cannot reach {destination} ({said}); `ssh {destination} true` must work without a question"
    )]
    Unreachable { destination: String, said: String },
    #[error("{destination} did not answer over ssh within {} s", .after.as_secs())]
    TimedOut {
        destination: String,
        after: Duration,
    },
    /// The script ended with another status than 0; what it said says why.
    #[error("{said}")]
    Script { status: Option<i32>, said: String },
}

impl CallError {
    /// The exit status of the script itself.
    pub fn script_status(&self) -> Option<i32> {
        match self {
            Self::Script { status, .. } => *status,
            _ => None,
        }
    }
}

impl Ssh {
    /// As the environment says.
    pub fn from_environment() -> Self {
        Self::new(std::env::var(crate::cli::env::SSH).ok().as_deref())
    }

    /// From the value of `UNDERSTUDY_SSH`, a program and arguments separated by spaces; `ssh` where there is none.
    pub fn new(setting: Option<&str>) -> Self {
        let words: Vec<String> = setting
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        Self {
            words: if words.is_empty() {
                vec!["ssh".to_owned()]
            } else {
                words
            },
        }
    }

    /// `ssh … DESTINATION sh -s`. Never asks anything; notices a dead connection within some 15 s.
    pub fn command(&self, destination: &str) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        for option in [
            "BatchMode=yes",
            "ConnectTimeout=10",
            "ServerAliveInterval=5",
            "ServerAliveCountMax=3",
        ] {
            command.args(["-o", option]);
        }
        // Its own process group: Ctrl-C on the terminal must not cut the connections that stop the nodes.
        command
            .args(["-T", "--", destination, "sh", "-s"])
            .process_group(0)
            .kill_on_drop(true);
        command
    }

    /// Runs a script; its standard output.
    ///
    /// # Errors
    /// It could not be run, did not end within `timeout`, or failed. Only [`CallError::Script`] says that it has ended.
    pub async fn run(
        &self,
        destination: &str,
        script: &str,
        timeout: Duration,
    ) -> Result<String, CallError> {
        let work = self.run_to_the_end(destination, script);
        tokio::time::timeout(timeout, work)
            .await
            .unwrap_or_else(|_| {
                Err(CallError::TimedOut {
                    destination: destination.to_owned(),
                    after: timeout,
                })
            })
    }

    async fn run_to_the_end(&self, destination: &str, script: &str) -> Result<String, CallError> {
        let no_ssh = |error| CallError::NoSsh {
            program: self.words[0].clone(),
            error,
        };
        let mut child = self
            .command(destination)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(no_ssh)?;
        feed(&mut child, script).await;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (out, said) = tokio::join!(read(stdout), read(stderr));
        let status = child.wait().await.map_err(no_ssh)?;
        let said = said.trim().to_owned();
        match status.code() {
            Some(0) => Ok(out),
            Some(SSH_FAILED) => Err(CallError::Unreachable {
                destination: destination.to_owned(),
                said,
            }),
            status => Err(CallError::Script {
                status,
                said: if said.is_empty() {
                    format!("a script failed on {destination} without a word")
                } else {
                    said
                },
            }),
        }
    }
}

/// What comes out of a pipe until its end, within the bound.
async fn read(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        let _ = pipe.take(MAX_OUTPUT_BYTES).read_to_end(&mut bytes).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Writes the script and closes the pipe. A process that ended before it read all says why on its standard error.
pub async fn feed(child: &mut Child, script: &str) {
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(script.as_bytes()).await;
        let _ = stdin.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_can_be_another_program_with_arguments() {
        let words = |setting| Ssh::new(setting).words;
        assert_eq!(words(None), ["ssh"]);
        assert_eq!(words(Some("  ")), ["ssh"]);
        assert_eq!(words(Some("ssh -p 2222")), ["ssh", "-p", "2222"]);
        let command = Ssh::new(Some("ssh -p 2222")).command("me@host");
        let arguments: Vec<_> = command
            .as_std()
            .get_args()
            .filter_map(|word| word.to_str())
            .collect();
        assert_eq!(arguments[..4], ["-p", "2222", "-o", "BatchMode=yes"]);
        assert_eq!(
            arguments[arguments.len() - 5..],
            ["-T", "--", "me@host", "sh", "-s"]
        );
    }
}
