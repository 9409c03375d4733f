//! Which node serves which replica: a pure function of the file, so that every node works out the same answer alone.

use crate::ClusterConfig;
use crate::settings::{ModelSettings, NodeSettings};
use crate::value::{Device, Role};

/// One replica's place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    /// Name of the model.
    pub model: String,
    /// Number of the replica within its model, from 0.
    pub replica: u32,
    /// Name of the node.
    pub node: String,
    /// Device of its engine process.
    pub device: Device,
}

impl ClusterConfig {
    /// The place of every replica: models in file order, each replica on the eligible host with the fewest replicas so
    /// far, the first in the file among equals (for one model that is round-robin). On a host, replicas take the
    /// devices in turn.
    pub fn placement(&self) -> Vec<Placement> {
        let mut load = vec![0_usize; self.nodes.len()];
        let mut placements = Vec::new();
        for model in &self.models {
            for replica in 0..model.replicas {
                let eligible =
                    (0..self.nodes.len()).filter(|at| is_eligible(model, &self.nodes[*at]));
                let Some(at) = eligible.min_by_key(|at| (load[*at], *at)) else {
                    break;
                };
                let device = device_for(model, &self.nodes[at], load[at]);
                load[at] += 1;
                let node = self.nodes[at].name.clone();
                placements.push(Placement {
                    model: model.name.clone(),
                    replica,
                    node,
                    device,
                });
            }
        }
        placements
    }
}

/// Whether a node may serve a model: it is a host, the model's list names it (if there is one), and it has a device.
pub(crate) fn is_eligible(model: &ModelSettings, node: &NodeSettings) -> bool {
    let named = model
        .nodes
        .as_ref()
        .is_none_or(|names| names.contains(&node.name));
    named && node.has_role(Role::Host) && !devices_for(model, node).is_empty()
}

fn devices_for(model: &ModelSettings, node: &NodeSettings) -> Vec<Device> {
    let wanted = model.device.unwrap_or(Device::Auto);
    node.devices
        .iter()
        .copied()
        .filter(|device| device.offers(wanted))
        .collect()
}

fn device_for(model: &ModelSettings, node: &NodeSettings, turn: usize) -> Device {
    match model.device {
        Some(device) if device != Device::Auto => device,
        _ => {
            let devices = devices_for(model, node);
            devices
                .get(turn % devices.len().max(1))
                .copied()
                .unwrap_or(Device::Auto)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, devices: &[Device]) -> NodeSettings {
        NodeSettings {
            name: name.into(),
            devices: devices.to_vec(),
            ..NodeSettings::default()
        }
    }

    fn model(name: &str, replicas: u32) -> ModelSettings {
        ModelSettings {
            name: name.into(),
            replicas,
            ..ModelSettings::default()
        }
    }

    fn places(nodes: Vec<NodeSettings>, models: Vec<ModelSettings>) -> Vec<String> {
        let config = ClusterConfig {
            nodes,
            models,
            ..ClusterConfig::default()
        };
        let show = |p: Placement| format!("{}/{} {} {}", p.model, p.replica, p.node, p.device);
        config.placement().into_iter().map(show).collect()
    }

    #[test]
    fn replicas_of_one_model_go_round_robin_in_file_order() {
        let nodes = vec![node("b", &[Device::Cpu]), node("a", &[Device::Cpu])];
        assert_eq!(
            places(nodes, vec![model("m", 5)]),
            [
                "m/0 b cpu",
                "m/1 a cpu",
                "m/2 b cpu",
                "m/3 a cpu",
                "m/4 b cpu"
            ]
        );
    }

    #[test]
    fn small_models_spread_over_the_hosts() {
        let nodes = vec![node("a", &[Device::Auto]), node("b", &[Device::Auto])];
        assert_eq!(
            places(nodes, vec![model("x", 1), model("y", 1)]),
            ["x/0 a auto", "y/0 b auto"]
        );
    }

    #[test]
    fn restrictions_and_roles_are_kept() {
        let mut gateway = node("g", &[Device::Cpu]);
        gateway.roles = vec![Role::Gateway];
        let mut only_b = model("m", 2);
        only_b.nodes = Some(vec!["b".into()]);
        let nodes = vec![
            gateway,
            node("a", &[Device::Cpu]),
            node("b", &[Device::Cpu]),
        ];
        assert_eq!(
            places(nodes.clone(), vec![only_b]),
            ["m/0 b cpu", "m/1 b cpu"]
        );
        assert_eq!(
            places(nodes, vec![model("m", 2)]),
            ["m/0 a cpu", "m/1 b cpu"]
        );
    }

    #[test]
    fn devices_are_taken_in_turn_and_a_models_device_wins() {
        let gpus = [Device::Cuda(0), Device::Cuda(1)];
        assert_eq!(
            places(vec![node("a", &gpus)], vec![model("m", 3)]),
            ["m/0 a cuda:0", "m/1 a cuda:1", "m/2 a cuda:0"]
        );
        let mut second = model("m", 2);
        second.device = Some(Device::Cuda(1));
        let nodes = vec![node("cpu-only", &[Device::Cpu]), node("a", &gpus)];
        assert_eq!(
            places(nodes, vec![second]),
            ["m/0 a cuda:1", "m/1 a cuda:1"]
        );
    }
}
