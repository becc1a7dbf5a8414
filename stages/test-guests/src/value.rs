//! SQL values as JSON: `"null"` or an object with the WIT case's name, `{"int64": 7}`, `{"bytes":
//! [1, 2]}`. A parameter may also be a plain JSON null, truth value, number or text.

use serde_json::{Value as Json, json};
use stagehost::sql::{Rows, Value};

/// A parameter from JSON; anything else than what the module says is a panic.
pub fn param(json: &Json) -> Value {
    match json {
        Json::Null => Value::Null,
        Json::Bool(truth) => Value::Boolean(*truth),
        Json::Number(n) => n.as_i64().map_or_else(
            || Value::Float64(n.as_f64().expect("a number")),
            Value::Int64,
        ),
        Json::String(text) => Value::Text(text.clone()),
        Json::Object(object) => {
            let (kind, value) = object.iter().next().expect("{\"kind\": value}");
            tagged(kind, value.clone())
        }
        Json::Array(_) => panic!("not a parameter: {json}"),
    }
}

fn tagged(kind: &str, value: Json) -> Value {
    fn read<T: serde::de::DeserializeOwned>(value: Json) -> T {
        serde_json::from_value(value).expect("a parameter of its kind")
    }
    match kind {
        "boolean" => Value::Boolean(read(value)),
        "int64" => Value::Int64(read(value)),
        "float64" => Value::Float64(read(value)),
        "text" => Value::Text(read(value)),
        "bytes" => Value::Bytes(read(value)),
        "timestamp" => Value::Timestamp(read(value)),
        "uuid" => Value::Uuid(read(value)),
        "decimal" => Value::Decimal(read(value)),
        "json" => Value::Json(read(value)),
        "text-array" => Value::TextArray(read(value)),
        "int64-array" => Value::Int64Array(read(value)),
        "float64-array" => Value::Float64Array(read(value)),
        "bytes-array" => Value::BytesArray(read(value)),
        kind => panic!("not a kind of parameter: {kind}"),
    }
}

/// A column's value as JSON.
fn column(value: &Value) -> Json {
    match value {
        Value::Null => json!("null"),
        Value::Boolean(v) => json!({ "boolean": v }),
        Value::Int64(v) => json!({ "int64": v }),
        Value::Float64(v) => json!({ "float64": v }),
        Value::Text(v) => json!({ "text": v }),
        Value::Bytes(v) => json!({ "bytes": v }),
        Value::Timestamp(v) => json!({ "timestamp": v }),
        Value::Uuid(v) => json!({ "uuid": v }),
        Value::Decimal(v) => json!({ "decimal": v }),
        Value::Json(v) => json!({ "json": v }),
        Value::TextArray(v) => json!({ "text-array": v }),
        Value::Int64Array(v) => json!({ "int64-array": v }),
        Value::Float64Array(v) => json!({ "float64-array": v }),
        Value::BytesArray(v) => json!({ "bytes-array": v }),
    }
}

/// An answer as JSON: `{"columns": […], "rows": [[…], …]}`.
pub fn rows(rows: &Rows) -> Json {
    let cells: Vec<Vec<Json>> = rows
        .rows
        .iter()
        .map(|row| row.iter().map(column).collect())
        .collect();
    json!({ "columns": rows.columns, "rows": cells })
}
