//! What has come of a request, and whether the next event fits: pure.
//!
//! Invariant: `next_position` is the number of tokens received. A token below it is a repeat; one above it is a gap, and an
//! error. Every acceptance agrees with the first.

use understudy_protocol::RequestId;

use crate::error::Error;
use crate::request::Accepted;

#[derive(Debug)]
pub(super) struct Progress {
    accepted: Option<Accepted>,
    next_position: u32,
}

impl Progress {
    pub fn new(next_position: u32) -> Self {
        Self {
            accepted: None,
            next_position,
        }
    }

    /// What the server said at the first acceptance.
    pub fn accepted(&self) -> Option<Accepted> {
        self.accepted
    }

    /// The first position that has not come.
    pub fn next_position(&self) -> u32 {
        self.next_position
    }

    /// Checks an acceptance of the request `asked` for, where its id is known. True for the first one.
    ///
    /// # Errors
    /// [`Error::Protocol`], if it is another request than before.
    pub fn accept(&mut self, asked: Option<RequestId>, accepted: Accepted) -> Result<bool, Error> {
        if asked.is_some_and(|id| id != accepted.request) {
            return Err(broken("another request was resumed than the one asked for"));
        }
        match self.accepted {
            None => {
                self.accepted = Some(accepted);
                Ok(true)
            }
            Some(first) if first == accepted => Ok(false),
            Some(_) => Err(broken(
                "the resumed request has another seed or prompt length",
            )),
        }
    }

    /// Checks a token's position. False for a repeat, which the caller has.
    ///
    /// # Errors
    /// [`Error::Protocol`], if positions are missing before it.
    pub fn token(&mut self, position: u32) -> Result<bool, Error> {
        let due = self.next_position;
        if position > due {
            return Err(broken(format!("token {position} came where {due} was due")));
        }
        if position < due {
            return Ok(false);
        }
        self.next_position = due
            .checked_add(1)
            .ok_or_else(|| broken("more tokens than positions"))?;
        Ok(true)
    }
}

fn broken(what: impl Into<String>) -> Error {
    Error::Protocol(what.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Accepted = Accepted {
        request: RequestId(1),
        prompt_tokens: 3,
        seed: 7,
    };

    #[test]
    fn positions_come_once_and_without_a_gap() {
        let mut progress = Progress::new(5);
        assert_eq!(progress.token(5), Ok(true));
        assert_eq!(progress.token(4), Ok(false));
        assert_eq!(progress.token(5), Ok(false));
        assert!(progress.token(7).is_err());
        assert_eq!(progress.next_position(), 6);
        assert!(Progress::new(u32::MAX).token(u32::MAX).is_err());
    }

    #[test]
    fn acceptances_agree_with_the_first_and_with_what_was_asked_for() {
        let mut progress = Progress::new(0);
        assert!(progress.accept(Some(RequestId(2)), FIRST).is_err());
        assert_eq!(progress.accept(None, FIRST), Ok(true));
        assert_eq!(progress.accept(Some(FIRST.request), FIRST), Ok(false));
        let other = Accepted { seed: 8, ..FIRST };
        assert!(progress.accept(Some(FIRST.request), other).is_err());
    }
}
