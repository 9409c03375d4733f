//! The token log of a request, and the store of finished ones. Synchronous and actor-free.
//!
//! A request *is* its log: what was admitted, and the output that is committed, position by position. Everything else
//! (which engine runs it, its KV cache, the text shown so far, the client's connection) can be rebuilt from the log.
//! In this version logs live in the memory of the request's gateway (`durability = "memory"`): they survive engines and
//! hosts, not the gateway itself.

mod finished;
mod log;
mod record;

pub use finished::{FinishedStore, Retention};
pub use log::{AppendError, TokenLog};
pub use record::{Admission, Entry, FinishedRequest, Outcome};
