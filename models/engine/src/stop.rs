//! Stop strings over a stream of text pieces.
//!
//! Text that may still turn out to be the beginning of a stop string is held back; when one is complete, the text ends
//! before it (or after it, on request). The match that is complete first wins; of several that are complete at the same
//! character, the one that began first.
//!
//! Invariant: the outcome depends on the text alone, not on how it was cut into pieces, and the matcher is a fold over the
//! pieces, so that it can be rebuilt from the log.

/// Stop strings that one request may have.
pub const MAX_STOP_STRINGS: usize = 16;
/// Length of one, in bytes; also bounds what is held back.
pub const MAX_STOP_BYTES: usize = 256;

/// Stop strings that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    #[error("{count} stop strings are given; allowed are {MAX_STOP_STRINGS}")]
    TooMany { count: usize },
    #[error("stop string {index} is empty; leave it out")]
    Empty { index: usize },
    #[error("stop string {index} has {bytes} bytes; allowed are {MAX_STOP_BYTES}")]
    TooLong { index: usize, bytes: usize },
}

/// What a piece leads to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that may be shown now.
    pub text: String,
    /// The index of the stop string that ended the stream; nothing follows `text` then.
    pub stopped: Option<usize>,
}

/// The matcher of one stream.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    /// The end of the text so far that begins a stop string.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher for these strings; with `include` the text ends after the stop string.
    ///
    /// # Errors
    /// [`StopError`].
    pub fn new(stops: Vec<String>, include: bool) -> Result<Self, StopError> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(StopError::TooMany { count: stops.len() });
        }
        for (index, stop) in stops.iter().enumerate() {
            match stop.len() {
                0 => return Err(StopError::Empty { index }),
                bytes if bytes > MAX_STOP_BYTES => return Err(StopError::TooLong { index, bytes }),
                _ => {}
            }
        }
        Ok(Self {
            stops,
            include,
            held: String::new(),
            stopped: false,
        })
    }

    /// Adds the next piece. After a match every further piece gives nothing.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome::default();
        }
        if self.stops.is_empty() {
            return StopOutcome {
                text: piece.to_owned(),
                stopped: None,
            };
        }
        self.held.push_str(piece);
        if let Some((index, start, end)) = self.first_match() {
            self.stopped = true;
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.include { end } else { start });
            return StopOutcome {
                text,
                stopped: Some(index),
            };
        }
        let keep_from = self.held.len() - self.open_len();
        let held = self.held.split_off(keep_from);
        StopOutcome {
            text: std::mem::replace(&mut self.held, held),
            stopped: None,
        }
    }

    /// Adds a piece that must not be searched (text of the first `min_tokens` tokens). What is held back goes out first.
    pub fn push_unsearched(&mut self, piece: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome::default();
        }
        StopOutcome {
            text: std::mem::take(&mut self.held) + piece,
            stopped: None,
        }
    }

    /// The end of the stream for another reason: what was held back is text after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Index, start and end of the match that is complete first.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        let matches = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((index, start, start + stop.len()))
        });
        matches.min_by_key(|&(index, start, end)| (end, start, index))
    }

    /// Length of the longest end of `held` with which a stop string begins.
    fn open_len(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let most = (stop.len() - 1).min(held.len());
            (1..=most)
                .rev()
                .find(|&length| held.ends_with(&stop.as_bytes()[..length]))
        };
        let open = self.stops.iter().filter_map(longest).max().unwrap_or(0);
        debug_assert!(
            self.held.is_char_boundary(held.len() - open),
            "both texts are UTF-8"
        );
        open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher =
            StopMatcher::new(stops.iter().map(|&s| s.to_owned()).collect(), include).unwrap();
        let mut text = String::new();
        for piece in pieces {
            let outcome = matcher.push(piece);
            text += &outcome.text;
            if outcome.stopped.is_some() {
                assert_eq!(matcher.push("more"), StopOutcome::default());
                assert_eq!(matcher.finish(), "");
                return (text, outcome.stopped);
            }
        }
        text += &matcher.finish();
        (text, None)
    }

    /// The definition: character by character, the first complete match ends the text.
    fn by_definition(stops: &[&str], include: bool, text: &str) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ends = stops
                .iter()
                .enumerate()
                .filter(|(_, stop)| text[..end].ends_with(**stop));
            if let Some((index, stop)) =
                ends.min_by_key(|(index, stop)| (usize::MAX - stop.len(), *index))
            {
                return (
                    text[..if include { end } else { end - stop.len() }].to_owned(),
                    Some(index),
                );
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn text_is_held_back_only_while_it_may_match() {
        let mut matcher = StopMatcher::new(vec!["</s>".to_owned()], false).unwrap();
        assert_eq!(matcher.push("abc<").text, "abc");
        assert_eq!(matcher.push("/").text, "");
        assert_eq!(matcher.held.len(), 2);
        assert_eq!(matcher.push("x").text, "</x");
        assert_eq!(matcher.push("</").text, "");
        assert_eq!(
            matcher.push("s>tail"),
            StopOutcome {
                text: String::new(),
                stopped: Some(0)
            }
        );
    }

    #[test]
    fn every_cut_of_every_text_gives_the_defined_outcome() {
        let sets: [&[&str]; 6] = [
            &["aba"],
            &["ab", "b"],
            &["abcd", "bc"],
            &["bc", "abc"],
            &["é", "aé"],
            &["aab", "abab", "bbb"],
        ];
        let alphabet = ["a", "b", "c", "d", "é"];
        let mut texts = vec![String::new()];
        for _ in 0..6 {
            let longer: Vec<String> = texts
                .iter()
                .flat_map(|text| alphabet.iter().map(move |c| format!("{text}{c}")))
                .collect();
            texts = longer;
        }
        for (number, text) in texts.iter().enumerate() {
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let cuts = (number * 7) % 32;
            let mut pieces = vec![String::new()];
            for (index, c) in chars.iter().enumerate() {
                if cuts >> index & 1 == 1 {
                    pieces.push(String::new());
                }
                pieces.last_mut().unwrap().push_str(c);
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            for stops in sets {
                for include in [false, true] {
                    assert_eq!(
                        run(stops, include, &pieces),
                        by_definition(stops, include, text),
                        "{stops:?} {pieces:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn unsearched_text_passes() {
        let mut matcher = StopMatcher::new(vec!["b".to_owned(), "ac".to_owned()], false).unwrap();
        assert_eq!(matcher.push_unsearched("ab").text, "ab");
        assert_eq!(matcher.push("a").text, "");
        assert_eq!(matcher.push_unsearched("b").text, "ab");
        assert_eq!(
            matcher.push("xb"),
            StopOutcome {
                text: "x".to_owned(),
                stopped: Some(0)
            }
        );
    }

    #[test]
    fn limits_are_named() {
        let error = |stops: Vec<String>| StopMatcher::new(stops, false).unwrap_err();
        assert_eq!(
            error(vec!["a".to_owned(); 17]),
            StopError::TooMany { count: 17 }
        );
        assert_eq!(error(vec![String::new()]), StopError::Empty { index: 0 });
        assert_eq!(
            error(vec!["x".repeat(1025)]),
            StopError::TooLong {
                index: 0,
                bytes: 1025
            }
        );
    }
}
