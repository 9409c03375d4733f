//! Where the programs under test are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Set by scripts/test.sh: a test that needs the real engine fails without it, where it would otherwise be skipped.
pub const REQUIRE_ENGINE: &str = "UNDERSTUDY_REQUIRE_ENGINE";

/// Which engine a cluster runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The deterministic one without a model: its output depends on every token before it.
    Fake,
    /// LibTorch.
    Real,
}

/// The directory that this program was built into: `target/<profile>`.
pub fn directory() -> PathBuf {
    let own = std::env::current_exe().expect("a program knows where it lies");
    let parent = own.parent().expect("a file has a directory");
    if parent.ends_with("deps") {
        parent.parent().expect("deps lies in a profile").to_owned()
    } else {
        parent.to_owned()
    }
}

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests lie in the repository")
}

/// The `understudy` program, built now if it is not up to date.
pub fn understudy() -> PathBuf {
    build();
    directory().join("understudy")
}

/// The engine program, or why there is none: the real one needs LibTorch.
pub fn engine(engine: Engine) -> Option<PathBuf> {
    build();
    let path = match engine {
        Engine::Fake => return Some(directory().join("understudy-engine-fake")),
        Engine::Real => directory().join("understudy-engine"),
    };
    if path.exists() {
        return Some(path);
    }
    let missing = format!(
        "{} is missing: run scripts/setup.sh, then cargo build --release -p understudy-torch",
        path.display()
    );
    assert!(std::env::var_os(REQUIRE_ENGINE).is_none(), "{missing}");
    eprintln!("SKIPPED, as {missing}");
    None
}

/// Cargo builds only the tests' own package for a test: the programs are built here, once, and at no cost if they are.
fn build() {
    // scripts/test.sh has just built them, together with everything else; building a part of the workspace again would
    // choose other features of its dependencies, and compile them anew.
    if std::env::var_os(REQUIRE_ENGINE).is_some() {
        return;
    }
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let directory = directory();
        let profile = match directory.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "dev",
            Some(name) => name,
        };
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--profile",
                profile,
                "-p",
                "understudy-node",
                "-p",
                "understudy-engine-core",
            ])
            .current_dir(repository())
            .env(
                "CARGO_TARGET_DIR",
                directory
                    .parent()
                    .expect("a profile lies in a target directory"),
            )
            .status()
            .expect("cargo runs");
        assert!(status.success(), "the programs under test do not build");
    });
}
