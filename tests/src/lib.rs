//! The harness of the integration tests and of the figures: clusters of real processes, faults, and one oracle.
//!
//! Invariant: whatever a test does, no process that it started outlives it.

pub mod cluster;
pub mod oracle;
pub mod ports;
pub mod programs;
pub mod scrape;
pub mod wait;

pub use cluster::{TestCluster, TestClusterBuilder};
pub use oracle::{Transcript, collect};
pub use programs::Engine;
