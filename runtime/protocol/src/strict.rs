//! Maps where the protocol says maps.
//!
//! The deserializer would take an array for a struct, field by field in the order of our source, and an enum's map with
//! a second key in it. Neither is what `docs/protocol.md` says, and a client that did it would break with our next field.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// For `deserialize_with`: a `T` from a map, all of whose keys it reads.
pub(crate) fn map<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    FromMap::deserialize(deserializer).map(|FromMap(value)| value)
}

/// For `deserialize_with`: an array of such maps.
pub(crate) fn maps<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let values = Vec::<FromMap<T>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|FromMap(value)| value).collect())
}

/// Transparent, so that the array of maps is unwrapped in its own memory.
#[repr(transparent)]
struct FromMap<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for FromMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MapVisitor(PhantomData))
    }
}

struct MapVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for MapVisitor<T> {
    type Value = FromMap<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FromMap<T>, A::Error> {
        let value = T::deserialize(MapAccessDeserializer::new(&mut map))?;
        match map.next_key::<IgnoredAny>()? {
            None => Ok(FromMap(value)),
            Some(_) => Err(A::Error::invalid_length(2, &"a map with one key")),
        }
    }
}
