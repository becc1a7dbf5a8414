//! Doing what a command says.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value as Json, json};
use stagehost::{Fault, Message, Outcome, Outgoing, config, log, producer, redis, sql};

use crate::command::{Action, Command, RedisCall, RedisCondition, RedisOptions};
use crate::{sandbox, value};

/// Messages that this instance has had.
static SEEN: AtomicU64 = AtomicU64::new(0);

/// For how long [`Action::Bursts`] computes at a time: less than the host's slice of 4 ms.
const BURST: Duration = Duration::from_micros(3_500);

/// Does what the message says.
pub fn handle(message: &Message) -> Outcome {
    SEEN.fetch_add(1, Ordering::Relaxed);
    let command: Command = message.json()?;
    run(message, &command).map(drop)
}

/// The command's answer; an `Err` is the message's fault.
fn run(message: &Message, command: &Command) -> Result<Json, Fault> {
    let answer = match act(message, &command.action) {
        Ok(value) => json!({ "ok": value }),
        Err(Failure::Fault(fault)) => return Err(fault),
        Err(Failure::Call(error, fault)) if command.is_silent() => {
            log::warn(error);
            return Err(fault);
        }
        Err(Failure::Call(error, _)) => json!({ "error": error }),
    };
    if let Some(expected) = &command.expect {
        assert_eq!(&answer, expected, "at {}", message.place());
    }
    if let Some(topic) = &command.report {
        report(message, topic, &answer)?;
    }
    Ok(answer)
}

impl Command {
    fn is_silent(&self) -> bool {
        self.expect.is_none() && self.report.is_none()
    }
}

fn report(message: &Message, topic: &str, answer: &Json) -> Outcome {
    let report = json!({
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.offset,
        "attempt": message.attempt,
        "answer": answer,
    });
    let mut outgoing = Outgoing::new(topic).with_json(&report)?;
    outgoing.key.clone_from(&message.key);
    Ok(outgoing.send()?)
}

/// Why there is no answer.
enum Failure {
    /// The command asked for this fault.
    Fault(Fault),
    /// A call to the host failed: the error as JSON, and the fault that `?` makes of it.
    Call(Json, Fault),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<producer::Error> for Failure {
    fn from(error: producer::Error) -> Self {
        use producer::Error::{Denied, Other, TooLarge};
        let json = match &error {
            Denied(why) => json!({ "denied": why }),
            TooLarge(limit) => json!({ "too-large": limit }),
            Other(why) => json!({ "other": why }),
        };
        Self::Call(json, error.into())
    }
}

impl From<sql::Error> for Failure {
    fn from(error: sql::Error) -> Self {
        use sql::Error::{Database, Denied, TooLarge, Unavailable, Unsupported};
        let json = match &error {
            Denied(why) => json!({ "denied": why }),
            // The words differ from database to database; SQLSTATE does not.
            Database(e) => json!({ "database": { "sqlstate": e.sqlstate } }),
            Unavailable(_) => json!("unavailable"),
            Unsupported(why) => json!({ "unsupported": why }),
            TooLarge(limit) => json!({ "too-large": limit }),
        };
        Self::Call(json, error.into())
    }
}

impl From<redis::Error> for Failure {
    fn from(error: redis::Error) -> Self {
        use redis::Error::{Denied, Server, TooLarge, Unavailable};
        let json = match &error {
            Denied(why) => json!({ "denied": why }),
            Unavailable(_) => json!("unavailable"),
            Server(why) => json!({ "server": why }),
            TooLarge(limit) => json!({ "too-large": limit }),
        };
        Self::Call(json, error.into())
    }
}

fn act(message: &Message, action: &Action) -> Result<Json, Failure> {
    match action {
        Action::Ok => Ok(Json::Null),
        Action::Retry => Err(Fault::retry("as told").into()),
        Action::RetryUntil { n } if message.attempt < *n => {
            Err(Fault::retry(format_args!("attempt {} of {n}", message.attempt)).into())
        }
        Action::RetryUntil { .. } => Ok(json!(message.attempt)),
        Action::Reject => Err(Fault::reject("as told").into()),
        Action::Trap => panic!("as told"),
        Action::TrapAfter { lines } => {
            lines.iter().for_each(|line| eprintln!("{line}"));
            std::process::abort()
        }
        Action::Spin => sandbox::spin(),
        Action::Bursts => loop {
            sandbox::compute(BURST);
            std::thread::sleep(Duration::from_nanos(1));
        },
        Action::Compute { micros } => {
            sandbox::compute(Duration::from_micros(*micros));
            Ok(Json::Null)
        }
        Action::Overflow => Ok(json!(sandbox::overflow(0))),
        Action::Exit { code } => std::process::exit(*code),
        Action::TrapIfUsed => {
            assert_eq!(SEEN.load(Ordering::Relaxed), 1, "this instance was used");
            Ok(Json::Null)
        }
        Action::LeakHandles { store } => loop {
            std::mem::forget(redis::Connection::open(store)?);
        },
        Action::RetryAtLength { bytes } => Err(Fault::retry("w".repeat(*bytes)).into()),
        Action::LogMany { n, bytes, print } => {
            let line = "x".repeat(*bytes);
            for _ in 0..*n {
                match print {
                    true => eprintln!("{line}"),
                    false => log::info(&line),
                }
            }
            Ok(Json::Null)
        }
        Action::Sleep { ms } => {
            std::thread::sleep(Duration::from_millis(*ms));
            Ok(Json::Null)
        }
        Action::EatMemory { mib } => Ok(sandbox::eat_memory(*mib)),
        Action::Emit { .. }
        | Action::EmitTombstone { .. }
        | Action::EmitHuge { .. }
        | Action::EmitDenied { .. } => emit(message, action),
        Action::Sql { store, .. } => sql(&sql::Connection::open(store)?, action),
        Action::Redis { store, call } => redis(&redis::Connection::open(store)?, call),
        Action::Config { key: Some(key) } => Ok(json!(config::get(key)?)),
        Action::Config { key: None } => Ok(json!(config::all()?)),
        Action::Log { message } => {
            for write in [log::trace, log::debug, log::info, log::warn, log::error] {
                write(message);
            }
            Ok(Json::Null)
        }
        Action::Print { message } => {
            println!("{message}");
            eprintln!("{message}");
            Ok(Json::Null)
        }
        Action::Env => Ok(sandbox::no_environment()),
        Action::Fs => Ok(sandbox::no_files()),
        Action::Net { port } => Ok(sandbox::no_network(*port)),
        Action::Clock => Ok(sandbox::clocks()),
        Action::Random => Ok(sandbox::random()),
        Action::Count => Ok(json!(SEEN.load(Ordering::Relaxed))),
        Action::Describe => Ok(describe(message)),
        Action::Steps { steps } => {
            let answers: Result<Vec<Json>, Fault> =
                steps.iter().map(|step| run(message, step)).collect();
            Ok(Json::from(answers?))
        }
    }
}

fn emit(message: &Message, action: &Action) -> Result<Json, Failure> {
    match action {
        Action::Emit {
            topic,
            n,
            key,
            value,
            headers,
        } => {
            for index in 0..*n {
                let mut outgoing = Outgoing::new(topic);
                outgoing.key = key
                    .as_ref()
                    .map(|key| key.clone().into_bytes())
                    .or_else(|| message.key.clone());
                for (name, value) in headers {
                    let value = value.as_ref().map(|value| value.clone().into_bytes());
                    outgoing.headers.push(stagehost::Header {
                        name: name.clone(),
                        value,
                    });
                }
                let default = json!({ "from": message.place(), "index": index });
                outgoing
                    .with_json(value.as_ref().unwrap_or(&default))?
                    .send()?;
            }
        }
        Action::EmitTombstone { topic } => {
            let mut outgoing = Outgoing::new(topic);
            outgoing.key.clone_from(&message.key);
            outgoing.send()?;
        }
        Action::EmitHuge { topic, bytes } => {
            Outgoing::new(topic).with_value(vec![b'x'; *bytes]).send()?
        }
        Action::EmitDenied { topic } => {
            let answer = Outgoing::new(topic).with_value("x").send();
            assert!(
                matches!(answer, Err(producer::Error::Denied(_))),
                "{answer:?}"
            );
        }
        _ => unreachable!("not an emit"),
    }
    Ok(Json::Null)
}

fn sql(connection: &sql::Connection, action: &Action) -> Result<Json, Failure> {
    let Action::Sql {
        statement,
        params,
        many,
        execute,
        ..
    } = action
    else {
        unreachable!("not SQL")
    };
    let list = |params: &[Json]| -> Vec<sql::Value> { params.iter().map(value::param).collect() };
    if let Some(many) = many {
        let lists: Vec<_> = many.iter().map(|params| list(params)).collect();
        return Ok(json!(connection.execute_many(statement, &lists)?));
    }
    if *execute {
        return Ok(json!(connection.execute(statement, &list(params))?));
    }
    Ok(value::rows(&connection.query(statement, &list(params))?))
}

fn redis(connection: &redis::Connection, call: &RedisCall) -> Result<Json, Failure> {
    Ok(match call {
        RedisCall::Get { key } => text(connection.get(key)?),
        RedisCall::GetMany { keys } => connection.get_many(keys)?.into_iter().map(text).collect(),
        RedisCall::Set {
            key,
            value,
            options,
        } => json!(connection.set(key, value.as_bytes(), Some(options.build()))?),
        RedisCall::SetMany { entries, options } => {
            let entries: Vec<(String, Vec<u8>)> = entries
                .iter()
                .map(|(key, value)| (key.clone(), value.clone().into_bytes()))
                .collect();
            connection.set_many(&entries, Some(options.build()))?;
            Json::Null
        }
        RedisCall::Delete { keys } => json!(connection.delete(keys)?),
        RedisCall::Increment { key, delta } => json!(connection.increment(key, *delta)?),
        RedisCall::Execute { command, arguments } => {
            let arguments: Vec<Vec<u8>> =
                arguments.iter().map(|a| a.clone().into_bytes()).collect();
            reply(connection.execute(command, &arguments)?)
        }
    })
}

impl RedisOptions {
    fn build(&self) -> redis::SetOptions {
        redis::SetOptions {
            ttl: self.ttl,
            condition: self.condition.map(|condition| match condition {
                RedisCondition::IfAbsent => redis::Condition::IfAbsent,
                RedisCondition::IfPresent => redis::Condition::IfPresent,
            }),
            version: self.version,
        }
    }
}

fn reply(reply: redis::Reply) -> Json {
    use redis::Reply::{Data, Int, Items, Nil, Okay, Status};
    match reply {
        Nil => json!("nil"),
        Okay => json!("okay"),
        Int(n) => json!({ "int": n }),
        Data(bytes) => json!({ "data": text(Some(bytes)) }),
        Status(status) => json!({ "status": status }),
        Items(items) => {
            json!({ "items": items.into_iter().map(Some).map(text).collect::<Vec<_>>() })
        }
    }
}

fn describe(message: &Message) -> Json {
    let headers: Vec<(String, Json)> = message
        .headers
        .iter()
        .map(|header| (header.name.clone(), text(header.value.clone())))
        .collect();
    json!({
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.offset,
        "timestamp": message.timestamp,
        "attempt": message.attempt,
        "key": text(message.key.clone()),
        "value": text(message.value.clone()),
        "headers": headers,
    })
}

/// Text where the bytes are UTF-8, a list of numbers where not, null where there are none.
fn text(bytes: Option<Vec<u8>>) -> Json {
    bytes.map_or(Json::Null, |bytes| match String::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(e) => json!(e.into_bytes()),
    })
}
