//! Series that something holds on to: what a node is, what waits in a queue, how long commits take.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use metrics::{Gauge, Histogram, gauge, histogram};

use crate::names;
use crate::record::Queue;

/// `understudy_node_info`: this node and what it serves. Clones are one and the same.
#[derive(Clone, Debug)]
pub struct NodeInfo(Arc<Node>);

#[derive(Debug)]
struct Node {
    node: String,
    version: String,
    /// Fingerprints whose series stand at 1.
    shown: Mutex<BTreeSet<String>>,
}

impl NodeInfo {
    /// A node that serves nothing yet: its fingerprint is empty.
    pub fn new(node: &str, version: &str) -> Self {
        let info = Self(Arc::new(Node {
            node: node.to_owned(),
            version: version.to_owned(),
            shown: Mutex::default(),
        }));
        info.serves([]);
        info
    }

    /// The numeric fingerprints of the engines that are ready now. Series of others stay, at 0.
    pub fn serves<'f>(&self, fingerprints: impl IntoIterator<Item = &'f str>) {
        let mut now: BTreeSet<String> = fingerprints.into_iter().map(str::to_owned).collect();
        if now.is_empty() {
            now.insert(String::new());
        }
        let mut shown = self.0.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.difference(&now).for_each(|old| self.set(old, 0.0));
        now.difference(&shown).for_each(|new| self.set(new, 1.0));
        *shown = now;
    }

    fn set(&self, fingerprint: &str, value: f64) {
        gauge!(names::NODE_INFO,
            "node" => self.0.node.clone(), "version" => self.0.version.clone(),
            "fingerprint" => fingerprint.to_owned())
        .set(value);
    }
}

/// The bytes of one queue that is spread over many owners, such as the connections of clients. Look it up once and clone
/// it; each owner takes a [`QueueShare`].
#[derive(Clone)]
pub struct QueueBytes(Gauge);

impl QueueBytes {
    /// The series of a queue.
    pub fn new(queue: Queue) -> Self {
        Self(gauge!(names::QUEUED_BYTES, "queue" => queue.label()))
    }

    /// One owner's part of the queue, empty at first.
    pub fn share(&self) -> QueueShare {
        QueueShare {
            gauge: self.0.clone(),
            bytes: 0,
        }
    }
}

/// What one owner has waiting in a queue. It counts until it is dropped.
pub struct QueueShare {
    gauge: Gauge,
    bytes: u64,
}

impl QueueShare {
    /// This much waits now.
    pub fn set(&mut self, bytes: u64) {
        match bytes.checked_sub(self.bytes) {
            Some(more) => self.gauge.increment(more as f64),
            None => self.gauge.decrement((self.bytes - bytes) as f64),
        }
        self.bytes = bytes;
    }
}

impl Drop for QueueShare {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// `understudy_journal_commit_seconds`, looked up once: a request commits at every step.
#[derive(Clone)]
pub struct JournalMetrics(Histogram);

impl JournalMetrics {
    /// The series.
    pub fn new() -> Self {
        Self(histogram!(names::JOURNAL_COMMIT))
    }

    /// A batch of tokens was committed.
    pub fn committed(&self, took: Duration) {
        self.0.record(took);
    }
}

impl Default for JournalMetrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a recorder of its own holds after `record`: the samples of a metric.
    fn samples(name: &str, record: impl FnOnce()) -> Vec<String> {
        let recorder = crate::exporter::recorder().expect("a recorder");
        let text = recorder.handle();
        metrics::with_local_recorder(&recorder, record);
        let mut lines: Vec<String> = text
            .render()
            .lines()
            .filter(|line| line.starts_with(name))
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    }

    #[test]
    fn node_info_shows_what_is_served_now_and_what_was() {
        let series = |fingerprint: &str, value: u32| {
            format!(
                "understudy_node_info{{node=\"a\",version=\"1\",fingerprint=\"{fingerprint}\"}} {value}"
            )
        };
        let none = samples(names::NODE_INFO, || drop(NodeInfo::new("a", "1")));
        assert_eq!(none, [series("", 1)]);
        let two = samples(names::NODE_INFO, || {
            let info = NodeInfo::new("a", "1");
            info.serves(["f1", "f2", "f1"]);
            info.serves(["f2", "f3"]);
        });
        assert_eq!(
            two,
            [
                series("", 0),
                series("f1", 0),
                series("f2", 1),
                series("f3", 1)
            ]
        );
    }

    #[test]
    fn shares_of_a_queue_add_up_and_vanish_with_their_owners() {
        let waiting = |record: fn(&QueueBytes)| {
            samples(names::QUEUED_BYTES, || {
                record(&QueueBytes::new(Queue::ClientOut))
            })
        };
        let series =
            |bytes: u64| format!("understudy_queued_bytes{{queue=\"client_out\"}} {bytes}");
        let held = waiting(|queue| {
            let (mut one, mut other) = (queue.share(), queue.share());
            one.set(1000);
            other.set(500);
            one.set(100);
            drop(one);
            std::mem::forget(other);
        });
        assert_eq!(held, [series(500)]);
        assert_eq!(waiting(|queue| queue.share().set(7)), [series(0)]);
    }

    #[test]
    fn closed_sets_are_there_at_zero_before_anything_happens() {
        let registered = |name| samples(name, crate::record::register_all);
        let recoveries = registered(names::RECOVERIES);
        assert_eq!(recoveries.len(), 8 * 3);
        assert!(
            recoveries.iter().all(|line| line.ends_with(" 0")),
            "{recoveries:?}"
        );
        assert_eq!(registered(names::FENCED_MESSAGES).len(), 3);
        assert_eq!(registered(names::REPLAYED_TOKENS).len(), 1);
        let restarts = samples(names::WORKER_RESTARTS, || {
            drop(crate::record::ReplicaMetrics::new("demo", 1));
        });
        assert_eq!(restarts.len(), 5, "{restarts:?}");
        assert!(restarts[0].contains("worker=\"demo/1\""), "{restarts:?}");
        let codes = samples(names::REQUEST_ERRORS, || {
            crate::record::register_error_codes(&["overloaded", "deadline"], &["bad_frame"]);
        });
        assert_eq!(codes.len(), 2, "{codes:?}");
    }
}
