//! Whether a database does what it did not do, and what a refusal says of it.

use std::sync::Arc;
use std::time::Duration;

use super::super::{
    Action, CANCELED, ENDED, Error, Failure, LOCKED, Refusal, SqlAccess, StoreError, Value,
    WAS_DONE, Work, out_of, out_of_time,
};
use super::client::Whose;
use super::error::{READ_ONLY, concern};
use super::locks::Ended;
use super::value::Parameters;
use super::{Postgres, in_time};
use crate::capability::{Concern, SILENCE};

/// Bytes that are written to see whether something can be, random so that they take as much room as they are: more than fits
/// into the pages that a table has.
const PROBE_BYTES: usize = 16 * 1024;
/// How far the host's measure of a statement's time may be below the server's.
const CLOCKS: Duration = Duration::from_millis(50);
/// Rows of a table that is made for it, which are as much.
const PROBE_ROWS: usize = 500;

/// Of a statement of the host's own, or of one that had run before: what the database has and allows is its affair.
fn of_store(error: Error) -> Error {
    match error {
        Error::Database(said)
            if matches!(
                concern(said.sqlstate.as_deref().unwrap_or_default()),
                Concern::Store | Concern::Standing
            ) =>
        {
            Error::Unavailable(said.message)
        }
        other => other,
    }
}

/// What it says that a statement or its transaction was ended for its time, by the server or the host: of who waited for a lock of
/// somebody else's, that this one has it; of who did not, that it is slow, unless the server answered nobody else either.
fn of_time(why: &str, ended: Ended, access: SqlAccess) -> Option<Refusal> {
    let Ended {
        wait,
        took,
        silence,
        limits,
    } = ended;
    if why.starts_with(ENDED) {
        return Some(Refusal::slow(Error::Unavailable(why.to_owned())));
    }
    let (is_locked, is_cancelled) = (why.starts_with(LOCKED), why.starts_with(CANCELED));
    let is_late = Error::Unavailable(why.to_owned()) == out_of_time();
    if !(is_locked || is_cancelled || is_late) {
        return None;
    }
    if let Some(words) = wait.words() {
        return Some(Refusal::away(words, Action::Lock(wait)));
    }
    if is_locked {
        // It was too quick to see whose.
        wait.set_seen();
        return Some(Refusal::away(why.to_owned(), Action::Lock(wait)));
    }
    let limit = limits.statement;
    let is_limit = !limit.is_zero() && took + CLOCKS >= limit;
    if silence >= SILENCE && (is_late || is_limit) {
        let why = format!("{why}, and nobody else had an answer");
        return Some(Refusal::of(Error::Unavailable(why), access));
    }
    if is_late {
        return Some(Refusal::slow(out_of_time()));
    }
    Some(match is_limit {
        true => Refusal::slow(out_of(limit)),
        // By an administrator, say. One does it once, and one that does it whenever the message comes has its reasons.
        false => Refusal::of(
            Error::Unavailable(format!("somebody ended it after {took:.1?}: {why}")),
            access,
        ),
    })
}

impl Postgres {
    /// What the failure of a guest's statement says of the database.
    pub(super) fn judge(
        &self,
        access: SqlAccess,
        text: &str,
        work: Work<'_>,
        (error, ended): (Error, Option<Ended>),
    ) -> Refusal {
        let said = match (&error, ended) {
            (Error::Database(said), _) => said,
            (Error::Unavailable(why), Some(ended)) => {
                let of_time = of_time(why, ended, access);
                return of_time.unwrap_or_else(|| Refusal::of(error, access));
            }
            _ => return Refusal::of(error, access),
        };
        let code = said.sqlstate.as_deref().unwrap_or_default();
        if code == READ_ONLY {
            return match access {
                SqlAccess::ReadOnly => Refusal::of(
                    Error::Denied(format!(
                        "the pipeline grants this stage to read only, and {}: write `access = \"data\"`",
                        said.message
                    )),
                    access,
                ),
                _ => Refusal::of(Error::Unavailable(said.message.clone()), access),
            };
        }
        // Who makes and drops tables knows what is there.
        let is_known = code == "42501" || access != SqlAccess::DataDefinition;
        if concern(code) == Concern::Standing && is_known && self.done.contains(text) {
            let statement = Action::Statement(text.into(), work.example().into());
            return Refusal::away(format!("{WAS_DONE}{}", said.message), statement);
        }
        Refusal::of(error, access)
    }

    /// Writes as a stage would, and as the host does where it keeps progress, and takes it back.
    pub(in super::super) async fn probe_write(&self, access: SqlAccess) -> Result<(), Error> {
        const ASK: &str = "SELECT pg_catalog.current_setting('transaction_read_only')";
        let mut lease = self.take(access).await?;
        let answer = in_time(lease.ask(ASK, &Parameters::default())).await;
        let answer = answer.map_err(Failure::into_error)?;
        let is_read_only =
            matches!(&answer[..], [row] if matches!(&row[..], [Value::Text(on)] if on == "on"));
        if is_read_only && access != SqlAccess::ReadOnly {
            // What the address leads to may be another one by now.
            lease.is_spent = true;
            let why = "the database is read-only: it is a standby, or default_transaction_read_only is on";
            return Err(Error::Unavailable(why.to_owned()));
        }
        drop(lease);
        match self.progress.get() {
            Some(statements) => self.probe_progress(&statements.probe_write).await,
            None => self.probe_room(access).await,
        }
    }

    /// Writes where nobody else does, and takes it back, to see whether there is room. That it may not be done says nothing.
    async fn probe_room(&self, access: SqlAccess) -> Result<(), Error> {
        if access == SqlAccess::ReadOnly {
            return Ok(());
        }
        let fill = format!(
            "CREATE TEMPORARY TABLE stagehost_probe ON COMMIT DROP AS \
             SELECT pg_catalog.random() AS filler FROM pg_catalog.generate_series(1, {PROBE_ROWS})"
        );
        let mut lease = self.take(access).await?;
        let begun = in_time(lease.command("BEGIN")).await;
        begun.map_err(Failure::into_error)?;
        let written = in_time(lease.command(&fill)).await;
        let undone = in_time(lease.command("ROLLBACK")).await;
        if let Err(failure) = written
            && let Error::Unavailable(why) = failure.into_error()
        {
            return Err(Error::Unavailable(why));
        }
        undone.map_err(Failure::into_error)
    }

    async fn probe_progress(&self, write: &str) -> Result<(), Error> {
        let weight: Vec<u8> = std::iter::repeat_with(rand::random)
            .take(PROBE_BYTES)
            .collect();
        let mut parameters = Parameters::default();
        // Of its own, so that it waits for nobody else's.
        parameters.text(&format!("stagehost-probe-{}", rand::random::<u64>()))?;
        parameters.bytea(&weight)?;
        let mut lease = self.take_own().await?;
        let begun = in_time(lease.command("BEGIN")).await;
        begun.map_err(Failure::into_error)?;
        let written = in_time(lease.ask(write, &parameters)).await;
        let undone = in_time(lease.command("ROLLBACK")).await;
        written.map_err(|failure| of_store(failure.into_error()))?;
        undone.map_err(Failure::into_error)
    }

    /// Has the database say how it would run a statement, for which it looks whether it may.
    pub(in super::super) async fn probe_statement(
        &self,
        text: &str,
        params: &[Value],
    ) -> Result<(), StoreError> {
        let explain = format!("EXPLAIN {text}");
        // Not with the message's own, which may be what is refused: the planner computes with them.
        let parameters = Parameters::nulls(params)?;
        let mut lease = self.take(SqlAccess::Data).await?;
        let explained = in_time(async {
            let plan = lease
                .plan(Whose::Host, &explain, parameters.types())
                .await?;
            lease
                .run(&Arc::clone(&plan), &parameters, &mut |_| Ok(()))
                .await
        });
        match explained.await.map_err(Failure::into_error) {
            Ok(_) => Ok(()),
            // What says something else can't be explained.
            Err(error) => Err(of_store(error).into()),
        }
    }
}
