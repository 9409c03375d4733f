use ractor::{Actor, ActorProcessingErr};

use super::*;
use crate::cookie::Cookie;
use crate::event::PeerState;
use crate::identity::{NodeName, PeerAddress};

/// A peer's port that takes everything.
struct Port;

impl Actor for Port {
    type Msg = PortMessage;
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<PortMessage>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle(
        &self,
        _: ActorRef<PortMessage>,
        _: PortMessage,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

fn hub() -> Arc<Hub> {
    let name = |node| NodeName::new(node).unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let mut settings = ClusterSettings::new("t", name("a"), 1, listen, Cookie::generate());
    settings.peers = vec![PeerAddress::at(name("b"), listen)];
    Arc::new(Hub::new(&settings))
}

async fn admitted(hub: &Arc<Hub>) -> Arc<Session> {
    let agreed = Agreed {
        peer: PeerId::new(NodeName::new("b").unwrap(), 5),
        session: 7,
        config_differs: false,
    };
    hub.admit(&agreed, Breaker::of_nothing()).await.unwrap()
}

#[tokio::test]
async fn a_session_that_is_ready_opens() {
    let hub = hub();
    let session = admitted(&hub).await;
    let (port, _) = Actor::spawn(None, Port, ()).await.unwrap();
    hub.session_ready(session.id, |_| Ok(port));
    assert_eq!(session.phase(), Phase::Open);
    assert_eq!(hub.peers()[0].state, PeerState::Alive);
}

/// It would never hear the goodbye that the open ones were told.
#[tokio::test]
async fn a_session_that_is_ready_after_the_goodbye_is_closed() {
    let hub = hub();
    let session = admitted(&hub).await;
    hub.leave();
    let (port, _) = Actor::spawn(None, Port, ()).await.unwrap();
    hub.session_ready(session.id, |_| Ok(port));
    assert_eq!(session.phase(), Phase::Closed);
    assert_eq!(hub.peers()[0].state, PeerState::NeverSeen);
    assert!(hub.is_flushed());
}
