//! One completion, streamed, to prove that a fresh cluster serves.

use std::time::{Duration, Instant};

use understudy_client::{ChatMessage, Client, Error, ErrorCode, Event, Input, Request};
use understudy_config::ClusterConfig;

use super::ready;
use crate::cli::exit::{Exit, Failure};
use crate::cli::output::without_controls;

const QUESTION: &str = "Count from 1 to 20.";
/// For models that know no chat.
const OPENING: &str = "One, two, three, four,";
const MAX_TOKENS: u32 = 96;
const DEADLINE: Duration = Duration::from_secs(60);

/// Streams a completion of the first model to standard output.
pub async fn stream(config: &ClusterConfig, token: Option<&str>) -> Result<(), Failure> {
    let Some(model) = config.models.first() else {
        return Ok(());
    };
    let failed = |error: Error| {
        Failure::new(
            Exit::Failed,
            format!("the sample completion failed: {error}"),
        )
    };
    let addresses: Vec<String> = config
        .nodes
        .iter()
        .filter_map(|node| node.client_address())
        .collect();
    let client = Client::connect(addresses, ready::options(token.map(str::to_owned)))
        .await
        .map_err(failed)?;
    let message = ChatMessage {
        role: "user".to_owned(),
        content: QUESTION.to_owned(),
    };
    let asked = ask(
        &client,
        &model.name,
        QUESTION,
        Input::Messages(vec![message]),
    )
    .await;
    match asked {
        // A model without a chat template.
        Err(Error::Server(body)) if body.code == ErrorCode::InvalidRequest => ask(
            &client,
            &model.name,
            OPENING,
            Input::Prompt(OPENING.to_owned()),
        )
        .await
        .map_err(failed),
        other => other.map_err(failed),
    }
}

async fn ask(client: &Client, model: &str, shown: &str, input: Input) -> Result<(), Error> {
    let mut request = Request::new(input);
    request.model = Some(model.to_owned());
    request.sampling.temperature = Some(0.0);
    request.sampling.max_tokens = Some(MAX_TOKENS);
    request.deadline_ms = u64::try_from(DEADLINE.as_millis()).ok();
    let begun = Instant::now();
    let mut stream = client.submit(request).await?;
    let (mut first, mut tokens) = (None, 0_u32);
    while let Some(event) = stream.next().await? {
        match event {
            Event::Accepted(_) => {
                print(&format!("\n  {model}, asked: {shown}\n  {model} answers: "))
            }
            Event::Token(token) => {
                first.get_or_insert_with(|| begun.elapsed());
                tokens += 1;
                print(&token.text);
            }
            Event::Finished(end) => print(&end.text),
        }
    }
    print(&format!(
        "\n  {}\n",
        figures(tokens, first.unwrap_or_default(), begun.elapsed())
    ));
    Ok(())
}

/// `20 tokens, 48 tokens/s, the first after 12 ms`; the rate counts the tokens after the first.
fn figures(tokens: u32, first: Duration, all: Duration) -> String {
    let rest = (all - first.min(all)).as_secs_f64();
    let rate = if tokens > 1 && rest > 0.0 {
        format!("{:.0} tokens/s, ", f64::from(tokens - 1) / rest)
    } else {
        String::new()
    };
    format!(
        "{tokens} tokens, {rate}the first after {:.0} ms",
        first.as_secs_f64() * 1e3
    )
}

/// Pieces are seen as they come. Control characters of a model do not reach the terminal.
fn print(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let safe = without_controls(text);
    let _ = out.write_all(safe.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_leaves_the_first_token_out() {
        let ms = Duration::from_millis;
        assert_eq!(
            figures(11, ms(100), ms(1100)),
            "11 tokens, 10 tokens/s, the first after 100 ms"
        );
        assert_eq!(figures(1, ms(5), ms(5)), "1 tokens, the first after 5 ms");
        assert_eq!(figures(0, ms(0), ms(0)), "0 tokens, the first after 0 ms");
    }
}
