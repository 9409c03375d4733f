//! The `tojson` filter with Python's spelling of JSON, on which models were trained.
//!
//! minijinja's own escapes HTML and writes no spaces; transformers calls `json.dumps(value, ensure_ascii=False, indent=…)`.

use minijinja::{Error, ErrorKind, Value, value::Kwargs};
use serde::Serialize;
use serde_json::ser::Formatter;
use std::io::{self, Write};

/// `value|tojson`, `value|tojson(indent=2)`. The other arguments of transformers' filter are accepted; they change
/// nothing here (`ensure_ascii` is off by default there).
pub fn to_json(value: &Value, arguments: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let _: Option<Value> = arguments.get("ensure_ascii")?;
    let _: Option<Value> = arguments.get("separators")?;
    let _: Option<Value> = arguments.get("sort_keys")?;
    arguments.assert_all_used()?;
    let json = match indent {
        None => write(value, OneLine),
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            write(
                value,
                serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes()),
            )
        }
    };
    json.map_err(|error| Error::new(ErrorKind::BadSerialization, "tojson").with_source(error))
}

fn write(value: &Value, formatter: impl Formatter) -> Result<String, serde_json::Error> {
    let mut bytes = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut bytes, formatter,
    ))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `", "` between elements and `": "` after keys.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
