//! Words of a closed set, and devices.

use std::marker::PhantomData;
use std::path::Path;

use toml::Spanned;
use toml::de::DeValue;

use super::{Complaint, Kind, nearest, string};
use crate::value::{Choice, Device, stringify_words};

/// One word of a closed set.
pub(crate) struct OneOf<T>(PhantomData<T>);

pub(crate) fn one_of<T: Choice>() -> OneOf<T> {
    OneOf(PhantomData)
}

impl<T: Choice> Kind for OneOf<T> {
    type Value = T;

    fn type_name(&self) -> String {
        "string".into()
    }

    fn allowed(&self) -> String {
        stringify_words::<T>()
    }

    fn read(&self, _: &Path, value: &Spanned<DeValue<'_>>) -> Result<T, Vec<Complaint>> {
        let text = string(value, "a string")?;
        let known = T::WORDS.iter().find(|(word, _)| *word == text);
        known.map(|(_, value)| *value).ok_or_else(|| {
            let why = if T::PLANNED.contains(&text) {
                "is not supported yet"
            } else {
                "is not a known value"
            };
            let mut complaint = Complaint::at(value, format!("\"{}\" {why}", text.escape_debug()));
            complaint.nearest = nearest(text, T::WORDS.iter().map(|(word, _)| *word));
            vec![complaint]
        })
    }

    fn show(&self, value: &T) -> String {
        format!("\"{}\"", value.word())
    }
}

/// A device.
pub(crate) struct DeviceKind;

pub(crate) fn device() -> DeviceKind {
    DeviceKind
}

impl Kind for DeviceKind {
    type Value = Device;

    fn type_name(&self) -> String {
        "string".into()
    }

    fn allowed(&self) -> String {
        Device::ALLOWED.into()
    }

    fn read(&self, _: &Path, value: &Spanned<DeValue<'_>>) -> Result<Device, Vec<Complaint>> {
        let text = string(value, "a string")?;
        text.parse().map_err(|_| {
            let mut complaint = Complaint::at(
                value,
                format!("\"{}\" is not a device", text.escape_debug()),
            );
            complaint.nearest = nearest(text, ["auto", "cpu", "cuda:0"]);
            vec![complaint]
        })
    }

    fn show(&self, value: &Device) -> String {
        format!("\"{value}\"")
    }
}
