//! Everything that needs real processes. One binary, so that it links once.

mod clients;
mod connections;
mod faults;
mod launch_script;
mod metrics;
mod requests;
mod serving;
