//! Read routes: a key made of the path, and the store's value at it.

use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use matchit::Params;
use percent_encoding::percent_decode_str;

use crate::capability::StoreError;
use crate::capability::redis::Store;
use crate::http::{Answer, busy, content, not_found, text};

/// A store, and how its key is made.
pub(super) struct Read {
    store: Store,
    key: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// A named part of the path.
    Param(String),
}

impl Read {
    /// `key` is a text with the path's `{name}`s.
    pub(super) fn new(store: Store, key: &str) -> Self {
        Self {
            store,
            key: template(key),
        }
    }

    /// The key for a path's named parts, or what is wrong with them.
    pub(super) fn key(&self, params: &Params<'_, '_>) -> Result<String, String> {
        let mut key = String::new();
        for part in &self.key {
            match part {
                Part::Text(text) => key.push_str(text),
                Part::Param(name) => {
                    let written = params.get(name).unwrap_or_default();
                    let value = percent_decode_str(written)
                        .decode_utf8()
                        .map_err(|_| format!("{name} in the path is not UTF-8"))?;
                    if value.chars().any(char::is_control) {
                        return Err(format!("{name} in the path has a control character"));
                    }
                    key.push_str(&value);
                }
            }
        }
        Ok(key)
    }

    /// The answer for a key.
    pub(super) async fn value(&self, key: &str) -> Result<Answer, Answer> {
        let json = HeaderValue::from_static("application/json");
        match self.store.get(key).await {
            Ok(Some(value)) => Ok(content(StatusCode::OK, json, Bytes::from_owner(value))),
            Ok(None) => Err(not_found()),
            Err(error) => {
                tracing::warn!(%error, "a request's read failed");
                Err(match error {
                    StoreError::Unavailable(_) => busy("the store is not available"),
                    StoreError::Refused(_) => text(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        "the store refused to read the key",
                    ),
                })
            }
        }
    }
}

/// The parts of a key template. A brace that opens no name stands for itself.
fn template(key: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut rest = key;
    while let Some((before, (name, after))) = rest
        .split_once('{')
        .and_then(|(before, after)| Some((before, after.split_once('}')?)))
    {
        if !before.is_empty() {
            parts.push(Part::Text(before.to_owned()));
        }
        parts.push(Part::Param(name.to_owned()));
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.to_owned()));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates() {
        let check = |key: &str, expected: &[Part]| assert_eq!(template(key), expected, "{key}");
        let text = |text: &str| Part::Text(text.to_owned());
        let param = |name: &str| Part::Param(name.to_owned());
        check("post:{slug}", &[text("post:"), param("slug")]);
        check("{a}{b}:c", &[param("a"), param("b"), text(":c")]);
        check("plain", &[text("plain")]);
        check("post:{slug", &[text("post:{slug")]);
    }
}
