//! A statement of a guest, on a connection.

use std::sync::Arc;

use postgres_protocol::message::backend::DataRowBody;

use super::super::done::Done as DoneBefore;
use super::super::statement::Dialect;
use super::super::{
    Answer, Bracket, Done, Error, Failure, MAX_ANSWER_BYTES, MAX_ANSWER_ROWS, Rows, SqlAccess,
    Value, Work,
};
use super::client::{Client, Whose};
use super::error::STALE_PLAN;
use super::plans::Plan;
use super::value::{self, Parameters};
use super::{Postgres, in_time};

/// Lists of parameters, and their bytes, that are sent at once: never so much that the server would have to wait for its
/// answers to be read, while the host waits for it to take more.
const MAX_LISTS_AT_ONCE: usize = 256;
const MAX_BYTES_AT_ONCE: usize = 32 * 1024;

/// A statement that may be sent, and what for.
pub(super) struct Call<'a> {
    text: &'a str,
    work: Work<'a>,
    /// What has been encoded before a connection was asked for.
    first: Option<Parameters>,
    /// Where it is noted that it was done.
    done: Arc<DoneBefore>,
}

impl<'a> Call<'a> {
    pub(super) fn new(
        database: &Postgres,
        access: SqlAccess,
        text: &'a str,
        work: Work<'a>,
    ) -> Result<Self, Error> {
        work.check(Dialect::Postgres, access, text)?;
        database.words.check(access, text)?;
        let first = match work {
            Work::Query(params) | Work::Execute(params) => Some(Parameters::of(params)?),
            Work::ExecuteMany(_) => None,
        };
        let done = database.done.clone();
        Ok(Self {
            text,
            work,
            first,
            done,
        })
    }

    /// Runs it by itself, and once more if its plan was out of date.
    pub(super) async fn run_alone(&mut self, client: &mut Client) -> Result<Done, Failure> {
        const TRANSACTION: Bracket = Bracket {
            open: "BEGIN",
            keep: "COMMIT",
            undo: "ROLLBACK",
        };
        if !self.work.is_many() {
            let done = self.run(client).await;
            if !self.is_stale(&done) {
                return done;
            }
            forget_plans(client).await?;
            return self.run(client).await;
        }
        self.run_in(&TRANSACTION, client).await
    }

    /// All or nothing, and once more if its plan was out of date.
    pub(super) async fn run_in(
        &mut self,
        bracket: &Bracket,
        client: &mut Client,
    ) -> Result<Done, Failure> {
        let done = self.run_once_in(bracket, client).await;
        if !self.is_stale(&done) {
            return done;
        }
        forget_plans(client).await?;
        self.run_once_in(bracket, client).await
    }

    async fn run_once_in(
        &mut self,
        bracket: &Bracket,
        client: &mut Client,
    ) -> Result<Done, Failure> {
        client.queue_opening(&[bracket.open])?;
        let done = match self.run(client).await {
            // A deferred constraint speaks up only here.
            Ok(done) => command(client, bracket.keep).await.map(|()| done),
            Err(failure) => Err(failure),
        };
        if let Err(Failure::Statement(_)) = &done {
            let undone = command(client, bracket.undo).await;
            undone.map_err(Failure::lost)?;
        }
        done
    }

    /// Runs it as it is; what was done before a failure is not undone.
    pub(super) async fn run(&mut self, client: &mut Client) -> Result<Done, Failure> {
        match self.work {
            Work::Query(params) => {
                let first = self.encoded(params)?;
                let rows = in_time(query(client, self.text, &first, &self.done)).await;
                self.first = Some(first);
                rows.map(Done::rows)
            }
            Work::Execute(params) => {
                let first = self.encoded(params)?;
                let affected = in_time(execute(client, self.text, &first, &self.done)).await;
                self.first = Some(first);
                affected.map(Done::affected)
            }
            Work::ExecuteMany(lists) => {
                let affected = execute_many(client, self.text, lists, &self.done).await?;
                Ok(Done::affected(affected))
            }
        }
    }

    fn encoded(&mut self, params: &[Value]) -> Result<Parameters, Error> {
        match self.first.take() {
            Some(encoded) => Ok(encoded),
            None => Parameters::of(params),
        }
    }

    /// Whether a table may have been altered after the statement had been prepared. Nothing has been done then, so
    /// the statement can be prepared and run once more, unless a transaction failed with it.
    pub(super) fn is_stale(&self, done: &Result<Done, Failure>) -> bool {
        const DATATYPE_MISMATCH: &str = "42804";
        const UNDEFINED_FUNCTION: &str = "42883";
        match done {
            Err(Failure::Statement(Error::Unavailable(why))) => why == STALE_PLAN,
            // The types that were inferred for NULLs stay with the prepared statement.
            Err(Failure::Statement(Error::Database(error))) if self.has_null() => matches!(
                error.sqlstate.as_deref(),
                Some(DATATYPE_MISMATCH | UNDEFINED_FUNCTION)
            ),
            _ => false,
        }
    }

    fn has_null(&self) -> bool {
        match self.work {
            Work::Query(params) | Work::Execute(params) => params.contains(&Value::Null),
            Work::ExecuteMany(lists) => lists.iter().any(|params| params.contains(&Value::Null)),
        }
    }
}

async fn query(
    client: &mut Client,
    text: &str,
    parameters: &Parameters,
    done: &DoneBefore,
) -> Result<Rows, Failure> {
    let plan = client.plan(Whose::Guest, text, parameters.types()).await?;
    let mut answer = Answer {
        columns: value::names(&plan.columns),
        ..Answer::default()
    };
    client
        .run(&plan, parameters, &mut |row| {
            answer.push(value::row(&plan.columns, row)?)
        })
        .await?;
    done.note(&plan.noted);
    Ok(answer.finish())
}

async fn execute(
    client: &mut Client,
    text: &str,
    parameters: &Parameters,
    done: &DoneBefore,
) -> Result<u64, Failure> {
    let plan = client.plan(Whose::Guest, text, parameters.types()).await?;
    let mut unasked = Unasked::default();
    let affected = client
        .run(&plan, parameters, &mut |row| unasked.count(row))
        .await?;
    done.note(&plan.noted);
    Ok(affected)
}

/// Rows that nobody asked for: they are counted, and have the bounds of an answer all the same.
#[derive(Default)]
struct Unasked {
    rows: usize,
    bytes: usize,
}

impl Unasked {
    fn count(&mut self, row: &DataRowBody) -> Result<(), Error> {
        self.rows += 1;
        self.bytes += row.buffer().len();
        if self.rows > MAX_ANSWER_ROWS {
            return Err(Error::TooLarge(MAX_ANSWER_ROWS as u64));
        }
        if self.bytes > MAX_ANSWER_BYTES {
            return Err(Error::TooLarge(MAX_ANSWER_BYTES as u64));
        }
        Ok(())
    }
}

/// Lists of the same types share one plan, and one trip as far as there is room.
async fn execute_many(
    client: &mut Client,
    text: &str,
    lists: &[Vec<Value>],
    done: &DoneBefore,
) -> Result<u64, Failure> {
    let mut affected = 0;
    let mut unasked = Unasked::default();
    let mut lists = lists.iter().peekable();
    let mut next = None;
    while next.is_some() || lists.peek().is_some() {
        let first = match next.take() {
            Some(first) => first,
            None => Parameters::of(lists.next().map_or(&[][..], Vec::as_slice))?,
        };
        let mut failed = None;
        affected += in_time(async {
            let plan: Arc<Plan> = client.plan(Whose::Guest, text, first.types()).await?;
            client.queue(&plan, &first)?;
            let mut count = 1;
            while count < MAX_LISTS_AT_ONCE && client.queued() < MAX_BYTES_AT_ONCE {
                let Some(list) = lists.next() else { break };
                match Parameters::of(list) {
                    Ok(same) if same.types() == first.types() && same.is_small() => {
                        client.queue(&plan, &same)?;
                        count += 1;
                    }
                    Ok(other) => {
                        next = Some(other);
                        break;
                    }
                    // It is looked at when it is its turn: those before may fail.
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            let affected = client.finish(&mut |row| unasked.count(row)).await?;
            done.note(&plan.noted);
            Ok(affected)
        })
        .await?;
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
    Ok(affected)
}

/// Runs a command of the host's own.
pub(super) async fn command(client: &mut Client, text: &str) -> Result<(), Failure> {
    in_time(client.command(text)).await
}

/// Has the connection prepare its statements anew.
pub(super) async fn forget_plans(client: &mut Client) -> Result<(), Failure> {
    in_time(client.forget_plans()).await.map_err(Failure::lost)
}
