//! PostgreSQL's values and ours.

use std::error::Error as StdError;

use bytes::{BufMut, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::Oid;
use postgres_protocol::message::backend::DataRowBody;
use postgres_protocol::types::{
    array_from_sql, array_to_sql, bool_from_sql, float4_from_sql, float8_from_sql, int2_from_sql,
    int4_from_sql, int8_from_sql, oid_from_sql, text_from_sql, uuid_from_sql,
};
use postgres_protocol::{IsNull, types};
use postgres_types::Type;
use uuid::Uuid;

use super::super::decimal;
use super::super::{Error, Value};

type BoxedError = Box<dyn StdError + Send + Sync>;

/// Bytes of parameters that may be sent beside others.
const MAX_SMALL_BYTES: usize = 16 * 1024;

/// A statement's parameters as they are sent.
#[derive(Default)]
pub(super) struct Parameters {
    types: Vec<Oid>,
    bytes: BytesMut,
}

impl Parameters {
    pub(super) fn of(values: &[Value]) -> Result<Self, Error> {
        let mut parameters = Self::default();
        for value in values {
            parameters.add(value)?;
        }
        Ok(parameters)
    }

    /// Without the values: what is left is what a plan rests on.
    pub(super) fn nulls(values: &[Value]) -> Result<Self, Error> {
        let of = Self::of(values)?;
        let mut nulls = Self::default();
        for oid in of.types {
            nulls.types.push(oid);
            nulls.bytes.put_i32(-1);
        }
        Ok(nulls)
    }

    pub(super) fn types(&self) -> &[Oid] {
        &self.types
    }

    /// Whether they go beside others.
    pub(super) fn is_small(&self) -> bool {
        self.bytes.len() <= MAX_SMALL_BYTES
    }

    /// Their number, and each with its length before it.
    pub(super) fn write(&self, output: &mut BytesMut) {
        output.put_u16(u16::try_from(self.types.len()).unwrap_or(u16::MAX));
        output.put_slice(&self.bytes);
    }

    pub(super) fn add(&mut self, value: &Value) -> Result<(), Error> {
        match value {
            // The server infers the type, as it does for a literal NULL.
            Value::Null => self.null(Type::UNKNOWN),
            Value::Boolean(value) => self.put(Type::BOOL, &[u8::from(*value)])?,
            Value::Int64(value) => self.put(Type::INT8, &value.to_be_bytes())?,
            Value::Float64(value) => self.put(Type::FLOAT8, &value.to_be_bytes())?,
            Value::Text(value) => self.put(Type::TEXT, value.as_bytes())?,
            Value::Bytes(value) => self.put(Type::BYTEA, value)?,
            Value::Timestamp(value) => {
                self.put(Type::TIMESTAMPTZ, &timestamp(*value)?.to_be_bytes())?;
            }
            Value::Uuid(value) => self.put(Type::UUID, uuid(value)?.as_bytes())?,
            Value::Decimal(value) => {
                let bytes = decimal::encode(value).map_err(Error::Unsupported)?;
                self.put(Type::NUMERIC, &bytes)?;
            }
            Value::Json(value) => {
                // The version of the format, then the text.
                self.with(Type::JSONB, |bytes| {
                    bytes.put_u8(1);
                    bytes.put_slice(value.as_bytes());
                    Ok(())
                })?;
            }
            Value::TextArray(items) => {
                self.array(Type::TEXT_ARRAY, Type::TEXT, items, |item, bytes| {
                    bytes.put_slice(item.as_bytes());
                })?
            }
            Value::Int64Array(items) => {
                self.array(Type::INT8_ARRAY, Type::INT8, items, |item, bytes| {
                    bytes.put_i64(*item);
                })?
            }
            Value::Float64Array(items) => {
                self.array(Type::FLOAT8_ARRAY, Type::FLOAT8, items, |item, bytes| {
                    bytes.put_f64(*item);
                })?
            }
            Value::BytesArray(items) => {
                self.array(Type::BYTEA_ARRAY, Type::BYTEA, items, |item, bytes| {
                    bytes.put_slice(item);
                })?
            }
        }
        Ok(())
    }

    pub(super) fn text(&mut self, value: &str) -> Result<(), Error> {
        self.put(Type::TEXT, value.as_bytes())
    }

    pub(super) fn bytea(&mut self, value: &[u8]) -> Result<(), Error> {
        self.put(Type::BYTEA, value)
    }

    pub(super) fn int4(&mut self, value: i32) {
        self.types.push(Type::INT4.oid());
        self.bytes.put_i32(4);
        self.bytes.put_i32(value);
    }

    pub(super) fn int8(&mut self, value: i64) {
        self.types.push(Type::INT8.oid());
        self.bytes.put_i32(8);
        self.bytes.put_i64(value);
    }

    pub(super) fn null(&mut self, of: Type) {
        self.types.push(of.oid());
        self.bytes.put_i32(-1);
    }

    fn put(&mut self, of: Type, value: &[u8]) -> Result<(), Error> {
        self.with(of, |bytes| {
            bytes.put_slice(value);
            Ok(())
        })
    }

    fn array<T>(
        &mut self,
        of: Type,
        item: Type,
        items: &[T],
        put: fn(&T, &mut BytesMut),
    ) -> Result<(), Error> {
        self.with(of, |bytes| {
            let dimension = types::ArrayDimension {
                len: i32::try_from(items.len())?,
                lower_bound: 1,
            };
            let dimensions = (!items.is_empty()).then_some(dimension);
            let put = |item, bytes: &mut BytesMut| {
                put(item, bytes);
                Ok(IsNull::No)
            };
            array_to_sql(dimensions, item.oid(), items, put, bytes)
        })
    }

    fn with(
        &mut self,
        of: Type,
        put: impl FnOnce(&mut BytesMut) -> Result<(), BoxedError>,
    ) -> Result<(), Error> {
        let unsupported = |error: BoxedError| Error::Unsupported(error.to_string());
        self.types.push(of.oid());
        let begin = self.bytes.len();
        self.bytes.put_i32(0);
        put(&mut self.bytes).map_err(unsupported)?;
        let length = i32::try_from(self.bytes.len() - begin - 4);
        let length = length.map_err(|error| unsupported(error.into()))?;
        self.bytes[begin..begin + 4].copy_from_slice(&length.to_be_bytes());
        Ok(())
    }
}

/// A column of an answer.
pub(super) struct Column {
    pub(super) name: String,
    pub(super) kind: Kind,
}

/// A column's type.
pub(super) struct Kind {
    name: String,
    shape: Shape,
}

/// How a type's values come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Void,
    Boolean,
    Int2,
    Int4,
    Int8,
    Oid,
    Float4,
    Float8,
    Bytes,
    Timestamp,
    Uuid,
    Numeric,
    Json,
    Jsonb,
    Text,
    Int2Array,
    Int4Array,
    Int8Array,
    Float4Array,
    Float8Array,
    BytesArray,
    TextArray,
    /// It has no place in [`Value`].
    Other,
}

/// A type that every server has; `None` for one that has to be looked up.
pub(super) fn kind(oid: Oid) -> Option<Kind> {
    let of = Type::from_oid(oid)?;
    let shape = match of {
        Type::VOID => Shape::Void,
        Type::BOOL => Shape::Boolean,
        Type::INT2 => Shape::Int2,
        Type::INT4 => Shape::Int4,
        Type::INT8 => Shape::Int8,
        Type::OID => Shape::Oid,
        Type::FLOAT4 => Shape::Float4,
        Type::FLOAT8 => Shape::Float8,
        Type::BYTEA => Shape::Bytes,
        Type::TIMESTAMPTZ | Type::TIMESTAMP => Shape::Timestamp,
        Type::UUID => Shape::Uuid,
        Type::NUMERIC => Shape::Numeric,
        Type::JSON => Shape::Json,
        Type::JSONB => Shape::Jsonb,
        Type::INT2_ARRAY => Shape::Int2Array,
        Type::INT4_ARRAY => Shape::Int4Array,
        Type::INT8_ARRAY => Shape::Int8Array,
        Type::FLOAT4_ARRAY => Shape::Float4Array,
        Type::FLOAT8_ARRAY => Shape::Float8Array,
        Type::BYTEA_ARRAY => Shape::BytesArray,
        Type::TEXT_ARRAY | Type::VARCHAR_ARRAY | Type::BPCHAR_ARRAY | Type::NAME_ARRAY => {
            Shape::TextArray
        }
        Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME | Type::UNKNOWN => Shape::Text,
        _ => Shape::Other,
    };
    let name = match of.name().strip_prefix('_') {
        Some(item) => format!("{}[]", item.to_uppercase()),
        None => of.name().to_uppercase(),
    };
    Some(Kind { name, shape })
}

/// A type that was looked up: its name, and whether its values come as their text.
pub(super) fn kind_of_row(row: &[Value]) -> Kind {
    match row {
        [Value::Text(name), Value::Boolean(true)] => Kind {
            name: name.clone(),
            shape: Shape::Text,
        },
        [Value::Text(name), ..] => Kind::other(name),
        _ => Kind::other("an unknown name"),
    }
}

impl Kind {
    pub(super) fn other(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            shape: Shape::Other,
        }
    }
}

/// The names of columns.
pub(super) fn names(columns: &[Column]) -> Vec<String> {
    columns.iter().map(|column| column.name.clone()).collect()
}

/// A row's values.
pub(super) fn row(columns: &[Column], row: &DataRowBody) -> Result<Vec<Value>, Error> {
    let mut values = Vec::with_capacity(columns.len());
    let mut ranges = row.ranges();
    for column in columns {
        let range = ranges.next();
        let range = range.map_err(|error| Error::Unavailable(error.to_string()))?;
        let bytes = range.flatten().map(|range| &row.buffer()[range]);
        values.push(value(column, bytes)?);
    }
    Ok(values)
}

fn value(column: &Column, bytes: Option<&[u8]>) -> Result<Value, Error> {
    let unsupported = |why: String| {
        let Column { name, kind } = column;
        Error::Unsupported(format!("column {name:?} of type {}: {why}", kind.name))
    };
    match (column.kind.shape, bytes) {
        (Shape::Other, _) => Err(unsupported(
            "cast it to a type that this interface has, such as text".into(),
        )),
        (_, None) => Ok(Value::Null),
        (shape, Some(bytes)) => {
            decode(shape, bytes).map_err(|error| unsupported(error.to_string()))
        }
    }
}

fn decode(shape: Shape, bytes: &[u8]) -> Result<Value, BoxedError> {
    Ok(match shape {
        Shape::Void | Shape::Other => Value::Null,
        Shape::Boolean => Value::Boolean(bool_from_sql(bytes)?),
        Shape::Int2 => Value::Int64(int2_from_sql(bytes)?.into()),
        Shape::Int4 => Value::Int64(int4_from_sql(bytes)?.into()),
        Shape::Int8 => Value::Int64(int8_from_sql(bytes)?),
        Shape::Oid => Value::Int64(oid_from_sql(bytes)?.into()),
        Shape::Float4 => Value::Float64(float4_from_sql(bytes)?.into()),
        Shape::Float8 => Value::Float64(float8_from_sql(bytes)?),
        Shape::Bytes => Value::Bytes(bytes.to_vec()),
        Shape::Timestamp => Value::Timestamp(unix_time(bytes)?),
        Shape::Uuid => Value::Uuid(Uuid::from_bytes(uuid_from_sql(bytes)?).to_string()),
        Shape::Numeric => Value::Decimal(decimal::decode(bytes)?),
        Shape::Json => Value::Json(text(bytes)?),
        Shape::Jsonb => Value::Json(text(bytes.get(1..).ok_or("it is cut off")?)?),
        Shape::Text => Value::Text(text(bytes)?),
        Shape::Int2Array => {
            Value::Int64Array(array(bytes, |item| Ok(int2_from_sql(item)?.into()))?)
        }
        Shape::Int4Array => {
            Value::Int64Array(array(bytes, |item| Ok(int4_from_sql(item)?.into()))?)
        }
        Shape::Int8Array => Value::Int64Array(array(bytes, int8_from_sql)?),
        Shape::Float4Array => {
            Value::Float64Array(array(bytes, |item| Ok(float4_from_sql(item)?.into()))?)
        }
        Shape::Float8Array => Value::Float64Array(array(bytes, float8_from_sql)?),
        Shape::BytesArray => Value::BytesArray(array(bytes, |item| Ok(item.to_vec()))?),
        Shape::TextArray => Value::TextArray(array(bytes, text)?),
    })
}

fn text(bytes: &[u8]) -> Result<String, BoxedError> {
    Ok(text_from_sql(bytes)?.to_owned())
}

fn array<T>(
    bytes: &[u8],
    item: impl Fn(&[u8]) -> Result<T, BoxedError>,
) -> Result<Vec<T>, BoxedError> {
    let array = array_from_sql(bytes)?;
    let dimensions = array.dimensions().count()?;
    if dimensions > 1 {
        return Err(format!("the array has {dimensions} dimensions").into());
    }
    let mut items = Vec::new();
    let mut values = array.values();
    while let Some(value) = values.next()? {
        items.push(item(value.ok_or("the array has a NULL in it")?)?);
    }
    Ok(items)
}

/// Microseconds from the Unix epoch to PostgreSQL's, which is the year 2000.
const EPOCH: i64 = 946_684_800_000_000;

fn timestamp(unix: i64) -> Result<i64, Error> {
    unix.checked_sub(EPOCH)
        // The least one is PostgreSQL's -infinity.
        .filter(|since| *since != i64::MIN)
        .ok_or_else(|| Error::Unsupported("the timestamp is out of PostgreSQL's range".into()))
}

fn unix_time(bytes: &[u8]) -> Result<i64, BoxedError> {
    let since = i64::from_be_bytes(bytes.try_into()?);
    if since == i64::MAX || since == i64::MIN {
        return Err("it is infinite".into());
    }
    Ok(since.checked_add(EPOCH).ok_or("it is out of range")?)
}

fn uuid(text: &str) -> Result<Uuid, Error> {
    Uuid::parse_str(text)
        .map_err(|error| Error::Unsupported(format!("{text:?} is no UUID: {error}")))
}
