//! `understudy ps`: which of a cluster's node processes run, asked of the machines and not of the cluster.

use std::path::PathBuf;

use clap::Args;

use super::lock::{self, Holder, Purpose};
use super::plan::{NodePlan, Place, Plan};
use super::remote::Site;
use super::say;
use super::ssh::Ssh;
use crate::cli::exit::{Exit, Failure};

/// Show which node processes of a cluster run, without asking the cluster
#[derive(Debug, Clone, Default, Args)]
pub struct PsArgs {
    /// Configuration of the cluster [default: the installation's config/profiles/local.toml]
    #[arg(value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Runs the command: one line for the launcher, one for each node. Fails when a node does not run.
pub async fn ps(args: PsArgs) -> Result<Exit, Failure> {
    let plan = Plan::load(args.config.as_deref())?;
    let launcher = match lock::holder(plan.run_dir()).await {
        None => "not running".to_owned(),
        Some(Holder { process, purpose }) => match purpose {
            Purpose::Launch => format!("pid {}", process.pid),
            Purpose::Down => format!("being stopped by `down` (pid {})", process.pid),
        },
    };
    say(format!("{:<16} {:<24} {launcher}", "(launcher)", "here"));
    let ssh = Ssh::from_environment();
    let mut all_run = true;
    for node in &plan.nodes {
        let (place, state) = look(&ssh, &plan, node).await;
        all_run &= state.starts_with("pid ");
        say(format!("{:<16} {place:<24} {state}", node.name));
    }
    if all_run {
        Ok(Exit::Ok)
    } else {
        Err(Failure::quiet(Exit::Failed))
    }
}

async fn look(ssh: &Ssh, plan: &Plan, node: &NodePlan) -> (String, String) {
    let shown =
        |pid: Option<u32>| pid.map_or_else(|| "not running".to_owned(), |pid| format!("pid {pid}"));
    match &node.place {
        Place::Here => (
            "here".to_owned(),
            shown(plan.pid_file(node).running().map(|process| process.pid)),
        ),
        Place::There { destination, dir } => {
            let pid = async {
                let site = Site::find(ssh, plan, node, destination, dir).await?;
                site.running().await
            };
            let state = pid.await.map_or_else(|error| error, shown);
            (destination.clone(), state)
        }
    }
}
