//! What a lane drops since it has taken it in before is counted; and where it is more than a crash upstream explains,
//! it is said.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use crate::delivery::seen::{Admitted, Fall};
use crate::record::Record;

/// How often it is said at most.
const SAY_INTERVAL: Duration = Duration::from_secs(60);

/// Records that come together: how many, and the topic, partition and offset of the last one.
pub(super) struct Together {
    count: usize,
    last: Option<(Arc<str>, i32, i64)>,
}

impl Together {
    pub(super) fn of(records: &[Record]) -> Self {
        let place = |record: &Record| (record.topic.clone(), record.partition, record.offset);
        Self {
            count: records.len(),
            last: records.last().map(place),
        }
    }
}

/// What one lane has dropped.
#[derive(Default)]
pub(super) struct Repetitions {
    /// Of the records that are being looked at.
    dropped: usize,
    /// The first of them whose lane's generation fell.
    fall: Option<Fall>,
    /// Since it was last said.
    unsaid: usize,
    said: Option<Instant>,
}

impl Repetitions {
    /// Whether a record was there before, and is to be dropped.
    pub(super) fn is_one(&mut self, admitted: Admitted) -> bool {
        match admitted {
            Admitted::New => return false,
            Admitted::Repeated => {}
            Admitted::Fallen(fall) => {
                self.fall.get_or_insert(fall);
            }
        }
        self.dropped += 1;
        true
    }

    /// All records were looked at that came together.
    pub(super) fn looked(&mut self, stage: &str, Together { count, last }: Together) {
        let dropped = std::mem::take(&mut self.dropped);
        let Some((topic, partition, offset)) = last.filter(|_| dropped > 0) else {
            return;
        };
        self.unsaid += dropped;
        if dropped < count && self.fall.is_none() {
            return;
        }
        let now = Instant::now();
        let is_late = |said| now.duration_since(said) >= SAY_INTERVAL;
        if !self.said.is_none_or(is_late) {
            return;
        }
        self.said = Some(now);
        let dropped = std::mem::take(&mut self.unsaid);
        let topic = &*topic;
        match self.fall.take() {
            Some(Fall {
                lane,
                generation,
                highest,
            }) => warn!(
                stage,
                topic,
                partition,
                offset,
                dropped,
                "dropped as repetitions: the lane {lane} sends outputs of generation {generation}, and {highest} was here \
                 before. A few come late after a crash; if more come, its database went back to an older copy, and what it \
                 sends is lost here: raise `generation` of its row in stagehost_progress above {highest} and start its \
                 host again"
            ),
            None => warn!(
                stage,
                topic,
                partition,
                offset,
                dropped,
                "all records of a batch were dropped as repetitions, by their `stagehost-id`: it is so after a crash of the \
                 stage that sent them; records that are appended again to be processed again must not have that header"
            ),
        }
    }
}
