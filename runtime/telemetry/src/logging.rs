//! Log set-up: human or JSON lines, to standard error or to a file, through a thread of their own.
//!
//! Invariant: whatever `RUST_LOG` says, the targets in [`PINNED`] stay at `warn`. Below that they format whole messages,
//! and messages hold prompts and tokens.

use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{self, FmtSpan, JsonFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Registry};

use crate::line::NodeLine;
use crate::sink::{FLUSH_TIMEOUT, Sink};

/// Crates that format payloads when they log below `warn`.
pub const PINNED: [&str; 2] = ["ractor", "ractor_cluster"];

/// Environment variable that overrides the configured level, in the syntax of `tracing_subscriber::EnvFilter`.
pub const FILTER_VARIABLE: &str = "RUST_LOG";
/// Environment variable that, if not empty, switches colours off (<https://no-color.org>).
pub const NO_COLOR_VARIABLE: &str = "NO_COLOR";

/// How lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One readable line an event.
    #[default]
    Human,
    /// One JSON object a line, with the fields of the event and of the spans around it.
    Json,
}

/// What is logged, how and where to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// How lines are written.
    pub format: LogFormat,
    /// Least severe level: `error`, `warn`, `info`, `debug`, `trace`.
    pub level: String,
    /// A filter in `EnvFilter` syntax in place of the level; [`LogOptions::with_environment`] takes it from `RUST_LOG`.
    pub filter: Option<String>,
    /// File to append to; without it lines go to standard error.
    pub file: Option<PathBuf>,
    /// Whether colours are unwanted even on a terminal.
    pub no_color: bool,
    /// Name of the node, which every line then bears.
    pub node: Option<String>,
}

/// Why logging cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The level or the filter cannot be understood.
    #[error(
        "`{filter}` is not a log filter: {reason}; write a level such as `info`, or `warn,understudy_actors=debug`"
    )]
    Filter {
        /// What was asked for.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The file cannot be opened for appending.
    #[error("cannot write the log file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The thread that writes cannot be started.
    #[error("cannot start the thread that writes the log: {0}")]
    Thread(std::io::Error),
    /// A process has one subscriber, and it is there already.
    #[error("logging is already set up in this process")]
    AlreadyInstalled,
}

impl LogOptions {
    /// Takes `RUST_LOG` and `NO_COLOR` from the environment.
    #[must_use]
    pub fn with_environment(mut self) -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        self.filter = set(FILTER_VARIABLE).or(self.filter);
        self.no_color |= set(NO_COLOR_VARIABLE).is_some();
        self
    }
}

/// Keep it until the end: when it is dropped, the lines that wait are written, for at most [`FLUSH_TIMEOUT`].
///
/// [`FLUSH_TIMEOUT`]: crate::FLUSH_TIMEOUT
#[must_use = "without it the last lines before the end are lost"]
#[derive(Clone)]
pub struct LogGuard(Sink);

impl LogGuard {
    /// Waits until everything is written, but not longer than `limit`. Returns whether it is.
    pub fn flush(&self, limit: Duration) -> bool {
        self.0.flush(limit)
    }
}

impl std::fmt::Debug for LogGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LogGuard")
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

/// Sets up logging for the whole process.
///
/// # Errors
/// A filter that cannot be understood, a file that cannot be opened, or a second call.
pub fn install_logging(options: &LogOptions) -> Result<LogGuard, LogError> {
    let (sink, colors) = match &options.file {
        Some(path) => (Sink::to(append(path)?), false),
        None => {
            let colors = std::io::stderr().is_terminal() && !options.no_color;
            (Sink::to(std::io::stderr()), colors)
        }
    };
    let sink = sink.map_err(LogError::Thread)?;
    install(subscriber(options, sink.clone(), colors)?)?;
    Ok(LogGuard(sink))
}

fn append(path: &Path) -> Result<std::fs::File, LogError> {
    let failed = |source| LogError::File {
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path
        .parent()
        .filter(|directory| !directory.as_os_str().is_empty())
    {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(failed)
}

fn install(subscriber: impl Subscriber + Send + Sync) -> Result<(), LogError> {
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::AlreadyInstalled)
}

/// The subscriber that [`install_logging`] installs, writing to `writer`.
///
/// # Errors
/// A filter that cannot be understood.
pub fn subscriber<W>(
    options: &LogOptions,
    writer: W,
    colors: bool,
) -> Result<impl Subscriber + Send + Sync + use<W>, LogError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = env_filter(options)?.and(filter_fn(keeps_payloads_out));
    Ok(Registry::default().with(lines(options, writer, colors).with_filter(filter)))
}

fn lines<S, W>(options: &LogOptions, writer: W, colors: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(colors)
        .with_span_events(FmtSpan::NONE);
    let node = options.node.as_deref();
    match options.format {
        LogFormat::Human => {
            // Said to the format too, because a line is put together away from its writer.
            let human = format::format().with_ansi(colors);
            layer
                .event_format(NodeLine::new(human, node, false))
                .boxed()
        }
        LogFormat::Json => {
            let json = format::format()
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(true);
            layer
                .fmt_fields(JsonFields::new())
                .event_format(NodeLine::new(json, node, true))
                .boxed()
        }
    }
}

fn env_filter(options: &LogOptions) -> Result<EnvFilter, LogError> {
    let filter = options.filter.as_deref().unwrap_or(&options.level);
    let filter = if filter.is_empty() { "info" } else { filter };
    let refused = |reason: String| LogError::Filter {
        filter: filter.to_owned(),
        reason,
    };
    // A single word is a level to a person, but a target to the filter's grammar: `inof` must not silence everything.
    let is_word = filter.chars().all(|c| c.is_ascii_alphanumeric());
    if is_word && options.filter.is_none() && filter.parse::<LevelFilter>().is_err() {
        return Err(refused("unknown level".into()));
    }
    EnvFilter::builder()
        .parse(filter)
        .map_err(|error| refused(error.to_string()))
}

/// Whether an event or span may be logged: those of pinned crates only at `warn` and above.
fn keeps_payloads_out(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let crate_name = target.split("::").next().unwrap_or(target);
    !PINNED.contains(&crate_name) || *metadata.level() <= tracing::Level::WARN
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("the buffer").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(options: &LogOptions, colors: bool, events: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = subscriber(options, move || writer.clone(), colors).expect("a subscriber");
        tracing::subscriber::with_default(subscriber, events);
        let bytes = buffer.0.lock().expect("the buffer").clone();
        String::from_utf8(bytes).expect("text")
    }

    fn options(format: LogFormat, level: &str, filter: Option<&str>) -> LogOptions {
        LogOptions {
            format,
            level: level.into(),
            filter: filter.map(Into::into),
            ..LogOptions::default()
        }
    }

    fn chatter() {
        tracing::trace!(target: "ractor::actor", "payload one");
        tracing::info!(target: "ractor_cluster", "payload two");
        tracing::debug!(target: "ractor_cluster::net::session", "payload three");
        let _span =
            tracing::info_span!(target: "ractor", "span", payload = "payload four").entered();
        tracing::warn!(target: "ractor_cluster::node", "a warning");
        tracing::trace!(target: "ractory", "another crate");
    }

    #[test]
    fn no_filter_opens_the_pinned_crates() {
        for filter in [
            "trace",
            "ractor=trace,ractor_cluster=trace",
            "ractor_cluster::net::session=trace,ractor::actor=trace,trace",
        ] {
            let text = logged(
                &options(LogFormat::Human, "info", Some(filter)),
                false,
                chatter,
            );
            assert!(!text.contains("payload"), "{filter}: {text}");
            assert!(text.contains("a warning"), "{filter}: {text}");
        }
        let text = logged(&options(LogFormat::Json, "trace", None), false, chatter);
        assert!(
            !text.contains("payload")
                && text.contains("a warning")
                && text.contains("another crate"),
            "{text}"
        );
    }

    #[test]
    fn the_level_and_the_filter_decide() {
        let events = || {
            tracing::info!(target: "understudy_actors::request", "kept");
            tracing::debug!(target: "understudy_actors::request", "detail");
        };
        let text = logged(&options(LogFormat::Human, "info", None), false, events);
        assert!(text.contains("kept") && !text.contains("detail"), "{text}");
        let text = logged(
            &options(LogFormat::Human, "error", Some("understudy_actors=debug")),
            false,
            events,
        );
        assert!(text.contains("kept") && text.contains("detail"), "{text}");
        assert!(logged(&options(LogFormat::Human, "", None), false, events).contains("kept"));
    }

    #[test]
    fn json_lines_hold_fields_of_the_event_and_of_its_spans() {
        let text = logged(&options(LogFormat::Json, "info", None), false, || {
            let _span = tracing::info_span!("request", request_id = "r1", epoch = 2).entered();
            tracing::info!(node = "a", worker = "demo/0", "dispatched");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        for part in [
            "\"message\":\"dispatched\"",
            "\"node\":\"a\"",
            "\"request_id\":\"r1\"",
            "\"epoch\":2",
            "\"level\":\"INFO\"",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn every_line_bears_the_node_and_none_bears_two() {
        let events = || {
            let _span = tracing::info_span!("request", request_id = "r1").entered();
            tracing::info!(worker = "demo/0", "dispatched");
            tracing::warn!("without fields");
            tracing::info!(node = "b", "names one itself");
        };
        let mut of_a = options(LogFormat::Json, "info", None);
        of_a.node = Some("a-\"1\"".into());
        let text = logged(&of_a, false, events);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        for line in &lines[..2] {
            assert!(
                line.starts_with("{\"node\":\"a-\\\"1\\\"\",\"timestamp\":") && line.ends_with('}'),
                "{line}"
            );
        }
        assert!(lines[0].contains("\"request_id\":\"r1\""), "{text}");
        assert_eq!(lines[2].matches("\"node\":").count(), 1, "{text}");
        assert!(lines[2].contains("\"node\":\"b\""), "{text}");

        of_a.format = LogFormat::Human;
        of_a.node = Some("a".into());
        let text = logged(&of_a, false, events);
        assert!(
            text.contains("dispatched worker=\"demo/0\" node=a\n"),
            "{text}"
        );
        assert!(text.contains("without fields node=a\n"), "{text}");
        assert!(text.contains("names one itself node=\"b\"\n"), "{text}");
        assert!(logged(&of_a, true, events).contains("\x1b"), "colours stay");
    }

    #[test]
    fn colors_appear_only_when_asked_for() {
        let event = || tracing::info!("hello");
        assert!(!logged(&options(LogFormat::Human, "info", None), false, event).contains('\x1b'));
        assert!(logged(&options(LogFormat::Human, "info", None), true, event).contains('\x1b'));
    }

    #[test]
    fn filters_that_cannot_be_understood_are_refused() {
        for (level, filter) in [
            ("inof", None),
            ("info", Some("a=b=c")),
            ("info", Some("understudy=loud")),
        ] {
            let refused = subscriber(
                &options(LogFormat::Human, level, filter),
                std::io::sink,
                false,
            )
            .err();
            let text = refused.map(|error| error.to_string()).unwrap_or_default();
            assert!(
                text.contains("is not a log filter"),
                "{level} {filter:?}: {text}"
            );
        }
    }

    #[test]
    fn a_log_file_is_made_with_its_directory_and_appended_to() {
        let directory = std::env::temp_dir().join(format!("understudy-log-{}", std::process::id()));
        let path = directory.join("deep/a.log");
        for line in ["one", "two"] {
            use std::io::Write;
            writeln!(append(&path).expect("a file"), "{line}").expect("written");
        }
        assert_eq!(
            std::fs::read_to_string(&path).expect("the file"),
            "one\ntwo\n"
        );
        let taken = append(&path.join("b.log")).expect_err("a file is no directory");
        assert!(
            taken.to_string().contains("cannot write the log file"),
            "{taken}"
        );
        std::fs::remove_dir_all(&directory).expect("removed");
    }
}
