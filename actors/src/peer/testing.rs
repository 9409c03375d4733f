//! A network of two nodes for tests: this one, and a gateway that takes messages, or has no room for them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use understudy_cluster::{NodeName, PeerAddress, PeerId, PeerState, PeerView, SendError};
use understudy_engine_core::frame::{AttemptId, SamplingParams, StartAttempt};

use super::{Links, PeerMessage, Transport};

/// How the gateway takes what it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Listening,
    Full,
}

/// See the module. Cheap to clone; all clones are one network.
#[derive(Clone)]
pub(crate) struct FakeNetwork {
    wire: Arc<Wire>,
    links: Links,
}

struct Wire {
    me: PeerId,
    peer: PeerId,
    state: Mutex<(Mood, Vec<PeerMessage>)>,
}

impl FakeNetwork {
    pub(crate) fn new() -> Self {
        let node = |name| PeerId::new(NodeName::new(name).unwrap(), 1);
        let wire = Arc::new(Wire {
            me: node("host"),
            peer: node("gateway"),
            state: Mutex::new((Mood::Listening, Vec::new())),
        });
        let links = Links::new(wire.clone());
        Self { wire, links }
    }

    pub(crate) fn links(&self) -> Links {
        self.links.clone()
    }

    /// The gateway.
    pub(crate) fn peer(&self) -> PeerId {
        self.wire.peer.clone()
    }

    /// From now on the gateway has no room.
    pub(crate) fn fill(&self) {
        self.wire.lock().0 = Mood::Full;
    }

    /// The gateway has room again.
    pub(crate) fn drain(&self) {
        self.wire.lock().0 = Mood::Listening;
    }

    /// What the gateway got since the last call.
    pub(crate) fn sent(&self) -> Vec<PeerMessage> {
        std::mem::take(&mut self.wire.lock().1)
    }
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, (Mood, Vec<PeerMessage>)> {
        self.state.lock().expect("no test panics with the lock")
    }
}

impl Transport for Wire {
    fn me(&self) -> &PeerId {
        &self.me
    }

    fn local_addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], 1).into()
    }

    fn peers(&self) -> Vec<PeerView> {
        vec![PeerView {
            address: PeerAddress::at(self.peer.node.clone(), self.local_addr()),
            id: Some(self.peer.clone()),
            state: PeerState::Alive,
            last_heard: None,
            send_queue_bytes: 0,
            receive_queue_bytes: 0,
        }]
    }

    fn send(&self, to: &PeerId, payload: Bytes) -> Result<(), SendError> {
        let (mood, sent) = &mut *self.lock();
        match mood {
            Mood::Listening if *to == self.peer => {
                sent.push(rmp_serde::from_slice(&payload).expect("a peer message"));
                Ok(())
            }
            Mood::Full => Err(SendError::Backlog {
                to: to.clone(),
                queued_bytes: 1,
            }),
            Mood::Listening => Err(SendError::NotConnected(to.clone())),
        }
    }
}

/// An attempt without anything special about it.
pub(crate) fn start(request: u128, epoch: u32) -> StartAttempt {
    StartAttempt {
        attempt: AttemptId { request, epoch },
        prompt: vec![1, 2, 3],
        committed: Vec::new(),
        expect_logprobs: Vec::new(),
        suspect: false,
        sampling: SamplingParams::default(),
        ..StartAttempt::default()
    }
}
