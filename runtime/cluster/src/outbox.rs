//! The sending half of a session: payloads wait here, and leave in parcels as far as the peer's credit goes. Pure.
//!
//! `ractor_cluster` would take everything into its unbounded queues at once. So each lane has a window: at most
//! that much is on its way (in `ractor_cluster`, in the sockets, in the peer's inbox) and not yet released by the
//! peer's consumer. The rest waits here, up to the backlog limit. When payloads wait, they leave many to a
//! parcel; when none wait, each leaves at once.
//!
//! Invariant: `waiting + (sent - acked)`, summed over the lanes, never exceeds the backlog limit.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::parcel::{Header, LANES, Lane, PART_BYTES, Record, Writer, cost, payload_cost};

/// What may be on its way in the ordered lane, in costs.
pub(crate) const ORDERED_WINDOW: u64 = 512 << 10;
/// The same for the bulk lane; less, so that a small message never waits behind more than this.
pub(crate) const BULK_WINDOW: u64 = 256 << 10;

/// The window of a lane.
pub(crate) fn window(lane: Lane) -> u64 {
    match lane {
        Lane::Ordered => ORDERED_WINDOW,
        Lane::Bulk => BULK_WINDOW,
    }
}

/// The backlog limit is reached; holds what waits now, in costs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full(pub(crate) u64);

/// The peer acknowledged what was never sent, or less than before.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("acknowledged {acked} of {sent} bytes, after {before}")]
pub(crate) struct WrongAck {
    acked: u64,
    sent: u64,
    before: u64,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    session: u64,
    seq: u64,
    limit: u64,
    lanes: [OutLane; 2],
}

#[derive(Debug, Default)]
struct OutLane {
    queue: VecDeque<Entry>,
    /// How much of the front payload has left.
    cursor: usize,
    waiting: u64,
    sent: u64,
    acked: u64,
}

#[derive(Debug)]
enum Entry {
    Payload(Bytes),
    Goodbye,
}

impl Outbox {
    pub(crate) fn new(session: u64, limit_bytes: usize) -> Self {
        Self {
            session,
            seq: 0,
            limit: limit_bytes as u64,
            lanes: Default::default(),
        }
    }

    /// Takes a payload, or says how much waits already.
    pub(crate) fn offer(&mut self, lane: Lane, payload: Bytes) -> Result<(), Full> {
        let cost = payload_cost(payload.len());
        let backlog = self.backlog();
        if backlog + cost > self.limit {
            return Err(Full(backlog));
        }
        let lane = &mut self.lanes[lane as usize];
        lane.waiting += cost;
        lane.queue.push_back(Entry::Payload(payload));
        Ok(())
    }

    /// Says goodbye after everything that was offered.
    pub(crate) fn goodbye(&mut self) {
        let lane = &mut self.lanes[Lane::Ordered as usize];
        lane.waiting += cost(0);
        lane.queue.push_back(Entry::Goodbye);
    }

    /// What was offered and not yet released by the peer.
    pub(crate) fn backlog(&self) -> u64 {
        self.lanes
            .iter()
            .map(|lane| lane.waiting + lane.sent - lane.acked)
            .sum()
    }

    /// The next parcel that may leave now; `acks` is asked once when there is one.
    pub(crate) fn next_parcel(&mut self, acks: impl FnOnce() -> [u64; 2]) -> Option<Vec<u8>> {
        let lane = LANES
            .into_iter()
            .find(|&lane| self.lanes[lane as usize].may_send(window(lane)))?;
        let header = self.header(lane, acks());
        let out = &mut self.lanes[lane as usize];
        let mut parcel = Writer::new(
            header,
            usize::try_from(out.waiting)
                .unwrap_or(PART_BYTES)
                .min(PART_BYTES),
        );
        while out.may_send(window(lane)) && !parcel.is_full() {
            parcel.push(&out.take_record());
        }
        Some(parcel.finish())
    }

    /// A parcel without records.
    pub(crate) fn empty_parcel(&mut self, acks: [u64; 2]) -> Vec<u8> {
        Writer::new(self.header(Lane::Ordered, acks), 0).finish()
    }

    /// The peer has released this much of each lane, ever.
    pub(crate) fn acknowledge(&mut self, acked: [u64; 2]) -> Result<(), WrongAck> {
        for (lane, acked) in self.lanes.iter_mut().zip(acked) {
            if acked > lane.sent || acked < lane.acked {
                return Err(WrongAck {
                    acked,
                    sent: lane.sent,
                    before: lane.acked,
                });
            }
            lane.acked = acked;
        }
        Ok(())
    }

    fn header(&mut self, lane: Lane, acked: [u64; 2]) -> Header {
        let header = Header {
            lane,
            session: self.session,
            seq: self.seq,
            acked,
        };
        self.seq += 1;
        header
    }
}

impl OutLane {
    /// One record may always be on its way, however small the window.
    fn may_send(&self, window: u64) -> bool {
        let in_flight = self.sent - self.acked;
        match self.queue.front() {
            None => false,
            Some(Entry::Goodbye) => true,
            Some(Entry::Payload(payload)) => {
                let part = (payload.len() - self.cursor).min(PART_BYTES);
                in_flight == 0 || in_flight + cost(part) <= window
            }
        }
    }

    /// The next record of the front entry, which must be there.
    fn take_record(&mut self) -> Record {
        let record = match self.queue.front() {
            Some(Entry::Payload(payload)) => part_of(payload, self.cursor),
            Some(Entry::Goodbye) | None => Record::Goodbye,
        };
        match &record {
            Record::First { part, .. } | Record::Next(part) => self.cursor += part.len(),
            Record::Whole(_) | Record::Last(_) | Record::Goodbye => {
                self.queue.pop_front();
                self.cursor = 0;
            }
        }
        self.waiting -= record.cost();
        self.sent += record.cost();
        record
    }
}

fn part_of(payload: &Bytes, from: usize) -> Record {
    let to = (from + PART_BYTES).min(payload.len());
    let part = payload.slice(from..to);
    match (from, to == payload.len()) {
        (0, true) => Record::Whole(part),
        (0, false) => Record::First {
            total: payload.len(),
            part,
        },
        (_, false) => Record::Next(part),
        (_, true) => Record::Last(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parcel::{MAX_PARCEL_BYTES, read};

    fn outbox() -> Outbox {
        Outbox::new(9, 4 << 20)
    }

    fn payload(size: usize) -> Bytes {
        Bytes::from(vec![7u8; size])
    }

    fn records(parcel: Vec<u8>) -> (Header, Vec<Record>) {
        let (header, records) = read(parcel.into()).unwrap();
        (header, records.map(Result::unwrap).collect())
    }

    #[test]
    fn a_small_payload_leaves_alone_and_waiting_ones_leave_together() {
        let mut out = outbox();
        out.offer(Lane::Ordered, payload(10)).unwrap();
        let (header, first) = records(out.next_parcel(|| [1, 2]).unwrap());
        assert_eq!(
            (header.session, header.seq, header.acked, first.len()),
            (9, 0, [1, 2], 1)
        );
        for _ in 0..100 {
            out.offer(Lane::Ordered, payload(10)).unwrap();
        }
        let (header, rest) = records(out.next_parcel(|| [1, 2]).unwrap());
        assert_eq!((header.seq, rest.len()), (1, 100));
        assert_eq!(out.next_parcel(|| unreachable!()), None);
    }

    #[test]
    fn a_large_payload_is_cut_and_the_window_holds_it_back() {
        let mut out = outbox();
        let size = 1 << 20;
        out.offer(Lane::Ordered, payload(size)).unwrap();
        let mut got = Vec::new();
        let mut sent = 0;
        loop {
            while let Some(parcel) = out.next_parcel(|| [0, 0]) {
                assert!(parcel.len() <= MAX_PARCEL_BYTES && MAX_PARCEL_BYTES <= 66 << 10);
                let (_, records) = records(parcel);
                sent += records.iter().map(Record::cost).sum::<u64>();
                got.extend(records);
            }
            assert!(out.lanes[0].sent - out.lanes[0].acked <= ORDERED_WINDOW);
            if out.lanes[0].acked == sent {
                break;
            }
            out.acknowledge([sent, 0]).unwrap();
        }
        assert_eq!(sent, payload_cost(size));
        assert_eq!(out.backlog(), 0);
        assert!(matches!(got[0], Record::First { total, .. } if total == size));
        assert!(matches!(got.last(), Some(Record::Last(_))));
        assert_eq!(got.len(), 32);
    }

    #[test]
    fn exact_multiples_and_empty_payloads() {
        for (size, parts) in [
            (0, 1),
            (1, 1),
            (PART_BYTES, 1),
            (PART_BYTES + 1, 2),
            (2 * PART_BYTES, 2),
        ] {
            let mut out = outbox();
            out.offer(Lane::Bulk, payload(size)).unwrap();
            let mut got = 0;
            while let Some(parcel) = out.next_parcel(|| [0, 0]) {
                got += records(parcel).1.len();
            }
            assert_eq!(got, parts, "{size}");
            assert_eq!(out.lanes[1].waiting, 0, "{size}");
            assert_eq!(out.lanes[1].sent, payload_cost(size), "{size}");
        }
    }

    #[test]
    fn small_messages_overtake_bulk_when_bulk_has_used_its_window() {
        let mut out = outbox();
        out.offer(Lane::Bulk, payload(2 << 20)).unwrap();
        while out.next_parcel(|| [0, 0]).is_some() {}
        let in_flight = out.lanes[1].sent;
        assert!(
            in_flight <= BULK_WINDOW && in_flight > BULK_WINDOW / 2,
            "{in_flight}"
        );
        out.offer(Lane::Ordered, payload(5)).unwrap();
        let (header, _) = records(out.next_parcel(|| [0, 0]).unwrap());
        assert_eq!(header.lane, Lane::Ordered);
    }

    #[test]
    fn the_backlog_is_bounded_and_drains_with_acknowledgements() {
        let mut out = outbox();
        let mut taken = 0;
        let full = loop {
            match out.offer(Lane::Ordered, payload(1000)) {
                Ok(()) => taken += 1,
                Err(full) => break full,
            }
        };
        assert!(full.0 <= 4 << 20 && full.0 > (4 << 20) - 1100, "{full:?}");
        assert_eq!(taken, (4 << 20) / 1064);
        while out.next_parcel(|| [0, 0]).is_some() {}
        assert!(
            out.offer(Lane::Bulk, payload(1000)).is_err(),
            "what is on its way counts too"
        );
        out.acknowledge([1064 * 10, 0]).unwrap();
        out.offer(Lane::Bulk, payload(1000)).unwrap();
    }

    #[test]
    fn wrong_acknowledgements_are_noticed() {
        let mut out = outbox();
        assert!(out.acknowledge([1, 0]).is_err());
        out.offer(Lane::Ordered, payload(100)).unwrap();
        out.next_parcel(|| [0, 0]).unwrap();
        out.acknowledge([164, 0]).unwrap();
        assert!(out.acknowledge([163, 0]).is_err());
        assert!(out.acknowledge([164, 1]).is_err());
    }

    #[test]
    fn goodbye_comes_last() {
        let mut out = outbox();
        out.offer(Lane::Ordered, payload(1)).unwrap();
        out.goodbye();
        let (_, got) = records(out.next_parcel(|| [0, 0]).unwrap());
        assert_eq!(got.len(), 2);
        assert_eq!(got[1], Record::Goodbye);
    }
}
