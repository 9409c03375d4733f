//! `understudy bench`: a load generator over the client protocol.
//!
//! [`plan`] decides what is sent and when, [`record`] and [`histogram`] what is measured, [`report`] how it is shown:
//! all pure. [`run`] connects them to a clock and a cluster.

mod args;
mod histogram;
mod plan;
mod progress;
mod record;
mod report;
mod run;

use std::io::Write;

use understudy_client::Client;

pub use args::BenchArgs;

use super::env::Environment;
use super::exit::{Exit, Failure};
use super::gateways::Gateways;
use super::interrupt::Interrupt;
use super::output::{self, Output};
use super::session::connect;
use progress::Progress;
use report::Report;
use run::Run;

/// Warm-up requests are numbered from here, so that they are none of the measured ones.
const WARMUP_FIRST: u64 = 1 << 63;

/// Runs the command.
pub async fn run<W: Write>(
    args: BenchArgs,
    environment: &Environment,
    out: &mut Output<W>,
) -> Result<Exit, Failure> {
    let gateways = args.gateways.resolve(environment)?;
    let workload = args.workload()?;
    let mut interrupt = Interrupt::listen()?;
    let clients = interrupt
        .unless(connect_all(&gateways, args.connection_count()))
        .await??;
    let measured = Run {
        clients: &clients,
        workload: &workload,
        model: args.model.as_deref(),
        temperature: args.temperature,
        ignore_eos: args.ignore_eos,
        deadline_ms: args.deadline_ms(),
        pace: args.pace(),
        first: 0,
        limit: args.request_limit(),
        duration: args.duration,
    };
    if args.warmup > 0 {
        let warmup = Run {
            first: WARMUP_FIRST,
            limit: Some(args.warmup),
            duration: None,
            ..measured
        };
        let done = warmup
            .drive(&mut interrupt, &Progress::new(Some(args.warmup)))
            .await?;
        if let Some(exit) = done.stopped {
            return Ok(exit);
        }
    }
    let done = measured
        .drive(&mut interrupt, &Progress::new(measured.limit))
        .await?;
    let report = Report::new(
        args.settings(),
        &done.record,
        done.wall,
        done.stopped.is_some(),
    );
    if args.json {
        let json = serde_json::to_string(&report).map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("cannot write the report as JSON: {error}"),
            )
        })?;
        out.raw(&format!("{json}\n"))?;
    } else {
        out.raw(&output::without_controls(&report.table()))?;
    }
    Ok(match done.stopped {
        Some(exit) => exit,
        None if report.failed > 0 => Exit::Failed,
        None => Exit::Ok,
    })
}

/// Opens the connections; each prefers the next gateway, so that they spread over all.
async fn connect_all(gateways: &Gateways, count: u32) -> Result<Vec<Client>, Failure> {
    let mut clients = Vec::new();
    for index in 0..count as usize {
        let mut rotated = gateways.clone();
        let by = index % rotated.addresses.len();
        rotated.addresses.rotate_left(by);
        clients.push(connect(&rotated).await?);
    }
    Ok(clients)
}
