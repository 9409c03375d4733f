//! Memory at idle and after rounds of requests: what grows is what leaks, or is kept on purpose.

use serde_json::{Value, json};
use understudy_client::Request;
use understudy_tests::TestCluster;
use understudy_tests::oracle::observe;

use crate::statistics::tenth;

const ROUNDS: u32 = 3;
const AT_ONCE: u32 = 50;

/// Resident MiB of each process after `requests` more requests, three times.
pub async fn measure(cluster: &TestCluster, requests: u32) -> Value {
    let mut rows = vec![resident(cluster, 0).await];
    let client = cluster.client();
    for round in 0..ROUNDS {
        let mut left = requests;
        while left > 0 {
            let batch = left.min(AT_ONCE);
            let tasks: Vec<_> = (0..batch)
                .map(|n| {
                    let client = client.clone();
                    let request = request(round * requests + left - n);
                    tokio::spawn(async move { observe(&client, request).await })
                })
                .collect();
            for task in tasks {
                task.await.expect("the stream").expect("a stream");
            }
            left -= batch;
        }
        rows.push(resident(cluster, (round + 1) * requests).await);
    }
    json!({ "resident_mib": rows })
}

fn request(n: u32) -> Request {
    let mut request = Request::prompt(format!("Count from {} to 300:", n % 90));
    request.sampling.max_tokens = Some(32);
    request.sampling.ignore_eos = true;
    request.sampling.temperature = Some(1.0);
    request.sampling.seed = Some(u64::from(n));
    request
}

async fn resident(cluster: &TestCluster, after: u32) -> Value {
    // SAFETY: sysconf reads a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as f64;
    let mib = |pid: u32| {
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        let pages: f64 = statm.split_whitespace().nth(1)?.parse().ok()?;
        Some(tenth(pages * page / f64::from(1 << 20)))
    };
    json!({
        "after_requests": after,
        "gateway_node": mib(cluster.node_pid(0)), "host_node": mib(cluster.node_pid(1)),
        "engine_0": mib(cluster.engine_pid(0).await), "engine_1": mib(cluster.engine_pid(1).await),
    })
}
