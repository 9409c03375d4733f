//! `understudy up`: start, wait, prove, supervise, stop.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::{Instant, SystemTime};

use clap::Args;
use understudy_config::{ClusterConfig, LoadOptions, PathCheck, TokenFileError, read_tokens};

use super::last_words::{LastWords, quoted};
use super::lock::{self, Attempt, Holder, LauncherLock, Purpose};
use super::plan::{Place, Plan};
use super::ready::NotReady;
use super::ssh::Ssh;
use super::supervise::{Event, Means, Supervisor};
use super::words::{Hint, clock, describe, heading, hint, hints};
use super::{cookie, detach, ports, ready, sample, say};
use crate::cli::exit::{Exit, Failure};
use crate::cli::interrupt::Interrupt;

/// Start a whole cluster, wait until it serves, and keep it running until Ctrl-C
#[derive(Debug, Clone, Default, Args)]
pub struct UpArgs {
    /// Configuration of the cluster [default: the installation's config/profiles/local.toml]
    #[arg(value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Return when the cluster serves, and leave it running in the background
    #[arg(long)]
    pub detach: bool,
    /// Do not stream a sample completion at the end
    #[arg(long)]
    pub no_sample: bool,
    /// Set by --detach for the process that stays.
    #[arg(long, hide = true)]
    pub background: bool,
    /// Only fail if the cluster runs already; start nothing.
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub if_free: bool,
    /// Program to start in place of this one for the nodes of this machine.
    #[arg(long, hide = true, value_name = "PROGRAM")]
    pub node_binary: Option<PathBuf>,
    /// How the person called this, for the hints at the end.
    #[arg(long, hide = true, value_name = "COMMAND")]
    pub via: Option<String>,
}

/// Runs the command.
pub async fn up(args: UpArgs) -> Result<Exit, Failure> {
    if args.if_free {
        check_free(&args).await
    } else if args.detach && !args.background {
        detach::start(&args).await
    } else {
        serve(&args).await
    }
}

/// For whoever would do something lengthy first, such as a build.
async fn check_free(args: &UpArgs) -> Result<Exit, Failure> {
    let plan = Plan::load(args.config.as_deref())?;
    match lock::holder(plan.run_dir()).await {
        Some(holder) => Err(already_runs(&plan, args, Some(holder))),
        None => Ok(Exit::Ok),
    }
}

async fn serve(args: &UpArgs) -> Result<Exit, Failure> {
    let mut signals = Interrupt::or_hangup()?;
    if args.background {
        detach::leave_terminal()?;
    }
    let plan = Plan::load(args.config.as_deref())?;
    let _lock = take_lock(&plan, args).await?;
    // Before a node is started: after that, an error has to stop them.
    let output = match args.background {
        true => Some(detach::open_output(plan.run_dir())?),
        false => None,
    };
    prepare(&plan).await?;
    let means = Arc::new(Means {
        binary: node_binary(args)?,
        ssh: Ssh::from_environment(),
        plan,
    });
    let config = &means.plan.config;
    let token = read_token(config)?;
    say(heading(&means.plan));
    let mut supervisor = Supervisor::start(&means);
    let mut up = tokio::select! {
        up = bring_up(&mut supervisor, &means, token.as_deref(), !args.no_sample) => up,
        exit = signals.wait() => Err(Failure::quiet(exit)),
    };
    if up.is_ok() {
        say(hints(config, args));
        if let Some(output) = &output {
            up = detach::report_ready(output);
        }
    }
    if let Err(failure) = up {
        let stopped = shut_down(supervisor, &mut signals).await;
        return Err(both(failure, stopped));
    }
    let all_given_up = supervise(&mut supervisor, &mut signals).await;
    shut_down(supervisor, &mut signals).await?;
    if all_given_up {
        let limit = super::restart::INTENSITY;
        return Err(Failure::new(
            Exit::Failed,
            format!("every node ended more than {limit} times in a minute; see the logs"),
        ));
    }
    Ok(Exit::Ok)
}

fn node_binary(args: &UpArgs) -> Result<PathBuf, Failure> {
    if let Some(program) = &args.node_binary {
        return Ok(program.clone());
    }
    std::env::current_exe().map_err(|error| {
        Failure::new(
            Exit::Failed,
            format!("cannot find this program's own file: {error}"),
        )
    })
}

/// A failure, and perhaps another one in the stopping that followed; processes that are left are never passed over.
fn both(failure: Failure, stopped: Result<(), Failure>) -> Failure {
    match stopped {
        Ok(()) => failure,
        Err(left) if failure.message.is_empty() => left,
        Err(left) => Failure::new(
            Exit::Failed,
            format!("{}\n       {}", failure.message, left.message),
        ),
    }
}

async fn take_lock(plan: &Plan, args: &UpArgs) -> Result<LauncherLock, Failure> {
    let run_dir = plan.run_dir();
    let failed = |error| {
        Failure::new(
            Exit::Failed,
            format!("cannot use the run folder {}: {error}", run_dir.display()),
        )
    };
    cookie::private_folder(run_dir).map_err(failed)?;
    match lock::take(run_dir, Purpose::Launch).await.map_err(failed)? {
        Attempt::Taken(lock) => Ok(lock),
        Attempt::Held(holder) => Err(already_runs(plan, args, holder)),
    }
}

fn already_runs(plan: &Plan, args: &UpArgs, holder: Option<Holder>) -> Failure {
    let name = &plan.config.cluster.name;
    if let Some(Holder {
        process,
        purpose: Purpose::Down,
    }) = holder
    {
        return Failure::new(
            Exit::Failed,
            format!(
                "cluster {name:?} is being stopped here by `down` (pid {}); start it when that is done",
                process.pid
            ),
        );
    }
    let by = holder.map_or_else(String::new, |holder| {
        format!(" (launcher pid {})", holder.process.pid)
    });
    let [status, stop] = [Hint::Status, Hint::Down].map(|what| hint(what, &plan.config, args));
    Failure::new(
        Exit::Failed,
        format!(
            "cluster {name:?} is running here already{by}; look at it with `{status}`, stop it with `{stop}`"
        ),
    )
}

/// All that can be put right or found wrong before a process is started.
async fn prepare(plan: &Plan) -> Result<(), Failure> {
    let cookie_file = &plan.config.cluster.cookie_file;
    let made = cookie::ensure(cookie_file).map_err(|error| {
        Failure::new(
            Exit::Failed,
            format!(
                "cannot make the cookie file {}: {error}",
                cookie_file.display()
            ),
        )
    })?;
    if made {
        say(format!(
            "Made a new cluster secret: {}",
            cookie_file.display()
        ));
    }
    check_paths(plan)?;
    stop_leftovers(plan).await?;
    let here = plan.nodes.iter().filter(|node| node.place == Place::Here);
    let settings = here.filter_map(|node| plan.config.node(&node.name));
    let needed = settings.flat_map(|node| ports::needed(node, plan.config.metrics.enabled));
    let obstacles: Vec<String> = needed
        .filter_map(|needed| ports::obstacle(&needed))
        .collect();
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(Exit::Failed, obstacles.join("\n       ")))
    }
}

/// What the nodes of this machine need on its disk.
fn check_paths(plan: &Plan) -> Result<(), Failure> {
    for node in plan.nodes.iter().filter(|node| node.place == Place::Here) {
        let options = LoadOptions {
            paths: PathCheck::Node(node.name.clone()),
        };
        ClusterConfig::parse(&plan.config.file, &plan.text, &options)
            .map_err(|problems| Failure::usage(problems.to_string()))?;
    }
    Ok(())
}

/// Nodes of a launcher that was killed. They may run another configuration or an older program, so they are not adopted.
async fn stop_leftovers(plan: &Plan) -> Result<(), Failure> {
    for node in plan.nodes.iter().filter(|node| node.place == Place::Here) {
        let pid_file = plan.pid_file(node);
        if let Some(process) = pid_file.running() {
            say(format!(
                "Node {} still runs from an earlier launch (pid {}); stopping it",
                node.name, process.pid
            ));
            process.stop(plan.grace()).await.map_err(|error| {
                Failure::new(
                    Exit::Failed,
                    format!(
                        "cannot stop node {} (pid {}): {error}",
                        node.name, process.pid
                    ),
                )
            })?;
        }
        pid_file.remove();
    }
    Ok(())
}

/// For the looks and the sample; any of the tokens will do.
fn read_token(config: &ClusterConfig) -> Result<Option<String>, Failure> {
    let told = |error: TokenFileError| Failure::usage(error.to_string());
    let file = config.gateway.token_file.as_ref();
    let tokens = file.map(|file| read_tokens(file)).transpose();
    Ok(tokens
        .map_err(told)?
        .map(|mut tokens| tokens.swap_remove(0)))
}

/// Until the cluster serves. A node that ends before that has a reason that a restart does not take away.
async fn bring_up(
    supervisor: &mut Supervisor,
    means: &Means,
    token: Option<&str>,
    with_sample: bool,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let (plan, config) = (&means.plan, &means.plan.config);
    let words: Vec<LastWords> = plan
        .nodes
        .iter()
        .map(|node| LastWords::from_now(plan, node))
        .collect();
    let prove = async {
        if let Err(not_ready) = ready::wait(config, token).await {
            return Err(not_up(not_ready, means, &words).await);
        }
        say(format!(
            "Ready after {:.1} s",
            begun.elapsed().as_secs_f64()
        ));
        if with_sample {
            sample::stream(config, token).await
        } else {
            Ok(())
        }
    };
    let mut prove = std::pin::pin!(prove);
    // Not before every node has been started: one of an earlier launch, which is about to be replaced, looks ready.
    let mut unstarted: HashSet<&str> = plan.nodes.iter().map(|node| node.name.as_str()).collect();
    loop {
        tokio::select! {
            biased;
            event = supervisor.event() => match event {
                Some(Event::Ended { node, how, last_lines, .. }) => return Err(early_end(&node, &how, &last_lines)),
                Some(event) => {
                    if let Event::Started { node, .. } = &event {
                        unstarted.remove(node.as_str());
                    }
                    say(format!("  {}", describe(&event)));
                }
                None => return Err(Failure::new(Exit::Failed, "no node is left")),
            },
            proved = &mut prove, if unstarted.is_empty() => return proved,
        }
    }
}

/// With the last lines of the log that says more.
async fn not_up(not_ready: NotReady, means: &Means, words: &[LastWords]) -> Failure {
    let NotReady { why, node } = not_ready;
    let mut nodes = means.plan.nodes.iter().zip(words);
    let Some((node, words)) = nodes.find(|(known, _)| Some(&known.name) == node.as_ref()) else {
        return Failure::new(Exit::Failed, why);
    };
    // The gateway's word may be faster than the node's own log.
    let deadline = tokio::time::Instant::now() + LAST_WORDS_WAIT;
    let mut lines = words.lines(&means.ssh, &means.plan, node).await;
    while lines.is_empty() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(LAST_WORDS_POLL).await;
        lines = words.lines(&means.ssh, &means.plan, node).await;
    }
    Failure::new(Exit::Failed, with_last_lines(why, &node.name, &lines))
}

/// How long the launcher waits for a node to log why it cannot serve, and how often it looks.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(1);
const LAST_WORDS_POLL: Duration = Duration::from_millis(20);

fn early_end(node: &str, how: &str, last_lines: &[String]) -> Failure {
    let text = format!("node {node} did not come up: {how}");
    Failure::new(Exit::Failed, with_last_lines(text, node, last_lines))
}

fn with_last_lines(mut text: String, node: &str, lines: &[String]) -> String {
    if !lines.is_empty() {
        text.push_str(&format!("; the last lines of the log of node {node}:"));
        text.push_str(&quoted(lines));
    }
    text
}

/// Until a signal comes (`false`), or until every node has been given up (`true`).
async fn supervise(supervisor: &mut Supervisor, signals: &mut Interrupt) -> bool {
    loop {
        tokio::select! {
            event = supervisor.event() => match event {
                Some(event) => say(format!("{} {}", clock(SystemTime::now()), describe(&event))),
                None => return true,
            },
            _ = signals.wait() => return false,
        }
    }
}

/// A second signal makes short work of it. Fails when a node may go on running.
async fn shut_down(supervisor: Supervisor, signals: &mut Interrupt) -> Result<(), Failure> {
    say("\nStopping the cluster (once more to kill it)");
    let hurry = async {
        signals.wait().await;
    };
    let left = supervisor
        .stop(hurry, |event| say(format!("  {}", describe(&event))))
        .await;
    if left.is_empty() {
        say("Stopped");
        return Ok(());
    }
    Err(Failure::new(
        Exit::Failed,
        format!(
            "not stopped, and perhaps still running: {}; run `down` with the same configuration when their machines answer",
            left.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_early_end_shows_the_log() {
        let failure = early_end("b", "exit status 1", &["address in use".to_owned()]);
        assert_eq!(
            failure.message,
            "node b did not come up: exit status 1; the last lines of the log of node b:\n  | address in use"
        );
    }

    #[test]
    fn what_is_left_running_is_never_passed_over() {
        let left = || Err(Failure::new(Exit::Failed, "left"));
        let quiet = || Failure::quiet(Exit::Interrupted);
        assert_eq!(both(quiet(), Ok(())), quiet());
        assert_eq!(both(quiet(), left()).exit, Exit::Failed);
        let both = both(Failure::usage("wrong"), left());
        assert_eq!(both.message, "wrong\n       left");
    }
}
