//! The form of a log line: that of `tracing-subscriber`, with the name of the node in every one.
//!
//! Lines of several nodes end up in one place, so each must say whose it is, whoever logged it.

use std::fmt;

use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// The key under which a line bears the node's name.
pub const NODE_FIELD: &str = "node";

/// Puts the node's name into what `inner` makes of an event. An event that names a node itself keeps its own.
pub(crate) struct NodeLine<F> {
    inner: F,
    /// At the start of a JSON object, right after its bracket.
    json: String,
    /// At the end of a readable line.
    human: String,
    is_json: bool,
}

impl<F> NodeLine<F> {
    pub(crate) fn new(inner: F, node: Option<&str>, is_json: bool) -> Self {
        let made = |make: fn(&str) -> String| node.map_or_else(String::new, make);
        Self {
            inner,
            json: made(|node| format!("\"{NODE_FIELD}\":\"{}\",", escaped(node))),
            human: made(|node| format!(" {NODE_FIELD}={}", escaped(node))),
            is_json,
        }
    }

    fn with_node(&self, line: &str) -> String {
        match (self.is_json, line.strip_prefix('{')) {
            (true, Some(rest)) => format!("{{{}{rest}", self.json),
            _ => format!("{}{}\n", line.trim_end_matches('\n'), self.human),
        }
    }
}

impl<S, N, F> FormatEvent<S, N> for NodeLine<F>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let names_one = event.fields().any(|field| field.name() == NODE_FIELD);
        if self.human.is_empty() || names_one {
            return self.inner.format_event(context, writer, event);
        }
        let mut line = String::new();
        self.inner
            .format_event(context, Writer::new(&mut line), event)?;
        writer.write_str(&self.with_node(&line))
    }
}

/// As JSON wants it within quotes; node names of a checked configuration need nothing of it.
fn escaped(text: &str) -> String {
    let escape = |c: char| match c {
        '"' | '\\' => format!("\\{c}"),
        c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}
