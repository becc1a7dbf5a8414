//! What stages may use: one file (or folder) a WIT interface, with one `add_to_linker` each.

pub mod logging;
pub mod producer;
pub mod redis;
pub mod sql;

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be reached, or did not answer in time. Worth another try.
    #[error("not available: {0}")]
    Unavailable(String),
    /// It answered with an error, and would again.
    #[error("{0}")]
    Refused(String),
}
