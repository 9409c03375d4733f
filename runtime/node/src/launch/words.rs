//! What `up` says.

use std::time::{Duration, SystemTime};

use understudy_config::ClusterConfig;

use super::last_words::quoted;
use super::plan::{Plan, default_config};
use super::shell;
use super::supervise::{Event, Next};
use super::up::UpArgs;

/// A line for an event.
pub fn describe(event: &Event) -> String {
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
                text.push_str(&quoted(last_lines));
            }
            text
        }
        Event::NotStopped {
            node,
            destination,
            why,
        } => format!(
            "node {node}: could not be stopped: {why}; run `down` when {destination} answers"
        ),
    }
}

/// `14:03:59Z`
pub fn clock(now: SystemTime) -> String {
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

/// What is about to be started.
pub fn heading(plan: &Plan) -> String {
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
pub fn hints(config: &ClusterConfig, args: &UpArgs) -> String {
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
    add("status", hint(Hint::Status, config, args));
    add("logs", hint(Hint::Logs(first), config, args));
    let stop = hint(Hint::Down, config, args);
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

/// What a hint is about.
#[derive(Debug, Clone, Copy)]
pub enum Hint<'a> {
    Status,
    Logs(&'a str),
    Down,
}

/// A command line that does something with this cluster, as the person would write it.
pub fn hint(what: Hint<'_>, config: &ClusterConfig, args: &UpArgs) -> String {
    let script = args.via.as_deref().map(shell::shown);
    let program = script.as_deref().unwrap_or("understudy");
    let command = match what {
        Hint::Status => "status".to_owned(),
        Hint::Logs(node) => format!("logs {}", shell::shown(node)),
        Hint::Down if script.is_some() => "stop".to_owned(),
        Hint::Down => "down".to_owned(),
    };
    let is_default = args.config.as_ref().is_none_or(|named| {
        matches!((named.canonicalize(), default_config().canonicalize()), (Ok(a), Ok(b)) if a == b)
    });
    if is_default {
        // `status` alone asks the gateway of the default configuration.
        return format!("{program} {command}");
    }
    let file = shell::shown(&config.file.to_string_lossy());
    match what {
        Hint::Status | Hint::Logs(_) if script.is_none() => {
            format!("{program} {command} --config {file}")
        }
        _ => format!("{program} {command} {file}"),
    }
}

#[cfg(test)]
mod tests {
    use understudy_config::{LoadOptions, PathCheck};

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
            via: Some("./my scripts/launch.sh".into()),
            background: true,
            ..UpArgs::default()
        };
        let text = hints(&config(), &via);
        assert!(
            text.contains("'./my scripts/launch.sh' stop\n") && !text.contains("Ctrl-C"),
            "{text}"
        );
    }

    #[test]
    fn a_node_may_be_called_like_a_command() {
        let via = UpArgs {
            config: Some("c.toml".into()),
            via: Some("launch.sh".into()),
            ..UpArgs::default()
        };
        assert_eq!(
            hint(Hint::Logs("countdown"), &config(), &via),
            "launch.sh logs countdown /opt/c.toml"
        );
    }

    #[test]
    fn a_node_that_was_not_stopped_says_what_is_left_to_do() {
        let event = Event::NotStopped {
            node: "b".to_owned(),
            destination: "me@far".to_owned(),
            why: "no route".to_owned(),
        };
        assert_eq!(
            describe(&event),
            "node b: could not be stopped: no route; run `down` when me@far answers"
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
