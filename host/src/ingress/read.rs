//! Read routes: a key made of the path, and the store's value at it.

use std::borrow::Cow;

use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::HeaderValue;
use matchit::Params;
use percent_encoding::percent_decode_str;

use crate::capability::StoreError;
use crate::capability::redis::{HOST_PREFIX, Store};
use crate::http::{Answer, busy, content, not_found, text};
use crate::pipeline::{Action, NoKey, Route, Template};

/// A store, and how its key is made.
pub(super) struct Read {
    store: Store,
    key: Template,
    /// Keys of other routes, which this one's must not reach.
    others: Vec<String>,
}

impl Read {
    /// `others` are the keys of the store's routes that have no `{name}`.
    pub(super) fn new(store: Store, key: Template, others: Vec<String>) -> Self {
        let others = if key.is_plain() { Vec::new() } else { others };
        Self { store, key, others }
    }

    /// The key for a path's named parts.
    pub(super) fn key(&self, params: &Params<'_, '_>) -> Result<String, NoKey> {
        let mut values = Vec::with_capacity(params.len());
        for (name, written) in params.iter() {
            values.push((name, decoded(name, written)?));
        }
        let key = self.key.key(|wanted| {
            let (_, value) = values.iter().find(|(name, _)| *name == wanted)?;
            Some(value.as_ref())
        })?;
        if self.others.contains(&key) || key.starts_with(HOST_PREFIX) {
            return Err(NoKey::NotHere);
        }
        Ok(key)
    }

    /// The answer for a key.
    pub(super) async fn value(&self, key: &str) -> Result<Answer, Answer> {
        let json = HeaderValue::from_static("application/json");
        match self.store.get(key).await {
            Ok(Some(value)) => Ok(content(StatusCode::OK, json, Bytes::from(value))),
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

/// The keys of a store's routes that have no `{name}`.
pub(super) fn plain_keys(routes: &[Route], of: &str) -> Vec<String> {
    let keys = routes.iter().filter_map(|route| match &route.action {
        Action::Read { store, key } if store == of && key.is_plain() => Some(key.to_string()),
        _ => None,
    });
    keys.collect()
}

/// Decoded once: what is written `%253A` is `%3A`.
fn decoded<'p>(name: &str, written: &'p str) -> Result<Cow<'p, str>, NoKey> {
    let value = percent_decode_str(written).decode_utf8();
    value.map_err(|_| NoKey::Malformed(format!("{name} in the path is not UTF-8")))
}
