//! What stands on the disk: models, cookie, tokens, directories. Only this machine's disk can be looked at, so models
//! that run on other machines alone are left out. Names of files that would collide are found without looking.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::cookie::{CookieError, read_cookie};
use crate::load::{ClusterConfig, PathCheck};
use crate::schema::Reader;
use crate::tokens::read_tokens;
use crate::value::Role;

/// A node's files are called after it; this name's are the launcher's own (`launcher.log`).
const LAUNCHER: &str = "launcher";

pub(super) fn check(config: &ClusterConfig, reader: &mut Reader<'_>, which: &PathCheck) {
    file_names(config, reader);
    let is_gateway = match which {
        PathCheck::None => return,
        PathCheck::All => true,
        PathCheck::Node(name) => config
            .node(name)
            .is_some_and(|node| node.has_role(Role::Gateway)),
    };
    models(config, reader, which);
    directory("cluster.run_dir", &config.cluster.run_dir, reader);
    if let Some(path) = &config.logging.directory {
        directory("logging.directory", path, reader);
    }
    cookie(config, reader, matches!(which, PathCheck::Node(_)));
    if let (Some(path), true) = (&config.gateway.token_file, is_gateway) {
        tokens("gateway.token_file", path, reader);
    }
}

fn file_names(config: &ClusterConfig, reader: &mut Reader<'_>) {
    let taken = |node: &crate::NodeSettings| node.name == LAUNCHER;
    if let Some(at) = config.nodes.iter().position(taken) {
        report(
            reader,
            &format!("node[{at}].name"),
            format!("\"{LAUNCHER}\" cannot be a node: {LAUNCHER}.log is the launcher's own log"),
            "give the node another name",
        );
    }
}

fn models(config: &ClusterConfig, reader: &mut Reader<'_>, which: &PathCheck) {
    let placements = config.placement();
    let here = |node: &str| match which {
        PathCheck::Node(name) => name == node,
        _ => config.node(node).is_some_and(|node| node.ssh.is_none()),
    };
    let served: HashSet<&str> = placements
        .iter()
        .filter(|place| here(&place.node))
        .map(|place| place.model.as_str())
        .collect();
    for (at, model) in config.models.iter().enumerate() {
        let was_given = !model.path.as_os_str().is_empty();
        if was_given && served.contains(model.name.as_str()) {
            checkpoint(&format!("model[{at}].path"), &model.path, reader);
        }
    }
}

fn report(reader: &mut Reader<'_>, key: &str, message: String, help: &str) {
    let problem = reader.problem_at(key, message).help(help);
    reader.problems.push(problem);
}

fn checkpoint(key: &str, path: &Path, reader: &mut Reader<'_>) {
    let shown = path.display();
    let help = "a checkpoint directory holds config.json, tokenizer.json and *.safetensors; paths are relative to this file";
    match fs::metadata(path) {
        Err(error) => report(
            reader,
            key,
            format!("cannot look at {shown}: {error}"),
            help,
        ),
        Ok(found) if !found.is_dir() => {
            report(reader, key, format!("{shown} is not a directory"), help)
        }
        Ok(_) if !path.join("config.json").is_file() => {
            report(reader, key, format!("{shown} holds no config.json"), help);
        }
        Ok(_) => {}
    }
}

/// A directory that is made when it is missing: no part of its path may be something else.
fn directory(key: &str, path: &Path, reader: &mut Reader<'_>) {
    let first_existing = path.ancestors().find(|ancestor| ancestor.exists());
    if let Some(obstacle) = first_existing.filter(|ancestor| !ancestor.is_dir()) {
        let message = format!(
            "cannot be a directory, because {} is a file",
            obstacle.display()
        );
        report(
            reader,
            key,
            message,
            "name another directory; it is created when it is missing",
        );
    }
}

fn cookie(config: &ClusterConfig, reader: &mut Reader<'_>, must_exist: bool) {
    let (key, path) = ("cluster.cookie_file", &config.cluster.cookie_file);
    match read_cookie(path) {
        Ok(_) => {}
        // It is made at the start; nothing may stand in the way of that.
        Err(CookieError::Missing(_) | CookieError::Io { .. }) if !must_exist && !path.exists() => {
            if let Some(parent) = path.parent() {
                directory(key, parent, reader);
            }
        }
        Err(error) => report(reader, key, error.what(), &error.help()),
    }
}

/// A secret is a file that nobody else can read; `false` where there is none to look into.
fn secret(key: &str, path: &Path, reader: &mut Reader<'_>) -> bool {
    let shown = path.display();
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) => {
            let message = format!("cannot look at {shown}: {error}");
            report(reader, key, message, "name a readable file");
            return false;
        }
    };
    if !found.is_file() {
        let message = format!("{shown} is not a file");
        report(reader, key, message, "name a file that holds the secret");
        return false;
    }
    let mode = found.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let message = format!("{shown} can be read by others (mode {mode:o})");
        report(
            reader,
            key,
            message,
            "run `chmod 600` on it, and replace the secret if others may have seen it",
        );
    }
    true
}

fn tokens(key: &str, path: &Path, reader: &mut Reader<'_>) {
    if !secret(key, path, reader) {
        return;
    }
    if let Err(error) = read_tokens(path) {
        report(
            reader,
            key,
            error.to_string(),
            "a token is one word on a line of its own; lines that begin with # are skipped",
        );
    }
}
