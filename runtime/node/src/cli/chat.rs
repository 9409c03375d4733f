//! `understudy chat`: a conversation, line by line.
//!
//! Lines come from a thread of their own, because a read of the terminal cannot be interrupted. It hands over one line
//! at a time and ends with the process.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use clap::Args;
use tokio::sync::mpsc;
use understudy_client::{Client, Error, Event, Request, Stream};
use understudy_protocol::message::Input;

use super::conversation::{Conversation, HELP, Line};
use super::env::Environment;
use super::exit::{Exit, Failure};
use super::gateways::{GatewayArgs, Gateways};
use super::interrupt::Interrupt;
use super::output::{self, Output};
use super::sampling::SamplingArgs;
use super::session::{self, connect};
use super::trouble::failure;

/// Longest line that is taken.
const MAX_LINE_BYTES: u64 = 1 << 20;
/// Lines that wait while an answer is being written.
const WAITING_LINES: usize = 1;

/// Talk with a model
#[derive(Debug, Clone, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub gateways: GatewayArgs,
    /// Model to use; may be left out where the cluster serves one only
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// System message that opens the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// Runs the command.
pub async fn run<W: Write>(
    args: ChatArgs,
    environment: &Environment,
    out: &mut Output<W>,
) -> Result<Exit, Failure> {
    let gateways = args.gateways.resolve(environment)?;
    let mut interrupt = Interrupt::listen()?;
    let client = interrupt.unless(connect(&gateways)).await??;
    let interactive = io::stdin().is_terminal() && out.is_terminal;
    if interactive {
        out.raw(&format!("{HELP}\n"))?;
    }
    let mut chat = Chat {
        client,
        gateways,
        conversation: Conversation::new(args.system.clone()),
        args,
        interactive,
        out,
    };
    chat.talk(read_lines(), &mut interrupt).await
}

/// Reads standard input until it ends; a failure is the last thing sent.
fn read_lines() -> mpsc::Receiver<io::Result<String>> {
    let (sender, receiver) = mpsc::channel(WAITING_LINES);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        loop {
            let line = next_line(&mut stdin);
            let last = !matches!(line, Ok(Some(_)));
            if let Some(line) = line.transpose()
                && sender.blocking_send(line).is_err()
            {
                return;
            }
            if last {
                return;
            }
        }
    });
    receiver
}

/// A line without its newline, or `None` at the end.
fn next_line(source: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    source
        .take(MAX_LINE_BYTES + 1)
        .read_until(b'\n', &mut bytes)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() as u64 > MAX_LINE_BYTES {
        return Err(io::Error::other(format!(
            "a line is longer than {MAX_LINE_BYTES} bytes"
        )));
    }
    match String::from_utf8(bytes) {
        Ok(line) => Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned())),
        Err(_) => Err(io::Error::other("a line is not UTF-8 text")),
    }
}

struct Chat<'a, W> {
    client: Client,
    gateways: Gateways,
    conversation: Conversation,
    args: ChatArgs,
    /// A person types and reads; otherwise lines come from, or answers go to, a pipe or file.
    interactive: bool,
    out: &'a mut Output<W>,
}

/// How an answer ended.
enum Ending {
    Whole,
    /// By Ctrl-C.
    Stopped,
    /// The process has to go.
    Leave(Exit),
    Failed(Failure),
}

impl<W: Write> Chat<'_, W> {
    async fn talk(
        &mut self,
        mut lines: mpsc::Receiver<io::Result<String>>,
        interrupt: &mut Interrupt,
    ) -> Result<Exit, Failure> {
        loop {
            let Some(line) = self.next_line(&mut lines, interrupt).await? else {
                return Ok(Exit::Ok);
            };
            match Line::parse(&line) {
                Line::Empty => {}
                Line::Quit => return Ok(Exit::Ok),
                Line::Reset => self.conversation.reset(),
                Line::Help => output::note(HELP),
                Line::Unknown(command) => output::warn(&format!("no command {command}: {HELP}")),
                Line::Say(text) => match self.answer(text, interrupt).await? {
                    Ending::Whole | Ending::Stopped => {}
                    Ending::Leave(exit) => return Ok(exit),
                    Ending::Failed(failure) if self.interactive => output::error(&failure.message),
                    Ending::Failed(failure) => return Err(failure),
                },
            }
        }
    }

    /// Prompts for a line and waits for it. At the prompt, Ctrl-C twice leaves.
    async fn next_line(
        &mut self,
        lines: &mut mpsc::Receiver<io::Result<String>>,
        interrupt: &mut Interrupt,
    ) -> Result<Option<String>, Failure> {
        let mut interrupted = false;
        loop {
            if self.interactive {
                self.out.raw("> ")?;
            }
            let received = tokio::select! {
                biased;
                exit = interrupt.wait() => Err(exit),
                line = lines.recv() => Ok(line),
            };
            match received {
                Err(exit) if !self.interactive || interrupted || exit != Exit::Interrupted => {
                    return Err(Failure::quiet(exit));
                }
                Err(_) => {
                    interrupted = true;
                    self.out.raw("\n")?;
                    output::note("Ctrl-C again, Ctrl-D or /quit leaves");
                }
                Ok(Some(Ok(line))) => return Ok(Some(line)),
                Ok(Some(Err(error))) => {
                    return Err(Failure::usage(format!(
                        "cannot read from standard input: {error}"
                    )));
                }
                Ok(None) => {
                    if self.interactive {
                        self.out.raw("\n")?;
                    }
                    return Ok(None);
                }
            }
        }
    }

    /// Asks, prints the answer as it comes, and keeps both.
    async fn answer(
        &mut self,
        question: String,
        interrupt: &mut Interrupt,
    ) -> Result<Ending, Failure> {
        let request = Request {
            model: self.args.model.clone(),
            sampling: self.args.sampling.to_sampling(),
            stop: self.args.sampling.stop.clone(),
            include_stop: self.args.sampling.include_stop,
            deadline_ms: self.args.sampling.deadline_ms(),
            priority: self.args.sampling.priority,
            ..Request::new(Input::Messages(self.conversation.with(&question)))
        };
        let mut answer = String::new();
        let ending = match interrupt.unless(self.client.submit(request)).await {
            Err(failure) if failure.exit == Exit::Interrupted && self.interactive => {
                Ending::Stopped
            }
            Err(failure) => Ending::Leave(failure.exit),
            Ok(Err(error)) => self.failed(&error),
            Ok(Ok(stream)) => self.print(stream, &mut answer, interrupt).await?,
        };
        if !answer.ends_with('\n') && (self.interactive || !answer.is_empty()) {
            self.out.raw("\n")?;
        }
        self.conversation.keep(question, answer);
        Ok(ending)
    }

    async fn print(
        &mut self,
        mut stream: Stream,
        answer: &mut String,
        interrupt: &mut Interrupt,
    ) -> Result<Ending, Failure> {
        loop {
            let event = tokio::select! {
                biased;
                exit = interrupt.wait() => {
                    session::abandon(stream).await;
                    return Ok(match exit {
                        Exit::Interrupted if self.interactive => Ending::Stopped,
                        exit => Ending::Leave(exit),
                    });
                }
                event = stream.next() => event,
            };
            let text = match event {
                Ok(Some(Event::Token(token))) => token.text,
                Ok(Some(Event::Finished(end))) => end.text,
                Ok(Some(Event::Accepted(_))) => continue,
                Ok(None) => return Ok(Ending::Whole),
                Err(error) => return Ok(self.failed(&error)),
            };
            answer.push_str(&text);
            if let Err(gone) = self.out.foreign(&text) {
                session::abandon(stream).await;
                return Err(gone.into());
            }
        }
    }

    fn failed(&self, error: &Error) -> Ending {
        let mut failure = failure(error, &self.gateways);
        if failure.exit == Exit::Failed {
            failure
                .message
                .push_str("\n  if the conversation has grown too long, /reset begins a new one");
        }
        Ending::Failed(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_bounded_and_checked() {
        let mut source = io::Cursor::new(b"one\r\n\ntwo".to_vec());
        let mut read = || next_line(&mut source).map_err(|error| error.to_string());
        assert_eq!(read(), Ok(Some("one".to_owned())));
        assert_eq!(read(), Ok(Some(String::new())));
        assert_eq!(read(), Ok(Some("two".to_owned())));
        assert_eq!(read(), Ok(None));

        let mut long = io::Cursor::new(vec![b'x'; MAX_LINE_BYTES as usize + 5]);
        assert!(next_line(&mut long).is_err());
        let mut bytes = io::Cursor::new(b"\xff\n".to_vec());
        assert!(next_line(&mut bytes).is_err());
    }
}
