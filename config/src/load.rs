//! Loading: text → sections → checks → [`ClusterConfig`], with every problem of every stage in one report.

use std::path::{Path, PathBuf};

use toml::de::DeTable;

use crate::check;
use crate::kind::join_normal;
use crate::problem::{Problems, Source, Warning};
use crate::schema::{Reader, Section};
use crate::settings::{
    ClusterSettings, FailureDetectorSettings, GatewaySettings, JournalSettings, LoggingSettings,
    MetricsSettings, ModelSettings, NodeSettings, RecoverySettings, RestartSettings,
};

/// A larger file is not a configuration; it is refused before it is read.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// The whole configuration. Paths are absolute; `bind`, `run_dir` and `cookie_file` are filled in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterConfig {
    /// Absolute path of the file that this was read from; empty if it was made in memory.
    pub file: PathBuf,
    /// `[cluster]`
    pub cluster: ClusterSettings,
    /// Every `[[node]]`, in file order.
    pub nodes: Vec<NodeSettings>,
    /// Every `[[model]]`, in file order.
    pub models: Vec<ModelSettings>,
    /// `[gateway]`
    pub gateway: GatewaySettings,
    /// `[journal]`
    pub journal: JournalSettings,
    /// `[failure_detector]`
    pub failure_detector: FailureDetectorSettings,
    /// `[restart]`
    pub restart: RestartSettings,
    /// `[recovery]`
    pub recovery: RecoverySettings,
    /// `[metrics]`
    pub metrics: MetricsSettings,
    /// `[logging]`
    pub logging: LoggingSettings,
}

/// Which of the paths in the file are looked at on this machine's disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PathCheck {
    /// All of them.
    #[default]
    All,
    /// Those that the named node uses: the models placed on it, its cookie and (for gateways) the client token.
    Node(String),
    /// None: for a file that is meant for other machines.
    None,
}

/// How to load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Which paths are looked at.
    pub paths: PathCheck,
}

impl ClusterConfig {
    /// Reads and checks a file, looking at all paths.
    ///
    /// # Errors
    /// Everything that is wrong with it; see [`Problems`].
    pub fn load(path: impl AsRef<Path>) -> Result<(Self, Vec<Warning>), Problems> {
        Self::load_with(path, &LoadOptions::default())
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// Everything that is wrong with it; see [`Problems`].
    pub fn load_with(
        path: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<(Self, Vec<Warning>), Problems> {
        let path = path.as_ref();
        let text = read_text(path).map_err(|message| {
            let source = Source {
                file: path,
                text: "",
            };
            Problems::sorted(vec![source.problem(None, "", message)], Vec::new())
        })?;
        Self::parse(path, &text, options)
    }

    /// Checks a text as if it stood in the file `path` (which need not exist).
    ///
    /// # Errors
    /// Everything that is wrong with it; see [`Problems`].
    pub fn parse(
        path: impl AsRef<Path>,
        text: &str,
        options: &LoadOptions,
    ) -> Result<(Self, Vec<Warning>), Problems> {
        let path = path.as_ref();
        let file = std::path::absolute(path).map_or_else(
            |_| path.to_owned(),
            |path| join_normal(&path, Path::new("")),
        );
        let base = file.parent().unwrap_or(Path::new("/")).to_owned();
        let mut reader = Reader::new(Source { file: path, text }, &base);
        let config = read(&mut reader, &file);
        let mut warnings = check::check(&config, &mut reader, options);
        reader.forget_stand_ins(&mut warnings);
        if reader.problems.is_empty() {
            Ok((config, warnings))
        } else {
            Err(Problems::sorted(reader.problems, warnings))
        }
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&NodeSettings> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The model of that name.
    pub fn model(&self, name: &str) -> Option<&ModelSettings> {
        self.models.iter().find(|model| model.name == name)
    }

    /// A number that is equal on two nodes if, and (but for chance) only if, they agree on every key on which nodes must
    /// agree: the cluster's name, its nodes, its models, its journal. Comments, layout, the order of keys, and keys that
    /// may differ from machine to machine do not enter.
    pub fn checksum(&self) -> u64 {
        let mut text = String::new();
        write_section(&mut text, &self.cluster);
        self.nodes
            .iter()
            .for_each(|node| write_section(&mut text, node));
        self.models
            .iter()
            .for_each(|model| write_section(&mut text, model));
        write_section(&mut text, &self.journal);
        fnv1a(text.as_bytes())
    }
}

fn write_section<S: Section>(out: &mut String, section: &S) {
    out.push_str(S::NAME);
    out.push('\n');
    section.write_shared(out);
}

/// FNV-1a, 64 bits: it finds accidents, and nobody gains from forging it.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn read_text(path: &Path) -> Result<String, String> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| format!("cannot open the configuration file: {error}"))?;
    if metadata.is_dir() {
        return Err("this is a directory; name the TOML file in it".into());
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(format!(
            "the file has {} bytes; a configuration has at most {MAX_FILE_BYTES}",
            metadata.len()
        ));
    }
    std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read the configuration file: {error}"))
}

fn read(reader: &mut Reader<'_>, file: &Path) -> ClusterConfig {
    let text = reader.source.text;
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let problem =
            reader
                .source
                .problem(error.span(), "", format!("not TOML: {}", error.message()));
        reader.problems.push(problem);
    }
    let root = root.get_ref();
    let known: Vec<&'static str> = crate::settings::sections()
        .iter()
        .map(|section| section.name)
        .collect();
    reader.unknown_keys(root, "", "", &known);
    let mut config = ClusterConfig {
        file: file.to_owned(),
        cluster: reader.section(root),
        nodes: reader.sections(root),
        models: reader.sections(root),
        gateway: reader.section(root),
        journal: reader.section(root),
        failure_detector: reader.section(root),
        restart: reader.section(root),
        recovery: reader.section(root),
        metrics: reader.section(root),
        logging: reader.section(root),
    };
    fill_in(&mut config, reader.base);
    config
}

/// The defaults that depend on other keys.
fn fill_in(config: &mut ClusterConfig, base: &Path) {
    if config.cluster.run_dir.as_os_str().is_empty() {
        config.cluster.run_dir = base.join("run").join(&config.cluster.name);
    }
    if config.cluster.cookie_file.as_os_str().is_empty() {
        config.cluster.cookie_file = config.cluster.run_dir.join("cookie");
    }
    for node in &mut config.nodes {
        if node.bind.is_empty() {
            node.bind.clone_from(&node.host);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::schema::Scope;
    use crate::settings::sections;

    /// `checksum` names the sections that it looks at, so none of the others may hold a key that it must see.
    #[test]
    fn keys_that_nodes_must_agree_on_stand_in_the_sections_of_the_checksum() {
        for section in sections() {
            let in_checksum = ["cluster", "node", "model", "journal"].contains(&section.name);
            let shared = section.keys.iter().any(|key| key.scope == Scope::Cluster);
            assert_eq!(shared, in_checksum, "[{}]", section.name);
        }
    }
}
