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

use super::detach;
use super::last_words::LastWords;
use super::local::LocalNode;
use super::plan::{NodePlan, Place, Plan};
use super::remote::{HURRIED_TIMEOUT, RemoteNode, Site};
use super::restart::{BACKOFF_MAX, History, StartError};
use super::rotate;
use super::ssh::Ssh;

/// Events that wait for the person's terminal; the tasks wait when it is slower.
const MAX_EVENTS: usize = 64;

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
    /// A node process may go on running, because the machine that it runs on did not confirm its end.
    NotStopped {
        node: String,
        destination: String,
        why: String,
    },
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
    /// Nodes that may go on running.
    not_stopped: Vec<String>,
    /// Keeps the logs small, for as long as this lives.
    _janitor: JoinSet<()>,
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
                last_words: LastWords::from_now(&means.plan, node),
                in_doubt: None,
            };
            tasks.spawn(keeper.run());
        }
        let mut janitor = JoinSet::new();
        janitor.spawn(rotate::keep_small(logs(&means.plan)));
        Self {
            stage,
            events,
            gateways,
            others,
            not_stopped: Vec::new(),
            _janitor: janitor,
        }
    }

    /// The next event; `None` when every node has been given up.
    pub async fn event(&mut self) -> Option<Event> {
        let event = self.events.recv().await?;
        self.remember(&event);
        Some(event)
    }

    fn remember(&mut self, event: &Event) {
        if let Event::NotStopped { node, .. } = event {
            self.not_stopped.push(node.clone());
        }
    }

    /// Stops every node; when `hurry` is done, by SIGKILL. Returns when none is left, with the names of those of which
    /// that is not known.
    pub async fn stop(
        mut self,
        hurry: impl Future<Output = ()>,
        mut tell: impl FnMut(Event),
    ) -> Vec<String> {
        self.stage.send_replace(Stage::StopGateways);
        let mut hurry = std::pin::pin!(hurry);
        let mut hurried = false;
        loop {
            tokio::select! {
                // None when the last task has ended: each holds a sender.
                event = self.events.recv() => match event {
                    Some(event) => {
                        self.remember(&event);
                        tell(event);
                    }
                    None => return self.not_stopped,
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

/// What the nodes of this machine and a detached launcher write.
fn logs(plan: &Plan) -> Vec<PathBuf> {
    let here = plan.nodes.iter().filter(|node| node.place == Place::Here);
    let mut logs: Vec<PathBuf> = here
        .flat_map(|node| [plan.output_file(node), plan.log_file(node)])
        .collect();
    logs.push(detach::output_file(plan.run_dir()));
    logs.dedup();
    logs
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
    last_words: LastWords,
    /// Where it may run although its start failed.
    in_doubt: Option<Site>,
}

enum Running {
    Here(LocalNode),
    There(RemoteNode),
}

impl Keeper {
    async fn run(mut self) {
        self.keep().await;
        // The last word on a start that could not be undone when it failed.
        if let Some(site) = self.in_doubt.take()
            && let Err(why) = site.undo(HURRIED_TIMEOUT).await
        {
            self.tell_not_stopped(site.destination, why).await;
        }
    }

    async fn keep(&mut self) {
        let mut history = History::default();
        let mut told = String::new();
        while !self.is_told_to_stop() {
            let mut may_pass = false;
            let how = match self.start().await {
                Ok(None) => return,
                Ok(Some(running)) => match self.watch(running).await {
                    Some(how) => how,
                    None => return,
                },
                Err(error) => {
                    may_pass = error.may_pass;
                    error.why
                }
            };
            let wait = if may_pass {
                Some(BACKOFF_MAX)
            } else {
                history.after_end(Instant::now(), fastrand::f64())
            };
            // A disk that stays full is told once.
            if !may_pass || told != how {
                told.clone_from(&how);
                self.tell_end(how, wait.map_or(Next::GiveUp, Next::Restart))
                    .await;
            }
            let Some(wait) = wait else { return };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = reached(&mut self.stage, self.stop_at) => {}
            }
        }
    }

    async fn tell_end(&mut self, how: String, next: Next) {
        let means = Arc::clone(&self.means);
        let last_lines = tokio::select! {
            lines = self.last_words.lines(&means.ssh, &means.plan, &self.node) => lines,
            // Whoever stops a cluster does not wait for that.
            () = reached(&mut self.stage, self.stop_at) => Vec::new(),
        };
        self.tell(Event::Ended {
            node: self.node.name.clone(),
            how,
            last_lines,
            next,
        })
        .await;
    }

    /// `None` when it has been told to stop, and nothing runs or what may run has been told.
    ///
    /// Once a machine has been asked to start the node, a stop does not cut that short: a node that has just started
    /// elsewhere must be known to be stopped. Only the haste of a second signal does, and then the start is undone.
    async fn start(&mut self) -> Result<Option<Running>, StartError> {
        let means = Arc::clone(&self.means);
        let plan = &means.plan;
        self.last_words = LastWords::from_now(plan, &self.node);
        let running = match &self.node.place {
            Place::Here => LocalNode::start(plan, &self.node, &means.binary)
                .map(Running::Here)
                .map_err(|error| StartError::from_io(&error))?,
            Place::There { destination, dir } => {
                let site = tokio::select! {
                    found = Site::find(&means.ssh, plan, &self.node, destination, dir) => found.map_err(StartError::new)?,
                    () = reached(&mut self.stage, self.stop_at) => return Ok(None),
                };
                let started = tokio::select! {
                    started = site.start(plan) => started,
                    () = reached(&mut self.stage, Stage::KillAll) => {
                        self.in_doubt = Some(site);
                        return Ok(None);
                    }
                };
                let in_doubt = started.as_ref().is_err_and(|error| error.in_doubt);
                self.in_doubt = in_doubt.then_some(site);
                Running::There(started?)
            }
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
        Ok(Some(running))
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
        let stopped = match running {
            Running::Here(node) => Ok(node.stop(grace, hurry).await),
            Running::There(node) => {
                let destination = node.destination().to_owned();
                let stopped = node.stop(grace, hurry).await;
                stopped.map_err(|why| (destination, why))
            }
        };
        let text = match stopped {
            Ok(true) => "stopped",
            Ok(false) => "did not stop in time and was killed",
            Err((destination, why)) => {
                self.tell_not_stopped(destination, why).await;
                return None;
            }
        };
        self.tell(Event::Note {
            node: self.node.name.clone(),
            text: text.to_owned(),
        })
        .await;
        None
    }

    async fn tell_not_stopped(&self, destination: String, why: String) {
        self.tell(Event::NotStopped {
            node: self.node.name.clone(),
            destination,
            why,
        })
        .await;
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
