//! Faults under load, and what the clients notice of them.
//!
//! A fault strikes when every stream is under way and none has ended. Which streams it hit is what the gateway's log says
//! (`attempt lost`, with the request's id): only their pauses count, and a fault that hit none is none.

use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use understudy_tests::oracle::Observed;
use understudy_tests::wait::until;
use understudy_tests::{TestCluster, scrape};

use crate::load::{Load, LoadArgs};
use crate::statistics::percentiles;

const SOON: Duration = Duration::from_secs(30);

/// A fault strikes at a token drawn from these shares of the streams' length.
const EARLIEST: f64 = 0.05;
const LATEST: f64 = 0.5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Kill,
    Stop,
    Node,
}

/// What was measured. Milliseconds.
pub struct Report {
    fault: Fault,
    load: LoadArgs,
    faults: u32,
    streams: usize,
    bit_equal: usize,
    /// Requests that the gateways counted as recovered.
    recoveries: f64,
    /// Of each stream that lost its replica: from the fault to the next token.
    to_next_token: Vec<f64>,
    /// Of the same: from the last token before to the first one after.
    pauses: Vec<f64>,
    /// Of the streams that did not: their longest pause after the fault. They share the machine with the recovery.
    neighbours: Vec<f64>,
    /// Of each fault: until a node knew.
    detections: Vec<f64>,
}

impl Report {
    /// Nothing lost, repeated or changed; and every fault struck.
    pub fn is_sound(&self) -> bool {
        self.bit_equal == self.streams && self.to_next_token.len() >= self.faults as usize
    }

    pub fn to_json(&self) -> Value {
        json!({
            "fault": format!("{:?}", self.fault).to_lowercase(),
            "faults": self.faults,
            "streams_at_once": self.load.streams, "tokens_each": self.load.tokens,
            "streams": self.streams, "bit_equal": self.bit_equal,
            "streams_that_lost_their_replica": self.to_next_token.len(), "recoveries_counted": self.recoveries,
            "fault_to_next_token_ms": percentiles(&self.to_next_token),
            "pause_ms": percentiles(&self.pauses),
            "longest_pause_of_the_other_streams_ms": percentiles(&self.neighbours),
            "fault_to_detection_ms": percentiles(&self.detections),
        })
    }
}

/// Strikes `faults` times.
pub async fn measure(
    cluster: &mut TestCluster,
    fault: Fault,
    faults: u32,
    args: &LoadArgs,
) -> Report {
    let client = cluster.client();
    let load = Load::reference(&client, args).await;
    let mut report = Report {
        fault,
        load: args.clone(),
        faults,
        streams: 0,
        bit_equal: 0,
        recoveries: 0.0,
        to_next_token: Vec::new(),
        pauses: Vec::new(),
        neighbours: Vec::new(),
        detections: Vec::new(),
    };
    let counted = recoveries(cluster).await;
    let mut random = fastrand::Rng::with_seed(u64::from(faults));
    for number in 0..faults {
        cluster.wait_ready().await;
        wait_idle(cluster).await;
        // A whole node can only be the one without the gateway, whose death is another story.
        let victim = match fault {
            Fault::Node => 1,
            Fault::Kill | Fault::Stop => number % 2,
        };
        let pid = cluster.engine_pid(victim).await;
        let share = EARLIEST + (LATEST - EARLIEST) * random.f64();
        let position = (f64::from(args.tokens) * share) as u32;
        let round = load.start(&client);
        until("streams under way", SOON, || async {
            (round.least() >= position).then_some(())
        })
        .await;
        let logs = [cluster.log(0).len(), cluster.log(1).len()];
        let struck = (Instant::now(), SystemTime::now());
        match fault {
            Fault::Kill => cluster.signal(pid, Signal::SIGKILL),
            Fault::Stop => cluster.signal(pid, Signal::SIGSTOP),
            Fault::Node => cluster.kill_node(1),
        }
        let seen = round.end().await;
        report.streams += seen.len();
        report.bit_equal += load.equal(&seen);
        report.note_streams(&seen, &cluster.log(0)[logs[0]..], struck.0);
        let (node, words) = match fault {
            Fault::Node => (0, "node is down"),
            Fault::Kill | Fault::Stop => (victim as usize, "engine lost"),
        };
        let detected = until("news of the fault", SOON, || async {
            let log = cluster.log(node);
            let mut lines = log[logs[node]..].lines();
            lines
                .find(|line| line.contains(words))
                .and_then(|line| since(struck.1, line))
        })
        .await;
        report.detections.push(detected);
        if fault == Fault::Node {
            cluster.start_node(1);
        }
        eprint!("\r{fault:?} {} of {faults} ", number + 1);
    }
    eprintln!();
    report.recoveries = recoveries(cluster).await - counted;
    report
}

impl Report {
    fn note_streams(&mut self, seen: &[Observed], gateway_log: &str, struck: Instant) {
        let lost = |observed: &&Observed| {
            let id = observed.request.to_string();
            let mut lines = gateway_log.lines();
            lines.any(|line| line.contains("attempt lost") && line.contains(&id))
        };
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let (hit, others): (Vec<&Observed>, Vec<&Observed>) = seen.iter().partition(lost);
        for observed in hit {
            // Tokens that were on their way come after the fault, too: the pause is the longest one that ends after it.
            let windows = observed.arrivals.windows(2).filter(|pair| pair[1] > struck);
            if let Some(pause) = windows.max_by_key(|pair| pair[1] - pair[0]) {
                self.pauses.push(ms(pause[1] - pause[0]));
                self.to_next_token.push(ms(pause[1] - struck));
            }
        }
        let longest = others
            .iter()
            .filter_map(|observed| observed.longest_gap_after(struck));
        self.neighbours.extend(longest.map(ms));
    }
}

/// Reports are a little late: what they say next must be about the next round.
async fn wait_idle(cluster: &TestCluster) {
    until("idle replicas", SOON, || async {
        let status = cluster.status().await?;
        let idle = status.replicas.iter().all(|replica| {
            replica.in_flight == 0 && replica.workers.iter().all(|w| w.running == 0)
        });
        idle.then_some(())
    })
    .await;
}

async fn recoveries(cluster: &TestCluster) -> f64 {
    let text = scrape::text(&cluster.metrics_address(0)).await;
    scrape::sum(&text, "understudy_recoveries_total", "")
}

/// Milliseconds from `start` to the time that a log line begins with.
fn since(start: SystemTime, line: &str) -> Option<f64> {
    let stamp = line.split_whitespace().next()?.trim_end_matches('Z');
    let mut parts = stamp
        .split_once('T')?
        .1
        .split(':')
        .map(|part| part.parse::<f64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    let logged = hours * 3600.0 + minutes * 60.0 + seconds;
    let day = 86_400.0;
    let elapsed = start.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some((logged - elapsed.as_secs_f64() % day).rem_euclid(day) * 1e3)
}
