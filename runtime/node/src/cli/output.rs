//! What is written where: results on stdout, notes and errors on stderr; colours and control characters only as the
//! receiver bears them.
//!
//! Text of a model or a server may hold terminal escapes. On a terminal they are shown as `�` instead of being obeyed;
//! into a pipe or file the text goes unchanged.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

/// Where a command's results go, and how that place wants them.
pub struct Output<W> {
    sink: W,
    /// A person is looking at it.
    pub is_terminal: bool,
    /// ANSI colours may be used.
    pub colour: bool,
}

impl Output<io::Stdout> {
    /// The process's standard output.
    pub fn stdout(no_color: bool) -> Self {
        let sink = io::stdout();
        let is_terminal = sink.is_terminal();
        Self {
            sink,
            is_terminal,
            colour: is_terminal && !no_color,
        }
    }
}

impl<W: Write> Output<W> {
    /// A sink that is no terminal.
    #[cfg(test)]
    pub fn plain(sink: W) -> Self {
        Self {
            sink,
            is_terminal: false,
            colour: false,
        }
    }

    /// Writes text that the program made itself, and flushes: what is streamed must be seen at once.
    pub fn raw(&mut self, text: &str) -> io::Result<()> {
        self.sink.write_all(text.as_bytes())?;
        self.sink.flush()
    }

    /// Writes text from elsewhere; see the module's rule on control characters.
    pub fn foreign(&mut self, text: &str) -> io::Result<()> {
        if self.is_terminal {
            let text = without_controls(text);
            self.raw(&text)
        } else {
            self.raw(text)
        }
    }

    /// The sink itself.
    #[cfg(test)]
    pub fn into_inner(self) -> W {
        self.sink
    }
}

/// The text with every control character but newline and tab replaced.
pub fn without_controls(text: &str) -> Cow<'_, str> {
    let unwanted = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(unwanted) {
        Cow::Owned(text.replace(unwanted, "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

/// An error for the person, on stderr. Nothing is left to do when stderr is gone too.
pub fn error(message: &str) {
    let _ = writeln!(io::stderr(), "error: {}", without_controls(message));
}

/// A remark that only a person wants: written when stderr is a terminal.
pub fn note(message: &str) {
    let mut stderr = io::stderr();
    if stderr.is_terminal() {
        let _ = writeln!(stderr, "[{}]", without_controls(message));
    }
}

/// A warning, on stderr whoever reads it.
pub fn warn(message: &str) {
    let _ = writeln!(io::stderr(), "warning: {}", without_controls(message));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_reach_pipes_but_not_terminals() {
        let text = "red \x1b[31m\u{9b}2J\r\tok\n";
        let mut pipe = Output::plain(Vec::new());
        pipe.foreign(text).expect("a vector takes everything");
        assert_eq!(pipe.into_inner(), text.as_bytes());

        let mut terminal = Output {
            sink: Vec::new(),
            is_terminal: true,
            colour: true,
        };
        terminal.foreign(text).expect("a vector takes everything");
        let shown = String::from_utf8(terminal.into_inner()).expect("utf-8");
        assert_eq!(shown, "red \u{fffd}[31m\u{fffd}2J\u{fffd}\tok\n");
    }
}
