//! The `understudy` program: command line, launching, and the node itself.

pub mod cli;
pub mod launch;
pub mod node;
