//! Beginning and ending a conversation with the cluster, the same for every command.

use std::time::Duration;

use tokio::time::timeout;
use understudy_client::{Client, Options, Stream};

use super::exit::Failure;
use super::gateways::Gateways;
use super::trouble::failure;

/// After a cancellation: longest wait for the server to confirm it.
pub const CANCEL_WAIT: Duration = Duration::from_secs(2);

/// Opens the first connection.
pub async fn connect(gateways: &Gateways) -> Result<Client, Failure> {
    let options = Options {
        token: gateways.token.clone(),
        client_name: concat!("understudy-cli/", env!("CARGO_PKG_VERSION")).to_owned(),
        connect_timeout: gateways.connect_timeout,
        recovery_timeout: gateways.recovery_timeout,
        ..Options::default()
    };
    Client::connect(gateways.addresses.iter().cloned(), options)
        .await
        .map_err(|error| failure(&error, gateways))
}

/// Cancels a request and waits for the confirmation, for [`CANCEL_WAIT`] at most. A process that just went away would
/// leave the request running until the gateway's grace for resuming it is over.
pub async fn abandon(mut stream: Stream) {
    stream.cancel();
    // Whatever comes or fails now is of no interest any more.
    let _ = timeout(CANCEL_WAIT, async {
        while let Ok(Some(_)) = stream.next().await {}
    })
    .await;
}
