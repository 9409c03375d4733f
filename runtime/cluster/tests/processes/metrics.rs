//! What the layer shows of itself.

use crate::harness::{CookieFile, NOWHERE, Start, pair};

#[test]
fn metrics_show_peers_and_queues() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    b.tell("pause");
    b.expect("paused");
    a.tell("fill b-1 1000");
    a.expect("filled ");
    a.until(
        "metrics",
        "metric understudy_queued_bytes{queue=\"cluster_send\"} ",
        |bytes| bytes.parse::<f64>().unwrap() > 20e6,
    );
    a.until(
        "metrics",
        "metric understudy_peer_state{peer=\"b\",state=\"alive\"} ",
        |value| value == "1",
    );
    a.until(
        "metrics",
        "metric understudy_heartbeat_age_seconds{peer=\"b\"} ",
        |age| age.parse::<f64>().unwrap() < 0.5,
    );
    b.kill();
    a.until(
        "metrics",
        "metric understudy_peer_state{peer=\"b\",state=\"dead\"} ",
        |value| value == "1",
    );
    a.until(
        "metrics",
        "metric understudy_queued_bytes{queue=\"cluster_send\"} ",
        |bytes| bytes == "0",
    );
}

#[test]
fn counters_are_there_before_their_first_event() {
    let cookie = CookieFile::new();
    let mut node = Start::new("a", 1, &cookie).peer("b", NOWHERE).up();
    for series in [
        "understudy_cluster_refused_total{reason=\"cookie\"}",
        "understudy_cluster_sessions_total{peer=\"b\",event=\"up\"}",
        "understudy_fenced_messages_total{source=\"cluster\"}",
    ] {
        node.until("metrics", &format!("metric {series} "), |value| {
            value == "0"
        });
    }
}
