//! A batch at a time, each message answered as it says: what the probe knows, and `{"do": "short"}`
//! and `{"do": "long"}` for a list of outcomes of the wrong length.
//!
//! With the setting `sizes`, the size of every batch is emitted to the topic that it names.

use stagehost::{Message, Outcome, Outgoing, config};

fn handle(messages: Vec<Message>) -> Vec<Outcome> {
    if let Ok(Some(topic)) = config::get("sizes") {
        let size = Outgoing::new(topic).with_value(messages.len().to_string());
        size.send()
            .expect("a record that says how large the batch is");
    }
    let mut outcomes: Vec<Outcome> = Vec::new();
    for message in &messages {
        match asked_length(message).as_deref() {
            Some("short") => {}
            Some("long") => outcomes.extend([Ok(()), Ok(())]),
            _ => outcomes.push(test_guests::act::handle(message)),
        }
    }
    outcomes
}

fn asked_length(message: &Message) -> Option<String> {
    let command: serde_json::Value = message.json().ok()?;
    command["do"].as_str().map(str::to_owned)
}

stagehost::batch_stage!(handle);
