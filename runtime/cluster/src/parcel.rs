//! What one `ractor_cluster` message of ours holds: a parcel of records.
//!
//! ```text
//! 0      1       2            10        18                 26              34
//! +------+-------+------------+---------+------------------+---------------+-----------------
//! | ver  | lane  | session    | seq     | acked, ordered   | acked, bulk   | records ...
//! | u8   | u8    | u64        | u64     | u64              | u64           |
//! +------+-------+------------+---------+------------------+---------------+-----------------
//! record: kind u8 | length u32 | bytes           (all numbers big-endian)
//!   1 whole    a payload
//!   2 first    total length u32, then the first part of a large payload
//!   3 next     a further part
//!   4 last     the last part
//!   5 goodbye  no bytes: the sender leaves, nothing follows in this lane
//! ```
//! A parcel without records is a heartbeat or an acknowledgement. `seq` counts the parcels of a session from 0
//! without gaps. `acked` is cumulative, in the costs of [`cost`].
//!
//! Invariant: a parcel is never larger than [`MAX_PARCEL_BYTES`], so a small message waits behind little.

use bytes::Bytes;

use crate::settings::MAX_PAYLOAD_BYTES;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 34;
const RECORD_HEADER_BYTES: usize = 5;
/// Largest part of a payload in one record, and where a parcel is full: 32 KiB.
pub(crate) const PART_BYTES: usize = 32 << 10;
/// Largest parcel.
pub(crate) const MAX_PARCEL_BYTES: usize =
    HEADER_BYTES + 2 * (PART_BYTES + RECORD_HEADER_BYTES + 4);
/// What a record costs beyond its bytes: its share of queues and headers. Bounds the number of tiny messages.
const RECORD_COST: u64 = 64;
/// Records up to this size are copied out of their parcel, so that a small payload does not keep a large one alive.
const COPY_BYTES: usize = 4 << 10;

/// Two independent streams of payloads in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Ordered = 0,
    Bulk = 1,
}

pub(crate) const LANES: [Lane; 2] = [Lane::Ordered, Lane::Bulk];

/// The fixed part of a parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) lane: Lane,
    pub(crate) session: u64,
    pub(crate) seq: u64,
    /// Per lane: what the sender of this parcel has released of what it received.
    pub(crate) acked: [u64; 2],
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    Whole(Bytes),
    First { total: usize, part: Bytes },
    Next(Bytes),
    Last(Bytes),
    Goodbye,
}

impl Record {
    /// What it takes from the window of its lane.
    pub(crate) fn cost(&self) -> u64 {
        match self {
            Self::Whole(part) | Self::First { part, .. } | Self::Next(part) | Self::Last(part) => {
                cost(part.len())
            }
            Self::Goodbye => cost(0),
        }
    }
}

/// What a record of `size` bytes takes from the window of its lane.
pub(crate) fn cost(size: usize) -> u64 {
    size as u64 + RECORD_COST
}

/// What a payload of `size` bytes takes from the window of its lane, all its records together.
pub(crate) fn payload_cost(size: usize) -> u64 {
    size as u64 + RECORD_COST * size.div_ceil(PART_BYTES).max(1) as u64
}

/// Why bytes are not a parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParcelError {
    #[error("parcel is cut off")]
    Short,
    #[error("unknown parcel version {0}")]
    Version(u8),
    #[error("unknown lane {0}")]
    Lane(u8),
    #[error("unknown record kind {0}")]
    Kind(u8),
    #[error("payload of {0} bytes is larger than allowed")]
    TooLarge(usize),
}

/// Builds a parcel.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(header: Header, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + RECORD_HEADER_BYTES + capacity);
        bytes.extend([VERSION, header.lane as u8]);
        for number in [header.session, header.seq, header.acked[0], header.acked[1]] {
            bytes.extend(number.to_be_bytes());
        }
        Self(bytes)
    }

    pub(crate) fn push(&mut self, record: &Record) {
        match record {
            Record::Whole(part) => self.put(1, &[], part),
            Record::First { total, part } => self.put(2, &(*total as u32).to_be_bytes(), part),
            Record::Next(part) => self.put(3, &[], part),
            Record::Last(part) => self.put(4, &[], part),
            Record::Goodbye => self.put(5, &[], &[]),
        }
    }

    /// Whether another part may be added.
    pub(crate) fn is_full(&self) -> bool {
        self.0.len() >= PART_BYTES
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        debug_assert!(self.0.len() <= MAX_PARCEL_BYTES);
        self.0
    }

    fn put(&mut self, kind: u8, head: &[u8], part: &[u8]) {
        let length = (head.len() + part.len()) as u32;
        self.0.push(kind);
        self.0.extend(length.to_be_bytes());
        self.0.extend_from_slice(head);
        self.0.extend_from_slice(part);
    }
}

/// Takes a parcel apart; the second half yields its records.
pub(crate) fn read(mut bytes: Bytes) -> Result<(Header, Records), ParcelError> {
    if bytes.len() < HEADER_BYTES {
        return Err(ParcelError::Short);
    }
    let head = bytes.split_to(HEADER_BYTES);
    if head[0] != VERSION {
        return Err(ParcelError::Version(head[0]));
    }
    let lane = match head[1] {
        0 => Lane::Ordered,
        1 => Lane::Bulk,
        other => return Err(ParcelError::Lane(other)),
    };
    let number = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let header = Header {
        lane,
        session: number(2),
        seq: number(10),
        acked: [number(18), number(26)],
    };
    Ok((header, Records(bytes)))
}

/// The records of a parcel. Ends after the first error.
#[derive(Debug)]
pub(crate) struct Records(Bytes);

impl Records {
    fn record(&mut self) -> Result<Record, ParcelError> {
        if self.0.len() < RECORD_HEADER_BYTES {
            return Err(ParcelError::Short);
        }
        let head = self.0.split_to(RECORD_HEADER_BYTES);
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > self.0.len() {
            return Err(ParcelError::Short);
        }
        let mut part = self.0.split_to(length);
        match head[0] {
            1 if length <= COPY_BYTES => Ok(Record::Whole(Bytes::copy_from_slice(&part))),
            1 => Ok(Record::Whole(part)),
            2 if length < 4 => Err(ParcelError::Short),
            2 => {
                let total = part.split_to(4);
                let total = u32::from_be_bytes([total[0], total[1], total[2], total[3]]) as usize;
                match total > MAX_PAYLOAD_BYTES {
                    true => Err(ParcelError::TooLarge(total)),
                    false => Ok(Record::First { total, part }),
                }
            }
            3 => Ok(Record::Next(part)),
            4 => Ok(Record::Last(part)),
            5 => Ok(Record::Goodbye),
            other => Err(ParcelError::Kind(other)),
        }
    }
}

impl Iterator for Records {
    type Item = Result<Record, ParcelError>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.0.clear();
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            lane: Lane::Bulk,
            session: u64::MAX - 1,
            seq: 7,
            acked: [1 << 40, 3],
        }
    }

    fn records() -> Vec<Record> {
        vec![
            Record::Whole(Bytes::new()),
            Record::Whole(Bytes::from_static(b"hello")),
            Record::First {
                total: MAX_PAYLOAD_BYTES,
                part: Bytes::from(vec![1; 9000]),
            },
            Record::Next(Bytes::from(vec![2; 5000])),
            Record::Last(Bytes::from_static(b"end")),
            Record::Goodbye,
        ]
    }

    fn parcel() -> Vec<u8> {
        let mut writer = Writer::new(header(), 0);
        records().iter().for_each(|record| writer.push(record));
        writer.finish()
    }

    #[test]
    fn reads_back_what_was_written() {
        let (head, read) = read(parcel().into()).unwrap();
        assert_eq!(head, header());
        assert_eq!(read.map(Result::unwrap).collect::<Vec<_>>(), records());
    }

    #[test]
    fn golden_bytes() {
        let mut writer = Writer::new(
            Header {
                lane: Lane::Ordered,
                session: 0x0102,
                seq: 3,
                acked: [4, 5],
            },
            0,
        );
        writer.push(&Record::Whole(Bytes::from_static(b"ab")));
        writer.push(&Record::First {
            total: 70000,
            part: Bytes::from_static(b"c"),
        });
        let expected = [
            &[1, 0][..],
            &[0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 3],
            &[0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5],
            &[1, 0, 0, 0, 2, b'a', b'b'],
            &[2, 0, 0, 0, 5, 0, 1, 0x11, 0x70, b'c'],
        ]
        .concat();
        assert_eq!(writer.finish(), expected);
    }

    #[test]
    fn cut_off_or_changed_bytes_never_panic_and_are_never_longer() {
        let whole = parcel();
        let total = |records: Records| -> usize {
            let size = |record: Record| match record {
                Record::Whole(part)
                | Record::First { part, .. }
                | Record::Next(part)
                | Record::Last(part) => part.len(),
                Record::Goodbye => 0,
            };
            records.map_while(Result::ok).map(size).sum()
        };
        for length in 0..whole.len() {
            if let Ok((_, records)) = read(Bytes::copy_from_slice(&whole[..length])) {
                assert!(total(records) <= length);
            }
        }
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..random.usize(1..6) {
                let at = random.usize(..bytes.len().min(80));
                bytes[at] = random.u8(..);
            }
            if let Ok((_, records)) = read(bytes.into()) {
                assert!(total(records) <= whole.len());
            }
        }
    }

    #[test]
    fn a_claimed_size_above_the_limit_is_refused() {
        let mut writer = Writer::new(header(), 0);
        writer.push(&Record::First {
            total: MAX_PAYLOAD_BYTES + 1,
            part: Bytes::new(),
        });
        let (_, mut records) = read(writer.finish().into()).unwrap();
        assert_eq!(
            records.next(),
            Some(Err(ParcelError::TooLarge(MAX_PAYLOAD_BYTES + 1)))
        );
        assert_eq!(records.next(), None);
    }
}
