//! Driving a run: starts requests as the pace says, follows each, and sums up.
//!
//! One loop owns the record; each request is a task that returns its outcome. Bounds: requests in flight by the pace,
//! and per request the gaps between its tokens.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use understudy_client::{Client, Event, Request};
use understudy_protocol::message::{Input, Sampling};

use super::super::exit::{Exit, Failure};
use super::super::interrupt::Interrupt;
use super::super::session;
use super::super::trouble::Trouble;
use super::args::Pace;
use super::plan::{Arrivals, Planned, Prompt, Workload};
use super::progress::Progress;
use super::record::{Course, Outcome, Record, client_error};

/// Everything that a run needs to know.
pub struct Run<'a> {
    pub clients: &'a [Client],
    pub workload: &'a Workload,
    pub model: Option<&'a str>,
    pub temperature: f32,
    pub ignore_eos: bool,
    pub deadline_ms: Option<u64>,
    pub pace: Pace,
    /// Number of the first request in the workload.
    pub first: u64,
    /// Requests to start at most.
    pub limit: Option<u64>,
    /// No request starts after this time.
    pub duration: Option<Duration>,
}

/// What came of it.
pub struct Done {
    pub record: Record,
    /// From the start to the last terminal event.
    pub wall: Duration,
    /// The signal that cut the run short.
    pub stopped: Option<Exit>,
}

/// A request's outcome, and how often its connection was lost; `None` where the run was stopped first.
type Followed = Option<(Outcome, u32)>;

impl Run<'_> {
    /// Runs to the end, or to the first signal; what is in flight then is cancelled and not counted.
    pub async fn drive(
        &self,
        interrupt: &mut Interrupt,
        progress: &Progress,
    ) -> Result<Done, Failure> {
        let start = Instant::now();
        let mut schedule = Schedule::new(self, start);
        let (stop, stopping) = watch::channel(false);
        let mut tasks: JoinSet<Followed> = JoinSet::new();
        let mut done = Done {
            record: Record::default(),
            wall: Duration::ZERO,
            stopped: None,
        };
        loop {
            let next_start = schedule.next_start(tasks.len());
            if next_start.is_none() && tasks.is_empty() {
                return Ok(done);
            }
            tokio::select! {
                biased;
                exit = interrupt.wait(), if done.stopped.is_none() => {
                    done.stopped = Some(exit);
                    schedule.stop();
                    // The tasks hold receivers; none is left where all have ended.
                    let _ = stop.send(true);
                }
                Some(joined) = tasks.join_next(), if !tasks.is_empty() => {
                    let followed = joined
                        .map_err(|error| Failure::new(Exit::Failed, format!("a request's task failed: {error}")))?;
                    if let Some((outcome, recoveries)) = followed {
                        done.record.reconnects += u64::from(recoveries);
                        done.record.add(outcome);
                        done.wall = start.elapsed();
                        progress.update(&done.record, done.wall);
                    }
                }
                () = sleep_until(next_start.unwrap_or(start)), if next_start.is_some() => {
                    let (index, due) = schedule.take();
                    let course = Course::new(due);
                    if schedule.is_full(tasks.len()) {
                        done.record.add(course.failed(
                            client_error::CLIENT_LIMIT,
                            "more arrivals than --max-in-flight allows: the cluster is slower than the rate",
                        ));
                        done.wall = start.elapsed();
                    } else {
                        let client = self.clients[index as usize % self.clients.len()].clone();
                        let request = self.request(self.workload.request(self.first + index));
                        tasks.spawn(follow(client, request, course, start, stopping.clone()));
                    }
                }
            }
        }
    }

    fn request(&self, planned: Planned) -> Request {
        let input = match planned.prompt {
            Prompt::Text(text) => Input::Prompt(text),
            Prompt::TokenIds(ids) => Input::TokenIds(ids),
        };
        Request {
            model: self.model.map(str::to_owned),
            sampling: Sampling {
                temperature: Some(self.temperature),
                seed: Some(planned.seed),
                max_tokens: Some(planned.max_tokens),
                ignore_eos: self.ignore_eos,
                ..Sampling::default()
            },
            deadline_ms: self.deadline_ms,
            ..Request::new(input)
        }
    }
}

/// When the next request starts.
struct Schedule {
    start: Instant,
    /// `None` where requests start as others end.
    arrivals: Option<Arrivals>,
    /// The arrival that is waited for, from the start of the run.
    next_arrival: Duration,
    max_in_flight: usize,
    started: u64,
    limit: Option<u64>,
    duration: Option<Duration>,
    stopped: bool,
}

impl Schedule {
    fn new(run: &Run<'_>, start: Instant) -> Self {
        let (mut arrivals, max_in_flight) = match run.pace {
            Pace::Concurrency(streams) => (None, streams),
            Pace::Rate {
                per_second,
                max_in_flight,
            } => (
                Some(Arrivals::new(run.workload.seed, per_second)),
                max_in_flight,
            ),
        };
        let next_arrival = arrivals
            .as_mut()
            .and_then(Iterator::next)
            .unwrap_or_default();
        Self {
            start,
            arrivals,
            next_arrival,
            max_in_flight: max_in_flight as usize,
            started: 0,
            limit: run.limit,
            duration: run.duration,
            stopped: false,
        }
    }

    /// When a request is due; `None` where none is, now that `in_flight` are under way.
    fn next_start(&self, in_flight: usize) -> Option<Instant> {
        if self.stopped || self.limit.is_some_and(|limit| self.started >= limit) {
            return None;
        }
        let due = match self.arrivals {
            Some(_) => self.next_arrival,
            None if self.is_full(in_flight) => return None,
            None => self.start.elapsed(),
        };
        let in_time = self.duration.is_none_or(|duration| due < duration);
        in_time.then(|| self.start + due)
    }

    /// Takes the request that is due: its number, and when it should have started.
    fn take(&mut self) -> (u64, Duration) {
        let index = self.started;
        self.started += 1;
        match &mut self.arrivals {
            Some(arrivals) => {
                let due = self.next_arrival;
                self.next_arrival = arrivals.next().unwrap_or(Duration::MAX);
                (index, due)
            }
            None => (index, self.start.elapsed()),
        }
    }

    fn is_full(&self, in_flight: usize) -> bool {
        in_flight >= self.max_in_flight
    }

    fn stop(&mut self) {
        self.stopped = true;
    }
}

/// One request from its submission to its end.
async fn follow(
    client: Client,
    request: Request,
    mut course: Course,
    start: Instant,
    mut stopping: watch::Receiver<bool>,
) -> Followed {
    let failed = |course: Course, error| {
        let trouble = Trouble::from(&error);
        course.failed(trouble.code, trouble.message)
    };
    let submitted = tokio::select! {
        biased;
        () = stopped(&mut stopping) => return None,
        submitted = client.submit(request) => submitted,
    };
    let mut stream = match submitted {
        Ok(stream) => stream,
        Err(error) => return Some((failed(course, error), 0)),
    };
    loop {
        let event = tokio::select! {
            biased;
            () = stopped(&mut stopping) => {
                session::abandon(stream).await;
                return None;
            }
            event = stream.next() => event,
        };
        let outcome = match event {
            Ok(Some(Event::Accepted(_))) => continue,
            Ok(Some(Event::Token(token))) => {
                course.token(token.position, start.elapsed());
                continue;
            }
            Ok(Some(Event::Finished(end))) => {
                course.finished(end.finish_reason, end.usage, start.elapsed())
            }
            Ok(None) => course.failed(
                client_error::WRONG_SEQUENCE,
                "the stream ended without a terminal event",
            ),
            Err(error) => failed(course, error),
        };
        return Some((outcome, stream.recoveries()));
    }
}

/// Waits until the run is stopped. The sender outlives every task, so its loss means the same.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}
