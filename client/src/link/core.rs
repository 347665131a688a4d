//! When a node counts as gone although its connection stands (DESIGN §8).

/// A node that is not heard from for this long is given up.
pub const SILENT_MS: u64 = 1_500;
/// How often it is asked for a sign of life, if nothing else is heard.
const PING_MS: u64 = 500;
/// Between two looks at the clock no more than this passes unless this process itself stood still: then the other
/// side is not blamed for the silence.
const STOOD_STILL_MS: u64 = 1_000;

/// What is due on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    Nothing,
    Ping,
    GiveUp,
}

/// Follows one connection's signs of life.
#[derive(Debug)]
pub struct Liveness {
    heard: u64,
    pinged: u64,
    looked: u64,
}

impl Liveness {
    /// A connection made at `now`, in milliseconds.
    pub fn new(now: u64) -> Self {
        Self { heard: now, pinged: now, looked: now }
    }

    /// Something was received.
    pub fn heard(&mut self, now: u64) {
        self.heard = now;
        self.looked = now;
    }

    /// When [`look`](Self::look) is due next.
    pub fn next(&self) -> u64 {
        (self.heard + SILENT_MS).min(self.pinged + PING_MS)
    }

    /// What to do at `now`.
    pub fn look(&mut self, now: u64) -> Due {
        if now.saturating_sub(self.looked) > STOOD_STILL_MS {
            self.heard = now;
        }
        self.looked = now;
        if now.saturating_sub(self.heard) >= SILENT_MS {
            return Due::GiveUp;
        }
        if now.saturating_sub(self.pinged) >= PING_MS {
            self.pinged = now;
            return Due::Ping;
        }
        Due::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_node_is_given_up_and_a_pause_of_our_own_is_not_its_fault() {
        let mut live = Liveness::new(0);
        assert_eq!(live.next(), 500);
        assert_eq!(live.look(250), Due::Nothing);
        assert_eq!(live.look(500), Due::Ping);
        assert_eq!(live.look(1_000), Due::Ping);
        assert_eq!(live.look(1_499), Due::Nothing);
        assert_eq!(live.next(), 1_500);
        assert_eq!(live.look(1_500), Due::GiveUp);
        let mut live = Liveness::new(0);
        assert_eq!(live.look(30_000), Due::Ping, "this process was stopped");
        assert_eq!(live.look(30_900), Due::Ping);
        assert_eq!(live.look(31_500), Due::GiveUp);
    }
}
