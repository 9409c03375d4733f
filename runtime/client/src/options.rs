//! What a caller can set about connections and recovery.

use std::time::Duration;

use crate::error::Error;

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
    /// First pause between rounds over the gateways; it doubles with each round up to `backoff_max`. Each pause is drawn at
    /// random from the upper half of that.
    pub backoff_initial: Duration,
    pub backoff_max: Duration,
    /// A ping is sent when nothing has come for this long.
    pub keepalive_interval: Duration,
    /// A connection that has brought nothing for this long is dead. Longer than the interval.
    pub keepalive_timeout: Duration,
    /// Connections to one gateway at most. A further one is opened when the gateway takes no more streams on the others;
    /// a stream beyond that waits for another to end, as long as it would wait for a gateway.
    pub connections_per_gateway: u32,
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
            connections_per_gateway: 8,
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

    /// What would make a client that cannot work, or that harms its gateways.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let above_zero = [
            ("connect_timeout", self.connect_timeout),
            ("backoff_initial", self.backoff_initial),
            ("backoff_max", self.backoff_max),
            ("keepalive_interval", self.keepalive_interval),
            ("event_timeout", self.event_timeout),
            ("call_timeout", self.call_timeout),
        ]
        .map(|(option, value)| (option, value.is_zero()));
        let at_least_one = [
            ("connections_per_gateway", self.connections_per_gateway),
            ("window", self.window),
            ("max_frame_bytes", self.max_frame_bytes),
        ]
        .map(|(option, value)| (option, value == 0));
        for (option, is_zero) in above_zero.into_iter().chain(at_least_one) {
            if is_zero {
                return Err(invalid(option, "is 0; give more"));
            }
        }
        if self.keepalive_interval >= self.keepalive_timeout {
            return Err(invalid(
                "keepalive_interval",
                "is not below keepalive_timeout: a quiet connection would be given up before it is asked for a sign of life",
            ));
        }
        Ok(())
    }
}

fn invalid(option: &'static str, problem: &'static str) -> Error {
    Error::InvalidOptions { option, problem }
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

    /// The option that is found wrong in the defaults, after `change`.
    fn wrong(change: impl FnOnce(&mut Options)) -> Option<&'static str> {
        let mut options = Options::default();
        change(&mut options);
        match options.check() {
            Ok(()) => None,
            Err(Error::InvalidOptions { option, .. }) => Some(option),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn options_that_cannot_work_are_named() {
        assert_eq!(wrong(|_| {}), None);
        assert_eq!(
            wrong(|options| options.recovery_timeout = Duration::ZERO),
            None
        );
        let zero = Duration::ZERO;
        assert_eq!(wrong(|o| o.connect_timeout = zero), Some("connect_timeout"));
        assert_eq!(wrong(|o| o.backoff_initial = zero), Some("backoff_initial"));
        assert_eq!(wrong(|o| o.window = 0), Some("window"));
        assert_eq!(
            wrong(|o| o.connections_per_gateway = 0),
            Some("connections_per_gateway")
        );
        assert_eq!(
            wrong(|o| o.keepalive_interval = o.keepalive_timeout),
            Some("keepalive_interval")
        );
    }
}
