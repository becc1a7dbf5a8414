//! A Redis server.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::{
    Client, FromRedisValue, IntoConnectionInfo, RedisError, Script, ScriptInvocation, Value, cmd,
    pipe,
};

use super::answers::Refusal;
use super::commands::Command;
use super::connection::{Connection, ping};
use super::rights::{Done, Kind, PROBE_BYTES};
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

/// Why a URL can't be used, without any of it.
pub(super) fn check_url(url: &str) -> Result<(), String> {
    client(url).map(drop)
}

/// A Redis server. What takes several commands as one is a script, never `MULTI`: the connection is everybody's, and one that a
/// refused `EXEC` left in a transaction would have all of their commands queued.
#[derive(Clone)]
pub(super) struct Remote {
    connection: Connection,
    /// What it has done for whom it was granted to.
    done: Arc<Done>,
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
    store.connection.look_for_scripts(&place).await;
    Ok(store)
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
    /// The same for another grant, for which nothing was done so far.
    pub(super) fn granted(&self) -> Self {
        Self {
            connection: self.connection.clone(),
            done: Arc::default(),
        }
    }

    pub(super) async fn ping(&self) -> Result<(), Error> {
        let asked = self.connection.ask(async |c| ping(c).await).await;
        asked.map(drop).map_err(|refusal| refusal.error)
    }

    /// Sees whether this key could be read.
    pub(super) async fn probe_read(&self, key: &[u8]) -> Result<(), Error> {
        let asked = self.connection.ask(async |connection| {
            let mut read = cmd("GETRANGE");
            read.arg(key).arg(0).arg(0).exec_async(connection).await
        });
        asked.await.map_err(|refusal| refusal.error)
    }

    /// Sees whether this key could be written. The server refuses both options at once, but only once it has seen whether it would
    /// take a write at all.
    pub(super) async fn probe_write(&self, key: &[u8]) -> Result<(), Error> {
        let value = [b'x'; PROBE_BYTES];
        let asked = self.connection.ask(async |connection| {
            let mut set = cmd("SET");
            let set = set.arg(key).arg(&value[..]).arg("NX").arg("XX");
            set.exec_async(connection).await
        });
        match asked.await {
            // Who may not set may do other things, of which this is the most alike.
            Err(refusal) if refusal.concern == Concern::Store => Err(refusal.error),
            _ => Ok(()),
        }
    }

    /// Sees whether calls of that name could be made, at the keys where they were before.
    pub(super) async fn probe_call(&self, name: &str) -> Result<(), Error> {
        for kind in Kind::named(name) {
            let Some(key) = self.done.key(kind) else {
                continue;
            };
            if let Err(Refusal { concern, error, .. }) = self.rehearse(kind, &key).await {
                return Err(match error {
                    Error::Server(why) if concern == Concern::Standing => was_done(&why),
                    error => error,
                });
            }
        }
        Ok(())
    }

    async fn rehearse(&self, kind: Kind, key: &[u8]) -> Result<(), Refusal> {
        let commands = kind.commands(key);
        self.connection.rehearse(&commands).await
    }

    /// The client reads an answer whole before anybody can look at it, so no more is asked for than may come: a range, which
    /// costs what the value would. It is empty where there is no key, and then a second question tells.
    pub(super) async fn get(&self, key: &[u8], most: usize) -> Result<Option<Vec<u8>>, Error> {
        let mut range = cmd("GETRANGE");
        range.arg(key).arg(0).arg(most);
        let asked = self.call(Kind::Get, key, async |c| {
            range.query_async::<Vec<u8>>(c).await
        });
        let value = asked.await?;
        if value.len() > most {
            return Err(Error::TooLarge(most as u64));
        }
        if !value.is_empty() {
            return Ok(Some(value));
        }
        let value = self.bounded(Kind::GetNothing, "GET", &[key], 1).await?;
        in_rust(value)
    }

    pub(super) async fn get_many(&self, keys: &[Vec<u8>]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let values = self.bounded(Kind::GetMany, "MGET", keys, keys.len());
        in_rust(values.await?)
    }

    pub(super) async fn set(&self, set: Set) -> Result<Vec<bool>, Error> {
        let Some((first, value)) = set.entries.first() else {
            return Ok(Vec::new());
        };
        let kind = Kind::of_set(&set);
        let call = match (kind, set.version) {
            (Kind::SetNewer, Some(version)) => {
                let mut call = SET_IF_NEWER.prepare_invoke();
                call.key(first.as_slice()).key(version_key(first));
                call.arg(value.as_slice()).arg(version);
                call
            }
            (Kind::Set, _) => return self.set_plain(kind, &set, first).await,
            (_, Some(version)) if set.ttl.is_none() && set.condition.is_none() => {
                let mut call = SET_IF_ALL_NEWER.prepare_invoke();
                call.arg(version);
                entries(call, &set)
            }
            _ => general_set(&set),
        };
        let written = self.attempt(kind, async |c| call.invoke_async(c).await);
        let written: Vec<bool> = written.await?;
        // Where nothing is to be written, little of it is done.
        if let Some(at) = written.iter().position(|written| *written)
            && let Some((key, _)) = set.entries.get(at)
        {
            self.done.note(kind, key);
        }
        Ok(written)
    }

    /// Sets the keys, in one round trip, and takes away the versions that they had. Nothing else is in between but another
    /// connection's, and a version that comes that way stays: it is deleted first.
    async fn set_plain(&self, kind: Kind, set: &Set, first: &[u8]) -> Result<Vec<bool>, Error> {
        let mut all = pipe();
        let delete = all.cmd("DEL");
        for (key, _) in &set.entries {
            delete.arg(version_key(key));
        }
        for (key, value) in &set.entries {
            let set_one = all.cmd("SET").arg(key).arg(value);
            if let Some(ttl) = set.ttl {
                set_one.arg("PX").arg(ttl);
            }
        }
        let count = set.entries.len();
        self.call(kind, first, async |c| all.exec_async(c).await)
            .await?;
        Ok(vec![true; count])
    }

    pub(super) async fn delete(&self, keys: Vec<Vec<u8>>) -> Result<u64, Error> {
        let Some(first) = keys.first() else {
            return Ok(0);
        };
        let mut call = DELETE_ALL.prepare_invoke();
        for key in &keys {
            call.key(key.as_slice()).key(version_key(key));
        }
        let deleted = self.call(Kind::Delete, first, async |c| call.invoke_async(c).await);
        deleted.await
    }

    pub(super) async fn execute(
        &self,
        command: &'static Command,
        arguments: Vec<Vec<u8>>,
    ) -> Result<Reply, Error> {
        let kind = Kind::Execute(command);
        let keys = command.keys(&arguments);
        if command.answers_content {
            let answer = self.bounded(kind, command.name, &arguments, keys.len());
            return reply(answer.await?);
        }
        let first = keys.first().map(Vec::as_slice).unwrap_or_default();
        let mut call = cmd(command.name);
        call.arg(&arguments);
        let answer = self.call(kind, first, async |c| call.query_async(c).await);
        reply(answer.await?)
    }

    /// Runs a command that answers what is kept, unless that is too much to come.
    async fn bounded(
        &self,
        kind: Kind,
        command: &str,
        arguments: &[impl AsRef<[u8]>],
        keys: usize,
    ) -> Result<Value, Error> {
        let mut call = BOUNDED.prepare_invoke();
        call.arg(command)
            .arg(MAX_ANSWER_BYTES)
            .arg(MAX_ANSWER_ITEMS);
        for (at, argument) in arguments.iter().enumerate() {
            if at < keys {
                call.key(argument.as_ref());
            } else {
                call.arg(argument.as_ref());
            }
        }
        let first = arguments.first().map(AsRef::as_ref).unwrap_or_default();
        let answer = self.call(kind, first, async |c| call.invoke_async(c).await);
        answer.await
    }

    /// Makes a call, and remembers that it was done, at which key.
    async fn call<T>(
        &self,
        kind: Kind,
        key: &[u8],
        call: impl AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    ) -> Result<T, Error> {
        let answer = self.attempt(kind, call).await?;
        self.done.note(kind, key);
        Ok(answer)
    }

    async fn attempt<T>(
        &self,
        kind: Kind,
        call: impl AsyncFnOnce(&mut MultiplexedConnection) -> Result<T, RedisError>,
    ) -> Result<T, Error> {
        match self.connection.ask(call).await {
            Ok(answer) => Ok(answer),
            // What is seldom done is in a box: a call's future is moved with all that it may come to.
            Err(refusal) => Err(Box::pin(self.judge(kind, refusal)).await),
        }
    }

    /// What the server's user may not do is a store that is not what it was, if it could before; else the guest's affair.
    async fn judge(&self, kind: Kind, Refusal { concern, error, .. }: Refusal) -> Error {
        let why = match error {
            Error::Server(why) if concern == Concern::Standing => why,
            error => return error,
        };
        let Some(key) = self.done.refuse(kind) else {
            return match why.starts_with("ERR unknown command") {
                true => Error::Server(why),
                false => {
                    Error::Denied(format!("Redis does not allow it to the host's user: {why}"))
                }
            };
        };
        match self.rehearse(kind, &key).await {
            // Nobody could tell when it is back, so its message may hold its partition for a while only.
            Err(refusal) if refusal.concern != Concern::Standing => Error::Unavailable(why),
            // Who waits for it asks again, and sees at once whether it was the key.
            _ => was_done(&why),
        }
    }
}

fn was_done(why: &str) -> Error {
    Error::Unavailable(format!("{WAS_DONE}{why}"))
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

/// The same for many keys, in pairs as below: as many at once as fit on Lua's stack, since most of the time goes into calls. For
/// who may not do `MGET` and `MSET` it is done one by one, so that they are no rights that it takes.
static SET_IF_ALL_NEWER: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local new, written, seen = ARGV[1], {}, {}
        local function versions_of(keys)
            local versions = redis.pcall('MGET', unpack(keys))
            if not versions.err then return versions end
            versions = {}
            for i, key in ipairs(keys) do versions[i] = redis.call('GET', key) end
            return versions
        end
        local function set(pairs)
            if not redis.pcall('MSET', unpack(pairs)).err then return end
            for i = 1, #pairs, 2 do redis.call('SET', pairs[i], pairs[i + 1]) end
        end
        for from = 1, #KEYS, 2000 do
            local keys, sets = {}, {}
            for i = from + 1, math.min(from + 1999, #KEYS), 2 do keys[#keys + 1] = KEYS[i] end
            for i, old in ipairs(versions_of(keys)) do
                local at, key = from + 2 * (i - 1), keys[i]
                if seen[key] or (old and (#new < #old or (#new == #old and new <= old))) then
                    written[#written + 1] = 0
                else
                    written[#written + 1] = 1
                    local n = #sets
                    sets[n + 1], sets[n + 2] = KEYS[at], ARGV[1 + (at + 1) / 2]
                    sets[n + 3], sets[n + 4] = key, new
                    seen[key] = true
                end
            end
            if #sets > 0 then set(sets) end
        end
        return written
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
    let mut call = SET_ALL.prepare_invoke();
    call.arg(text(set.ttl));
    call.arg(match set.condition {
        None => "",
        Some(Condition::IfAbsent) => "absent",
        Some(Condition::IfPresent) => "present",
    });
    call.arg(text(set.version));
    entries(call, set)
}

fn text(number: Option<u64>) -> String {
    number.map_or(String::new(), |number| number.to_string())
}

fn entries(mut call: ScriptInvocation<'static>, set: &Set) -> ScriptInvocation<'static> {
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

/// Takes every key away with its version, and answers how many were there.
static DELETE_ALL: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        local deleted = 0
        for i = 1, #KEYS, 2 do
            deleted = deleted + redis.call('DEL', KEYS[i])
            redis.call('DEL', KEYS[i + 1])
        end
        return deleted
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
