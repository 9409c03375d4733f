//! The receiving half of a session: records become payloads again, and wait for the consumer. Pure.
//!
//! What the consumer takes is released: the peer may send as much again. Parts of a large payload are released
//! as they arrive (its size is bounded), unless [`UNTAKEN_BYTES`] of finished payloads wait already; so a slow
//! consumer stops its peers, and holds at most a window, one unfinished payload and a bit more per lane.
//!
//! Invariant: parcels come in the order of their numbers, or the session is broken.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::outbox::window;
use crate::parcel::{Header, LANES, Lane, PART_BYTES, ParcelError, Record, Records, cost};

/// Finished payloads beyond which parts of the next one are not released on arrival: 1 MiB.
const UNTAKEN_BYTES: usize = 1 << 20;

/// What the consumer gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Payload(Bytes),
    Goodbye,
}

/// Why a session is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InboxError {
    #[error(transparent)]
    Parcel(#[from] ParcelError),
    #[error("parcel {got} instead of {expected}")]
    Sequence { got: u64, expected: u64 },
    #[error("parts of a payload out of order")]
    Parts,
    #[error("more sent than the window allows")]
    Window,
}

#[derive(Debug, Default)]
pub(crate) struct Inbox {
    next_seq: u64,
    lanes: [InLane; 2],
    /// The lane whose turn it is.
    turn: usize,
}

#[derive(Debug, Default)]
struct InLane {
    /// What waits, with what its last record cost.
    queue: VecDeque<(Item, u64)>,
    untaken_bytes: usize,
    partial: Option<Partial>,
    received: u64,
    released: u64,
    /// Released only when the consumer has caught up.
    held: u64,
    /// What the peer was last told of `released`.
    told: u64,
    urgent: bool,
}

#[derive(Debug)]
struct Partial {
    total: usize,
    bytes: BytesMut,
}

impl Inbox {
    /// Takes a parcel in.
    pub(crate) fn accept(&mut self, header: &Header, records: Records) -> Result<(), InboxError> {
        if header.seq != self.next_seq {
            return Err(InboxError::Sequence {
                got: header.seq,
                expected: self.next_seq,
            });
        }
        self.next_seq += 1;
        let lane = &mut self.lanes[header.lane as usize];
        for record in records {
            lane.accept(record?)?;
        }
        lane.check_window(header.lane)
    }

    /// The next thing for the consumer; the lanes take turns.
    pub(crate) fn pop(&mut self) -> Option<Item> {
        let turn = self.turn;
        let lane = [turn, 1 - turn]
            .into_iter()
            .find(|&lane| !self.lanes[lane].queue.is_empty())?;
        self.turn = 1 - lane;
        self.lanes[lane].pop()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lane.queue.is_empty())
    }

    /// Finished payloads that wait.
    pub(crate) fn len(&self) -> usize {
        let payloads = |lane: &InLane| {
            lane.queue
                .iter()
                .filter(|(item, _)| *item != Item::Goodbye)
                .count()
        };
        self.lanes.iter().map(payloads).sum()
    }

    /// Bytes that wait, unfinished payloads included.
    pub(crate) fn bytes(&self) -> usize {
        let partial = |lane: &InLane| {
            lane.partial
                .as_ref()
                .map_or(0, |partial| partial.bytes.len())
        };
        self.lanes
            .iter()
            .map(|lane| lane.untaken_bytes + partial(lane))
            .sum()
    }

    /// Whether the peer should be told now what was released: it may be waiting for it.
    pub(crate) fn ack_due(&self) -> bool {
        LANES
            .iter()
            .zip(&self.lanes)
            .any(|(&lane, state)| state.ack_due(lane))
    }

    /// What was released, ever; the peer is told now.
    pub(crate) fn take_acks(&mut self) -> [u64; 2] {
        for lane in &mut self.lanes {
            lane.told = lane.released;
            lane.urgent = false;
        }
        [self.lanes[0].released, self.lanes[1].released]
    }
}

impl InLane {
    fn accept(&mut self, record: Record) -> Result<(), InboxError> {
        let record_cost = record.cost();
        self.received += record_cost;
        match (record, &mut self.partial) {
            (Record::Whole(payload), None) => self.push(payload, record_cost),
            (Record::First { total, part }, partial @ None) => {
                *partial = Some(Partial {
                    total,
                    bytes: BytesMut::from(&part[..]),
                });
                self.release_part(record_cost);
            }
            (Record::Next(part), Some(partial)) => {
                partial.add(&part)?;
                self.release_part(record_cost);
            }
            (Record::Last(part), Some(partial)) => {
                partial.add(&part)?;
                let partial = self
                    .partial
                    .take()
                    .filter(Partial::is_whole)
                    .ok_or(InboxError::Parts)?;
                self.push(partial.bytes.freeze(), record_cost);
            }
            (Record::Goodbye, None) => self.queue.push_back((Item::Goodbye, record_cost)),
            _ => return Err(InboxError::Parts),
        }
        Ok(())
    }

    fn push(&mut self, payload: Bytes, last_cost: u64) {
        self.untaken_bytes += payload.len();
        self.queue.push_back((Item::Payload(payload), last_cost));
    }

    fn release_part(&mut self, cost: u64) {
        if self.untaken_bytes > UNTAKEN_BYTES {
            self.held += cost;
        } else {
            self.released += cost;
        }
    }

    fn pop(&mut self) -> Option<Item> {
        let (item, last_cost) = self.queue.pop_front()?;
        self.released += last_cost;
        match &item {
            Item::Payload(payload) => self.untaken_bytes -= payload.len(),
            Item::Goodbye => self.urgent = true,
        }
        if self.untaken_bytes <= UNTAKEN_BYTES {
            self.released += std::mem::take(&mut self.held);
        }
        Some(item)
    }

    fn ack_due(&self, lane: Lane) -> bool {
        self.urgent || self.released - self.told >= window(lane) / 4
    }

    /// The peer may have sent a window beyond what it was told, and one record more.
    fn check_window(&self, lane: Lane) -> Result<(), InboxError> {
        let allowed = self.told + window(lane) + cost(PART_BYTES);
        if self.received > allowed {
            Err(InboxError::Window)
        } else {
            Ok(())
        }
    }
}

impl Partial {
    fn add(&mut self, part: &[u8]) -> Result<(), InboxError> {
        if self.bytes.len() + part.len() > self.total {
            return Err(InboxError::Parts);
        }
        self.bytes.extend_from_slice(part);
        Ok(())
    }

    fn is_whole(&self) -> bool {
        self.bytes.len() == self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::Outbox;
    use crate::parcel::{Writer, read};
    use crate::settings::MAX_PAYLOAD_BYTES;

    /// A sender and a receiver with a perfect wire between them.
    struct Pair {
        out: Outbox,
        inbox: Inbox,
    }

    impl Pair {
        fn new() -> Self {
            Self {
                out: Outbox::new(1, 64 << 20),
                inbox: Inbox::default(),
            }
        }

        /// Moves whatever the window lets through; tells acks when due.
        fn run(&mut self) {
            loop {
                let mut moved = false;
                while let Some(parcel) = self.out.next_parcel(|| [0, 0]) {
                    let (header, records) = read(parcel.into()).unwrap();
                    self.inbox.accept(&header, records).unwrap();
                    moved = true;
                }
                if self.inbox.ack_due() {
                    self.out.acknowledge(self.inbox.take_acks()).unwrap();
                    moved = true;
                }
                if !moved {
                    return;
                }
            }
        }
    }

    fn payload(size: usize, seed: u64) -> Bytes {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut bytes = vec![0u8; size];
        random.fill(&mut bytes);
        bytes.into()
    }

    #[test]
    fn payloads_of_all_sizes_come_out_whole_and_in_order() {
        let mut pair = Pair::new();
        let sizes = [
            0,
            1,
            100,
            PART_BYTES,
            PART_BYTES + 1,
            3 * PART_BYTES,
            1 << 20,
            5,
            MAX_PAYLOAD_BYTES,
        ];
        for (seed, &size) in sizes.iter().enumerate() {
            pair.out
                .offer(Lane::Ordered, payload(size, seed as u64))
                .unwrap();
        }
        for (seed, &size) in sizes.iter().enumerate() {
            pair.run();
            let Some(Item::Payload(got)) = pair.inbox.pop() else {
                panic!("payload {seed} is missing")
            };
            assert!(got == payload(size, seed as u64), "payload {seed}");
        }
        pair.run();
        assert!(pair.inbox.is_empty());
        pair.out.acknowledge(pair.inbox.take_acks()).unwrap();
        assert_eq!(pair.out.backlog(), 0, "every cost came back");
    }

    #[test]
    fn a_consumer_that_takes_nothing_stops_the_sender() {
        for size in [10, PART_BYTES, 4 << 20] {
            let mut pair = Pair::new();
            while pair.out.offer(Lane::Bulk, payload(size, 0)).is_ok() {}
            pair.run();
            let bound =
                (window(Lane::Bulk) as usize + UNTAKEN_BYTES + 4 * PART_BYTES).max(size * 2);
            assert!(
                pair.inbox.bytes() <= bound,
                "{size}: {} bytes",
                pair.inbox.bytes()
            );
            // And goes on when it takes something.
            let mut taken = 0;
            loop {
                pair.run();
                match pair.inbox.pop() {
                    Some(_) => taken += 1,
                    None => break,
                }
            }
            assert_eq!(
                taken,
                (64 << 20) / crate::parcel::payload_cost(size) as usize,
                "{size}"
            );
        }
    }

    #[test]
    fn the_lanes_take_turns() {
        let mut pair = Pair::new();
        for _ in 0..3 {
            pair.out.offer(Lane::Bulk, payload(2, 0)).unwrap();
            pair.out.offer(Lane::Ordered, payload(1, 0)).unwrap();
        }
        pair.run();
        let sizes: Vec<_> = std::iter::from_fn(|| pair.inbox.pop())
            .map(|item| match item {
                Item::Payload(payload) => payload.len(),
                Item::Goodbye => 0,
            })
            .collect();
        assert_eq!(sizes, [1, 2, 1, 2, 1, 2]);
    }

    #[test]
    fn goodbye_comes_after_everything_and_is_acknowledged_at_once() {
        let mut pair = Pair::new();
        pair.out.offer(Lane::Ordered, payload(100_000, 1)).unwrap();
        pair.out.goodbye();
        pair.run();
        assert!(matches!(pair.inbox.pop(), Some(Item::Payload(_))));
        assert!(!pair.inbox.ack_due());
        assert_eq!(pair.inbox.pop(), Some(Item::Goodbye));
        assert!(pair.inbox.ack_due());
        pair.run();
        assert_eq!(pair.out.backlog(), 0);
    }

    #[test]
    fn violations_break_the_session() {
        let header = |seq| Header {
            lane: Lane::Ordered,
            session: 1,
            seq,
            acked: [0, 0],
        };
        let feed = |inbox: &mut Inbox, seq, records: &[Record]| {
            let mut writer = Writer::new(header(seq), 0);
            records.iter().for_each(|record| writer.push(record));
            let (header, records) = read(writer.finish().into()).unwrap();
            inbox.accept(&header, records)
        };
        let part = |size| Bytes::from(vec![0; size]);
        let first = || Record::First {
            total: 10,
            part: part(4),
        };
        let wrong: [&[Record]; 6] = [
            &[Record::Next(part(1))],
            &[Record::Last(part(1))],
            &[first(), first()],
            &[first(), Record::Whole(part(1))],
            &[first(), Record::Next(part(7))],
            &[first(), Record::Last(part(5))],
        ];
        for records in wrong {
            assert_eq!(
                feed(&mut Inbox::default(), 0, records),
                Err(InboxError::Parts),
                "{records:?}"
            );
        }
        let mut inbox = Inbox::default();
        feed(&mut inbox, 0, &[]).unwrap();
        assert!(matches!(
            feed(&mut inbox, 2, &[]),
            Err(InboxError::Sequence {
                got: 2,
                expected: 1
            })
        ));

        let mut inbox = Inbox::default();
        let flood = (0..100)
            .find_map(|seq| feed(&mut inbox, seq, &[Record::Whole(part(PART_BYTES))]).err());
        assert_eq!(flood, Some(InboxError::Window));
    }
}
