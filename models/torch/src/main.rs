//! The `understudy-engine` binary: one model on one device.
//!
//! Exit codes: 0 done; 1 another failure; 2 wrong command line; 10 the model cannot be loaded, or LibTorch is of another release; 11 a step
//! failed; 12 a frame to or from the node is broken; 13 a bug on the model thread. 127, or a message of the dynamic loader: LibTorch is not
//! where it was at build time; run `scripts/setup.sh`.

mod cli;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use understudy_engine_core::server::ExitStatus;
use understudy_torch::demo;

/// Runs a language model on LibTorch: as a node's engine process, or by itself.
#[derive(Parser)]
#[command(name = "understudy-engine", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 other failure, 2 wrong command line, 10 model or LibTorch cannot be \
                          loaded, 11 step failed, \
                          12 broken frame, 13 bug on the model thread.";

#[derive(Subcommand)]
enum Command {
    /// Serve a node over an inherited socket (started by `understudy node`)
    Serve(cli::serve::ServeArgs),
    /// Continue one prompt and print the tokens
    Run(Box<cli::run::RunArgs>),
    /// Print what a checkpoint holds
    Inspect(cli::inspect::InspectArgs),
    /// Measure tokens per second of a checkpoint at several batch sizes
    Bench(cli::bench::BenchArgs),
    /// Train the demo model
    DemoTrain(demo::TrainArgs),
    /// Examine the demo model on held-out questions
    DemoEval(demo::EvalArgs),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let serves = matches!(command, Command::Serve(_));
    if !serves {
        // `understudy-engine inspect … | head` ends quietly, like any other filter.
        // SAFETY: no other thread runs yet.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    // An engine says itself to its node what is wrong with LibTorch.
    let fits = if serves {
        Ok(())
    } else {
        cli::check_libtorch()
    };
    match fits.and_then(|()| run(command)) {
        Ok(()) => ExitStatus::Done.into(),
        Err(failure) => {
            eprintln!("understudy-engine: {:#}", failure.error);
            ExitCode::from(failure.code)
        }
    }
}

fn run(command: Command) -> Result<(), cli::Failure> {
    match command {
        Command::Serve(args) => cli::serve::serve(args),
        Command::Run(args) => cli::run::run(&args),
        Command::Inspect(args) => cli::inspect::inspect(&args),
        Command::Bench(args) => cli::bench::bench(&args),
        Command::DemoTrain(args) => demo::train(&args).map_err(cli::Failure::other),
        Command::DemoEval(args) => demo::eval(&args).map_err(cli::Failure::other),
    }
}
