//! The cluster's configuration: one TOML file that describes every node, model and limit.
//!
//! A file is read once, into plain values. Reading never stops at the first mistake: [`ClusterConfig::load`] reports
//! *all* problems, each with its place, what is allowed, and the nearest known key. Every key stands once, in
//! `settings.rs`, from which the types, the reader, the checksum and `docs/configuration.md` are made.
//!
//! Invariant: a [`ClusterConfig`] that `load` returned has been checked as a whole; nothing downstream checks it again.

mod check;
mod cookie;
mod kind;
mod load;
mod page;
mod placement;
mod problem;
mod schema;
mod settings;
mod tokens;
mod value;

pub use cookie::{CookieError, MIN_COOKIE_BITS, read_cookie};
pub use load::{ClusterConfig, LoadOptions, PathCheck};
pub use page::page;
pub use placement::Placement;
pub use problem::{Problem, Problems, Warning};
pub use schema::{KeyInfo, Scope, SectionInfo};
pub use settings::{
    ClusterSettings, FailureDetectorSettings, GatewaySettings, JournalSettings, LoggingSettings,
    MetricsSettings, ModelSettings, NodeSettings, RecoverySettings, RestartSettings, sections,
};
pub use tokens::{TokenFileError, TokenFileProblem, read_tokens};
pub use value::{
    Choice, ConfigMismatch, Device, Dtype, Durability, KvDtype, KvMemory, LogFormat, LogLevel,
    Numerics, Quantization, Role, UnknownWord,
};
