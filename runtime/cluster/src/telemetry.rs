//! The metrics of this layer, all in one place. Labels are bounded: configured node names and fixed words.

use metrics::{counter, gauge};

use crate::event::PeerState;
use crate::handshake::Refusal;
use crate::identity::NodeName;

const STATES: [PeerState; 4] = [
    PeerState::NeverSeen,
    PeerState::Alive,
    PeerState::Suspect,
    PeerState::Dead,
];

/// Payloads or parcels of a closed session were dropped.
pub(crate) fn fenced(messages: u64) {
    if messages > 0 {
        counter!("understudy_fenced_messages_total", "source" => "cluster").increment(messages);
    }
}

/// A handshake ended with a refusal by us.
pub(crate) fn refused(refusal: Refusal) {
    counter!("understudy_cluster_refused_total", "reason" => refusal.as_str()).increment(1);
}

/// A session came up or went down.
pub(crate) fn session(node: &NodeName, event: &'static str) {
    counter!("understudy_cluster_sessions_total", "peer" => node.to_string(), "event" => event)
        .increment(1);
}

/// Bytes that wait, over all peers.
pub(crate) fn queued(send_bytes: u64, receive_bytes: u64) {
    gauge!("understudy_queued_bytes", "queue" => "cluster_send").set(send_bytes as f64);
    gauge!("understudy_queued_bytes", "queue" => "cluster_receive").set(receive_bytes as f64);
}

/// How a peer stands: 1 for the state that it is in, 0 for the others.
pub(crate) fn peer(node: &NodeName, state: PeerState, silence_seconds: Option<f64>) {
    for each in STATES {
        let value = if each == state { 1.0 } else { 0.0 };
        gauge!("understudy_peer_state", "peer" => node.to_string(), "state" => each.as_str())
            .set(value);
    }
    if let Some(seconds) = silence_seconds {
        gauge!("understudy_heartbeat_age_seconds", "peer" => node.to_string()).set(seconds);
    }
}
