//! A node process on another machine, over ssh.
//!
//! The other side needs an installation (the folder `dir` of the node, with the program in `target/release/` or `bin/`)
//! and the models; configuration and secrets are copied at each start.
//!
//! Invariant: a node that may have been started is remembered until it is known to be stopped. A start that ends in an
//! error after its script was sent is undone; what cannot be undone is reported.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use understudy_config::{ClusterConfig, LoadOptions, PathCheck};

use super::plan::{NodePlan, Plan, installation, remote_config_path};
use super::restart::StartError;
use super::scripts;
use super::ssh::{Ssh, feed};

/// A script that only looks or starts something has to be done in this time, connection set-up included.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// For the undoing of a start that failed, while nobody is waiting for an end.
const UNDO_TIMEOUT: Duration = Duration::from_secs(10);
/// For anything that a person who asks a second time still has to wait for.
pub const HURRIED_TIMEOUT: Duration = Duration::from_secs(4);
/// For the last lines of a log, which are a kindness.
const TAIL_TIMEOUT: Duration = Duration::from_secs(5);
/// The watch says something every second; after this silence the connection counts as lost.
const WATCH_TIMEOUT: Duration = Duration::from_secs(20);
/// Wait before a lost watch is set up again.
const REWATCH_WAIT: Duration = Duration::from_secs(2);

/// A node's place on another machine: how to get there, and what is where.
#[derive(Debug, Clone)]
pub struct Site {
    ssh: Ssh,
    pub destination: String,
    node: String,
    /// The program.
    binary: PathBuf,
    /// The copy of the configuration.
    config: PathBuf,
    run_dir: PathBuf,
    cookie: PathBuf,
    /// The tokens of clients, which only a gateway needs: our file, and where its copy goes.
    tokens: Option<(PathBuf, PathBuf)>,
    /// The node's own log, where the configuration names a folder for logs.
    log_directory: Option<PathBuf>,
    /// Who starts the node, so that a later launch knows its own.
    owner: String,
}

impl Site {
    /// Asks the other machine. Nothing is changed there.
    pub async fn find(
        ssh: &Ssh,
        plan: &Plan,
        node: &NodePlan,
        destination: &str,
        dir: &str,
    ) -> Result<Self, String> {
        let answer = ssh
            .run(destination, &scripts::find_installation(dir), CALL_TIMEOUT)
            .await
            .map_err(|error| error.to_string())?;
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
        let ours = plan.config.gateway.token_file.clone();
        Ok(Self {
            ssh: ssh.clone(),
            destination: destination.to_owned(),
            node: node.name.clone(),
            binary: root.join(binary),
            config,
            run_dir: there.cluster.run_dir,
            cookie: there.cluster.cookie_file,
            tokens: ours
                .filter(|_| node.is_gateway)
                .zip(there.gateway.token_file),
            log_directory: there.logging.directory,
            owner: plan.owner(),
        })
    }

    fn pid_file(&self) -> PathBuf {
        self.run_dir.join(format!("{}.pid", self.node))
    }

    fn output_file(&self) -> PathBuf {
        self.run_dir.join(format!("{}.log", self.node))
    }

    fn log_file(&self) -> PathBuf {
        let folder = self.log_directory.as_ref().unwrap_or(&self.run_dir);
        folder.join(format!("{}.log", self.node))
    }

    /// Copies configuration and secrets, and starts the node in a session of its own. One of an earlier launch of ours is
    /// stopped first. When this is dropped half-way, [`Site::undo`] is the caller's to call.
    pub async fn start(&self, plan: &Plan) -> Result<RemoteNode, StartError> {
        let cookie_file = &plan.config.cluster.cookie_file;
        let cookie_text = read("the cookie", cookie_file)?;
        let tokens = match &self.tokens {
            Some((ours, theirs)) => Some((theirs, read("the token file", ours)?)),
            None => None,
        };
        let mut secrets = vec![(self.cookie.as_path(), cookie_text.as_str())];
        if let Some((path, text)) = &tokens {
            secrets.push((path, text));
        }
        let start = scripts::Start {
            binary: &self.binary,
            config: &self.config,
            config_text: &plan.text,
            secrets: &secrets,
            run_dir: &self.run_dir,
            pid_file: &self.pid_file(),
            owner: &self.owner,
            output: &self.output_file(),
            name: &self.node,
            grace: plan.grace(),
        };
        let limit = plan.grace() + CALL_TIMEOUT;
        let script = start.script();
        let failed = match self.ssh.run(&self.destination, &script, limit).await {
            Ok(answer) => {
                let words = answer.lines().last().unwrap_or_default();
                match scripts::parse_process(words) {
                    Some((pid, start_ticks)) => {
                        return Ok(RemoteNode {
                            site: self.clone(),
                            pid,
                            start_ticks,
                        });
                    }
                    None => StartError::new(format!(
                        "{} gave no sensible answer to the start of the node: {words:?}",
                        self.destination
                    )),
                }
            }
            Err(error) => StartError {
                may_pass: error.script_status() == Some(scripts::WRITE_FAILED),
                ..StartError::new(error.to_string())
            },
        };
        // The script may have done its work although its answer did not come.
        match self.undo(UNDO_TIMEOUT).await {
            Ok(()) => Err(failed),
            Err(why) => Err(StartError {
                why: format!(
                    "{}; it may run there all the same, for it could not be stopped: {why}; run `down` when {} answers",
                    failed.why, self.destination
                ),
                in_doubt: true,
                ..failed
            }),
        }
    }

    /// Kills the node if it runs there as ours.
    pub async fn undo(&self, timeout: Duration) -> Result<(), String> {
        self.stop_own(Duration::ZERO, timeout).await.map(drop)
    }

    /// Stops the node if it is ours. Returns whether it ended by itself.
    async fn stop_own(&self, grace: Duration, timeout: Duration) -> Result<bool, String> {
        let script = scripts::stop(&self.pid_file(), grace, Some(&self.owner));
        let graceful = self.call_stop(&script, timeout).await?;
        Ok(graceful.unwrap_or(true))
    }

    async fn call_stop(&self, script: &str, timeout: Duration) -> Result<Option<bool>, String> {
        let answer = self.ssh.run(&self.destination, script, timeout).await;
        let answer = answer.map_err(|error| error.to_string())?;
        // A login shell may have greeted before.
        match answer.lines().last().map(str::trim) {
            Some(scripts::NOT_RUNNING) => Ok(None),
            Some(scripts::STOPPED) => Ok(Some(true)),
            Some(scripts::KILLED) => Ok(Some(false)),
            other => Err(format!(
                "{} gave no sensible answer: {:?}",
                self.destination,
                other.unwrap_or_default()
            )),
        }
    }

    /// Stops what the pid file names, whoever started it. `Ok(None)`: nothing ran. `Ok(Some(graceful))`.
    pub async fn stop(&self, grace: Duration) -> Result<Option<bool>, String> {
        let script = scripts::stop(&self.pid_file(), grace, None);
        self.call_stop(&script, grace + CALL_TIMEOUT).await
    }

    /// The process that the pid file names, if it runs.
    pub async fn running(&self) -> Result<Option<u32>, String> {
        let script = scripts::running(&self.pid_file());
        let answer = self.ssh.run(&self.destination, &script, CALL_TIMEOUT).await;
        let answer = answer.map_err(|error| error.to_string())?;
        let process = answer.lines().last().and_then(scripts::parse_process);
        Ok(process.map(|(pid, _)| pid))
    }

    /// The last lines of the node's log; none when they cannot be had.
    pub async fn tail(&self, count: usize) -> Vec<String> {
        let script = scripts::tail(&self.log_file(), count, false);
        let answer = self.ssh.run(&self.destination, &script, TAIL_TIMEOUT).await;
        let text = answer.unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// A command, with its script, that prints the node's log, and goes on when asked to.
    pub fn log_command(&self, count: usize, follow: bool) -> (Command, String) {
        let script = scripts::tail(&self.log_file(), count, follow);
        (self.ssh.command(&self.destination), script)
    }
}

/// A file of ours that is copied.
fn read(what: &str, path: &Path) -> Result<String, StartError> {
    std::fs::read_to_string(path)
        .map_err(|error| StartError::new(format!("cannot read {what} {}: {error}", path.display())))
}

/// A node process on another machine, started by us.
pub struct RemoteNode {
    site: Site,
    pid: u32,
    start_ticks: u64,
}

impl RemoteNode {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn destination(&self) -> &str {
        &self.site.destination
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
                        self.site.destination
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
        let mut command = self.site.ssh.command(&self.site.destination);
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
    ///
    /// # Errors
    /// The other machine did not confirm it: the node may still run.
    pub async fn stop(
        self,
        grace: Duration,
        hurry: impl Future<Output = ()>,
    ) -> Result<bool, String> {
        tokio::select! {
            stopped = self.site.stop_own(grace, grace + CALL_TIMEOUT) => stopped,
            () = hurry => self.site.stop_own(Duration::ZERO, HURRIED_TIMEOUT).await,
        }
    }
}
