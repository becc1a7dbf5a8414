//! PostgreSQL's values and ours.

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{
    PgArgumentBuffer, PgArguments, PgColumn, PgRow, PgTypeInfo, PgTypeKind, PgValueRef, Postgres,
};
use sqlx::{Arguments, Column, Encode, Row, Type, TypeInfo, ValueRef};
use uuid::Uuid;

use super::super::decimal;
use super::super::{Error, Value};

/// Adds a parameter; answers a letter that stands for the type that it was given.
pub(super) fn bind(arguments: &mut PgArguments, value: &Value) -> Result<char, Error> {
    let (letter, outcome) = match value {
        Value::Null => ('n', arguments.add(Wire(UNKNOWN, None))),
        Value::Boolean(value) => ('b', arguments.add(*value)),
        Value::Int64(value) => ('i', arguments.add(*value)),
        Value::Float64(value) => ('f', arguments.add(*value)),
        Value::Text(value) => ('t', arguments.add(value.as_str())),
        Value::Bytes(value) => ('x', arguments.add(value.as_slice())),
        Value::Timestamp(value) => (
            'm',
            arguments.add(Wire(TIMESTAMPTZ, Some(timestamp(*value)?))),
        ),
        Value::Uuid(value) => ('u', arguments.add(uuid(value)?)),
        Value::Decimal(value) => {
            let bytes = decimal::encode(value).map_err(Error::Unsupported)?;
            ('d', arguments.add(Wire(NUMERIC, Some(bytes))))
        }
        Value::Json(value) => ('j', arguments.add(Wire(JSONB, Some(jsonb(value))))),
        Value::TextArray(value) => ('T', arguments.add(value.as_slice())),
        Value::Int64Array(value) => ('I', arguments.add(value.as_slice())),
        Value::Float64Array(value) => ('F', arguments.add(value.as_slice())),
        Value::BytesArray(value) => ('X', arguments.add(value.as_slice())),
    };
    outcome.map_err(|error| Error::Unsupported(error.to_string()))?;
    Ok(letter)
}

/// The names of columns.
pub(super) fn names(columns: &[PgColumn]) -> Vec<String> {
    columns.iter().map(|c| c.name().to_owned()).collect()
}

/// A row's values.
pub(super) fn row(row: &PgRow) -> Result<Vec<Value>, Error> {
    (0..row.len()).map(|index| column(row, index)).collect()
}

fn column(row: &PgRow, index: usize) -> Result<Value, Error> {
    let column = &row.columns()[index];
    let unsupported = |why: String| {
        let name = column.name();
        let kind = column.type_info().name();
        Error::Unsupported(format!("column {name:?} of type {kind}: {why}"))
    };
    decode(row, index, column.type_info())
        .map_err(|error| unsupported(error.to_string()))?
        .ok_or_else(|| {
            unsupported("cast it to a type that this interface has, such as text".into())
        })
}

/// `None` for a type that has no place in [`Value`].
fn decode(row: &PgRow, index: usize, kind: &PgTypeInfo) -> Result<Option<Value>, BoxDynError> {
    let raw = row.try_get_raw(index)?;
    let null = raw.is_null();
    let value = match kind.name() {
        "VOID" => Value::Null,
        _ if null && is_known(kind) => Value::Null,
        "BOOL" => Value::Boolean(row.try_get(index)?),
        "INT2" => Value::Int64(row.try_get::<i16, _>(index)?.into()),
        "INT4" => Value::Int64(row.try_get::<i32, _>(index)?.into()),
        "INT8" => Value::Int64(row.try_get(index)?),
        "OID" => Value::Int64(row.try_get::<Oid, _>(index)?.0.into()),
        "FLOAT4" => Value::Float64(row.try_get::<f32, _>(index)?.into()),
        "FLOAT8" => Value::Float64(row.try_get(index)?),
        "BYTEA" => Value::Bytes(row.try_get(index)?),
        "TIMESTAMPTZ" | "TIMESTAMP" => Value::Timestamp(unix_time(&raw)?),
        "UUID" => Value::Uuid(row.try_get::<Uuid, _>(index)?.to_string()),
        "NUMERIC" => Value::Decimal(decimal::decode(raw.as_bytes()?)?),
        "JSON" => Value::Json(text(raw.as_bytes()?)?),
        "JSONB" => Value::Json(text(raw.as_bytes()?.get(1..).ok_or("it is cut off")?)?),
        "INT2[]" => Value::Int64Array(array::<i16, _>(row, index, i64::from)?),
        "INT4[]" => Value::Int64Array(array::<i32, _>(row, index, i64::from)?),
        "INT8[]" => Value::Int64Array(array::<i64, _>(row, index, |item| item)?),
        "FLOAT4[]" => Value::Float64Array(array::<f32, _>(row, index, f64::from)?),
        "FLOAT8[]" => Value::Float64Array(array::<f64, _>(row, index, |item| item)?),
        "BYTEA[]" => Value::BytesArray(array::<Vec<u8>, _>(row, index, |item| item)?),
        name if TEXT_ARRAYS.contains(&name) => {
            Value::TextArray(array::<String, _>(row, index, |item| item)?)
        }
        _ if is_text(kind) => Value::Text(text(raw.as_bytes()?)?),
        _ => return Ok(None),
    };
    Ok(Some(value))
}

const TEXT_ARRAYS: &[&str] = &["TEXT[]", "VARCHAR[]", "CHAR[]", "NAME[]"];
const OTHERS: &[&str] = &[
    "BOOL",
    "INT2",
    "INT4",
    "INT8",
    "OID",
    "FLOAT4",
    "FLOAT8",
    "BYTEA",
    "TIMESTAMPTZ",
    "TIMESTAMP",
    "UUID",
    "NUMERIC",
    "JSON",
    "JSONB",
    "INT2[]",
    "INT4[]",
    "INT8[]",
    "FLOAT4[]",
    "FLOAT8[]",
    "BYTEA[]",
];

fn is_known(kind: &PgTypeInfo) -> bool {
    OTHERS.contains(&kind.name()) || TEXT_ARRAYS.contains(&kind.name()) || is_text(kind)
}

/// Types whose binary form is their text.
fn is_text(kind: &PgTypeInfo) -> bool {
    matches!(
        kind.name(),
        "TEXT" | "VARCHAR" | "CHAR" | "NAME" | "UNKNOWN" | "citext"
    ) || matches!(kind.kind(), PgTypeKind::Enum(_))
}

fn text(bytes: &[u8]) -> Result<String, BoxDynError> {
    Ok(std::str::from_utf8(bytes)?.to_owned())
}

fn array<T, U>(row: &PgRow, index: usize, item: fn(T) -> U) -> Result<Vec<U>, BoxDynError>
where
    for<'r> Vec<Option<T>>: sqlx::Decode<'r, Postgres> + Type<Postgres>,
{
    row.try_get::<Vec<Option<T>>, _>(index)?
        .into_iter()
        .map(|value| {
            value
                .map(item)
                .ok_or_else(|| "the array has a NULL in it".into())
        })
        .collect()
}

/// A parameter in PostgreSQL's own binary form; `None` is NULL.
struct Wire(Oid, Option<Vec<u8>>);

/// The server infers the type, as it does for a literal NULL.
const UNKNOWN: Oid = Oid(705);
const TIMESTAMPTZ: Oid = Oid(1184);
const NUMERIC: Oid = Oid(1700);
const JSONB: Oid = Oid(3802);

impl Type<Postgres> for Wire {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(UNKNOWN)
    }
}

impl Encode<'_, Postgres> for Wire {
    fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        match &self.1 {
            Some(bytes) => {
                buffer.extend_from_slice(bytes);
                Ok(IsNull::No)
            }
            None => Ok(IsNull::Yes),
        }
    }

    fn produces(&self) -> Option<PgTypeInfo> {
        Some(PgTypeInfo::with_oid(self.0))
    }
}

/// Microseconds from the Unix epoch to PostgreSQL's, which is the year 2000.
const EPOCH: i64 = 946_684_800_000_000;

fn timestamp(unix: i64) -> Result<Vec<u8>, Error> {
    let since = unix
        .checked_sub(EPOCH)
        // The least one is PostgreSQL's -infinity.
        .filter(|since| *since != i64::MIN)
        .ok_or_else(|| Error::Unsupported("the timestamp is out of PostgreSQL's range".into()))?;
    Ok(since.to_be_bytes().to_vec())
}

fn unix_time(raw: &PgValueRef<'_>) -> Result<i64, BoxDynError> {
    let since = i64::from_be_bytes(raw.as_bytes()?.try_into()?);
    if since == i64::MAX || since == i64::MIN {
        return Err("it is infinite".into());
    }
    Ok(since.checked_add(EPOCH).ok_or("it is out of range")?)
}

fn uuid(text: &str) -> Result<Uuid, Error> {
    Uuid::parse_str(text)
        .map_err(|error| Error::Unsupported(format!("{text:?} is no UUID: {error}")))
}

/// The version of the format, then the text.
fn jsonb(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() + 1);
    bytes.push(1);
    bytes.extend_from_slice(text.as_bytes());
    bytes
}
