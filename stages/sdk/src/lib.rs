//! Write a stage for Stagehost: a function and a line.
//!
//! A stage is called once a message, in the order of the partition. It answers `Ok` when it is
//! done, [`Fault::Retry`] for what will pass, [`Fault::Reject`] for what will not. The host does
//! the rest: order, retries, dead letters, backpressure, limits.
//!
//! ```
//! use serde::{Deserialize, Serialize};
//! use stagehost::{Message, Outcome, Outgoing, params, redis, sql};
//!
//! #[derive(Deserialize)]
//! struct Order {
//!     id: String,
//!     customer: String,
//!     cents: i64,
//! }
//!
//! #[derive(Serialize)]
//! struct Accepted<'a> {
//!     id: &'a str,
//!     total: i64,
//! }
//!
//! fn accept(message: Message) -> Outcome {
//!     let order: Order = message.json()?; // not an order: rejected, with the place and the reason
//!     let orders = sql::Connection::open("orders")?;
//!     orders.execute(
//!         "INSERT INTO orders (id, customer, cents) VALUES ($1, $2, $3)
//!          ON CONFLICT (id) DO NOTHING",
//!         &params![&order.id, &order.customer, order.cents],
//!     )?; // the database is away: retried
//!     let rows = orders.query(
//!         "SELECT CAST(sum(cents) AS bigint) AS total FROM orders WHERE customer = $1",
//!         &params![&order.customer],
//!     )?;
//!     let total: i64 = rows.get(0, "total")?;
//!     let totals = redis::Connection::open("totals")?;
//!     totals.set_text(&format!("total:{}", order.customer), &total.to_string())?;
//!     let accepted = Accepted { id: &order.id, total };
//!     Outgoing::json("orders.accepted", &order.customer, &accepted)?.send()?;
//!     Ok(())
//! }
//!
//! stagehost::stage!(accept);
//! # fn main() {}
//! ```
//!
//! The crate is a `cdylib` for the target `wasm32-wasip2`:
//!
//! ```toml
//! [lib]
//! crate-type = ["cdylib"]
//! ```
//!
//! `?` turns the errors of every capability into the fault that fits: what can't be reached and
//! what lost a race (SQLSTATE 40001, 40P01) is retried; everything else is rejected. A stage that
//! knows better matches on the error.
//!
//! A stage that gains from taking many messages in one call is a [`batch_stage!`].

#[doc(hidden)]
#[allow(missing_docs, unsafe_code, unreachable_pub, clippy::all)]
pub mod bindings;

pub mod config;
mod export;
mod fault;
pub mod log;
mod message;
pub mod producer;
pub mod redis;
pub mod sql;

pub use bindings::stage::stagehost::stage::types::{Fault, Header, Message};
pub use producer::Outgoing;

/// What a stage answers for a message.
pub type Outcome = Result<(), Fault>;

/// The README's examples, compiled by the tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
