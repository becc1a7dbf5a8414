//! What a message may ask for.

use serde::Deserialize;
use serde_json::Value as Json;

/// One message: what to do, and what to do with the answer.
#[derive(Deserialize)]
pub struct Command {
    /// What to do.
    #[serde(flatten)]
    pub action: Action,
    /// The answer that must come, `{"ok": …}` or `{"error": {…}}`; another one is a panic.
    pub expect: Option<Json>,
    /// The topic that the answer is emitted to, as a report. Without `expect` and `report`, an
    /// error is the message's fault, as `?` makes it.
    pub report: Option<String>,
}

/// What to do, named by `do`.
#[derive(Deserialize)]
#[serde(
    tag = "do",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum Action {
    /// Nothing.
    Ok,
    /// Answer `retry`.
    Retry,
    /// Answer `retry` up to attempt `n`, which is fine.
    RetryUntil {
        /// The first attempt that is fine.
        n: u32,
    },
    /// Answer `reject`.
    Reject,
    /// Panic.
    Trap,
    /// Write lines to stderr and trap, as a language runtime does at an exception that nobody caught.
    TrapAfter {
        /// The lines.
        lines: Vec<String>,
    },
    /// Compute for ever.
    Spin,
    /// Compute for ever, and rest for a moment now and then, before anybody could call it long.
    Bursts,
    /// Compute for so long.
    Compute {
        /// Microseconds.
        micros: u64,
    },
    /// Call itself for ever.
    Overflow,
    /// Leave the process, as a command would.
    Exit {
        /// The exit code.
        #[serde(default)]
        code: i32,
    },
    /// Panic, unless this is the first message that the instance has.
    TrapIfUsed,
    /// Open stores for ever, and close none.
    LeakHandles {
        /// The Redis store.
        store: String,
    },
    /// Answer `retry`, with so many bytes of words.
    RetryAtLength {
        /// Bytes.
        bytes: usize,
    },
    /// Write lines into the host's log.
    LogMany {
        /// How many.
        n: u32,
        /// Bytes of each.
        bytes: usize,
        /// To stderr, not through `wasi:logging`.
        #[serde(default)]
        print: bool,
    },
    /// Sleep, inside the host.
    Sleep {
        /// Milliseconds.
        ms: u64,
    },
    /// Allocate and touch memory for ever, or as much as told.
    EatMemory {
        /// In MiB.
        mib: Option<usize>,
    },
    /// Emit `n` records.
    Emit {
        /// To this topic.
        topic: String,
        /// How many; one if not told.
        #[serde(default = "one")]
        n: u32,
        /// The key; the message's own if not told.
        key: Option<String>,
        /// The value as JSON; `{"from": PLACE, "index": 0…}` if not told.
        value: Option<Json>,
        /// Headers of text.
        #[serde(default)]
        headers: Vec<(String, Option<String>)>,
    },
    /// Emit a record without a value.
    EmitTombstone {
        /// To this topic.
        topic: String,
    },
    /// Emit one record of so many bytes.
    EmitHuge {
        /// To this topic.
        topic: String,
        /// Bytes of the value.
        bytes: usize,
    },
    /// Emit to a topic that is not granted, which must be denied.
    EmitDenied {
        /// The topic.
        topic: String,
    },
    /// Use a SQL store.
    Sql {
        /// The store's name.
        store: String,
        /// The statement.
        statement: String,
        /// One list of parameters: see [`crate::value`].
        #[serde(default)]
        params: Vec<Json>,
        /// Many lists of parameters, for `execute-many`.
        many: Option<Vec<Vec<Json>>>,
        /// Answer the number of rows affected, not the rows.
        #[serde(default)]
        execute: bool,
    },
    /// Use a Redis store.
    Redis {
        /// The store's name.
        store: String,
        /// The call.
        #[serde(flatten)]
        call: RedisCall,
    },
    /// Answer a setting, or all of them.
    Config {
        /// Its key.
        key: Option<String>,
    },
    /// Write a message of every level into the host's log.
    Log {
        /// The message.
        message: String,
    },
    /// Write a line to stdout and one to stderr.
    Print {
        /// The line.
        message: String,
    },
    /// Assert that there are no arguments and no environment.
    Env,
    /// Assert that there is no file system.
    Fs,
    /// Assert that there is no network.
    Net {
        /// A TCP port that listens on the host's loopback.
        #[serde(default = "http")]
        port: u16,
    },
    /// Assert that both clocks go on, and answer the wall clock in milliseconds since the Unix
    /// epoch.
    Clock,
    /// Assert that random bytes differ, and answer eight of them.
    Random,
    /// Answer how many messages this instance has had, this one included.
    Count,
    /// Answer what the message carries: key, value and headers as text, offset, timestamp, attempt.
    Describe,
    /// Each in its turn, up to the first that faults; the answers as a list.
    Steps {
        /// What to do.
        steps: Vec<Command>,
    },
}

/// A call to a Redis store, named by `call`. Values are text.
#[derive(Deserialize)]
#[serde(
    tag = "call",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
#[allow(missing_docs)]
pub enum RedisCall {
    Get {
        key: String,
    },
    GetMany {
        keys: Vec<String>,
    },
    Set {
        key: String,
        value: String,
        #[serde(flatten)]
        options: RedisOptions,
    },
    SetMany {
        entries: Vec<(String, String)>,
        #[serde(flatten)]
        options: RedisOptions,
    },
    Delete {
        keys: Vec<String>,
    },
    Increment {
        key: String,
        delta: i64,
    },
    Execute {
        command: String,
        arguments: Vec<String>,
    },
}

/// How to set a key.
#[derive(Deserialize)]
pub struct RedisOptions {
    /// Milliseconds to live.
    pub ttl: Option<u64>,
    /// `if-absent` or `if-present`.
    pub condition: Option<RedisCondition>,
    /// The version.
    pub version: Option<u64>,
}

/// What must hold for a set.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum RedisCondition {
    IfAbsent,
    IfPresent,
}

fn one() -> u32 {
    1
}

fn http() -> u16 {
    80
}
