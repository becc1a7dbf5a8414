//! One connection, as its thread has it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::types::Value as SqlValue;
use rusqlite::{CachedStatement, OpenFlags, Statement, StatementStatus, ToSql};

use super::super::{
    MAX_ANSWER_BYTES, MAX_PARAMETERS, MAX_STATEMENT_BYTES, STATEMENT_TIMEOUT, SqlAccess,
};
use super::error::is_of_text;
use super::file::FileId;
use super::guard::Guard;
use super::{authorizer, functions, memory, pattern};

/// How long SQLite is asked again while another process writes.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long until it is.
const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// Prepared statements that a connection keeps.
const STATEMENT_CACHE: usize = 256;
/// Instructions of SQLite's machine between two looks at the clock: some microseconds, unless values are large.
const INSTRUCTIONS_PER_LOOK: i32 = 200;

/// Looks at the clock between two at what was written.
const LOOKS_PER_COUNT: u32 = 16;
/// Pages that a guest's transaction may write, 256 MiB as a rule: what is undone at last has filled the disk before.
pub(super) const MAX_WRITTEN_PAGES: i32 = 65_536;

/// Bytes of a value, or of a row in a table: no answer could carry more.
const MAX_VALUE_BYTES: usize = MAX_ANSWER_BYTES;
/// The same where JSON functions are called: they go into binary documents as deep as those are, five bytes a level,
/// on the thread's stack.
const MAX_JSON_BYTES: usize = 1024 * 1024;
/// The same for a row of the host's, whose outputs of one batch are in one value; SQLite has none larger.
const MAX_HOST_BYTES: usize = 1_000_000_000;
/// Bytes of a prepared statement, some 24 an instruction, that may meet values of the whole size. It isn't interrupted
/// between instructions that follow each other, and so a longer one has smaller values: together they take seconds at most.
const FULL_SIZE_PROGRAM: usize = 8 * 1024;
/// What a value may have at least.
const MIN_VALUE_BYTES: usize = 16 * 1024;
/// Instructions of one statement: enough for [`MAX_PARAMETERS`] values in rows of one column.
const MAX_INSTRUCTIONS: i32 = 250_000;
/// Columns of a table or an answer; twice as many as anybody has, half of SQLite's own.
const MAX_COLUMNS: i32 = 1_000;
/// How deep an expression may be: SQLite goes down by calling itself. Its own limit, for which the stack is made.
const MAX_EXPRESSION_DEPTH: i32 = 1_000;
/// Parts of a UNION, each of which is one level of the stack.
const MAX_COMPOUND: i32 = 200;
/// Arguments of a function, each of which may be as large as a value.
const MAX_ARGUMENTS: i32 = 100;
/// How deep triggers may set off each other.
const MAX_TRIGGER_DEPTH: i32 = 50;
/// Of the thread, nearly all of which is never touched.
pub(super) const STACK_BYTES: usize = 128 * 1024 * 1024;

pub(super) struct Connection {
    pub(super) sql: rusqlite::Connection,
    pub(super) guard: Arc<Guard>,
    file: PathBuf,
    /// The file that it has open.
    pub(super) id: Option<FileId>,
    /// Texts of prepared statements that call JSON functions.
    json: HashSet<String>,
    max_value: usize,
}

impl Connection {
    pub(super) fn open(file: &Path, guard: Arc<Guard>) -> rusqlite::Result<Self> {
        // Each is used by one thread only.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let sql = rusqlite::Connection::open_with_flags(file, flags)?;
        // Whoever put another one there in between is noticed by the lanes' rows.
        let id = FileId::at(file).ok().flatten();
        // Waiting is done here, where somebody sees whether it is still wanted.
        sql.busy_timeout(Duration::ZERO)?;
        sql.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
        // What is sorted stays in memory, where it is counted, and fills no disk; a log that has become large is cut.
        sql.execute_batch(
            "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA temp_store = MEMORY; \
             PRAGMA journal_size_limit = 67108864;",
        )?;
        // The host's start sees to it; a copy that was put in the file's place may have another. It would do its work too.
        sql.execute_batch("PRAGMA journal_mode = WAL").ok();
        for (limit, value) in [
            (
                Limit::SQLITE_LIMIT_SQL_LENGTH,
                MAX_STATEMENT_BYTES as i32 + MARKER_BYTES,
            ),
            (Limit::SQLITE_LIMIT_COLUMN, MAX_COLUMNS),
            (Limit::SQLITE_LIMIT_EXPR_DEPTH, MAX_EXPRESSION_DEPTH),
            (Limit::SQLITE_LIMIT_COMPOUND_SELECT, MAX_COMPOUND),
            (Limit::SQLITE_LIMIT_VDBE_OP, MAX_INSTRUCTIONS),
            (Limit::SQLITE_LIMIT_FUNCTION_ARG, MAX_ARGUMENTS),
            // A stage has the one file.
            (Limit::SQLITE_LIMIT_ATTACHED, 0),
            (
                Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH,
                pattern::MAX_BYTES as i32,
            ),
            (Limit::SQLITE_LIMIT_VARIABLE_NUMBER, MAX_PARAMETERS as i32),
            (Limit::SQLITE_LIMIT_TRIGGER_DEPTH, MAX_TRIGGER_DEPTH),
            // Memory is counted on one thread.
            (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
        ] {
            sql.set_limit(limit, value)?;
        }
        // The schema can't be written to, and what it calls is what stages may call.
        sql.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        sql.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        // The last one to close would carry the log over, and keep the file from whoever opens it meanwhile.
        sql.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        functions::replace(&sql, &guard)?;
        let asked = guard.clone();
        sql.authorizer(Some(move |context: rusqlite::hooks::AuthContext<'_>| {
            authorizer::decide(&asked, &context)
        }))?;
        let (asked, counted, mut looks) = (guard.clone(), Counted::of(&sql), 0_u32);
        let look = move || {
            looks = looks.wrapping_add(1);
            let counts = looks % LOOKS_PER_COUNT == 0 && asked.is_guests();
            (counts && asked.note_full(counted.written(false) > MAX_WRITTEN_PAGES))
                || asked.is_over()
        };
        sql.progress_handler(INSTRUCTIONS_PER_LOOK, Some(look))?;
        let mut connection = Self {
            sql,
            guard,
            file: file.to_owned(),
            id,
            json: HashSet::new(),
            max_value: 0,
        };
        connection.limit_values(MAX_VALUE_BYTES)?;
        Ok(connection)
    }

    /// Whether another file is in the place of the one that it has open, or none.
    pub(super) fn is_replaced(&self) -> bool {
        !matches!(FileId::at(&self.file), Ok(now) if now == self.id)
    }

    /// The host is about to stop: the file is to be whole without its log. Of one that was replaced, the log beside it may be
    /// another's.
    pub(super) fn carry_log_over_on_close(&self) {
        if self.is_replaced() {
            return;
        }
        let config = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
        self.sql.set_db_config(config, false).ok();
    }

    /// The connection is at rest, and somebody else has it now.
    pub(super) fn count_anew(&self) {
        memory::reset();
        Counted::of(&self.sql).written(true);
    }

    fn limit_values(&mut self, bytes: usize) -> rusqlite::Result<()> {
        if bytes != self.max_value {
            self.sql
                .set_limit(Limit::SQLITE_LIMIT_LENGTH, bytes as i32)?;
            self.max_value = bytes;
        }
        Ok(())
    }

    /// Runs what is the host's own.
    pub(super) fn as_host<T>(
        &mut self,
        work: impl FnOnce(&rusqlite::Connection) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.guard
            .with_sender(|sender| *sender = Default::default());
        self.guard.note_full(false);
        self.guard.renew(STATEMENT_TIMEOUT);
        self.limit_values(MAX_HOST_BYTES)?;
        work(&self.sql)
    }

    /// Prepares a guest's statement, or finds it, and has SQLite keep the limits that it is to run with.
    pub(super) fn prepare(
        &mut self,
        access: SqlAccess,
        text: &str,
    ) -> rusqlite::Result<CachedStatement<'_>> {
        if self.json.len() > STATEMENT_CACHE {
            self.sql.flush_prepared_statement_cache();
            self.json.clear();
        }
        self.begin_to_prepare(access)?;
        let statement = match self.sql.prepare_cached(text) {
            Err(error) if is_of_text(&error) => {
                // Others may have changed the tables since.
                self.see_tables();
                self.guard.begin_to_prepare(access);
                self.sql.prepare_cached(text)?
            }
            prepared => prepared?,
        };
        let uses_json = self.guard.with_sender(|sender| sender.uses_json);
        let uses_json = uses_json || self.json.contains(text);
        if uses_json && !self.json.contains(text) {
            self.json.insert(text.to_owned());
        }
        self.guard.with_sender(|sender| {
            sender.is_running = true;
            sender.uses_json = uses_json;
        });
        let most = if uses_json {
            MAX_JSON_BYTES
        } else {
            MAX_VALUE_BYTES
        };
        let program =
            usize::try_from(statement.get_status(StatementStatus::MemUsed)).unwrap_or_default();
        let fitting = MAX_VALUE_BYTES / program.max(1) * FULL_SIZE_PROGRAM;
        let bytes = fitting.clamp(MIN_VALUE_BYTES, most);
        if bytes != self.max_value {
            self.sql
                .set_limit(Limit::SQLITE_LIMIT_LENGTH, bytes as i32)?;
            self.max_value = bytes;
        }
        Ok(statement)
    }

    fn begin_to_prepare(&mut self, access: SqlAccess) -> rusqlite::Result<()> {
        self.limit_values(MAX_VALUE_BYTES)?;
        self.guard.note_full(false);
        self.guard.renew(STATEMENT_TIMEOUT);
        self.guard.begin_to_prepare(access);
        Ok(())
    }

    /// Has SQLite see what others have made of the file's tables: it looks when a statement runs, and not again for each that it
    /// refuses to prepare.
    fn see_tables(&self) {
        const LOOK: &str = "SELECT 1 FROM main.sqlite_schema LIMIT 1";
        self.guard
            .with_sender(|sender| *sender = Default::default());
        // Where it can't, the next statement can't either, and says why.
        self.sql.query_row(LOOK, [], |_| Ok(())).ok();
    }

    /// Sees whether the file's tables, as they are now, have what a guest's statement speaks of.
    pub(super) fn try_to_prepare(&mut self, access: SqlAccess, text: &str) -> rusqlite::Result<()> {
        self.see_tables();
        self.begin_to_prepare(access)?;
        self.sql.prepare(text).map(drop)
    }

    /// A command of the host's own that takes the file's lock: asked again for a while, as long as somebody waits for it.
    pub(super) fn begin_immediate(&mut self) -> rusqlite::Result<()> {
        self.until_free(|connection| connection.as_host(|sql| sql.execute_batch(BEGIN_IMMEDIATE)))
    }

    /// Does it again while it fails because another process writes.
    pub(super) fn until_free<T, E: IsBusy>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<T, E>,
    ) -> Result<T, E> {
        let until = Instant::now() + BUSY_TIMEOUT;
        loop {
            match work(self) {
                Err(error)
                    if error.is_busy() && Instant::now() < until && !self.guard.is_over() =>
                {
                    std::thread::sleep(BUSY_PAUSE);
                }
                done => return done,
            }
        }
    }
}

/// What SQLite counts for a connection.
struct Counted(*mut rusqlite::ffi::sqlite3);

#[allow(
    unsafe_code,
    reason = "the progress handler moves to the connection's thread with it"
)]
// SAFETY: it is only used in the connection's own callback and on its thread.
unsafe impl Send for Counted {}

#[allow(unsafe_code, reason = "no safe function tells")]
impl Counted {
    fn of(sql: &rusqlite::Connection) -> Self {
        // SAFETY: the pointer is kept by the connection's own callback, which ends with it, and by nobody else.
        Self(unsafe { sql.handle() })
    }

    /// Pages that were written since this was last asked to begin anew.
    fn written(&self, anew: bool) -> i32 {
        let (mut pages, mut most) = (0, 0);
        // SAFETY: the connection is open, and this is its thread; SQLite writes to the two numbers only.
        unsafe {
            rusqlite::ffi::sqlite3_db_status(
                self.0,
                rusqlite::ffi::SQLITE_DBSTATUS_CACHE_WRITE,
                &raw mut pages,
                &raw mut most,
                i32::from(anew),
            );
        }
        pages
    }
}

pub(super) const BEGIN_IMMEDIATE: &str = "BEGIN IMMEDIATE";

/// Whether it failed for a lock only.
pub(super) trait IsBusy {
    fn is_busy(&self) -> bool;
}

impl IsBusy for rusqlite::Error {
    fn is_busy(&self) -> bool {
        self.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
    }
}

/// What a guest's text gets before it, which the host's own never has: prepared statements are found by their text, and what
/// was prepared for the one must not be run for the other, nor for a stage that may do less.
pub(super) fn marked(access: SqlAccess, text: &str) -> String {
    let marker = match access {
        SqlAccess::ReadOnly => "/*read-only*/",
        SqlAccess::Data => "/*data*/",
        SqlAccess::DataDefinition => "/*data-definition*/",
    };
    format!("{marker}{text}")
}

/// Bytes of the longest marker.
const MARKER_BYTES: i32 = 32;

/// Binds parameters by their numbers: to SQLite `$2` is a name, and the first that it meets is its first.
pub(super) fn bind<T: ToSql>(statement: &mut Statement<'_>, params: &[T]) -> rusqlite::Result<()> {
    for index in 1..=statement.parameter_count() {
        let name = statement.parameter_name(index).unwrap_or_default();
        // A cast behind the number is a part of the name.
        let digits = name.trim_start_matches('$');
        let end = digits.find(|char: char| !char.is_ascii_digit());
        let number: Option<usize> = digits[..end.unwrap_or(digits.len())].parse().ok();
        if let Some(param) = number.and_then(|number| params.get(number.checked_sub(1)?)) {
            statement.raw_bind_parameter(index, param)?;
        }
    }
    Ok(())
}

/// Parameters of one run of a statement.
pub(super) type Params = Vec<SqlValue>;
