//! A walk over a MessagePack value that believes none of its lengths, before anything is deserialized.
//!
//! Deserializers reserve room for as many elements as an array header claims, at every level of nesting, so that five
//! bytes can cost a mebibyte and nesting multiplies it. After this walk every claim is known to be true: a frame costs
//! memory in proportion to its own length.
//!
//! Invariant: the walk allocates nothing, ends after at most one step per byte, and accepts only a frame that is exactly
//! one map, with strings as keys at every level, nested at most [`MAX_DEPTH`] deep, without binary or extension types.

/// Deepest nesting of maps and arrays. The deepest message of version 1 (`status`) has 6.
pub const MAX_DEPTH: usize = 16;

/// Most strings (keys included), arrays and maps in one message from a client. Numbers are not counted: a prompt may
/// have as many token ids as a frame holds.
pub const MAX_CLIENT_ITEMS: usize = 65_536;

/// Why a payload is no message, whatever its fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    #[error("the payload ends inside a value")]
    Truncated,
    #[error("bytes follow the message")]
    TrailingBytes,
    #[error("the payload is not a map")]
    NotAMap,
    #[error("a key is not a UTF-8 string")]
    BadKey,
    #[error("the payload is nested too deep")]
    TooDeep,
    #[error("the payload holds more than {0} strings, arrays and maps")]
    TooManyItems(usize),
    #[error("the payload holds a binary, extension or reserved type")]
    UnknownMarker,
    #[error("a length is larger than the payload")]
    BadLength,
    #[error("the field `type` is missing, repeated or not a string")]
    BadType,
}

/// What the walk saw on its way in the outermost map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// Value of `type`.
    pub kind: &'a str,
    /// Value of `stream`, where it is an unsigned number of 32 bits.
    pub stream: Option<u32>,
}

/// Walks over `payload`, one whole message of `max_items` strings, arrays and maps at most.
pub fn scan(payload: &[u8], max_items: usize) -> Result<Envelope<'_>, ScanError> {
    let mut cursor = Cursor {
        rest: payload,
        max_items,
        items: 0,
    };
    let Value::Map(entries) = cursor.value()? else {
        return Err(ScanError::NotAMap);
    };
    let mut kind = None;
    let mut stream = None;
    for _ in 0..entries {
        let key = cursor.key()?;
        let value = cursor.value()?;
        match (key, value) {
            ("type", Value::Text(text)) if kind.is_none() => {
                kind = Some(std::str::from_utf8(text).map_err(|_| ScanError::BadType)?);
            }
            ("type", _) => return Err(ScanError::BadType),
            ("stream", Value::Unsigned(number)) => stream = u32::try_from(number).ok(),
            _ => {}
        }
        cursor.skip_inside(value)?;
    }
    if !cursor.rest.is_empty() {
        return Err(ScanError::TrailingBytes);
    }
    Ok(Envelope {
        kind: kind.ok_or(ScanError::BadType)?,
        stream,
    })
}

/// A value whose own bytes have been passed; the elements of an array or a map still follow.
#[derive(Clone, Copy)]
enum Value<'a> {
    Array(usize),
    Map(usize),
    Text(&'a [u8]),
    Unsigned(u64),
    Other,
}

/// An array or map whose elements are being walked over.
#[derive(Clone, Copy, Default)]
struct Open {
    /// Elements left; a map's keys are passed together with their values.
    left: usize,
    is_map: bool,
}

struct Cursor<'a> {
    rest: &'a [u8],
    max_items: usize,
    /// Strings, arrays and maps passed.
    items: usize,
}

impl<'a> Cursor<'a> {
    /// Walks over the elements of `outer`, which stands in the outermost map, with a stack of fixed size.
    fn skip_inside(&mut self, outer: Value<'a>) -> Result<(), ScanError> {
        // The outermost map is one level, so one slot less.
        let mut stack = [Open::default(); MAX_DEPTH - 1];
        let mut depth = 0;
        push(&mut stack, &mut depth, outer)?;
        while depth > 0 {
            let open = &mut stack[depth - 1];
            if open.left == 0 {
                depth -= 1;
                continue;
            }
            open.left -= 1;
            if open.is_map {
                self.key()?;
            }
            let value = self.value()?;
            push(&mut stack, &mut depth, value)?;
        }
        Ok(())
    }

    fn key(&mut self) -> Result<&'a str, ScanError> {
        match self.value()? {
            Value::Text(text) => std::str::from_utf8(text).map_err(|_| ScanError::BadKey),
            _ => Err(ScanError::BadKey),
        }
    }

    /// Passes one value, but not the elements in it, and counts it.
    fn value(&mut self) -> Result<Value<'a>, ScanError> {
        let value = self.marker()?;
        if matches!(value, Value::Text(_) | Value::Array(_) | Value::Map(_)) {
            self.items += 1;
            if self.items > self.max_items {
                return Err(ScanError::TooManyItems(self.max_items));
            }
        }
        Ok(value)
    }

    /// Passes a marker and the length or the scalar bytes behind it.
    fn marker(&mut self) -> Result<Value<'a>, ScanError> {
        let marker = self.take(1)?[0];
        Ok(match marker {
            0x00..=0x7f => Value::Unsigned(u64::from(marker)),
            0x80..=0x8f => self.map(usize::from(marker & 0x0f))?,
            0x90..=0x9f => self.array(usize::from(marker & 0x0f))?,
            0xa0..=0xbf => Value::Text(self.take(usize::from(marker & 0x1f))?),
            0xc0 | 0xc2 | 0xc3 | 0xe0..=0xff => Value::Other,
            0xca => self.scalar(4)?,
            0xcb => self.scalar(8)?,
            0xcc..=0xcf => Value::Unsigned(self.big_endian(1 << (marker - 0xcc))?),
            0xd0..=0xd3 => self.signed(1 << (marker - 0xd0))?,
            0xd9..=0xdb => {
                let len = self.length(1 << (marker - 0xd9))?;
                Value::Text(self.take(len)?)
            }
            0xdc | 0xdd => {
                let len = self.length(2 << (marker - 0xdc))?;
                self.array(len)?
            }
            0xde | 0xdf => {
                let len = self.length(2 << (marker - 0xde))?;
                self.map(len)?
            }
            // Reserved (0xc1), binary, which a deserializer would take for text, and the extension types.
            0xc1 | 0xc4..=0xc6 | 0xc7..=0xc9 | 0xd4..=0xd8 => return Err(ScanError::UnknownMarker),
        })
    }

    /// An element takes one byte at least.
    fn array(&self, len: usize) -> Result<Value<'a>, ScanError> {
        if len > self.rest.len() {
            return Err(ScanError::BadLength);
        }
        Ok(Value::Array(len))
    }

    /// An entry takes two bytes at least.
    fn map(&self, len: usize) -> Result<Value<'a>, ScanError> {
        if len > self.rest.len() / 2 {
            return Err(ScanError::BadLength);
        }
        Ok(Value::Map(len))
    }

    fn scalar(&mut self, len: usize) -> Result<Value<'a>, ScanError> {
        self.take(len)?;
        Ok(Value::Other)
    }

    fn signed(&mut self, width: usize) -> Result<Value<'a>, ScanError> {
        let number = self.big_endian(width)?;
        let is_negative = number >> (8 * width - 1) != 0;
        Ok(if is_negative {
            Value::Other
        } else {
            Value::Unsigned(number)
        })
    }

    fn length(&mut self, width: usize) -> Result<usize, ScanError> {
        let len = self.big_endian(width)?;
        usize::try_from(len).map_err(|_| ScanError::BadLength)
    }

    fn big_endian(&mut self, width: usize) -> Result<u64, ScanError> {
        let bytes = self.take(width)?;
        Ok(bytes
            .iter()
            .fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], ScanError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(ScanError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }
}

fn push(stack: &mut [Open], depth: &mut usize, value: Value<'_>) -> Result<(), ScanError> {
    let (left, is_map) = match value {
        Value::Array(len) => (len, false),
        Value::Map(len) => (len, true),
        Value::Text(_) | Value::Unsigned(_) | Value::Other => return Ok(()),
    };
    *stack.get_mut(*depth).ok_or(ScanError::TooDeep)? = Open { left, is_map };
    *depth += 1;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(payload: &[u8]) -> Result<Envelope<'_>, ScanError> {
        super::scan(payload, MAX_CLIENT_ITEMS)
    }

    /// A message `{"type": "x", "v": <value>}`.
    fn around(value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x82, 0xa4];
        bytes.extend_from_slice(b"type\xa1x\xa1v");
        bytes.extend_from_slice(value);
        bytes
    }

    fn nested(depth: usize) -> Vec<u8> {
        let mut value = vec![0x91; depth];
        value.push(0xc0);
        around(&value)
    }

    #[test]
    fn every_scalar_width_is_passed_in_full() {
        let values: [&[u8]; 13] = [
            &[0xc0],
            &[0xc3],
            &[0xff],
            &[0xca, 1, 2, 3, 4],
            &[0xcb, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0xcc, 1],
            &[0xcd, 1, 2],
            &[0xcf, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0xd0, 1],
            &[0xd3, 1, 2, 3, 4, 5, 6, 7, 8],
            &[0xd9, 1, b'a'],
            &[0xdc, 0, 1, 0x00],
            &[0xdf, 0, 0, 0, 1, 0xa1, b'k', 0x90],
        ];
        for value in values {
            assert!(scan(&around(value)).is_ok(), "{value:x?}");
            let mut cut = around(value);
            cut.pop();
            assert!(scan(&cut).is_err(), "cut {value:x?}");
            let mut longer = around(value);
            longer.push(0);
            assert_eq!(scan(&longer), Err(ScanError::TrailingBytes));
        }
    }

    #[test]
    fn the_depth_limit_is_exact() {
        assert!(scan(&nested(MAX_DEPTH - 1)).is_ok());
        assert_eq!(scan(&nested(MAX_DEPTH)), Err(ScanError::TooDeep));
    }

    #[test]
    fn claims_beyond_the_payload_are_refused() {
        assert_eq!(
            scan(&around(&[0xdd, 0xff, 0xff, 0xff, 0xff])),
            Err(ScanError::BadLength)
        );
        assert_eq!(
            scan(&around(&[0xdf, 0xff, 0xff, 0xff, 0xff])),
            Err(ScanError::BadLength)
        );
        assert_eq!(
            scan(&around(&[0xdb, 0xff, 0xff, 0xff, 0xff])),
            Err(ScanError::Truncated)
        );
    }

    #[test]
    fn what_is_not_a_map_with_text_keys_is_refused() {
        assert_eq!(scan(&[]), Err(ScanError::Truncated));
        assert_eq!(scan(&[0x90]), Err(ScanError::NotAMap));
        assert_eq!(scan(&[0x81, 0x01, 0x01]), Err(ScanError::BadKey));
        assert_eq!(scan(&[0x80]), Err(ScanError::BadType));
        assert_eq!(scan(&around(&[0xc1])), Err(ScanError::UnknownMarker));
        assert_eq!(scan(&around(&[0xd4, 1, 1])), Err(ScanError::UnknownMarker));
        assert_eq!(scan(&around(&[0xc4, 1, 9])), Err(ScanError::UnknownMarker));
        assert_eq!(scan(&around(&[0x81, 0x05, 0x05])), Err(ScanError::BadKey));
    }

    #[test]
    fn the_type_stands_once() {
        let twice = b"\x82\xa4type\xa1x\xa4type\xa1y";
        assert_eq!(scan(twice), Err(ScanError::BadType));
        let number = b"\x81\xa4type\x01";
        assert_eq!(scan(number), Err(ScanError::BadType));
    }

    #[test]
    fn the_stream_is_seen_wherever_it_stands() {
        let envelope = scan(b"\x82\xa6stream\xcd\x01\x00\xa4type\xa1x").unwrap();
        assert_eq!(envelope.kind, "x");
        assert_eq!(envelope.stream, Some(256));
    }

    #[test]
    fn strings_arrays_and_maps_are_counted_and_numbers_are_not() {
        // The map, its two keys, the type, and the array around.
        let own = 5;
        let texts = [&[0xdc, 0x00, 0x64][..], &[0xa0; 100]].concat();
        assert!(super::scan(&around(&texts), own + 100).is_ok());
        let error = ScanError::TooManyItems(own + 99);
        assert_eq!(super::scan(&around(&texts), own + 99), Err(error));
        let numbers = [&[0xdc, 0x00, 0x64][..], &[0x01; 100]].concat();
        assert!(super::scan(&around(&numbers), own).is_ok());
    }

    #[test]
    fn a_stream_may_be_written_as_a_signed_number() {
        let stream = |bytes: &[u8]| {
            let message = [&b"\x82\xa4type\xa1x\xa6stream"[..], bytes].concat();
            super::scan(&message, 10).unwrap().stream
        };
        assert_eq!(stream(&[0xd1, 0x01, 0x00]), Some(256));
        assert_eq!(stream(&[0xd3, 0, 0, 0, 0, 0, 0, 0, 7]), Some(7));
        assert_eq!(stream(&[0xd0, 0xff]), None);
        assert_eq!(stream(&[0xff]), None);
        assert_eq!(stream(&[0xcf, 0, 0, 0, 1, 0, 0, 0, 0]), None);
    }
}
