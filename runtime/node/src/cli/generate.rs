//! `understudy generate` and `understudy resume`: one request, streamed.

use std::io::Write;

use clap::Args;
use tokio::time::timeout;
use understudy_client::{Error, Event, Request, Stream};
use understudy_protocol::RequestId;
use understudy_protocol::message::FinishReason;

use super::answer_view::AnswerView;
use super::env::Environment;
use super::exit::{Exit, Failure};
use super::gateways::{GatewayArgs, Gateways};
use super::input::InputArgs;
use super::interrupt::Interrupt;
use super::output::{self, Output};
use super::sampling::SamplingArgs;
use super::session::{self, CANCEL_WAIT, connect};
use super::trouble::{Trouble, failure};

/// Generate one completion and stream it
#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub gateways: GatewayArgs,
    /// Model to use; may be left out where the cluster serves one only
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    #[command(flatten)]
    pub input: InputArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Ask for the log probability of each token (--json always does)
    #[arg(long)]
    pub logprobs: bool,
    /// Ask for the N most likely alternatives at each position, at most 20
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=20))]
    pub top_logprobs: u32,
    #[command(flatten)]
    pub form: FormArgs,
}

/// Go on with a request at the first position that is lacking
#[derive(Debug, Clone, Args)]
pub struct ResumeArgs {
    /// The request's id: 32 hexadecimal digits
    #[arg(value_name = "REQUEST_ID")]
    pub request: RequestId,
    /// The first position to print; 0 = the whole answer
    #[arg(long, value_name = "N")]
    pub next_position: u32,
    #[command(flatten)]
    pub gateways: GatewayArgs,
    #[command(flatten)]
    pub form: FormArgs,
}

/// How the answer is printed.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Output")]
pub struct FormArgs {
    /// Print one JSON object a line: tokens, then one with finish_reason and usage
    #[arg(long)]
    pub json: bool,
    /// Tell the request's id and seed as soon as it can be resumed: as the first JSON object, or on standard error
    #[arg(long)]
    pub announce: bool,
}

impl GenerateArgs {
    /// What to send. Reads the prompt, where it stands in a file.
    fn request(&self) -> Result<Request, Failure> {
        let mut sampling = self.sampling.to_sampling();
        sampling.logprobs = self.logprobs || self.form.json;
        sampling.top_logprobs = self.top_logprobs;
        Ok(Request {
            model: self.model.clone(),
            sampling,
            stop: self.sampling.stop.clone(),
            include_stop: self.sampling.include_stop,
            deadline_ms: self.sampling.deadline_ms(),
            priority: self.sampling.priority,
            ..Request::new(self.input.read()?)
        })
    }
}

/// Runs `generate`.
pub async fn generate<W: Write>(
    args: GenerateArgs,
    environment: &Environment,
    out: &mut Output<W>,
) -> Result<Exit, Failure> {
    let gateways = args.gateways.resolve(environment)?;
    let request = args.request()?;
    let mut interrupt = Interrupt::listen()?;
    let client = interrupt.unless(connect(&gateways)).await??;
    let view = AnswerView::new(out, args.form.json, args.form.announce, 0);
    let stream = interrupt.unless(client.submit(request)).await?;
    print(stream, view, &mut interrupt, &gateways).await
}

/// Runs `resume`.
pub async fn resume<W: Write>(
    args: ResumeArgs,
    environment: &Environment,
    out: &mut Output<W>,
) -> Result<Exit, Failure> {
    let gateways = args.gateways.resolve(environment)?;
    let mut interrupt = Interrupt::listen()?;
    let client = interrupt.unless(connect(&gateways)).await??;
    let mut view = AnswerView::new(out, args.form.json, args.form.announce, args.next_position);
    view.set_request(args.request);
    let stream = interrupt
        .unless(client.resume(args.request, args.next_position))
        .await?;
    print(stream, view, &mut interrupt, &gateways).await
}

/// Prints a stream to its end. A signal cancels the request, and so does an output that takes no more.
async fn print<W: Write>(
    stream: Result<Stream, Error>,
    mut view: AnswerView<'_, W>,
    interrupt: &mut Interrupt,
    gateways: &Gateways,
) -> Result<Exit, Failure> {
    let mut stream = match stream {
        Ok(stream) => stream,
        Err(error) => return Err(tell(&mut view, &error, gateways)),
    };
    let mut recoveries = 0;
    loop {
        let event = tokio::select! {
            biased;
            exit = interrupt.wait() => {
                cancel(stream, &mut view, interrupt).await?;
                return Ok(exit);
            }
            event = stream.next() => event,
        };
        if stream.recoveries() > recoveries {
            recoveries = stream.recoveries();
            output::note("connection lost; the stream goes on where it was");
        }
        match event {
            Ok(Some(event)) => {
                if let Err(gone) = view.event(&event) {
                    session::abandon(stream).await;
                    return Err(gone.into());
                }
                if let Event::Finished(end) = event {
                    return Ok(exit_of_end(end.finish_reason));
                }
            }
            Ok(None) => return Ok(Exit::Ok),
            Err(error) => return Err(tell(&mut view, &error, gateways)),
        }
    }
}

/// An answer that someone else cancelled is not the whole answer.
fn exit_of_end(reason: FinishReason) -> Exit {
    match reason {
        FinishReason::Cancelled => Exit::Failed,
        FinishReason::Stop | FinishReason::Length => Exit::Ok,
    }
}

/// Prints the error in the answer's own form, and makes the failure of it. Where the output is gone too, that is what
/// is reported.
fn tell<W: Write>(view: &mut AnswerView<'_, W>, error: &Error, gateways: &Gateways) -> Failure {
    match view.failed(&Trouble::from(error)) {
        Ok(()) => failure(error, gateways),
        Err(gone) => Failure::from(gone),
    }
}

/// Cancels, and prints what still comes, until the server confirms, a second signal comes, or the wait is over.
async fn cancel<W: Write>(
    mut stream: Stream,
    view: &mut AnswerView<'_, W>,
    interrupt: &mut Interrupt,
) -> Result<(), Failure> {
    stream.cancel();
    let confirmed = async {
        while let Ok(Some(event)) = stream.next().await {
            view.event(&event)?;
        }
        Ok::<(), Failure>(())
    };
    tokio::select! {
        _ = interrupt.wait() => {}
        result = timeout(CANCEL_WAIT, confirmed) => result.unwrap_or(Ok(()))?,
    }
    view.end_line()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command, FromArgMatches};
    use understudy_protocol::message::{ChatMessage, Input, Sampling};

    use super::*;

    fn parse(line: &[&str]) -> Result<GenerateArgs, clap::Error> {
        let command = GenerateArgs::augment_args(Command::new("generate"));
        let matches = command.try_get_matches_from(["generate"].iter().chain(line))?;
        GenerateArgs::from_arg_matches(&matches)
    }

    fn request(line: &[&str]) -> Request {
        parse(line).expect("parses").request().expect("a request")
    }

    #[test]
    fn every_option_reaches_the_request() {
        let line = "--model m --token-ids 1,2,3 --max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 40 \
                    --min-p 0.1 --repetition-penalty 1.1 --presence-penalty -0.5 --frequency-penalty 0.25 --seed 7 \
                    --stop a --stop b,c --include-stop --stop-token-ids 4,5 --ignore-eos --deadline 2s --top-logprobs 3";
        let words: Vec<&str> = line.split_whitespace().collect();
        let expected = Request {
            model: Some("m".to_owned()),
            sampling: Sampling {
                temperature: Some(0.5),
                top_p: Some(0.9),
                top_k: Some(40),
                min_p: Some(0.1),
                repetition_penalty: Some(1.1),
                presence_penalty: Some(-0.5),
                frequency_penalty: Some(0.25),
                seed: Some(7),
                max_tokens: Some(9),
                min_tokens: Some(2),
                stop_token_ids: vec![4, 5],
                ignore_eos: true,
                logprobs: false,
                top_logprobs: 3,
                ..Sampling::default()
            },
            stop: vec!["a".to_owned(), "b,c".to_owned()],
            include_stop: true,
            deadline_ms: Some(2000),
            priority: 0,
            ..Request::new(Input::TokenIds(vec![1, 2, 3]))
        };
        assert_eq!(request(&words), expected);
    }

    #[test]
    fn json_asks_for_log_probabilities_and_text_does_not() {
        assert!(request(&["--prompt", "x", "--json"]).sampling.logprobs);
        assert!(!request(&["--prompt", "x"]).sampling.logprobs);
        assert!(request(&["--prompt", "x", "--logprobs"]).sampling.logprobs);
    }

    #[test]
    fn there_is_exactly_one_input() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--prompt", "x", "--token-ids", "1"]).is_err());
        assert_eq!(
            request(&["--prompt", ""]).input,
            Input::Prompt(String::new())
        );
        let message = |role: &str, content: &str| ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
        };
        let talk = request(&["--message", "system: brief", "--message", "hi"]);
        assert_eq!(
            talk.input,
            Input::Messages(vec![message("system", "brief"), message("user", "hi")])
        );
    }
}
