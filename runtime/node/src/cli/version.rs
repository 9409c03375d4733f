//! `understudy version`: what this program is.

use clap::Args;
use serde_json::json;
use understudy_protocol::PROTOCOL_VERSION;

use super::exit::{Exit, Failure};
use super::output::Output;

/// Show the version of the program and of the protocol
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Print one JSON object: {"version", "protocol", "git"}
    #[arg(long)]
    pub json: bool,
}

/// The commit that was built, where the build was told (`UNDERSTUDY_GIT_HASH` in its environment).
const GIT_HASH: Option<&str> = option_env!("UNDERSTUDY_GIT_HASH");

/// Runs the command.
pub fn run<W: std::io::Write>(args: &VersionArgs, out: &mut Output<W>) -> Result<Exit, Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let text = if args.json {
        json!({ "version": version, "protocol": PROTOCOL_VERSION, "git": GIT_HASH }).to_string()
    } else {
        let commit = GIT_HASH.map_or(String::new(), |hash| format!(" ({hash})"));
        format!("understudy {version}{commit}, protocol {PROTOCOL_VERSION}")
    };
    out.raw(&format!("{text}\n"))?;
    Ok(Exit::Ok)
}
