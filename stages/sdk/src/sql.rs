//! Relational databases that the pipeline grants to the stage by name.
//!
//! Parameters are written `$1`, `$2`, … on every kind of database, and passed with
//! [`params!`](crate::params):
//!
//! ```
//! use stagehost::{Fault, params, sql};
//!
//! fn rename(uid: &str, title: Option<&str>) -> Result<Vec<String>, Fault> {
//!     let posts = sql::Connection::open("posts")?;
//!     posts.execute("UPDATE posts SET title = $1 WHERE uid = $2", &params![title, uid])?;
//!     let rows = posts.query("SELECT slug FROM posts WHERE uid = $1", &params![uid])?;
//!     (0..rows.len()).map(|row| rows.get(row, "slug")).collect()
//! }
//! ```

use crate::Fault;
pub use crate::bindings::stage::stagehost::stage::sql::{
    Connection, DatabaseError, Error, Rows, Value,
};

/// SQLSTATE of a transaction that lost a race against another and would do better the next time.
const LOST_RACES: [&str; 2] = ["40001", "40P01"];

/// The parameters of a statement, each of a type that converts into a [`Value`](crate::sql::Value).
///
/// ```
/// use stagehost::{params, sql::Value};
/// let none: Option<i64> = None;
/// assert_eq!(params!["a", 7, none], [Value::Text("a".to_owned()), Value::Int64(7), Value::Null]);
/// ```
#[macro_export]
macro_rules! params {
    ($($param:expr),* $(,)?) => {
        [$($crate::sql::Value::from($param)),*]
    };
}

impl Rows {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The value in a row, from 0, and a column, by name; `Option<T>` takes NULL too.
    ///
    /// A row or column that is not there and a value of another type are rejected.
    pub fn get<T: FromValue>(&self, row: usize, column: &str) -> Result<T, Fault> {
        let at = self
            .columns
            .iter()
            .position(|name| name == column)
            .ok_or_else(|| Fault::Reject(format!("sql: the answer has no column `{column}`")))?;
        let value = self
            .rows
            .get(row)
            .and_then(|values| values.get(at))
            .ok_or_else(|| {
                Fault::Reject(format!(
                    "sql: the answer has no row {row}, it has {}",
                    self.len()
                ))
            })?;
        T::from_value(value).ok_or_else(|| {
            Fault::Reject(format!(
                "sql: `{column}` of row {row} is of another type than asked for: {value:?}"
            ))
        })
    }
}

impl DatabaseError {
    /// Whether the transaction lost a race (serialization failure, deadlock) and is worth a retry.
    pub fn is_lost_race(&self) -> bool {
        self.sqlstate
            .as_deref()
            .is_some_and(|state| LOST_RACES.contains(&state))
    }

    /// The database's words with SQLSTATE and constraint, where it gave them.
    pub fn describe(&self) -> String {
        let state = self.sqlstate.as_ref().map(|s| format!("SQLSTATE {s}"));
        let constraint = self.constraint.as_ref().map(|c| format!("constraint {c}"));
        let details: Vec<String> = state.into_iter().chain(constraint).collect();
        if details.is_empty() {
            return self.message.clone();
        }
        format!("{} ({})", self.message, details.join(", "))
    }
}

/// A type that a column's value can be read as.
pub trait FromValue: Sized {
    /// The value, or `None` where it is of another type.
    fn from_value(value: &Value) -> Option<Self>;
}

impl<T: FromValue> FromValue for Option<T> {
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Null => Some(None),
            value => T::from_value(value).map(Some),
        }
    }
}

impl FromValue for Value {
    fn from_value(value: &Value) -> Option<Self> {
        Some(value.clone())
    }
}

/// What has a text form: text, UUID, decimal, JSON.
impl FromValue for String {
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Text(text) | Value::Uuid(text) | Value::Decimal(text) | Value::Json(text) => {
                Some(text.clone())
            }
            _ => None,
        }
    }
}

/// Truth values, and SQLite's 0 and 1.
impl FromValue for bool {
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Boolean(truth) => Some(*truth),
            Value::Int64(0) => Some(false),
            Value::Int64(1) => Some(true),
            _ => None,
        }
    }
}

/// Both ways between a Rust type and one kind of value.
macro_rules! kinds {
    ($($kind:ident: $type:ty),* $(,)?) => {$(
        impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Self::$kind(value)
            }
        }

        impl FromValue for $type {
            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    Value::$kind(value) => Some(value.clone()),
                    _ => None,
                }
            }
        }
    )*};
}

kinds! {
    Int64: i64,
    Float64: f64,
    Bytes: Vec<u8>,
    TextArray: Vec<String>,
    Int64Array: Vec<i64>,
    Float64Array: Vec<f64>,
    BytesArray: Vec<Vec<u8>>,
}

/// Rust types that convert into one kind of value without loss.
macro_rules! into_kinds {
    ($($type:ty => $kind:ident($convert:expr)),* $(,)?) => {$(
        impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Self::$kind($convert(value))
            }
        }
    )*};
}

into_kinds! {
    bool => Boolean(std::convert::identity),
    i8 => Int64(i64::from),
    i16 => Int64(i64::from),
    i32 => Int64(i64::from),
    u8 => Int64(i64::from),
    u16 => Int64(i64::from),
    u32 => Int64(i64::from),
    f32 => Float64(f64::from),
    String => Text(std::convert::identity),
    &String => Text(String::clone),
    &str => Text(str::to_owned),
    &[u8] => Bytes(<[u8]>::to_vec),
    &Vec<u8> => Bytes(Vec::clone),
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_take_the_kind_of_their_type() {
        let text = String::from("t");
        let missing: Option<&str> = None;
        assert_eq!(
            params![
                &text,
                "t",
                1,
                2u32,
                1.5,
                true,
                missing,
                Some(3),
                vec![1u8],
                vec!["a".to_owned()]
            ],
            [
                Value::Text("t".to_owned()),
                Value::Text("t".to_owned()),
                Value::Int64(1),
                Value::Int64(2),
                Value::Float64(1.5),
                Value::Boolean(true),
                Value::Null,
                Value::Int64(3),
                Value::Bytes(vec![1]),
                Value::TextArray(vec!["a".to_owned()]),
            ]
        );
    }

    #[test]
    fn cells_are_read_by_row_and_name() {
        let rows = Rows {
            columns: vec!["id".to_owned(), "name".to_owned(), "live".to_owned()],
            rows: vec![
                vec![
                    Value::Int64(7),
                    Value::Text("seven".to_owned()),
                    Value::Int64(1),
                ],
                vec![Value::Int64(8), Value::Null, Value::Boolean(false)],
            ],
        };
        assert_eq!((rows.len(), rows.is_empty()), (2, false));
        assert_eq!(rows.get::<i64>(0, "id"), Ok(7));
        assert_eq!(rows.get::<String>(0, "name"), Ok("seven".to_owned()));
        assert_eq!(rows.get::<Option<String>>(1, "name"), Ok(None));
        assert_eq!(rows.get::<bool>(0, "live"), Ok(true));
        assert_eq!(rows.get::<bool>(1, "live"), Ok(false));
        let wrong = [
            (
                rows.get::<String>(1, "name").unwrap_err(),
                "sql: `name` of row 1 is of another type than asked for: Value::Null",
            ),
            (
                rows.get::<i64>(0, "nmae").unwrap_err(),
                "sql: the answer has no column `nmae`",
            ),
            (
                rows.get::<i64>(2, "id").unwrap_err(),
                "sql: the answer has no row 2, it has 2",
            ),
        ];
        for (fault, why) in wrong {
            assert_eq!(fault, Fault::reject(why));
        }
    }
}
