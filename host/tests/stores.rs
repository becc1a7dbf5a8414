//! The stores behind the capabilities `sql` and `redis`, on every kind that a pipeline can name.

#[path = "stores/redis/mod.rs"]
mod redis;
#[path = "stores/sql/mod.rs"]
mod sql;

/// A server that `make test` starts.
#[track_caller]
fn server(variable: &str) -> String {
    std::env::var(variable)
        .unwrap_or_else(|_| panic!("{variable} is not set: run the tests with `make test`"))
}

/// An address that nobody listens on.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}
