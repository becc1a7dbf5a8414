//! A statement of a guest, on a connection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures::TryStreamExt;
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{AssertSqlSafe, Either, Executor, SqlSafeStr, Statement as _};

use super::super::statement::Dialect;
use super::super::{
    Answer, Bracket, Done, Error, Failure, Rows, STATEMENT_TIMEOUT, SqlAccess, Value, Work,
};
use super::error::{error_of, failure_of};
use super::value::{self, DeclaredTypes};

/// Instructions of SQLite's machine between two looks at the clock: some tens of microseconds.
const INSTRUCTIONS_PER_LOOK: i32 = 10_000;

/// A statement that may be sent, and what for.
pub(super) struct Call<'a> {
    keyword: String,
    text: Arc<str>,
    work: Work<'a>,
    /// What has been encoded before a connection was asked for.
    first: Option<Query>,
}

/// A statement and its parameters.
type Query = sqlx::query::Query<'static, sqlx::Sqlite, SqliteArguments>;

/// What every statement on a connection needs.
pub(super) struct Means<'a> {
    pub(super) connection: &'a mut SqliteConnection,
    pub(super) running: &'a Running,
    pub(super) declared: &'a DeclaredTypes,
}

impl<'a> Call<'a> {
    pub(super) fn new(access: SqlAccess, text: &'a str, work: Work<'a>) -> Result<Self, Error> {
        let keyword = work.check(Dialect::Sqlite, access, text)?;
        let mut call = Self {
            keyword,
            text: text.into(),
            work,
            first: None,
        };
        call.first = match work {
            Work::Query(params) | Work::Execute(params) => Some(call.with(params)?),
            Work::ExecuteMany(_) => None,
        };
        Ok(call)
    }

    pub(super) fn only_reads(&self) -> bool {
        matches!(self.keyword.as_str(), "SELECT" | "VALUES" | "EXPLAIN")
    }

    pub(super) fn alters_tables(&self) -> bool {
        matches!(self.keyword.as_str(), "CREATE" | "ALTER" | "DROP")
    }

    /// Whether it is more than one statement, which a failure of its own does not undo as a whole.
    pub(super) fn is_many(&self) -> bool {
        self.work.is_many()
    }

    /// Runs it by itself.
    pub(super) async fn run_alone(&mut self, means: &mut Means<'_>) -> Result<Done, Failure> {
        const TRANSACTION: Bracket = Bracket {
            open: "BEGIN IMMEDIATE",
            keep: "COMMIT",
            undo: "ROLLBACK",
        };
        if self.is_many() {
            return self.run_in(&TRANSACTION, means).await;
        }
        self.run(means).await
    }

    /// All or nothing.
    pub(super) async fn run_in(
        &mut self,
        bracket: &Bracket,
        means: &mut Means<'_>,
    ) -> Result<Done, Failure> {
        let opened = command(means.connection, bracket.open).await;
        opened.map_err(Failure::lost)?;
        let done = match self.run(means).await {
            Ok(done) => command(means.connection, bracket.keep).await.map(|()| done),
            Err(failure) => Err(failure),
        };
        let Err(Failure::Statement(error)) = done else {
            return done;
        };
        if is_out_of_transaction(means.connection).await? {
            return Err(Failure::Transaction(error));
        }
        let undone = command(means.connection, bracket.undo).await;
        undone.map_err(Failure::lost)?;
        Err(Failure::Statement(error))
    }

    /// Runs it as it is.
    pub(super) async fn run(&mut self, means: &mut Means<'_>) -> Result<Done, Failure> {
        match self.work {
            Work::Query(params) => {
                let query = self.prepared(params)?;
                self.fetch(means, query).await.map(Done::rows)
            }
            Work::Execute(params) => {
                let query = self.prepared(params)?;
                self.execute(means, query).await.map(Done::affected)
            }
            Work::ExecuteMany(lists) => {
                let mut affected = 0;
                for params in lists {
                    let query = self.with(params)?;
                    affected += self.execute(means, query).await?;
                }
                Ok(Done::affected(affected))
            }
        }
    }

    fn prepared(&mut self, params: &[Value]) -> Result<Query, Error> {
        match self.first.take() {
            Some(query) => Ok(query),
            None => self.with(params),
        }
    }

    fn with(&self, params: &[Value]) -> Result<Query, Error> {
        let mut arguments = SqliteArguments::default();
        for param in params {
            value::bind(&mut arguments, param)?;
        }
        Ok(sqlx::query_with(
            AssertSqlSafe(self.text.clone()),
            arguments,
        ))
    }

    async fn fetch(&self, means: &mut Means<'_>, query: Query) -> Result<Rows, Failure> {
        means.running.renew();
        let mut answer = Answer::default();
        {
            let mut stream = query.fetch(&mut *means.connection);
            while let Some(row) = stream.try_next().await.map_err(|e| failure_of(&e))? {
                if answer.columns.is_empty() {
                    answer.columns = value::names(sqlx::Row::columns(&row));
                }
                answer.push(value::row(&row, means.declared)?)?;
            }
        }
        if answer.rows.is_empty() {
            // The names come with the rows, so an empty answer has to ask for them.
            let text = AssertSqlSafe(self.text.clone()).into_sql_str();
            let prepared = (&mut *means.connection).prepare(text).await;
            let prepared = prepared.map_err(|error| failure_of(&error))?;
            answer.columns = value::names(prepared.columns());
        }
        Ok(answer.finish())
    }

    /// How many rows were changed or, as PostgreSQL counts, answered.
    async fn execute(&self, means: &mut Means<'_>, query: Query) -> Result<u64, Failure> {
        means.running.renew();
        let connection = &mut *means.connection;
        // SQLite's count of changed rows is about the last statement that may have changed some.
        let earlier = match self.keyword.as_str() {
            "WITH" => Some(total_changes(connection).await?),
            _ => None,
        };
        let (mut answered, mut changed) = (0, 0);
        {
            let mut stream = connection.fetch_many(query);
            while let Some(item) = stream.try_next().await.map_err(|e| failure_of(&e))? {
                match item {
                    Either::Left(done) => changed += done.rows_affected(),
                    Either::Right(_) => answered += 1,
                }
            }
        }
        let changes_rows = match self.keyword.as_str() {
            "INSERT" | "UPDATE" | "DELETE" | "REPLACE" => true,
            "WITH" => earlier != Some(total_changes(connection).await?),
            _ => false,
        };
        Ok(match answered {
            0 if changes_rows => changed,
            answered => answered,
        })
    }
}

async fn total_changes(connection: &mut SqliteConnection) -> Result<i64, Failure> {
    let count = sqlx::query_scalar("SELECT total_changes()").fetch_one(connection);
    count.await.map_err(|error| failure_of(&error))
}

/// Runs a command of the host's own.
pub(super) async fn command(
    connection: &mut SqliteConnection,
    text: &'static str,
) -> Result<(), Failure> {
    let done = sqlx::raw_sql(text).execute(connection).await;
    done.map(drop).map_err(|error| failure_of(&error))
}

/// Whether there is no transaction: SQLite ends one by itself when a constraint or a trigger says so, or the
/// disk is full. A statement would commit by itself then.
#[allow(unsafe_code, reason = "the driver does not tell")]
pub(super) async fn is_out_of_transaction(
    connection: &mut SqliteConnection,
) -> Result<bool, Failure> {
    let mut handle = connection
        .lock_handle()
        .await
        .map_err(|error| failure_of(&error))?;
    // SAFETY: the pointer is the connection's own, open and ours alone for as long as `handle` is locked, and the
    // call keeps nothing of it.
    let autocommit =
        unsafe { libsqlite3_sys::sqlite3_get_autocommit(handle.as_raw_handle().as_ptr()) };
    Ok(autocommit != 0)
}

/// A call, or a transaction, that waits for SQLite. Dropped with it, and SQLite sees it.
pub(super) struct Running(Arc<Mutex<Instant>>);

impl Running {
    /// Has SQLite give up on a connection's statements in time, and when nobody waits for them any more.
    pub(super) async fn on(connection: &mut SqliteConnection) -> Result<Self, Error> {
        Self::until(connection, Instant::now() + STATEMENT_TIMEOUT).await
    }

    async fn until(connection: &mut SqliteConnection, ends: Instant) -> Result<Self, Error> {
        let running = Self(Arc::new(Mutex::new(ends)));
        let mut handle = connection
            .lock_handle()
            .await
            .map_err(|error| error_of(&error))?;
        let ends = Arc::downgrade(&running.0);
        handle.set_progress_handler(INSTRUCTIONS_PER_LOOK, move || {
            ends.upgrade().is_some_and(|ends| {
                let ends = *ends.lock().unwrap_or_else(PoisonError::into_inner);
                Instant::now() < ends
            })
        });
        Ok(running)
    }

    /// Gives the next statement its time.
    pub(super) fn renew(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + STATEMENT_TIMEOUT;
    }
}

#[cfg(test)]
mod tests {
    use sqlx::ConnectOptions;
    use sqlx::sqlite::SqliteConnectOptions;

    use super::super::super::out_of_time;
    use super::*;

    #[tokio::test]
    async fn a_statement_that_does_not_end_is_interrupted() {
        let options = SqliteConnectOptions::new().in_memory(true);
        let mut connection = options.connect().await.expect("a database in memory");
        let running = Running::until(&mut connection, Instant::now()).await;
        let _running = running.expect("a connection");
        let endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) \
                       SELECT count(*) FROM n";
        let answer = sqlx::query(endless).fetch_all(&mut connection).await;
        let error = answer.map(|rows| rows.len()).expect_err("an interruption");
        assert_eq!(error_of(&error), out_of_time());
    }
}
