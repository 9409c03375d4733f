//! Numbers: integers within bounds, ports, sizes in bytes.

use std::fmt::Display;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::path::Path;

use toml::Spanned;
use toml::de::DeValue;

use super::{Complaint, Kind};
use crate::value::KvMemory;

/// An integer within bounds.
pub(crate) struct Whole<T>(RangeInclusive<u64>, PhantomData<T>);

pub(crate) fn whole<T>(range: RangeInclusive<u64>) -> Whole<T> {
    Whole(range, PhantomData)
}

/// A TCP port; 0 is refused, because peers and clients could not find it.
pub(crate) fn port() -> Whole<u16> {
    whole(1..=u64::from(u16::MAX))
}

impl<T: TryFrom<u64> + Display> Kind for Whole<T> {
    type Value = T;

    fn type_name(&self) -> String {
        "integer".into()
    }

    fn allowed(&self) -> String {
        format!("{} to {}", self.0.start(), self.0.end())
    }

    fn read(&self, _: &Path, value: &Spanned<DeValue<'_>>) -> Result<T, Vec<Complaint>> {
        let DeValue::Integer(digits) = value.get_ref() else {
            return Err(vec![Complaint::wrong_type(value, "an integer")]);
        };
        u64::from_str_radix(digits.as_str(), digits.radix())
            .ok()
            .filter(|number| self.0.contains(number))
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| vec![Complaint::at(value, format!("{digits} is out of range"))])
    }

    fn show(&self, value: &T) -> String {
        value.to_string()
    }
}

/// A size in bytes: an integer, or a string with a binary unit.
pub(crate) struct Size(RangeInclusive<u64>);

pub(crate) fn size(range: RangeInclusive<u64>) -> Size {
    Size(range)
}

const UNITS: [(&str, u64); 4] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

fn show_size(bytes: u64) -> String {
    match whole_units(bytes) {
        Some((number, unit)) => format!("\"{number}{unit}\""),
        None => bytes.to_string(),
    }
}

/// Such as `2GiB`, or a bare number of bytes.
pub(crate) fn size_text(bytes: u64) -> String {
    match whole_units(bytes) {
        Some((number, unit)) => format!("{number}{unit}"),
        None => bytes.to_string(),
    }
}

fn whole_units(bytes: u64) -> Option<(u64, &'static str)> {
    UNITS
        .iter()
        .rev()
        .find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor))
        .map(|(unit, factor)| (bytes / factor, *unit))
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "B" => 1,
        unit => UNITS.iter().find(|(name, _)| *name == unit)?.1,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

impl Kind for Size {
    type Value = u64;

    fn type_name(&self) -> String {
        "size".into()
    }

    fn allowed(&self) -> String {
        let plain = |bytes| show_size(bytes).replace('"', "");
        format!(
            "{} to {}; an integer of bytes or a string such as \"64KiB\", \"1MiB\", \"2GiB\"",
            plain(*self.0.start()),
            plain(*self.0.end())
        )
    }

    fn read(&self, base: &Path, value: &Spanned<DeValue<'_>>) -> Result<u64, Vec<Complaint>> {
        let DeValue::String(text) = value.get_ref() else {
            return whole(self.0.clone()).read(base, value);
        };
        let bytes = parse_size(text).ok_or_else(|| {
            vec![Complaint::at(
                value,
                format!("\"{text}\" is not a size in bytes"),
            )]
        })?;
        if self.0.contains(&bytes) {
            Ok(bytes)
        } else {
            Err(vec![Complaint::at(
                value,
                format!("\"{text}\" is out of range"),
            )])
        }
    }

    fn show(&self, value: &u64) -> String {
        show_size(*value)
    }
}

/// A share of memory, or a size.
pub(crate) struct KvMemoryKind;

pub(crate) fn kv_memory() -> KvMemoryKind {
    KvMemoryKind
}

/// Less holds no context that anybody would serve.
const LEAST_KV_BYTES: u64 = 1 << 20;

impl Kind for KvMemoryKind {
    type Value = KvMemory;

    fn type_name(&self) -> String {
        "share or size".into()
    }

    fn allowed(&self) -> String {
        "\"1%\" to \"100%\", or a size of at least 1MiB such as \"512MiB\", \"8GiB\"".into()
    }

    fn read(&self, base: &Path, value: &Spanned<DeValue<'_>>) -> Result<KvMemory, Vec<Complaint>> {
        let text = value.get_ref().as_str();
        let Some(percent) = text.and_then(|text| text.strip_suffix('%')) else {
            let bytes = size(LEAST_KV_BYTES..=u64::MAX >> 1).read(base, value)?;
            return Ok(KvMemory::Bytes(bytes));
        };
        match percent.trim().parse() {
            Ok(percent @ 1..=100) => Ok(KvMemory::Percent(percent)),
            _ => Err(vec![Complaint::at(
                value,
                format!(
                    "\"{}%\" is no share from 1% to 100%",
                    percent.escape_debug()
                ),
            )]),
        }
    }

    fn show(&self, value: &KvMemory) -> String {
        match value {
            KvMemory::Percent(_) => format!("\"{value}\""),
            KvMemory::Bytes(bytes) => show_size(*bytes),
        }
    }
}
