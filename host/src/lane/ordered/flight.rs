//! Outputs of an ordered lane on their way.

use std::future;
use std::ops::Range;
use std::pin::Pin;

use futures::FutureExt;
use futures::future::{BoxFuture, MaybeDone, maybe_done};

use super::super::held::{Held, Sent};
use super::super::{Common, LOG_PATIENCE, Stopped};
use crate::delivery::Handler;
use crate::log::Sink;

/// The records of one batch that an output came of: in a batch call nobody can tell which. The batch by its number.
pub(super) type Origin = (u64, Range<usize>);

/// Outputs on their way to the log.
pub(super) struct Flight<'a> {
    landing: MaybeDone<BoxFuture<'a, Landing>>,
    /// When it lands, this is settled: the batches before the one of this number, and so many records of it.
    pub(super) mark: (u64, usize),
}

pub(super) type Landing = Result<Sent<Origin>, Stopped>;

/// As [`Flight::landed`]; never, where there is none.
pub(super) async fn landing(flight: &mut Option<Flight<'_>>) {
    match flight {
        Some(aloft) => aloft.landed().await,
        None => future::pending().await,
    }
}

impl<'a> Flight<'a> {
    /// Sends the outputs, after a wait if those before were not taken so many times in a row.
    pub(super) fn new<K: Sink, H: Handler<()>>(
        common: &'a Common<K, H>,
        held: Held<Origin>,
        failed: u32,
        mark: (u64, usize),
    ) -> Self {
        let wait = (failed > 0).then(|| common.backoff(&LOG_PATIENCE, failed));
        let landing = async move {
            if let Some(wait) = wait {
                held.wait(common, wait).await?;
            }
            Ok(held.send(common).await)
        };
        Self {
            landing: maybe_done(landing.boxed()),
            mark,
        }
    }

    /// Waits until it has. Polled where it is, so that it goes on at the next call; what came of it stays there.
    pub(super) async fn landed(&mut self) {
        (&mut self.landing).await;
    }

    /// Whether it has landed with all that it had.
    pub(super) fn is_complete(&mut self) -> bool {
        let landing = Pin::new(&mut self.landing).output_mut();
        matches!(landing, Some(Ok(sent)) if sent.is_complete())
    }

    /// What came of it, once it has landed.
    pub(super) fn take_landing(&mut self) -> Option<Landing> {
        Pin::new(&mut self.landing).take_output()
    }
}
