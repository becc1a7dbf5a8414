//! Request bodies to fields: forms and JSON objects, every field a text.

use std::collections::BTreeMap;
use std::fmt;

use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use percent_encoding::percent_decode;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// The types that bodies may have.
const ACCEPTED: &str = "application/x-www-form-urlencoded or application/json";
/// Names that a message lists, so that a body of thousands of fields gets a short answer.
const MAX_NAMES: usize = 5;
/// Characters of such a name.
const MAX_NAME: usize = 40;

/// What a body is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Form,
    Json,
}

/// The type that the headers name, or why it is not taken.
pub(super) fn kind(headers: &HeaderMap) -> Result<Kind, String> {
    if let Some(encoding) = headers.get(CONTENT_ENCODING)
        && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return Err("a content-encoding is not taken: send the body as it is".to_owned());
    }
    let named = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .ok_or_else(|| format!("the content-type is missing: send {ACCEPTED}"))?;
    let mut parts = named.split(';').map(str::trim);
    let kind = match parts
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase()
        .as_str()
    {
        "application/x-www-form-urlencoded" => Kind::Form,
        "application/json" => Kind::Json,
        other => {
            return Err(format!(
                "the content-type {} is not taken: send {ACCEPTED}",
                quoted(other)
            ));
        }
    };
    for (name, value) in parts.filter_map(|part| part.split_once('=')) {
        let charset = value.trim_matches('"');
        if name.eq_ignore_ascii_case("charset") && !charset.eq_ignore_ascii_case("utf-8") {
            return Err(format!(
                "the charset {} is not taken: send UTF-8",
                quoted(charset)
            ));
        }
    }
    Ok(kind)
}

/// The values of exactly the `declared` fields, in their order, or what is wrong with the body.
pub(super) fn fields(kind: Kind, body: &[u8], declared: &[String]) -> Result<Vec<String>, String> {
    let Fields(mut found) = match kind {
        Kind::Form => form(body)?,
        Kind::Json => {
            serde_json::from_slice(body).map_err(|error| format!("the JSON is wrong: {error}"))?
        }
    };
    let mut values = Vec::with_capacity(declared.len());
    let mut missing = Vec::new();
    for name in declared {
        match found.remove(name) {
            Some(value) => values.push(value),
            None => missing.push(name.as_str()),
        }
    }
    let unknown: Vec<&str> = found.keys().map(String::as_str).collect();
    let mut wrong = Vec::new();
    if !missing.is_empty() {
        wrong.push(format!("missing: {}", names(&missing)));
    }
    if !unknown.is_empty() {
        wrong.push(format!("unknown: {}", names(&unknown)));
    }
    if wrong.is_empty() {
        return Ok(values);
    }
    let taken: Vec<&str> = declared.iter().map(String::as_str).collect();
    Err(format!(
        "{}; the fields are {}",
        wrong.join("; "),
        names(&taken)
    ))
}

/// Fields by name, each there once.
struct Fields(BTreeMap<String, String>);

fn form(body: &[u8]) -> Result<Fields, String> {
    // The parser replaces what is not UTF-8. Decoding all of it at once finds the same faults as
    // decoding each part: no sequence goes on across `&` or `=`.
    if percent_decode(body).decode_utf8().is_err() {
        return Err("the form is not UTF-8".to_owned());
    }
    let mut fields = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(body) {
        let name = name.into_owned();
        if fields.contains_key(&name) {
            return Err(format!("the field {} is there twice", quoted(&name)));
        }
        fields.insert(name, value.into_owned());
    }
    Ok(Fields(fields))
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            let value = match map.next_value::<Value>()? {
                Value::String(value) => value,
                other => {
                    let (name, found) = (quoted(&name), type_name(&other));
                    return Err(de::Error::custom(format_args!(
                        "the field {name} is {found}, and must be a string"
                    )));
                }
            };
            if fields.contains_key(&name) {
                return Err(de::Error::custom(format_args!(
                    "the field {} is there twice",
                    quoted(&name)
                )));
            }
            fields.insert(name, value);
        }
        Ok(Fields(fields))
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A few of the names, quoted.
fn names(all: &[&str]) -> String {
    let shown: Vec<String> = all
        .iter()
        .take(MAX_NAMES)
        .map(|name| quoted(name))
        .collect();
    let more = if all.len() > MAX_NAMES { " …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// A client's text in an answer: short, and without control characters.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(MAX_NAME).collect();
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kind: Kind, body: impl AsRef<[u8]>, expected: Result<[&str; 2], &str>) {
        let declared = ["title".to_owned(), "content".to_owned()];
        let found = fields(kind, body.as_ref(), &declared);
        let expected = expected
            .map(|values| values.map(str::to_owned).to_vec())
            .map_err(str::to_owned);
        assert_eq!(
            found,
            expected,
            "{}",
            String::from_utf8_lossy(body.as_ref())
        );
    }

    #[test]
    fn forms() {
        use Kind::Form;
        check(
            Form,
            "content=B&title=%C3%9Cber+a%26b",
            Ok(["Über a&b", "B"]),
        );
        check(Form, "title=&content", Ok(["", ""]));
        check(Form, "title=100%&content=%zz", Ok(["100%", "%zz"]));
        check(Form, "title=%FF&content=B", Err("the form is not UTF-8"));
        check(Form, b"title=\xff&content=B", Err("the form is not UTF-8"));
        check(Form, "title=%C3&content=%9C", Err("the form is not UTF-8"));
        check(
            Form,
            "title=A&title=B&content=C",
            Err(r#"the field "title" is there twice"#),
        );
        check(
            Form,
            "",
            Err(r#"missing: "title", "content"; the fields are "title", "content""#),
        );
        check(
            Form,
            "title=A&uid=1&a=1&b=2&c=3&d=4&e=5",
            Err(
                r#"missing: "content"; unknown: "a", "b", "c", "d", "e" …; the fields are "title", "content""#,
            ),
        );
    }

    #[test]
    fn json() {
        use Kind::Json;
        check(
            Json,
            r#"{"content":"B","title":"\u00dcber\n"}"#,
            Ok(["Über\n", "B"]),
        );
        check(
            Json,
            r#"{"title":1,"content":"B"}"#,
            Err(
                r#"the JSON is wrong: the field "title" is a number, and must be a string at line 1 column 10"#,
            ),
        );
        check(
            Json,
            r#"{"title":"A","title":"B","content":"B"}"#,
            Err(r#"the JSON is wrong: the field "title" is there twice at line 1 column 24"#),
        );
        check(
            Json,
            r#"{"title":"A","content":"B","\u0000":"C"}"#,
            Err(r#"unknown: "\0"; the fields are "title", "content""#),
        );
        check(
            Json,
            "[]",
            Err("the JSON is wrong: invalid type: sequence, expected an object at line 1 column 0"),
        );
        check(
            Json,
            r#"{"title":"A""#,
            Err("the JSON is wrong: EOF while parsing an object at line 1 column 12"),
        );
        check(
            Json,
            b"{\"title\":\"\xff\"}",
            Err("the JSON is wrong: invalid unicode code point at line 1 column 11"),
        );
    }

    #[test]
    fn kinds() {
        let check = |headers: &[(&'static str, &str)], expected: Result<Kind, &str>| {
            let headers: HeaderMap = headers
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .collect();
            assert_eq!(kind(&headers), expected.map_err(str::to_owned));
        };
        check(&[("content-type", "application/json")], Ok(Kind::Json));
        check(
            &[("content-type", "Application/JSON; charset=\"UTF-8\"")],
            Ok(Kind::Json),
        );
        check(
            &[("content-type", "application/x-www-form-urlencoded")],
            Ok(Kind::Form),
        );
        check(
            &[("content-type", "application/json; charset=latin1")],
            Err(r#"the charset "latin1" is not taken: send UTF-8"#),
        );
        check(
            &[("content-type", "text/plain")],
            Err(
                r#"the content-type "text/plain" is not taken: send application/x-www-form-urlencoded or application/json"#,
            ),
        );
        check(
            &[],
            Err(
                "the content-type is missing: send application/x-www-form-urlencoded or application/json",
            ),
        );
        check(
            &[
                ("content-type", "application/json"),
                ("content-encoding", "gzip"),
            ],
            Err("a content-encoding is not taken: send the body as it is"),
        );
    }
}
