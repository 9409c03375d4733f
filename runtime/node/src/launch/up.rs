//! `understudy up`: start, wait, prove, supervise, stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use understudy_config::{ClusterConfig, LoadOptions, PathCheck};

use super::lock::{self, Attempt, LauncherLock};
use super::plan::{Place, Plan};
use super::remote::Ssh;
use super::signals::Signals;
use super::supervise::{Event, Means, Next, Supervisor};
use super::{cookie, detach, ports, ready, sample, say};
use crate::cli::exit::{Exit, Failure};

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
    /// Program to start in place of this one for the nodes of this machine.
    #[arg(long, hide = true, value_name = "PROGRAM")]
    pub node_binary: Option<PathBuf>,
    /// How the person called this, for the hints at the end.
    #[arg(long, hide = true, value_name = "COMMAND")]
    pub via: Option<String>,
}

/// Runs the command.
pub async fn up(args: UpArgs) -> Result<Exit, Failure> {
    if args.detach && !args.background {
        detach::start(&args).await
    } else {
        serve(&args).await
    }
}

async fn serve(args: &UpArgs) -> Result<Exit, Failure> {
    let mut signals = Signals::listen()?;
    if args.background {
        detach::leave_terminal()?;
    }
    let plan = Plan::load(args.config.as_deref())?;
    let _lock = take_lock(&plan, args)?;
    prepare(&plan).await?;
    let token = read_token(&plan.config)?;
    let config = plan.config.clone();
    let binary = match &args.node_binary {
        Some(program) => program.clone(),
        None => std::env::current_exe().map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("cannot find this program's own file: {error}"),
            )
        })?,
    };
    say(heading(&plan));
    let means = Arc::new(Means {
        plan,
        binary,
        ssh: Ssh::from_environment(),
    });
    let mut supervisor = Supervisor::start(&means);
    let up = tokio::select! {
        up = bring_up(&mut supervisor, &config, token.as_deref(), !args.no_sample) => up,
        exit = signals.next() => Err(Failure::quiet(exit)),
    };
    if let Err(failure) = up {
        shut_down(supervisor, &mut signals).await;
        return Err(failure);
    }
    say(hints(&config, args));
    if args.background {
        detach::report_ready(&config)?;
    }
    let all_given_up = supervise(&mut supervisor, &mut signals).await;
    shut_down(supervisor, &mut signals).await;
    if all_given_up {
        let limit = super::restart::INTENSITY;
        return Err(Failure::new(
            Exit::Failed,
            format!("every node ended more than {limit} times in a minute; see the logs"),
        ));
    }
    Ok(Exit::Ok)
}

fn take_lock(plan: &Plan, args: &UpArgs) -> Result<LauncherLock, Failure> {
    let run_dir = plan.run_dir();
    let failed = |error| {
        Failure::new(
            Exit::Failed,
            format!("cannot use the run folder {}: {error}", run_dir.display()),
        )
    };
    cookie::private_folder(run_dir).map_err(failed)?;
    match lock::take(run_dir).map_err(failed)? {
        Attempt::Taken(lock) => Ok(lock),
        Attempt::Held(pid) => {
            let by = pid.map_or_else(String::new, |pid| format!(" (launcher pid {pid})"));
            let [status, stop] =
                ["status", "down"].map(|command| hint(command, &plan.config, args));
            Err(Failure::new(
                Exit::Failed,
                format!(
                    "cluster {:?} is running here already{by}; look at it with `{status}`, stop it with `{stop}`",
                    plan.config.cluster.name
                ),
            ))
        }
    }
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

fn read_token(config: &ClusterConfig) -> Result<Option<String>, Failure> {
    let Some(file) = &config.gateway.token_file else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(file).map_err(|error| {
        Failure::usage(format!(
            "cannot read the token file {}: {error}",
            file.display()
        ))
    })?;
    Ok(Some(text.trim().to_owned()))
}

/// Until the cluster serves. A node that ends before that has a reason that a restart does not take away.
async fn bring_up(
    supervisor: &mut Supervisor,
    config: &ClusterConfig,
    token: Option<&str>,
    with_sample: bool,
) -> Result<(), Failure> {
    let begun = Instant::now();
    let prove = async {
        ready::wait(config, token)
            .await
            .map_err(|why| Failure::new(Exit::Failed, why))?;
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
    loop {
        tokio::select! {
            biased;
            event = supervisor.event() => match event {
                Some(Event::Ended { node, how, last_lines, .. }) => return Err(early_end(&node, &how, &last_lines)),
                Some(event) => say(format!("  {}", describe(&event))),
                None => return Err(Failure::new(Exit::Failed, "no node is left")),
            },
            proved = &mut prove => return proved,
        }
    }
}

fn early_end(node: &str, how: &str, last_lines: &[String]) -> Failure {
    let mut text = format!("node {node} did not come up: {how}");
    if !last_lines.is_empty() {
        text.push_str("; the last lines of its log:");
        last_lines
            .iter()
            .for_each(|line| text.push_str(&format!("\n  | {line}")));
    }
    Failure::new(Exit::Failed, text)
}

/// Until a signal comes (`false`), or until every node has been given up (`true`).
async fn supervise(supervisor: &mut Supervisor, signals: &mut Signals) -> bool {
    loop {
        tokio::select! {
            event = supervisor.event() => match event {
                Some(event) => say(format!("{} {}", clock(SystemTime::now()), describe(&event))),
                None => return true,
            },
            _ = signals.next() => return false,
        }
    }
}

/// A second signal makes short work of it.
async fn shut_down(supervisor: Supervisor, signals: &mut Signals) {
    say("\nStopping the cluster (once more to kill it)");
    let hurry = async {
        signals.next().await;
    };
    supervisor
        .stop(hurry, |event| say(format!("  {}", describe(&event))))
        .await;
    say("Stopped");
}

fn describe(event: &Event) -> String {
    match event {
        Event::Started { node, text } | Event::Note { node, text } => {
            format!("node {node}: {text}")
        }
        Event::Ended {
            node,
            how,
            last_lines,
            next,
        } => {
            let then = match next {
                Next::Restart(wait) => format!("starting it again in {:.1} s", wait.as_secs_f64()),
                Next::GiveUp => {
                    "it ended too often and stays down; `down` and `up` start it again".to_owned()
                }
            };
            let mut text = format!("node {node}: ended ({how}); {then}");
            if matches!(next, Next::GiveUp) {
                last_lines
                    .iter()
                    .for_each(|line| text.push_str(&format!("\n  | {line}")));
            }
            text
        }
    }
}

/// `14:03:59Z`
fn clock(now: SystemTime) -> String {
    let seconds = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
        % 86_400;
    format!(
        "{:02}:{:02}:{:02}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

fn heading(plan: &Plan) -> String {
    let replicas: u32 = plan.config.models.iter().map(|model| model.replicas).sum();
    let count = |number: usize, what: &str| {
        format!("{number} {what}{}", if number == 1 { "" } else { "s" })
    };
    format!(
        "Starting cluster {}: {}, {}, {} ({})",
        plan.config.cluster.name,
        count(plan.nodes.len(), "node"),
        count(plan.config.models.len(), "model"),
        count(usize::try_from(replicas).unwrap_or(usize::MAX), "replica"),
        plan.config.file.display()
    )
}

/// Where the cluster is reached, and what to do with it.
fn hints(config: &ClusterConfig, args: &UpArgs) -> String {
    let mut lines = Vec::new();
    let mut add = |what: &str, text: String| lines.push(format!("  {what:<9} {text}"));
    for node in &config.nodes {
        if let Some(address) = node.client_address() {
            add("clients", format!("{address}  (TCP, node {})", node.name));
        }
    }
    for node in config.nodes.iter().filter(|_| config.metrics.enabled) {
        if let Some(address) = node.metrics_address() {
            add(
                "metrics",
                format!("http://{address}/metrics  (node {})", node.name),
            );
        }
    }
    let first = config
        .nodes
        .first()
        .map_or("NODE", |node| node.name.as_str());
    add("status", hint("status", config, args));
    add("logs", hint(&format!("logs {first}"), config, args));
    let stop = hint("down", config, args);
    add(
        "stop",
        if args.background {
            stop
        } else {
            format!("Ctrl-C, or {stop}")
        },
    );
    format!("\n{}\n", lines.join("\n"))
}

/// A command line that does `command` with this cluster, as the person would write it.
fn hint(command: &str, config: &ClusterConfig, args: &UpArgs) -> String {
    let file = args
        .config
        .as_ref()
        .map(|_| format!(" {}", super::scripts::shown(&config.file)));
    let file = file.unwrap_or_default();
    match &args.via {
        Some(via) => format!("{via} {}{file}", command.replace("down", "stop")),
        None if command == "status" && !file.is_empty() => {
            format!("understudy status --config{file}")
        }
        None if command.starts_with("logs") && !file.is_empty() => {
            format!("understudy {command} --config{file}")
        }
        None => format!("understudy {command}{file}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ClusterConfig {
        let text = "[[node]]\nname = \"a\"\ncluster_port = 7601\nclient_port = 7600\nmetrics_port = 7602\n\
                    [[model]]\nname = \"m\"\npath = \"m\"\n";
        let options = LoadOptions {
            paths: PathCheck::None,
        };
        ClusterConfig::parse("/opt/c.toml", text, &options)
            .expect("well formed")
            .0
    }

    #[test]
    fn hints_name_every_address_and_how_to_stop() {
        let args = UpArgs {
            config: Some("c.toml".into()),
            ..UpArgs::default()
        };
        let text = hints(&config(), &args);
        for part in [
            "127.0.0.1:7600",
            "http://127.0.0.1:7602/metrics",
            "Ctrl-C, or understudy down /opt/c.toml",
            "understudy logs a --config /opt/c.toml",
            "understudy status --config /opt/c.toml",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        let via = UpArgs {
            via: Some("./scripts/launch.sh".into()),
            background: true,
            ..UpArgs::default()
        };
        let text = hints(&config(), &via);
        assert!(
            text.contains("./scripts/launch.sh stop\n") && !text.contains("Ctrl-C"),
            "{text}"
        );
    }

    #[test]
    fn an_early_end_shows_the_log() {
        let failure = early_end("b", "exit status 1", &["address in use".to_owned()]);
        assert_eq!(
            failure.message,
            "node b did not come up: exit status 1; the last lines of its log:\n  | address in use"
        );
    }

    #[test]
    fn the_clock_is_utc() {
        assert_eq!(
            clock(SystemTime::UNIX_EPOCH + Duration::from_secs(86_400 + 3_723)),
            "01:02:03Z"
        );
    }
}
