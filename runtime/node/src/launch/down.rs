//! `understudy down`: stops what `up` started, whatever became of its launcher.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;

use super::lock::{self, Attempt, Holder, LauncherLock, Purpose};
use super::plan::{NodePlan, Place, Plan};
use super::remote::Site;
use super::say;
use super::ssh::Ssh;
use crate::cli::exit::{Exit, Failure};

/// Beyond the graces of the nodes, gateways first and then the others.
const MARGIN: Duration = Duration::from_secs(10);

/// Stop a cluster that `up` started
#[derive(Debug, Clone, Default, Args)]
pub struct DownArgs {
    /// Configuration of the cluster [default: the installation's config/profiles/local.toml]
    #[arg(value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Runs the command. That nothing ran is no failure.
pub async fn down(args: DownArgs) -> Result<Exit, Failure> {
    let plan = Plan::load(args.config.as_deref())?;
    let mut stopped = stop_launcher(&plan).await?;
    // Held until the end, so that no launch begins in the middle of it.
    let _lock = keep_launchers_off(&plan).await?;
    let mut failures = Vec::new();
    // A launcher that was told to stop has stopped these; one that was killed has not.
    for node in &plan.nodes {
        match stop_node(&plan, node).await {
            Ok(true) => stopped = true,
            Ok(false) => {}
            Err(error) => failures.push(format!("node {}: {error}", node.name)),
        }
    }
    if !failures.is_empty() {
        return Err(Failure::new(Exit::Failed, failures.join("\n       ")));
    }
    let name = &plan.config.cluster.name;
    say(if stopped {
        format!("Cluster {name} is stopped")
    } else {
        format!("Cluster {name} was not running")
    });
    Ok(Exit::Ok)
}

async fn stop_launcher(plan: &Plan) -> Result<bool, Failure> {
    let run_dir = plan.run_dir();
    let Some(Holder { process, purpose }) = lock::holder(run_dir).await else {
        return Ok(false);
    };
    let limit = 2 * plan.grace() + MARGIN;
    if purpose == Purpose::Down {
        say(format!("Waiting for another `down` (pid {})", process.pid));
        lock::wait_free(run_dir, limit).await;
        return Ok(false);
    }
    say(format!(
        "Stopping cluster {} (launcher pid {})",
        plan.config.cluster.name, process.pid
    ));
    let told = |error| {
        Failure::new(
            Exit::Failed,
            format!("cannot stop the launcher (pid {}): {error}", process.pid),
        )
    };
    process.signal(Signal::SIGTERM).map_err(told)?;
    if !lock::wait_free(run_dir, limit).await {
        say("  the launcher does not end; killing it");
        process.signal(Signal::SIGKILL).map_err(told)?;
        lock::wait_free(run_dir, MARGIN).await;
    }
    Ok(true)
}

/// `None` where no launcher has ever been: without a run folder there is nothing to lock.
async fn keep_launchers_off(plan: &Plan) -> Result<Option<LauncherLock>, Failure> {
    let run_dir = plan.run_dir();
    if !run_dir.exists() {
        return Ok(None);
    }
    let attempt = lock::take(run_dir, Purpose::Down).await.map_err(|error| {
        let message = format!("cannot use the run folder {}: {error}", run_dir.display());
        Failure::new(Exit::Failed, message)
    })?;
    match attempt {
        Attempt::Taken(lock) => Ok(Some(lock)),
        Attempt::Held(holder) => {
            let who = holder.map_or_else(
                || "another process".to_owned(),
                |holder| format!("another process (pid {})", holder.process.pid),
            );
            Err(Failure::new(
                Exit::Failed,
                format!(
                    "{who} holds {}: another launch has begun; run `down` again to stop that",
                    lock::path(run_dir).display()
                ),
            ))
        }
    }
}

/// Returns whether it ran.
async fn stop_node(plan: &Plan, node: &NodePlan) -> Result<bool, String> {
    let graceful = match &node.place {
        Place::Here => {
            let pid_file = plan.pid_file(node);
            let graceful = match pid_file.running() {
                None => None,
                Some(process) => Some(
                    process
                        .stop(plan.grace())
                        .await
                        .map_err(|error| error.to_string())?,
                ),
            };
            pid_file.remove();
            graceful
        }
        Place::There { destination, dir } => {
            let ssh = Ssh::from_environment();
            let site = Site::find(&ssh, plan, node, destination, dir).await?;
            site.stop(plan.grace()).await?
        }
    };
    match graceful {
        Some(true) => say(format!("  node {}: stopped", node.name)),
        Some(false) => say(format!(
            "  node {}: did not stop in time and was killed",
            node.name
        )),
        None => {}
    }
    Ok(graceful.is_some())
}
