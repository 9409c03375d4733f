//! An attempt on its way to a worker.
//!
//! Invariant: an offer is taken or refused, never forgotten. A worker that ends drops its mailbox, and with it whatever
//! was on its way: dropping an offer tells the gateway, which would otherwise wait for tokens until its deadline.

use understudy_cluster::PeerId;
use understudy_engine_core::frame::StartAttempt;

use crate::peer::{Links, PeerMessage, Refusal};

/// See the module.
pub struct Offer {
    links: Links,
    gateway: PeerId,
    start: Option<StartAttempt>,
}

impl Offer {
    pub fn new(links: Links, gateway: PeerId, start: StartAttempt) -> Self {
        Self {
            links,
            gateway,
            start: Some(start),
        }
    }

    /// From here on whoever took it answers for it.
    pub fn take(mut self) -> Option<(PeerId, StartAttempt)> {
        Some((self.gateway.clone(), self.start.take()?))
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        if let Some(start) = self.start.take() {
            let message = PeerMessage::Refused {
                attempt: start.attempt,
                refusal: Refusal::NotReady,
            };
            // A gateway that cannot hear this is down, and starts over when it is back.
            self.links.send(&self.gateway, message).ok();
        }
    }
}

impl std::fmt::Debug for Offer {
    /// Prompts are never shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offer")
            .field("gateway", &self.gateway)
            .finish_non_exhaustive()
    }
}
