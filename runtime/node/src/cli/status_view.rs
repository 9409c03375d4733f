//! A cluster's status for people (tables) and for programs (JSON).

use std::fmt::Write as _;

use serde_json::Value;
use understudy_protocol::message::{ClusterStatus, NodeStatus, ReplicaStatus, WorkerStatus};

use super::output::without_controls;
use super::table::{Cell, Colour, paint, render};

/// One line of JSON: the protocol's status with its own field names. What the protocol leaves out where there is
/// nothing to say (`engine_pid`, `last_error`, `last_heard_ms`) is `null` here, so that scripts find every key.
pub fn json(status: &ClusterStatus) -> Result<String, serde_json::Error> {
    let mut value = serde_json::to_value(status)?;
    fill(&mut value, "/nodes", &["last_heard_ms"]);
    let replicas = value
        .get("replicas")
        .and_then(Value::as_array)
        .map_or(0, Vec::len);
    for replica in 0..replicas {
        fill(
            &mut value,
            &format!("/replicas/{replica}/workers"),
            &["engine_pid", "last_error"],
        );
    }
    serde_json::to_string(&value)
}

/// Adds `null` for missing keys to each object of the array at `pointer`.
fn fill(value: &mut Value, pointer: &str, keys: &[&str]) {
    let objects = value.pointer_mut(pointer).and_then(Value::as_array_mut);
    for object in objects
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
    {
        for key in keys {
            object.entry(*key).or_insert(Value::Null);
        }
    }
}

/// The tables.
pub fn text(status: &ClusterStatus, colour: bool) -> String {
    let mut out = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(
        out,
        "cluster {}, as {} sees it (version {})\n{} in flight, {} kept for resume ({})\n",
        paint(&plain(&status.cluster), Colour::Bold, colour),
        plain(&status.node),
        plain(&status.version),
        counted(u64::from(status.requests_in_flight), "request"),
        status.requests_kept,
        bytes(status.requests_kept_bytes),
    );
    let nodes: Vec<Vec<Cell>> = status.nodes.iter().map(node_row).collect();
    out.push_str(&render(
        &["NODE", "STATE", "ROLES", "ADDRESS", "HEARD"],
        &nodes,
        colour,
    ));
    out.push('\n');
    if status.replicas.is_empty() {
        out.push_str("no replica is known to this gateway\n");
        return out;
    }
    let header = [
        "MODEL",
        "REPLICA",
        "NODE",
        "STATE",
        "IN-FLIGHT",
        "SHARD",
        "WORKER",
        "PID",
        "DEVICE",
        "RESTARTS",
        "RUN",
        "WAIT",
        "KV",
        "RSS",
    ];
    let rows: Vec<Vec<Cell>> = status.replicas.iter().flat_map(replica_rows).collect();
    out.push_str(&render(&header, &rows, colour));
    for line in status.replicas.iter().flat_map(last_errors) {
        out.push_str(&line);
    }
    out
}

/// Text of a server on one line, without control characters.
fn plain(text: &str) -> String {
    without_controls(&text.replace(['\n', '\t'], " ")).into_owned()
}

fn node_row(node: &NodeStatus) -> Vec<Cell> {
    vec![
        plain(&node.name).into(),
        state(&node.state),
        plain(&node.roles.join(",")).into(),
        plain(&node.address).into(),
        node.last_heard_ms
            .map_or("-".to_owned(), |ms| format!("{ms} ms ago"))
            .into(),
    ]
}

/// A row per worker; the replica's own columns stand in the first. A replica without workers has a row too.
fn replica_rows(replica: &ReplicaStatus) -> Vec<Vec<Cell>> {
    let own = vec![
        plain(&replica.model).into(),
        replica.replica.to_string().into(),
        plain(&replica.node).into(),
        state(&replica.state),
        replica.in_flight.to_string().into(),
    ];
    if replica.workers.is_empty() {
        return vec![own];
    }
    replica
        .workers
        .iter()
        .enumerate()
        .map(|(index, worker)| {
            let mut row = if index == 0 {
                own.clone()
            } else {
                vec!["".into(); own.len()]
            };
            row.extend(worker_cells(worker));
            row
        })
        .collect()
}

fn worker_cells(worker: &WorkerStatus) -> Vec<Cell> {
    let restarts = Cell {
        text: worker.restarts.to_string(),
        colour: (worker.restarts > 0).then_some(Colour::Yellow),
    };
    let kv = match worker.kv_capacity_tokens {
        0 => "-".to_owned(),
        capacity => format!(
            "{:.0}%",
            100.0 * worker.kv_used_tokens as f64 / capacity as f64
        ),
    };
    let rss = if worker.rss_bytes == 0 {
        "-".to_owned()
    } else {
        bytes(worker.rss_bytes)
    };
    vec![
        worker.shard.to_string().into(),
        state(&worker.state),
        worker
            .engine_pid
            .map_or("-".to_owned(), |pid| pid.to_string())
            .into(),
        plain(&worker.device).into(),
        restarts,
        worker.running.to_string().into(),
        worker.waiting.to_string().into(),
        kv.into(),
        rss.into(),
    ]
}

fn last_errors(replica: &ReplicaStatus) -> impl Iterator<Item = String> {
    replica.workers.iter().filter_map(|worker| {
        let error = worker.last_error.as_ref()?;
        Some(format!(
            "{} replica {} shard {}: the last engine ended: {}\n",
            plain(&replica.model),
            replica.replica,
            worker.shard,
            plain(error)
        ))
    })
}

fn state(name: &str) -> Cell {
    let colour = match name {
        "self" | "alive" | "ready" => Some(Colour::Green),
        "suspect" | "starting" | "backoff" | "stopping" => Some(Colour::Yellow),
        "dead" | "down" | "unreachable" => Some(Colour::Red),
        "never_seen" => Some(Colour::Dim),
        _ => None,
    };
    Cell {
        text: plain(name),
        colour,
    }
}

fn counted(count: u64, noun: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{s}")
}

/// Bytes in binary units, three digits or so.
fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < 4 {
        value /= 1024.0;
        unit += 1;
    }
    let name = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
    if unit == 0 || value >= 99.95 {
        format!("{value:.0} {name}")
    } else {
        format!("{value:.1} {name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(pid: Option<u32>) -> WorkerStatus {
        WorkerStatus {
            shard: 0,
            state: if pid.is_some() { "ready" } else { "backoff" }.to_owned(),
            engine_pid: pid,
            device: "cpu".to_owned(),
            restarts: 2,
            last_error: pid.is_none().then(|| "killed by signal 9".to_owned()),
            running: 1,
            waiting: 0,
            kv_used_tokens: 512,
            kv_capacity_tokens: 4096,
            rss_bytes: 212 << 20,
            fingerprint: "f".to_owned(),
        }
    }

    fn sample() -> ClusterStatus {
        let replica = |replica, pid| ReplicaStatus {
            model: "demo".to_owned(),
            node: "a".to_owned(),
            replica,
            state: "ready".to_owned(),
            in_flight: 3,
            workers: vec![worker(pid)],
        };
        ClusterStatus {
            cluster: "local".to_owned(),
            node: "a".to_owned(),
            version: "0.1.0".to_owned(),
            nodes: vec![NodeStatus {
                name: "a".to_owned(),
                incarnation: "1".to_owned(),
                state: "self".to_owned(),
                roles: vec!["gateway".to_owned(), "host".to_owned()],
                address: "127.0.0.1:7400".to_owned(),
                last_heard_ms: None,
            }],
            replicas: vec![replica(0, Some(4711)), replica(1, None)],
            requests_in_flight: 1,
            requests_kept: 12,
            requests_kept_bytes: 1_300_000,
        }
    }

    #[test]
    fn the_tables_are_golden() {
        let expected = "\
cluster local, as a sees it (version 0.1.0)
1 request in flight, 12 kept for resume (1.2 MiB)

NODE  STATE  ROLES         ADDRESS         HEARD
a     self   gateway,host  127.0.0.1:7400  -

MODEL  REPLICA  NODE  STATE  IN-FLIGHT  SHARD  WORKER   PID   DEVICE  RESTARTS  RUN  WAIT  KV   RSS
demo   0        a     ready  3          0      ready    4711  cpu     2         1    0     12%  212 MiB
demo   1        a     ready  3          0      backoff  -     cpu     2         1    0     12%  212 MiB
demo replica 1 shard 0: the last engine ended: killed by signal 9
";
        assert_eq!(text(&sample(), false), expected);
        assert!(text(&sample(), true).contains("\x1b[32mready\x1b[0m"));
    }

    #[test]
    fn every_worker_object_bears_an_engine_pid() {
        let value: Value = serde_json::from_str(&json(&sample()).expect("a status is JSON"))
            .expect("one JSON object");
        assert_eq!(value["replicas"][0]["workers"][0]["engine_pid"], 4711);
        let idle = value["replicas"][1]["workers"][0]
            .as_object()
            .expect("an object");
        assert_eq!(idle.get("engine_pid"), Some(&Value::Null));
        assert_eq!(idle["last_error"], "killed by signal 9");
        assert_eq!(value["nodes"][0].get("last_heard_ms"), Some(&Value::Null));
    }

    #[test]
    fn hostile_names_cannot_drive_the_terminal() {
        let mut status = sample();
        status.nodes[0].name = "a\x1b[2J\nb".to_owned();
        assert!(text(&status, false).contains("a\u{fffd}[2J b"));
    }

    #[test]
    fn bytes_are_readable() {
        let shown = [0, 1023, 1024, 1536, 102_400, 1 << 20, 5 << 40].map(bytes);
        assert_eq!(
            shown,
            [
                "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "100 KiB", "1.0 MiB", "5.0 TiB"
            ]
        );
    }
}
