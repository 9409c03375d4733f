//! What a launch will do, worked out from the configuration before anything is started.

use std::path::{Path, PathBuf};
use std::time::Duration;

use understudy_config::{ClusterConfig, LoadOptions, PathCheck, Role};

use super::pidfile::PidFile;
use crate::cli::exit::Failure;

/// Beyond the gateway's own grace for requests in flight: time for engines to end and files to be closed.
const STOP_MARGIN: Duration = Duration::from_secs(5);
/// The configuration that is used where none is named, inside the installation.
const DEFAULT_CONFIG: &str = "config/profiles/local.toml";

/// A cluster, and what is where.
#[derive(Debug)]
pub struct Plan {
    pub config: ClusterConfig,
    /// The file as it stands, for copies on other machines.
    pub text: String,
    pub nodes: Vec<NodePlan>,
}

/// One node process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    pub name: String,
    pub place: Place,
    pub is_gateway: bool,
}

/// Where a node process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Here,
    /// On another one, by ssh.
    There {
        /// What ssh is given.
        destination: String,
        /// Folder of the installation there; may begin with `~/`, and is else relative to the home folder.
        dir: String,
    },
}

impl Plan {
    /// Reads the configuration. Paths of other machines are not looked at.
    pub fn load(file: Option<&Path>) -> Result<Self, Failure> {
        let file = file.map_or_else(default_config, Path::to_owned);
        let options = LoadOptions {
            paths: PathCheck::None,
        };
        let told = |problems: understudy_config::Problems| Failure::usage(problems.to_string());
        let (config, _) = ClusterConfig::load_with(&file, &options).map_err(told)?;
        let text = std::fs::read_to_string(&file)
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", file.display())))?;
        let nodes = config.nodes.iter().map(|node| NodePlan {
            name: node.name.clone(),
            place: match &node.ssh {
                None => Place::Here,
                Some(destination) => Place::There {
                    destination: destination.clone(),
                    dir: node
                        .dir
                        .clone()
                        .unwrap_or_else(|| installation().display().to_string()),
                },
            },
            is_gateway: node.has_role(Role::Gateway),
        });
        let nodes = nodes.collect();
        Ok(Self {
            config,
            text,
            nodes,
        })
    }

    /// The node of that name, or a message with the names that there are.
    pub fn node(&self, name: &str) -> Result<&NodePlan, Failure> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .ok_or_else(|| {
                let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
                Failure::usage(format!(
                    "no node {name:?} in {}; there are: {}",
                    self.config.file.display(),
                    names.join(", ")
                ))
            })
    }

    /// The folder of this cluster's pid files and logs on this machine.
    pub fn run_dir(&self) -> &Path {
        &self.config.cluster.run_dir
    }

    /// The pid file of a node of this machine.
    pub fn pid_file(&self, node: &NodePlan) -> PidFile {
        PidFile(self.run_dir().join(format!("{}.pid", node.name)))
    }

    /// What a node of this machine writes to its standard output and error.
    pub fn output_file(&self, node: &NodePlan) -> PathBuf {
        self.run_dir().join(format!("{}.log", node.name))
    }

    /// The log of a node of this machine: its own file where the configuration names a folder.
    pub fn log_file(&self, node: &NodePlan) -> PathBuf {
        match &self.config.logging.directory {
            Some(folder) => folder.join(format!("{}.log", node.name)),
            None => self.output_file(node),
        }
    }

    /// Who starts nodes of this plan on other machines: this machine, and the run folder, of which one launcher has the
    /// lock. A later launch with the same owner is the heir of one that was killed.
    pub fn owner(&self) -> String {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{} {}", host.trim(), self.run_dir().display())
    }

    /// Time between SIGTERM and SIGKILL for a node.
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.config.gateway.shutdown_grace_ms) + STOP_MARGIN
    }
}

/// The installation that this program belongs to: the folder above `target/release/` or `bin/`.
pub fn installation() -> PathBuf {
    let binary = std::env::current_exe().unwrap_or_default();
    let root = installation_of(&binary).map(Path::to_owned);
    root.or_else(|| std::env::current_dir().ok())
        .unwrap_or_else(|| PathBuf::from("."))
}

fn installation_of(binary: &Path) -> Option<&Path> {
    let folder = binary.parent()?;
    if folder.ends_with("target/release") || folder.ends_with("target/debug") {
        folder.parent()?.parent()
    } else if folder.ends_with("bin") {
        folder.parent()
    } else {
        None
    }
}

/// The configuration that is used where none is named.
pub fn default_config() -> PathBuf {
    installation().join(DEFAULT_CONFIG)
}

/// Where a copy of the configuration goes, relative to the folder of the installation on another machine. The folder is
/// the same as here, so that the relative paths in the file keep their meaning; a file from outside the installation
/// goes into the installation's folder itself. The name is another one, so that nothing under version control changes.
pub fn remote_config_path(file: &Path, installation: &Path, cluster: &str) -> PathBuf {
    // Either may have been reached through a symbolic link. The file's own link is left alone: relative paths in a file
    // start from where it was found.
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let folder = file.parent().map(real).unwrap_or_default();
    let inside = folder.strip_prefix(real(installation));
    inside
        .unwrap_or(Path::new(""))
        .join(format!(".launched-{cluster}.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_installation_is_above_the_binary() {
        let root = |binary| installation_of(Path::new(binary)).and_then(Path::to_str);
        assert_eq!(root("/opt/u/target/release/understudy"), Some("/opt/u"));
        assert_eq!(root("/opt/u/bin/understudy"), Some("/opt/u"));
        assert_eq!(root("/opt/u/target/release/deps/test-1"), None);
        assert_eq!(root("understudy"), None);
    }

    #[test]
    fn copies_keep_the_folder_and_take_another_name() {
        let path = |file| remote_config_path(Path::new(file), Path::new("/opt/u"), "prod");
        assert_eq!(
            path("/opt/u/config/profiles/cluster.toml"),
            Path::new("config/profiles/.launched-prod.toml")
        );
        assert_eq!(
            path("/opt/u/cluster.toml"),
            Path::new(".launched-prod.toml")
        );
        assert_eq!(
            path("/etc/understudy/cluster.toml"),
            Path::new(".launched-prod.toml")
        );
    }

    #[test]
    fn an_installation_behind_a_link_is_recognised() {
        let root = std::env::temp_dir().join(format!("understudy-plan-{}", std::process::id()));
        std::fs::create_dir_all(root.join("real/config")).expect("a temporary folder");
        std::os::unix::fs::symlink(root.join("real"), root.join("link")).expect("linked");
        for (file, installation) in [("link", "real"), ("real", "link")] {
            assert_eq!(
                remote_config_path(
                    &root.join(file).join("config/c.toml"),
                    &root.join(installation),
                    "x"
                ),
                Path::new("config/.launched-x.toml")
            );
        }
        std::fs::remove_dir_all(&root).expect("removed");
    }
}
