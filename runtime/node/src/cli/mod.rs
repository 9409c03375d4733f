//! The command line: parsing, dispatch, and the mapping of every end to an exit status.
//!
//! Each command is a file with its arguments and a `run`; what it prints goes through [`output`], what it ends with is
//! an [`exit::Exit`] or an [`exit::Failure`]. `docs/cli.md` describes every command and option, and a test compares.

mod answer_view;
mod bench;
mod chat;
mod check;
mod conversation;
pub(crate) mod env;
pub mod exit;
mod gateways;
mod generate;
mod input;
pub(crate) mod interrupt;
pub(crate) mod output;
mod sampling;
mod session;
mod status;
mod status_view;
mod table;
mod trouble;
mod version;

#[cfg(test)]
mod page_test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use env::Environment;
use exit::{Exit, Failure};
use output::Output;

/// Serves AI models on a cluster of machines; a request outlives whatever serves it
#[derive(Debug, Parser)]
#[command(
    name = "understudy",
    version,
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 no connection, 4 try again \
                        later, 130 Ctrl-C, 143 SIGTERM"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(generate::GenerateArgs),
    Resume(generate::ResumeArgs),
    Chat(chat::ChatArgs),
    Status(status::StatusArgs),
    Bench(bench::BenchArgs),
    Check(check::CheckArgs),
    Up(crate::launch::UpArgs),
    Down(crate::launch::DownArgs),
    Ps(crate::launch::PsArgs),
    Logs(crate::launch::LogsArgs),
    /// Run one node of a cluster
    Node(crate::node::NodeArgs),
    Version(version::VersionArgs),
}

/// The whole program.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    if let Command::Node(args) = command {
        return node(args);
    }
    match run(command) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            if !failure.message.is_empty() {
                output::error(&failure.message);
            }
            failure.exit.into()
        }
    }
}

/// A node brings its own runtime and logging; what stops it from starting is told here.
fn node(args: crate::node::NodeArgs) -> ExitCode {
    crate::node::run(args).unwrap_or_else(|error| {
        output::error(&format!("{error:#}"));
        Exit::Failed.into()
    })
}

fn run(command: Command) -> Result<Exit, Failure> {
    let environment = Environment::read();
    let out = &mut Output::stdout(environment.no_color);
    match command {
        Command::Generate(args) => block_on(generate::generate(args, &environment, out)),
        Command::Resume(args) => block_on(generate::resume(args, &environment, out)),
        Command::Chat(args) => block_on(chat::run(args, &environment, out)),
        Command::Status(args) => block_on(status::run(args, &environment, out)),
        Command::Bench(args) => block_on(bench::run(args, &environment, out)),
        Command::Check(args) => check::run(&args, out),
        Command::Up(args) => block_on(crate::launch::up(args)),
        Command::Down(args) => block_on(crate::launch::down(args)),
        Command::Ps(args) => block_on(crate::launch::ps(args)),
        Command::Logs(args) => block_on(crate::launch::logs(args)),
        Command::Version(args) => version::run(&args, out),
        // Dispatched before, with its own runtime.
        Command::Node(_) => Ok(Exit::Ok),
    }
}

/// One thread is plenty for a client, and leaves the cores of a small machine to the cluster that it measures.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| {
            Failure::new(Exit::Failed, format!("cannot start the runtime: {error}"))
        })?;
    let result = runtime.block_on(work);
    // A thread may still wait for a line of standard input.
    runtime.shutdown_background();
    result
}
