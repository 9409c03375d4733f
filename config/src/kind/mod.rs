//! Kinds of values: how one is read from TOML, what it is called, what is allowed, how it is shown.
//!
//! A kind never panics and never stops the reading: it reports a [`Complaint`] and the reader goes on with the default,
//! so that one pass finds every problem of a file.

mod number;
mod text;
mod word;

use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::DeValue;

pub(crate) use number::{kv_memory, port, size, size_text, whole};
pub(crate) use text::{host, join_normal, model_name, name, path, remote_path, ssh_destination};
pub(crate) use word::{device, one_of};

/// Why a value cannot be taken, before it is tied to its place in the file.
pub(crate) struct Complaint {
    pub span: Range<usize>,
    pub message: String,
    /// A word that the person probably meant.
    pub nearest: Option<String>,
}

impl Complaint {
    fn at(value: &Spanned<DeValue<'_>>, message: impl Into<String>) -> Self {
        Self {
            span: value.span(),
            message: message.into(),
            nearest: None,
        }
    }

    fn wrong_type(value: &Spanned<DeValue<'_>>, wanted: &str) -> Self {
        Self::at(
            value,
            format!("expected {wanted}, found {}", type_of(value.get_ref())),
        )
    }
}

/// One kind of value.
pub(crate) trait Kind {
    type Value;
    /// The type as documentation names it.
    fn type_name(&self) -> String;
    /// What may be written; empty where the type says it all.
    fn allowed(&self) -> String;
    /// Reads a value; paths are taken relative to `base`.
    fn read(
        &self,
        base: &Path,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<Self::Value, Vec<Complaint>>;
    /// The value as TOML, for documentation and the checksum.
    fn show(&self, value: &Self::Value) -> String;
}

fn type_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

fn string<'v>(value: &'v Spanned<DeValue<'_>>, wanted: &str) -> Result<&'v str, Vec<Complaint>> {
    value
        .get_ref()
        .as_str()
        .ok_or_else(|| vec![Complaint::wrong_type(value, wanted)])
}

/// The known word nearest to `text`, if one is near enough to be a typing error.
pub(crate) fn nearest<'w>(text: &str, words: impl IntoIterator<Item = &'w str>) -> Option<String> {
    words
        .into_iter()
        .map(|word| (strsim::damerau_levenshtein(text, word), word))
        .filter(|(distance, word)| *distance <= 1 + word.chars().count() / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, word)| word.to_owned())
}

/// `true` or `false`.
pub(crate) struct Flag;

pub(crate) fn flag() -> Flag {
    Flag
}

impl Kind for Flag {
    type Value = bool;

    fn type_name(&self) -> String {
        "boolean".into()
    }

    fn allowed(&self) -> String {
        "true, false".into()
    }

    fn read(&self, _: &Path, value: &Spanned<DeValue<'_>>) -> Result<bool, Vec<Complaint>> {
        value
            .get_ref()
            .as_bool()
            .ok_or_else(|| vec![Complaint::wrong_type(value, "a boolean")])
    }

    fn show(&self, value: &bool) -> String {
        value.to_string()
    }
}

/// A list of values of one kind: at least one, none twice.
pub(crate) struct List<K>(K);

pub(crate) fn list<K: Kind>(kind: K) -> List<K> {
    List(kind)
}

impl<K: Kind> Kind for List<K>
where
    K::Value: PartialEq,
{
    type Value = Vec<K::Value>;

    fn type_name(&self) -> String {
        format!("array of {}s", self.0.type_name())
    }

    fn allowed(&self) -> String {
        format!("one or more of: {}", self.0.allowed())
    }

    fn read(
        &self,
        base: &Path,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<Self::Value, Vec<Complaint>> {
        let Some(items) = value.get_ref().as_array() else {
            return Err(vec![Complaint::wrong_type(
                value,
                "an array, such as [\"…\"]",
            )]);
        };
        let mut complaints = Vec::new();
        let mut values: Self::Value = Vec::new();
        for item in items.iter() {
            match self.0.read(base, item) {
                Err(more) => complaints.extend(more),
                Ok(read) if values.contains(&read) => {
                    complaints.push(Complaint::at(
                        item,
                        format!("{} stands here twice", self.0.show(&read)),
                    ));
                }
                Ok(read) => values.push(read),
            }
        }
        if items.is_empty() {
            complaints.push(Complaint::at(value, "the list must not be empty"));
        }
        if complaints.is_empty() {
            Ok(values)
        } else {
            Err(complaints)
        }
    }

    fn show(&self, value: &Self::Value) -> String {
        let items: Vec<String> = value.iter().map(|item| self.0.show(item)).collect();
        format!("[{}]", items.join(", "))
    }
}

/// A value that may be absent.
pub(crate) struct Optional<K>(K);

pub(crate) fn optional<K: Kind>(kind: K) -> Optional<K> {
    Optional(kind)
}

impl<K: Kind> Kind for Optional<K> {
    type Value = Option<K::Value>;

    fn type_name(&self) -> String {
        self.0.type_name()
    }

    fn allowed(&self) -> String {
        self.0.allowed()
    }

    fn read(
        &self,
        base: &Path,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<Self::Value, Vec<Complaint>> {
        self.0.read(base, value).map(Some)
    }

    fn show(&self, value: &Self::Value) -> String {
        value
            .as_ref()
            .map_or_else(|| "none".into(), |value| self.0.show(value))
    }
}
