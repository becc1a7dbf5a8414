//! The stores behind the capabilities `sql` and `redis`, on every kind that a pipeline can name.

mod redis;
mod sql;

/// An address that nobody listens on.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}
