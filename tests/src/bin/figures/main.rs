//! `understudy-figures`: measures what docs/benchmarks.md states, on a cluster of its own with the real engine.
//!
//! Every fault is judged by the oracle too: a figure of a stream that was not bit-equal would be worth nothing.

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::{Parser, Subcommand};
use nix::sys::signal::Signal;
use serde_json::json;
use understudy_client::Request;
use understudy_tests::oracle::{Observed, observe};
use understudy_tests::wait::until;
use understudy_tests::{Engine, TestCluster, TestClusterBuilder};

const SOON: Duration = Duration::from_secs(30);

/// Kills follow each other here faster than an operator would accept.
const PATIENT: &str = "[restart]\nintensity = 1000\nbackoff_initial_ms = 10\nbackoff_max_ms = 50\n[recovery]\nmax_attempts = 1000";

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// Use the fake engine, with this step time in ms
    #[arg(long, global = true, value_name = "MS")]
    fake_step_ms: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Stall of a stream whose engine is killed, with a warm replica beside it
    Kill {
        #[arg(long, default_value_t = 60)]
        faults: u32,
    },
    /// As `kill`, with SIGSTOP in place of SIGKILL
    Stop {
        #[arg(long, default_value_t = 20)]
        faults: u32,
    },
    /// As `kill`, with the whole node of the replica
    Node {
        #[arg(long, default_value_t = 20)]
        faults: u32,
    },
    /// Resident memory of node and engine at idle, and after rounds of requests
    Memory {
        #[arg(long, default_value_t = 1000)]
        requests: u32,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let builder = match args.fake_step_ms {
        Some(ms) => TestClusterBuilder::new(Engine::Fake).step_ms(ms),
        None => TestClusterBuilder::new(Engine::Real),
    };
    let Some(mut cluster) = builder.settings(PATIENT).start_ready().await else {
        return ExitCode::from(2);
    };
    let result = match args.command {
        Command::Kill { faults } => stalls(&mut cluster, faults, Fault::Kill).await,
        Command::Stop { faults } => stalls(&mut cluster, faults, Fault::Stop).await,
        Command::Node { faults } => stalls(&mut cluster, faults, Fault::Node).await,
        Command::Memory { requests } => memory(&cluster, requests).await,
    };
    println!("{result}");
    ExitCode::SUCCESS
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
    Node,
}

fn request(seed: u64) -> Request {
    let mut request = Request::prompt(format!("Count from {} to 300:", seed % 7));
    request.sampling.max_tokens = Some(400);
    request.sampling.ignore_eos = true;
    request.sampling.temperature = Some(1.0);
    request.sampling.seed = Some(seed);
    request
}

async fn stalls(cluster: &mut TestCluster, faults: u32, fault: Fault) -> serde_json::Value {
    let client = cluster.client();
    let (mut stalls, mut detections, mut recovered, mut skipped) = (Vec::new(), Vec::new(), 0, 0);
    let mut seed = 0;
    while stalls.len() < faults as usize {
        seed += 1;
        cluster.wait_ready().await;
        let expected = observe(&client, request(seed))
            .await
            .expect("the fault-free run")
            .transcript;
        let task = tokio::spawn({
            let client = client.clone();
            async move { observe(&client, request(seed)).await }
        });
        let (replica, pid) = until("a replica that serves it", SOON, || async {
            let status = cluster.status().await?;
            let busy = status
                .replicas
                .into_iter()
                .find(|replica| replica.workers[0].running > 0)?;
            Some((busy.replica, busy.workers[0].engine_pid?))
        })
        .await;
        if fault == Fault::Node && replica == 0 {
            // That one lives with the gateway, whose death is another story.
            task.await.expect("the stream").expect("a stream");
            skipped += 1;
            continue;
        }
        let log_before = [cluster.log(0).len(), cluster.log(1).len()];
        let (struck, struck_wall) = (Instant::now(), SystemTime::now());
        match fault {
            Fault::Kill => cluster.signal(pid, Signal::SIGKILL),
            Fault::Stop => cluster.signal(pid, Signal::SIGSTOP),
            Fault::Node => cluster.kill_node(1),
        }
        let observed = task
            .await
            .expect("the stream")
            .expect("a stream without an error");
        assert_eq!(expected, observed.transcript, "seed {seed}: not bit-equal");
        if let Some(stall) = stall(&observed, struck) {
            stalls.push(stall);
            recovered += 1;
        }
        let (node, words) = match fault {
            Fault::Node => (0, "node is down"),
            Fault::Kill | Fault::Stop => (replica as usize, "engine lost"),
        };
        let log = cluster.log(node);
        let line = log[log_before[node]..]
            .lines()
            .find(|line| line.contains(words));
        detections.extend(line.and_then(|line| since(struck_wall, line)));
        if fault == Fault::Node {
            cluster.start_node(1);
        }
    }
    json!({
        "fault": format!("{fault:?}").to_lowercase(),
        "faults": stalls.len(), "bit_equal": recovered, "on_the_gateways_node_left_out": skipped,
        "stall_ms": percentiles(&mut stalls), "detection_ms": percentiles(&mut detections),
    })
}

/// The longest pause that ended after the fault: from the last token before it to the first one after it.
fn stall(observed: &Observed, struck: Instant) -> Option<f64> {
    let pauses = observed.arrivals.windows(2).filter(|pair| pair[1] > struck);
    pauses
        .map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
        .max_by(f64::total_cmp)
}

/// Milliseconds from `start` to the time that a log line begins with.
fn since(start: SystemTime, line: &str) -> Option<f64> {
    let time = line
        .split_whitespace()
        .next()?
        .trim_end_matches('Z')
        .split_once('T')?
        .1;
    let mut parts = time.split(':').map(|part| part.parse::<f64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    let logged = hours * 3600.0 + minutes * 60.0 + seconds;
    let day = 86_400.0;
    let started = start
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()?
        .as_secs_f64()
        % day;
    Some((logged - started).rem_euclid(day) * 1e3)
}

fn percentiles(values: &mut [f64]) -> serde_json::Value {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| match values.len() {
        0 => f64::NAN,
        count => values[((count - 1) as f64 * share).round() as usize],
    };
    let shown = |share| (at(share) * 10.0).round() / 10.0;
    json!({"p50": shown(0.5), "p90": shown(0.9), "p99": shown(0.99), "max": shown(1.0)})
}

async fn memory(cluster: &TestCluster, requests: u32) -> serde_json::Value {
    let mut rows = vec![resident(cluster, 0).await];
    let client = cluster.client();
    for round in 1..=3_u32 {
        for batch in 0..requests / 50 {
            let tasks: Vec<_> = (0..50)
                .map(|n| {
                    let client = client.clone();
                    let mut request = request(u64::from(round * requests + batch * 50 + n));
                    request.sampling.max_tokens = Some(32);
                    tokio::spawn(async move { observe(&client, request).await })
                })
                .collect();
            for task in tasks {
                task.await.expect("the stream").expect("a stream");
            }
        }
        rows.push(resident(cluster, round * requests).await);
    }
    json!({ "resident_mib": rows })
}

async fn resident(cluster: &TestCluster, after: u32) -> serde_json::Value {
    let mib = |pid: u32| {
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
        let pages: f64 = statm
            .split_whitespace()
            .nth(1)
            .and_then(|pages| pages.parse().ok())
            .unwrap_or(f64::NAN);
        (pages * 4096.0 / (1 << 20) as f64 * 10.0).round() / 10.0
    };
    json!({
        "after_requests": after,
        "gateway_node": mib(cluster.node_pid(0)), "host_node": mib(cluster.node_pid(1)),
        "engine_0": mib(cluster.engine_pid(0).await), "engine_1": mib(cluster.engine_pid(1).await),
    })
}
