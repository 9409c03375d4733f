//! A node process on this machine.

use std::fs::{self, File, OpenOptions};
use std::future::Future;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::{Child, Command};

use super::pidfile::{PidFile, ProcessId};
use super::plan::{NodePlan, Plan};

/// An output file that has grown beyond this is put aside as `<name>.log.1` when its node starts.
const MAX_LOG_BYTES: u64 = 64 << 20;
/// How much of a log is read to show its last lines.
const TAIL_BYTES: u64 = 16 << 10;
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
            pid_file: plan.pid_file(node),
        };
        node.pid_file.write(process)?;
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
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() > MAX_LOG_BYTES) {
        fs::rename(path, old_log(path))?;
    }
    let open = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
    open.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot write {}: {error}", path.display()),
        )
    })
}

fn old_log(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
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

/// Length of a file in bytes; 0 when there is none.
pub fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// The last lines of a file, at most `count`, of what was written beyond `from` bytes; none when it cannot be read.
pub fn tail(path: &Path, from: u64, count: usize) -> Vec<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        // A file that is shorter now was put aside meanwhile; all of it is new.
        let from = if from > length { 0 } else { from };
        file.seek(SeekFrom::Start(from.max(length.saturating_sub(TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_lines_of_a_large_file() {
        let path = std::env::temp_dir().join(format!("understudy-tail-{}", std::process::id()));
        let text: String = (0..10_000).map(|n| format!("line {n}\n")).collect();
        fs::write(&path, text).expect("written");
        assert_eq!(tail(&path, 0, 2), ["line 9998", "line 9999"]);
        assert_eq!(tail(&path, length(&path) - 10, 2), ["line 9999"]);
        assert!(tail(&path, length(&path), 2).is_empty());
        fs::write(&path, "only").expect("written");
        assert_eq!(tail(&path, 100, 2), ["only"]);
        fs::remove_file(&path).expect("removed");
        assert!(tail(&path, 0, 2).is_empty());
    }

    #[test]
    fn an_overgrown_log_is_put_aside() {
        let folder = std::env::temp_dir().join(format!("understudy-grown-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("a.log");
        File::create(&path)
            .and_then(|file| file.set_len(MAX_LOG_BYTES + 1))
            .expect("a sparse file");
        open_output(&path).expect("opened");
        assert_eq!(fs::metadata(&path).expect("new").len(), 0);
        assert_eq!(
            fs::metadata(folder.join("a.log.1")).expect("old").len(),
            MAX_LOG_BYTES + 1
        );
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn ends_are_told_in_words() {
        assert_eq!(describe(ExitStatus::from_raw(3 << 8)), "exit status 3");
        assert_eq!(describe(ExitStatus::from_raw(9)), "killed by SIGKILL");
    }
}
