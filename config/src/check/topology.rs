//! Who is there, and who can reach and serve whom: names, roles, ports, placement.

use std::collections::HashMap;

use super::addresses::{self, is_loopback, is_unspecified};
use crate::kind::nearest;
use crate::load::ClusterConfig;
use crate::placement::is_eligible;
use crate::schema::Reader;
use crate::settings::{ModelSettings, NodeSettings};
use crate::value::Role;

pub(super) fn check(config: &ClusterConfig, reader: &mut Reader<'_>) {
    presence(config, reader);
    unique_names(
        "node",
        config.nodes.iter().map(|node| node.name.as_str()),
        reader,
    );
    unique_names(
        "model",
        config.models.iter().map(|model| model.name.as_str()),
        reader,
    );
    for (at, node) in config.nodes.iter().enumerate() {
        client_port(at, node, reader);
    }
    addresses::check(&config.nodes, reader);
    ports(&config.nodes, reader);
    for (at, model) in config.models.iter().enumerate() {
        model_nodes(at, model, config, reader);
    }
}

fn presence(config: &ClusterConfig, reader: &mut Reader<'_>) {
    let mut missing = |key: &str, message: &str, help: &str| {
        // A section that is there, but cannot be read as a whole, is not missing. (Where a single node or its roles
        // cannot be read, both roles are assumed.)
        if reader.problems.iter().any(|problem| problem.key == key) {
            return;
        }
        let problem = reader.problem_at(key, message).help(help);
        reader.problems.push(problem);
    };
    if config.nodes.is_empty() {
        missing(
            "node",
            "there is no node",
            "write a [[node]] with `name`, `cluster_port` and `client_port`",
        );
    } else {
        if !config.nodes.iter().any(|node| node.has_role(Role::Gateway)) {
            missing(
                "node",
                "no node has the role `gateway`",
                "clients need one: add \"gateway\" to a node's `roles`",
            );
        }
        if !config.nodes.iter().any(|node| node.has_role(Role::Host)) {
            missing(
                "node",
                "no node has the role `host`",
                "models need one: add \"host\" to a node's `roles`",
            );
        }
    }
    if config.models.is_empty() {
        missing(
            "model",
            "there is no model",
            "write a [[model]] with `name` and `path`",
        );
    }
}

fn unique_names<'c>(section: &str, names: impl Iterator<Item = &'c str>, reader: &mut Reader<'_>) {
    let mut first: HashMap<&str, usize> = HashMap::new();
    for (at, name) in names.enumerate().filter(|(_, name)| !name.is_empty()) {
        if let Some(earlier) = first.insert(name, at) {
            let line = reader
                .problem_at(&format!("{section}[{earlier}].name"), "")
                .line;
            let message = format!("the name \"{name}\" is taken by the {section} in line {line}");
            let problem = reader.problem_at(&format!("{section}[{at}].name"), message);
            reader
                .problems
                .push(problem.help(format!("names are unique among {section}s")));
        }
    }
}

fn client_port(at: usize, node: &NodeSettings, reader: &mut Reader<'_>) {
    let key = format!("node[{at}].client_port");
    if reader.problems.iter().any(|problem| problem.key == key) {
        return;
    }
    let is_gateway = node.has_role(Role::Gateway);
    if is_gateway && node.client_port.is_none() {
        let problem =
            reader.problem_at(&key, "a node with the role `gateway` needs a `client_port`");
        let help =
            "add `client_port = …`, or `roles = [\"host\"]` if clients shall not connect here";
        reader.problems.push(problem.help(help));
    }
    if !is_gateway && node.client_port.is_some() {
        let problem = reader.problem_at(&key, "`client_port` on a node without the role `gateway`");
        reader
            .problems
            .push(problem.help("remove it, or add \"gateway\" to `roles`"));
    }
}

/// One port that a node listens on.
struct Listener<'c> {
    node: &'c NodeSettings,
    key: String,
    port: u16,
}

fn listeners(nodes: &[NodeSettings]) -> Vec<Listener<'_>> {
    let of_node = |(at, node): (usize, &'_ _)| -> Vec<(usize, &'_ str, Option<u16>)> {
        let node: &NodeSettings = node;
        vec![
            (at, "cluster_port", Some(node.cluster_port)),
            (at, "client_port", node.client_port),
            (at, "metrics_port", node.metrics_port),
        ]
    };
    let all = nodes.iter().enumerate().flat_map(of_node);
    let given =
        all.filter_map(|(at, key, port)| port.filter(|port| *port > 0).map(|port| (at, key, port)));
    given
        .map(|(at, key, port)| Listener {
            node: &nodes[at],
            key: format!("node[{at}].{key}"),
            port,
        })
        .collect()
}

/// Whether two listeners cannot both be opened: same port, same machine, and addresses that overlap.
fn clash(a: &Listener<'_>, b: &Listener<'_>) -> bool {
    let (left, right) = (a.node, b.node);
    let same_host = left.host.eq_ignore_ascii_case(&right.host)
        || is_loopback(&left.host) && is_loopback(&right.host);
    let local_name = |host: &str| {
        if host.eq_ignore_ascii_case("localhost") {
            "127.0.0.1".into()
        } else {
            host.to_lowercase()
        }
    };
    let overlap = local_name(&left.bind) == local_name(&right.bind)
        || is_unspecified(&left.bind)
        || is_unspecified(&right.bind);
    a.port == b.port && same_host && overlap
}

fn ports(nodes: &[NodeSettings], reader: &mut Reader<'_>) {
    let listeners = listeners(nodes);
    for (at, listener) in listeners.iter().enumerate() {
        if let Some(earlier) = listeners[..at]
            .iter()
            .find(|earlier| clash(earlier, listener))
        {
            let line = reader.problem_at(&earlier.key, "").line;
            let owner = if earlier.node.name.is_empty() {
                "another node"
            } else {
                &earlier.node.name
            };
            let message = format!(
                "port {} on {} is taken by `{}` of node \"{owner}\" in line {line}",
                listener.port,
                listener.node.host,
                earlier.key.rsplit('.').next().unwrap_or_default(),
            );
            let problem = reader.problem_at(&listener.key, message);
            reader
                .problems
                .push(problem.help("every port on a machine serves one purpose of one node"));
        }
    }
}

fn model_nodes(at: usize, model: &ModelSettings, config: &ClusterConfig, reader: &mut Reader<'_>) {
    let key = format!("model[{at}].nodes");
    let names: Vec<&str> = config
        .nodes
        .iter()
        .map(|node| node.name.as_str())
        .filter(|name| !name.is_empty())
        .collect();
    let mut named_well = true;
    for (item, wanted) in model.nodes.iter().flatten().enumerate() {
        match config.node(wanted) {
            Some(node) if node.has_role(Role::Host) => continue,
            Some(_) => {
                let problem = reader.problem_in(
                    &key,
                    item,
                    format!("node \"{wanted}\" does not have the role `host`"),
                );
                reader
                    .problems
                    .push(problem.help("add \"host\" to its `roles`, or leave it out here"));
            }
            None => {
                let problem =
                    reader.problem_in(&key, item, format!("there is no node \"{wanted}\""));
                let problem = problem.allowed(names.join(", "));
                reader
                    .problems
                    .push(match nearest(wanted, names.iter().copied()) {
                        Some(word) => problem.help(format!("did you mean \"{word}\"?")),
                        None => problem,
                    });
            }
        }
        named_well = false;
    }
    let has_hosts = config.nodes.iter().any(|node| node.has_role(Role::Host));
    if named_well && has_hosts && !config.nodes.iter().any(|node| is_eligible(model, node)) {
        let device = model
            .device
            .map_or_else(String::new, |device| device.to_string());
        let message = format!("no node that may serve this model offers the device \"{device}\"");
        let problem = reader.problem_at(&format!("model[{at}].device"), message);
        reader.problems.push(problem.help(format!(
            "add \"{device}\" to the `devices` of a node, or change `device`"
        )));
    }
}
