//! The host as its users meet it: real processes, real servers, real components.
//!
//! `make test` starts Apache Kafka, PostgreSQL and Redis and builds the components; a test whose
//! server or component is missing fails.

mod blog;
mod delivery;
mod lifecycle;
mod support;
