//! A node process on this machine.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::{Child, Command};

use super::pidfile::{PidFile, ProcessId};
use super::plan::{NodePlan, Plan};
use super::rotate;

/// After SIGKILL the kernel needs a moment only.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// A node process that is our child, in a process group of its own.
#[derive(Debug)]
pub struct LocalNode {
    child: Child,
    process: ProcessId,
    pid_file: PidFile,
}

impl LocalNode {
    /// Starts it, and writes its pid file.
    pub fn start(plan: &Plan, node: &NodePlan, binary: &Path) -> io::Result<Self> {
        let output = open_output(&plan.output_file(node))?;
        let pid_file = plan.pid_file(node);
        // Before there is a process: on a full disk none is started, where none could be found again.
        let draft = pid_file.draft()?;
        // Its own group: Ctrl-C on the terminal is for the launcher, which then stops the nodes in order.
        let child = Command::new(binary)
            .arg("node")
            .arg("--config")
            .arg(&plan.config.file)
            .args(["--name", &node.name])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot run {}: {error}", binary.display()),
                )
            })?;
        let pid = child.id().unwrap_or_default();
        // A child that ended at once is a zombie until we wait for it; then nothing has to be found again later.
        let process = ProcessId::of(pid).unwrap_or(ProcessId {
            pid,
            start_ticks: 0,
        });
        let node = Self {
            child,
            process,
            pid_file,
        };
        draft.commit(process)?;
        Ok(node)
    }

    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// Waits for its end, in words. What it leaves behind in its group is killed. Safe to drop and call again.
    pub async fn ended(&mut self) -> String {
        let status = self.child.wait().await;
        self.clean_up();
        status.map_or_else(|error| format!("cannot wait for it: {error}"), describe)
    }

    /// SIGTERM; SIGKILL after `grace`, or as soon as `hurry` is done. Returns whether it ended by itself.
    pub async fn stop(mut self, grace: Duration, hurry: impl Future<Output = ()>) -> bool {
        // It runs under our own user: a signal can only fail because the process has ended.
        let _ = self.process.signal(Signal::SIGTERM);
        let graceful = tokio::select! {
            _ = self.child.wait() => true,
            () = tokio::time::sleep(grace) => false,
            () = hurry => false,
        };
        if !graceful {
            let _ = self.child.start_kill();
            let _ = tokio::time::timeout(KILL_TIMEOUT, self.child.wait()).await;
        }
        self.clean_up();
        graceful
    }

    fn clean_up(&self) {
        self.process.kill_group();
        self.pid_file.remove();
    }
}

fn open_output(path: &Path) -> io::Result<File> {
    let opened = rotate::put_aside(path).and_then(|()| {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
    });
    opened.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot write {}: {error}", path.display()),
        )
    })
}

/// How a process ended, in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("killed by {signal}"),
            Err(_) => format!("killed by signal {number}"),
        },
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_words() {
        assert_eq!(describe(ExitStatus::from_raw(3 << 8)), "exit status 3");
        assert_eq!(describe(ExitStatus::from_raw(9)), "killed by SIGKILL");
    }
}
