//! What a lane makes of its row that is not as it has left it, or not as the log knows it: the database may be another one.

use std::mem;

use tracing::{error, info, warn};

use super::compare::{Fate, Row, Said, Verdict};
use super::{Ending, FENCED_PATIENCE, Lane, Tenure};
use crate::capability::StoreError;
use crate::delivery::Handler;
use crate::delivery::progress::Ledger;
use crate::delivery::seen;
use crate::lane::{Halt, LOG_PATIENCE};
use crate::log::{Addressed, Source};
use crate::pipeline::{OnGap, Retry};
use crate::readiness::Wait;
use crate::record::Outgoing;

impl<S, K, H, L> Lane<S, K, H, L>
where
    S: Source,
    K: Addressed + 'static,
    H: Handler<L::Transaction>,
    L: Ledger,
{
    /// What has become of the row that is not as the lane has left it, and how to wait before it is claimed again. Where the
    /// database is another one, nobody else is there to be waited for. `None` if the lane is to stop.
    pub(super) async fn fate_of_row(&self) -> Option<(&'static Retry, String)> {
        let found = match self.look().await? {
            Ok(found) => found,
            Err(error) => {
                let why = format!("its row in stagehost_progress can't be looked at: {error}");
                return Some((&LOG_PATIENCE, why));
            }
        };
        let left = self.left.or(found);
        Some(
            match left.map_or(Fate::Changed, |left| Fate::of(left, found)) {
                Fate::Taken => {
                    let why = "another host has taken the partition over";
                    (&FENCED_PATIENCE, why.to_owned())
                }
                Fate::Kept => {
                    let why =
                        "its row in stagehost_progress is as it was, and does not take a commit";
                    (&FENCED_PATIENCE, why.to_owned())
                }
                Fate::Changed => {
                    let words =
                        |row: Option<Row>| row.map_or("none".to_owned(), |row| row.to_string());
                    let why = format!(
                        "{}: its row in stagehost_progress is another one than it has left: {}, and was {}",
                        self.store,
                        words(found),
                        words(left)
                    );
                    (&LOG_PATIENCE, why)
                }
            },
        )
    }

    /// Says what the group's commit has to say of the row, and sees to it that new outputs are of a generation above all that
    /// the lane has had. Answers why the lane can't go on, if it can't.
    pub(super) async fn heed(
        &mut self,
        tenure: &mut Tenure,
        row: Row,
        verdict: Verdict,
    ) -> Result<Option<Halt>, Ending> {
        let said = self.said(row, verdict);
        // They may have been written anew, as of a generation that a stop then kept from the row.
        let written = tenure.claimed.iter().filter_map(seen::generation).max();
        let written = written.unwrap_or(tenure.generation);
        if let Some(before) = verdict.before() {
            self.common.metrics().row_lost();
            let highest = before.generation.max(tenure.generation).max(written);
            let Some(above) = highest.checked_add(1) else {
                return Ok(Some(Halt(format!(
                    "{said}; no generation is above {highest}"
                ))));
            };
            let is_of_its_past =
                matches!(verdict, Verdict::Older { .. }) && before.generation == tenure.generation;
            let hidden = match is_of_its_past {
                // A later commit waited until they were in the log.
                true => Vec::new(),
                false => self.write_anew(tenure, above).await?,
            };
            self.raise_generation(tenure, above).await?;
            if !hidden.is_empty() {
                let (delivery, next_offset) = (self.delivery(), tenure.next_offset);
                tenure.outbox.launch(delivery, hidden, next_offset);
            }
        } else if written > tenure.generation {
            self.raise_generation(tenure, written).await?;
        }
        tenure.claimed = Vec::new();
        let (stage, topic, partition) = (self.common.stage(), &*self.id.topic, self.id.partition);
        match verdict {
            // Another host may have caught up since.
            Verdict::Agree => self.caught_up(tenure.next_offset),
            Verdict::Begins { .. } => info!(stage, topic, partition, "{said}"),
            Verdict::Unset { .. } | Verdict::Set { .. } => {
                warn!(stage, topic, partition, "{said}");
            }
            Verdict::Passed { .. } => {
                warn!(stage, topic, partition, "{said}");
                // The group's offset is the only witness of it until the row says so.
                tenure.outbox.forget_done();
            }
            Verdict::Older { before } | Verdict::Another { before } => {
                error!(stage, topic, partition, "{said}");
                self.process_again(tenure.next_offset, before.next_offset);
            }
            Verdict::Emptied {
                offset: Some(_), ..
            } if self.common.policy().on_gap == OnGap::Continue => {
                let on = "going on at the group's offset, as `on-gap` says";
                error!(stage, topic, partition, "{said}; {on}");
            }
            Verdict::Emptied { .. } => return Ok(Some(Halt(said))),
        }
        Ok(None)
    }

    /// Outputs that the row has may never have got into the log, where newer ones of the lane hide them. They are written into
    /// the row once more, as ones of a generation above; answers them.
    async fn write_anew(
        &mut self,
        tenure: &mut Tenure,
        generation: i64,
    ) -> Result<Vec<Outgoing>, Ending> {
        let mut outputs = mem::take(&mut tenure.claimed);
        if !outputs.is_empty() {
            self.land(tenure).await?;
            outputs
                .iter_mut()
                .for_each(|output| seen::raise(output, generation));
            while !self.write_row(tenure, &outputs).await? {
                let why = "the outputs that its row has can't be written anew";
                self.trouble(&LOG_PATIENCE, why).await?;
            }
        }
        Ok(outputs)
    }

    /// The database lacks what came of these records, and whoever asks is told so until it has it again.
    fn process_again(&mut self, from: Option<i64>, upto: i64) {
        let before = self.again.take().map(|(upto, _)| upto);
        let upto = before.map_or(upto, |before| before.max(upto));
        let from = from.unwrap_or_default();
        if from < upto {
            let what = format!(
                "until {} has again what it lost when it went back to another copy: records from offset {from} up to {upto} \
                 are processed again",
                self.store
            );
            self.again = Some((upto, self.common.status.begin(Wait::Again(what))));
        }
    }

    /// All records below the offset are processed.
    pub(super) fn caught_up(&mut self, next_offset: Option<i64>) {
        if (self.again.as_ref()).is_some_and(|(upto, _)| next_offset >= Some(*upto)) {
            self.again = None;
            info!(
                stage = self.common.stage(),
                topic = &*self.id.topic,
                partition = self.id.partition,
                "{} has again what it lost: all records that it lacked are processed again",
                self.store
            );
        }
    }

    fn said(&self, row: Row, verdict: Verdict) -> String {
        let said = Said {
            verdict,
            row,
            id: &self.id,
            store: &self.store,
        };
        said.to_string()
    }

    /// Writes a higher generation into the row.
    async fn raise_generation(&mut self, tenure: &mut Tenure, to: i64) -> Result<(), Ending> {
        loop {
            let raised = self.ledger.raise(&self.id, tenure.epoch, to);
            match self.answer(raised).await {
                Ok(Some(claim)) if claim.commits == tenure.commits => {
                    tenure.generation = claim.generation;
                    return Ok(());
                }
                Ok(_) => return Err(Ending::Fenced),
                Err(error) => self.await_database(error).await?,
            }
        }
    }

    /// Whether the row is as the lane has left it, where no commit tells for long. One that another host has taken is its
    /// affair until there is something to commit; and so is a database that does not answer.
    pub(super) async fn look_at_row(&mut self, left: Row) -> Result<(), Ending> {
        let Some(Ok(found)) = self.look().await else {
            return Ok(());
        };
        match Fate::of(left, found) {
            Fate::Kept => self.row_kept(),
            Fate::Taken => {}
            Fate::Changed => return Err(Ending::Fenced),
        }
        Ok(())
    }

    /// The row as it is; `None` if the lane is to stop meanwhile. Cancel-safe: a look that is given up changes nothing.
    async fn look(&self) -> Option<Result<Option<Row>, StoreError>> {
        let look = self.answer(self.ledger.look(&self.id));
        tokio::select! {
            biased;
            found = look => Some(found.map(|found| found.as_ref().map(Row::of))),
            () = self.common.stopping.cancelled() => None,
        }
    }
}
