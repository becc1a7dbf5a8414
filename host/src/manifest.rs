//! The pipeline file as it is written.
