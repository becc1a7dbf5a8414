//! As `identity`, a batch a call.

use stagehost::{Message, Outcome};
use test_guests::pass;

fn handle(messages: Vec<Message>) -> Vec<Outcome> {
    messages.into_iter().map(pass::on).collect()
}

stagehost::batch_stage!(handle);
