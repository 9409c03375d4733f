//! Measures; the names of these tests begin with that of this module, which is how the documented command finds them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{CookieFile, NOWHERE, Start, pair};

/// The figures of `docs/cluster.md`. Run on a quiet machine:
/// `cargo test --release -p understudy-cluster --test processes -- --ignored --nocapture figures`
#[test]
#[ignore = "measures, takes a minute"]
fn of_docs_cluster() {
    let cookie = CookieFile::new();
    let mut kills = Vec::new();
    let mut stops = Vec::new();
    let mut joins = Vec::new();
    let mut b = Start::new("b", 1, &cookie).peer("a", NOWHERE).spawn();
    let address: SocketAddr = b.expect("listening ").1.parse().unwrap();
    for incarnation in 1..=20 {
        let start = Start::new("a", incarnation, &cookie).peer("b", address);
        let mut a = start.up();
        let listening = Instant::now();
        joins.push(a.expect("up b-1").0.saturating_duration_since(listening));
        b.expect(&format!("up {}", a.id));
        if incarnation % 2 == 0 {
            let stopped = a.signal(Signal::SIGSTOP);
            stops.push(b.expect(&format!("down {}", a.id)).0 - stopped);
        } else {
            let id = a.id.clone();
            let killed = a.kill();
            kills.push(b.expect(&format!("down {id}")).0 - killed);
        }
    }
    for (what, times) in [
        ("kill -9", &mut kills),
        ("SIGSTOP", &mut stops),
        ("join", &mut joins),
    ] {
        times.sort();
        println!(
            "{what}: median {:?}, worst {:?} of {}",
            times[times.len() / 2],
            times[times.len() - 1],
            times.len()
        );
    }
    drop(b);
    let (mut a, mut b, _) = pair(&cookie);
    a.tell("ping b-1 2000");
    a.expect("pinged");
    a.tell("ping b-1 20000");
    println!("round trip of 100 bytes: {}", a.expect("pinged ").1);
    for (count, size) in [(1_000_000, 100), (20_000, 32 << 10)] {
        let begin = Instant::now();
        a.tell(&format!("flood b-1 {count} {size}"));
        let time =
            b.next_of(
                "flood a-1 ",
                &format!("complete {count}"),
                Duration::from_secs(120),
            )
            .0 - begin;
        let rate = f64::from(count) / time.as_secs_f64();
        println!(
            "{count} messages of {size} bytes: {rate:.0}/s, {:.0} MB/s",
            rate * f64::from(size) / 1e6
        );
    }
    a.tell(&format!("bulk b-1 {}", 16 << 20));
    a.tell("ping b-1 200");
    println!("round trip while 16 MiB pass: {}", a.expect("pinged ").1);
    b.expect("large ");
}
