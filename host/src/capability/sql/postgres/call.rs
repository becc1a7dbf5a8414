//! A statement of a guest, on a connection.

use std::sync::Arc;

use futures::TryStreamExt;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::{AssertSqlSafe, Connection, Executor, Row, SqlSafeStr, Statement as _};

use super::super::statement::{self, Dialect};
use super::super::{Answer, Bracket, Done, Error, Failure, Rows, SqlAccess, Value, Work};
use super::error::{STALE_PLAN, failure_of};
use super::{in_time, value};

/// A statement that may be sent, and what for.
pub(super) struct Call<'a> {
    keyword: String,
    statement: Statement<'a>,
    work: Work<'a>,
    /// What has been encoded before a connection was asked for.
    first: Option<Prepared>,
}

impl<'a> Call<'a> {
    pub(super) fn new(access: SqlAccess, text: &'a str, work: Work<'a>) -> Result<Self, Error> {
        let keyword = work.check(Dialect::Postgres, access, text)?;
        let mut statement = Statement::new(text);
        let first = match work {
            Work::Query(params) | Work::Execute(params) => Some(statement.with(params)?),
            Work::ExecuteMany(_) => None,
        };
        Ok(Self {
            keyword,
            statement,
            work,
            first,
        })
    }

    /// Whether it may leave something in the session.
    pub(super) fn may_leave_traces(&self) -> bool {
        statement::may_leave_traces(&self.keyword, self.statement.text)
    }

    /// Runs it by itself, and once more if its plan was out of date.
    pub(super) async fn run_alone(
        &mut self,
        connection: &mut PgConnection,
    ) -> Result<Done, Failure> {
        const TRANSACTION: Bracket = Bracket {
            open: "BEGIN",
            keep: "COMMIT",
            undo: "ROLLBACK",
        };
        if !self.work.is_many() {
            let done = self.run(connection).await;
            if !self.is_stale(&done) {
                return done;
            }
            forget_plans(connection).await?;
            return self.run(connection).await;
        }
        self.run_in(&TRANSACTION, connection).await
    }

    /// All or nothing, and once more if its plan was out of date.
    pub(super) async fn run_in(
        &mut self,
        bracket: &Bracket,
        connection: &mut PgConnection,
    ) -> Result<Done, Failure> {
        let done = self.run_once_in(bracket, connection).await;
        if !self.is_stale(&done) {
            return done;
        }
        forget_plans(connection).await?;
        self.run_once_in(bracket, connection).await
    }

    async fn run_once_in(
        &mut self,
        bracket: &Bracket,
        connection: &mut PgConnection,
    ) -> Result<Done, Failure> {
        let opened = command(connection, bracket.open).await;
        opened.map_err(Failure::lost)?;
        let done = match self.run(connection).await {
            // A deferred constraint speaks up only here.
            Ok(done) => command(connection, bracket.keep).await.map(|()| done),
            Err(failure) => Err(failure),
        };
        if let Err(Failure::Statement(_)) = &done {
            let undone = command(connection, bracket.undo).await;
            undone.map_err(Failure::lost)?;
        }
        done
    }

    /// Runs it as it is; what was done before a failure is not undone.
    pub(super) async fn run(&mut self, connection: &mut PgConnection) -> Result<Done, Failure> {
        match self.work {
            Work::Query(params) => {
                let statement = self.prepared(params)?;
                in_time(query(connection, statement)).await.map(Done::rows)
            }
            Work::Execute(params) => {
                let statement = self.prepared(params)?;
                let affected = in_time(execute(connection, statement)).await?;
                Ok(Done::affected(affected))
            }
            Work::ExecuteMany(lists) => {
                let mut affected = 0;
                for params in lists {
                    let statement = self.statement.with(params)?;
                    affected += in_time(execute(connection, statement)).await?;
                }
                Ok(Done::affected(affected))
            }
        }
    }

    fn prepared(&mut self, params: &[Value]) -> Result<Prepared, Error> {
        match self.first.take() {
            Some(prepared) => Ok(prepared),
            None => self.statement.with(params),
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

/// A statement's text as it is sent.
struct Statement<'a> {
    text: &'a str,
    signature: String,
    signed: Arc<str>,
}

/// A statement with its parameters encoded.
struct Prepared {
    text: Arc<str>,
    arguments: PgArguments,
}

impl<'a> Statement<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            signature: String::new(),
            signed: text.into(),
        }
    }

    /// Lists of the same types share one text.
    fn with(&mut self, params: &[Value]) -> Result<Prepared, Error> {
        let mut arguments = PgArguments::default();
        // The driver finds a prepared statement by its text, but what the server prepared depends on the
        // parameters' types too: a NULL is inferred, and an int8 is no int4. So they become part of the text.
        let mut signature = String::with_capacity(params.len());
        for param in params {
            signature.push(value::bind(&mut arguments, param)?);
        }
        if signature != self.signature {
            // The new line ends a comment of the statement's own.
            self.signed = format!("{}\n/* {signature} */", self.text).into();
            self.signature = signature;
        }
        Ok(Prepared {
            text: self.signed.clone(),
            arguments,
        })
    }
}

/// A row arrives whole, whatever its size, before it can be counted: the protocol has no way to ask for less. So
/// an answer takes at most `MAX_ANSWER_BYTES` and one row, which PostgreSQL keeps below a gigabyte.
async fn query(connection: &mut PgConnection, statement: Prepared) -> Result<Rows, Failure> {
    let Prepared { text, arguments } = statement;
    let mut answer = Answer::default();
    {
        let query = sqlx::query_with(AssertSqlSafe(text.clone()), arguments);
        let mut stream = query.fetch(&mut *connection);
        while let Some(row) = stream
            .try_next()
            .await
            .map_err(|error| failure_of(&error))?
        {
            if answer.columns.is_empty() {
                answer.columns = value::names(row.columns());
            }
            answer.push(value::row(&row)?)?;
        }
    }
    if answer.rows.is_empty() {
        // The names come with the rows, so an empty answer asks for them; the driver has them at hand.
        let text = AssertSqlSafe(text).into_sql_str();
        let statement = (&mut *connection).prepare(text).await;
        answer.columns = value::names(statement.map_err(|error| failure_of(&error))?.columns());
    }
    Ok(answer.finish())
}

async fn execute(connection: &mut PgConnection, statement: Prepared) -> Result<u64, Failure> {
    let Prepared { text, arguments } = statement;
    let query = sqlx::query_with(AssertSqlSafe(text), arguments);
    match query.execute(connection).await {
        Ok(done) => Ok(done.rows_affected()),
        Err(error) => Err(failure_of(&error)),
    }
}

/// Runs a command of the host's own.
pub(super) async fn command(
    connection: &mut PgConnection,
    text: &'static str,
) -> Result<(), Failure> {
    let done = in_time(async {
        let done = sqlx::raw_sql(text).execute(connection).await;
        done.map_err(|error| failure_of(&error))
    });
    done.await.map(drop)
}

/// Has the connection prepare its statements anew.
pub(super) async fn forget_plans(connection: &mut PgConnection) -> Result<(), Failure> {
    let forgotten = in_time(async {
        let cleared = connection.clear_cached_statements().await;
        cleared.map_err(|error| failure_of(&error))
    });
    forgotten.await.map_err(Failure::lost)
}
