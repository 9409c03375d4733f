//! The engine process: started with one end of a socket pair, killed with its owner.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};

/// The number under which the engine finds its end of the socket.
const ENGINE_FD: i32 = 3;

/// The status with which the system's loader ends a program whose libraries it does not find. No engine gives it.
const LIBRARIES_MISSING: i32 = 127;

/// How to start one engine.
#[derive(Debug, Clone)]
pub struct EngineSpec {
    pub program: PathBuf,
    pub model_dir: PathBuf,
    pub dtype: String,
    pub device: String,
    pub numerics: String,
    /// `none`, `int8`, `int4`.
    pub quantization: String,
    /// `auto`, `f32`, `f16`.
    pub kv_dtype: String,
    /// A fraction of available memory, or a size in MiB.
    pub kv_memory: String,
    pub threads: u32,
    pub max_sequences: u32,
    pub max_waiting: u32,
    pub step_token_budget: u32,
    pub context_length: Option<u32>,
}

impl EngineSpec {
    fn arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = vec![
            "serve".into(),
            "--model".into(),
            self.model_dir.display().to_string(),
        ];
        let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        add("--fd", ENGINE_FD.to_string());
        add("--dtype", self.dtype.clone());
        add("--device", self.device.clone());
        add("--numerics", self.numerics.clone());
        add("--quantization", self.quantization.clone());
        add("--kv-dtype", self.kv_dtype.clone());
        add("--kv-memory", self.kv_memory.clone());
        add("--threads", self.threads.to_string());
        add("--max-sequences", self.max_sequences.to_string());
        add("--max-waiting", self.max_waiting.to_string());
        add("--step-tokens", self.step_token_budget.to_string());
        if let Some(context_length) = self.context_length {
            add("--context-length", context_length.to_string());
        }
        arguments
    }
}

/// A running engine process. Dropping it kills the process, with everything that it started.
#[derive(Debug)]
pub struct EngineProcess {
    child: Child,
    pid: u32,
}

/// How an engine process ended.
#[derive(Debug)]
pub struct EngineEnd {
    pub description: String,
    signal: Option<i32>,
}

impl EngineEnd {
    /// Whether the signal that ended the process is one that a process gets from others, not for what it did: it asks
    /// nobody and never follows from a fault of the program. The system's own kills for want of memory look the same.
    pub fn is_by_others(&self) -> bool {
        matches!(
            self.signal,
            Some(libc::SIGKILL | libc::SIGTERM | libc::SIGINT | libc::SIGHUP | libc::SIGQUIT)
        )
    }
}

/// The engine could not be started at all.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the engine {program}: {source}")]
pub struct SpawnError {
    program: String,
    source: std::io::Error,
}

impl EngineProcess {
    /// Starts the process; its standard error goes where the node's goes.
    ///
    /// # Errors
    /// [`SpawnError`] if the program is missing, not executable, or the system has no room for it.
    pub fn spawn(spec: &EngineSpec) -> Result<(Self, UnixStream), SpawnError> {
        let failed = |source| SpawnError {
            program: spec.program.display().to_string(),
            source,
        };
        let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let theirs = OwnedFd::from(theirs);
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(&spec.program);
        command
            .args(spec.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        // A group of its own: a Ctrl-C at the terminal is the node's to handle, and the whole group can be killed.
        command.process_group(0).kill_on_drop(true);
        // SAFETY: between fork and exec only async-signal-safe calls are made: dup2, fcntl and prctl.
        unsafe {
            command.pre_exec(move || {
                if fd == ENGINE_FD {
                    // dup2 onto itself would leave close-on-exec set.
                    check(libc::fcntl(fd, libc::F_SETFD, 0))?;
                } else {
                    check(libc::dup2(fd, ENGINE_FD))?;
                }
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))
            });
        }
        let child = command.spawn().map_err(failed)?;
        drop(theirs);
        let pid = child
            .id()
            .ok_or_else(|| failed(std::io::Error::other("it ended at once")))?;
        let stream = UnixStream::from_std(ours).map_err(failed)?;
        Ok((Self { child, pid }, stream))
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills the process's group, unless the process has ended and been waited for: its number may be another's by then. Also
    /// ends a stopped process, which would not see a gentler signal.
    pub fn kill(&mut self) {
        if self.child.id().is_some() {
            let group = nix::unistd::Pid::from_raw(self.pid as i32);
            // Fails only if the group is gone already.
            nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).ok();
        }
    }

    /// Waits for the process to end. Ended already, it answers at once.
    pub async fn wait(&mut self) -> EngineEnd {
        let status = self.child.wait().await;
        let description = match &status {
            Ok(status) if status.code() == Some(LIBRARIES_MISSING) => {
                "the engine's libraries could not be loaded (LibTorch moved, removed or of another version): run scripts/setup.sh".into()
            }
            Ok(status) => status.to_string(),
            Err(error) => format!("unknown end: {error}"),
        };
        EngineEnd {
            description,
            signal: status.ok().and_then(|status| status.signal()),
        }
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn check(result: i32) -> std::io::Result<()> {
    if result == -1 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::testing::StandIn;

    #[tokio::test]
    async fn an_engine_without_its_libraries_says_what_to_do() {
        let mut engine = StandIn::new();
        let (mut process, _socket) = EngineProcess::spawn(&engine.spec()).unwrap();
        engine.exit(127).await;
        let end = process.wait().await;
        assert!(end.description.contains("scripts/setup.sh"), "{end:?}");
        assert!(!end.is_by_others());
        let mut engine = StandIn::new();
        let (mut process, _socket) = EngineProcess::spawn(&engine.spec()).unwrap();
        engine.exit(11).await;
        assert_eq!(process.wait().await.description, "exit status: 11");
    }
}
