//! Components: bytes in, callable stages out. With `capability/`, the only place that names wasmtime.

pub mod inspect;
