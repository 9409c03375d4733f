//! How nodes find each other, and what becomes of a run that another one replaces.

use std::net::TcpListener;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::SECOND;
use crate::harness::{CookieFile, NOWHERE, Node, PATIENCE, Start, pair};

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
