//! What the stages of the benchmarks have in common: they pass messages on, as they are or changed.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use stagehost::{Fault, Message, Outcome, Outgoing, config};

/// Read once an instance: it is not what is measured.
static OUTPUT: OnceLock<String> = OnceLock::new();

#[derive(Deserialize, Serialize)]
struct Post {
    uid: String,
    title: String,
    content: String,
}

/// Emits the message, byte for byte but without its headers, to the topic that the setting `output` names.
pub fn on(message: Message) -> Outcome {
    send(message.key, message.value)
}

/// The same with a value that is read as JSON, changed and written again.
pub fn on_rewritten(message: Message) -> Outcome {
    let mut post: Post = message.json()?;
    post.title.push('!');
    let value = serde_json::to_vec(&post).map_err(Fault::reject)?;
    send(message.key, Some(value))
}

fn send(key: Option<Vec<u8>>, value: Option<Vec<u8>>) -> Outcome {
    let outgoing = Outgoing {
        topic: output()?.to_owned(),
        key,
        value,
        headers: Vec::new(),
    };
    Ok(outgoing.send()?)
}

fn output() -> Result<&'static str, Fault> {
    if let Some(topic) = OUTPUT.get() {
        return Ok(topic);
    }
    let topic = config::require("output")?;
    Ok(OUTPUT.get_or_init(|| topic))
}
