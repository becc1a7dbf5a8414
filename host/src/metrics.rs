//! The host's counters, as Prometheus reads them.
