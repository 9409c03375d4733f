//! Nodes as real processes, with real signals: ractor's registries belong to a process, so two nodes in one would
//! see each other's actors.

mod figures;
mod harness;
mod joining;
mod messages;
mod metrics;
mod probe;
mod proxy;
mod silence;
mod strangers;

use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

/// Not a test: the body of the node processes that the tests start.
#[test]
fn probe_process() {
    if let Ok(arguments) = std::env::var(probe::PROBE) {
        probe::run(&arguments);
    }
}
