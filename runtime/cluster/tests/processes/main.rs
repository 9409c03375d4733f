//! Nodes as real processes, with real signals: ractor's registries belong to a process, so two nodes in one would
//! see each other's actors.

mod harness;
mod probe;
mod proxy;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use harness::{CookieFile, NOWHERE, Node, PATIENCE, Start, pair};
use nix::sys::signal::Signal;

/// Not a test: the body of the node processes that the tests start.
#[test]
fn probe_process() {
    if let Ok(arguments) = std::env::var(probe::PROBE) {
        probe::run(&arguments);
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn two_nodes_join_and_talk() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    a.tell("send b-1 hello");
    assert_eq!(b.expect("text ").1, "a-1 hello");
    b.tell("send a-1 there");
    assert_eq!(a.expect("text ").1, "b-1 there");
    a.tell("peers");
    assert_eq!(a.expect("peers ").1, "b:alive");
    a.tell("send b-2 x");
    assert_eq!(
        a.expect("not sent: ").1,
        "b-2 is not connected",
        "another run of the same node"
    );
    a.tell("send a-1 x");
    assert_eq!(a.expect("not sent: ").1, "a-1 is not connected");
}

#[test]
fn a_killed_node_is_down_at_once_and_its_next_run_comes_up() {
    let cookie = CookieFile::new();
    let (a, mut b, address) = pair(&cookie);
    // The dialer dies.
    let killed = a.kill();
    let (seen, cause) = b.expect("down a-1 ");
    assert_eq!(cause, "connection lost");
    assert!(seen - killed < SECOND / 2, "{:?}", seen - killed);
    let mut a = Start::new("a", 2, &cookie).peer("b", address).spawn();
    b.expect("up a-2");
    a.expect("up b-1");
    // The acceptor dies.
    let killed = b.kill();
    let (seen, _) = a.expect("down b-1 ");
    assert!(seen - killed < SECOND / 2, "{:?}", seen - killed);
    let mut b = Start::new("b", 2, &cookie)
        .listen(address)
        .peer("a", NOWHERE)
        .up();
    a.expect("up b-2");
    b.expect("up a-2");
    b.tell("send a-2 again");
    assert_eq!(a.expect("text ").1, "b-2 again");
}

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
fn a_zombie_does_not_push_out_the_run_that_replaced_it() {
    let cookie = CookieFile::new();
    let (mut zombie, mut b, address) = pair(&cookie);
    zombie.signal(Signal::SIGSTOP);
    let mut a = Start::new("a", 2, &cookie).peer("b", address).spawn();
    let (_, cause) = b.expect("down a-1 ");
    assert!(
        cause == "replaced by a newer session" || cause.starts_with("silent"),
        "{cause}"
    );
    b.expect("up a-2");
    a.expect("up b-1");
    zombie.signal(Signal::SIGCONT);
    zombie.expect("down b-1");
    zombie.expect_log("a later run of the same node is in the cluster");
    assert_eq!(
        b.listen(SECOND),
        Vec::<String>::new(),
        "b hears nothing of it"
    );
    b.tell("send a-2 hello");
    assert_eq!(a.expect("text ").1, "b-1 hello");
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
fn three_nodes_see_each_other_and_one_death() {
    let cookie = CookieFile::new();
    let mut c = Start::new("c", 1, &cookie)
        .peer("a", NOWHERE)
        .peer("b", NOWHERE)
        .spawn();
    let at_c = c.expect("listening ").1;
    let mut b = Start::new("b", 1, &cookie)
        .peer("a", NOWHERE)
        .peer("c", &at_c)
        .spawn();
    let at_b = b.expect("listening ").1;
    let mut a = Start::new("a", 1, &cookie)
        .peer("b", &at_b)
        .peer("c", &at_c)
        .up();
    for (node, others) in [
        (&mut a, "b:alive,c:alive"),
        (&mut b, "a:alive,c:alive"),
        (&mut c, "a:alive,b:alive"),
    ] {
        node.until("peers", "peers ", |peers| peers == others);
    }
    a.tell("send c-1 from-a");
    b.tell("send c-1 from-b");
    let mut texts = [c.expect("text ").1, c.expect("text ").1];
    texts.sort();
    assert_eq!(texts, ["a-1 from-a", "b-1 from-b"]);
    b.kill();
    a.expect("down b-1 ");
    c.expect("down b-1 ");
    a.tell("send c-1 still-here");
    assert_eq!(c.expect("text ").1, "a-1 still-here");
}

#[test]
fn many_joins_leave_nothing_behind() {
    let cookie = CookieFile::new();
    let mut b = Start::new("b", 1, &cookie).peer("a", NOWHERE).spawn();
    let address = b.expect("listening ").1;
    let (descriptors, mut memory) = (b.descriptors(), 0);
    for incarnation in 1..=40 {
        let mut a = Start::new("a", incarnation, &cookie)
            .peer("b", &address)
            .up();
        let id = a.id.clone();
        a.expect("up b-1");
        b.expect(&format!("up {id}"));
        a.tell("flood b-1 100 1000");
        b.next_of(&format!("flood {id} "), "complete 100", PATIENCE);
        if incarnation % 2 == 0 {
            a.tell("shutdown");
            a.expect("ended");
        }
        a.kill();
        b.expect(&format!("down {id} "));
        if incarnation == 10 {
            memory = b.rss();
        }
    }
    // The last connection is closed a moment after the news of it.
    let deadline = Instant::now() + PATIENCE;
    while b.descriptors() != descriptors {
        assert!(
            Instant::now() < deadline,
            "{descriptors} file descriptors became {}",
            b.descriptors()
        );
        std::thread::yield_now();
    }
    let grown = b.rss().saturating_sub(memory);
    assert!(grown < 4 << 20, "{grown} bytes");
}

#[test]
fn strangers_are_refused_and_say_why() {
    let cookie = CookieFile::new();
    let other_cookie = CookieFile::new();
    let mut b = Start::new("b", 1, &cookie).peer("a", NOWHERE).spawn();
    let address: SocketAddr = b.expect("listening ").1.parse().unwrap();
    let good = Start::new("a", 1, &cookie).peer("b", address);
    let mut wrong_cookie = good.clone();
    wrong_cookie.cookie = other_cookie.0.clone();
    let mut wrong_cluster = good.clone();
    wrong_cluster.cluster = "production";
    let mut wrong_config = good.clone();
    wrong_config.checksum = 7;
    let mut unknown = good.clone();
    unknown.node = "aa";
    for (start, said) in [
        (wrong_cookie, "the cookies differ"),
        (wrong_cluster, "different clusters"),
        (wrong_config, "the configurations differ"),
        (unknown, "not in the other's configuration"),
    ] {
        let mut stranger = start.up();
        stranger.expect_log(said);
        stranger.tell("peers");
        assert_eq!(stranger.expect("peers ").1, "b:never_seen");
    }
    b.tell("peers");
    assert_eq!(
        b.expect("").1,
        "peers a:never_seen",
        "b has said nothing else"
    );
    let mut a = good.up();
    a.expect("up b-1");
}

#[test]
fn silent_and_garbage_connections_keep_nobody_out() {
    let cookie = CookieFile::new();
    let mut b = Start::new("b", 1, &cookie).peer("a", NOWHERE).spawn();
    let address: SocketAddr = b.expect("listening ").1.parse().unwrap();
    let mut silent: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    // The oldest give way to the later ones, long before the handshake timeout.
    let begin = Instant::now();
    silent[0].set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(silent[0].read(&mut [0; 1]).unwrap_or(0), 0);
    assert!(begin.elapsed() < SECOND * 4, "{:?}", begin.elapsed());
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 5000],
        b"UNDRSTDY\xff\xff\x01",
    ] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = stream.write_all(garbage);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty(), "garbage is not answered");
    }
    let begin = Instant::now();
    let mut a = Start::new("a", 1, &cookie).peer("b", address).up();
    let (up, _) = a.expect("up b-1");
    assert!(up - begin < SECOND * 2, "{:?}", up - begin);
    b.expect("up a-1");
    // The silent ones are closed in the end: all within the handshake timeout.
    for stream in &mut silent {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    }
    assert_eq!(b.listen(Duration::from_millis(100)), Vec::<String>::new());
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

#[test]
fn a_blocked_process_keeps_its_peers() {
    let cookie = CookieFile::new();
    let (mut a, mut b, _) = pair(&cookie);
    a.tell("block 3000");
    a.expect("unblocked");
    a.tell("send b-1 hello");
    assert_eq!(b.expect("").1, "text a-1 hello", "no suspicion in between");
}

#[test]
fn a_port_in_use_is_named() {
    let cookie = CookieFile::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let mut node = Start::new("a", 1, &cookie).listen(address).spawn();
    let said = node.expect("failed ").1;
    assert!(
        said.contains(&format!("cluster port {address} is in use")) && said.contains("ss -ltnp"),
        "{said}"
    );
}

#[test]
fn our_listener_is_the_only_one() {
    let cookie = CookieFile::new();
    let (a, b, address) = pair(&cookie);
    assert_eq!(listening_ports(&b), [address.port()]);
    assert_eq!(listening_ports(&a).len(), 1);
}

/// TCP ports that a process listens on.
fn listening_ports(node: &Node) -> Vec<u16> {
    let pid = node.pid();
    let sockets: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter_map(|link| {
            Some(
                link.to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .to_owned(),
            )
        })
        .collect();
    let mut ports = Vec::new();
    for table in ["tcp", "tcp6"] {
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        for line in table.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            const LISTEN: &str = "0A";
            if fields[3] == LISTEN && sockets.iter().any(|inode| inode == fields[9]) {
                let port = fields[1].rsplit_once(':').unwrap().1;
                ports.push(u16::from_str_radix(port, 16).unwrap());
            }
        }
    }
    ports
}

impl Node {
    /// Gives a command again and again until the answer is right.
    fn until(&mut self, command: &str, start: &str, mut right: impl FnMut(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.tell(command);
            // The answer may be missing: a metric that is not there yet.
            if self
                .try_expect(start, Duration::from_millis(200))
                .is_some_and(|(_, answer)| right(&answer))
            {
                return;
            }
        }
        panic!("{} never gave the right answer to {command:?}", self.id)
    }

    /// As `expect`, but the whole rest must be this, within its own time.
    fn next_of(&mut self, start: &str, rest: &str, patience: Duration) -> (Instant, String) {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(found) = self.try_expect(start, deadline - Instant::now()) {
                assert_eq!(found.1, rest);
                return found;
            }
        }
        panic!("{} did not say {start}{rest}", self.id)
    }
}

/// The figures of `docs/cluster.md`. Run on a quiet machine:
/// `cargo test --release -p understudy-cluster --test processes -- --ignored --nocapture figures`
#[test]
#[ignore = "measures, takes a minute"]
fn figures() {
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
