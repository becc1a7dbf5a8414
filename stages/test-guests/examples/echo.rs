//! Emits every message, byte for byte, to the topic that the setting `to` names.

use stagehost::{Message, Outcome, Outgoing, config};

fn echo(message: Message) -> Outcome {
    let outgoing = Outgoing {
        topic: config::require("to")?,
        key: message.key,
        value: message.value,
        headers: message.headers,
    };
    Ok(outgoing.send()?)
}

stagehost::stage!(echo);
