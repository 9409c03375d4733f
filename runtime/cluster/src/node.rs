//! The thread that everything of this layer runs on.
//!
//! It has an async runtime of its own: work that blocks the rest of the process (a slow disk, a long computation in
//! a task) delays neither heartbeats nor the detector, and a peer is not declared dead because *we* were busy.
//!
//! Invariant: all parts of this layer run, or the thread ends, and with it the stream of events. A layer without its
//! detector or its listener would look alive to this node while nobody else can see it.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{self, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

use crate::bridge::{Bridge, Ends};
use crate::cluster::StartError;
use crate::door::Door;
use crate::event::ClusterEvent;
use crate::handshake::{Local, dials};
use crate::hub::Hub;
use crate::settings::{ClusterSettings, SHUTDOWN_FLUSH};
use crate::transport::{LISTEN_BACKLOG, Patience};

/// Least read-idle limit; the detector must always be faster.
const MIN_IDLE_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for blocking work of this runtime when it ends.
const RUNTIME_END: Duration = Duration::from_millis(100);

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
            end_runtime(runtime);
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
    let (door, ends, listener, local) = match open_door(&settings, &hub).await {
        Ok(open) => open,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    tracing::info!(me = %hub.me, address = %local, peers = settings.peers.len(), "cluster layer listens");
    let mut parts = Parts::default();
    parts.spawn("the listener", door.clone().listen(listener));
    parts.spawn("the failure detector", detect(hub.clone()));
    for peer in settings
        .others()
        .filter(|peer| dials(&settings.node, &peer.node))
    {
        parts.spawn("a dialer", door.clone().dial(peer.clone()));
    }
    for (name, end) in ends {
        parts.spawn(name, async { drop(end.await) });
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
            end = parts.first_end() => {
                tracing::error!(part = end.part, panicked = end.panicked, "a part of the cluster layer has ended: this node leaves the cluster");
            }
        }
    }
    hub.close_all();
    parts.tasks.shutdown().await;
    consumer_gone.abort();
    door.bridge.stop().await;
}

async fn open_door(
    settings: &ClusterSettings,
    hub: &Arc<Hub>,
) -> Result<(Arc<Door>, Ends, TcpListener, SocketAddr), StartError> {
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
    let (bridge, ends) = Bridge::start(hub, &hub.me, &settings.cookie)
        .await
        .map_err(StartError::Runtime)?;
    let door = Door {
        hub: hub.clone(),
        bridge,
        local: Local::new(settings),
        limits: settings.limits,
        idle_limit: MIN_IDLE_LIMIT.max(settings.detector.dead_after * 5),
        patience: Patience::beyond(settings.detector.dead_after),
        quiet: Mutex::default(),
    };
    Ok((Arc::new(door), ends, listener, local))
}

/// Ends the tasks and actors of the runtime. A look-up of a name may hang in the system's resolver for minutes; it is left
/// behind.
fn end_runtime(runtime: Runtime) {
    runtime.shutdown_timeout(RUNTIME_END);
}

/// The tasks that must run as long as the layer does.
#[derive(Default)]
struct Parts {
    tasks: JoinSet<()>,
    names: HashMap<task::Id, &'static str>,
}

/// A part that ended, which none should.
#[derive(Debug, PartialEq, Eq)]
struct PartEnd {
    part: &'static str,
    /// What it said is not told: the message of a panic may quote what it worked on.
    panicked: bool,
}

impl Parts {
    fn spawn(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(part).id();
        self.names.insert(id, name);
    }

    /// Waits until one of them ends; for ever if there is none.
    async fn first_end(&mut self) -> PartEnd {
        let (id, panicked) = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => (id, false),
            Some(Err(error)) => (error.id(), error.is_panic()),
            None => std::future::pending().await,
        };
        PartEnd {
            part: self.names.get(&id).copied().unwrap_or("unknown"),
            panicked,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_any_part_is_noticed_with_its_name() {
        let waits = || std::future::pending::<()>();
        let mut parts = Parts::default();
        parts.spawn("waits", waits());
        parts.spawn("returns", async {});
        let end = parts.first_end().await;
        assert_eq!((end.part, end.panicked), ("returns", false));

        let mut parts = Parts::default();
        parts.spawn("waits", waits());
        parts.spawn("panics", async { panic!("as it should") });
        let end = parts.first_end().await;
        assert_eq!((end.part, end.panicked), ("panics", true));

        let mut parts = Parts::default();
        parts.spawn("waits", waits());
        let ended = timeout(Duration::from_millis(50), parts.first_end()).await;
        assert!(ended.is_err(), "nothing has ended");
    }

    #[test]
    fn a_name_service_that_hangs_does_not_hold_up_the_end() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (release, hangs) = std::sync::mpsc::channel::<()>();
        let (ended, wait) = std::sync::mpsc::channel();
        let (begun, began) = std::sync::mpsc::channel();
        runtime.spawn_blocking(move || {
            begun.send(()).unwrap();
            let _ = hangs.recv();
        });
        began.recv().unwrap();
        std::thread::spawn(move || {
            end_runtime(runtime);
            ended.send(()).unwrap();
        });
        let in_time = wait.recv_timeout(Duration::from_secs(10));
        drop(release);
        in_time.expect("it ended while the look-up hung");
    }
}
