//! The gateways of a client, and the connection to each that is in use.
//!
//! Invariant: to one gateway there is at most one open connection and one attempt at a time; whoever asks while an
//! attempt runs shares its outcome, so that many streams that recover at once dial once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::dial::dial;
use crate::error::{Error, LostReason};
use crate::link::Link;
use crate::options::Options;

pub(crate) struct Pool {
    pub options: Options,
    gateways: Vec<Gateway>,
    /// Where new requests go: the gateway that answered last.
    preferred: AtomicUsize,
}

struct Gateway {
    address: String,
    slot: Mutex<Slot>,
}

#[derive(Default)]
struct Slot {
    link: Option<Arc<Link>>,
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
                slot: Mutex::default(),
            })
            .collect();
        Self {
            options,
            gateways,
            preferred: AtomicUsize::new(0),
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

    /// A connection to one gateway, opened if there is none. Ends within twice `connect_timeout`.
    pub async fn link(&self, gateway: usize) -> Result<Arc<Link>, Error> {
        let asked = Instant::now();
        let Gateway { address, slot } = &self.gateways[gateway];
        let mut slot = slot.lock().await;
        if let Some(link) = slot.link.as_ref().filter(|link| link.is_open()) {
            return Ok(link.clone());
        }
        if let Some((at, reason)) = &slot.failure
            && *at >= asked
        {
            return Err(unreachable(address, reason.clone()));
        }
        slot.link = None;
        let dialing = slot
            .dialing
            .get_or_insert_with(|| tokio::spawn(start(address.clone(), self.options.clone())));
        let outcome = dialing
            .await
            .unwrap_or_else(|error| Err(LostReason::Io(error.to_string())));
        slot.dialing = None;
        match outcome {
            Ok(link) => {
                slot.link = Some(link.clone());
                Ok(link)
            }
            Err(reason) => {
                slot.failure = Some((Instant::now(), reason.clone()));
                Err(unreachable(address, reason))
            }
        }
    }

    /// A connection to the preferred gateway or, if it cannot be reached, to the next that can. One round.
    pub async fn any_link(&self) -> Result<Arc<Link>, Error> {
        let first = self.preferred();
        let mut last = Error::NoAddress;
        for step in 0..self.len() {
            let gateway = (first + step) % self.len();
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
}

async fn start(address: String, options: Options) -> Result<Arc<Link>, LostReason> {
    let greeted = dial(&address, &options).await?;
    Ok(Link::start(address, greeted, &options))
}

fn unreachable(address: &str, reason: LostReason) -> Error {
    Error::Connect {
        address: address.to_owned(),
        reason,
    }
}
