//! A Redis server: one multiplexed connection, made again when it breaks.

use std::sync::LazyLock;
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::{
    Client, Cmd, ErrorKind, FromRedisValue, IntoConnectionInfo, Pipeline, RedisError, Script,
    ScriptInvocation, Value, cmd, pipe,
};

use super::commands::Command;
use super::{
    Condition, Error, MAX_ANSWER_BYTES, MAX_ANSWER_ITEMS, Reply, Set, StoreError, version_key,
};

/// How long making a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server may take to answer a command.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a call may take in all, waiting for a connection that is being made again included.
const CALL_TIMEOUT: Duration = Duration::from_secs(12);
/// Tries to make the connection again before the calls that wait for it are told so.
const RECONNECT_TRIES: usize = 2;
const RECONNECT_MIN_DELAY: Duration = Duration::from_millis(50);
const RECONNECT_MAX_DELAY: Duration = Duration::from_secs(1);
/// How long what was sent may stay without the acknowledgement of the server's system. Then the connection is
/// broken, and made again: a response that is late alone leaves it as it is.
#[cfg(target_os = "linux")]
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may be silent before it is probed, how often, and how many probes may get no answer.
const KEEPALIVE_TIME: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// Commands that may wait to be written; more wait for their turn.
const PIPELINE_BUFFER: usize = 512;

/// Why a URL can't be used, without any of it.
pub(super) fn check_url(url: &str) -> Result<(), String> {
    client(url).map(drop)
}

/// A Redis server.
#[derive(Clone)]
pub(super) struct Remote {
    connection: ConnectionManager,
}

pub(super) async fn open(url: &str) -> Result<Remote, StoreError> {
    let client = client(url).map_err(|why| StoreError::Refused(format!("the Redis URL: {why}")))?;
    let place = format!("Redis at {}", client.get_connection_info().addr());
    let config = ConnectionManagerConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(RESPONSE_TIMEOUT))
        .set_number_of_retries(RECONNECT_TRIES)
        .set_min_delay(RECONNECT_MIN_DELAY)
        .set_max_delay(RECONNECT_MAX_DELAY)
        .set_pipeline_buffer_size(PIPELINE_BUFFER);
    let connecting = ConnectionManager::new_with_config(client, config);
    let connection = tokio::time::timeout(CALL_TIMEOUT, connecting)
        .await
        .map_err(|_| StoreError::Unavailable(format!("{place}: {}", out_of_time())))?
        .map_err(|error| open_error(&place, &error))?;
    let store = Remote { connection };
    match store.run::<Value>(&cmd("PING")).await {
        Ok(_) => Ok(store),
        Err(Error::Unavailable(why)) => Err(StoreError::Unavailable(format!("{place}: {why}"))),
        Err(error) => Err(StoreError::Refused(format!(
            "{place}: {}",
            StoreError::from(error)
        ))),
    }
}

fn client(url: &str) -> Result<Client, String> {
    let info = url.into_connection_info();
    let client = info.and_then(|info| Client::open(info.set_tcp_settings(tcp_settings())));
    client.map_err(|error| {
        let why = error.to_string();
        // What follows is the kind of the error, and a part of the URL.
        why.split(" - ").next().unwrap_or_default().to_owned()
    })
}

/// For a server that is gone without a word: without these, its connection would be taken for good for a quarter
/// of an hour.
fn tcp_settings() -> TcpSettings {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_TIME)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    let settings = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(keepalive);
    #[cfg(target_os = "linux")]
    let settings = settings.set_user_timeout(USER_TIMEOUT);
    settings
}

impl Remote {
    pub(super) async fn ping(&self) -> Result<(), Error> {
        self.run::<Value>(&cmd("PING")).await.map(drop)
    }

    /// The client reads an answer whole before anybody can look at it, so no more is asked for than may come: a range, which
    /// costs what the value would. It is empty where there is no key, and then a second question tells.
    pub(super) async fn get(&self, key: &[u8], most: usize) -> Result<Option<Vec<u8>>, Error> {
        let value: Vec<u8> = self.run(cmd("GETRANGE").arg(key).arg(0).arg(most)).await?;
        if value.len() > most {
            return Err(Error::TooLarge(most as u64));
        }
        if !value.is_empty() {
            return Ok(Some(value));
        }
        in_rust(self.bounded("GET", vec![key.to_vec()], 1).await?)
    }

    pub(super) async fn get_many(&self, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        in_rust(self.bounded("MGET", keys.to_vec(), keys.len()).await?)
    }

    pub(super) async fn set(&self, set: Set) -> Result<Vec<bool>, Error> {
        let mut connection = self.connection.clone();
        let call = match (set.entries.as_slice(), set.condition, set.version, set.ttl) {
            ([], ..) => return Ok(Vec::new()),
            (entries, None, None, ttl) => {
                in_time(plain_set(entries, ttl).exec_async(&mut connection)).await?;
                return Ok(vec![true; entries.len()]);
            }
            ([(key, value)], None, Some(version), None) => {
                let mut call = SET_IF_NEWER.prepare_invoke();
                call.key(key.as_slice()).key(version_key(key));
                call.arg(value.as_slice()).arg(version);
                call
            }
            _ => general_set(&set),
        };
        in_time(call.invoke_async(&mut connection)).await
    }

    pub(super) async fn delete(&self, keys: Vec<Vec<u8>>) -> Result<u64, Error> {
        if keys.is_empty() {
            return Ok(0);
        }
        let versions: Vec<_> = keys.iter().map(|key| version_key(key)).collect();
        let mut delete = pipe();
        delete.atomic();
        delete.cmd("DEL").arg(keys);
        delete.cmd("DEL").arg(versions).ignore();
        let mut connection = self.connection.clone();
        let (count,): (u64,) = in_time(delete.query_async(&mut connection)).await?;
        Ok(count)
    }

    pub(super) async fn execute(
        &self,
        command: &Command,
        arguments: Vec<Vec<u8>>,
    ) -> Result<Reply, Error> {
        if command.answers_content {
            let keys = command.keys(&arguments).len();
            return reply(self.bounded(command.name, arguments, keys).await?);
        }
        reply(self.run(cmd(command.name).arg(arguments)).await?)
    }

    /// Runs a command that answers what is kept, unless that is too much to come.
    async fn bounded(
        &self,
        command: &str,
        arguments: Vec<Vec<u8>>,
        keys: usize,
    ) -> Result<Value, Error> {
        let mut call = BOUNDED.prepare_invoke();
        call.arg(command)
            .arg(MAX_ANSWER_BYTES)
            .arg(MAX_ANSWER_ITEMS);
        for (at, argument) in arguments.into_iter().enumerate() {
            if at < keys {
                call.key(argument);
            } else {
                call.arg(argument);
            }
        }
        let mut connection = self.connection.clone();
        in_time(call.invoke_async(&mut connection)).await
    }

    async fn run<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        let mut connection = self.connection.clone();
        in_time(command.query_async(&mut connection)).await
    }
}

/// Sets the keys, and takes their versions away.
fn plain_set(entries: &[(Vec<u8>, Vec<u8>)], ttl: Option<u64>) -> Pipeline {
    let mut sets = pipe();
    sets.atomic();
    for (key, value) in entries {
        let set = sets.cmd("SET").arg(key).arg(value);
        if let Some(ttl) = ttl {
            set.arg("PX").arg(ttl);
        }
    }
    let versions: Vec<_> = entries.iter().map(|(key, _)| version_key(key)).collect();
    sets.cmd("DEL").arg(versions);
    sets
}

/// What a stage sets most: one key, if the version is newer. The general script has more to do for each message.
static SET_IF_NEWER: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local old, new = redis.call('GET', KEYS[2]), ARGV[2]
        if old and (#new < #old or (#new == #old and new <= old)) then
            return {0}
        end
        redis.call('MSET', KEYS[1], ARGV[1], KEYS[2], new)
        return {1}
        ",
    )
});

/// Runs the command of its first argument, unless its answer has more bytes than the second or more items than the third:
/// then it changes nothing, and little has been done. `MEMORY` may be denied, or missing in another server; the sum at
/// the end keeps the answer from the host all the same.
static BOUNDED: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local name, most, most_items = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
        local too_large = redis.error_reply('TOOLARGE the answer')
        local function ask(...)
            local answer = redis.pcall(...)
            return type(answer) == 'number' and answer or 0
        end
        local bytes, items = 0, 0
        if name == 'HGETALL' or name == 'SMEMBERS' then
            items = ask(name == 'HGETALL' and 'HLEN' or 'SCARD', KEYS[1])
            if items > most_items then return too_large end
            -- The allocator takes up to a third more than it was asked for.
            bytes = ask('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 0) * 0.75 - 256 * (items + 1)
        elseif name == 'HGET' then
            bytes = ask('HSTRLEN', KEYS[1], ARGV[4])
        else
            for _, key in ipairs(KEYS) do bytes = bytes + ask('STRLEN', key) end
        end
        local from, to = tonumber(ARGV[4]), tonumber(ARGV[5])
        if name == 'GETRANGE' and from and to then
            if from < 0 then from = math.max(bytes + from, 0) end
            if to < 0 then to = math.max(bytes + to, 0) end
            bytes = math.min(to, bytes - 1) - from + 1
        end
        if bytes > most then return too_large end
        local call = {name}
        for _, key in ipairs(KEYS) do call[#call + 1] = key end
        for i = 4, #ARGV do call[#call + 1] = ARGV[i] end
        local answer = redis.pcall(unpack(call))
        if items > 0 and type(answer) == 'table' then
            local sum = 0
            for _, item in ipairs(answer) do sum = sum + #item end
            if sum > most then return too_large end
        end
        return answer
        ",
    )
});

fn general_set(set: &Set) -> ScriptInvocation<'static> {
    let text = |number: Option<u64>| number.map_or(String::new(), |number| number.to_string());
    let mut call = SET.prepare_invoke();
    call.arg(text(set.ttl));
    call.arg(match set.condition {
        None => "",
        Some(Condition::IfAbsent) => "absent",
        Some(Condition::IfPresent) => "present",
    });
    call.arg(text(set.version));
    for (key, value) in &set.entries {
        call.key(key.as_slice()).key(version_key(key));
        call.arg(value.as_slice());
    }
    call
}

/// Sets every key whose condition and version allow it, and answers 1 or 0 for each. The keys come in pairs,
/// each with the one of its version; versions are compared as text, since Lua's numbers are too short for them.
static SET: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local ttl, condition, version = ARGV[1], ARGV[2], ARGV[3]
        local function newer(a, b)
            if #a ~= #b then return #a > #b end
            return a > b
        end
        local function set(key, value)
            if ttl == '' then
                redis.call('SET', key, value)
            else
                redis.call('SET', key, value, 'PX', ttl)
            end
        end
        local written = {}
        for i = 1, #KEYS, 2 do
            local key, version_key = KEYS[i], KEYS[i + 1]
            local old = version ~= '' and redis.call('GET', version_key)
            if (condition == 'absent' and redis.call('EXISTS', key) == 1)
                or (condition == 'present' and redis.call('EXISTS', key) == 0)
                or (old and not newer(version, old))
            then
                written[#written + 1] = 0
            else
                set(key, ARGV[3 + (i + 1) / 2])
                if version == '' then
                    redis.call('DEL', version_key)
                else
                    set(version_key, version)
                end
                written[#written + 1] = 1
            end
        end
        return written
        ",
    )
});

fn reply(value: Value) -> Result<Reply, Error> {
    Ok(match value {
        Value::Nil => Reply::Nil,
        Value::Okay => Reply::Okay,
        Value::Int(number) => Reply::Int(number),
        Value::Boolean(truth) => Reply::Int(truth.into()),
        Value::BulkString(bytes) => Reply::Data(bytes),
        Value::SimpleString(status) => Reply::Status(status),
        Value::Array(values) | Value::Set(values) => Reply::Items(items(values)?),
        Value::Map(pairs) => {
            let flat = pairs.into_iter().flat_map(|(field, value)| [field, value]);
            Reply::Items(items(flat)?)
        }
        other => return Err(unexpected(&other)),
    })
}

fn items(values: impl IntoIterator<Item = Value>) -> Result<Vec<Vec<u8>>, Error> {
    values
        .into_iter()
        .map(|value| match value {
            Value::Nil => Ok(Vec::new()),
            Value::BulkString(bytes) => Ok(bytes),
            Value::SimpleString(status) => Ok(status.into_bytes()),
            Value::Int(number) => Ok(number.to_string().into_bytes()),
            other => Err(unexpected(&other)),
        })
        .collect()
}

/// Of which kind it is says enough: a value may be long.
fn unexpected(value: &Value) -> Error {
    let kind = match value {
        Value::Array(_) => "a list in a list",
        Value::Double(_) => "a floating-point number",
        Value::BigNumber(_) => "a number of more than 64 bits",
        Value::VerbatimString { .. } => "a text with a format",
        Value::Push { .. } | Value::Attribute { .. } => "more than an answer",
        Value::ServerError(_) => "an error in a list",
        _ => "a value of another type",
    };
    Error::Server(format!(
        "Redis answered what this interface can't carry: {kind}"
    ))
}

fn in_rust<T: FromRedisValue>(value: Value) -> Result<T, Error> {
    T::from_redis_value(value).map_err(|error| Error::Server(error.to_string()))
}

async fn in_time<T>(call: impl Future<Output = Result<T, RedisError>>) -> Result<T, Error> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|error| error_of(&error)),
        Err(_) => Err(Error::Unavailable(out_of_time())),
    }
}

fn out_of_time() -> String {
    format!("no answer within {} s", CALL_TIMEOUT.as_secs())
}

/// The first word of the error that [`BOUNDED`] answers.
const TOO_LARGE: &str = "TOOLARGE";

/// Redis's own errors by their first word: those that pass by themselves are worth a retry.
fn error_of(error: &RedisError) -> Error {
    const PASSING: &[&str] = &[
        "BUSY",
        "CLUSTERDOWN",
        // What a MULTI comes to where Redis takes no command at the moment, for one of the other reasons here.
        "EXECABORT",
        "LOADING",
        "MASTERDOWN",
        "MISCONF",
        "NOREPLICAS",
        "OOM",
        "READONLY",
        "TRYAGAIN",
    ];
    let Some(code) = error.code() else {
        return match error.kind() {
            ErrorKind::UnexpectedReturnType | ErrorKind::Parse | ErrorKind::Client => {
                Error::Server(error.to_string())
            }
            _ => Error::Unavailable(error.to_string()),
        };
    };
    if code == TOO_LARGE {
        return Error::TooLarge(MAX_ANSWER_BYTES as u64);
    }
    let text = format!("{code} {}", error.detail().unwrap_or_default());
    if PASSING.contains(&code) {
        Error::Unavailable(text)
    } else {
        Error::Server(text)
    }
}

fn open_error(place: &str, error: &RedisError) -> StoreError {
    match error.kind() {
        ErrorKind::AuthenticationFailed | ErrorKind::InvalidClientConfig => {
            StoreError::Refused(format!("{place}: {error}"))
        }
        _ => match error_of(error) {
            Error::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
            other => StoreError::Refused(format!("{place}: {}", StoreError::from(other))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_to_a_server_that_is_gone_break() {
        let client = client("redis://127.0.0.1:1").expect("a URL");
        let settings = client.get_connection_info().tcp_settings();
        assert!(settings.nodelay() && settings.keepalive().is_some());
        #[cfg(target_os = "linux")]
        assert_eq!(settings.user_timeout(), Some(USER_TIMEOUT));
    }

    #[test]
    fn urls_are_refused_without_their_words() {
        for url in [
            "redis://:geheim@127.0.0.1?protocol=geheim",
            "redis://:geheim@127.0.0.1/geheim",
            "rediss://:geheim@127.0.0.1#geheim",
            "redis://:geheim@0.0.0.0",
        ] {
            let why = check_url(url).expect_err(url);
            assert!(!why.is_empty() && !why.contains("geheim"), "{why}");
        }
        assert_eq!(
            check_url("redis://:geheim@127.0.0.1?protocol=resp3"),
            Ok(())
        );
    }
}
