//! Reading a message: typed, with faults that name the place and the reason.

use serde::de::DeserializeOwned;

use crate::{Fault, Header, Message};

impl Message {
    /// The value as JSON of type `T`.
    ///
    /// A tombstone or a value that is not such JSON is rejected, with the record's place and the
    /// place in the value.
    ///
    /// ```
    /// # use stagehost::{Fault, Message};
    /// #[derive(serde::Deserialize)]
    /// struct Post {
    ///     title: String,
    /// }
    ///
    /// fn title(message: &Message) -> Result<String, Fault> {
    ///     Ok(message.json::<Post>()?.title)
    /// }
    /// ```
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        let Some(value) = &self.value else {
            return Err(Fault::Reject(format!(
                "{}: there is no value (a tombstone), where JSON was expected",
                self.place()
            )));
        };
        serde_json::from_slice(value).map_err(|e| {
            Fault::Reject(format!(
                "{}: the value is not the JSON expected: {e}",
                self.place()
            ))
        })
    }

    /// The key as text, where it has one.
    ///
    /// A key that is not UTF-8 is rejected.
    pub fn key_text(&self) -> Result<Option<&str>, Fault> {
        self.key
            .as_deref()
            .map(|key| self.text(key, "the key"))
            .transpose()
    }

    /// The value as text; `None` is a tombstone.
    ///
    /// A value that is not UTF-8 is rejected.
    pub fn value_text(&self) -> Result<Option<&str>, Fault> {
        self.value
            .as_deref()
            .map(|value| self.text(value, "the value"))
            .transpose()
    }

    /// The bytes of the last header of that name, as Kafka's clients choose; `None` where there is
    /// none or it is null.
    ///
    /// Names may repeat: [`Message::headers`] has them all.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        let last = self.headers.iter().rev().find(|h| h.name == name)?;
        last.value.as_deref()
    }

    /// [`Message::header`] as text.
    ///
    /// A header that is not UTF-8 is rejected.
    pub fn header_text(&self, name: &str) -> Result<Option<&str>, Fault> {
        self.header(name)
            .map(|value| self.text(value, name))
            .transpose()
    }

    /// The record's place in the log, for messages: `topic/partition@offset`.
    pub fn place(&self) -> String {
        format!("{}/{}@{}", self.topic, self.partition, self.offset)
    }

    fn text<'a>(&self, bytes: &'a [u8], what: &str) -> Result<&'a str, Fault> {
        std::str::from_utf8(bytes)
            .map_err(|e| Fault::Reject(format!("{}: {what} is not UTF-8: {e}", self.place())))
    }
}

impl Header {
    /// A header with a value.
    pub fn new(name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            value: Some(value.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(key: Option<&[u8]>, value: Option<&[u8]>) -> Message {
        Message {
            topic: "posts".to_owned(),
            partition: 3,
            offset: 17,
            timestamp: None,
            key: key.map(<[u8]>::to_vec),
            value: value.map(<[u8]>::to_vec),
            headers: vec![
                Header::new("trace", "first"),
                Header::new("trace", "last"),
                Header::new("raw", [0xff]),
                Header {
                    name: "null".to_owned(),
                    value: None,
                },
            ],
            attempt: 1,
        }
    }

    #[test]
    fn json_is_typed_or_rejected_with_the_place() {
        assert_eq!(
            message(None, Some(b"[1,2]")).json::<Vec<u8>>(),
            Ok(vec![1, 2])
        );
        let cases: [(Option<&[u8]>, &str); 3] = [
            (
                None,
                "posts/3@17: there is no value (a tombstone), where JSON was expected",
            ),
            (
                Some(b"hello"),
                "posts/3@17: the value is not the JSON expected: expected value at line 1 column 1",
            ),
            (
                Some(b"[1,\"x\"]"),
                "posts/3@17: the value is not the JSON expected: invalid type: string \"x\", expected u8 at line 1 column 6",
            ),
        ];
        for (value, why) in cases {
            assert_eq!(
                message(None, value).json::<Vec<u8>>(),
                Err(Fault::reject(why))
            );
        }
    }

    #[test]
    fn keys_and_headers_are_text_where_they_are_utf8() {
        let m = message(Some("schlüssel".as_bytes()), None);
        assert_eq!(m.key_text(), Ok(Some("schlüssel")));
        assert_eq!(m.value_text(), Ok(None));
        assert_eq!(m.header_text("trace"), Ok(Some("last")));
        assert_eq!(m.header_text("absent"), Ok(None));
        assert_eq!(m.header("null"), None);
        assert_eq!(m.header("raw"), Some(&[0xff][..]));
        assert!(matches!(m.header_text("raw"), Err(Fault::Reject(_))));
        assert!(matches!(
            message(Some(&[0xff]), None).key_text(),
            Err(Fault::Reject(_))
        ));
    }
}
