//! Bodies of requests: JSON objects and forms, from anybody who can reach the ingress.

use std::collections::BTreeMap;
use std::fmt;

use host::ingress::body::{Kind, fields};
use percent_encoding::percent_decode;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::memory::within;

/// What is told of a body that is refused.
const MAX_MESSAGE: usize = 1024;
/// Memory for the fields, which are no longer than the body, while texts and a list of them grow.
const AT_FIRST: usize = 64 << 10;
const TIMES: usize = 16;

/// A body is taken if a plain reader finds the declared fields in it, each once and a text, and no other; the values are
/// what that one finds. What is refused is refused in few words.
pub(crate) fn check(bytes: &[u8]) {
    let Some((first, body)) = bytes.split_first() else {
        return;
    };
    let (kind, expected) = if first & 1 == 0 {
        (Kind::Json, json(body))
    } else {
        (Kind::Form, form(body))
    };
    let declared = match first >> 1 & 3 {
        0 => vec!["a"],
        1 => vec!["title", "content"],
        2 => vec!["ü b", "a", ""],
        _ => Vec::new(),
    };
    let declared: Vec<String> = declared.into_iter().map(str::to_owned).collect();
    let most = AT_FIRST + TIMES * body.len();
    let found = within(most, || fields(kind, body, &declared));
    let expected = expected.and_then(|pairs| only(&pairs, &declared));
    match (found, expected) {
        (Ok(found), expected) => assert_eq!(Some(found), expected),
        (Err(why), None) => {
            assert!(why.len() <= MAX_MESSAGE, "{} bytes: {why}", why.len());
            assert!(!why.chars().any(char::is_control), "{why:?}");
        }
        (Err(why), Some(_)) => panic!("a good body is refused: {why}"),
    }
}

/// The values of the declared names, if there are no others and none twice.
fn only(pairs: &[(String, String)], declared: &[String]) -> Option<Vec<String>> {
    let found: BTreeMap<&str, &str> = pairs
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    let alike = pairs.len() == found.len() && found.len() == declared.len();
    let values = declared.iter().map(|name| found.get(name.as_str()));
    let values: Option<Vec<_>> = values
        .map(|value| value.map(|value| (*value).to_owned()))
        .collect();
    values.filter(|_| alike)
}

/// The members of an object of texts, repeated ones too, which `serde_json::Value` would drop.
fn json(body: &[u8]) -> Option<Vec<(String, String)>> {
    let Members(members) = serde_json::from_slice(body).ok()?;
    let text = |(name, value)| match value {
        Value::String(value) => Some((name, value)),
        _ => None,
    };
    members.into_iter().map(text).collect()
}

struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self(Vec::new()))
    }
}

impl<'de> Visitor<'de> for Members {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(member) = map.next_entry()? {
            self.0.push(member);
        }
        Ok(self)
    }
}

/// As https://url.spec.whatwg.org/#urlencoded-parsing has it, but for what is no UTF-8 when it is decoded: it is not
/// taken.
fn form(body: &[u8]) -> Option<Vec<(String, String)>> {
    let decode = |text: &[u8]| {
        let spaced = text
            .iter()
            .map(|byte| if *byte == b'+' { b' ' } else { *byte });
        let decoded: Vec<u8> = percent_decode(&spaced.collect::<Vec<_>>()).collect();
        String::from_utf8(decoded).ok()
    };
    let pair = |text: &[u8]| {
        let mut parts = text.splitn(2, |byte| *byte == b'=');
        let name = decode(parts.next()?)?;
        Some((name, decode(parts.next().unwrap_or_default())?))
    };
    let texts = body.split(|byte| *byte == b'&');
    texts.filter(|text| !text.is_empty()).map(pair).collect()
}
