//! What a caller can set about connections and recovery.

use std::time::Duration;

/// Settings of a [`Client`](crate::Client). The defaults suit a local network.
#[derive(Clone)]
pub struct Options {
    /// The access token, where the gateways ask for one.
    pub token: Option<String>,
    /// Name of the program for the operator's logs; at most 128 bytes, cut beyond.
    pub client_name: String,
    /// Limit of one attempt to reach one gateway: name resolution, TCP and handshake together.
    pub connect_timeout: Duration,
    /// How long a stream tries to get its request back after its connection is lost. Zero switches recovery off, and
    /// requests are then cancelled by the server when the connection closes.
    pub recovery_timeout: Duration,
    /// First pause between rounds over the gateways; it doubles up to `backoff_max`, and is drawn at random up to that.
    pub backoff_initial: Duration,
    pub backoff_max: Duration,
    /// A ping is sent when nothing has come for this long.
    pub keepalive_interval: Duration,
    /// A connection that has brought nothing for this long is dead. Longer than the interval.
    pub keepalive_timeout: Duration,
    /// Limit of a wait for the next event of a stream while its connection is alive, beside the request's own deadline.
    pub event_timeout: Duration,
    /// Limit of a whole [`status`](crate::Client::status) or [`ping`](crate::Client::ping).
    pub call_timeout: Duration,
    /// Token events a stream holds for a caller who has not taken them yet; the credit given to the server.
    pub window: u32,
    /// Largest frame taken from a gateway, in bytes.
    pub max_frame_bytes: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            token: None,
            client_name: concat!("understudy-client/", env!("CARGO_PKG_VERSION")).to_owned(),
            connect_timeout: Duration::from_secs(3),
            recovery_timeout: Duration::from_secs(30),
            backoff_initial: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            keepalive_interval: Duration::from_secs(2),
            keepalive_timeout: Duration::from_secs(6),
            event_timeout: Duration::from_secs(600),
            call_timeout: Duration::from_secs(5),
            window: 64,
            max_frame_bytes: 16 * 1024 * 1024,
        }
    }
}

impl Options {
    /// Whether streams resume after the loss of a connection.
    pub fn recovers(&self) -> bool {
        !self.recovery_timeout.is_zero()
    }
}

/// Leaves the token out.
impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("client_name", &self.client_name)
            .field("connect_timeout", &self.connect_timeout)
            .field("recovery_timeout", &self.recovery_timeout)
            .field("keepalive_timeout", &self.keepalive_timeout)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_does_not_show_in_debug_output() {
        let options = Options {
            token: Some("secret".to_owned()),
            ..Options::default()
        };
        assert!(!format!("{options:?}").contains("secret"));
    }
}
