//! An attempt on its way to a worker.
//!
//! Invariant: an offer is taken or refused, never forgotten. A worker that ends drops its mailbox, and with it whatever
//! was on its way: dropping an offer tells the gateway, which would otherwise wait for tokens until its deadline.

use understudy_cluster::PeerId;
use understudy_engine_core::frame::{AttemptId, StartAttempt};

use crate::peer::{Links, PeerMessage, Refusal};

/// See the module.
pub struct Offer {
    answer: Answer,
    start: StartAttempt,
}

/// What the gateway waits for as long as nobody has taken the offer.
struct Answer {
    links: Links,
    gateway: PeerId,
    attempt: AttemptId,
    taken: bool,
}

impl Offer {
    pub fn new(links: Links, gateway: PeerId, start: StartAttempt) -> Self {
        let answer = Answer {
            links,
            gateway,
            attempt: start.attempt,
            taken: false,
        };
        Self { answer, start }
    }

    /// From here on whoever took it answers for it.
    pub fn take(mut self) -> (PeerId, StartAttempt) {
        self.answer.taken = true;
        (self.answer.gateway.clone(), self.start)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.taken {
            let message = PeerMessage::Refused {
                attempt: self.attempt,
                refusal: Refusal::NotReady,
            };
            self.links.tell(&self.gateway, message);
        }
    }
}

impl std::fmt::Debug for Offer {
    /// Prompts are never shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offer")
            .field("gateway", &self.answer.gateway)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::LossCause;
    use crate::peer::testing::{FakeNetwork, start};

    fn offer(network: &FakeNetwork) -> Offer {
        Offer::new(network.links(), network.peer(), start(7, 3))
    }

    #[test]
    fn an_offer_that_nobody_takes_is_refused() {
        let network = FakeNetwork::new();
        drop(offer(&network));
        let attempt = start(7, 3).attempt;
        let refusal = Refusal::NotReady;
        assert_eq!(network.sent(), [PeerMessage::Refused { attempt, refusal }]);
        let (gateway, taken) = offer(&network).take();
        assert_eq!((gateway, taken), (network.peer(), start(7, 3)));
        assert_eq!(network.sent(), []);
    }

    #[test]
    fn a_refusal_that_the_gateway_has_no_room_for_is_made_up_for() {
        let network = FakeNetwork::new();
        network.fill();
        drop(offer(&network));
        network.links().tell_owed();
        assert_eq!(network.sent(), []);
        network.drain();
        network.links().tell_owed();
        let attempts = vec![start(7, 3).attempt];
        let cause = LossCause::Gap;
        assert_eq!(network.sent(), [PeerMessage::Lost { attempts, cause }]);
        network.links().tell_owed();
        assert_eq!(network.sent(), [], "once");
    }
}
