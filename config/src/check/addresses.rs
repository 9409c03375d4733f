//! Whether the addresses of a file make sense together: under which name others reach a node, and where it listens.
//!
//! Names are not looked up, because the file may be meant for other machines: only what a name says itself counts.

use std::net::IpAddr;

use crate::problem::Problem;
use crate::schema::Reader;
use crate::settings::NodeSettings;

pub(super) fn check(nodes: &[NodeSettings], reader: &mut Reader<'_>) {
    // Several machines, as the file itself says. (A file without ssh may be for one machine, some of whose nodes others
    // reach by its address.)
    let is_spread = nodes.iter().any(|node| !is_local_name(&node.host))
        && nodes.iter().any(|node| node.ssh.is_some());
    for (at, node) in nodes.iter().enumerate() {
        let found = [
            unreachable(at, node, reader),
            local_among_others(at, node, is_spread, reader),
            dir_without_ssh(at, node, reader),
        ];
        reader.problems.extend(found.into_iter().flatten());
    }
}

/// Nodes that are started elsewhere although all of them have addresses of this machine. Right for a second installation
/// on this machine, reached through ssh; on several machines no node would find another.
pub(super) fn warnings(nodes: &[NodeSettings], reader: &Reader<'_>) -> Vec<Problem> {
    // Right behind a tunnel that ends on this machine, and a mistake otherwise.
    let local_binds = nodes.iter().enumerate();
    let local_binds = local_binds.filter_map(|(at, node)| local_bind(at, node, reader));
    if nodes.iter().any(|node| !is_local_name(&node.host)) {
        return local_binds.collect();
    }
    let started_by_ssh = nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.ssh.is_some());
    let warn = |(at, node): (usize, &NodeSettings)| {
        let message = format!(
            "node \"{}\" is started over ssh, but \"{}\" means this machine to every node",
            node.name, node.host
        );
        reader
            .problem_at(&format!("node[{at}].host"), message)
            .help("if ssh leads to another machine, name that machine in the `host` of each node")
    };
    started_by_ssh.map(warn).collect()
}

pub(super) fn is_unspecified(host: &str) -> bool {
    host.parse::<IpAddr>()
        .is_ok_and(|address| address.is_unspecified())
}

pub(super) fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Loopback, or an address that is no address, which has its own problem.
fn is_local_name(host: &str) -> bool {
    is_loopback(host) || is_unspecified(host)
}

fn unreachable(at: usize, node: &NodeSettings, reader: &Reader<'_>) -> Option<Problem> {
    if !is_unspecified(&node.host) {
        return None;
    }
    let message = format!("\"{}\" is no address that others can reach", node.host);
    let help = format!(
        "name the machine here, and write bind = \"{}\" to listen on all addresses",
        node.host
    );
    let problem = reader.problem_at(&format!("node[{at}].host"), message);
    Some(problem.help(help))
}

/// The most likely mistake in a file for several machines: a `host` was forgotten, and its default is this machine.
fn local_among_others(
    at: usize,
    node: &NodeSettings,
    is_spread: bool,
    reader: &Reader<'_>,
) -> Option<Problem> {
    if !is_spread || !is_loopback(&node.host) {
        return None;
    }
    let key = format!("node[{at}].host");
    if reader.problems.iter().any(|problem| problem.key == key) {
        // It cannot be read; that it looks like the default is no second mistake.
        return None;
    }
    let origin = match reader.is_given(&key) {
        true => "",
        false => " (the default)",
    };
    let message = format!(
        "\"{}\"{origin} cannot be reached by the nodes on other machines",
        node.host
    );
    let problem = reader.problem_at(&key, message);
    Some(problem.help("name the machine of this node, as the others know it"))
}

fn local_bind(at: usize, node: &NodeSettings, reader: &Reader<'_>) -> Option<Problem> {
    if is_local_name(&node.host) || !is_loopback(&node.bind) {
        return None;
    }
    let message = format!(
        "this node listens on \"{}\" only: without a tunnel to it, nobody can reach it as \"{}\"",
        node.bind, node.host
    );
    let problem = reader.problem_at(&format!("node[{at}].bind"), message);
    Some(problem.help("leave `bind` out, or write bind = \"0.0.0.0\" to listen on all addresses"))
}

fn dir_without_ssh(at: usize, node: &NodeSettings, reader: &Reader<'_>) -> Option<Problem> {
    let ssh = format!("node[{at}].ssh");
    if node.dir.is_none() || node.ssh.is_some() || reader.is_given(&ssh) {
        return None;
    }
    let problem = reader.problem_at(
        &format!("node[{at}].dir"),
        "`dir` has no effect without `ssh`: the node starts on this machine, from this installation",
    );
    Some(problem.help("add `ssh = …`, or leave `dir` out"))
}
