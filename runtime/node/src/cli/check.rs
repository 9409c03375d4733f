//! `understudy check`: everything that is wrong with a configuration file.

use std::io;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use understudy_config::{ClusterConfig, LoadOptions, PathCheck, Problems, Warning};

use super::exit::{Exit, Failure};
use super::output::Output;

/// Check a configuration file and report all problems
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The cluster's configuration
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Print one JSON object: {"ok", "problems", "warnings"}
    #[arg(long)]
    pub json: bool,
    /// Do not look for the paths in it on this machine's disk
    #[arg(long)]
    pub no_paths: bool,
}

/// Runs the command.
pub fn run<W: std::io::Write>(args: &CheckArgs, out: &mut Output<W>) -> Result<Exit, Failure> {
    let paths = if args.no_paths {
        PathCheck::None
    } else {
        PathCheck::All
    };
    let result = ClusterConfig::load_with(&args.file, &LoadOptions { paths });
    let exit = if result.is_ok() {
        Exit::Ok
    } else {
        Exit::Usage
    };
    let report = if args.json {
        as_json(&result)
    } else {
        as_text(&args.file, &result)
    };
    match out.foreign(&report) {
        // Whoever does not want to read the problems still learns that there are some.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(exit),
        written => {
            written?;
            Ok(exit)
        }
    }
}

type Loaded = Result<(ClusterConfig, Vec<Warning>), Problems>;

fn as_json(result: &Loaded) -> String {
    let (problems, warnings): (&[_], &[Warning]) = match result {
        Ok((_, warnings)) => (&[], warnings),
        Err(found) => (&found.problems, &found.warnings),
    };
    let report = json!({
        "ok": result.is_ok(),
        "problems": problems.iter().map(|problem| problem.to_json()).collect::<Vec<_>>(),
        "warnings": warnings.iter().map(|warning| warning.0.to_json()).collect::<Vec<_>>(),
    });
    format!("{report}\n")
}

fn as_text(file: &std::path::Path, result: &Loaded) -> String {
    match result {
        Ok((config, warnings)) => {
            let warnings: String = warnings
                .iter()
                .map(|warning| format!("{warning}\n\n"))
                .collect();
            let replicas: u64 = config
                .models
                .iter()
                .map(|model| u64::from(model.replicas))
                .sum();
            format!(
                "{warnings}{}: ok: cluster {:?}, {} node(s), {} model(s), {replicas} replica(s)\n",
                file.display(),
                config.cluster.name,
                config.nodes.len(),
                config.models.len(),
            )
        }
        Err(problems) => format!("{problems}\n"),
    }
}
