//! Python's methods of strings, maps and lists, as far as chat templates use them.
//!
//! Templates are written for Jinja2, where values are Python objects: `message.content.strip()`, `tool.items()`.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{ValueKind, from_args},
};

/// Called by minijinja for every method that it does not know itself.
pub fn call(
    _state: &State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), method, arguments),
        ValueKind::Map => map_method(value, method, arguments),
        ValueKind::Seq | ValueKind::Iterable => list_method(value, method, arguments),
        _ => Err(unknown(method)),
    }
}

fn unknown(method: &str) -> Error {
    Error::new(
        ErrorKind::UnknownMethod,
        format!("{method} is not among the methods that are supported here"),
    )
}

fn string_method(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let value = match method {
        "strip" => strip(text, arguments, true, true)?,
        "lstrip" => strip(text, arguments, true, false)?,
        "rstrip" => strip(text, arguments, false, true)?,
        "removeprefix" => text
            .strip_prefix(one_text(arguments)?.as_str())
            .unwrap_or(text)
            .into(),
        "removesuffix" => text
            .strip_suffix(one_text(arguments)?.as_str())
            .unwrap_or(text)
            .into(),
        "startswith" => any_of(arguments, |part| text.starts_with(part))?.into(),
        "endswith" => any_of(arguments, |part| text.ends_with(part))?.into(),
        "upper" => no_arguments(arguments, text.to_uppercase())?,
        "lower" => no_arguments(arguments, text.to_lowercase())?,
        "capitalize" => no_arguments(arguments, capitalize(text))?,
        "title" => no_arguments(arguments, title(text))?,
        "isdigit" => no_arguments(arguments, all(text, |c| c.is_ascii_digit()))?,
        "isalpha" => no_arguments(arguments, all(text, char::is_alphabetic))?,
        "isspace" => no_arguments(arguments, all(text, char::is_whitespace))?,
        "isupper" => no_arguments(
            arguments,
            text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase),
        )?,
        "islower" => no_arguments(
            arguments,
            text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase),
        )?,
        "replace" => replace(text, arguments)?,
        "split" => split(text, arguments)?,
        "rsplit" => rsplit(text, arguments)?,
        "splitlines" => no_arguments(arguments, text.lines().map(Value::from).collect::<Vec<_>>())?,
        "join" => join(text, arguments)?,
        "find" => char_index(text, text.find(one_text(arguments)?.as_str())).into(),
        "rfind" => char_index(text, text.rfind(one_text(arguments)?.as_str())).into(),
        "count" => count(text, &one_text(arguments)?).into(),
        _ => return Err(unknown(method)),
    };
    Ok(value)
}

fn map_method(value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    match method {
        "get" => {
            let (key, default): (Value, Option<Value>) = from_args(arguments)?;
            let found = value.get_item(&key)?;
            Ok(if found.is_undefined() {
                default.unwrap_or_else(|| Value::from(()))
            } else {
                found
            })
        }
        "keys" => no_arguments(arguments, value.try_iter()?.collect::<Vec<_>>()),
        "values" => {
            let values = value
                .try_iter()?
                .map(|key| value.get_item(&key))
                .collect::<Result<Vec<_>, _>>()?;
            no_arguments(arguments, values)
        }
        "items" => {
            let pair = |key: Value| Ok(Value::from(vec![key.clone(), value.get_item(&key)?]));
            no_arguments(
                arguments,
                value
                    .try_iter()?
                    .map(pair)
                    .collect::<Result<Vec<_>, Error>>()?,
            )
        }
        _ => Err(unknown(method)),
    }
}

fn list_method(value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (item,): (Value,) = from_args(arguments)?;
    match method {
        "count" => Ok(Value::from(
            value.try_iter()?.filter(|other| *other == item).count(),
        )),
        "index" => match value.try_iter()?.position(|other| other == item) {
            Some(index) => Ok(Value::from(index)),
            None => Err(Error::new(
                ErrorKind::InvalidOperation,
                "index: the list does not hold this item",
            )),
        },
        _ => Err(unknown(method)),
    }
}

fn no_arguments(arguments: &[Value], result: impl Into<Value>) -> Result<Value, Error> {
    let () = from_args(arguments)?;
    Ok(result.into())
}

fn one_text(arguments: &[Value]) -> Result<String, Error> {
    let (text,): (String,) = from_args(arguments)?;
    Ok(text)
}

/// `startswith` and `endswith` take one text or a tuple of them.
fn any_of(arguments: &[Value], test: impl Fn(&str) -> bool) -> Result<bool, Error> {
    let (wanted,): (Value,) = from_args(arguments)?;
    match wanted.as_str() {
        Some(text) => Ok(test(text)),
        None => Ok(wanted
            .try_iter()?
            .any(|part| part.as_str().is_some_and(&test))),
    }
}

fn strip(text: &str, arguments: &[Value], start: bool, end: bool) -> Result<Value, Error> {
    let (set,): (Option<String>,) = from_args(arguments)?;
    let cut = |c: char| {
        set.as_ref()
            .map_or(c.is_whitespace(), |set| set.contains(c))
    };
    let text = if start {
        text.trim_start_matches(cut)
    } else {
        text
    };
    let text = if end {
        text.trim_end_matches(cut)
    } else {
        text
    };
    Ok(Value::from(text))
}

fn replace(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (from, to, limit): (String, String, Option<i64>) = from_args(arguments)?;
    let replaced = match limit {
        Some(limit) if limit >= 0 => text.replacen(&from, &to, limit as usize),
        _ => text.replace(&from, &to),
    };
    Ok(Value::from(replaced))
}

/// Separator (none: runs of white space) and number of splits at most.
fn split_arguments(arguments: &[Value]) -> Result<(Option<String>, usize), Error> {
    let (separator, limit): (Option<String>, Option<i64>) = from_args(arguments)?;
    if separator.as_deref() == Some("") {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "split: the separator is empty",
        ));
    }
    let limit = limit
        .and_then(|limit| usize::try_from(limit).ok())
        .unwrap_or(usize::MAX - 1);
    Ok((separator, limit))
}

fn split(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (separator, limit) = split_arguments(arguments)?;
    let parts: Vec<Value> = match separator {
        Some(separator) => text
            .splitn(limit + 1, separator.as_str())
            .map(Value::from)
            .collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_start();
            while !rest.is_empty() && parts.len() < limit {
                let (part, after) =
                    rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len()));
                parts.push(Value::from(part));
                rest = after.trim_start();
            }
            if !rest.is_empty() {
                parts.push(Value::from(rest));
            }
            parts
        }
    };
    Ok(Value::from(parts))
}

fn rsplit(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (separator, limit) = split_arguments(arguments)?;
    let mut parts: Vec<Value> = match separator {
        Some(separator) => text
            .rsplitn(limit + 1, separator.as_str())
            .map(Value::from)
            .collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() && parts.len() < limit {
                let start = rest.char_indices().rev().find(|(_, c)| c.is_whitespace());
                let (before, part) =
                    rest.split_at(start.map_or(0, |(index, c)| index + c.len_utf8()));
                parts.push(Value::from(part));
                rest = before.trim_end();
            }
            if !rest.is_empty() {
                parts.push(Value::from(rest));
            }
            parts
        }
    };
    parts.reverse();
    Ok(Value::from(parts))
}

fn join(separator: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (items,): (Value,) = from_args(arguments)?;
    let texts: Vec<String> = items.try_iter()?.map(|item| item.to_string()).collect();
    Ok(Value::from(texts.join(separator)))
}

/// Python counts characters, and -1 means absent.
fn char_index(text: &str, byte_index: Option<usize>) -> i64 {
    byte_index.map_or(-1, |index| text[..index].chars().count() as i64)
}

fn count(text: &str, part: &str) -> usize {
    if part.is_empty() {
        text.chars().count() + 1
    } else {
        text.matches(part).count()
    }
}

fn all(text: &str, test: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.chars().all(test)
}

fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().collect::<String>() + &chars.as_str().to_lowercase()
    })
}

fn title(text: &str) -> String {
    let mut inside_word = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside_word {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside_word = c.is_alphabetic();
    }
    out
}
