//! How an error becomes a fault: what will pass is retried, the rest is rejected.

use std::fmt::Display;

use crate::bindings::stage::wasi::config::store;
use crate::{Fault, producer, redis, sql};

impl Fault {
    /// A fault that will pass: the message is delivered again under the stage's retry policy.
    ///
    /// ```
    /// # use stagehost::Fault;
    /// assert_eq!(Fault::retry("no stock yet"), Fault::Retry("no stock yet".to_owned()));
    /// ```
    pub fn retry(why: impl Display) -> Self {
        Self::Retry(why.to_string())
    }

    /// A fault that will not pass: the message goes to the stage's dead-letter topic now.
    ///
    /// ```
    /// # use stagehost::Fault;
    /// let parsed: Result<u16, Fault> = "x".parse().map_err(Fault::reject);
    /// assert_eq!(parsed, Err(Fault::Reject("invalid digit found in string".to_owned())));
    /// ```
    pub fn reject(why: impl Display) -> Self {
        Self::Reject(why.to_string())
    }
}

impl From<producer::Error> for Fault {
    fn from(error: producer::Error) -> Self {
        use producer::Error::{Denied, Other, TooLarge};
        match error {
            Denied(why) => Self::Reject(format!("emit: denied: {why}")),
            TooLarge(limit) => Self::Reject(format!(
                "emit: the record is larger than the limit of {limit} bytes"
            )),
            Other(why) => Self::Reject(format!("emit: {why}")),
        }
    }
}

impl From<sql::Error> for Fault {
    fn from(error: sql::Error) -> Self {
        use sql::Error::{Database, Denied, TooLarge, Unavailable, Unsupported};
        match error {
            Unavailable(why) => Self::Retry(format!("sql: not available: {why}")),
            Database(e) if e.is_lost_race() => Self::Retry(format!("sql: {}", e.describe())),
            Database(e) => Self::Reject(format!("sql: {}", e.describe())),
            Denied(why) => Self::Reject(format!("sql: denied: {why}")),
            Unsupported(why) => Self::Reject(format!("sql: unsupported: {why}")),
            TooLarge(limit) => Self::Reject(format!(
                "sql: the answer is larger than the limit of {limit}"
            )),
        }
    }
}

impl From<redis::Error> for Fault {
    fn from(error: redis::Error) -> Self {
        use redis::Error::{Denied, Server, TooLarge, Unavailable};
        match error {
            Unavailable(why) => Self::Retry(format!("redis: not available: {why}")),
            Server(why) => Self::Reject(format!("redis: {why}")),
            Denied(why) => Self::Reject(format!("redis: denied: {why}")),
            TooLarge(limit) => Self::Reject(format!(
                "redis: a key, value or answer is larger than the limit of {limit} bytes"
            )),
        }
    }
}

impl From<store::Error> for Fault {
    fn from(error: store::Error) -> Self {
        let (store::Error::Upstream(why) | store::Error::Io(why)) = error;
        Self::Retry(format!("config: {why}"))
    }
}

impl From<serde_json::Error> for Fault {
    fn from(error: serde_json::Error) -> Self {
        Self::Reject(format!("JSON: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(sqlstate: &str) -> sql::Error {
        sql::Error::Database(sql::DatabaseError {
            sqlstate: Some(sqlstate.to_owned()),
            message: "words".to_owned(),
            constraint: None,
        })
    }

    #[test]
    fn what_will_pass_is_retried_and_the_rest_rejected() {
        let retried: [Fault; 5] = [
            sql::Error::Unavailable("away".to_owned()).into(),
            database("40001").into(),
            database("40P01").into(),
            redis::Error::Unavailable("away".to_owned()).into(),
            store::Error::Io("away".to_owned()).into(),
        ];
        for fault in retried {
            assert!(matches!(fault, Fault::Retry(_)), "{fault:?}");
        }
        let rejected: [Fault; 7] = [
            database("23505").into(),
            sql::Error::Denied("posts".to_owned()).into(),
            sql::Error::Unsupported("point".to_owned()).into(),
            redis::Error::Server("WRONGTYPE".to_owned()).into(),
            producer::Error::Denied("t".to_owned()).into(),
            producer::Error::TooLarge(10).into(),
            serde_json::from_str::<u8>("x").unwrap_err().into(),
        ];
        for fault in rejected {
            assert!(matches!(fault, Fault::Reject(_)), "{fault:?}");
        }
    }

    #[test]
    fn a_database_error_keeps_its_sqlstate_and_constraint() {
        let error = sql::DatabaseError {
            sqlstate: Some("23505".to_owned()),
            message: "duplicate key".to_owned(),
            constraint: Some("posts_slug_key".to_owned()),
        };
        assert_eq!(
            Fault::from(sql::Error::Database(error)),
            Fault::Reject(
                "sql: duplicate key (SQLSTATE 23505, constraint posts_slug_key)".to_owned()
            )
        );
    }
}
