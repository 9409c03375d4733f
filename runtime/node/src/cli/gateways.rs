//! Which gateways to talk to, and with what token: options, then environment, then the local default.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use understudy_config::{ClusterConfig, LoadOptions, PathCheck, TokenFileError, read_tokens};

use super::env::{ADDR, Environment};
use super::exit::Failure;
use super::sampling::parse_duration;

/// The gateway of the shipped local profile (`config/profiles/local.toml`), used where nothing else is named.
pub const DEFAULT_ADDR: &str = "127.0.0.1:7601";

/// Options of every command that connects.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub struct GatewayArgs {
    /// Gateways, host:port, separated by commas or given again; tried in this order [default: $UNDERSTUDY_ADDR, or
    /// the local cluster's 127.0.0.1:7601]
    #[arg(
        long,
        value_name = "HOST:PORT",
        value_delimiter = ',',
        conflicts_with = "config"
    )]
    pub addr: Vec<String>,
    /// Take the gateways, and the token file, from a cluster's configuration
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// File that holds the access token, the first where there are several [default: $UNDERSTUDY_TOKEN_FILE; the token
    /// itself may stand in $UNDERSTUDY_TOKEN]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Longest wait for a connection
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = parse_duration)]
    pub connect_timeout: Duration,
    /// Longest time to try to get a stream back after its connection is lost
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub recovery_timeout: Duration,
}

/// Where to connect, settled.
#[derive(Clone, PartialEq, Eq)]
pub struct Gateways {
    /// `host:port`, at least one, in the order to try.
    pub addresses: Vec<String>,
    /// The access token, where there is one. Never shown.
    pub token: Option<String>,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest time to try to get a stream back.
    pub recovery_timeout: Duration,
}

impl GatewayArgs {
    /// Settles the addresses and the token.
    pub fn resolve(&self, environment: &Environment) -> Result<Gateways, Failure> {
        let mut config_token_file = None;
        let mut source = "--addr";
        let addresses = if let Some(file) = &self.config {
            let found = from_config(file)?;
            config_token_file = found.token_file;
            found.addresses
        } else if !self.addr.is_empty() {
            self.addr.clone()
        } else if let Some(addresses) = &environment.addr {
            source = ADDR;
            addresses.split(',').map(str::to_owned).collect()
        } else {
            vec![DEFAULT_ADDR.to_owned()]
        };
        let addresses: Vec<String> = addresses
            .iter()
            .map(|address| address.trim().to_owned())
            .collect();
        for address in &addresses {
            check_address(address).map_err(|why| {
                Failure::usage(format!(
                    "{source}: {address:?} {why}; write host:port, such as 127.0.0.1:7601"
                ))
            })?;
        }
        Ok(Gateways {
            addresses,
            token: self.token(environment, config_token_file)?,
            connect_timeout: self.connect_timeout,
            recovery_timeout: self.recovery_timeout,
        })
    }

    /// `--token-file`, then the environment, then the configuration's file.
    fn token(
        &self,
        environment: &Environment,
        from_config: Option<PathBuf>,
    ) -> Result<Option<String>, Failure> {
        if let Some(file) = &self.token_file {
            return first_token(file).map(Some);
        }
        if let Some(token) = &environment.token {
            return Ok(Some(token.trim().to_owned()));
        }
        let file = environment
            .token_file
            .as_ref()
            .map(PathBuf::from)
            .or(from_config);
        file.map(|file| first_token(&file)).transpose()
    }
}

struct FromConfig {
    addresses: Vec<String>,
    token_file: Option<PathBuf>,
}

fn from_config(file: &Path) -> Result<FromConfig, Failure> {
    let options = LoadOptions {
        paths: PathCheck::None,
    };
    let (config, _warnings) = ClusterConfig::load_with(file, &options)
        .map_err(|problems| Failure::usage(problems.to_string()))?;
    let addresses: Vec<String> = config
        .nodes
        .iter()
        .filter_map(|node| node.client_address())
        .collect();
    if addresses.is_empty() {
        return Err(Failure::usage(format!(
            "no node in {} takes clients: give one the role \"gateway\" and a client_port, or name a gateway with --addr",
            file.display()
        )));
    }
    Ok(FromConfig {
        addresses,
        token_file: config.gateway.token_file,
    })
}

/// `host:port` with a host and a port above 0; the host's name is looked up when connecting.
fn check_address(address: &str) -> Result<(), &'static str> {
    let (host, port) = address.rsplit_once(':').ok_or("has no port")?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || host == "[]" {
        return Err("has no host");
    }
    if host.contains(':') && !bracketed {
        return Err("looks like an IPv6 address without brackets");
    }
    match port.parse::<u16>() {
        Ok(0) | Err(_) => Err("has no port between 1 and 65535"),
        Ok(_) => Ok(()),
    }
}

/// Any of the tokens opens the door; a gateway's own file may hold several.
fn first_token(file: &Path) -> Result<String, Failure> {
    let told = |error: TokenFileError| Failure::usage(error.to_string());
    Ok(read_tokens(file).map_err(told)?.swap_remove(0))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::exit::Exit;
    use super::*;

    fn args(addr: &[&str]) -> GatewayArgs {
        GatewayArgs {
            addr: addr.iter().map(|a| (*a).to_owned()).collect(),
            connect_timeout: Duration::from_secs(5),
            ..GatewayArgs::default()
        }
    }

    fn environment(addr: Option<&str>) -> Environment {
        Environment {
            addr: addr.map(str::to_owned),
            ..Environment::default()
        }
    }

    #[test]
    fn options_win_over_the_environment_and_that_over_the_default() {
        let addresses =
            |args: GatewayArgs, env| args.resolve(&environment(env)).expect("resolves").addresses;
        assert_eq!(
            addresses(args(&["a:1", "b:2"]), Some("c:3")),
            ["a:1", "b:2"]
        );
        assert_eq!(addresses(args(&[]), Some("c:3, d:4")), ["c:3", "d:4"]);
        assert_eq!(addresses(args(&[]), None), [DEFAULT_ADDR]);
    }

    #[test]
    fn bad_addresses_are_told_with_their_source() {
        for bad in [
            "host",
            ":7600",
            "host:0",
            "host:99999",
            "::1:7600",
            "[]:5",
            "host:",
        ] {
            let failure = args(&[bad]).resolve(&environment(None)).err().expect(bad);
            assert_eq!(failure.exit, Exit::Usage);
            assert!(
                failure.message.starts_with("--addr: ")
                    && failure.message.contains("write host:port")
            );
        }
        let failure = args(&[])
            .resolve(&environment(Some("x")))
            .err()
            .expect("no port");
        assert!(
            failure.message.starts_with("UNDERSTUDY_ADDR: "),
            "{failure}"
        );
        assert!(args(&["[::1]:7600"]).resolve(&environment(None)).is_ok());
    }

    #[test]
    fn tokens_come_from_files_and_the_environment() {
        let dir = std::env::temp_dir().join(format!("understudy-cli-token-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory for the test");
        let (good, empty) = (dir.join("good"), dir.join("empty"));
        fs::write(&good, "# for tests\n  secret-token\nanother\n").expect("written");
        fs::write(&empty, "\n").expect("written");
        let from_environment = Environment {
            token: Some("other".to_owned()),
            token_file: Some(empty.display().to_string()),
            ..Environment::default()
        };
        let with_file = |file: &Path| GatewayArgs {
            token_file: Some(file.to_owned()),
            ..args(&[])
        };
        let token =
            |args: GatewayArgs, env: &Environment| args.resolve(env).map(|found| found.token);
        assert_eq!(
            token(with_file(&good), &from_environment),
            Ok(Some("secret-token".to_owned()))
        );
        assert_eq!(
            token(args(&[]), &from_environment),
            Ok(Some("other".to_owned()))
        );
        assert_eq!(token(args(&[]), &Environment::default()), Ok(None));
        let failure =
            token(with_file(&empty), &from_environment).expect_err("an empty file is no token");
        assert!(failure.message.contains("it holds no token"), "{failure}");
        let failure =
            token(with_file(&dir.join("absent")), &from_environment).expect_err("no such file");
        assert!(
            failure.message.contains("absent: No such file"),
            "{failure}"
        );
        fs::remove_dir_all(&dir).expect("removed");
    }
}
