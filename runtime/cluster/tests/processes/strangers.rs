//! Whoever is not of the cluster gets nothing, holds little, and keeps nobody out.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::SECOND;
use crate::harness::{CookieFile, NOWHERE, PATIENCE, Start};

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

/// What a dialer of another cluster says first.
fn hello() -> Vec<u8> {
    let mut body = vec![1_u8]; // Hello
    body.extend(2_u16.to_be_bytes()); // version
    body.extend([0; 8 + 8 + 32]); // incarnation, checksum, nonce
    for text in ["elsewhere", "a"] {
        body.push(text.len() as u8);
        body.extend(text.as_bytes());
    }
    let mut bytes = b"UNDRSTDY".to_vec();
    bytes.extend((body.len() as u16).to_be_bytes());
    bytes.extend(body);
    bytes
}

#[test]
fn refused_strangers_do_not_fill_the_log() {
    let cookie = CookieFile::new();
    let mut b = Start::new("b", 1, &cookie).peer("a", NOWHERE).spawn();
    let address: SocketAddr = b.expect("listening ").1.parse().unwrap();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&hello()).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.starts_with(b"UNDRSTDY"), "refused, with a reason");
    }
    // All are counted, one is told of.
    b.until(
        "metrics",
        "metric understudy_cluster_refused_total{reason=\"cluster\"} ",
        |count| count == "100",
    );
    b.tell("mark");
    b.expect_log("marked");
    assert_eq!(b.logged("connection refused"), 1);
}
