//! HTTP routes in: requests become records, and reads of a Redis store.
