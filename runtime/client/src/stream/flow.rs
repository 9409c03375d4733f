//! Credit as the client counts it: what a gateway may still send, and what the caller has not taken yet, together never
//! exceed the window.
//!
//! ```text
//!   window = outstanding (granted, not come) + unread (come, not taken) + room (to be granted)
//! ```
//!
//! Room is granted half a window at a time, so that grants are few and a caller that keeps up never stalls the gateway.
//! A new connection starts with nothing outstanding; its first grant is the room that the unread tokens leave.

/// One stream's credit. Pure: positions come as arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flow {
    window: u32,
    outstanding: u32,
}

impl Flow {
    pub fn new(window: u32) -> Self {
        Self {
            window,
            outstanding: 0,
        }
    }

    /// Begins on a new connection, whose gateway holds at most `window`. What the last one owed will never come.
    pub fn restart(&mut self, window: u32) {
        *self = Self::new(window);
    }

    /// Notes that a token event came, whether it was new or a repeat.
    pub fn arrived(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    /// Whether the gateway has no credit left.
    pub fn is_spent(&self) -> bool {
        self.outstanding == 0
    }

    /// What can be granted, when the caller has taken the tokens before `taken` of those before `received`.
    fn room(&self, received: u32, taken: u32) -> u32 {
        let unread = received.saturating_sub(taken);
        self.window
            .saturating_sub(self.outstanding.saturating_add(unread))
    }

    /// Whether there is room for a grant.
    pub fn is_due(&self, received: u32, taken: u32) -> bool {
        self.room(received, taken) >= self.half()
    }

    /// Takes all the room: the credit to give now, possibly none.
    pub fn grant(&mut self, received: u32, taken: u32) -> u32 {
        let room = self.room(received, taken);
        self.outstanding += room;
        room
    }

    /// Tokens that the caller takes between two grants.
    pub fn half(&self) -> u32 {
        self.window.div_ceil(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_that_keeps_up_never_stalls_the_gateway() {
        for window in 1..=65 {
            let mut flow = Flow::new(window);
            let mut credit = flow.grant(0, 0);
            assert_eq!(credit, window);
            for position in 1..=1000 {
                assert!(credit > 0, "stalled with a window of {window}");
                credit -= 1;
                flow.arrived();
                if flow.is_due(position, position) {
                    credit += flow.grant(position, position);
                }
                assert!(credit <= window);
            }
        }
    }

    #[test]
    fn unread_tokens_count_against_the_window_of_the_next_connection() {
        let mut flow = Flow::new(8);
        flow.grant(0, 0);
        for _ in 0..8 {
            flow.arrived();
        }
        flow.restart(8);
        assert_eq!(flow.grant(8, 0), 0);
        assert!(!flow.is_due(8, 3));
        assert!(flow.is_due(8, 4));
        assert_eq!(flow.grant(8, 5), 5);
        // A gateway with a smaller window than what is unread already.
        flow.restart(2);
        assert_eq!(flow.grant(8, 1), 0);
    }

    #[test]
    fn repeats_give_their_credit_back() {
        let mut flow = Flow::new(4);
        flow.grant(10, 10);
        for _ in 0..4 {
            flow.arrived();
        }
        assert!(flow.is_spent());
        assert!(flow.is_due(10, 10));
        assert_eq!(flow.grant(10, 10), 4);
    }
}
