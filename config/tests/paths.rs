//! Problems with what stands on the disk, and how much of it is looked at.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use understudy_config::{ClusterConfig, LoadOptions, PathCheck, Problem};

/// A directory that is removed with its contents.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("understudy-config-{}-{number}", std::process::id()));
        fs::create_dir_all(path.join("models/demo")).expect("a scratch directory");
        fs::write(path.join("models/demo/config.json"), "{}").expect("config.json");
        Self(path)
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
        fs::write(&path, text).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("permissions");
    }

    fn config(&self, addition: &str) -> PathBuf {
        let text = format!(
            "[[node]]\nname = \"a\"\ncluster_port = 1\nclient_port = 2\n\
             [[node]]\nname = \"b\"\nroles = [\"host\"]\ncluster_port = 3\n\
             [[model]]\nname = \"demo\"\npath = \"models/demo\"\nnodes = [\"b\"]\n{addition}\n"
        );
        self.write("c.toml", &text, 0o644);
        self.0.join("c.toml")
    }

    fn problems(&self, addition: &str, paths: PathCheck) -> Vec<Problem> {
        match ClusterConfig::load_with(self.config(addition), &LoadOptions { paths }) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.problems,
        }
    }

    #[track_caller]
    fn problem(&self, addition: &str, key: &str, message: &str) {
        let found = self.problems(addition, PathCheck::All);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert_eq!(found[0].key, key, "{}", found[0]);
        assert!(found[0].message.contains(message), "{}", found[0]);
        assert_eq!(
            self.problems(addition, PathCheck::None),
            [],
            "nothing is looked at"
        );
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const SECRET: &str = "0123456789abcdef0123456789abcdef\n";

#[test]
fn a_whole_installation_is_in_order() {
    let scratch = Scratch::new();
    scratch.write("run/local/cookie", SECRET, 0o600);
    assert_eq!(scratch.problems("", PathCheck::All), []);
    assert_eq!(scratch.problems("", PathCheck::Node("a".into())), []);
    assert!(ClusterConfig::load(scratch.config("")).is_ok());
}

#[test]
fn models_stand_on_the_disk() {
    let scratch = Scratch::new();
    scratch.problem(
        "[[model]]\nname = \"m\"\npath = \"models/none\"",
        "model[1].path",
        "cannot look at",
    );
    scratch.problem(
        "[[model]]\nname = \"m\"\npath = \"c.toml\"",
        "model[1].path",
        "is not a directory",
    );
    scratch.problem(
        "[[model]]\nname = \"m\"\npath = \"models\"",
        "model[1].path",
        "holds no config.json",
    );
}

#[test]
fn a_node_looks_at_the_models_that_it_serves() {
    let scratch = Scratch::new();
    scratch.write("run/local/cookie", SECRET, 0o600);
    fs::remove_file(scratch.0.join("models/demo/config.json")).expect("removed");
    assert_eq!(scratch.problems("", PathCheck::Node("a".into())), []);
    assert_eq!(scratch.problems("", PathCheck::Node("b".into())).len(), 1);
}

#[test]
fn models_of_other_machines_are_not_looked_for_here() {
    let scratch = Scratch::new();
    let far = "[[node]]\nname = \"c\"\nroles = [\"host\"]\ncluster_port = 4\nssh = \"c\"\n\
               [[model]]\nname = \"m\"\npath = \"/far/away\"\nnodes = [\"c\"]";
    assert_eq!(scratch.problems(far, PathCheck::All), []);
    scratch.write("run/local/cookie", SECRET, 0o600);
    assert_eq!(scratch.problems(far, PathCheck::Node("c".into())).len(), 1);
}

#[test]
fn the_cookie_is_a_secret() {
    let scratch = Scratch::new();
    assert_eq!(
        scratch.problems("", PathCheck::All),
        [],
        "the launch script creates it"
    );
    let missing = scratch.problems("", PathCheck::Node("a".into()));
    assert!(
        missing.len() == 1 && missing[0].message.contains("there is no cookie"),
        "{missing:#?}"
    );
    let key = "cluster.cookie_file";
    scratch.write("run/local/cookie", SECRET, 0o640);
    scratch.problem("", key, "can be used by others (mode 640)");
    scratch.write("run/local/cookie", "short-9", 0o600);
    scratch.problem("", key, "holds about 0 bits");
    scratch.write("run/local/cookie", &format!("{SECRET}{SECRET}"), 0o600);
    scratch.problem("", key, "more than one word");
    scratch.write("run/local/cookie", &"x".repeat(5000), 0o600);
    scratch.problem("", key, "a secret is one line");
    scratch.problem("[cluster]\ncookie_file = \"models\"", key, "is not a file");
    scratch.problem(
        "[cluster]\ncookie_file = \"c.toml/cookie\"",
        key,
        "is a file",
    );
}

#[test]
fn directories_can_be_made() {
    let scratch = Scratch::new();
    scratch.problem(
        "[logging]\ndirectory = \"c.toml/logs\"",
        "logging.directory",
        "is a file",
    );
    let found = scratch.problems("[cluster]\nrun_dir = \"c.toml\"", PathCheck::All);
    assert!(
        found.iter().any(|problem| problem.key == "cluster.run_dir"),
        "{found:#?}"
    );
}

#[test]
fn the_client_tokens_exist() {
    let scratch = Scratch::new();
    let (addition, key) = ("[gateway]\ntoken_file = \"token\"", "gateway.token_file");
    scratch.problem(addition, key, "cannot look at");
    for (text, mode, message) in [
        ("# none\n", 0o600, "it holds no token"),
        ("two words\n", 0o600, "line 1 holds more than one word"),
        ("t0ken\n", 0o644, "can be read by others (mode 644)"),
    ] {
        scratch.write("token", text, mode);
        scratch.problem(addition, key, message);
    }
    // One for each client, with comments: what a gateway reads.
    scratch.write("token", "# alice\nt0ken\n\n# bob\n0ther\n", 0o600);
    assert_eq!(scratch.problems(addition, PathCheck::All), []);
}

#[test]
fn no_node_is_called_like_the_launcher() {
    let scratch = Scratch::new();
    let node = "[[node]]\nname = \"launcher\"\nroles = [\"host\"]\ncluster_port = 9";
    let found = scratch.problems(node, PathCheck::None);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].key, "node[2].name");
    assert!(found[0].message.contains("launcher.log"), "{}", found[0]);
}

#[test]
fn a_file_that_cannot_be_read_says_so() {
    let scratch = Scratch::new();
    scratch.write("binary.toml", "", 0o644);
    fs::write(scratch.0.join("binary.toml"), [0xff, 0xfe]).expect("written");
    for (path, message) in [
        (scratch.0.join("none.toml"), "cannot open"),
        (scratch.0.clone(), "is a directory"),
        (scratch.0.join("binary.toml"), "cannot read"),
    ] {
        let Err(report) = ClusterConfig::load(&path) else {
            panic!("{} loaded", path.display())
        };
        assert!(report.problems[0].message.contains(message), "{report}");
        assert_eq!(report.problems[0].line, 0);
        assert!(
            report.to_string().contains(&path.display().to_string()),
            "{report}"
        );
    }
    let huge = scratch.0.join("huge.toml");
    fs::File::create(&huge)
        .and_then(|file| file.set_len(5 << 20))
        .expect("a huge file");
    let Err(report) = ClusterConfig::load(Path::new(&huge)) else {
        panic!("loaded")
    };
    assert!(report.problems[0].message.contains("at most"), "{report}");
}
