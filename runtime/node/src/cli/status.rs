//! `understudy status`: the cluster as a gateway sees it, once or again and again.

use std::io::Write;
use std::time::Duration;

use clap::Args;
use understudy_client::Client;

use super::env::Environment;
use super::exit::{Exit, Failure};
use super::gateways::{GatewayArgs, Gateways};
use super::interrupt::Interrupt;
use super::output::{self, Output};
use super::sampling::parse_duration;
use super::session::connect;
use super::status_view;
use super::trouble::failure;

/// Moves the cursor home and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Show nodes, replicas and workers
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub gateways: GatewayArgs,
    /// Print one JSON object (one a line with --watch)
    #[arg(long)]
    pub json: bool,
    /// Show it again and again, until Ctrl-C
    #[arg(long)]
    pub watch: bool,
    /// Time between two looks of --watch
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    pub interval: Duration,
}

/// Runs the command.
pub async fn run<W: Write>(
    args: StatusArgs,
    environment: &Environment,
    out: &mut Output<W>,
) -> Result<Exit, Failure> {
    let gateways = args.gateways.resolve(environment)?;
    let mut interrupt = Interrupt::listen()?;
    if args.watch {
        return watch(&args, &gateways, &mut interrupt, out).await;
    }
    let (_, page) = interrupt
        .unless(look(&args, &gateways, None, out.colour))
        .await??;
    out.raw(&page)?;
    Ok(Exit::Ok)
}

/// One look, over the connection of the last one where there is one.
async fn look(
    args: &StatusArgs,
    gateways: &Gateways,
    client: Option<Client>,
    colour: bool,
) -> Result<(Client, String), Failure> {
    let client = match client {
        Some(client) => client,
        None => connect(gateways).await?,
    };
    let status = client
        .status()
        .await
        .map_err(|error| failure(&error, gateways))?;
    let page = if args.json {
        let line = status_view::json(&status).map_err(|error| {
            Failure::new(
                Exit::Failed,
                format!("cannot write the status as JSON: {error}"),
            )
        })?;
        format!("{line}\n")
    } else {
        status_view::text(&status, colour)
    };
    Ok((client, page))
}

/// Looks until a signal comes. A gateway that cannot be reached is what one watches for, so it does not end the watch;
/// only a command that is wrong does.
async fn watch<W: Write>(
    args: &StatusArgs,
    gateways: &Gateways,
    interrupt: &mut Interrupt,
    out: &mut Output<W>,
) -> Result<Exit, Failure> {
    let mut ticks = tokio::time::interval(args.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut client = None;
    let mut first = true;
    loop {
        interrupt.unless(ticks.tick()).await?;
        let page = match interrupt
            .unless(look(args, gateways, client.take(), out.colour))
            .await?
        {
            Ok((connected, page)) => {
                client = Some(connected);
                page
            }
            Err(failure) if failure.exit == Exit::Usage => return Err(failure),
            Err(failure) if args.json => {
                output::warn(&failure.message);
                continue;
            }
            Err(failure) => format!("{}\n", output::without_controls(&failure.message)),
        };
        let before = match (out.is_terminal && !args.json, args.json || first) {
            (true, _) => CLEAR,
            (false, true) => "",
            (false, false) => "\n",
        };
        first = false;
        out.raw(&format!("{before}{page}"))?;
    }
}
