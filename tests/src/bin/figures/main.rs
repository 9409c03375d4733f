//! `understudy-figures`: measures what docs/benchmarks.md states, on a cluster of its own with the real engine.
//!
//! Every fault is judged by the oracle too: a figure of a stream that was not bit-equal would be worth nothing, and the
//! program ends with code 1.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use understudy_tests::{Engine, TestClusterBuilder};

mod faults;
mod load;
mod memory;
mod statistics;

use faults::Fault;

/// Faults follow each other here faster than an operator would accept.
const PATIENT: &str = "[restart]\nintensity = 1000\nbackoff_initial_ms = 10\nbackoff_max_ms = 50\n[recovery]\nmax_attempts = 1000\nmax_engine_deaths = 1000";

#[derive(Parser)]
#[command(about = "Measure recovery and memory on a cluster of its own")]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// Use the fake engine, with this step time in ms
    #[arg(long, global = true, value_name = "MS")]
    fake_step_ms: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Stall of the streams whose engine is killed, with a warm replica beside it
    Kill {
        #[arg(long, default_value_t = 60)]
        faults: u32,
        #[command(flatten)]
        load: load::LoadArgs,
    },
    /// As `kill`, with SIGSTOP in place of SIGKILL
    Stop {
        #[arg(long, default_value_t = 20)]
        faults: u32,
        #[command(flatten)]
        load: load::LoadArgs,
    },
    /// As `kill`, with the whole node of the replica
    Node {
        #[arg(long, default_value_t = 20)]
        faults: u32,
        #[command(flatten)]
        load: load::LoadArgs,
    },
    /// Resident memory of nodes and engines at idle, and after rounds of requests
    Memory {
        #[arg(long, default_value_t = 1000)]
        requests: u32,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let builder = match args.fake_step_ms {
        Some(ms) => TestClusterBuilder::new(Engine::Fake).step_ms(ms),
        None => TestClusterBuilder::new(Engine::Real),
    };
    let Some(mut cluster) = builder.settings(PATIENT).start_ready().await else {
        return ExitCode::from(2);
    };
    let (fault, faults, load) = match args.command {
        Command::Memory { requests } => {
            println!("{}", memory::measure(&cluster, requests).await);
            return ExitCode::SUCCESS;
        }
        Command::Kill { faults, load } => (Fault::Kill, faults, load),
        Command::Stop { faults, load } => (Fault::Stop, faults, load),
        Command::Node { faults, load } => (Fault::Node, faults, load),
    };
    let report = faults::measure(&mut cluster, fault, faults, &load).await;
    println!("{}", report.to_json());
    match report.is_sound() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(1),
    }
}
