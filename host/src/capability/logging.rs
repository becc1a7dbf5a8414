//! `wasi:logging` and the guest's stdout and stderr, into the host's log.
