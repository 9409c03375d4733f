//! Every kind of mistake gets a problem with its place, what is allowed, and what was probably meant; and all of them
//! stand in one report.

mod common;

use common::*;

#[test]
fn the_smallest_file_has_every_default() {
    let (config, _) = parse(SMALL).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(config.cluster.name, "local");
    assert_eq!(config.cluster.run_dir.to_str(), Some("/etc/u/run/local"));
    assert_eq!(
        config.cluster.cookie_file.to_str(),
        Some("/etc/u/run/local/cookie")
    );
    assert_eq!(config.models[0].path.to_str(), Some("/etc/u/models/demo"));
    assert_eq!(config.nodes[0].bind, "127.0.0.1");
    assert_eq!(config.nodes[0].listen_address(7600), "127.0.0.1:7600");
    assert_eq!(config.failure_detector.dead_after_ms, 1000);
    assert_eq!(config.gateway.keep_finished_bytes, 256 << 20);
}

#[test]
fn a_misspelt_key_gets_the_nearest_known_one() {
    let found = small_with("replica = 2");
    has(&found, "model[0].replica", 10, "unknown key");
    assert_eq!(found.help.as_deref(), Some("did you mean `replicas`?"));
    let found = small_with("[gatway]\nmax_connections = 3");
    has(&found, "gatway", 10, "unknown key");
    assert_eq!(found.help.as_deref(), Some("did you mean `gateway`?"));
    assert!(
        found
            .to_string()
            .starts_with("/etc/u/c.toml:10:2: error: gatway: unknown key\n"),
        "{found}"
    );
}

#[test]
fn a_key_of_another_section_is_sent_there() {
    let found = small_with("[recovery]\nheartbeat_interval_ms = 100");
    assert_eq!(
        found.help.as_deref(),
        Some("`heartbeat_interval_ms` belongs in [failure_detector]")
    );
    let found = problem(&SMALL.replace("name = \"demo\"", "name = \"demo\"\nclient_port = 1"));
    assert_eq!(
        found.help.as_deref(),
        Some("`client_port` belongs in [[node]]")
    );
}

#[test]
fn an_unknown_key_that_resembles_nothing_gets_the_list() {
    let found = small_with("[metrics]\nzzzzzzzzzz = 1");
    assert_eq!(found.allowed.as_deref(), Some("enabled"));
}

#[test]
fn wrong_types_are_named() {
    for (addition, message) in [
        ("replicas = \"2\"", "expected an integer, found a string"),
        ("replicas = 2.0", "expected an integer, found a float"),
        ("dtype = 16", "expected a string, found an integer"),
        ("nodes = \"a\"", "expected an array"),
        ("nodes = [1]", "expected a string, found an integer"),
        (
            "[metrics]\nenabled = \"yes\"",
            "expected a boolean, found a string",
        ),
        (
            "[logging]\ndirectory = 1",
            "expected a path, found an integer",
        ),
        (
            "[gateway]\nmax_frame_bytes = true",
            "expected an integer, found a boolean",
        ),
    ] {
        let found = small_with(addition);
        assert!(found.message.contains(message), "{addition}: {found}");
        assert!(found.allowed.is_some(), "{addition}: {found}");
    }
}

#[test]
fn values_out_of_range_are_refused_with_the_range() {
    for (addition, allowed) in [
        ("replicas = 0", "1 to 1024"),
        ("replicas = -1", "1 to 1024"),
        ("replicas = 99999999999999999999999", "1 to 1024"),
        ("max_waiting = 0x1_0001", "0 to 65536"),
        (
            "[failure_detector]\nheartbeat_interval_ms = 0",
            "10 to 60000",
        ),
    ] {
        let found = small_with(addition);
        assert!(
            found.message.contains("out of range"),
            "{addition}: {found}"
        );
        assert_eq!(found.allowed.as_deref(), Some(allowed), "{addition}");
    }
    let found = small_with("[gateway]\nmax_frame_bytes = \"1GiB\"");
    assert!(
        found
            .allowed
            .as_deref()
            .is_some_and(|allowed| allowed.contains("4KiB to 256MiB")),
        "{found}"
    );
    assert!(
        small_with("[gateway]\nmax_frame_bytes = \"1 MB\"")
            .message
            .contains("not a size")
    );
    assert!(
        problem(&SMALL.replace("7600", "0"))
            .message
            .contains("out of range")
    );
    assert!(
        problem(&SMALL.replace("7600", "65536"))
            .message
            .contains("out of range")
    );
}

#[test]
fn sizes_are_numbers_or_words() {
    for (written, bytes) in [
        ("5000", 5000),
        ("\"5000\"", 5000),
        ("\"64KiB\"", 65_536),
        ("\"2 MiB\"", 2 << 20),
    ] {
        let (config, _) =
            parse(&format!("{SMALL}[gateway]\nmax_frame_bytes = {written}\n")).unwrap();
        assert_eq!(config.gateway.max_frame_bytes, bytes, "{written}");
    }
}

#[test]
fn unknown_words_get_the_allowed_ones() {
    let found = small_with("numerics = \"exakt\"");
    assert_eq!(found.allowed.as_deref(), Some("\"exact\", \"fast\""));
    assert_eq!(found.help.as_deref(), Some("did you mean \"exact\"?"));
    let found = problem(&SMALL.replace(
        "client_port = 7601",
        "client_port = 7601\nroles = [\"gateway\", \"hots\"]",
    ));
    has(&found, "node[0].roles", 6, "\"hots\" is not a known value");
    assert_eq!(found.column, 21);
    let found = small_with("device = \"cuda:x\"");
    assert!(
        found
            .allowed
            .as_deref()
            .is_some_and(|allowed| allowed.contains("cuda:0")),
        "{found}"
    );
}

#[test]
fn planned_durabilities_are_refused_with_a_clear_word() {
    for word in ["disk", "peer", "peer+disk"] {
        let found = small_with(&format!("[journal]\ndurability = \"{word}\""));
        has(&found, "journal.durability", 11, "is not supported yet");
        assert_eq!(found.allowed.as_deref(), Some("\"memory\""));
    }
}

#[test]
fn lists_are_not_empty_and_hold_nothing_twice() {
    assert!(
        problems(&format!("{SMALL}nodes = []\n"))[0]
            .message
            .contains("must not be empty")
    );
    assert!(
        small_with("nodes = [\"a\", \"a\"]")
            .message
            .contains("\"a\" stands here twice")
    );
}

#[test]
fn required_keys_are_asked_for_at_their_section() {
    let found = problem(&SMALL.replace("name = \"a\"\n", ""));
    has(
        &found,
        "node[0].name",
        2,
        "the required key `name` is missing",
    );
    let found = problem(&SMALL.replace("cluster_port = 7600\n", ""));
    has(&found, "node[0].cluster_port", 2, "missing");
    let found = problem(&SMALL.replace("path = \"models/demo\"\n", ""));
    has(&found, "model[0].path", 7, "missing");
}

#[test]
fn single_and_repeated_sections_are_told_apart() {
    let found = problems(&SMALL.replace("[[node]]", "[node]"));
    assert!(
        found
            .iter()
            .any(|problem| problem.help.as_deref() == Some("write [[node]] with two brackets")),
        "{found:#?}"
    );
    let found = small_with("[[gateway]]\nmax_connections = 1");
    assert_eq!(found.help.as_deref(), Some("write [gateway] once"));
    let model = &SMALL[SMALL.find("[[model").unwrap()..];
    let text = format!("node = [\n  1,\n  {{ name = \"a\", cluster_port = 1 }},\n]\n{model}");
    let found = problems(&text);
    // The second node keeps its number, and nothing is said about a node that is none.
    let said: Vec<(&str, usize)> = found.iter().map(|it| (it.key.as_str(), it.line)).collect();
    assert_eq!(
        said,
        [("node[0]", 2), ("node[1].client_port", 3)],
        "{found:#?}"
    );
    assert!(
        found[0].message.contains("expected a table"),
        "{}",
        found[0]
    );
}

#[test]
fn broken_toml_is_reported_with_its_place_and_the_rest_is_checked() {
    let found = problems(&format!(
        "{SMALL}replicas = \n[gateway]\nmax_conections = 3\n"
    ));
    assert!(
        found
            .iter()
            .any(|problem| problem.message.starts_with("not TOML") && problem.line == 10),
        "{found:#?}"
    );
    assert!(
        found
            .iter()
            .any(|problem| problem.key == "gateway.max_conections"),
        "{found:#?}"
    );
    let twice = problems(&format!("{SMALL}name = \"again\"\n"));
    assert!(twice[0].message.contains("duplicate key"), "{twice:#?}");
    for text in [
        "[[",
        "= 1",
        "a = \"",
        "\u{feff}[[node]]",
        "\0",
        "[cluster]\nname = \"\\uD800\"",
        "é = 1",
    ] {
        assert!(!problems(text).is_empty());
    }
}

#[test]
fn names_hosts_and_paths_obey_rules() {
    for (from, to) in [
        ("name = \"a\"", "name = \"\""),
        ("name = \"a\"", "name = \"../a\""),
        ("name = \"a\"", "name = \"a b\""),
        ("name = \"demo\"", "name = \"-demo\""),
        ("path = \"models/demo\"", "path = \"\""),
        ("path = \"models/demo\"", "path = \"~/models/demo\""),
        ("name = \"a\"", "name = \"a\"\nhost = \"a:1\""),
        ("name = \"a\"", "name = \"a\"\nhost = \"-a\""),
        ("name = \"a\"", "name = \"a\"\nssh = \"-oProxyCommand=x\""),
        ("name = \"a\"", "name = \"a\"\ndir = \"\""),
    ] {
        let found = problem(&SMALL.replacen(from, to, 1));
        assert!(found.allowed.is_some(), "{to}: {found}");
    }
    for host in ["::1", "node-1.example.net", "10.0.0.1"] {
        let text = SMALL.replacen(
            "name = \"a\"",
            &format!("name = \"a\"\nhost = \"{host}\""),
            1,
        );
        assert!(parse(&text).is_ok(), "{host}");
    }
}

#[test]
fn one_pass_reports_everything_in_the_order_of_the_file() {
    let text = "
[cluster]
nam = \"x\"
[[node]]
name = \"a\"
cluster_port = \"7600\"
client_port = 70000
[[node]]
name = \"a\"
cluster_port = 7601
roles = [\"hsot\"]
[[model]]
name = \"m\"
replicas = 0
nodes = [\"c\"]
[journal]
durability = \"disk\"
[failure_detector]
dead_after_ms = 50
";
    let lines: Vec<usize> = problems(text).iter().map(|problem| problem.line).collect();
    // Line 12 twice over would mean that the missing path is reported twice; node 2 lost its roles, so it seems a gateway.
    assert_eq!(
        lines,
        [3, 6, 7, 8, 9, 11, 12, 14, 15, 17, 19],
        "{:#?}",
        problems(text)
    );
}

#[test]
fn reports_are_json_too() {
    let Err(report) = parse(&format!("{SMALL}replica = 2\n")) else {
        panic!("no problem")
    };
    let json = report.to_json();
    let first = &json["problems"][0];
    assert_eq!(first["file"], "/etc/u/c.toml");
    assert_eq!(first["line"], 10);
    assert_eq!(first["column"], 1);
    assert_eq!(first["key"], "model[0].replica");
    assert_eq!(first["help"], "did you mean `replicas`?");
    assert!(json["warnings"].is_array());
    assert!(
        report
            .to_string()
            .ends_with("1 problem in the configuration")
    );
}
