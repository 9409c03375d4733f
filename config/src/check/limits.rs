//! Relations between numbers: what must be shorter than what, so that detection and recovery can work at all.

use crate::load::ClusterConfig;
use crate::problem::Problem;
use crate::schema::Reader;

/// A key of a section and the value that it has.
type Limit = (&'static str, u64);

/// `small` times `factor` must not exceed `big`, or must be less than it.
struct Relation {
    section: &'static str,
    small: Limit,
    factor: u64,
    big: Limit,
    is_strict: bool,
    why: &'static str,
}

pub(super) fn check(config: &ClusterConfig, reader: &mut Reader<'_>) {
    for relation in relations(config) {
        if !relation.holds() {
            let problem = relation.problem(reader).help(relation.why);
            reader.problems.push(problem);
        }
    }
}

fn relations(config: &ClusterConfig) -> [Relation; 4] {
    let detector = &config.failure_detector;
    let suspect = ("suspect_after_ms", detector.suspect_after_ms);
    let restart = &config.restart;
    let gateway = &config.gateway;
    [
        Relation {
            section: "failure_detector",
            small: ("heartbeat_interval_ms", detector.heartbeat_interval_ms),
            factor: 2,
            big: suspect,
            is_strict: false,
            why: "one late heartbeat must not make a node suspect",
        },
        Relation {
            section: "failure_detector",
            small: suspect,
            factor: 1,
            big: ("dead_after_ms", detector.dead_after_ms),
            is_strict: true,
            why: "a node is suspected before it is declared dead",
        },
        Relation {
            section: "restart",
            small: ("backoff_initial_ms", restart.backoff_initial_ms),
            factor: 1,
            big: ("backoff_max_ms", restart.backoff_max_ms),
            is_strict: false,
            why: "the wait grows from the initial one to the longest",
        },
        Relation {
            section: "gateway",
            small: ("default_deadline_ms", gateway.default_deadline_ms),
            factor: 1,
            big: ("max_deadline_ms", gateway.max_deadline_ms),
            is_strict: false,
            why: "the default must itself be allowed",
        },
    ]
}

impl Relation {
    /// The least that `big` may be.
    fn least(&self) -> u64 {
        let least = self.small.1.saturating_mul(self.factor);
        least.saturating_add(u64::from(self.is_strict))
    }

    /// The most that `small` may be.
    fn most(&self) -> u64 {
        (self.big.1.saturating_sub(u64::from(self.is_strict))) / self.factor
    }

    fn holds(&self) -> bool {
        self.least() <= self.big.1
    }

    /// The problem stands at the key that the file gives; a default that does not fit is named in words.
    fn problem(&self, reader: &Reader<'_>) -> Problem {
        let key = |limit: Limit| format!("{}.{}", self.section, limit.0);
        let origin = |limit: Limit| match reader.is_given(&key(limit)) {
            true => "",
            false => " (the default)",
        };
        let (small, big) = (self.small.0, self.big.0);
        if reader.is_given(&key(self.big)) {
            let message = format!(
                "{} is too short beside `{small}`{}",
                self.big.1,
                origin(self.small)
            );
            return reader
                .problem_at(&key(self.big), message)
                .allowed(format!("at least {}", self.least()));
        }
        let times = match self.factor {
            1 => String::new(),
            factor => format!("{factor} times "),
        };
        let must = match self.is_strict {
            true => "be less than",
            false => "not exceed",
        };
        let message = format!(
            "too long: {times}`{small}` must {must} `{big}`{}",
            origin(self.big)
        );
        reader
            .problem_at(&key(self.small), message)
            .allowed(format!("at most {}, or a longer `{big}`", self.most()))
    }
}
