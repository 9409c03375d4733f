//! Warnings: what works, but probably not as meant.

use super::addresses::is_loopback;
use crate::load::ClusterConfig;
use crate::problem::{Problem, Warning};
use crate::schema::Reader;
use crate::settings::NodeSettings;
use crate::value::{Numerics, Quantization, Role};

pub(super) fn warnings(config: &ClusterConfig, reader: &Reader<'_>) -> Vec<Warning> {
    let mut found = Vec::new();
    cluster(config, reader, &mut found);
    network(config, reader, &mut found);
    found.extend(super::addresses::warnings(&config.nodes, reader));
    metrics(config, reader, &mut found);
    models(config, reader, &mut found);
    found.into_iter().map(Warning).collect()
}

fn cluster(config: &ClusterConfig, reader: &Reader<'_>, found: &mut Vec<Problem>) {
    let with_role = |role| {
        config
            .nodes
            .iter()
            .enumerate()
            .filter(move |(_, node)| node.has_role(role))
    };
    if let [(at, node)] = with_role(Role::Gateway).collect::<Vec<_>>()[..] {
        let message = format!(
            "node \"{}\" is the only gateway: if it is lost, requests in flight are lost too",
            node.name
        );
        let problem = reader.problem_at(&format!("node[{at}]"), message);
        found
            .push(problem.help(
                "give another node the role `gateway`, so that clients have somewhere to go",
            ));
    }
    if let [(at, node)] = with_role(Role::Host).collect::<Vec<_>>()[..] {
        let message = format!(
            "node \"{}\" is the only host: if it is lost, nothing serves",
            node.name
        );
        found.push(
            reader
                .problem_at(&format!("node[{at}]"), message)
                .help("give another node the role `host`"),
        );
    }
}

fn is_local(node: &NodeSettings) -> bool {
    is_loopback(&node.host) && is_loopback(&node.bind)
}

fn network(config: &ClusterConfig, reader: &Reader<'_>, found: &mut Vec<Problem>) {
    let open_gateway = config
        .nodes
        .iter()
        .position(|node| node.has_role(Role::Gateway) && !is_local(node));
    if let (Some(at), None) = (open_gateway, &config.gateway.token_file) {
        let message = "clients on the network can connect to this gateway without a token";
        let problem = reader.problem_at(&format!("node[{at}].client_port"), message);
        found.push(problem.help("set `gateway.token_file`"));
    }
    if let Some(at) = config.nodes.iter().position(|node| !is_local(node)) {
        let message = "traffic between nodes and clients is not encrypted";
        let problem = reader.problem_at(&format!("node[{at}]"), message);
        found
            .push(problem.help("run the cluster on a network that you trust, or through a tunnel"));
    }
}

fn metrics(config: &ClusterConfig, reader: &Reader<'_>, found: &mut Vec<Problem>) {
    if !config.metrics.enabled {
        return;
    }
    for (at, node) in config
        .nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.metrics_port.is_none())
    {
        let message = format!(
            "node \"{}\" serves no metrics, because it has no `metrics_port`",
            node.name
        );
        let problem = reader.problem_at(&format!("node[{at}].metrics_port"), message);
        found.push(
            problem.help("add `metrics_port = …`, or write `enabled = false` under [metrics]"),
        );
    }
}

fn models(config: &ClusterConfig, reader: &Reader<'_>, found: &mut Vec<Problem>) {
    for (at, model) in config.models.iter().enumerate() {
        if model.replicas == 1 {
            let message = "with one replica, requests wait for its restart when its engine is lost";
            let problem = reader.problem_at(&format!("model[{at}].replicas"), message);
            found.push(
                problem.help("write `replicas = 2` to have another engine take over at once"),
            );
        }
        if model.numerics == Numerics::Fast {
            let message = "with \"fast\", a recovered stream keeps every token that was shown, but may go on with others than an undisturbed one would";
            let problem = reader.problem_at(&format!("model[{at}].numerics"), message);
            found.push(problem.help("write numerics = \"exact\" for bit-exact recovery on CPUs; a GPU always computes as with \"fast\""));
        }
        if model.numerics == Numerics::Fast && model.quantization != Quantization::None {
            let message =
                "\"fast\" has no quantized weights: the model is computed as `dtype` says";
            let problem = reader.problem_at(&format!("model[{at}].quantization"), message);
            found.push(problem.help("write numerics = \"exact\" for quantized weights"));
        }
        if model.step_token_budget < model.max_sequences {
            let message =
                "fewer tokens a step than sequences: some of them stand still in every step";
            let problem = reader.problem_at(&format!("model[{at}].step_token_budget"), message);
            found.push(problem.help("give every sequence at least one token a step"));
        }
    }
}
