//! The thread that everything of this layer runs on.
//!
//! It has an async runtime of its own: work that blocks the rest of the process (a slow disk, a long computation in
//! a task) delays neither heartbeats nor the detector, and a peer is not declared dead because *we* were busy.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::bridge::Bridge;
use crate::cluster::StartError;
use crate::door::Door;
use crate::event::ClusterEvent;
use crate::handshake::{Local, dials};
use crate::hub::Hub;
use crate::settings::{ClusterSettings, SHUTDOWN_FLUSH};
use crate::transport::LISTEN_BACKLOG;

/// Least read-idle limit; the detector must always be faster.
const MIN_IDLE_LIMIT: Duration = Duration::from_secs(5);

/// The running thread. Dropping it closes every session without a goodbye.
#[derive(Debug)]
pub(crate) struct NodeThread {
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
    thread: JoinHandle<()>,
}

impl NodeThread {
    /// Starts the thread; returns when it listens.
    pub(crate) async fn start(
        settings: ClusterSettings,
        hub: Arc<Hub>,
        events: mpsc::Sender<ClusterEvent>,
    ) -> Result<(Self, SocketAddr), StartError> {
        let (stop, stopped) = oneshot::channel();
        let (started, start) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let failed = |error: io::Error| {
            StartError::Runtime(format!("cannot start the cluster thread: {error}"))
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let body = move || {
            runtime.block_on(run(settings, hub, events, started, stopped));
            // Tasks and actors of this runtime end here.
            drop(runtime);
            let _ = end.send(());
        };
        let thread = std::thread::Builder::new()
            .name("cluster".to_owned())
            .spawn(body)
            .map_err(failed)?;
        let ended_early = |_| {
            Err(StartError::Runtime(
                "the cluster thread ended while it started".to_owned(),
            ))
        };
        let local = start.await.unwrap_or_else(ended_early)?;
        Ok((
            Self {
                stop,
                ended,
                thread,
            },
            local,
        ))
    }

    /// Says goodbye to the peers and ends the thread.
    pub(crate) async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.ended.await;
        if self.thread.join().is_err() {
            tracing::error!("the cluster thread panicked");
        }
    }
}

async fn run(
    settings: ClusterSettings,
    hub: Arc<Hub>,
    events: mpsc::Sender<ClusterEvent>,
    started: oneshot::Sender<Result<SocketAddr, StartError>>,
    stopped: oneshot::Receiver<()>,
) {
    let (door, listener, local) = match open_door(&settings, &hub).await {
        Ok(open) => open,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    tracing::info!(node = %hub.me, address = %local, peers = settings.peers.len(), "cluster layer listens");
    let mut tasks = JoinSet::new();
    tasks.spawn(door.clone().listen(listener));
    tasks.spawn(detect(hub.clone()));
    for peer in settings
        .peers
        .iter()
        .filter(|peer| dials(&settings.node, &peer.node))
    {
        tasks.spawn(door.clone().dial(peer.clone()));
    }
    let deliver = tokio::spawn(deliver(hub.clone(), events));
    let consumer_gone = deliver.abort_handle();
    if started.send(Ok(local)).is_ok() {
        tokio::select! {
            goodbye = stopped => {
                if goodbye.is_ok() {
                    flush(&hub).await;
                }
            }
            _ = deliver => tracing::warn!("nobody listens to cluster events: this node leaves the cluster"),
        }
    }
    hub.close_all();
    tasks.shutdown().await;
    consumer_gone.abort();
    door.bridge.stop().await;
}

async fn open_door(
    settings: &ClusterSettings,
    hub: &Arc<Hub>,
) -> Result<(Arc<Door>, TcpListener, SocketAddr), StartError> {
    let listen = settings.listen;
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => StartError::PortInUse(listen),
        _ => StartError::Listen {
            address: listen,
            source,
        },
    };
    let listener = bind(listen).map_err(refused)?;
    let local = listener.local_addr().map_err(refused)?;
    let bridge = Bridge::start(hub, &hub.me, &settings.cookie)
        .await
        .map_err(StartError::Runtime)?;
    let door = Door {
        hub: hub.clone(),
        bridge,
        local: Local::new(settings),
        limits: settings.limits,
        idle_limit: MIN_IDLE_LIMIT.max(settings.detector.dead_after * 5),
    };
    Ok((Arc::new(door), listener, local))
}

/// Listens; a node that was killed a moment ago does not hold its port.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(LISTEN_BACKLOG)
}

/// Lets the detector look at the clock whenever it wants to.
async fn detect(hub: Arc<Hub>) {
    loop {
        let due = hub.tick();
        sleep_until(Instant::from_std(hub.clock.instant(due))).await;
    }
}

/// Gives the consumer one event after the other; ends when the consumer is gone.
async fn deliver(hub: Arc<Hub>, events: mpsc::Sender<ClusterEvent>) {
    while let Ok(permit) = events.reserve().await {
        // The permit comes first: what is delivered is decided at the moment of delivery, so that nothing of a
        // closed session can wait at the consumer's door behind the news that it is closed.
        let event = loop {
            match hub.next_event() {
                Some(event) => break event,
                None => tokio::select! {
                    () = hub.news.notified() => {}
                    () = events.closed() => return,
                },
            }
        };
        permit.send(event);
    }
}

/// Says goodbye and waits until the peers have taken everything.
async fn flush(hub: &Hub) {
    hub.leave();
    let flushed = async {
        loop {
            let progress = hub.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            if hub.is_flushed() {
                return;
            }
            progress.await;
        }
    };
    if timeout(SHUTDOWN_FLUSH, flushed).await.is_err() {
        tracing::warn!("some peers did not take everything before this node left");
    }
}
