//! The gateways of a client, and the connections to each that are in use.
//!
//! A gateway takes `max_streams` streams on a connection. Where all connections to it are full, a further one is opened, up
//! to `connections_per_gateway`; beyond that a stream waits until [`Pool::freed`] says that another has ended.
//!
//! Invariant: to one gateway there is at most one attempt at a time; whoever asks while an attempt runs shares its
//! outcome, so that many streams that recover at once dial once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use understudy_protocol::{ErrorBody, ErrorCode};

use crate::dial::dial;
use crate::error::{Error, LostReason};
use crate::link::{Link, Reservation};
use crate::options::Options;

pub(crate) struct Pool {
    pub options: Options,
    gateways: Vec<Gateway>,
    /// Where new requests go: the gateway that answered last.
    preferred: AtomicUsize,
    /// Wakes one of those who wait for a stream to end.
    freed: Arc<Notify>,
}

struct Gateway {
    address: String,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    links: Vec<Arc<Link>>,
    /// An attempt that goes on even when the caller who began it stops waiting.
    dialing: Option<JoinHandle<Result<Arc<Link>, LostReason>>>,
    /// When the last attempt failed, and why.
    failure: Option<(Instant, LostReason)>,
}

impl Pool {
    pub fn new(addresses: Vec<String>, options: Options) -> Self {
        let gateways = addresses
            .into_iter()
            .map(|address| Gateway {
                address,
                connections: Mutex::default(),
            })
            .collect();
        Self {
            options,
            gateways,
            preferred: AtomicUsize::new(0),
            freed: Arc::default(),
        }
    }

    /// Number of gateways, at least 1.
    pub fn len(&self) -> usize {
        self.gateways.len()
    }

    pub fn preferred(&self) -> usize {
        self.preferred.load(Ordering::Relaxed)
    }

    pub fn prefer(&self, gateway: usize) {
        self.preferred.store(gateway, Ordering::Relaxed);
    }

    /// Until a stream has ended, possibly since the last time that somebody asked.
    pub async fn freed(&self) {
        self.freed.notified().await;
    }

    /// A connection to one gateway, opened if there is none. Ends within twice `connect_timeout`.
    pub async fn link(&self, gateway: usize) -> Result<Arc<Link>, Error> {
        let asked = Instant::now();
        let Gateway {
            address,
            connections,
        } = &self.gateways[gateway];
        let mut connections = connections.lock().await;
        match connections.first_open() {
            Some(link) => Ok(link),
            None => self.further_link(address, &mut connections, asked).await,
        }
    }

    /// A place for a stream at one gateway, on a further connection where the others are full; `None` where no more
    /// connections may be opened. Ends within twice `connect_timeout`.
    pub async fn reserve(&self, gateway: usize) -> Result<Option<Reservation>, Error> {
        let asked = Instant::now();
        let Gateway {
            address,
            connections,
        } = &self.gateways[gateway];
        let mut connections = connections.lock().await;
        connections.first_open();
        if let Some(reservation) = connections.links.iter().find_map(Link::reserve) {
            return Ok(Some(reservation));
        }
        if connections.links.len() >= self.options.connections_per_gateway as usize {
            return Ok(None);
        }
        let link = self.further_link(address, &mut connections, asked).await?;
        Ok(link.reserve())
    }

    /// What to say of a gateway that [`reserve`](Self::reserve) has found full, as it would say it of one connection.
    pub fn full(&self, gateway: usize) -> Error {
        let address = &self.gateways[gateway].address;
        let max = self.options.connections_per_gateway;
        let message = format!(
            "{max} connections to {address} have as many streams in flight as the gateway takes; wait for some to end, or \
             raise connections_per_gateway"
        );
        Error::Server(ErrorBody::new(ErrorCode::Overloaded, message))
    }

    async fn further_link(
        &self,
        address: &str,
        connections: &mut Connections,
        asked: Instant,
    ) -> Result<Arc<Link>, Error> {
        if let Some((at, reason)) = &connections.failure
            && *at >= asked
        {
            return Err(unreachable(address, reason.clone()));
        }
        let dialing = connections.dialing.get_or_insert_with(|| {
            tokio::spawn(start(
                address.to_owned(),
                self.options.clone(),
                self.freed.clone(),
            ))
        });
        let outcome = dialing
            .await
            .unwrap_or_else(|error| Err(LostReason::Io(error.to_string())));
        connections.dialing = None;
        match outcome {
            Ok(link) => {
                connections.links.push(link.clone());
                Ok(link)
            }
            Err(reason) => {
                connections.failure = Some((Instant::now(), reason.clone()));
                Err(unreachable(address, reason))
            }
        }
    }

    /// A connection to the preferred gateway or, if it cannot be reached, to the next that can. One round.
    pub async fn any_link(&self) -> Result<Arc<Link>, Error> {
        let mut last = Error::NoAddress;
        for gateway in self.by_preference() {
            match self.link(gateway).await {
                Ok(link) => {
                    self.prefer(gateway);
                    return Ok(link);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Every gateway once, the preferred one first.
    pub fn by_preference(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, len) = (self.preferred(), self.len());
        (0..len).map(move |step| (first + step) % len)
    }
}

impl Connections {
    /// Forgets connections that take no more streams, and gives the first of the others.
    fn first_open(&mut self) -> Option<Arc<Link>> {
        self.links.retain(|link| link.is_open());
        self.links.first().cloned()
    }
}

async fn start(
    address: String,
    options: Options,
    freed: Arc<Notify>,
) -> Result<Arc<Link>, LostReason> {
    let greeted = dial(&address, &options).await?;
    Ok(Link::start(address, greeted, &options, freed))
}

fn unreachable(address: &str, reason: LostReason) -> Error {
    Error::Connect {
        address: address.to_owned(),
        reason,
    }
}
