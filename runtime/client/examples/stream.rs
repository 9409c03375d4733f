//! Streams one completion to the terminal, across the death of connections and gateways.
//!
//! `cargo run --release -p understudy-client --example stream -- 127.0.0.1:7600,127.0.0.1:7601 "count from 1 to 20"`

use std::io::Write;

use understudy_client::{Client, Error, Event, Options, Request, Sampling};

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(addresses), Some(prompt)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: stream HOST:PORT[,HOST:PORT…] PROMPT");
        std::process::exit(2);
    };
    if let Err(error) = stream(&addresses, prompt).await {
        let hint = if error.is_retriable() {
            " (may work later)"
        } else {
            ""
        };
        eprintln!("error: {error}{hint}");
        std::process::exit(1);
    }
}

async fn stream(addresses: &str, prompt: String) -> Result<(), Error> {
    let client = Client::connect(addresses.split(','), Options::default()).await?;
    let request = Request {
        sampling: Sampling {
            max_tokens: Some(200),
            ..Sampling::default()
        },
        ..Request::prompt(prompt)
    };
    let mut stream = client.submit(request).await?;
    while let Some(event) = stream.next().await? {
        match event {
            Event::Accepted(accepted) => eprintln!("[request {}]", accepted.request),
            Event::Token(token) => show(&token.text),
            Event::Finished(end) => {
                show(&end.text);
                let tokens = end.usage.completion_tokens;
                eprintln!(
                    "\n[{tokens} tokens, {:?}, {} recoveries]",
                    end.finish_reason,
                    stream.recoveries()
                );
            }
        }
    }
    Ok(())
}

fn show(text: &str) {
    print!("{text}");
    // A terminal that is gone ends the program at the next line, as with every other tool.
    let _ = std::io::stdout().flush();
}
