//! The `understudy` program as its users see it: arguments in; standard output, standard error and exit status out;
//! against gateways that speak the protocol and make up their tokens.

#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/conversation.rs"]
mod conversation;
#[path = "../../client/tests/fake/mod.rs"]
mod fake;
#[path = "cli/generate.rs"]
mod generate;
#[path = "cli/local.rs"]
mod local;
#[path = "cli/program.rs"]
mod program;
#[path = "cli/signals.rs"]
mod signals;
