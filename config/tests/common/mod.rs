//! What the tests of problems share: a smallest file, and ways to break it.

use understudy_config::{ClusterConfig, LoadOptions, PathCheck, Problem, Problems, Warning};

pub const SMALL: &str = r#"
[[node]]
name = "a"
cluster_port = 7600
client_port = 7601

[[model]]
name = "demo"
path = "models/demo"
"#;

pub fn parse(text: &str) -> Result<(ClusterConfig, Vec<Warning>), Problems> {
    ClusterConfig::parse(
        "/etc/u/c.toml",
        text,
        &LoadOptions {
            paths: PathCheck::None,
        },
    )
}

pub fn problems(text: &str) -> Vec<Problem> {
    match parse(text) {
        Ok(_) => panic!("no problem in:\n{text}"),
        Err(problems) => problems.problems,
    }
}

/// The only problem of a text.
pub fn problem(text: &str) -> Problem {
    let mut all = problems(text);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

/// The only problem after a line is added to the small file (its sections continue the last one, or open a new one).
pub fn small_with(addition: &str) -> Problem {
    problem(&format!("{SMALL}{addition}\n"))
}

#[track_caller]
pub fn has(problem: &Problem, key: &str, line: usize, message: &str) {
    assert_eq!(problem.key, key, "{problem}");
    assert_eq!(problem.line, line, "{problem}");
    assert!(problem.message.contains(message), "{problem}");
}
