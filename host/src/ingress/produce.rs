//! Produce routes: a record made of a request, and the answer once the log has it.

use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{HeaderName, HeaderValue};
use uuid::Uuid;

use super::body::{self, Kind};
use crate::http::{Answer, busy, text};
use crate::log::{LogError, Unsent};
use crate::pipeline::Action;
use crate::record::{Header, Outgoing};

/// What a produce route makes of a request.
pub(super) struct Produce {
    pub(super) topic: Arc<str>,
    /// Where in `names` the key is.
    key: Option<usize>,
    /// The record's fields: the generated ones first.
    names: Vec<String>,
    generated: Vec<HeaderName>,
    status: StatusCode,
    body: Bytes,
}

/// A record that is ready for the log, and the values that were made for it.
pub(super) struct Made {
    pub(super) record: Outgoing,
    pub(super) generated: Vec<String>,
}

impl Produce {
    pub(super) fn new(action: &Action) -> anyhow::Result<Self> {
        let Action::Produce {
            topic,
            key,
            fields,
            generate,
            status,
            body,
        } = action
        else {
            anyhow::bail!("not a produce route");
        };
        let names: Vec<String> = generate.iter().chain(fields).cloned().collect();
        let key = match key {
            None => None,
            Some(key) => {
                let place = names.iter().position(|name| name == key);
                Some(place.with_context(|| format!("the key {key} is none of its fields"))?)
            }
        };
        let generated = generate
            .iter()
            .map(|name| HeaderName::from_bytes(format!("stagehost-{name}").as_bytes()))
            .collect::<Result<_, _>>()
            .context("the name of a generated field must suit an HTTP header")?;
        Ok(Self {
            topic: topic.as_str().into(),
            key,
            names,
            generated,
            status: StatusCode::from_u16(*status)?,
            body: Bytes::copy_from_slice(body.as_bytes()),
        })
    }

    /// The record of a body, or what is wrong with it.
    pub(super) fn make(
        &self,
        kind: Kind,
        body: &[u8],
        header: Option<Header>,
    ) -> Result<Made, String> {
        let declared = &self.names[self.generated.len()..];
        let sent = body::fields(kind, body, declared)?;
        let generated: Vec<String> = self.generated.iter().map(|_| new_id()).collect();
        let mut values = generated.clone();
        values.extend(sent);
        let record = self.record(&values, header.into_iter().collect());
        Ok(Made { record, generated })
    }

    /// The record of the fields' values: a JSON object in the order of `names`.
    fn record(&self, values: &[String], headers: Vec<Header>) -> Outgoing {
        Outgoing {
            topic: Arc::clone(&self.topic),
            partition: None,
            timestamp: None,
            key: self.key.map(|place| values[place].clone().into_bytes()),
            value: Some(json_object(&self.names, values)),
            headers,
        }
    }

    pub(super) fn answer(&self, generated: &[String]) -> Answer {
        let mut answer = text(self.status, self.body.clone());
        for (name, value) in self.generated.iter().zip(generated) {
            if let Ok(value) = HeaderValue::from_str(value) {
                answer.headers_mut().insert(name, value);
            }
        }
        answer
    }
}

/// Version 7: its first bytes are the time, so that rows come to the end of an index and not all over it.
fn new_id() -> String {
    Uuid::now_v7().to_string()
}

fn json_object(names: &[String], values: &[String]) -> Vec<u8> {
    use serde::Serializer;
    let mut json = Vec::new();
    let written = serde_json::Serializer::new(&mut json).collect_map(names.iter().zip(values));
    debug_assert!(written.is_ok(), "text into memory cannot fail");
    json
}

/// What a client is told does not show the log's inside; our log does.
pub(super) fn log_refusal(unsent: &[Unsent], topic: &str) -> Answer {
    let Some(Unsent { error, .. }) = unsent.first() else {
        return busy("the log is not available");
    };
    match error {
        // Who watches the log says once that it is away, or that it acknowledges nothing, and not for every request.
        LogError::Unavailable(_) => {
            tracing::debug!(topic, "a record was not acknowledged: {error}")
        }
        _ => tracing::warn!(topic, "a request's record was not acknowledged: {error}"),
    }
    match error {
        LogError::Unavailable(_) => busy("the log is not available"),
        LogError::TooLarge(_) => text(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the record is larger than the log takes",
        ),
        LogError::Refused(_)
        | LogError::Invalid(_)
        | LogError::NoPartition(_)
        | LogError::InvalidTime(_) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the log refused the record",
        ),
    }
}
