//! Finding out whether TLS is what an address speaks that could not be spoken to.

use tokio::net::TcpStream;

/// Whether it speaks TLS from the first byte on, whoever it is.
pub(super) async fn speaks_tls(host: &str, port: u16) -> bool {
    let Ok(stream) = TcpStream::connect((host, port)).await else {
        return false;
    };
    // It reads files.
    let connector = tokio::task::spawn_blocking(|| {
        native_tls::TlsConnector::builder()
            .danger_accept_invalid_certs(true)
            .danger_accept_invalid_hostnames(true)
            .build()
    });
    let Ok(Ok(connector)) = connector.await else {
        return false;
    };
    let connector = tokio_native_tls::TlsConnector::from(connector);
    // A server that asks for a certificate refuses who has none, but only once it has said that it speaks TLS.
    connector.connect(host, stream).await.is_ok()
}
