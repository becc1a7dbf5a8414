//! A statement of a guest, on a connection.

use std::sync::Arc;

use rusqlite::types::ValueRef;

use super::super::done::Done as DoneBefore;
use super::super::statement::{self, Dialect};
use super::super::transaction::words;
use super::super::{
    Answer, Bracket, Done, Error, Failure, MAX_ANSWER_BYTES, SqlAccess, Value, WAS_DONE, Work,
    database_error,
};
use super::connection::{Connection, IsBusy, Params, bind, marked};
use super::error::{error_of, failure_of, is_of_text};
use super::{Sqlite, authorizer, memory, value};

/// A statement that may be sent, with its parameters as SQLite takes them.
pub(in super::super) struct Call {
    keyword: String,
    /// As it is prepared.
    text: String,
    access: SqlAccess,
    purpose: Purpose,
    lists: Vec<Params>,
    /// What is wrong with the list behind the last of these.
    unsupported: Option<Error>,
    /// Where it is noted that it was done.
    done: Arc<DoneBefore>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Query,
    Execute,
    ExecuteMany,
}

impl IsBusy for Failure {
    fn is_busy(&self) -> bool {
        matches!(self, Self::Busy(_))
    }
}

impl Call {
    pub(super) fn new(
        database: &Sqlite,
        access: SqlAccess,
        text: &str,
        work: Work<'_>,
    ) -> Result<Self, Error> {
        let keyword = work.check(Dialect::Sqlite, access, text)?;
        authorizer::check_text(&keyword, text).map_err(statement::not_supported)?;
        let purpose = match work {
            Work::Query(_) => Purpose::Query,
            Work::Execute(_) => Purpose::Execute,
            Work::ExecuteMany(_) => Purpose::ExecuteMany,
        };
        let (lists, unsupported) = match work {
            Work::Query(params) | Work::Execute(params) => (vec![encode(params)?], None),
            Work::ExecuteMany(lists) => encode_while_supported(lists),
        };
        Ok(Self {
            keyword,
            text: marked(access, text),
            access,
            purpose,
            lists,
            unsupported,
            done: database.done.clone(),
        })
    }

    /// As far as its first word tells: whether it can do without the turn to write.
    pub(super) fn only_reads(&self) -> bool {
        matches!(
            self.keyword.as_str(),
            "SELECT" | "VALUES" | "EXPLAIN" | "PRAGMA"
        ) || self.access == SqlAccess::ReadOnly
    }

    /// Whether it is more than one statement, which a failure of its own does not undo as a whole.
    pub(super) fn is_many(&self) -> bool {
        self.purpose == Purpose::ExecuteMany
    }

    /// Whether there is nothing to run.
    pub(super) fn is_empty(&self) -> bool {
        self.lists.is_empty() && self.unsupported.is_none()
    }

    /// Runs it by itself.
    pub(super) fn run_alone(&self, connection: &mut Connection) -> Result<Done, Failure> {
        const TRANSACTION: Bracket = Bracket {
            open: super::connection::BEGIN_IMMEDIATE,
            keep: "COMMIT",
            undo: "ROLLBACK",
        };
        connection.until_free(|connection| match self.is_many() {
            true => self.run_in(&TRANSACTION, connection),
            false => self.run(connection),
        })
    }

    /// All or nothing.
    pub(super) fn run_in(
        &self,
        bracket: &Bracket,
        connection: &mut Connection,
    ) -> Result<Done, Failure> {
        command(connection, bracket.open)?;
        let done = match self.run(connection) {
            Ok(done) => command(connection, bracket.keep).map(|()| done),
            Err(failure) => Err(failure),
        };
        let failure = match done {
            Err(failure @ (Failure::Statement(_) | Failure::Busy(_))) => failure,
            done => return done,
        };
        if connection.sql.is_autocommit() {
            return Err(Failure::Transaction(failure.into_error()));
        }
        command(connection, bracket.undo).map_err(Failure::lost)?;
        Err(failure)
    }

    /// Runs it as it is.
    pub(super) fn run(&self, connection: &mut Connection) -> Result<Done, Failure> {
        let (done, wanted_more) = memory::bounded(|| match self.run_all(connection) {
            Ok(done) => {
                self.done.note_text(&self.text);
                Ok(done)
            }
            Err(failure) => Err(self.judge(connection, failure)),
        });
        match done {
            Err(_) if wanted_more => {
                const OUT_OF_MEMORY: &str = "53200";
                let most = memory::MAX_BYTES >> 20;
                let message = format!(
                    "the statement, and its transaction before it, need more than {most} MiB of memory"
                );
                Err(Failure::Statement(database_error(OUT_OF_MEMORY, message)))
            }
            done => done,
        }
    }

    /// Where the file's tables have no place any more for what was done before, it is not what it was. Who makes and drops tables
    /// knows what is there.
    fn judge(&self, connection: &mut Connection, failure: Failure) -> Failure {
        let may_be = matches!(&failure, Failure::Statement(Error::Database(said)) if said.sqlstate.is_none())
            && self.access != SqlAccess::DataDefinition
            && self.done.contains(&self.text);
        if !may_be {
            return failure;
        }
        match connection.try_to_prepare(self.access, &self.text) {
            Err(error) if is_of_text(&error) => {
                let said = words(error_of(&error));
                Failure::Statement(Error::Unavailable(format!("{WAS_DONE}{said}")))
            }
            _ => failure,
        }
    }

    fn run_all(&self, connection: &mut Connection) -> Result<Done, Failure> {
        let mut affected = 0;
        for params in &self.lists {
            let done = self.run_once(connection, params)?;
            if self.purpose == Purpose::Query {
                return Ok(done);
            }
            affected += done.affected;
        }
        match &self.unsupported {
            Some(error) => Err(error.clone().into()),
            None => Ok(Done::affected(affected)),
        }
    }

    fn run_once(&self, connection: &mut Connection, params: &Params) -> Result<Done, Failure> {
        let guard = connection.guard.clone();
        let failed = |error: rusqlite::Error| failure_of(&error, &guard);
        let mut statement = connection
            .prepare(self.access, &self.text)
            .map_err(failed)?;
        bind(&mut statement, params).map_err(failed)?;
        let (mut answered, mut answer) = (0, Answer::default());
        {
            let mut declared = Vec::new();
            let mut rows = statement.raw_query();
            while let Some(row) = rows.next().map_err(failed)? {
                answered += 1;
                if self.purpose != Purpose::Query {
                    continue;
                }
                if answered == 1 {
                    (answer.columns, declared) = value::columns(row.as_ref());
                }
                answer.push(take_row(row, &declared, answer.bytes)?)?;
            }
        }
        if self.purpose == Purpose::Query {
            if answered == 0 {
                (answer.columns, _) = value::columns(&statement);
            }
            return Ok(Done::rows(answer.finish()));
        }
        // SQLite's count is of the last statement that may have changed rows.
        let changes_rows = matches!(
            self.keyword.as_str(),
            "INSERT" | "UPDATE" | "DELETE" | "REPLACE" | "WITH"
        ) && !statement.readonly();
        drop(statement);
        Ok(Done::affected(match answered {
            0 if changes_rows => connection.sql.changes(),
            answered => answered,
        }))
    }
}

fn encode(params: &[Value]) -> Result<Params, Error> {
    params.iter().map(value::encode).collect()
}

/// A list that is not to be had is no reason against those before it, whose own failures come first.
fn encode_while_supported(lists: &[Vec<Value>]) -> (Vec<Params>, Option<Error>) {
    let mut encoded = Vec::with_capacity(lists.len());
    for params in lists {
        match encode(params) {
            Ok(params) => encoded.push(params),
            Err(error) => return (encoded, Some(error)),
        }
    }
    (encoded, None)
}

/// A row's values, each of which is copied only if the answer may still have it.
fn take_row(
    row: &rusqlite::Row<'_>,
    declared: &[Option<value::Declared>],
    mut bytes: usize,
) -> Result<Vec<Value>, Error> {
    let mut values = Vec::with_capacity(declared.len());
    for (index, declared) in declared.iter().enumerate() {
        let value = row.get_ref(index).map_err(|error| error_of(&error))?;
        bytes += match value {
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.len(),
            _ => 0,
        };
        if bytes > MAX_ANSWER_BYTES {
            return Err(Error::TooLarge(MAX_ANSWER_BYTES as u64));
        }
        values.push(value::decode(value, *declared).map_err(|why| {
            let name = row.as_ref().column_name(index).unwrap_or_default();
            Error::Unsupported(format!("column {name:?}: {why}"))
        })?);
    }
    Ok(values)
}

/// Runs a command of the host's own.
pub(super) fn command(connection: &mut Connection, text: &'static str) -> Result<(), Failure> {
    let done = connection.as_host(|sql| sql.execute_batch(text));
    done.map_err(|error| failure_of(&error, &connection.guard))
}
