//! The host as its users meet it: real processes, real servers, real components.
//!
//! `make test` starts Apache Kafka, PostgreSQL and Redis and builds the components; a test whose
//! server or component is missing fails.

mod admin;
mod bench;
mod blog;
mod brokers;
mod check;
mod concurrent;
mod delivery;
mod group_offsets;
mod ids;
mod ingress;
mod letters;
mod lifecycle;
mod logs;
mod neighbours;
mod offsets;
mod produce_consume;
mod progress_row;
mod refusals;
mod restored;
mod scripts;
mod security;
mod sick;
mod sqlite;
mod stores;
mod support;
mod transactional;
mod waits;
mod wire;
