//! `understudy logs`: a node's log, wherever it is.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Stdio;

use clap::Args;
use tokio::io::AsyncWriteExt as _;

use super::detach;
use super::plan::{Place, Plan};
use super::remote::Site;
use super::ssh::Ssh;
use crate::cli::exit::{Exit, Failure};

/// The name under which the launcher's own words are asked for. The configuration's check lets no node be called so.
const LAUNCHER: &str = "launcher";

/// Show the log of a node
#[derive(Debug, Clone, Args)]
pub struct LogsArgs {
    /// Name of the node, or `launcher` for what a detached launcher has to say
    #[arg(value_name = "NODE")]
    pub node: String,
    /// Configuration of the cluster [default: the installation's config/profiles/local.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Go on showing what is added, until Ctrl-C
    #[arg(short, long)]
    pub follow: bool,
    /// Lines to begin with
    #[arg(short = 'n', long, value_name = "N", default_value_t = 200)]
    pub lines: usize,
}

/// Runs the command.
pub async fn logs(args: LogsArgs) -> Result<Exit, Failure> {
    let plan = Plan::load(args.config.as_deref())?;
    if args.node == LAUNCHER {
        return show(detach::output_file(plan.run_dir()), &args);
    }
    let node = plan.node(&args.node)?;
    match &node.place {
        Place::Here => {
            // Where the node writes its log into a folder of the configuration, its early words are in the other file.
            let files = [plan.log_file(node), plan.output_file(node)];
            let file = files.iter().find(|file| file.exists()).unwrap_or(&files[0]);
            show(file.clone(), &args)
        }
        Place::There { destination, dir } => {
            let ssh = Ssh::from_environment();
            let site = Site::find(&ssh, &plan, node, destination, dir).await;
            let site = site.map_err(|error| Failure::new(Exit::Failed, error))?;
            let (mut command, script) = site.log_command(args.lines, args.follow);
            let told = |error| Failure::new(Exit::Failed, format!("cannot run ssh: {error}"));
            // In our group, unlike the other calls: Ctrl-C is for it.
            let mut child = command
                .process_group(nix::unistd::getpgrp().as_raw())
                .stdin(Stdio::piped())
                .spawn()
                .map_err(told)?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(script.as_bytes()).await.map_err(told)?;
            }
            let status = child.wait().await.map_err(told)?;
            if status.success() {
                Ok(Exit::Ok)
            } else {
                Err(Failure::quiet(Exit::Failed))
            }
        }
    }
}

/// Becomes `tail`, which knows how to follow a file that is replaced.
fn show(file: PathBuf, args: &LogsArgs) -> Result<Exit, Failure> {
    if !file.exists() {
        return Err(Failure::new(
            Exit::Failed,
            format!(
                "there is no log {} yet; has the cluster been started?",
                file.display()
            ),
        ));
    }
    let mut command = std::process::Command::new("tail");
    command.arg("-n").arg(args.lines.to_string());
    if args.follow {
        command.arg("-F");
    }
    let error = command.arg("--").arg(&file).exec();
    Err(Failure::new(
        Exit::Failed,
        format!("cannot run tail: {error}; the log is {}", file.display()),
    ))
}
