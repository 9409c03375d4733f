//! Messages: whole, in order, bounded, and nothing of the dead.

use std::time::{Duration, Instant};

use crate::SECOND;
use crate::harness::{CookieFile, NOWHERE, PATIENCE, Start, pair};

#[test]
fn messages_of_the_dead_are_fenced() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    b.tell("pause");
    b.expect("paused");
    (10..60).for_each(|number| a.tell(&format!("send b-1 {number}")));
    // Eight wait in the consumer's own channel; the others, of three bytes each, in the cluster layer.
    b.until("queues a", "queues ", |line| {
        line.ends_with(&format!(" {}", 42 * 3))
    });
    a.kill();
    b.expect_log("peer is down");
    b.tell("resume");
    let mut delivered = 0;
    loop {
        let (_, line) = b.expect("");
        if line.starts_with("text ") {
            delivered += 1;
        } else if line.starts_with("down a-1") {
            break;
        }
    }
    b.tell("fenced");
    assert_eq!((delivered, b.expect("fenced ").1), (8, "42".to_owned()));
    b.tell("metrics");
    b.expect("metric understudy_fenced_messages_total{source=\"cluster\"} 42");
    b.expect("metrics end");
    assert_eq!(
        b.listen(SECOND / 2),
        Vec::<String>::new(),
        "nothing after Down"
    );
}

#[test]
fn a_million_small_messages_arrive_in_order() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    let begin = Instant::now();
    a.tell("flood b-1 1000000 100");
    let (end, _) = b.next_of("flood a-1 ", "complete 1000000", Duration::from_secs(120));
    println!("1,000,000 messages of 100 bytes: {:?}", end - begin);
}

#[test]
fn large_payloads_arrive_whole_and_small_ones_overtake_bulk() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    for size in [1, 32 << 10, (32 << 10) + 1, 1 << 20, 16 << 20] {
        a.tell(&format!("large b-1 {size}"));
        assert_eq!(b.expect("large ").1, format!("a-1 {size} whole"));
    }
    a.tell(&format!("large b-1 {}", (16 << 20) + 1));
    a.expect("large Err(TooLarge");
    a.tell(&format!("bulk b-1 {}", 16 << 20));
    a.tell("send b-1 small");
    assert_eq!(
        b.expect("").1,
        "text a-1 small",
        "the small one comes first"
    );
    assert_eq!(b.expect("large ").1, format!("a-1 {} whole", 16 << 20));
}

#[test]
fn a_slow_consumer_stops_its_peer_within_bounds_and_is_not_declared_dead() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    let (rss_a, rss_b) = (a.rss(), b.rss());
    b.tell("pause");
    b.expect("paused");
    a.tell("fill b-1 1000");
    let filled: usize = a.expect("filled ").1.parse().unwrap();
    assert!((20 << 20..32 << 20).contains(&filled), "{filled}");
    assert_eq!(
        a.listen(SECOND * 2),
        Vec::<String>::new(),
        "heartbeats go on"
    );
    let (grown_a, grown_b) = (a.rss().saturating_sub(rss_a), b.rss().saturating_sub(rss_b));
    println!("backlog of {filled} bytes: sender grew {grown_a}, receiver {grown_b} bytes");
    assert!(grown_a < 96 << 20, "{grown_a}");
    assert!(grown_b < 16 << 20, "{grown_b}");
    b.tell("resume");
    a.tell("flood b-1 1000 100");
    b.next_of("flood a-1 ", "complete 1000", PATIENCE);
}

#[test]
fn goodbye_delivers_everything_first() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    a.tell("flood b-1 20000 100");
    a.tell("shutdown");
    b.next_of("flood a-1 ", "complete 20000", PATIENCE);
    assert_eq!(b.expect("down a-1 ").1, "left");
    a.expect("ended after");
}

/// The peer hears that it may go on as soon as parts are taken in, and need not wait for a heartbeat or an answer: of
/// these there is one every two seconds, and 16 MiB are 32 windows (64 in the bulk lane).
#[test]
fn large_payloads_do_not_wait_for_heartbeats() {
    let cookie = CookieFile::new();
    let slow = |node, peer, address: &str| {
        let mut start = Start::new(node, 1, &cookie).peer(peer, address);
        start.heartbeat_ms = 2000;
        start
    };
    let mut b = slow("b", "a", NOWHERE).spawn();
    let address = b.expect("listening ").1;
    let mut a = slow("a", "b", &address).up();
    a.expect("up b-1");
    b.expect("up a-1");
    for lane in ["large", "bulk"] {
        let begin = Instant::now();
        a.tell(&format!("{lane} b-1 {}", 16 << 20));
        let (end, what) = b.expect("large ");
        assert_eq!(what, format!("a-1 {} whole", 16 << 20));
        assert!(end - begin < SECOND * 8, "{lane}: {:?}", end - begin);
    }
}
