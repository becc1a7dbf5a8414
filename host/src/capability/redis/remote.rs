//! A Redis server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::{
    Client, FromRedisValue, IntoConnectionInfo, Pipeline, RedisError, Script, ScriptInvocation,
    Value, cmd, pipe,
};

use super::answers::Refusal;
use super::commands::{self, Command};
use super::connection::{Connection, rehearse};
use super::{
    Concern, Condition, Error, MAX_ANSWER_BYTES, MAX_ANSWER_ITEMS, Reply, Set, StoreError,
    WAS_DONE, version_key,
};

/// How long what was sent may stay without the acknowledgement of the server's system. Then the connection is
/// broken, and made again.
#[cfg(target_os = "linux")]
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may be silent before it is probed, how often, and how many probes may get no answer.
const KEEPALIVE_TIME: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// Bytes of the value that a probe would write.
const PROBE_BYTES: usize = 1024;

/// Why a URL can't be used, without any of it.
pub(super) fn check_url(url: &str) -> Result<(), String> {
    client(url).map(drop)
}

/// A Redis server.
#[derive(Clone)]
pub(super) struct Remote {
    connection: Connection,
    /// What it has done for this host so far, a bit for each kind of call.
    done: Arc<AtomicU64>,
}

pub(super) async fn open(url: &str) -> Result<Remote, StoreError> {
    let client = client(url).map_err(|why| StoreError::Refused(format!("the Redis URL: {why}")))?;
    let place = format!("Redis at {}", client.get_connection_info().addr());
    let store = Remote {
        connection: Connection::new(client),
        done: Arc::default(),
    };
    let at = |error: Error| match error {
        Error::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}")),
        error => StoreError::Refused(format!("{place}: {}", StoreError::from(error))),
    };
    if let Err(refusal) = store.connection.ask(async |c| ping(c).await).await {
        return Err(match refusal {
            // As the pipeline has them, they are wrong, and waiting is no help.
            Refusal {
                is_login: true,
                error: Error::Unavailable(why),
                ..
            } => StoreError::Refused(format!("{place}: {why}")),
            refusal => at(refusal.error),
        });
    }
    store.connection.check().await.map_err(at)?;
    Ok(store)
}

async fn ping(connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
    cmd("PING").exec_async(connection).await
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

/// A kind of call, as rights are given for them.
#[derive(Clone, Copy)]
enum Kind {
    Get,
    GetMany,
    /// Without a script.
    Set,
    /// With one: a condition, or a version.
    SetIf,
    Delete,
    Execute(&'static Command),
}

impl Kind {
    /// What a grant of it is remembered by.
    fn bit(self) -> u64 {
        1 << match self {
            Self::Get => 0,
            Self::GetMany => 1,
            Self::Set => 2,
            Self::SetIf => 3,
            Self::Delete => 4,
            Self::Execute(command) => 5 + commands::index(command),
        }
    }

    /// The commands that it takes, on this key, each with its arguments. Their values are not looked at.
    fn commands(self, key: &[u8]) -> Vec<Vec<Vec<u8>>> {
        let words = |words: &[&[u8]]| words.iter().map(|word| word.to_vec()).collect();
        let value = [b'x'; PROBE_BYTES];
        let script = [
            &b"EVALSHA"[..],
            SET_IF_NEWER.get_hash().as_bytes(),
            b"1",
            key,
        ];
        match self {
            Self::Get => vec![
                words(&[b"GETRANGE", key, b"0", b"0"]),
                words(&[b"GET", key]),
            ],
            Self::GetMany => vec![words(&[b"MGET", key]), words(&script)],
            Self::Set => vec![words(&[b"SET", key, &value, b"XX"]), words(&[b"DEL", key])],
            Self::SetIf => vec![
                words(&script),
                words(&[b"GET", key]),
                words(&[b"MSET", key, &value]),
                words(&[b"SET", key, &value, b"XX"]),
                words(&[b"DEL", key]),
            ],
            Self::Delete => vec![words(&[b"DEL", key])],
            Self::Execute(command) => vec![command.example(key)],
        }
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            GET => Self::Get,
            GET_MANY => Self::GetMany,
            SET => Self::Set,
            SET_IF => Self::SetIf,
            DELETE => Self::Delete,
            name => Self::Execute(commands::lookup(name)?),
        })
    }
}

/// What calls are named by that are no commands of the table.
pub(super) const GET: &str = "get";
pub(super) const GET_MANY: &str = "get-many";
pub(super) const SET: &str = "set";
pub(super) const SET_IF: &str = "set-if";
pub(super) const DELETE: &str = "delete";

impl Remote {
    pub(super) async fn ping(&self) -> Result<(), Error> {
        let asked = self.connection.ask(async |c| ping(c).await).await;
        asked.map_err(|refusal| refusal.error)
    }

    /// Sees whether this key could be read.
    pub(super) async fn probe_read(&self, key: &[u8]) -> Result<(), Error> {
        let asked = self.connection.ask(async |connection| {
            let mut read = cmd("GETRANGE");
            read.arg(key).arg(0).arg(0).exec_async(connection).await
        });
        asked.await.map_err(|refusal| refusal.error)
    }

    /// Sees whether this key could be written.
    pub(super) async fn probe_write(&self, key: &[u8]) -> Result<(), Error> {
        match rehearse(&self.connection, &Kind::Set.commands(key)).await {
            // Who may not set may do other things, of which these are the most alike.
            Err(refusal) if refusal.concern != Concern::Standing => Err(refusal.error),
            _ => Ok(()),
        }
    }

    /// Sees whether that call could be made, which could be before.
    pub(super) async fn probe_call(&self, name: &str, key: &[u8]) -> Result<(), Error> {
        let Some(kind) = Kind::named(name) else {
            return Ok(());
        };
        let rehearsed = rehearse(&self.connection, &kind.commands(key)).await;
        rehearsed.map_err(|refusal| self.judge(kind, refusal))
    }

    /// The client reads an answer whole before anybody can look at it, so no more is asked for than may come: a range, which
    /// costs what the value would. It is empty where there is no key, and then a second question tells.
    pub(super) async fn get(&self, key: &[u8], most: usize) -> Result<Option<Vec<u8>>, Error> {
        let mut range = cmd("GETRANGE");
        range.arg(key).arg(0).arg(most);
        let asked = self.call(Kind::Get, async |c| range.query_async::<Vec<u8>>(c).await);
        let value = asked.await?;
        if value.len() > most {
            return Err(Error::TooLarge(most as u64));
        }
        if !value.is_empty() {
            return Ok(Some(value));
        }
        let value = self.bounded(Kind::Get, "GET", vec![key.to_vec()], 1);
        in_rust(value.await?)
    }

    pub(super) async fn get_many(&self, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let values = self.bounded(Kind::GetMany, "MGET", keys.to_vec(), keys.len());
        in_rust(values.await?)
    }

    pub(super) async fn set(&self, set: Set) -> Result<Vec<bool>, Error> {
        let call = match (set.entries.as_slice(), set.condition, set.version, set.ttl) {
            ([], ..) => return Ok(Vec::new()),
            (entries, None, None, ttl) => {
                let sets = plain_set(entries, ttl);
                let set = self.call(Kind::Set, async |c| sets.exec_async(c).await);
                set.await?;
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
        self.call(Kind::SetIf, async |c| call.invoke_async(c).await)
            .await
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
        let deleted = self.call(Kind::Delete, async |c| delete.query_async(c).await);
        let (count,): (u64,) = deleted.await?;
        Ok(count)
    }

    pub(super) async fn execute(
        &self,
        command: &'static Command,
        arguments: Vec<Vec<u8>>,
    ) -> Result<Reply, Error> {
        let kind = Kind::Execute(command);
        if command.answers_content {
            let keys = command.keys(&arguments).len();
            return reply(self.bounded(kind, command.name, arguments, keys).await?);
        }
        let mut call = cmd(command.name);
        call.arg(arguments);
        reply(self.call(kind, async |c| call.query_async(c).await).await?)
    }

    /// Runs a command that answers what is kept, unless that is too much to come.
    async fn bounded(
        &self,
        kind: Kind,
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
        self.call(kind, async |c| call.invoke_async(c).await).await
    }

    async fn call<T>(
        &self,
        kind: Kind,
        call: impl AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    ) -> Result<T, Error> {
        match self.connection.ask(call).await {
            Ok(answer) => {
                if self.done.load(Ordering::Relaxed) & kind.bit() == 0 {
                    self.done.fetch_or(kind.bit(), Ordering::Relaxed);
                }
                Ok(answer)
            }
            Err(refusal) => Err(self.judge(kind, refusal)),
        }
    }

    /// What the server's user may not do is a store that is not what it was, if it could before; else the guest's affair.
    fn judge(&self, kind: Kind, Refusal { concern, error, .. }: Refusal) -> Error {
        match error {
            Error::Server(why) if concern == Concern::Standing => {
                let was_done = self.done.load(Ordering::Relaxed) & kind.bit() != 0;
                match was_done {
                    true => Error::Unavailable(format!("{WAS_DONE}{why}")),
                    false if why.starts_with("ERR unknown command") => Error::Server(why),
                    false => {
                        Error::Denied(format!("Redis does not allow it to the host's user: {why}"))
                    }
                }
            }
            error => error,
        }
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
    let mut call = SET_ALL.prepare_invoke();
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
static SET_ALL: LazyLock<Script> = LazyLock::new(|| {
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
