//! The metrics of this layer, all in one place. Labels are bounded: configured node names and fixed words.

use metrics::{counter, gauge};
use understudy_telemetry::names;
use understudy_telemetry::record::{self, FenceSource, Queue};

use crate::event::PeerState;
use crate::handshake::Refusal;
use crate::identity::NodeName;

const STATES: [PeerState; 4] = [
    PeerState::NeverSeen,
    PeerState::Alive,
    PeerState::Suspect,
    PeerState::Dead,
];

/// Makes every counter, at 0, so that its first event can be told from its beginning.
pub(crate) fn register<'n>(peers: impl Iterator<Item = &'n NodeName>) {
    record::fenced_messages(FenceSource::Cluster, 0);
    for refusal in Refusal::ALL {
        counter!(names::CLUSTER_REFUSED, "reason" => refusal.as_str()).increment(0);
    }
    for node in peers {
        for event in [SessionEvent::Up, SessionEvent::Down] {
            sessions(node, event, 0);
        }
    }
}

/// Payloads or parcels of a closed session were dropped.
pub(crate) fn fenced(messages: u64) {
    record::fenced_messages(FenceSource::Cluster, messages);
}

/// A handshake ended with a refusal by us.
pub(crate) fn refused(refusal: Refusal) {
    counter!(names::CLUSTER_REFUSED, "reason" => refusal.as_str()).increment(1);
}

/// What happens to a session.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SessionEvent {
    Up,
    Down,
}

/// A session came up or went down.
pub(crate) fn session(node: &NodeName, event: SessionEvent) {
    sessions(node, event, 1);
}

fn sessions(node: &NodeName, event: SessionEvent, count: u64) {
    let event = match event {
        SessionEvent::Up => "up",
        SessionEvent::Down => "down",
    };
    counter!(names::CLUSTER_SESSIONS, "peer" => node.to_string(), "event" => event)
        .increment(count);
}

/// Bytes that wait, over all peers.
pub(crate) fn queued(send_bytes: u64, receive_bytes: u64) {
    record::queued_bytes(Queue::ClusterSend, send_bytes);
    record::queued_bytes(Queue::ClusterReceive, receive_bytes);
}

/// How a peer stands: 1 for the state that it is in, 0 for the others.
pub(crate) fn peer(node: &NodeName, state: PeerState, silence_seconds: Option<f64>) {
    for each in STATES {
        let value = if each == state { 1.0 } else { 0.0 };
        gauge!(names::PEER_STATE, "peer" => node.to_string(), "state" => each.as_str()).set(value);
    }
    if let Some(seconds) = silence_seconds {
        gauge!(names::HEARTBEAT_AGE, "peer" => node.to_string()).set(seconds);
    }
}
