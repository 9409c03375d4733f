//! Aligned text tables with optional colours.

/// Colours for states, as ANSI escapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    Green,
    Yellow,
    Red,
    Dim,
    Bold,
}

impl Colour {
    fn escape(self) -> &'static str {
        match self {
            Colour::Green => "\x1b[32m",
            Colour::Yellow => "\x1b[33m",
            Colour::Red => "\x1b[31m",
            Colour::Dim => "\x1b[2m",
            Colour::Bold => "\x1b[1m",
        }
    }
}

const RESET: &str = "\x1b[0m";

/// One cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    pub text: String,
    pub colour: Option<Colour>,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self {
            text: text.into(),
            colour: None,
        }
    }
}

/// `text` in `colour`, where colours are on.
pub fn paint(text: &str, colour: Colour, on: bool) -> String {
    if on {
        format!("{}{text}{RESET}", colour.escape())
    } else {
        text.to_owned()
    }
}

/// Lays rows out under a header; columns are two spaces apart, lines end without white space.
pub fn render(header: &[&str], rows: &[Vec<Cell>], colour: bool) -> String {
    let head: Vec<Cell> = header
        .iter()
        .map(|name| Cell {
            text: (*name).to_owned(),
            colour: Some(Colour::Bold),
        })
        .collect();
    let mut widths = vec![0; header.len()];
    for row in std::iter::once(&head).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.text.chars().count());
        }
    }
    let mut out = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let filled = row
            .iter()
            .rposition(|cell| !cell.text.is_empty())
            .map_or(0, |last| last + 1);
        for (column, (cell, width)) in row.iter().zip(&widths).take(filled).enumerate() {
            match cell.colour {
                Some(name) => out.push_str(&paint(&cell.text, name, colour)),
                None => out.push_str(&cell.text),
            }
            if column + 1 < filled {
                let padding = width - cell.text.chars().count() + 2;
                out.extend(std::iter::repeat_n(' ', padding));
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Vec<Cell>> {
        let ready = Cell {
            text: "ready".to_owned(),
            colour: Some(Colour::Green),
        };
        vec![
            vec!["a".into(), ready, "1".into()],
            vec!["long-name".into(), "x".into(), "".into()],
        ]
    }

    #[test]
    fn columns_line_up_without_trailing_space() {
        assert_eq!(
            render(&["NAME", "STATE", "N"], &rows(), false),
            "NAME       STATE  N\na          ready  1\nlong-name  x\n"
        );
    }

    #[test]
    fn colours_do_not_move_columns() {
        let coloured = render(&["NAME", "STATE", "N"], &rows(), true);
        assert!(coloured.contains("a          \x1b[32mready\x1b[0m  1\n"));
        let mut bare = coloured;
        for escape in ["\x1b[32m", "\x1b[1m", RESET] {
            bare = bare.replace(escape, "");
        }
        assert_eq!(bare, render(&["NAME", "STATE", "N"], &rows(), false));
    }
}
