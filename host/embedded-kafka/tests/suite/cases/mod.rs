//! What a client sees, on either broker.

pub(crate) mod admin;
pub(crate) mod clients;
pub(crate) mod compaction;
pub(crate) mod configs;
pub(crate) mod groups;
pub(crate) mod kcat;
pub(crate) mod producers;
pub(crate) mod reading;
pub(crate) mod records;
pub(crate) mod requests;
