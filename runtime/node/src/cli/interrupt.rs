//! Ctrl-C and SIGTERM, and for a launcher SIGHUP, as something to wait for.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::exit::{Exit, Failure};

/// Listens from its creation on; while it lives, the signals no longer kill the process by themselves.
pub struct Interrupt {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot listen for signals: {error}")))
}

impl Interrupt {
    /// Starts to listen. Must be called within a runtime.
    pub fn listen() -> Result<Self, Failure> {
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: None,
        })
    }

    /// The same for a process with others to end: that its terminal was closed (SIGHUP) is heard too.
    pub fn or_hangup() -> Result<Self, Failure> {
        Ok(Self {
            hangup: Some(listen(SignalKind::hangup())?),
            ..Self::listen()?
        })
    }

    /// Waits for the next signal; says how the command has to end. Safe to drop and call again.
    pub async fn wait(&mut self) -> Exit {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => Exit::Interrupted,
            _ = self.terminate.recv() => Exit::Terminated,
            _ = hangup => Exit::Terminated,
        }
    }

    /// Runs `work` unless a signal comes first.
    pub async fn unless<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            exit = self.wait() => Err(Failure::quiet(exit)),
            done = work => Ok(done),
        }
    }
}
