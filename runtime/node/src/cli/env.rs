//! The names of the environment variables that this program reads: all of them, and only here. (Logging's own, `RUST_LOG`,
//! stands in the telemetry crate.)

use std::env;

/// Gateways to connect to, `host:port`, separated by commas; `--addr` and `--config` win.
pub const ADDR: &str = "UNDERSTUDY_ADDR";
/// The access token itself; `--token-file` wins.
pub const TOKEN: &str = "UNDERSTUDY_TOKEN";
/// A file that holds the access token (the first one, where there are several); [`TOKEN`] wins.
pub const TOKEN_FILE: &str = "UNDERSTUDY_TOKEN_FILE";
/// Any value but the empty one switches colours off (<https://no-color.org>).
pub const NO_COLOR: &str = "NO_COLOR";

/// The engine program of a node, where it does not lie beside this one.
pub const ENGINE: &str = "UNDERSTUDY_ENGINE";
/// The ssh program that the launcher uses, with arguments, separated by spaces.
pub const SSH: &str = "UNDERSTUDY_SSH";

/// What the environment says, read once.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    pub addr: Option<String>,
    pub token: Option<String>,
    pub token_file: Option<String>,
    pub no_color: bool,
}

impl Environment {
    /// The environment of this process. Empty values count as absent.
    pub fn read() -> Self {
        let get = |name| env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            addr: get(ADDR),
            token: get(TOKEN),
            token_file: get(TOKEN_FILE),
            no_color: get(NO_COLOR).is_some(),
        }
    }
}
