//! A node that does what its standard input says, and tells its standard output what happens.
//!
//! Every line for the parent starts with `@`. The process ends with its standard input.

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use understudy_cluster::{
    Cluster, ClusterEvent, ClusterHandle, ClusterSettings, Cookie, DetectorSettings, NodeName,
    PeerAddress, PeerId, SendError,
};
use understudy_telemetry::{LogOptions, install_logging};

/// Set in the environment of a process that is to be a probe: `NODE INCARNATION LISTEN CLUSTER COOKIE CHECKSUM
/// HEARTBEAT [NODE=ADDRESS]...`
pub const PROBE: &str = "CLUSTER_PROBE";

pub fn run(arguments: &str) {
    let _logs = install_logging(&LogOptions::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(live(settings(arguments)));
}

fn settings(arguments: &str) -> ClusterSettings {
    let words: Vec<&str> = arguments.split(' ').collect();
    let node = NodeName::new(words[0]).unwrap();
    let cookie = Cookie::read(words[4]).unwrap();
    let mut settings = ClusterSettings::new(
        words[3],
        node,
        words[1].parse().unwrap(),
        words[2].parse().unwrap(),
        cookie,
    );
    settings.config_checksum = words[5].parse().unwrap();
    let heartbeat: u64 = words[6].parse().unwrap();
    settings.detector = DetectorSettings {
        heartbeat_interval: Duration::from_millis(heartbeat),
        suspect_after: Duration::from_millis(heartbeat * 3),
        dead_after: Duration::from_millis(heartbeat * 5),
    };
    settings.peers = words[7..]
        .iter()
        .map(|peer| {
            let (node, address) = peer.split_once('=').unwrap();
            PeerAddress::at(
                NodeName::new(node).unwrap(),
                address.parse::<SocketAddr>().unwrap(),
            )
        })
        .collect();
    settings
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@{line}").unwrap();
    out.flush().unwrap();
}

async fn live(settings: ClusterSettings) {
    let metrics = metrics_exporter_prometheus::PrometheusBuilder::new()
        .install_recorder()
        .unwrap();
    // Small, so that what a paused consumer has not taken stays in the cluster layer.
    let (sender, receiver) = mpsc::channel(8);
    let cluster = match Cluster::start(settings, sender).await {
        Ok(cluster) => cluster,
        Err(error) => return say(&format!("failed {error}")),
    };
    say(&format!("listening {}", cluster.local_addr()));
    let consumer = Arc::new(Consumer::default());
    let (pause, paused) = watch::channel(false);
    tokio::spawn(consume(
        cluster.handle(),
        consumer.clone(),
        receiver,
        paused,
    ));

    let (lines, mut commands) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        std::io::stdin()
            .lock()
            .lines()
            .map_while(Result::ok)
            .for_each(|line| drop(lines.send(line)));
    });
    while let Some(line) = commands.recv().await {
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "pause" => drop(pause.send(true)),
            "metrics" => {
                let text = metrics.render();
                text.lines()
                    .filter(|line| !line.starts_with('#'))
                    .for_each(|line| say(&format!("metric {line}")));
                say("metrics end");
            }
            "resume" => drop(pause.send(false)),
            "shutdown" => {
                let begin = Instant::now();
                cluster.shutdown().await;
                return say(&format!("ended after {} ms", begin.elapsed().as_millis()));
            }
            // Blocks every worker of this process's own runtime.
            "block" => {
                let time = Duration::from_millis(words[1].parse().unwrap());
                let other = tokio::spawn(async move { std::thread::sleep(time) });
                std::thread::sleep(time);
                other.await.unwrap();
                say("unblocked");
            }
            _ => command(&cluster.handle(), &consumer, &words).await,
        }
    }
}

async fn command(cluster: &ClusterHandle, consumer: &Consumer, words: &[&str]) {
    let peer = |at: usize| words[at].parse::<PeerId>().unwrap();
    let number = |at: usize| words[at].parse::<usize>().unwrap();
    match words[0] {
        "send" => match cluster.send(&peer(1), Bytes::from(format!("T{}", words[2]))) {
            Ok(()) => say("sent"),
            Err(error) => say(&format!("not sent: {error}")),
        },
        "flood" => flood(cluster, &peer(1), number(2), number(3)).await,
        "fill" => fill(cluster, &peer(1), number(2)),
        "large" => say(&format!(
            "large {:?}",
            cluster.send(&peer(1), pattern(number(2)))
        )),
        "bulk" => say(&format!(
            "bulk {:?}",
            cluster.send_bulk(&peer(1), pattern(number(2)))
        )),
        "ping" => ping(cluster, consumer, &peer(1), number(2)).await,
        "peers" => say(&format!(
            "peers {}",
            cluster
                .peers()
                .iter()
                .map(|view| format!("{}:{}", view.address.node, view.state.as_str()))
                .collect::<Vec<_>>()
                .join(",")
        )),
        "queues" => {
            let view = cluster
                .peers()
                .into_iter()
                .find(|view| view.address.node.as_str() == words[1])
                .unwrap();
            say(&format!(
                "queues {} {}",
                view.send_queue_bytes, view.receive_queue_bytes
            ));
        }
        // A fault of the layer itself: the actor that takes in what peers send is gone.
        "break" => ractor::pg::get_scoped_members(
            &"understudy-cluster".to_owned(),
            &cluster.me().to_string(),
        )
        .iter()
        .for_each(|port| port.kill()),
        // More than any pipe holds.
        "chatter" => {
            for line in 0..number(1) {
                tracing::info!(line, "{}", "chatter ".repeat(12));
            }
            say("chattered");
        }
        "mark" => tracing::info!("marked"),
        "fenced" => say(&format!("fenced {}", cluster.fenced_messages())),
        other => say(&format!("unknown command {other}")),
    }
}

/// Numbered messages, as fast as they are taken.
async fn flood(cluster: &ClusterHandle, to: &PeerId, count: usize, size: usize) {
    let begin = Instant::now();
    for number in 0..count as u64 {
        let mut message = vec![b'F'; size.max(17)];
        message[1..9].copy_from_slice(&number.to_be_bytes());
        message[9..17].copy_from_slice(&(count as u64).to_be_bytes());
        let message = Bytes::from(message);
        loop {
            match cluster.send(to, message.clone()) {
                Ok(()) => break,
                Err(SendError::Backlog { .. }) => {
                    tokio::time::sleep(Duration::from_millis(1)).await
                }
                Err(error) => return say(&format!("flood failed at {number}: {error}")),
            }
        }
    }
    say(&format!(
        "flooded {count} in {} ms",
        begin.elapsed().as_millis()
    ));
}

/// Messages until the backlog is full.
fn fill(cluster: &ClusterHandle, to: &PeerId, size: usize) {
    let mut bytes = 0;
    loop {
        match cluster.send(to, Bytes::from(vec![b'X'; size])) {
            Ok(()) => bytes += size,
            Err(SendError::Backlog { .. }) => return say(&format!("filled {bytes}")),
            Err(error) => return say(&format!("fill failed: {error}")),
        }
    }
}

/// A large message whose content can be checked.
fn pattern(size: usize) -> Bytes {
    let mut bytes: Vec<u8> = (0..size).map(|at| (at * 31 + at / 4096) as u8).collect();
    bytes[0] = b'B';
    bytes.into()
}

/// Small messages there and back, one after the other.
async fn ping(cluster: &ClusterHandle, consumer: &Consumer, to: &PeerId, count: usize) {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        let answer = consumer.answered.notified();
        if let Err(error) = cluster.send(to, Bytes::from(vec![b'P'; 100])) {
            return say(&format!("ping failed: {error}"));
        }
        answer.await;
        times.push(begin.elapsed());
    }
    times.sort();
    let at = |part: f64| times[((count - 1) as f64 * part) as usize].as_micros();
    say(&format!(
        "pinged p50 {} us p99 {} us max {} us",
        at(0.5),
        at(0.99),
        at(1.0)
    ));
}

#[derive(Default)]
struct Consumer {
    answered: tokio::sync::Notify,
    next: AtomicU64,
    broken: AtomicBool,
}

async fn consume(
    cluster: ClusterHandle,
    consumer: Arc<Consumer>,
    mut events: mpsc::Receiver<ClusterEvent>,
    mut paused: watch::Receiver<bool>,
) {
    loop {
        if *paused.borrow_and_update() {
            say("paused");
            let _ = paused.wait_for(|paused| !paused).await;
        }
        let event = tokio::select! {
            event = events.recv() => event,
            _ = paused.changed() => continue,
        };
        match event {
            None => return say("events ended"),
            Some(ClusterEvent::Up { peer }) => say(&format!("up {peer}")),
            Some(ClusterEvent::Suspect { peer }) => say(&format!("suspect {peer}")),
            Some(ClusterEvent::Alive { peer }) => say(&format!("alive {peer}")),
            Some(ClusterEvent::Down { peer, cause }) => say(&format!("down {peer} {cause}")),
            Some(ClusterEvent::Message { from, payload }) => {
                consumer.take(&cluster, &from, &payload)
            }
        }
    }
}

impl Consumer {
    fn take(&self, cluster: &ClusterHandle, from: &PeerId, payload: &Bytes) {
        match payload.first() {
            Some(b'T') => say(&format!(
                "text {from} {}",
                String::from_utf8_lossy(&payload[1..])
            )),
            Some(b'P') => drop(cluster.send(from, Bytes::from(vec![b'Q'; 100]))),
            Some(b'Q') => self.answered.notify_one(),
            Some(b'B') => {
                let whole = *payload == pattern(payload.len());
                say(&format!(
                    "large {from} {} {}",
                    payload.len(),
                    if whole { "whole" } else { "damaged" }
                ));
            }
            Some(b'F') => self.count(from, payload),
            _ => {}
        }
    }

    fn count(&self, from: &PeerId, payload: &Bytes) {
        let number = u64::from_be_bytes(payload[1..9].try_into().unwrap());
        let count = u64::from_be_bytes(payload[9..17].try_into().unwrap());
        let expected = if number == 0 {
            0
        } else {
            self.next.load(Ordering::Relaxed)
        };
        self.next.store(number + 1, Ordering::Relaxed);
        if number != expected && !self.broken.swap(true, Ordering::Relaxed) {
            say(&format!("flood {from} broken: {number} after {expected}"));
        }
        if number + 1 == count {
            say(&format!("flood {from} complete {count}"));
        }
    }
}
