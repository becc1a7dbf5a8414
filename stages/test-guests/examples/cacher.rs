//! Keeps the newest `seq` of each `key` in Redis, in the order of the partition.

use stagehost::redis::{Connection, SetOptions};
use stagehost::{Fault, Message, Outcome};

fn cache(message: Message) -> Outcome {
    let told: serde_json::Value = message.json()?;
    let key = told["key"]
        .as_str()
        .ok_or_else(|| Fault::reject("no key"))?;
    let newer = SetOptions::default().with_version(message.offset);
    let value = told["seq"].to_string();
    Connection::open("cache")?.set(&format!("cache:{key}"), value.as_bytes(), Some(newer))?;
    Ok(())
}

stagehost::stage!(cache);
