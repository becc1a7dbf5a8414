//! The two macros that make a component of a function.

/// Makes a function the component's handler, called once a message.
///
/// ```
/// use stagehost::{Message, Outcome, Outgoing};
///
/// fn copy(message: Message) -> Outcome {
///     let copy = Outgoing {
///         topic: "copies".to_owned(),
///         key: message.key,
///         value: message.value,
///         headers: message.headers,
///     };
///     Ok(copy.send()?)
/// }
///
/// stagehost::stage!(copy);
/// # fn main() {}
/// ```
///
/// On targets other than WebAssembly it only checks the function's type, so that a stage's parts
/// can be tested with a plain `cargo test`.
#[macro_export]
macro_rules! stage {
    ($handle:path) => {
        const _: fn($crate::Message) -> $crate::Outcome = $handle;

        #[cfg(target_family = "wasm")]
        const _: () = {
            struct Stage;

            impl $crate::bindings::stage::exports::stagehost::stage::handler::Guest for Stage {
                fn handle(message: $crate::Message) -> $crate::Outcome {
                    $handle(message)
                }
            }

    $crate::bindings::stage::export!(Stage with_types_in $crate::bindings::stage);
        };
    };
}

/// Makes a function the component's handler, called with consecutive messages of one partition.
///
/// It answers one outcome a message, in the order of the messages; a list of another length counts
/// as a trap. What the call emitted is kept when it returns, so emit only for messages that are
/// answered with `Ok`.
///
/// ```
/// use serde::Deserialize;
/// use stagehost::{Fault, Message, Outcome, log, params, sql};
///
/// #[derive(Deserialize)]
/// struct Reading {
///     sensor: String,
///     celsius: f64,
/// }
///
/// fn store(messages: Vec<Message>) -> Vec<Outcome> {
///     let parsed: Vec<Result<Reading, Fault>> = messages.iter().map(Message::json).collect();
///     let rows: Vec<Vec<sql::Value>> = parsed
///         .iter()
///         .flatten()
///         .map(|reading| params![&reading.sensor, reading.celsius].to_vec())
///         .collect();
///     let stored = store_rows(&rows);
///     log::debug(format_args!("{} of {} readings", rows.len(), messages.len()));
///     parsed.into_iter().map(|reading| reading.and(stored.clone()).map(drop)).collect()
/// }
///
/// fn store_rows(rows: &[Vec<sql::Value>]) -> Outcome {
///     let readings = sql::Connection::open("readings")?;
///     readings.execute_many("INSERT INTO readings (sensor, celsius) VALUES ($1, $2)", rows)?;
///     Ok(())
/// }
///
/// stagehost::batch_stage!(store);
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! batch_stage {
    ($handle:path) => {
        const _: fn(Vec<$crate::Message>) -> Vec<$crate::Outcome> = $handle;

        #[cfg(target_family = "wasm")]
        const _: () = {
            struct Stage;

            impl $crate::bindings::batch_stage::exports::stagehost::stage::batch_handler::Guest for Stage {
                fn handle(messages: Vec<$crate::Message>) -> Vec<$crate::Outcome> {
                    $handle(messages)
                }
            }

            $crate::bindings::batch_stage::export!(Stage with_types_in $crate::bindings::batch_stage);
        };
    };
}
