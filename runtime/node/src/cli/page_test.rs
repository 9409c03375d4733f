//! `docs/cli.md` and the command line say the same: every command has a section, every option a line in it, and the
//! page names no option that does not exist.

use std::collections::BTreeSet;

use clap::{Command, CommandFactory};

const PAGE: &str = include_str!("../../../../docs/cli.md");

/// The text between the heading of a command and the next heading of its level.
fn section(name: &str) -> Option<&'static str> {
    let heading = format!("\n## `understudy {name}`\n");
    let start = PAGE.find(&heading)? + heading.len();
    let rest = &PAGE[start..];
    Some(&rest[..rest.find("\n## ").unwrap_or(rest.len())])
}

/// `--option`s in backticks at the start of the rows of the section's tables.
fn documented(section: &str) -> BTreeSet<String> {
    section
        .lines()
        .filter_map(|line| line.strip_prefix("| `--"))
        .filter_map(|rest| rest.split(['`', ' ', '=']).next())
        .map(str::to_owned)
        .collect()
}

fn options(command: &Command) -> BTreeSet<String> {
    command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set())
        .filter_map(|argument| argument.get_long())
        .filter(|long| *long != "help")
        .map(str::to_owned)
        .collect()
}

/// The options that several commands share stand once, in sections of their own.
const SHARED: [(&str, &str); 2] = [("## Connecting", "addr"), ("## Sampling", "temperature")];

fn shared(heading: &str) -> BTreeSet<String> {
    let start = PAGE.find(&format!("\n{heading}\n")).expect(heading) + 1;
    let rest = &PAGE[start + heading.len()..];
    documented(&rest[..rest.find("\n## ").unwrap_or(rest.len())])
}

#[test]
fn every_command_and_option_stands_in_the_page_and_no_other() {
    let cli = super::Cli::command();
    for command in cli
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        let name = command.get_name();
        let section = section(name)
            .unwrap_or_else(|| panic!("docs/cli.md has no section for `understudy {name}`"));
        let mut described = documented(section);
        let real = options(command);
        for (heading, mark) in SHARED {
            if real.contains(mark)
                && section.contains(&format!("(#{})", heading[3..].to_lowercase()))
            {
                described.extend(shared(heading));
            }
        }
        assert_eq!(
            described, real,
            "options of `understudy {name}`: the page on the left, the program on the right"
        );
    }
}

#[test]
fn the_page_has_no_section_for_a_command_that_does_not_exist() {
    let cli = super::Cli::command();
    let real: BTreeSet<&str> = cli.get_subcommands().map(Command::get_name).collect();
    for line in PAGE.lines() {
        if let Some(name) = line.strip_prefix("## `understudy ") {
            let name = name.trim_end_matches('`');
            assert!(
                real.contains(name),
                "docs/cli.md describes `understudy {name}`, which does not exist"
            );
        }
    }
}

#[test]
fn the_command_line_is_consistent() {
    super::Cli::command().debug_assert();
}

#[test]
fn the_default_address_is_the_local_profiles_gateway() {
    let profile = include_str!("../../../../config/profiles/local.toml");
    let port = super::gateways::DEFAULT_ADDR
        .rsplit(':')
        .next()
        .expect("a port");
    assert!(
        profile.lines().any(|line| {
            let mut words = line.split('=').map(str::trim);
            words.next() == Some("client_port") && words.next() == Some(port)
        }),
        "config/profiles/local.toml has no client_port = {port}"
    );
}
