//! Problems and warnings that take more than one key to see, and the checksum over all of them.

mod common;

use common::*;

fn warnings(text: &str) -> String {
    let (_, warnings) = parse(text).unwrap_or_else(|problems| panic!("{problems}"));
    warnings
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn names_are_unique() {
    let second = "[[node]]\nname = \"a\"\ncluster_port = 7610\nroles = [\"host\"]\n";
    has(
        &problem(&format!("{SMALL}{second}")),
        "node[1].name",
        11,
        "taken by the node in line 3",
    );
    let second = "[[model]]\nname = \"demo\"\npath = \"x\"\n";
    has(
        &problem(&format!("{SMALL}{second}")),
        "model[1].name",
        11,
        "taken by the model in line 8",
    );
}

#[test]
fn a_port_serves_one_purpose() {
    has(
        &problem(&SMALL.replace("7601", "7600")),
        "node[0].client_port",
        5,
        "port 7600 on 127.0.0.1 is taken by `cluster_port` of node \"a\" in line 4",
    );
    let metrics = SMALL.replace(
        "client_port = 7601",
        "client_port = 7601\nmetrics_port = 7601",
    );
    has(
        &problem(&metrics),
        "node[0].metrics_port",
        6,
        "is taken by `client_port`",
    );
    let second =
        |rest: &str| format!("{SMALL}[[node]]\nname = \"b\"\nroles = [\"host\"]\n{rest}\n");
    has(
        &problem(&second("cluster_port = 7601")),
        "node[1].cluster_port",
        13,
        "is taken by `client_port` of node \"a\"",
    );
    has(
        &problem(&second("cluster_port = 7600\nhost = \"localhost\"")),
        "node[1].cluster_port",
        13,
        "taken",
    );
    has(
        &problem(&second(
            "cluster_port = 7600\nhost = \"127.0.0.2\"\nbind = \"0.0.0.0\"",
        )),
        "node[1].cluster_port",
        13,
        "taken",
    );
    assert!(parse(&second("cluster_port = 7600\nhost = \"127.0.0.2\"")).is_ok());
    let spread = SMALL.replace("name = \"a\"", "name = \"a\"\nhost = \"a.example.net\"")
        + "[[node]]\nname = \"b\"\nroles = [\"host\"]\ncluster_port = 7600\nhost = \"b.example.net\"\n";
    assert!(parse(&spread).is_ok());
}

#[test]
fn gateways_have_client_ports_and_others_do_not() {
    has(
        &problem(&SMALL.replace("client_port = 7601\n", "")),
        "node[0].client_port",
        2,
        "needs a `client_port`",
    );
    let second =
        "[[node]]\nname = \"b\"\nroles = [\"host\"]\ncluster_port = 7610\nclient_port = 7611\n";
    has(
        &problem(&format!("{SMALL}{second}")),
        "node[1].client_port",
        14,
        "without the role `gateway`",
    );
}

#[test]
fn someone_must_take_requests_and_someone_must_serve_them() {
    let found = problems("");
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(
        found[0].message.contains("no model") && found[1].message.contains("no node"),
        "{found:#?}"
    );
    let no_gateway = SMALL.replace("client_port = 7601", "roles = [\"host\"]");
    has(
        &problem(&no_gateway),
        "node",
        2,
        "no node has the role `gateway`",
    );
    let no_host = SMALL.replace("7601", "7601\nroles = [\"gateway\"]");
    has(&problem(&no_host), "node", 2, "no node has the role `host`");
    // Another mistake in a node does not hide it.
    let found = problems(&no_host.replace("7600", "0"));
    let keys: Vec<&str> = found.iter().map(|problem| problem.key.as_str()).collect();
    assert_eq!(keys, ["node", "node[0].cluster_port"], "{found:#?}");
}

#[test]
fn addresses_of_several_machines_do_not_include_this_one() {
    let node = |name: &str, rest: &str| {
        format!("[[node]]\nname = \"{name}\"\nroles = [\"host\"]\ncluster_port = 7610\n{rest}\n")
    };
    let far = node("b", "host = \"b.example.net\"\nssh = \"b\"");
    // Forgotten on the first node, whose default is this machine.
    has(
        &problem(&format!("{SMALL}{far}")),
        "node[0].host",
        2,
        "\"127.0.0.1\" (the default) cannot be reached by the nodes on other machines",
    );
    let here = SMALL.replace("name = \"a\"", "name = \"a\"\nhost = \"a.example.net\"");
    assert!(parse(&format!("{here}{far}")).is_ok());
    let local = node("c", "host = \"localhost\"\nssh = \"c\"");
    has(
        &problem(&format!("{here}{far}{local}")),
        "node[2].host",
        21,
        "\"localhost\" cannot be reached",
    );
}

/// Nodes of one machine, one of which others reach by the machine's address.
#[test]
fn a_gateway_of_one_machine_may_have_its_address() {
    let here = SMALL.replace("name = \"a\"", "name = \"a\"\nhost = \"192.0.2.5\"");
    let other = "[[node]]\nname = \"b\"\nroles = [\"host\"]\ncluster_port = 7610\n";
    assert!(parse(&format!("{here}{other}")).is_ok());
}

#[test]
fn a_node_listens_where_others_look_for_it() {
    let far = |bind: &str| {
        let with = format!("name = \"a\"\nhost = \"a.example.net\"\nbind = \"{bind}\"");
        SMALL.replace("name = \"a\"", &with)
    };
    let said = warnings(&far("127.0.0.1"));
    assert!(
        said.contains("listens on \"127.0.0.1\" only"),
        "a tunnel may lead there: {said}"
    );
    for bind in ["0.0.0.0", "::", "10.0.0.1"] {
        assert!(!warnings(&far(bind)).contains("listens on"), "{bind}");
    }
}

#[test]
fn a_folder_elsewhere_needs_a_way_there() {
    let with = |rest: &str| SMALL.replace("name = \"a\"", &format!("name = \"a\"\n{rest}"));
    has(
        &problem(&with("dir = \"/opt/understudy\"")),
        "node[0].dir",
        4,
        "has no effect without `ssh`",
    );
    assert!(parse(&with("dir = \"/opt/understudy\"\nssh = \"a\"")).is_ok());
}

/// A second installation on this machine, reached through ssh, is in order; on several machines it is a mistake that
/// cannot be told apart from it.
#[test]
fn ssh_to_an_address_of_this_machine_draws_a_warning() {
    let with = |rest: &str| SMALL.replace("name = \"a\"", &format!("name = \"a\"\n{rest}"));
    let text = warnings(&with("ssh = \"me@there\""));
    assert!(text.contains("means this machine to every node"), "{text}");
    let named = warnings(&with("ssh = \"me@there\"\nhost = \"there.example.net\""));
    assert!(!named.contains("this machine"), "{named}");
}

#[test]
fn nodes_are_reachable() {
    let found = problem(&SMALL.replace("name = \"a\"", "name = \"a\"\nhost = \"0.0.0.0\""));
    has(
        &found,
        "node[0].host",
        4,
        "no address that others can reach",
    );
}

#[test]
fn models_name_hosts_that_exist_and_have_the_device() {
    let found = small_with("nodes = [\n  \"a\",\n  \"aa\",\n]");
    has(&found, "model[0].nodes", 12, "there is no node \"aa\"");
    assert_eq!(found.column, 3);
    let found = small_with("nodes = [\"aa\"]");
    has(&found, "model[0].nodes", 10, "there is no node \"aa\"");
    assert_eq!(found.help.as_deref(), Some("did you mean \"a\"?"));
    let second =
        "[[node]]\nname = \"b\"\nroles = [\"gateway\"]\ncluster_port = 7610\nclient_port = 7611\n";
    let text = format!("{}nodes = [\"b\"]\n{second}", SMALL);
    has(
        &problem(&text),
        "model[0].nodes",
        10,
        "does not have the role `host`",
    );
    let text = SMALL.replace("7601", "7601\ndevices = [\"cpu\"]") + "device = \"cuda:0\"\n";
    has(
        &problem(&text),
        "model[0].device",
        11,
        "offers the device \"cuda:0\"",
    );
}

#[test]
fn relations_between_limits_hold_with_given_values_and_with_defaults() {
    for (addition, key, line) in [
        (
            "[failure_detector]\ndead_after_ms = 600",
            "dead_after_ms",
            11,
        ),
        (
            "[failure_detector]\nsuspect_after_ms = 1000",
            "suspect_after_ms",
            11,
        ),
        (
            "[failure_detector]\nsuspect_after_ms = 2000\ndead_after_ms = 2000",
            "dead_after_ms",
            12,
        ),
        (
            "[failure_detector]\nheartbeat_interval_ms = 301",
            "heartbeat_interval_ms",
            11,
        ),
        (
            "[restart]\nbackoff_initial_ms = 5001",
            "backoff_initial_ms",
            11,
        ),
        ("[gateway]\nmax_deadline_ms = 1000", "max_deadline_ms", 11),
    ] {
        let found = small_with(addition);
        assert!(found.key.ends_with(key), "{addition}: {found}");
        assert_eq!(found.line, line, "{addition}: {found}");
        assert!(
            found.help.is_some() && found.allowed.is_some(),
            "{addition}: {found}"
        );
    }
    for allowed in [
        "[failure_detector]\nheartbeat_interval_ms = 300",
        "[failure_detector]\nsuspect_after_ms = 999",
        "[failure_detector]\ndead_after_ms = 601",
        // Engines have a heartbeat of their own.
        "[failure_detector]\nheartbeat_interval_ms = 5000\nsuspect_after_ms = 10000\ndead_after_ms = 20000",
    ] {
        assert!(parse(&format!("{SMALL}{allowed}\n")).is_ok(), "{allowed}");
    }
}

#[test]
fn what_is_said_to_be_allowed_is_allowed() {
    let allowed = |addition: &str| small_with(addition).allowed.unwrap_or_default();
    assert_eq!(
        allowed("[failure_detector]\nsuspect_after_ms = 1000"),
        "at most 999, or a longer `dead_after_ms`"
    );
    assert_eq!(
        allowed("[failure_detector]\ndead_after_ms = 600"),
        "at least 601"
    );
    assert_eq!(
        allowed("[failure_detector]\nheartbeat_interval_ms = 301"),
        "at most 300, or a longer `suspect_after_ms`"
    );
    let engine = small_with("[failure_detector]\nengine_heartbeat_timeout_ms = 299");
    has(
        &engine,
        "failure_detector.engine_heartbeat_timeout_ms",
        11,
        "out of range",
    );
    assert_eq!(engine.allowed.as_deref(), Some("300 to 3600000"));
}

#[test]
fn warnings_stop_nothing() {
    let text = warnings(SMALL);
    for part in [
        "the only gateway",
        "the only host",
        "serves no metrics",
        "with one replica",
    ] {
        assert!(text.contains(part), "{part} in:\n{text}");
    }
    assert!(!text.contains("encrypted"), "{text}");
    let open = warnings(&SMALL.replace("name = \"a\"", "name = \"a\"\nhost = \"10.0.0.1\""));
    assert!(
        open.contains("not encrypted") && open.contains("without a token"),
        "{open}"
    );
    let fast = warnings(&format!(
        "{SMALL}numerics = \"fast\"\nstep_token_budget = 8\n"
    ));
    assert!(
        fast.contains("bit-exact") && fast.contains("stand still"),
        "{fast}"
    );
    assert!(
        !warnings(&format!("{SMALL}[metrics]\nenabled = false\n")).contains("serves no metrics")
    );
}

#[test]
fn the_checksum_sees_what_nodes_must_agree_on_and_nothing_else() {
    let sum = |text: &str| {
        parse(text)
            .unwrap_or_else(|problems| panic!("{problems}"))
            .0
            .checksum()
    };
    let base = sum(SMALL);
    let same = [
        SMALL.replace("name = \"a\"", "# a comment\nname   =  'a'"),
        format!("{SMALL}replicas = 1\n[failure_detector]\ndead_after_ms = 1_000\n"),
        format!("{SMALL}[logging]\nlevel = \"debug\"\n[metrics]\nenabled = false\n"),
        // How a node behaves is its own affair: an edit must not lock out the first node that is restarted after it.
        format!("{SMALL}[failure_detector]\ndead_after_ms = 1001\n"),
        format!("{SMALL}[restart]\nintensity = 1\n"),
        format!("{SMALL}[recovery]\nmax_attempts = 3\n"),
        format!("{SMALL}[gateway]\nmax_connections = 3\n"),
        format!("{SMALL}[cluster]\nconfig_mismatch = \"warn\"\n"),
        SMALL.replace("models/demo", "/elsewhere/demo"),
        SMALL.replace(
            "client_port = 7601",
            "metrics_port = 7602\nclient_port = 7601",
        ),
    ];
    for text in same {
        assert_eq!(sum(&text), base, "{text}");
    }
    let different = [
        format!("{SMALL}replicas = 2\n"),
        SMALL.replace("7600", "7605"),
        format!("{SMALL}[cluster]\nname = \"other\"\n"),
        format!("{SMALL}max_sequences = 3\n"),
    ];
    for text in different {
        assert_ne!(sum(&text), base, "{text}");
    }
}
