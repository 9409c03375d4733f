//! The schema: each key stands once, with its type, default, allowed values and meaning; the struct, the reader, the
//! checksum and the documentation page are all made from that one line.
//!
//! [`Reader`] reads a parsed file against it and collects every problem instead of stopping at the first.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::kind::{Complaint, Kind, nearest};
use crate::problem::{Problem, Source, Warning};

/// Whether all nodes must agree on a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Part of [`ClusterConfig::checksum`](crate::ClusterConfig::checksum): all nodes must hold the same value.
    Cluster,
    /// May differ from machine to machine (paths, logging).
    Local,
}

/// One key, as documentation shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyInfo {
    /// Name within its section.
    pub name: &'static str,
    /// Name of the TOML type, such as `integer` or `array of strings`.
    pub type_name: String,
    /// The default as TOML or in words; `None` if the key is required.
    pub default: Option<String>,
    /// What may be written.
    pub allowed: String,
    /// What it means.
    pub doc: String,
    /// Whether all nodes must agree on it.
    pub scope: Scope,
}

/// One section (table) of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionInfo {
    /// Name of the table.
    pub name: &'static str,
    /// `[[name]]`, once or more, rather than `[name]`.
    pub repeated: bool,
    /// What the section is about.
    pub doc: String,
    /// Its keys, in order.
    pub keys: Vec<KeyInfo>,
}

/// What a key holds when the file does not say.
pub(crate) struct Preset<T> {
    pub required: bool,
    pub value: T,
    pub shown: Option<&'static str>,
}

/// The key must be given; the placeholder is never seen, because its absence is a problem.
pub(crate) fn required<T: Default>() -> Preset<T> {
    Preset {
        required: true,
        value: T::default(),
        shown: None,
    }
}

pub(crate) fn preset<T>(value: T) -> Preset<T> {
    Preset {
        required: false,
        value,
        shown: None,
    }
}

/// Filled in after reading, from other keys, as `shown` says.
pub(crate) fn derived<T: Default>(shown: &'static str) -> Preset<T> {
    Preset {
        required: false,
        value: T::default(),
        shown: Some(shown),
    }
}

impl<T> Preset<T> {
    pub fn info(&self, show: impl Fn(&T) -> String) -> Option<String> {
        match (self.required, self.shown) {
            (true, _) => None,
            (false, Some(words)) => Some(words.into()),
            (false, None) => Some(show(&self.value)),
        }
    }
}

/// A table of the file that reads into a struct.
pub(crate) trait Section: Sized {
    const NAME: &'static str;
    fn info(repeated: bool) -> SectionInfo;
    fn read(reader: &mut Reader<'_>, table: &DeTable<'_>, at: &str, span: Range<usize>) -> Self;
    /// Appends `key=value` lines of the keys that all nodes must agree on.
    fn write_shared(&self, out: &mut String);
}

/// Declares a section: `scope key: type = kind, preset;` with the documentation above it.
macro_rules! settings {
    ($($(#[doc = $section_doc:literal])* $name:ident = $section:literal {
        $($(#[doc = $doc:literal])* $scope:ident $field:ident : $ty:ty = $kind:expr, $preset:expr;)*
    })+) => {$(
        $(#[doc = $section_doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $($(#[doc = $doc])* pub $field: $ty,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $preset.value,)* }
            }
        }

        impl $crate::schema::Section for $name {
            const NAME: &'static str = $section;

            fn info(repeated: bool) -> $crate::schema::SectionInfo {
                $crate::schema::SectionInfo {
                    name: $section,
                    repeated,
                    doc: concat!($($section_doc, "\n"),*).trim().into(),
                    keys: vec![$({
                        let kind = $kind;
                        let preset: $crate::schema::Preset<$ty> = $preset;
                        $crate::schema::KeyInfo {
                            name: stringify!($field),
                            type_name: kind.type_name(),
                            default: preset.info(|value| kind.show(value)),
                            allowed: kind.allowed(),
                            doc: concat!($($doc),*).trim().into(),
                            scope: $crate::schema::Scope::$scope,
                        }
                    },)*],
                }
            }

            fn read(
                reader: &mut $crate::schema::Reader<'_>,
                table: &toml::de::DeTable<'_>,
                at: &str,
                span: std::ops::Range<usize>,
            ) -> Self {
                reader.unknown_keys(table, at, $section, &[$(stringify!($field)),*]);
                Self { $($field: reader.key(table, at, span.clone(), stringify!($field), &$kind, $preset),)* }
            }

            fn write_shared(&self, out: &mut String) {
                $(if $crate::schema::Scope::$scope == $crate::schema::Scope::Cluster {
                    let kind = $kind;
                    out.push_str(concat!(stringify!($field), "="));
                    out.push_str(&kind.show(&self.$field));
                    out.push('\n');
                })*
            }
        }
    )+};
}
pub(crate) use settings;

/// Reads one file, collecting problems and the place of every key.
pub(crate) struct Reader<'a> {
    pub source: Source<'a>,
    /// The directory that relative paths start from.
    pub base: &'a Path,
    pub problems: Vec<Problem>,
    places: BTreeMap<String, Range<usize>>,
    /// Items of `[[…]]` that are no tables. A default stands in for each, so that the others keep their numbers.
    stand_ins: Vec<String>,
}

impl<'a> Reader<'a> {
    pub fn new(source: Source<'a>, base: &'a Path) -> Self {
        Self {
            source,
            base,
            problems: Vec::new(),
            places: BTreeMap::new(),
            stand_ins: Vec::new(),
        }
    }

    /// Where a key stands; for a key that is not in the file, the place of the table around it.
    pub fn place(&self, key: &str) -> Option<Range<usize>> {
        let outer = || {
            key.rsplit_once('.')
                .and_then(|(outer, _)| self.places.get(outer))
        };
        self.places.get(key).or_else(outer).cloned()
    }

    /// Whether the file gives this key (as opposed to its default).
    pub fn is_given(&self, key: &str) -> bool {
        self.places.contains_key(key)
    }

    /// A problem at the place of `key`.
    pub fn problem_at(&self, key: &str, message: impl Into<String>) -> Problem {
        self.source.problem(self.place(key), key, message)
    }

    /// A problem with one item of the list at `key`, at the place of the item.
    pub fn problem_in(&self, key: &str, item: usize, message: impl Into<String>) -> Problem {
        let place = self.place(&item_of(key, item));
        self.source
            .problem(place.or_else(|| self.place(key)), key, message)
    }

    /// Takes back what was found out about stand-ins: that an item is no table has been said.
    pub fn forget_stand_ins(&mut self, warnings: &mut Vec<Warning>) {
        let stand_ins = std::mem::take(&mut self.stand_ins);
        let is_within = |key: &str, item: &String| {
            key.strip_prefix(item.as_str())
                .is_some_and(|rest| rest.starts_with('.'))
        };
        self.problems
            .retain(|problem| !stand_ins.iter().any(|item| is_within(&problem.key, item)));
        warnings.retain(|warning| {
            let key = &warning.0.key;
            !stand_ins
                .iter()
                .any(|item| key == item || is_within(key, item))
        });
    }

    /// Reads `[name]`; its absence means defaults.
    pub fn section<S: Section + Default>(&mut self, root: &DeTable<'_>) -> S {
        let Some((key, value)) = entry(root, S::NAME) else {
            return S::default();
        };
        let Some(table) = value.get_ref().as_table() else {
            let problem = self
                .source
                .problem(Some(value.span()), S::NAME, "expected a table");
            self.problems
                .push(problem.help(format!("write [{}] once", S::NAME)));
            return S::default();
        };
        self.places.insert(S::NAME.into(), key.span());
        S::read(self, table, S::NAME, key.span())
    }

    /// Reads every `[[name]]`.
    pub fn sections<S: Section + Default>(&mut self, root: &DeTable<'_>) -> Vec<S> {
        let Some((key, value)) = entry(root, S::NAME) else {
            return Vec::new();
        };
        let Some(items) = value.get_ref().as_array() else {
            let problem =
                self.source
                    .problem(Some(key.span()), S::NAME, "expected an array of tables");
            self.problems
                .push(problem.help(format!("write [[{}]] with two brackets", S::NAME)));
            return Vec::new();
        };
        self.places.insert(S::NAME.into(), key.span());
        let read = |(index, item): (usize, &Spanned<DeValue<'_>>)| {
            let at = item_of(S::NAME, index);
            self.places.insert(at.clone(), item.span());
            let Some(table) = item.get_ref().as_table() else {
                let problem = self
                    .source
                    .problem(Some(item.span()), &at, "expected a table");
                self.problems.push(problem);
                self.stand_ins.push(at);
                return S::default();
            };
            S::read(self, table, &at, item.span())
        };
        items.iter().enumerate().map(read).collect()
    }

    /// Reports keys that the section does not know.
    pub fn unknown_keys(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        section: &str,
        known: &[&'static str],
    ) {
        for (key, _) in table.iter() {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                continue;
            }
            let at = if at.is_empty() {
                name.to_owned()
            } else {
                format!("{at}.{name}")
            };
            let problem = self.source.problem(Some(key.span()), &at, "unknown key");
            self.problems.push(match hint(section, name, known) {
                Some(help) => problem.help(help),
                None => problem.allowed(known.join(", ")),
            });
        }
    }

    /// Reads one key, or gives its preset.
    pub fn key<K: Kind>(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        span: Range<usize>,
        name: &'static str,
        kind: &K,
        preset: Preset<K::Value>,
    ) -> K::Value {
        let at = format!("{at}.{name}");
        let Some((_, value)) = entry(table, name) else {
            if preset.required {
                let problem = self.source.problem(
                    Some(span),
                    &at,
                    format!("the required key `{name}` is missing"),
                );
                self.problems.push(problem.allowed(format!(
                    "{}: {}",
                    kind.type_name(),
                    kind.allowed()
                )));
            }
            return preset.value;
        };
        self.places.insert(at.clone(), value.span());
        for (index, item) in value.get_ref().as_array().into_iter().flatten().enumerate() {
            self.places.insert(item_of(&at, index), item.span());
        }
        match kind.read(self.base, value) {
            Ok(value) => value,
            Err(complaints) => {
                self.complain(&at, &kind.allowed(), complaints);
                preset.value
            }
        }
    }

    fn complain(&mut self, at: &str, allowed: &str, complaints: Vec<Complaint>) {
        for complaint in complaints {
            let problem = self
                .source
                .problem(Some(complaint.span), at, complaint.message)
                .allowed(allowed);
            self.problems.push(match complaint.nearest {
                Some(word) => problem.help(format!("did you mean \"{word}\"?")),
                None => problem,
            });
        }
    }
}

/// How reports name one item of a list.
fn item_of(key: &str, index: usize) -> String {
    format!("{key}[{index}]")
}

fn entry<'t, 'i>(
    table: &'t DeTable<'i>,
    name: &str,
) -> Option<(
    &'t Spanned<toml::de::DeString<'i>>,
    &'t Spanned<DeValue<'i>>,
)> {
    table.iter().find(|(key, _)| key.get_ref() == name)
}

/// What an unknown key was probably meant to be: a key of this section misspelt, or a key of another one.
fn hint(section: &str, name: &str, known: &[&'static str]) -> Option<String> {
    if let Some(word) = nearest(name, known.iter().copied()) {
        return Some(format!("did you mean `{word}`?"));
    }
    let all = crate::settings::sections();
    let home = all
        .iter()
        .find(|other| other.name != section && other.keys.iter().any(|key| key.name == name))?;
    let brackets = if home.repeated {
        format!("[[{}]]", home.name)
    } else {
        format!("[{}]", home.name)
    };
    Some(format!("`{name}` belongs in {brackets}"))
}
