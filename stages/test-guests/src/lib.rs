//! Parts of the test components: what a message may ask for, and how its answer is written.
//!
//! A message's value is a [`command::Command`] in JSON, `{"do": "retry-until", "n": 3}` say. A
//! component asserts from inside: what must not be is a panic, which the host's test sees as a dead
//! letter with the cause `trap`.

pub mod act;
pub mod command;
pub mod pass;
pub mod post;
pub mod sandbox;
pub mod value;
