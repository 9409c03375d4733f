//! Waiting until a cluster serves: every gateway sees every node alive and every replica ready.

use std::time::{Duration, Instant};

use understudy_client::{Client, ClusterStatus, Options};
use understudy_config::{ClusterConfig, Placement};

use super::say;

/// Time between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// A wait without news says that it is still waiting, this often.
const REMIND_AFTER: Duration = Duration::from_secs(5);
/// Beyond the time that the configuration grants an engine to load.
const MARGIN: Duration = Duration::from_secs(30);

/// A gateway to look at.
struct Gateway {
    name: String,
    address: String,
    client: Option<Client>,
}

/// How far the cluster is, as one gateway sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// What is still missing, one phrase each.
    Waiting(Vec<String>),
    /// It will not become ready by waiting.
    Failed(NotReady),
}

/// Why a cluster does not become ready, for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotReady {
    pub why: String,
    /// The node whose log says more.
    pub node: Option<String>,
}

impl NotReady {
    fn new(why: String) -> Self {
        Self { why, node: None }
    }
}

/// What a program that the dynamic linker gave up on exits with.
const NOT_LOADED: &str = "exit status: 127";

/// An engine's end as a person understands it.
fn explained(error: &str) -> &str {
    let is_whole = |(at, _): (usize, &str)| {
        !error[at + NOT_LOADED.len()..].starts_with(|next: char| next.is_ascii_digit())
    };
    if error.match_indices(NOT_LOADED).any(is_whole) {
        "the engine's libraries could not be loaded (LibTorch moved, removed or of another version): run \
         scripts/setup.sh; details in the node's log"
    } else {
        error
    }
}

/// Judges a gateway's status.
pub fn judge(status: &ClusterStatus, nodes: &[&str], placement: &[Placement]) -> Readiness {
    let mut missing = Vec::new();
    for name in nodes {
        let state = status
            .nodes
            .iter()
            .find(|node| node.name == *name)
            .map_or("unknown", |node| node.state.as_str());
        if !matches!(state, "self" | "alive") {
            missing.push(format!("node {name} is {}", state.replace('_', " ")));
        }
    }
    for place in placement {
        let found = status
            .replicas
            .iter()
            .find(|replica| replica.model == place.model && replica.replica == place.replica);
        let what = format!(
            "replica {}/{} on {}",
            place.model, place.replica, place.node
        );
        let Some(replica) = found else {
            missing.push(format!("{what} is not there yet"));
            continue;
        };
        if replica.state == "ready" {
            continue;
        }
        let error = replica
            .workers
            .iter()
            .find_map(|worker| worker.last_error.as_deref())
            .map(explained);
        match (replica.state.as_str(), error) {
            ("down", Some(error)) => {
                return Readiness::Failed(NotReady {
                    why: format!("{what} cannot start: {error}"),
                    node: Some(place.node.clone()),
                });
            }
            (state, Some(error)) => {
                missing.push(format!("{what} is in state {state} after: {error}"))
            }
            (state, None) => missing.push(format!("{what} is {state}")),
        }
    }
    if missing.is_empty() {
        Readiness::Ready
    } else {
        Readiness::Waiting(missing)
    }
}

/// Connection settings for looks that are made often and given up soon.
pub fn options(token: Option<String>) -> Options {
    Options {
        token,
        client_name: concat!("understudy-up/", env!("CARGO_PKG_VERSION")).to_owned(),
        connect_timeout: Duration::from_secs(1),
        call_timeout: Duration::from_secs(2),
        ..Options::default()
    }
}

/// Waits until every gateway finds the cluster ready, and says how it goes.
///
/// # Errors
/// What stands in the way, for a person, when it cannot become ready or has not in time.
pub async fn wait(config: &ClusterConfig, token: Option<&str>) -> Result<(), NotReady> {
    let begun = Instant::now();
    let limit = Duration::from_millis(config.failure_detector.engine_start_timeout_ms) + MARGIN;
    let nodes: Vec<&str> = config.nodes.iter().map(|node| node.name.as_str()).collect();
    let placement = config.placement();
    let gateways = config.nodes.iter().filter_map(|node| {
        Some(Gateway {
            name: node.name.clone(),
            address: node.client_address()?,
            client: None,
        })
    });
    let mut gateways: Vec<Gateway> = gateways.collect();
    let mut progress = Progress {
        begun,
        shown: String::new(),
        shown_at: begun,
    };
    loop {
        let mut missing = Vec::new();
        for gateway in &mut gateways {
            match gateway.look(token, &nodes, &placement).await {
                Readiness::Ready => {}
                Readiness::Failed(why) => return Err(why),
                Readiness::Waiting(more) => {
                    missing = more;
                    break;
                }
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > limit {
            return Err(NotReady::new(format!(
                "not ready after {} s: {}",
                limit.as_secs(),
                missing.join("; ")
            )));
        }
        progress.show(&missing);
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

impl Gateway {
    async fn look(
        &mut self,
        token: Option<&str>,
        nodes: &[&str],
        placement: &[Placement],
    ) -> Readiness {
        match self.status(token).await {
            Ok(status) => judge(&status, nodes, placement),
            Err(error) => {
                self.client = None;
                match error.code() {
                    Some(code) if !code.is_retriable() => Readiness::Failed(NotReady::new(
                        format!("gateway {} at {} refuses: {error}", self.name, self.address),
                    )),
                    _ => Readiness::Waiting(vec![format!(
                        "gateway {} does not answer yet",
                        self.name
                    )]),
                }
            }
        }
    }

    async fn status(
        &mut self,
        token: Option<&str>,
    ) -> Result<ClusterStatus, understudy_client::Error> {
        let client = match self.client.take() {
            Some(client) => client,
            None => {
                Client::connect([self.address.clone()], options(token.map(str::to_owned))).await?
            }
        };
        let status = client.status().await?;
        self.client = Some(client);
        Ok(status)
    }
}

/// A line when something changes, and now and then while nothing does.
struct Progress {
    begun: Instant,
    shown: String,
    shown_at: Instant,
}

impl Progress {
    /// Phrases shown of a long list.
    const MAX_SHOWN: usize = 3;

    fn show(&mut self, missing: &[String]) {
        let mut text = missing[..missing.len().min(Self::MAX_SHOWN)].join("; ");
        if missing.len() > Self::MAX_SHOWN {
            text.push_str(&format!("; and {} more", missing.len() - Self::MAX_SHOWN));
        }
        if text == self.shown && self.shown_at.elapsed() < REMIND_AFTER {
            return;
        }
        say(format!(
            "  {:>5.1} s  waiting: {text}",
            self.begun.elapsed().as_secs_f64()
        ));
        self.shown = text;
        self.shown_at = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_client::protocol::message::{NodeStatus, ReplicaStatus, WorkerStatus};
    use understudy_config::Device;

    fn node(name: &str, state: &str) -> NodeStatus {
        NodeStatus {
            name: name.into(),
            incarnation: "1".into(),
            state: state.into(),
            roles: vec![],
            address: String::new(),
            last_heard_ms: None,
        }
    }

    fn replica(number: u32, state: &str, error: Option<&str>) -> ReplicaStatus {
        let worker = WorkerStatus {
            shard: 0,
            state: state.into(),
            engine_pid: None,
            device: "cpu".into(),
            restarts: 0,
            last_error: error.map(str::to_owned),
            running: 0,
            waiting: 0,
            kv_used_tokens: 0,
            kv_capacity_tokens: 0,
            rss_bytes: 0,
            fingerprint: String::new(),
        };
        ReplicaStatus {
            model: "m".into(),
            node: "b".into(),
            replica: number,
            state: state.into(),
            in_flight: 0,
            workers: vec![worker],
        }
    }

    fn judged(nodes: Vec<NodeStatus>, replicas: Vec<ReplicaStatus>) -> Readiness {
        let status = ClusterStatus {
            nodes,
            replicas,
            ..ClusterStatus::default()
        };
        let place = |replica| Placement {
            model: "m".into(),
            replica,
            node: "b".into(),
            device: Device::Cpu,
        };
        judge(&status, &["a", "b"], &[place(0), place(1)])
    }

    fn waiting(phrases: &[&str]) -> Readiness {
        Readiness::Waiting(phrases.iter().map(|phrase| (*phrase).to_owned()).collect())
    }

    #[test]
    fn ready_means_every_node_and_every_replica() {
        let both = || vec![node("a", "self"), node("b", "alive")];
        assert_eq!(
            judged(
                both(),
                vec![replica(0, "ready", None), replica(1, "ready", Some("old"))]
            ),
            Readiness::Ready
        );
        assert_eq!(
            judged(
                vec![node("a", "self"), node("b", "never_seen")],
                vec![replica(0, "ready", None)]
            ),
            waiting(&["node b is never seen", "replica m/1 on b is not there yet"])
        );
        assert_eq!(
            judged(
                vec![node("a", "self")],
                vec![replica(0, "ready", None), replica(1, "starting", None)]
            ),
            waiting(&["node b is unknown", "replica m/1 on b is starting"])
        );
        assert_eq!(
            judged(
                both(),
                vec![
                    replica(0, "ready", None),
                    replica(1, "backoff", Some("no such file"))
                ]
            ),
            waiting(&["replica m/1 on b is in state backoff after: no such file"])
        );
    }

    #[test]
    fn a_replica_out_of_service_ends_the_wait() {
        let nodes = vec![node("a", "self"), node("b", "alive")];
        let failed = judged(
            nodes,
            vec![
                replica(0, "down", Some("no weights")),
                replica(1, "ready", None),
            ],
        );
        assert_eq!(
            failed,
            Readiness::Failed(NotReady {
                why: "replica m/0 on b cannot start: no weights".into(),
                node: Some("b".into()),
            })
        );
    }

    #[test]
    fn an_engine_without_its_libraries_says_what_to_do() {
        let ended = "the engine ended: exit status: 127";
        assert!(explained(ended).contains("run scripts/setup.sh"));
        for other in ["exit status: 1", "exit status: 1270", "no weights"] {
            assert_eq!(explained(other), other);
        }
    }
}
