//! SQLite's values and ours.
//!
//! SQLite has five types of value, so the others are kept as text (a timestamp as `YYYY-MM-DD
//! HH:MM:SS.ffffff`, UTC, which its date functions read), and a column's declared type says what to make
//! of it when it is read.

use std::str::Utf8Error;

use rusqlite::types::{Value as SqlValue, ValueRef};
use rusqlite::{Column, Statement};
use serde::de::IgnoredAny;
use time::{Date, Month, OffsetDateTime, Time, UtcOffset};
use uuid::Uuid;

use super::super::{Error, Value};
use super::super::{database_error, decimal};

/// Digits that SQLite keeps of a text that is a number, in a column declared `DECIMAL`, `NUMERIC` or `JSON`.
const EXACT_DIGITS: usize = 15;

/// A parameter as SQLite takes it.
pub(super) fn encode(value: &Value) -> Result<SqlValue, Error> {
    Ok(match value {
        Value::Null => SqlValue::Null,
        Value::Boolean(value) => SqlValue::Integer(i64::from(*value)),
        Value::Int64(value) => SqlValue::Integer(*value),
        Value::Float64(value) => SqlValue::Real(finite(*value)?),
        Value::Text(value) => SqlValue::Text(value.clone()),
        Value::Bytes(value) => SqlValue::Blob(value.clone()),
        Value::Timestamp(value) => SqlValue::Text(timestamp(*value)?),
        Value::Uuid(value) => SqlValue::Text(uuid(value)?),
        Value::Decimal(value) => SqlValue::Text(exact(value)?),
        Value::Json(value) => SqlValue::Text(json(value)?),
        Value::TextArray(value) => SqlValue::Text(json_array(value)?),
        Value::Int64Array(value) => SqlValue::Text(json_array(value)?),
        Value::Float64Array(value) => {
            for item in value {
                if !item.is_finite() {
                    return Err(unsupported("JSON has no infinite numbers and no NaN"));
                }
            }
            SqlValue::Text(json_array(value)?)
        }
        Value::BytesArray(_) => return Err(unsupported("SQLite has no arrays of bytes")),
    })
}

fn unsupported(why: &str) -> Error {
    Error::Unsupported(why.to_owned())
}

/// SQLite makes NULL of a NaN.
fn finite(number: f64) -> Result<f64, Error> {
    if number.is_nan() {
        return Err(unsupported("SQLite has no NaN"));
    }
    Ok(number)
}

fn uuid(text: &str) -> Result<String, Error> {
    match Uuid::parse_str(text) {
        Ok(uuid) => Ok(uuid.to_string()),
        Err(error) => Err(Error::Unsupported(format!("{text:?} is no UUID: {error}"))),
    }
}

/// A column declared `DECIMAL` would round silently, and the column is not known here.
fn exact(text: &str) -> Result<String, Error> {
    let digits = decimal::significant_digits(text)
        .ok_or_else(|| Error::Unsupported(format!("{text:?} is not a decimal number")))?;
    if digits > EXACT_DIGITS {
        return Err(Error::Unsupported(format!(
            "SQLite keeps {EXACT_DIGITS} digits of a decimal; send longer ones as text"
        )));
    }
    Ok(text.to_owned())
}

fn json(text: &str) -> Result<String, Error> {
    const INVALID_TEXT: &str = "22P02";
    if decimal::significant_digits(text.trim()).is_some_and(|digits| digits > EXACT_DIGITS) {
        return Err(Error::Unsupported(format!(
            "SQLite keeps {EXACT_DIGITS} digits of a JSON document that is a number"
        )));
    }
    match serde_json::from_str::<IgnoredAny>(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => {
            let message = format!("invalid input syntax for type json: {error}");
            Err(database_error(INVALID_TEXT, message))
        }
    }
}

fn json_array<T: serde::Serialize>(items: &[T]) -> Result<String, Error> {
    serde_json::to_string(items).map_err(|error| unsupported(&error.to_string()))
}

/// `YYYY-MM-DD HH:MM:SS.ffffff`.
fn timestamp(micros: i64) -> Result<String, Error> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1000)
        .ok()
        .filter(|time| (0..=9999).contains(&time.year()))
        .map(|time| {
            format!(
                "{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:06}",
                time.year(),
                u8::from(time.month()),
                time.day(),
                time.hour(),
                time.minute(),
                time.second(),
                time.microsecond()
            )
        })
        .ok_or_else(|| unsupported("SQLite has timestamps of the years 0 to 9999"))
}

/// The names of an answer's columns, and what they were declared to hold.
pub(super) fn columns(statement: &Statement<'_>) -> (Vec<String>, Vec<Option<Declared>>) {
    let column = |column: &Column<'_>| {
        let declared = column.decl_type().and_then(Declared::parse);
        (column.name().to_owned(), declared)
    };
    statement.columns().iter().map(column).unzip()
}

/// A value of an answer.
pub(super) fn decode(value: ValueRef<'_>, declared: Option<Declared>) -> Result<Value, Utf8Error> {
    Ok(match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => integer(number, declared),
        ValueRef::Real(number) => real(number, declared),
        ValueRef::Text(bytes) => text(std::str::from_utf8(bytes)?.to_owned(), declared),
        ValueRef::Blob(bytes) => Value::Bytes(bytes.to_owned()),
    })
}

fn integer(number: i64, declared: Option<Declared>) -> Value {
    match (declared, number) {
        (Some(Declared::Boolean), 0 | 1) => Value::Boolean(number == 1),
        (Some(Declared::Decimal), _) => Value::Decimal(number.to_string()),
        (Some(Declared::Json), _) => Value::Json(number.to_string()),
        _ => Value::Int64(number),
    }
}

fn real(number: f64, declared: Option<Declared>) -> Value {
    match declared {
        Some(Declared::Decimal) if number.is_finite() => Value::Decimal(number.to_string()),
        Some(Declared::Json) if number.is_finite() => Value::Json(number.to_string()),
        _ => Value::Float64(number),
    }
}

/// Text in a column of a declared type that does not look like it stays text.
fn text(text: String, declared: Option<Declared>) -> Value {
    match declared {
        Some(Declared::Timestamp) => match unix_time(&text) {
            Some(micros) => Value::Timestamp(micros),
            None => Value::Text(text),
        },
        Some(Declared::Uuid) if Uuid::parse_str(&text).is_ok() => Value::Uuid(text),
        Some(Declared::Decimal) if decimal::significant_digits(&text).is_some() => {
            Value::Decimal(text)
        }
        Some(Declared::Json) if serde_json::from_str::<IgnoredAny>(&text).is_ok() => {
            Value::Json(text)
        }
        _ => Value::Text(text),
    }
}

/// Microseconds since the Unix epoch of what SQLite's date functions and ISO 8601 write, such as
/// `2026-01-31`, `2026-01-31 12:30:00` or `2026-01-31T12:30:00.25+01:00`. `None` where it is
/// something else, or finer than a microsecond.
fn unix_time(text: &str) -> Option<i64> {
    let (date, rest) = text.split_at_checked(10)?;
    let mut parts = date.split('-');
    let year = number(parts.next()?, 4)?;
    let month = Month::try_from(u8::try_from(number(parts.next()?, 2)?).ok()?).ok()?;
    let day = u8::try_from(number(parts.next()?, 2)?).ok()?;
    let date = Date::from_calendar_date(i32::try_from(year).ok()?, month, day).ok()?;
    let (time, offset) = match rest.strip_prefix([' ', 'T']) {
        Some(rest) => time_of_day(rest)?,
        None if rest.is_empty() => (Time::MIDNIGHT, UtcOffset::UTC),
        None => return None,
    };
    let nanos = date
        .with_time(time)
        .assume_offset(offset)
        .unix_timestamp_nanos();
    i64::try_from(nanos / 1000).ok()
}

fn time_of_day(text: &str) -> Option<(Time, UtcOffset)> {
    let (clock, offset) = match text.find(['Z', '+', '-']) {
        Some(at) => (&text[..at], utc_offset(&text[at..])?),
        None => (text, UtcOffset::UTC),
    };
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    if fraction.is_empty() || fraction.len() > 6 {
        return None;
    }
    let micros = number(fraction, fraction.len())? * 10_u32.pow(6 - fraction.len() as u32);
    let mut parts = clock.split(':');
    let hour = number(parts.next()?, 2)?;
    let minute = number(parts.next()?, 2)?;
    let second = parts.next().map_or(Some(0), |part| number(part, 2))?;
    if parts.next().is_some() {
        return None;
    }
    let time = Time::from_hms_micro(hour as u8, minute as u8, second as u8, micros).ok()?;
    Some((time, offset))
}

fn utc_offset(text: &str) -> Option<UtcOffset> {
    if text == "Z" {
        return Some(UtcOffset::UTC);
    }
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let (hours, minutes) = text[1..].split_once(':')?;
    let hours = i8::try_from(number(hours, 2)?).ok()?;
    let minutes = i8::try_from(number(minutes, 2)?).ok()?;
    UtcOffset::from_hms(sign * hours, sign * minutes, 0).ok()
}

/// A number of exactly so many digits.
fn number(text: &str, digits: usize) -> Option<u32> {
    let all_digits = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit());
    all_digits.then(|| text.parse().ok())?
}

/// What a column was declared to hold, of what SQLite has no type for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Declared {
    Boolean,
    Timestamp,
    Uuid,
    Decimal,
    Json,
}

impl Declared {
    fn parse(text: &str) -> Option<Self> {
        let name = text
            .split('(')
            .next()
            .unwrap_or("")
            .trim()
            .to_ascii_uppercase();
        Some(match name.as_str() {
            "BOOLEAN" | "BOOL" => Self::Boolean,
            "TIMESTAMP"
            | "TIMESTAMPTZ"
            | "DATETIME"
            | "TIMESTAMP WITH TIME ZONE"
            | "TIMESTAMP WITHOUT TIME ZONE" => Self::Timestamp,
            "UUID" => Self::Uuid,
            "DECIMAL" | "NUMERIC" => Self::Decimal,
            "JSON" | "JSONB" => Self::Json,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_times_as_sqlite_and_iso_8601_write_them() {
        for (text, expected) in [
            ("1970-01-01", Some(0)),
            ("1970-01-01 00:00:01", Some(1_000_000)),
            ("1970-01-01T00:01", Some(60_000_000)),
            ("1970-01-01 00:00:00.25", Some(250_000)),
            ("1970-01-01 01:00:00.000001+01:00", Some(1)),
            ("1969-12-31T23:59:59.999999Z", Some(-1)),
            ("2026-02-29", None),
            ("1970-01-01 00:00:00.1234567", None),
            ("1970-01-01 0:00", None),
            ("1970-01-01 00:00:00+1", None),
            ("yesterday", None),
            ("١٩٧٠-٠١", None),
        ] {
            assert_eq!(unix_time(text), expected, "{text}");
        }
    }

    #[test]
    fn times_survive_the_way_there_and_back() {
        for micros in [0, -1, 1_769_862_600_123_456, -62_167_219_200_000_000] {
            let text = timestamp(micros).expect("a year that SQLite has");
            assert_eq!(unix_time(&text), Some(micros), "{text}");
        }
        assert!(timestamp(i64::MAX).is_err());
    }
}
