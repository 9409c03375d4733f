use tokio::io::{DuplexStream, duplex};

use super::*;
use crate::cookie::Cookie;
use crate::identity::PeerAddress;

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

fn settings(node: &str, peers: &[&str], cookie: &Cookie) -> ClusterSettings {
    let listen = "127.0.0.1:0".parse().unwrap();
    let mut settings = ClusterSettings::new("test", name(node), 0x10, listen, cookie.clone());
    settings.peers = peers
        .iter()
        .map(|peer| PeerAddress {
            node: name(peer),
            host: "h".into(),
            port: 1,
        })
        .collect();
    settings
}

async fn meet(
    dialer: &Local,
    acceptor: &Local,
) -> (
    Result<Agreed, HandshakeError>,
    Result<Agreed, HandshakeError>,
) {
    let (mut left, mut right): (DuplexStream, DuplexStream) = duplex(4096);
    let expected = acceptor.me.node.clone();
    let accept = async {
        let proven = acceptor.accept(&mut right).await?;
        proven.confirm(&mut right).await?;
        Ok(proven.agreed)
    };
    tokio::join!(dialer.dial(&mut left, &expected), accept)
}

#[tokio::test]
async fn two_nodes_agree_on_names_and_a_fresh_session() {
    let cookie = Cookie::generate();
    let a = Local::new(&settings("a", &["a", "b"], &cookie));
    let b = Local::new(&settings("b", &["a", "b"], &cookie));
    let (at_a, at_b) = meet(&a, &b).await;
    let (at_a, at_b) = (at_a.unwrap(), at_b.unwrap());
    assert_eq!(
        (at_a.peer.to_string(), at_b.peer.to_string()),
        ("b-10".into(), "a-10".into())
    );
    assert_eq!(at_a.session, at_b.session);
    assert!(!at_a.config_differs && !at_b.config_differs);
    let again = meet(&a, &b).await.0.unwrap();
    assert_ne!(again.session, at_a.session);
}

#[tokio::test]
async fn both_sides_learn_why_not() {
    let cookie = Cookie::generate();
    let base = |node: &str| settings(node, &["a", "b"], &cookie);
    let mut other_cookie = base("a");
    other_cookie.cookie = Cookie::generate();
    let mut other_cluster = base("a");
    other_cluster.cluster = "prod".into();
    let mut other_config = base("a");
    other_config.config_checksum = 1;
    let stranger = settings("aa", &["b"], &cookie);
    let cases = [
        (other_cookie, Refusal::Cookie),
        (other_cluster, Refusal::Cluster),
        (other_config, Refusal::Config),
        (stranger, Refusal::UnknownNode),
    ];
    for (dialer, expected) in cases {
        let (at_a, at_b) = meet(&Local::new(&dialer), &Local::new(&base("b"))).await;
        assert!(
            matches!(&at_b, Err(HandshakeError::Refuse(why)) if *why == expected),
            "{at_b:?}"
        );
        assert!(
            matches!(&at_a, Err(HandshakeError::Refused(why)) if *why == expected),
            "{at_a:?}"
        );
    }
    let (at_b, at_a) = meet(&Local::new(&base("b")), &Local::new(&base("a"))).await;
    assert!(
        matches!(at_a, Err(HandshakeError::Refuse(Refusal::Direction))),
        "{at_a:?}"
    );
    assert!(
        matches!(at_b, Err(HandshakeError::Refused(Refusal::Direction))),
        "{at_b:?}"
    );
}

#[tokio::test]
async fn a_different_configuration_can_be_allowed() {
    let cookie = Cookie::generate();
    let mut a = settings("a", &["b"], &cookie);
    let mut b = settings("b", &["a"], &cookie);
    a.config_checksum = 1;
    (a.config_mismatch, b.config_mismatch) = (ConfigMismatch::Warn, ConfigMismatch::Warn);
    let (at_a, at_b) = meet(&Local::new(&a), &Local::new(&b)).await;
    assert!(at_a.unwrap().config_differs && at_b.unwrap().config_differs);
}

#[tokio::test]
async fn an_impostor_without_the_cookie_is_not_believed() {
    let real = Local::new(&settings("a", &["b"], &Cookie::generate()));
    let (mut left, mut right) = duplex(4096);
    let impostor = async {
        read_magic(&mut right).await.unwrap();
        read_expected(&mut right, HELLO).await.unwrap();
        let fake = Local::new(&settings("b", &["a"], &Cookie::generate()));
        right.write_all(&MAGIC).await.unwrap();
        write_frame(&mut right, HELLO, &fake.hello()).await.unwrap();
        let proof = read_expected(&mut right, PROOF).await.unwrap();
        // The best it can do: give the dialer its own proof back.
        write_frame(&mut right, ACCEPT, &proof).await.unwrap();
    };
    let (outcome, ()) = tokio::join!(real.dial(&mut left, &real.peers[0]), impostor);
    assert!(
        matches!(outcome, Err(HandshakeError::Refuse(Refusal::Cookie))),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn another_node_at_the_address_is_noticed() {
    let cookie = Cookie::generate();
    let a = Local::new(&settings("a", &["b", "c"], &cookie));
    let c = Local::new(&settings("c", &["a", "b"], &cookie));
    let (mut left, mut right) = duplex(4096);
    let expected = name("b");
    let (outcome, _) = tokio::join!(
        async {
            let outcome = a.dial(&mut left, &expected).await;
            drop(left);
            outcome
        },
        c.accept(&mut right)
    );
    assert!(
        matches!(outcome, Err(HandshakeError::WrongNode { .. })),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn garbage_is_turned_away_without_allocation_or_panic() {
    let local = Local::new(&settings("b", &["a"], &Cookie::generate()));
    let mut random = fastrand::Rng::with_seed(3);
    for round in 0..2000 {
        let mut bytes: Vec<u8> = (0..random.usize(0..700)).map(|_| random.u8(..)).collect();
        if round % 2 == 0 && bytes.len() >= 11 {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..11].copy_from_slice(&[0, random.u8(..), HELLO]);
        }
        let (mut left, mut right) = duplex(4096);
        left.write_all(&bytes).await.unwrap();
        left.shutdown().await.unwrap();
        let outcome = local.accept(&mut right).await;
        assert!(outcome.is_err(), "round {round}");
    }
}

#[test]
fn hello_reads_back_and_rejects_every_cut() {
    let bytes = Local::new(&settings("node-b", &["a"], &Cookie::generate())).hello();
    assert!(bytes.len() < MAX_FRAME_BYTES);
    assert_eq!(Hello::parse(&bytes).unwrap().encode(), bytes);
    for length in 0..bytes.len() {
        assert_eq!(Hello::parse(&bytes[..length]), None, "{length}");
    }
}

#[test]
fn refusals_read_back_and_say_something() {
    for refusal in Refusal::ALL {
        assert_eq!(Refusal::from_code(refusal as u8), Some(refusal));
        assert!(refusal.advice().len() > 20 && !refusal.as_str().is_empty());
    }
    assert_eq!(Refusal::from_code(0), None);
}

#[tokio::test]
async fn keys_and_proofs_are_not_shown() {
    let cookie = Cookie::generate();
    let a = Local::new(&settings("a", &["b"], &cookie));
    let b = Local::new(&settings("b", &["a"], &cookie));
    let (mut left, mut right) = duplex(4096);
    let (dialed, proven) = tokio::join!(
        async {
            // Ends when the other side is dropped without an answer.
            a.dial(&mut left, &b.me.node).await
        },
        async {
            let proven = b.accept(&mut right).await;
            drop(right);
            proven.unwrap()
        }
    );
    assert!(dialed.is_err());
    let shown = format!("{a:?} {proven:?}");
    assert!(shown.contains("a-10") || shown.contains("\"a\""), "{shown}");
    for secret in [&a.key, &proven.proof] {
        assert!(!shown.contains(&format!("{secret:?}")), "{shown}");
        assert!(!shown.contains(&crate::cookie::hex(secret)), "{shown}");
    }
}
