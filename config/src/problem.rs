//! Problems and warnings: what is wrong, where, what is allowed, and what was probably meant.
//!
//! A [`Problem`] is complete in itself (it carries its line of the file), so that it can be shown long after the file
//! has been closed, by a person's terminal or as JSON.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// One thing that is wrong with a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file as it was named by the caller.
    pub file: PathBuf,
    /// Line, from 1; 0 if the problem is with the file as a whole.
    pub line: usize,
    /// Column in characters, from 1; 0 if the problem is with the file as a whole.
    pub column: usize,
    /// Path of the key, such as `node[1].cluster_port` (indices from 0); empty for the whole file.
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// What may stand there.
    pub allowed: Option<String>,
    /// What to do, or what was probably meant.
    pub help: Option<String>,
    excerpt: String,
    caret_len: usize,
}

/// Something that works, but probably not as meant. It looks like a problem and stops nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning(pub Problem);

/// A text with its name, to turn byte offsets into places.
pub(crate) struct Source<'a> {
    pub file: &'a Path,
    pub text: &'a str,
}

impl Source<'_> {
    /// A problem at `span` (bytes of the text); without a span it concerns the file as a whole.
    pub fn problem(
        &self,
        span: Option<Range<usize>>,
        key: &str,
        message: impl Into<String>,
    ) -> Problem {
        let mut problem = Problem {
            file: self.file.to_owned(),
            line: 0,
            column: 0,
            key: key.to_owned(),
            message: message.into(),
            allowed: None,
            help: None,
            excerpt: String::new(),
            caret_len: 0,
        };
        if let Some(span) = span {
            self.locate(&mut problem, span);
        }
        problem
    }

    fn locate(&self, problem: &mut Problem, span: Range<usize>) {
        let start = self
            .text
            .floor_char_boundary(span.start.min(self.text.len()));
        let end = self
            .text
            .floor_char_boundary(span.end.clamp(start, self.text.len()));
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line = self.text[line_start..].lines().next().unwrap_or("");
        problem.line = self.text[..start].matches('\n').count() + 1;
        problem.column = self.text[line_start..start].chars().count() + 1;
        problem.excerpt = line.replace('\t', " ");
        let rest = line.chars().count().saturating_sub(problem.column - 1);
        problem.caret_len = self.text[start..end].chars().count().min(rest).max(1);
    }
}

impl Problem {
    pub(crate) fn allowed(mut self, allowed: impl Into<String>) -> Self {
        let allowed = allowed.into();
        self.allowed = (!allowed.is_empty()).then_some(allowed);
        self
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The problem as a JSON object with `file`, `line`, `column`, `key`, `message`, `allowed`, `help`.
    pub fn to_json(&self) -> Value {
        json!({
            "file": self.file.display().to_string(),
            "line": self.line,
            "column": self.column,
            "key": self.key,
            "message": self.message,
            "allowed": self.allowed,
            "help": self.help,
        })
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, severity: &str) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        write!(f, ": {severity}: ")?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}", self.message)?;
        let margin = " ".repeat(self.line.to_string().len());
        if self.line > 0 {
            write!(f, "\n{margin} |\n{} | {}", self.line, self.excerpt)?;
            let indent = " ".repeat(self.column - 1);
            write!(f, "\n{margin} | {indent}{}", "^".repeat(self.caret_len))?;
        }
        if let Some(allowed) = &self.allowed {
            write!(f, "\n{margin} = allowed: {allowed}")?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n{margin} = help: {help}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, "error")
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f, "warning")
    }
}

/// Everything that is wrong with a file, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems {
    /// At least one problem.
    pub problems: Vec<Problem>,
    /// The warnings that were found beside them.
    pub warnings: Vec<Warning>,
}

impl Problems {
    pub(crate) fn sorted(mut problems: Vec<Problem>, warnings: Vec<Warning>) -> Self {
        problems.sort_by(|a, b| (a.line, a.column, &a.key).cmp(&(b.line, b.column, &b.key)));
        problems.dedup();
        Self { problems, warnings }
    }

    /// `{"problems": […], "warnings": […]}`, each entry as [`Problem::to_json`] gives it.
    pub fn to_json(&self) -> Value {
        let problems: Vec<Value> = self.problems.iter().map(Problem::to_json).collect();
        let warnings: Vec<Value> = self
            .warnings
            .iter()
            .map(|warning| warning.0.to_json())
            .collect();
        json!({ "problems": problems, "warnings": warnings })
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for warning in &self.warnings {
            write!(f, "{warning}\n\n")?;
        }
        for problem in &self.problems {
            write!(f, "{problem}\n\n")?;
        }
        match self.problems.len() {
            1 => f.write_str("1 problem in the configuration"),
            count => write!(f, "{count} problems in the configuration"),
        }
    }
}

impl std::error::Error for Problems {}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source<'_> {
        Source {
            file: Path::new("c.toml"),
            text,
        }
    }

    #[test]
    fn a_problem_shows_its_line_with_a_caret() {
        let problem = source("a = 1\nbé = \"x\"\n")
            .problem(Some(12..15), "b", "wrong")
            .allowed("1 to 3")
            .help("do this");
        assert_eq!(
            problem.to_string(),
            "c.toml:2:6: error: b: wrong\n  |\n2 | bé = \"x\"\n  |      ^^^\n  = allowed: 1 to 3\n  = help: do this"
        );
    }

    #[test]
    fn a_span_over_several_lines_marks_the_first() {
        let problem = source("a = [\n 1,\n]\n").problem(Some(4..10), "a", "wrong");
        assert!(
            problem.to_string().ends_with("1 | a = [\n  |     ^"),
            "{problem}"
        );
    }

    #[test]
    fn spans_past_the_end_or_inside_a_character_do_not_panic() {
        for text in ["", "é", "é\n"] {
            for start in 0..5 {
                for end in 0..5 {
                    let _ = source(text).problem(Some(start..end), "k", "m").to_string();
                }
            }
        }
    }
}
