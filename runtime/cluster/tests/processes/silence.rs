//! Nodes that fall silent: stopped, cut off, busy, or broken inside.

use std::net::SocketAddr;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::harness::{CookieFile, NOWHERE, Start, pair};
use crate::{SECOND, proxy};

#[test]
fn a_stopped_node_is_suspected_then_down_and_comes_back_with_a_new_session() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    for _ in 0..2 {
        let (stopped, other) = (&mut a, &mut b);
        let at = stopped.signal(Signal::SIGSTOP);
        let (suspected, _) = other.expect(&format!("suspect {}", stopped.id));
        assert!(suspected - at < SECOND * 9 / 10, "{:?}", suspected - at);
        other.tell(&format!("send {} while-suspected", stopped.id));
        other.expect("sent");
        let (down, cause) = other.expect(&format!("down {} ", stopped.id));
        assert!(cause.starts_with("silent for"), "{cause}");
        assert!(down - at < SECOND * 3 / 2, "{:?}", down - at);
        other.tell(&format!("send {} too-late", stopped.id));
        other.expect("not sent: ");
        stopped.signal(Signal::SIGCONT);
        stopped.expect(&format!("down {} ", other.id));
        stopped.expect(&format!("up {}", other.id));
        other.expect(&format!("up {}", stopped.id));
        other.tell(&format!("send {} after", stopped.id));
        assert_eq!(
            stopped.expect("text ").1,
            format!("{} after", other.id),
            "nothing of the old session"
        );
        std::mem::swap(&mut a, &mut b);
    }
}

#[test]
fn a_short_stop_is_only_suspected() {
    let cookie = CookieFile::new();
    let (a, mut b, _) = pair(&cookie);
    a.signal(Signal::SIGSTOP);
    b.expect("suspect a-1");
    a.signal(Signal::SIGCONT);
    b.expect("alive a-1");
    assert_eq!(b.listen(SECOND * 2), Vec::<String>::new());
}

#[test]
fn a_partition_is_seen_by_both_sides_and_heals() {
    let cookie = CookieFile::new();
    let mut b = Start::new("b", 1, &cookie).peer("a", NOWHERE).spawn();
    let address: SocketAddr = b.expect("listening ").1.parse().unwrap();
    let proxy = proxy::Proxy::to(address);
    let mut a = Start::new("a", 1, &cookie).peer("b", proxy.address()).up();
    a.expect("up b-1");
    b.expect("up a-1");
    let cut = Instant::now();
    proxy.block(true);
    for (node, peer) in [(&mut a, "b-1"), (&mut b, "a-1")] {
        let (down, cause) = node.expect(&format!("down {peer} "));
        assert!(cause.starts_with("silent"), "{cause}");
        assert!(down - cut < SECOND * 3 / 2, "{:?}", down - cut);
    }
    proxy.block(false);
    let healed = Instant::now();
    let (up, _) = a.expect("up b-1");
    b.expect("up a-1");
    assert!(up - healed < SECOND * 4, "{:?}", up - healed);
    a.tell("send b-1 healed");
    assert_eq!(b.expect("text ").1, "a-1 healed");
}

#[test]
fn one_way_silence_ends_the_session_for_both() {
    let cookie = CookieFile::new();
    let mut b = Start::new("b", 1, &cookie).peer("a", NOWHERE).spawn();
    let address: SocketAddr = b.expect("listening ").1.parse().unwrap();
    let proxy = proxy::Proxy::to(address);
    let mut a = Start::new("a", 1, &cookie).peer("b", proxy.address()).up();
    a.expect("up b-1");
    b.expect("up a-1");
    proxy.block_towards_server(true);
    // b hears nothing of a and closes; a hears of it although b had been heard all the time.
    assert!(b.expect("down a-1 ").1.starts_with("silent"));
    a.expect("down b-1 ");
}

#[test]
fn a_blocked_process_keeps_its_peers() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    a.tell("block 3000");
    a.expect("unblocked");
    a.tell("send b-1 hello");
    assert_eq!(b.expect("").1, "text a-1 hello", "no suspicion in between");
}

/// The layer is killed from within, and must not go on without one of its parts.
#[test]
fn a_layer_that_loses_a_part_leaves_the_cluster_and_says_so() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    a.tell("break");
    a.expect("down b-1 ");
    a.expect("events ended");
    a.expect_log("a part of the cluster layer has ended");
    b.expect("down a-1 ");
    // The process lives; it is in no cluster any more.
    a.tell("send b-1 x");
    assert_eq!(a.expect("not sent: ").1, "b-1 is not connected");
}

/// The pipe behind the log is full, and nobody empties it; the layer has something to log all the same.
#[test]
fn a_blocked_log_stops_no_heartbeat() {
    let cookie = CookieFile::new();
    let mut deaf = Start::new("m", 1, &cookie)
        .peer("a", NOWHERE)
        .peer("b", NOWHERE);
    deaf.is_deaf = true;
    let mut deaf = deaf.spawn();
    let address = deaf.expect("listening ").1;
    let mut a = Start::new("a", 1, &cookie).peer("m", &address).up();
    a.expect("up m-1");
    deaf.tell("chatter 5000");
    deaf.expect("chattered");
    // Each time a peer comes and goes the cluster thread logs it.
    for incarnation in 1..=3 {
        let mut b = Start::new("b", incarnation, &cookie)
            .peer("m", &address)
            .up();
        b.expect("up m-1");
        b.kill();
    }
    assert_eq!(a.listen(SECOND * 2), Vec::<String>::new(), "no suspicion");
    a.tell("send m-1 hello");
    deaf.expect("text a-1 hello");
}
