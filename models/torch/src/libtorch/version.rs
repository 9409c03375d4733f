//! Which LibTorch fits: the same check for the build script, for the library that the process has loaded, and for CUDA's.

use std::path::Path;

/// The release that tch 0.24 is generated for.
pub const WANTED: &str = "2.11";

/// The version that a LibTorch root states, where its two ways of packaging put it: `build-version` (zip) or `version.py` (Python
/// wheel). `None` if it states none.
pub fn stated(root: &Path) -> Option<String> {
    let read = |name: &str| std::fs::read_to_string(root.join(name)).ok();
    let from_python = || {
        let text = read("version.py")?;
        let line = text.lines().find(|line| line.starts_with("__version__"))?;
        line.split(['\'', '"']).nth(1).map(str::to_owned)
    };
    read("build-version")
        .map(|text| text.trim().to_owned())
        .or_else(from_python)
}

/// Whether a version is of the wanted release: `2.11`, `2.11.0`, `2.11.1+cu130`.
pub fn fits(version: &str) -> bool {
    version
        .strip_prefix(WANTED)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '+']))
}
