//! The client of an Understudy cluster: submits requests over the TCP protocol, and streams their tokens.
//!
//! A [`Client`] knows the addresses of several gateways and shares its connections, a few to each gateway it uses, among any
//! number of [`Stream`]s. A stream outlives its connection: when the connection or the gateway dies, the stream connects
//! again, there or elsewhere, and resumes its request at the first position it lacks, whether it is polled or not.
//!
//! Invariant: a caller sees `Accepted` once, then positions 0, 1, 2, … without gap or repeat, then one terminal outcome:
//! `Finished` or an error. Every wait ends by a deadline of [`Options`].
//!
//! A request whose connection is lost before it was accepted is submitted again, a few times at most
//! ([`Error::SubmitLost`]): nobody has seen anything of it, but the gateway that was lost may have begun it, so **the work
//! may be done twice**. Switch recovery off (`recovery_timeout` of zero) where that must not be.
//!
//! ```no_run
//! use understudy_client::{Client, Event, Options, Request};
//!
//! # async fn example() -> Result<(), understudy_client::Error> {
//! let client = Client::connect(["127.0.0.1:7600", "127.0.0.1:7601"], Options::default()).await?;
//! let mut stream = client.submit(Request::prompt("count from 1 to 20")).await?;
//! while let Some(event) = stream.next().await? {
//!     match event {
//!         Event::Token(token) => print!("{}", token.text),
//!         Event::Finished(end) => println!("{}", end.text),
//!         Event::Accepted(_) => {}
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod client;
mod dial;
mod error;
mod link;
mod options;
mod pool;
mod recovery;
mod request;
mod stream;
mod time;

pub use client::Client;
pub use error::{Error, LostReason};
pub use options::Options;
pub use request::{Accepted, Event, Finished, Request, Token};
pub use stream::Stream;
pub use understudy_protocol as protocol;
pub use understudy_protocol::message::{
    ChatMessage, ClusterStatus, FinishReason, Input, Sampling, TopLogprob, Usage,
};
pub use understudy_protocol::{ErrorBody, ErrorCode, RequestId};
