//! Request bodies to fields: forms and JSON objects, every field a text.

use std::borrow::Cow;
use std::fmt;

use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use percent_encoding::percent_decode;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

/// The types that bodies may have.
const ACCEPTED: &str = "application/x-www-form-urlencoded or application/json";
/// Names that a message lists, so that a body of thousands of fields gets a short answer.
const MAX_NAMES: usize = 5;
/// Characters of such a name.
const MAX_NAME: usize = 40;

/// What a body is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `application/x-www-form-urlencoded`.
    Form,
    /// `application/json`.
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

/// The values of exactly the `declared` fields, in their order, or what is wrong with the body. Ends at the first
/// thing that is wrong: what a client sends behind it costs nothing.
pub fn fields(kind: Kind, body: &[u8], declared: &[String]) -> Result<Vec<String>, String> {
    let mut fields = Fields {
        declared,
        values: vec![None; declared.len()],
    };
    match kind {
        Kind::Form => form(body, &mut fields)?,
        // Of another value, the parser's message would say all.
        Kind::Json if !body.trim_ascii_start().starts_with(b"{") => {
            return Err("the JSON is not an object".to_owned());
        }
        Kind::Json => {
            json(body, &mut fields).map_err(|error| format!("the JSON is wrong: {error}"))?;
        }
    }
    fields.all()
}

/// The fields that were found.
struct Fields<'a> {
    declared: &'a [String],
    values: Vec<Option<String>>,
}

impl Fields<'_> {
    /// The place of a field, or what is wrong with it.
    fn place(&self, name: &str) -> Result<usize, String> {
        let Some(place) = self.declared.iter().position(|known| known == name) else {
            let (name, taken) = (quoted(name), names(self.declared));
            return Err(format!(
                "the field {name} is unknown; the fields are {taken}"
            ));
        };
        if self.values[place].is_some() {
            return Err(format!("the field {} is there twice", quoted(name)));
        }
        Ok(place)
    }

    fn all(self) -> Result<Vec<String>, String> {
        let all = self.declared.iter().zip(&self.values);
        let missing: Vec<&String> = all
            .filter_map(|(name, value)| value.is_none().then_some(name))
            .collect();
        if missing.is_empty() {
            return Ok(self.values.into_iter().flatten().collect());
        }
        let (missing, taken) = (names(&missing), names(self.declared));
        Err(format!("missing: {missing}; the fields are {taken}"))
    }
}

fn form(body: &[u8], fields: &mut Fields<'_>) -> Result<(), String> {
    let pairs = body.split(|&byte| byte == b'&');
    for pair in pairs.filter(|pair| !pair.is_empty()) {
        let equals = pair.iter().position(|&byte| byte == b'=');
        let (name, value) = match equals {
            Some(at) => (&pair[..at], &pair[at + 1..]),
            None => (pair, &b""[..]),
        };
        let place = fields.place(&decoded(name)?)?;
        fields.values[place] = Some(decoded(value)?.into_owned());
    }
    Ok(())
}

/// The text of a form's name or value.
fn decoded(part: &[u8]) -> Result<Cow<'_, str>, String> {
    let not_utf8 = |_| "the form is not UTF-8".to_owned();
    if !part.contains(&b'+') {
        return percent_decode(part).decode_utf8().map_err(not_utf8);
    }
    let space = |&byte: &u8| if byte == b'+' { b' ' } else { byte };
    let spaced: Vec<u8> = part.iter().map(space).collect();
    let text = percent_decode(&spaced).decode_utf8().map_err(not_utf8)?;
    Ok(Cow::Owned(text.into_owned()))
}

fn json(body: &[u8], fields: &mut Fields<'_>) -> Result<(), serde_json::Error> {
    let mut json = serde_json::Deserializer::from_slice(body);
    json.deserialize_map(ObjectVisitor(fields))?;
    json.end()
}

struct ObjectVisitor<'a, 'd>(&'a mut Fields<'d>);

impl<'de> Visitor<'de> for ObjectVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self(fields) = self;
        while let Some(place) = map.next_key_seed(Name(fields))? {
            let name = &fields.declared[place];
            fields.values[place] = Some(map.next_value_seed(Text(name))?);
        }
        Ok(())
    }
}

/// The name of a field: its place.
struct Name<'a, 'd>(&'a Fields<'d>);

impl<'de> DeserializeSeed<'de> for Name<'_, '_> {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_, '_> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<usize, E> {
        self.0.place(name).map_err(E::custom)
    }
}

/// The value of the field that has this name. What is no text is refused where it begins, however much there is of it.
struct Text<'a>(&'a str);

impl Text<'_> {
    fn refuse<E: de::Error>(&self, found: &str) -> Result<String, E> {
        let name = quoted(self.0);
        Err(E::custom(format_args!(
            "the field {name} is {found}, and must be a string"
        )))
    }
}

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Text<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_unit<E: de::Error>(self) -> Result<String, E> {
        self.refuse("null")
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<String, E> {
        self.refuse("a boolean")
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<String, E> {
        self.refuse("a number")
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<String, E> {
        self.refuse("a number")
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<String, E> {
        self.refuse("a number")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<String, A::Error> {
        self.refuse("an array")
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<String, A::Error> {
        self.refuse("an object")
    }
}

/// A few of the names, quoted.
fn names(all: &[impl AsRef<str>]) -> String {
    let shown: Vec<String> = all
        .iter()
        .take(MAX_NAMES)
        .map(|name| quoted(name.as_ref()))
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
            "title=A&uid=1&a=%FF",
            Err(r#"the field "uid" is unknown; the fields are "title", "content""#),
        );
        check(Form, "&&title=A&&content=B&&", Ok(["A", "B"]));
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
            Err(r#"the JSON is wrong: the field "title" is there twice at line 1 column 20"#),
        );
        check(
            Json,
            r#"{"title":"A","content":"B","\u0000":"C"}"#,
            Err(
                r#"the JSON is wrong: the field "\0" is unknown; the fields are "title", "content" at line 1 column 35"#,
            ),
        );
        // What is wrong behind it is not looked at.
        for nested in ["[[[[", "{\"a\":[", "[1,2,nonsense"] {
            let found = fields(
                Json,
                format!(r#"{{"title":{nested}"#).as_bytes(),
                &["title".to_owned()],
            );
            let wrong = found.unwrap_err();
            assert!(wrong.contains("and must be a string"), "{nested}: {wrong}");
        }
        check(
            Json,
            r#"{"title":"A","content":"B"} x"#,
            Err("the JSON is wrong: trailing characters at line 1 column 29"),
        );
        check(Json, "[]", Err("the JSON is not an object"));
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
