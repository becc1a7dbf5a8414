//! Does what each message says.

use stagehost::{Message, Outcome};

fn handle(message: Message) -> Outcome {
    test_guests::act::handle(&message)
}

stagehost::stage!(handle);
