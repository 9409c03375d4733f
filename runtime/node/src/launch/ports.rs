//! Ports that a node will listen on: free, or taken by whom.

use std::fs;
use std::io;
use std::net::{TcpListener, ToSocketAddrs as _};

use understudy_config::NodeSettings;

/// A port that a node needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needed {
    pub node: String,
    /// Address to listen on.
    pub bind: String,
    pub port: u16,
    /// The key of the configuration that asks for it.
    pub key: &'static str,
}

/// The ports of a node, in the order of the configuration's keys. With metrics switched off, theirs is not needed.
pub fn needed(node: &NodeSettings, metrics: bool) -> Vec<Needed> {
    let ports = [
        ("cluster_port", Some(node.cluster_port)),
        ("client_port", node.client_port),
        ("metrics_port", node.metrics_port.filter(|_| metrics)),
    ];
    let needed = |(key, port): (&'static str, Option<u16>)| {
        Some(Needed {
            node: node.name.clone(),
            bind: node.bind.clone(),
            port: port?,
            key,
        })
    };
    ports.into_iter().filter_map(needed).collect()
}

/// Why a port cannot be had, for a person; `None` when it can. (It may be taken between this look and the node's start;
/// then the node says so itself.)
pub fn obstacle(needed: &Needed) -> Option<String> {
    let Needed {
        node,
        bind,
        port,
        key,
    } = needed;
    let error = try_listen(bind, *port).err()?;
    Some(match error.kind() {
        io::ErrorKind::AddrInUse => {
            let by = holder(*port).map_or_else(String::new, |holder| format!(" by {holder}"));
            format!(
                "port {port} ({key} of node {node:?}) is in use{by}: stop that, or give the node another {key}"
            )
        }
        io::ErrorKind::AddrNotAvailable => {
            format!(
                "node {node:?} cannot listen on {bind}: no interface of this machine has that address; set its bind"
            )
        }
        io::ErrorKind::PermissionDenied => {
            format!(
                "port {port} ({key} of node {node:?}) may not be used by this user: choose one from 1024 up"
            )
        }
        _ => format!("node {node:?} cannot listen on {bind} port {port} ({key}): {error}"),
    })
}

fn try_listen(bind: &str, port: u16) -> io::Result<()> {
    let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    for address in (bind, port).to_socket_addrs()? {
        match TcpListener::bind(address) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Who listens on a port: `name (pid 123)`. Other users' processes are seen by root only.
fn holder(port: u16) -> Option<String> {
    let inodes: Vec<u64> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listeners(&table, port))
        .collect();
    let wanted: Vec<String> = inodes
        .iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let pids = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids {
        let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let mut targets = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        if targets.any(|target| {
            target
                .to_str()
                .is_some_and(|target| wanted.iter().any(|socket| socket == target))
        }) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            return Some(format!("{} (pid {pid})", name.trim_end()));
        }
    }
    None
}

/// Socket inodes that listen on `port`, from a table in the format of `/proc/net/tcp`.
fn listeners(table: &str, port: u16) -> Vec<u64> {
    /// `TCP_LISTEN`
    const LISTEN: &str = "0A";
    let inode_of = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
        let same =
            u16::from_str_radix(local_port, 16) == Ok(port) && fields.get(3) == Some(&LISTEN);
        same.then(|| fields.get(9)?.parse().ok()).flatten()
    };
    table.lines().skip(1).filter_map(inode_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_names_node_key_and_holder() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = taken.local_addr().expect("bound").port();
        let needed = Needed {
            node: "a".into(),
            bind: "127.0.0.1".into(),
            port,
            key: "client_port",
        };
        let text = obstacle(&needed).expect("it is taken");
        assert!(
            text.contains(&format!(
                "port {port} (client_port of node \"a\") is in use by"
            )),
            "{text}"
        );
        assert!(
            text.contains(&format!("(pid {})", std::process::id())),
            "{text}"
        );
        drop(taken);
        assert_eq!(obstacle(&needed), None);
    }

    #[test]
    fn an_address_of_another_machine_is_told_apart() {
        let needed = Needed {
            node: "a".into(),
            bind: "192.0.2.1".into(),
            port: 9,
            key: "cluster_port",
        };
        let text = obstacle(&needed).expect("documentation addresses are nobody's");
        assert!(
            text.contains("no interface of this machine has that address"),
            "{text}"
        );
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1
   1: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 222 1
   2: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1
  short";
        assert_eq!(listeners(table, 0x1f90), [111]);
        assert_eq!(listeners(table, 80), [] as [u64; 0]);
    }
}
