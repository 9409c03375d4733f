//! Keeping the node processes running, and ending them in order.
//!
//! One task per node: start, watch, start again (see [`restart`](super::restart)). Gateways are stopped first, and the
//! other hosts only when they are gone, so that requests in flight find their engines until their gateway's grace ends.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::local::{LocalNode, length, tail};
use super::plan::{NodePlan, Place, Plan};
use super::remote::{RemoteNode, Ssh};
use super::restart::History;

/// Events that wait for the person's terminal; the tasks wait when it is slower.
const MAX_EVENTS: usize = 64;
/// Log lines shown with the end of a node.
const TAIL_LINES: usize = 12;

/// How far the stopping has come; it only ever goes forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Run,
    StopGateways,
    StopAll,
    KillAll,
}

/// What the supervision has to tell.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A node process runs; `text` says where.
    Started { node: String, text: String },
    /// A node process ended although nobody asked it to, or could not be started.
    Ended {
        node: String,
        how: String,
        last_lines: Vec<String>,
        next: Next,
    },
    /// Anything else worth a line.
    Note { node: String, text: String },
}

/// What follows the end of a node process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It is started again after this time.
    Restart(Duration),
    /// It ended too often.
    GiveUp,
}

/// What every node's task needs.
pub struct Means {
    pub plan: Plan,
    /// The `understudy` program for the nodes of this machine.
    pub binary: PathBuf,
    pub ssh: Ssh,
}

/// The supervision of all nodes of a cluster.
pub struct Supervisor {
    stage: watch::Sender<Stage>,
    events: mpsc::Receiver<Event>,
    gateways: JoinSet<()>,
    others: JoinSet<()>,
}

impl Supervisor {
    /// Starts every node.
    pub fn start(means: &Arc<Means>) -> Self {
        let (stage, _) = watch::channel(Stage::Run);
        let (sender, events) = mpsc::channel(MAX_EVENTS);
        let (mut gateways, mut others) = (JoinSet::new(), JoinSet::new());
        for node in &means.plan.nodes {
            let (tasks, stop_at) = if node.is_gateway {
                (&mut gateways, Stage::StopGateways)
            } else {
                (&mut others, Stage::StopAll)
            };
            let keeper = Keeper {
                means: Arc::clone(means),
                node: node.clone(),
                stage: stage.subscribe(),
                stop_at,
                events: sender.clone(),
                begins: [0; 2],
            };
            tasks.spawn(keeper.run());
        }
        Self {
            stage,
            events,
            gateways,
            others,
        }
    }

    /// The next event; `None` when every node has been given up.
    pub async fn event(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Stops every node; when `hurry` is done, by SIGKILL. Returns when none is left.
    pub async fn stop(mut self, hurry: impl Future<Output = ()>, mut tell: impl FnMut(Event)) {
        self.stage.send_replace(Stage::StopGateways);
        let mut hurry = std::pin::pin!(hurry);
        let mut hurried = false;
        loop {
            tokio::select! {
                // None when the last task has ended: each holds a sender.
                event = self.events.recv() => match event {
                    Some(event) => tell(event),
                    None => return,
                },
                ended = self.gateways.join_next(), if !self.gateways.is_empty() => drop(ended),
                ended = self.others.join_next(), if !self.others.is_empty() => drop(ended),
                () = &mut hurry, if !hurried => {
                    hurried = true;
                    self.stage.send_replace(Stage::KillAll);
                }
            }
            if self.gateways.is_empty() {
                self.stage
                    .send_if_modified(|stage| advance(stage, Stage::StopAll));
            }
        }
    }
}

fn advance(stage: &mut Stage, to: Stage) -> bool {
    let forwards = *stage < to;
    *stage = to.max(*stage);
    forwards
}

/// The task of one node.
struct Keeper {
    means: Arc<Means>,
    node: NodePlan,
    stage: watch::Receiver<Stage>,
    stop_at: Stage,
    events: mpsc::Sender<Event>,
    /// Lengths of its output and its log when it was last started: what stands before them is of earlier runs.
    begins: [u64; 2],
}

enum Running {
    Here(LocalNode),
    There(RemoteNode),
}

impl Keeper {
    async fn run(mut self) {
        let mut history = History::default();
        while !self.is_told_to_stop() {
            let how = match self.start().await {
                Ok(running) => match self.watch(running).await {
                    Some(how) => how,
                    None => return,
                },
                Err(error) => error,
            };
            let wait = history.after_end(Instant::now(), fastrand::f64());
            let next = wait.map_or(Next::GiveUp, Next::Restart);
            let last_lines = self.last_lines().await;
            self.tell(Event::Ended {
                node: self.node.name.clone(),
                how,
                last_lines,
                next,
            })
            .await;
            let Some(wait) = wait else { return };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = reached(&mut self.stage, self.stop_at) => {}
            }
        }
    }

    /// Not cut short by a stop: a node that has just started elsewhere must be known to be stopped.
    async fn start(&mut self) -> Result<Running, String> {
        self.begins = self.files().map(|file| length(&file));
        let running = match &self.node.place {
            Place::Here => LocalNode::start(&self.means.plan, &self.node, &self.means.binary)
                .map(Running::Here)
                .map_err(|error| error.to_string())?,
            Place::There { destination, dir } => RemoteNode::start(
                &self.means.ssh,
                &self.means.plan,
                &self.node,
                destination,
                dir,
            )
            .await
            .map(Running::There)?,
        };
        let text = match &running {
            Running::Here(node) => format!("started (pid {})", node.pid()),
            Running::There(node) => {
                format!("started on {} (pid {})", node.destination(), node.pid())
            }
        };
        self.tell(Event::Started {
            node: self.node.name.clone(),
            text,
        })
        .await;
        Ok(running)
    }

    /// Until it ends by itself (then how), or has been stopped.
    async fn watch(&mut self, mut running: Running) -> Option<String> {
        let name = self.node.name.clone();
        let events = self.events.clone();
        let note = |text| {
            let event = Event::Note {
                node: name.clone(),
                text,
            };
            // A note that finds the queue full is left out: it says nothing that a later one does not.
            let _ = events.try_send(event);
        };
        let ended = async {
            match &mut running {
                Running::Here(node) => node.ended().await,
                Running::There(node) => node.ended(note).await,
            }
        };
        tokio::select! {
            how = ended => return Some(how),
            () = reached(&mut self.stage, self.stop_at) => {}
        }
        let grace = self.means.plan.grace();
        let hurry = reached(&mut self.stage, Stage::KillAll);
        let graceful = match running {
            Running::Here(node) => node.stop(grace, hurry).await,
            Running::There(node) => node.stop(grace, hurry).await,
        };
        let text = if graceful {
            "stopped"
        } else {
            "did not stop in time and was killed"
        };
        self.tell(Event::Note {
            node: self.node.name.clone(),
            text: text.to_owned(),
        })
        .await;
        None
    }

    async fn last_lines(&self) -> Vec<String> {
        match &self.node.place {
            Place::Here => {
                let [output, log] = self.files();
                let lines = tail(&output, self.begins[0], TAIL_LINES);
                if lines.is_empty() {
                    tail(&log, self.begins[1], TAIL_LINES)
                } else {
                    lines
                }
            }
            Place::There { destination, dir } => {
                super::remote::tail(
                    &self.means.ssh,
                    &self.means.plan,
                    &self.node,
                    destination,
                    dir,
                    TAIL_LINES,
                )
                .await
            }
        }
    }

    fn files(&self) -> [PathBuf; 2] {
        [
            self.means.plan.output_file(&self.node),
            self.means.plan.log_file(&self.node),
        ]
    }

    fn is_told_to_stop(&self) -> bool {
        *self.stage.borrow() >= self.stop_at
    }

    async fn tell(&self, event: Event) {
        // The receiver goes only after the last task.
        let _ = self.events.send(event).await;
    }
}

/// Waits for a stage. A supervisor that is gone wants everything stopped at once.
async fn reached(stage: &mut watch::Receiver<Stage>, at: Stage) {
    let _ = stage.wait_for(|stage| *stage >= at).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopping_only_goes_forwards() {
        let mut stage = Stage::StopGateways;
        assert!(advance(&mut stage, Stage::StopAll));
        stage = Stage::KillAll;
        assert!(!advance(&mut stage, Stage::StopAll));
        assert_eq!(stage, Stage::KillAll);
    }
}
