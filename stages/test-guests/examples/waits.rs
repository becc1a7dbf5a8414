//! Waits for as many milliseconds as the message says, and passes it on: for benchmarks.

use std::thread::sleep;
use std::time::Duration;

use serde::Deserialize;
use stagehost::{Message, Outcome};

#[derive(Deserialize)]
struct Work {
    ms: u64,
}

fn wait(message: Message) -> Outcome {
    let work: Work = message.json()?;
    sleep(Duration::from_millis(work.ms));
    test_guests::pass::on(message)
}

stagehost::stage!(wait);
