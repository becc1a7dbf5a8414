//! A single-node Kafka broker inside a process, for development.
//!
//! It speaks the Kafka protocol on a loopback port and keeps its records in a folder, so that the same client,
//! the same consumer groups and tools such as `kcat` work without a server to install. Records are durable before
//! they are acknowledged and survive `kill -9`. It has one node, no transactions and no access control: who
//! needs those, or two machines, runs Apache Kafka.
//!
//! ```no_run
//! # async fn example() -> Result<(), embedded_kafka::StartError> {
//! use embedded_kafka::{Broker, Config};
//!
//! let broker = Broker::start(Config::new("data/kafka")).await?;
//! println!("bootstrap.servers={}", broker.address());
//! broker.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod api;
mod broker;
mod config;
mod folder;
mod group;
mod health;
mod node;
mod retention;
mod server;
mod shape;
mod storage;

pub use broker::Broker;
pub use config::{Config, StartError};
pub use folder::running;
pub use storage::topic_config::{TOPIC_CONFIGS, check_topic_config};
