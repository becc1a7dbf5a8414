//! The one real client: Kafka, or what speaks its protocol, through rdkafka.
