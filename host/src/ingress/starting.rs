//! What HTTP clients get while the pipeline is starting: an answer at once, not a request that waits and is carried out
//! when its client has long given up.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::http::{self, Answer, Handler, RequestBody, busy};
use crate::metrics::Metrics;

/// How long answers that are under way may take once the routes are served: each is made at once.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Answers every request with 503 until the routes are served.
pub struct Starting {
    listener: std::net::TcpListener,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Starting {
    /// Begins to answer.
    pub fn serve(listener: TcpListener, metrics: Arc<Metrics>) -> io::Result<Self> {
        let listener = listener.into_std()?;
        let own = TcpListener::from_std(listener.try_clone()?)?;
        let stop = CancellationToken::new();
        let limits = http::Limits {
            drain_timeout: DRAIN_TIMEOUT,
            ..http::Limits::default()
        };
        let task = tokio::spawn(http::serve(own, NotYet, limits, metrics, stop.clone()));
        Ok(Self {
            listener,
            stop,
            task,
        })
    }

    /// Ends, and answers the listener: who connects from now on waits for its next user.
    pub async fn end(self) -> io::Result<TcpListener> {
        self.stop.cancel();
        // It does not fail but by a bug of the server's, which must not keep the routes from being served.
        let _ = self.task.await;
        TcpListener::from_std(self.listener)
    }
}

struct NotYet;

impl Handler for NotYet {
    const LISTENER: &'static str = super::LISTENER;

    async fn handle(&self, _request: Request<RequestBody>) -> Answer {
        busy("the pipeline is starting")
    }
}
