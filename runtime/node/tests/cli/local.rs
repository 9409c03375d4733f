//! Commands that need no cluster: `check`, `version`, and mistakes on the command line.

use crate::generate::temporary;
use crate::program::{run_with, understudy};

fn profile() -> String {
    format!(
        "{}/../../config/profiles/local.toml",
        env!("CARGO_MANIFEST_DIR")
    )
}

#[tokio::test]
async fn check_accepts_the_local_profile() {
    let ran = run_with(&["check", "--no-paths", &profile()]).await;
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""));
    assert!(
        ran.stdout
            .contains("ok: cluster \"local\", 2 node(s), 1 model(s), 2 replica(s)"),
        "{}",
        ran.stdout
    );
    let ran = run_with(&["check", "--no-paths", "--json", &profile()]).await;
    assert_eq!(ran.json()[0]["ok"], true);
}

#[tokio::test]
async fn check_reports_all_problems() {
    let file = temporary(
        "bad.toml",
        "[cluster]\nname = \"c\"\n[[node]]\nname = \"a\"\ncluster_port = 99999\nclint_port = 7\n[[model]]\nname = \"m\"\npath = \"m\"\nreplicas = 0\n",
    );
    let name = file.to_str().expect("UTF-8");
    let ran = run_with(&["check", "--no-paths", name]).await;
    assert_eq!(ran.status, Some(2), "{ran:?}");
    for part in ["cluster_port", "clint_port", "client_port", "replicas"] {
        assert!(
            ran.stdout.contains(part),
            "{part} is missing in {}",
            ran.stdout
        );
    }
    let ran = run_with(&["check", "--no-paths", "--json", name]).await;
    let report = &ran.json()[0];
    assert_eq!((ran.status, &report["ok"]), (Some(2), &false.into()));
    assert!(
        report["problems"]
            .as_array()
            .is_some_and(|problems| problems.len() >= 3),
        "{report}"
    );
    assert!(
        report["problems"][0]["line"]
            .as_u64()
            .is_some_and(|line| line > 0),
        "{report}"
    );
    std::fs::remove_file(&file).expect("removed");
    let ran = run_with(&["check", name]).await;
    assert_eq!(ran.status, Some(2));
    assert!(ran.stdout.contains(name), "{}", ran.stdout);
}

/// `understudy check FILE | head -1 || exit` in a script must not take a bad file for a good one.
#[tokio::test]
async fn check_fails_whether_or_not_anybody_reads_why() {
    let file = temporary("unread.toml", "[cluster]\nnam = \"c\"\n");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = understudy();
    command.args(["check", "--no-paths"]).arg(&file);
    let mut child = command.stdout(writer).spawn().expect("the program starts");
    let status = child.wait().await.expect("it ends");
    assert_eq!(status.code(), Some(2));
    std::fs::remove_file(&file).expect("removed");
}

#[tokio::test]
async fn version_is_told() {
    let ran = run_with(&["version", "--json"]).await;
    let version = &ran.json()[0];
    assert_eq!(
        (ran.status, &version["version"]),
        (Some(0), &env!("CARGO_PKG_VERSION").into())
    );
    assert_eq!(version["protocol"], understudy_protocol::PROTOCOL_VERSION);
    assert!(
        run_with(&["version"])
            .await
            .stdout
            .starts_with("understudy ")
    );
    assert!(
        run_with(&["--version"])
            .await
            .stdout
            .starts_with("understudy ")
    );
}

#[tokio::test]
async fn mistakes_are_explained() {
    for (arguments, part) in [
        (&["generate"][..], "--prompt"),
        (&["generate", "--promt", "x"], "--prompt"),
        (&["frobnicate"], "unrecognized subcommand"),
        (&["status", "--addr", "nowhere"], "write host:port"),
        (
            &["generate", "--prompt", "x", "--temperature", "hot"],
            "--temperature",
        ),
        (
            &["status", "--addr", "a:1", "--config", "f"],
            "cannot be used with",
        ),
        (&["status", "--config", "/no/such/file"], "/no/such/file"),
    ] {
        let ran = run_with(arguments).await;
        assert_eq!(
            (ran.status, ran.stdout.as_str()),
            (Some(2), ""),
            "{arguments:?}"
        );
        assert!(ran.stderr.contains(part), "{arguments:?}: {}", ran.stderr);
    }
    let help = run_with(&["--help"]).await;
    assert_eq!(help.status, Some(0));
    assert!(help.stdout.contains("Exit codes:"));
}
