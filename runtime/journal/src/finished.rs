//! Finished requests, kept for clients that come back: bounded in bytes and in time, oldest out first.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_protocol::RequestId;

use crate::record::FinishedRequest;

/// How much is kept, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    pub max_age: Duration,
    pub max_bytes: usize,
}

/// Keeps closed logs until they are too old or too many. Time comes from the caller.
#[derive(Debug)]
pub struct FinishedStore {
    retention: Retention,
    by_id: HashMap<RequestId, Arc<FinishedRequest>>,
    /// In order of finishing, so that the oldest is in front.
    order: VecDeque<(Instant, RequestId, usize)>,
    bytes: usize,
}

impl FinishedStore {
    pub fn new(retention: Retention) -> Self {
        Self {
            retention,
            by_id: HashMap::new(),
            order: VecDeque::new(),
            bytes: 0,
        }
    }

    /// Takes a closed log in; the oldest ones leave if the byte limit asks for it. A request larger than the whole
    /// limit is not kept. A request that is kept already is left as it is: its log is closed.
    pub fn insert(&mut self, request: FinishedRequest, now: Instant) {
        self.expire(now);
        let (id, size) = (request.admission.request, request.size_bytes());
        if size > self.retention.max_bytes || self.by_id.contains_key(&id) {
            return;
        }
        while self.bytes + size > self.retention.max_bytes {
            self.drop_oldest();
        }
        self.bytes += size;
        self.order.push_back((now, id, size));
        self.by_id.insert(id, Arc::new(request));
    }

    pub fn get(&mut self, id: RequestId, now: Instant) -> Option<Arc<FinishedRequest>> {
        self.expire(now);
        self.by_id.get(&id).cloned()
    }

    /// Drops what is too old.
    pub fn expire(&mut self, now: Instant) {
        while let Some((finished_at, _, _)) = self.order.front() {
            if now.saturating_duration_since(*finished_at) < self.retention.max_age {
                break;
            }
            self.drop_oldest();
        }
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub fn size_bytes(&self) -> usize {
        self.bytes
    }

    fn drop_oldest(&mut self) {
        if let Some((_, id, size)) = self.order.pop_front() {
            self.by_id.remove(&id);
            self.bytes -= size;
        }
    }
}

#[cfg(test)]
mod tests {
    use understudy_protocol::message::{FinishReason, Sampling};

    use super::*;
    use crate::{Admission, Outcome, TokenLog};

    fn finished(id: u128, prompt: usize) -> FinishedRequest {
        FinishedRequest {
            admission: Admission {
                request: RequestId(id),
                model: "m".into(),
                prompt: vec![0; prompt],
                sampling: Sampling::default(),
                stop: Vec::new(),
                include_stop: false,
                deadline_ms: 1,
                resumable: true,
                priority: 0,
            },
            log: TokenLog::default(),
            outcome: Outcome::Finished(FinishReason::Stop),
        }
    }

    #[test]
    fn the_oldest_leave_when_bytes_run_out() {
        let one = finished(1, 100).size_bytes();
        let mut store = FinishedStore::new(Retention {
            max_age: Duration::from_secs(60),
            max_bytes: 2 * one,
        });
        let now = Instant::now();
        for id in 1..=3 {
            store.insert(finished(id, 100), now);
        }
        assert!(store.get(RequestId(1), now).is_none());
        assert!(store.get(RequestId(2), now).is_some());
        assert!(store.get(RequestId(3), now).is_some());
        assert_eq!(store.size_bytes(), 2 * one);
        store.insert(finished(4, 100_000), now);
        assert_eq!(
            store.len(),
            2,
            "what never fits must not push the others out"
        );
    }

    #[test]
    fn age_ends_retention() {
        let mut store = FinishedStore::new(Retention {
            max_age: Duration::from_secs(60),
            max_bytes: 1 << 20,
        });
        let start = Instant::now();
        store.insert(finished(1, 1), start);
        assert!(
            store
                .get(RequestId(1), start + Duration::from_secs(59))
                .is_some()
        );
        assert!(
            store
                .get(RequestId(1), start + Duration::from_secs(60))
                .is_none()
        );
        assert_eq!((store.len(), store.size_bytes()), (0, 0));
    }
}
