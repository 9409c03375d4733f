//! `up --detach`: the same launcher in a process of its own, and a parent that shows its words until the cluster serves.
//!
//! The two share a pipe: what the launcher prints comes through it. A byte that no text holds says that the cluster
//! serves; the launcher then turns its output to a file and stays. A pipe that ends without it is a failed launch, and
//! the launcher's exit status is the parent's.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};

use super::pidfile::ProcessId;
use super::rotate;
use super::up::UpArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::interrupt::Interrupt;

/// "The cluster serves."
const READY: u8 = 0x01;

fn failed(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("{what}: {error}"))
}

/// The file for the words of a launcher in the background.
pub fn output_file(run_dir: &Path) -> PathBuf {
    run_dir.join("launcher.log")
}

/// The parent's part.
pub async fn start(args: &UpArgs) -> Result<Exit, Failure> {
    let mut signals = Interrupt::or_hangup()?;
    let (reader, writer) = std::io::pipe().map_err(|error| failed("cannot make a pipe", error))?;
    let child = spawn(args, writer)
        .map_err(|error| failed("cannot start the launcher in the background", error))?;
    let mut child = Leaving(child);
    let process = child.0.id().and_then(ProcessId::of);
    let mut pipe = Receiver::from_owned_fd(OwnedFd::from(reader))
        .map_err(|error| failed("cannot read a pipe", error))?;
    let mut interrupted = None;
    loop {
        tokio::select! {
            ready = relay(&mut pipe) => match (ready, interrupted) {
                (Some(()), None) => return Ok(Exit::Ok),
                // It became ready in the very moment: it stops all the same, its last words go to its file.
                (Some(()), Some(_)) => {}
                (None, Some(exit)) => {
                    child.wait().await?;
                    return Err(Failure::quiet(exit));
                }
                (None, None) => return Err(Failure::quiet(exit_of(child.wait().await?))),
            },
            exit = signals.wait() => {
                interrupted = Some(exit);
                if let Some(process) = process {
                    process.signal(Signal::SIGTERM).map_err(|error| failed("cannot stop the launcher", error))?;
                }
            }
        }
    }
}

/// A child that is left alone when this process ends.
struct Leaving(Child);

impl Leaving {
    async fn wait(&mut self) -> Result<ExitStatus, Failure> {
        self.0
            .wait()
            .await
            .map_err(|error| failed("cannot wait for the launcher", error))
    }
}

fn spawn(args: &UpArgs, writer: std::io::PipeWriter) -> std::io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("up").arg("--background");
    if let Some(config) = &args.config {
        command.arg(config);
    }
    if args.no_sample {
        command.arg("--no-sample");
    }
    if let Some(program) = &args.node_binary {
        command.arg("--node-binary").arg(program);
    }
    if let Some(via) = &args.via {
        command.arg("--via").arg(via);
    }
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
}

/// Prints what comes, until the mark (`Some`) or the end (`None`).
async fn relay(pipe: &mut Receiver) -> Option<()> {
    let mut bytes = [0_u8; 4096];
    loop {
        // A pipe that cannot be read is as good as ended.
        let count = pipe.read(&mut bytes).await.unwrap_or(0);
        let text = &bytes[..count];
        let mark = text.iter().position(|byte| *byte == READY);
        let mut out = std::io::stdout().lock();
        let _ = out
            .write_all(&text[..mark.unwrap_or(count)])
            .and_then(|()| out.flush());
        if mark.is_some() {
            return Some(());
        }
        if count == 0 {
            return None;
        }
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    let same = |exit: &Exit| status.code() == Some(i32::from(exit.code())) && *exit != Exit::Ok;
    Exit::ALL.into_iter().find(same).unwrap_or(Exit::Failed)
}

/// The launcher's part, first: out of the terminal's session, so that neither Ctrl-C nor its closing reaches us.
pub fn leave_terminal() -> Result<(), Failure> {
    nix::unistd::setsid()
        .map(drop)
        .map_err(|error| failed("cannot leave the terminal's session", error))
}

/// The launcher's part, before anything is started: the file that it writes to later.
pub fn open_output(run_dir: &Path) -> Result<File, Failure> {
    let path = output_file(run_dir);
    let opened = rotate::put_aside(&path).and_then(|()| {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
    });
    opened.map_err(|error| failed(&format!("cannot write {}", path.display()), error))
}

/// The launcher's part, when the cluster serves: lets the parent go, and writes to the file from here on.
pub fn report_ready(file: &File) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    // A parent that is gone needs no telling.
    let _ = out.write_all(&[READY]).and_then(|()| out.flush());
    nix::unistd::dup2_stdout(file)
        .and_then(|()| nix::unistd::dup2_stderr(file))
        .map_err(|error| failed("cannot turn the output to a file", error))
}
