//! The committed output of one request.

use serde::{Deserialize, Serialize};
use understudy_protocol::Position;

use crate::record::Entry;

/// Committed output tokens, position 0 first. Only ever grows, one position at a time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenLog {
    entries: Vec<Entry>,
}

/// A token that is not the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The position is committed already: a late or repeated message. Harmless, and dropped.
    #[error("position {position} is committed already, the log ends before {next}")]
    Repeated { position: Position, next: Position },
    /// A message in between was lost: the sender's stream is broken and must be restarted from the log.
    #[error("position {position} leaves a gap, the log ends before {next}")]
    Gap { position: Position, next: Position },
}

impl TokenLog {
    /// The position that the next token must have.
    pub fn next_position(&self) -> Position {
        Position::try_from(self.entries.len())
            .expect("a log is bounded by max_tokens, which is a u32")
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn get(&self, position: Position) -> Option<&Entry> {
        self.entries.get(position as usize)
    }

    /// Commits the token at `position`.
    ///
    /// # Errors
    /// [`AppendError`] if `position` is not [`Self::next_position`]; the log is unchanged then.
    pub fn append(&mut self, position: Position, entry: Entry) -> Result<(), AppendError> {
        let next = self.next_position();
        match position.cmp(&next) {
            std::cmp::Ordering::Less => Err(AppendError::Repeated { position, next }),
            std::cmp::Ordering::Greater => Err(AppendError::Gap { position, next }),
            std::cmp::Ordering::Equal => {
                self.entries.push(entry);
                Ok(())
            }
        }
    }

    /// Token ids, for a replay.
    pub fn ids(&self) -> Vec<u32> {
        self.entries.iter().map(|entry| entry.id).collect()
    }

    /// Logprobs of the last `count` tokens at most, oldest first, for the check of a replay.
    pub fn last_logprobs(&self, count: usize) -> Vec<f32> {
        let from = self.entries.len().saturating_sub(count);
        self.entries[from..]
            .iter()
            .map(|entry| entry.logprob)
            .collect()
    }

    /// Bytes of memory, for retention limits.
    pub fn size_bytes(&self) -> usize {
        self.entries.iter().map(Entry::size_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u32) -> Entry {
        Entry {
            id,
            logprob: -(id as f32),
            top: Vec::new(),
        }
    }

    #[test]
    fn takes_the_next_position_only() {
        let mut log = TokenLog::default();
        log.append(0, entry(7)).unwrap();
        assert_eq!(
            log.append(0, entry(7)),
            Err(AppendError::Repeated {
                position: 0,
                next: 1
            })
        );
        assert_eq!(
            log.append(2, entry(9)),
            Err(AppendError::Gap {
                position: 2,
                next: 1
            })
        );
        log.append(1, entry(8)).unwrap();
        assert_eq!(log.ids(), [7, 8]);
    }

    #[test]
    fn last_logprobs_are_the_newest_in_order() {
        let mut log = TokenLog::default();
        for position in 0..5 {
            log.append(position, entry(position)).unwrap();
        }
        assert_eq!(log.last_logprobs(2), [-3.0, -4.0]);
        assert_eq!(log.last_logprobs(9).len(), 5);
    }
}
