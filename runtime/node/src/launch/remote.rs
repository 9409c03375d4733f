//! A node process on another machine, over ssh.
//!
//! Everything goes as a POSIX shell script through the standard input of `ssh DESTINATION sh -s`: no secret stands in an
//! argument list, and the login shell of the other side has nothing to quote. A script is one `{ … }` group, so that a
//! connection that breaks in the middle runs none of it.
//!
//! The other side needs an installation (the folder `dir` of the node, with the program in `target/release/` or `bin/`)
//! and the models; configuration and cookie are copied at each start.

use std::future::Future;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use understudy_config::{ClusterConfig, LoadOptions, PathCheck};

use super::plan::{NodePlan, Plan, installation, remote_config_path};
use super::scripts;

/// A script that only looks or starts something has to be done in this time, connection set-up included.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Output of a script that is kept; more is a fault of the other side.
const MAX_OUTPUT_BYTES: u64 = 256 << 10;
/// The watch says something every second; after this silence the connection counts as lost.
const WATCH_TIMEOUT: Duration = Duration::from_secs(20);
/// Wait before a lost watch is set up again.
const REWATCH_WAIT: Duration = Duration::from_secs(2);
/// ssh's own exit status for "no connection".
const SSH_FAILED: i32 = 255;

/// The environment variable with the ssh program to use, and its arguments.
pub const SSH_VARIABLE: &str = "UNDERSTUDY_SSH";

/// How ssh is called.
#[derive(Debug, Clone)]
pub struct Ssh {
    /// The program, then arguments of the person's own.
    words: Vec<String>,
}

impl Ssh {
    /// As the environment says.
    pub fn from_environment() -> Self {
        Self::new(std::env::var(SSH_VARIABLE).ok().as_deref())
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

    /// Runs a script; its standard output, or why not, for a person.
    async fn run(
        &self,
        destination: &str,
        script: &str,
        timeout: Duration,
    ) -> Result<String, String> {
        let mut command = self.command(destination);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let program = &self.words[0];
        let work = async {
            let mut child = command
                .spawn()
                .map_err(|error| format!("cannot run {program}: {error}; install ssh"))?;
            feed(&mut child, script).await;
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
            let read = |pipe: Option<_>| pipe.map(limited);
            let (stdout, stderr) = (read(stdout), stderr.map(limited));
            let (_, _) = tokio::join!(
                async {
                    if let Some(mut pipe) = stdout {
                        let _ = pipe.read_to_end(&mut out).await;
                    }
                },
                async {
                    if let Some(mut pipe) = stderr {
                        let _ = pipe.read_to_end(&mut err).await;
                    }
                },
            );
            let status = child
                .wait()
                .await
                .map_err(|error| format!("cannot wait for {program}: {error}"))?;
            let said = String::from_utf8_lossy(&err).trim().to_owned();
            match status.code() {
                Some(0) => Ok(String::from_utf8_lossy(&out).into_owned()),
                Some(SSH_FAILED) => Err(format!(
                    "ssh cannot reach {destination} ({said}); `ssh {destination} true` must work without a question"
                )),
                _ => Err(if said.is_empty() {
                    format!("the start script failed on {destination}")
                } else {
                    said
                }),
            }
        };
        tokio::time::timeout(timeout, work)
            .await
            .unwrap_or_else(|_| {
                Err(format!(
                    "{destination} did not answer over ssh within {} s",
                    timeout.as_secs()
                ))
            })
    }
}

fn limited<R: tokio::io::AsyncRead>(pipe: R) -> tokio::io::Take<R> {
    pipe.take(MAX_OUTPUT_BYTES)
}

/// Writes the script and closes the pipe. A process that ended before it read all says why on its standard error.
async fn feed(child: &mut Child, script: &str) {
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(script.as_bytes()).await;
        let _ = stdin.shutdown().await;
    }
}

/// Where things are on the other machine.
#[derive(Debug)]
struct Paths {
    /// The program.
    binary: PathBuf,
    /// The copy of the configuration.
    config: PathBuf,
    run_dir: PathBuf,
    cookie: PathBuf,
    /// The node's own log, where the configuration names a folder for logs.
    log_directory: Option<PathBuf>,
}

impl Paths {
    async fn find(ssh: &Ssh, plan: &Plan, destination: &str, dir: &str) -> Result<Self, String> {
        let answer = ssh
            .run(destination, &scripts::find_installation(dir), CALL_TIMEOUT)
            .await?;
        let mut lines = answer.lines().rev();
        let (Some(binary), Some(root)) = (lines.next(), lines.next()) else {
            return Err(format!(
                "{destination} gave no sensible answer; does its login shell print something by itself?"
            ));
        };
        let root = PathBuf::from(root);
        let config = root.join(remote_config_path(
            &plan.config.file,
            &installation(),
            &plan.config.cluster.name,
        ));
        // The same text, read as if it stood there, says where its relative paths lead there.
        let options = LoadOptions {
            paths: PathCheck::None,
        };
        let (there, _) = ClusterConfig::parse(&config, &plan.text, &options)
            .map_err(|problems| problems.to_string())?;
        Ok(Self {
            binary: root.join(binary),
            config,
            run_dir: there.cluster.run_dir,
            cookie: there.cluster.cookie_file,
            log_directory: there.logging.directory,
        })
    }

    fn pid_file(&self, node: &NodePlan) -> PathBuf {
        self.run_dir.join(format!("{}.pid", node.name))
    }

    fn output_file(&self, node: &NodePlan) -> PathBuf {
        self.run_dir.join(format!("{}.log", node.name))
    }

    fn log_file(&self, node: &NodePlan) -> PathBuf {
        let folder = self.log_directory.as_ref().unwrap_or(&self.run_dir);
        folder.join(format!("{}.log", node.name))
    }
}

/// A node process on another machine, started by us.
pub struct RemoteNode {
    ssh: Ssh,
    destination: String,
    pid_file: PathBuf,
    pid: u32,
    start_ticks: u64,
}

impl RemoteNode {
    /// Copies configuration and cookie, and starts the node in a session of its own.
    pub async fn start(
        ssh: &Ssh,
        plan: &Plan,
        node: &NodePlan,
        destination: &str,
        dir: &str,
    ) -> Result<Self, String> {
        let paths = Paths::find(ssh, plan, destination, dir).await?;
        let cookie_file = &plan.config.cluster.cookie_file;
        let cookie = std::fs::read_to_string(cookie_file).map_err(|error| {
            format!("cannot read the cookie {}: {error}", cookie_file.display())
        })?;
        let start = scripts::Start {
            binary: &paths.binary,
            config: &paths.config,
            config_text: &plan.text,
            cookie: &paths.cookie,
            cookie_text: &cookie,
            run_dir: &paths.run_dir,
            pid_file: &paths.pid_file(node),
            output: &paths.output_file(node),
            name: &node.name,
        };
        let answer = ssh.run(destination, &start.script(), CALL_TIMEOUT).await?;
        let words = answer.lines().last().unwrap_or_default();
        let (pid, start_ticks) = scripts::parse_process(words).ok_or_else(|| {
            format!("{destination} gave no sensible answer to the start of the node: {words:?}")
        })?;
        Ok(Self {
            ssh: ssh.clone(),
            destination: destination.to_owned(),
            pid_file: paths.pid_file(node),
            pid,
            start_ticks,
        })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn destination(&self) -> &str {
        &self.destination
    }

    /// Waits for its end, in words. A lost connection is not its end: the watch is set up again, and `note` told.
    /// Safe to drop and call again.
    pub async fn ended(&mut self, note: impl Fn(String)) -> String {
        let mut told = false;
        loop {
            match self.watch().await {
                Some(()) => return "its process is gone".to_owned(),
                None if !told => {
                    note(format!(
                        "lost sight of it: no ssh connection to {}; trying again",
                        self.destination
                    ));
                    told = true;
                }
                None => {}
            }
            tokio::time::sleep(REWATCH_WAIT).await;
        }
    }

    /// Until the process has ended (`Some`) or the connection has (`None`).
    async fn watch(&self) -> Option<()> {
        let mut command = self.ssh.command(&self.destination);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().ok()?;
        feed(&mut child, &scripts::watch(self.pid, self.start_ticks)).await;
        let mut stdout = child.stdout.take()?;
        let mut beat = [0_u8; 256];
        while tokio::time::timeout(WATCH_TIMEOUT, stdout.read(&mut beat))
            .await
            .ok()?
            .ok()?
            > 0
        {}
        let status = tokio::time::timeout(WATCH_TIMEOUT, child.wait())
            .await
            .ok()?
            .ok()?;
        (status.code() == Some(scripts::GONE)).then_some(())
    }

    /// SIGTERM, then SIGKILL after `grace` or as soon as `hurry` is done. Returns whether it ended by itself.
    pub async fn stop(self, grace: Duration, hurry: impl Future<Output = ()>) -> bool {
        let stop = |grace: Duration| {
            let script = scripts::stop(&self.pid_file, grace);
            let (ssh, destination) = (&self.ssh, &self.destination);
            async move { ssh.run(destination, &script, grace + CALL_TIMEOUT).await }
        };
        tokio::select! {
            answer = stop(grace) => answer.is_ok_and(|answer| !answer.contains(scripts::KILLED)),
            () = hurry => stop(Duration::ZERO).await.is_ok_and(|answer| !answer.contains(scripts::KILLED)),
        }
    }
}

/// Stops what the pid file on the other machine names. `Ok(None)`: nothing ran. `Ok(Some(graceful))`.
pub async fn stop(
    ssh: &Ssh,
    plan: &Plan,
    node: &NodePlan,
    destination: &str,
    dir: &str,
) -> Result<Option<bool>, String> {
    let paths = Paths::find(ssh, plan, destination, dir).await?;
    let script = scripts::stop(&paths.pid_file(node), plan.grace());
    let answer = ssh
        .run(destination, &script, plan.grace() + CALL_TIMEOUT)
        .await?;
    Ok(match answer.trim() {
        scripts::NOT_RUNNING => None,
        answer => Some(answer != scripts::KILLED),
    })
}

/// The process that the pid file on the other machine names, if it runs.
pub async fn running(
    ssh: &Ssh,
    plan: &Plan,
    node: &NodePlan,
    destination: &str,
    dir: &str,
) -> Result<Option<u32>, String> {
    let paths = Paths::find(ssh, plan, destination, dir).await?;
    let answer = ssh
        .run(
            destination,
            &scripts::running(&paths.pid_file(node)),
            CALL_TIMEOUT,
        )
        .await?;
    Ok(answer
        .lines()
        .last()
        .and_then(scripts::parse_process)
        .map(|(pid, _)| pid))
}

/// The last lines of the node's log; none when they cannot be had.
pub async fn tail(
    ssh: &Ssh,
    plan: &Plan,
    node: &NodePlan,
    destination: &str,
    dir: &str,
    count: usize,
) -> Vec<String> {
    let Ok(paths) = Paths::find(ssh, plan, destination, dir).await else {
        return Vec::new();
    };
    let script = scripts::tail(&paths.log_file(node), count, false);
    let answer = ssh
        .run(destination, &script, CALL_TIMEOUT)
        .await
        .unwrap_or_default();
    answer.lines().map(str::to_owned).collect()
}

/// A command, with its script, that prints the node's log, and goes on when asked to.
pub async fn log_command(
    ssh: &Ssh,
    plan: &Plan,
    node: &NodePlan,
    destination: &str,
    dir: &str,
    (count, follow): (usize, bool),
) -> Result<(Command, String), String> {
    let paths = Paths::find(ssh, plan, destination, dir).await?;
    Ok((
        ssh.command(destination),
        scripts::tail(&paths.log_file(node), count, follow),
    ))
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
