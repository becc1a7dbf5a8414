//! From its second instance on, begins as its setting `start` says, before any call.

use stagehost::{Message, Outcome, config, redis};
use test_guests::sandbox;

// SAFETY: the name that a component's tools look for is exported once.
#[allow(unsafe_code, missing_docs)]
#[unsafe(no_mangle)]
pub extern "C" fn _initialize() {
    let cache = redis::Connection::open("cache").expect("a grant");
    if cache.increment("p:starts", 1).expect("a sum") == 1 {
        return;
    }
    match config::get("start").expect("the settings").as_deref() {
        Some("spin") => sandbox::spin(),
        Some("trap") => panic!("as told"),
        Some("overflow") => assert_eq!(sandbox::overflow(0), 0),
        Some("exit") => std::process::exit(3),
        Some("eat-memory") => assert_eq!(sandbox::eat_memory(None), 0),
        _ => {}
    }
}

fn handle(_: Message) -> Outcome {
    Ok(())
}

stagehost::stage!(handle);
