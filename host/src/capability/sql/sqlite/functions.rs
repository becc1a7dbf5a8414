//! The functions that stages may call, and those of SQLite's that are made anew: it can be interrupted between two
//! instructions, not within one, and these may take a text's length times another's.

use std::collections::HashSet;
use std::sync::Arc;

use memchr::memmem;
use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, Error, Result};

use super::super::MAX_ANSWER_BYTES;
use super::guard::Guard;
use super::pattern;

/// All that takes no longer than its arguments are long. Left out: what loads or tells of the process, what merges JSON by
/// comparing each of its names with each, and whatever is new in SQLite.
const ALLOWED: &[&str] = &[
    "abs",
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "avg",
    "bm25",
    "ceil",
    "ceiling",
    "changes",
    "char",
    "coalesce",
    "concat",
    "concat_ws",
    "cos",
    "cosh",
    "count",
    "cume_dist",
    "current_date",
    "current_time",
    "current_timestamp",
    "date",
    "datetime",
    "degrees",
    "dense_rank",
    "exp",
    "first_value",
    "floor",
    "format",
    "glob",
    "group_concat",
    "hex",
    "highlight",
    "if",
    "ifnull",
    "iif",
    "instr",
    "json",
    "jsonb",
    "json_array",
    "jsonb_array",
    "json_array_length",
    "json_each",
    "json_error_position",
    "json_extract",
    "jsonb_extract",
    "json_group_array",
    "jsonb_group_array",
    "json_group_object",
    "jsonb_group_object",
    "json_insert",
    "jsonb_insert",
    "json_object",
    "jsonb_object",
    "json_pretty",
    "json_quote",
    "json_remove",
    "jsonb_remove",
    "json_replace",
    "jsonb_replace",
    "json_set",
    "jsonb_set",
    "json_tree",
    "json_type",
    "json_valid",
    "json_array_insert",
    "jsonb_array_insert",
    "julianday",
    "lag",
    "last_insert_rowid",
    "last_value",
    "lead",
    "length",
    "like",
    "likelihood",
    "likely",
    "ln",
    "log",
    "log10",
    "log2",
    "lower",
    "ltrim",
    "match",
    "max",
    "min",
    "mod",
    "nth_value",
    "ntile",
    "nullif",
    "octet_length",
    "percent_rank",
    "pi",
    "pow",
    "power",
    "printf",
    "quote",
    "radians",
    "random",
    "randomblob",
    "rank",
    "replace",
    "round",
    "row_number",
    "rtrim",
    "sign",
    "sin",
    "sinh",
    "snippet",
    "soundex",
    "sqrt",
    "strftime",
    "string_agg",
    "substr",
    "substring",
    "subtype",
    "sum",
    "tan",
    "tanh",
    "time",
    "timediff",
    "total",
    "total_changes",
    "trim",
    "trunc",
    "typeof",
    "unhex",
    "unicode",
    "unistr",
    "unistr_quote",
    "unixepoch",
    "unlikely",
    "upper",
    "zeroblob",
    "->",
    "->>",
];

pub(super) fn is_allowed(name: &str) -> bool {
    ALLOWED
        .iter()
        .any(|allowed| name.eq_ignore_ascii_case(allowed))
}

/// SQLite goes down into a binary JSON document by calling itself, as deep as it goes.
pub(super) fn is_json(name: &str) -> bool {
    name.starts_with("->")
        || name
            .get(..4)
            .is_some_and(|start| start.eq_ignore_ascii_case("json"))
}

/// Puts the functions of this file in the place of SQLite's.
pub(super) fn replace(connection: &Connection, guard: &Arc<Guard>) -> Result<()> {
    let define = |name: &str,
                  arguments: i32,
                  function: fn(&Context<'_>, &Guard) -> Result<Value>| {
        let guard = guard.clone();
        let flags = FunctionFlags::SQLITE_UTF8
            | FunctionFlags::SQLITE_DETERMINISTIC
            | FunctionFlags::SQLITE_INNOCUOUS;
        connection.create_scalar_function(name, arguments, flags, move |context| {
            let has_null = (0..context.len()).any(|index| context.get_raw(index) == ValueRef::Null);
            if has_null {
                return Ok(Value::Null);
            }
            if guard.is_over() {
                return Err(out_of_time());
            }
            function(context, &guard)
        })
    };
    define("instr", 2, |context, _| {
        Ok(Value::Integer(instr(
            context.get_raw(0),
            context.get_raw(1),
        )))
    })?;
    define("replace", 3, |context, _| replaced(context))?;
    define("trim", 2, |context, _| Ok(trimmed(context, true, true)))?;
    define("ltrim", 2, |context, _| Ok(trimmed(context, true, false)))?;
    define("rtrim", 2, |context, _| Ok(trimmed(context, false, true)))?;
    for arguments in [2, 3] {
        define("like", arguments, |context, guard| {
            let escape = match context.len() {
                3 => Some(pattern::escape(&bytes(context.get_raw(2)))?),
                _ => None,
            };
            let (like, text) = (bytes(context.get_raw(0)), bytes(context.get_raw(1)));
            pattern::like(&like, &text, escape, guard).map(Value::from)
        })?;
    }
    define("glob", 2, |context, guard| {
        let (glob, text) = (bytes(context.get_raw(0)), bytes(context.get_raw(1)));
        pattern::glob(&glob, &text, guard).map(Value::from)
    })
}

/// It is looked at again where the error arrives.
pub(super) fn out_of_time() -> Error {
    failed("interrupted")
}

pub(super) fn failed(why: &str) -> Error {
    Error::UserFunctionError(why.into())
}

/// A value as SQLite would write it.
fn bytes(value: ValueRef<'_>) -> std::borrow::Cow<'_, [u8]> {
    match value {
        ValueRef::Null => (&[][..]).into(),
        ValueRef::Integer(number) => number.to_string().into_bytes().into(),
        ValueRef::Real(number) => real(number).into_bytes().into(),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.into(),
    }
}

/// With 15 digits, as SQLite does; and an exponent where the number is very large or small.
fn real(number: f64) -> String {
    if number == 0.0 {
        return "0.0".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Inf" } else { "-Inf" }.to_owned();
    }
    let scientific = format!("{number:.14e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if !(-4..15).contains(&exponent) {
        let digits = digits.trim_end_matches('0');
        let zero = if digits.ends_with('.') { "0" } else { "" };
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}{zero}e{sign}{:02}", exponent.abs());
    }
    let places = usize::try_from(14 - exponent).unwrap_or_default().max(1);
    let text = format!("{number:.places$}");
    let short = text.trim_end_matches('0');
    let zero = if short.ends_with('.') { "0" } else { "" };
    format!("{short}{zero}")
}

/// Where the one is first found in the other, from 1: in bytes of two blobs, else in characters.
fn instr(text: ValueRef<'_>, part: ValueRef<'_>) -> i64 {
    let are_blobs = matches!((text, part), (ValueRef::Blob(_), ValueRef::Blob(_)));
    let (text, part) = (bytes(text), bytes(part));
    let Some(at) = memmem::find(&text, &part) else {
        return 0;
    };
    let before = match are_blobs {
        true => at,
        false => text[..at].iter().filter(|byte| is_first(**byte)).count(),
    };
    before as i64 + 1
}

/// Whether a character of UTF-8 begins with this byte.
fn is_first(byte: u8) -> bool {
    byte & 0xc0 != 0x80
}

fn text(bytes: Vec<u8>) -> Value {
    Value::Text(
        String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()),
    )
}

fn replaced(context: &Context<'_>) -> Result<Value> {
    let [whole, from, to] = [0, 1, 2].map(|index| bytes(context.get_raw(index)));
    if from.is_empty() {
        return Ok(text(whole.into_owned()));
    }
    let mut made = Vec::with_capacity(whole.len());
    let mut rest = 0;
    for at in memmem::find_iter(&whole, &*from) {
        made.extend_from_slice(&whole[rest..at]);
        made.extend_from_slice(&to);
        rest = at + from.len();
        if made.len() > MAX_ANSWER_BYTES {
            return Err(failed("string or blob too big"));
        }
    }
    made.extend_from_slice(&whole[rest..]);
    Ok(text(made))
}

fn trimmed(context: &Context<'_>, left: bool, right: bool) -> Value {
    let [whole, set] =
        [0, 1].map(|index| String::from_utf8_lossy(&bytes(context.get_raw(index))).into_owned());
    let set: HashSet<char> = set.chars().collect();
    let mut rest = &whole[..];
    if left {
        rest = rest.trim_start_matches(|char| set.contains(&char));
    }
    if right {
        rest = rest.trim_end_matches(|char| set.contains(&char));
    }
    Value::Text(rest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each expression with SQLite's own functions and with ours.
    #[test]
    fn functions_answer_what_sqlites_own_do() {
        super::super::memory::install().expect("nobody has used SQLite");
        let own = Connection::open_in_memory().expect("a database");
        let ours = Connection::open_in_memory().expect("a database");
        replace(&ours, &Arc::new(Guard::new())).expect("functions");
        for expression in [
            "instr('größe', 'ß')",
            "instr('aaab', 'ab')",
            "instr('abc', '')",
            "instr('', 'a')",
            "instr(x'00c3bf', x'bf')",
            "instr(1234, 3)",
            "instr(12.5, '.')",
            "instr(NULL, 'a')",
            "instr('a', NULL)",
            "instr(1e20, 'e')",
            "instr(1e-7, 'e')",
            "instr(123456789012345678.0, '+')",
            "instr(0.1 + 0.2, '0000')",
            "replace('aaa', 'a', 'bb')",
            "replace('aaa', '', 'b')",
            "replace('ää', 'ä', NULL)",
            "replace(1.0, '.', ',')",
            "replace('abcabc', 'abc', '')",
            "replace(100, 0, 'x')",
            "typeof(replace(100, '', 'x'))",
            "trim('xxaxx', 'x')",
            "ltrim('xyx', 'yx')",
            "rtrim('ßaß', 'ß')",
            "trim('a', '')",
            "trim('  a  ')",
            "trim(1001, 1)",
            "trim(NULL, 'a')",
            "'aBc' LIKE 'AbC'",
            "'ÄB' LIKE 'äb'",
            "'abc' LIKE 'a%'",
            "'abc' LIKE '%c'",
            "'abc' LIKE '%b%'",
            "'abc' LIKE 'a_c'",
            "'aäc' LIKE 'a_c'",
            "'a%c' LIKE 'a!%c' ESCAPE '!'",
            "'abc' LIKE 'a!%c' ESCAPE '!'",
            "'' LIKE '%'",
            "'' LIKE '_'",
            "'abc' LIKE ''",
            "'aXbXc' LIKE '%x%x_'",
            "NULL LIKE 'a'",
            "123 LIKE '1%'",
            "'abc' LIKE 'abc%%'",
            "'ab' LIKE 'a%%b%'",
            "'aab' LIKE '%ab'",
            "'abab' LIKE '%ab_'",
            "'a' NOT LIKE 'b'",
            "'abc' GLOB 'a*'",
            "'aBc' GLOB 'abc'",
            "'abc' GLOB 'a[a-c]c'",
            "'abc' GLOB 'a[^a-c]c'",
            "'a]c' GLOB 'a[]]c'",
            "'a-c' GLOB 'a[b-]c'",
            "'abc' GLOB '?b?'",
            "'a' GLOB '[b'",
            "'a*c' GLOB 'a[*]c'",
            "'äb' GLOB '[ä-ö]b'",
            "'abcd' GLOB '*[b-c]d'",
            "'' GLOB '*'",
            "'ab' GLOB 'a*b*c'",
            "'x' LIKE '%%%%%%x'",
            "'a' LIKE 'a!' ESCAPE '!'",
            "'a^b' GLOB 'a[^^]b'",
        ] {
            let ask = |connection: &Connection| -> Value {
                let sql = format!("SELECT {expression}");
                let row = connection.query_row(&sql, [], |row| row.get(0));
                row.unwrap_or_else(|error| panic!("{expression}: {error}"))
            };
            assert_eq!(ask(&ours), ask(&own), "{expression}");
        }
    }
}
