//! A partition that is compacted.

use std::path::PathBuf;

use tracing::{debug, error, warn};

use super::super::compaction::{
    Abandoned, Closed, MAX_KEYS, Pass, Progress, Replacement, plan, swap,
};
use super::super::lock;
use super::super::segment::Segment;
use super::{Log, Partition, remove_file};

#[derive(Debug, Default)]
pub(super) struct Compaction {
    pub(super) progress: Progress,
    /// A segment is damaged: there is nothing to be done before somebody looks at it.
    pub(super) is_stuck: bool,
}

impl Partition {
    /// Compacts what is closed, if the topic is to be compacted and there is enough that is new. Gives up when
    /// `is_unwanted`.
    pub(crate) fn compact(&self, now_ms: i64, is_unwanted: &dyn Fn() -> bool) {
        let settings = self.settings();
        let mut state = lock(&self.compaction);
        if !settings.compacts || state.is_stuck || lock(&self.log).usable().is_err() {
            return;
        }
        let closed = lock(&self.log).closed();
        let Some(segments) = plan(closed, &state.progress, &settings, now_ms) else {
            return;
        };
        let pass = Pass {
            segments,
            settings: &settings,
            now_ms,
            is_unwanted: &|| is_unwanted() || self.is_deleted(),
            max_keys: MAX_KEYS,
            is_last_of_producer: &|header| lock(&self.log).producers.is_last(header),
        };
        match pass.run(state.progress.clean_until, |replacement| {
            self.replace(replacement)
        }) {
            Ok(progress) => {
                state.progress = progress;
                debug!(
                    partition = self.name,
                    bytes = self.bytes(),
                    offset = progress.clean_until,
                    "compacted what is before the offset"
                );
            }
            Err(Abandoned::Unwanted) => {}
            Err(_) if self.is_deleted() => {}
            Err(Abandoned::Io(error)) => {
                warn!(partition = self.name, %error, "could not compact; the next round tries again");
            }
            Err(damaged @ Abandoned::Damaged { .. }) => {
                error!(
                    partition = self.name,
                    "is not compacted any more: {damaged}"
                );
                state.is_stuck = true;
            }
        }
    }

    /// Puts what compaction left of some segments in their place.
    pub(super) fn replace(
        &self,
        Replacement { olds, mut new }: Replacement,
    ) -> Result<(), Abandoned> {
        let log = &mut *lock(&self.log);
        let at = log.position_of(&olds);
        let (Some(at), Ok(())) = (at, log.usable()) else {
            remove_file(new.path())?;
            return Err(Abandoned::Unwanted);
        };
        let paths: Vec<PathBuf> = olds.iter().map(|old| old.path.clone()).collect();
        if let Err(error) = swap::publish(&mut new).and_then(|()| swap::finish(&mut new, &paths)) {
            self.go_offline(log, &error);
            return Err(error.into());
        }
        let rest = log.segments.split_off(at + olds.len());
        log.segments.truncate(at);
        log.segments.push_back(new);
        log.segments.extend(rest);
        Ok(())
    }
}

impl Log {
    /// The segments that nothing is written to any more.
    pub(super) fn closed(&self) -> Vec<Closed> {
        let count = self.segments.len().saturating_sub(1);
        let closed = |segment: &Segment| Closed {
            base_offset: segment.base_offset(),
            next_offset: segment.next_offset(),
            path: segment.path().to_owned(),
            len: segment.len(),
            max_timestamp: segment.max_timestamp(),
        };
        self.segments.iter().take(count).map(closed).collect()
    }

    /// Where these closed segments are, if all of them are here still.
    fn position_of(&self, closed: &[Closed]) -> Option<usize> {
        let first = closed.first()?;
        let at = self
            .segments
            .iter()
            .position(|segment| segment.base_offset() == first.base_offset)?;
        let here = self.segments.iter().skip(at).zip(closed);
        let all_here = here.clone().count() == closed.len()
            && here
                .into_iter()
                .all(|(segment, closed)| segment.path() == closed.path)
            && at + closed.len() < self.segments.len();
        all_here.then_some(at)
    }
}
