//! What a stage may say to PostgreSQL.
//!
//! The words of a statement are found as the server's own scanner finds them, and what can't be told for sure is refused. They
//! are a first fence: what a role of their own may do is the second.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::super::{Error, SqlAccess};
use super::{needed, refusal, refusal_of_access};
use scan::{Token, scan};

mod scan;

/// Names that are the host's.
const HOSTS: &[&str] = &["stagehost_", "_stagehost", "_sqlx_migrations"];
/// Schemas of temporary tables, which would outlive a call on its connection.
const TEMPORARY: &[&str] = &["pg_temp", "pg_toast_temp"];
/// Functions that change something, or answer something else each time, and may be called all the same: they touch sequences,
/// which are data; clocks and chance; locks that end with their transaction; sizes.
const ALLOWED: &[&str] = &[
    "clock_timestamp",
    "currval",
    "gen_random_uuid",
    "lastval",
    "nextval",
    "pg_advisory_xact_lock",
    "pg_advisory_xact_lock_shared",
    "pg_database_size",
    "pg_indexes_size",
    "pg_is_in_recovery",
    "pg_notify",
    "pg_relation_size",
    "pg_sleep",
    "pg_sleep_for",
    "pg_sleep_until",
    "pg_table_size",
    "pg_total_relation_size",
    "pg_try_advisory_xact_lock",
    "pg_try_advisory_xact_lock_shared",
    "random",
    "random_normal",
    "setval",
    "timeofday",
    "uuidv4",
    "uuidv7",
];
/// Functions that change nothing, and may not be called all the same: they read tables whose names are data.
const REFUSED_ENDINGS: &[&str] = &["_to_xml", "_to_xmlschema", "_to_xml_and_xmlschema"];
/// Functions of extensions that run a statement somewhere else.
const REFUSED_BEGINNINGS: &[&str] = &["connectby", "crosstab", "dblink", "xpath_table"];
/// Schemas of extensions that run statements later.
const REFUSED_SCHEMAS: &[&str] = &["cron"];
/// What data definition makes, alters and drops.
const KINDS: &[&str] = &[
    "table",
    "index",
    "view",
    "sequence",
    "type",
    "domain",
    "statistics",
];
/// Statements that are remembered, and bytes of the longest.
const MAX_KNOWN: usize = 256;
const MAX_KNOWN_TEXT: usize = 16 * 1024;
const READING: &[&str] = &["select", "with", "values", "table"];
const WRITING: &[&str] = &["insert", "update", "delete", "merge"];

/// The functions of a server.
#[derive(Default)]
pub(in super::super) struct Words {
    /// Those that come with PostgreSQL, and whether stages may call them. Others are made by migrations and extensions, and
    /// so by whoever runs the database.
    functions: HashMap<String, bool>,
    /// The system's own tables and views.
    catalogs: HashSet<String>,
    /// What statements need that may be sent, so that one that comes again is not taken apart again.
    known: Mutex<HashMap<Box<str>, SqlAccess>>,
}

impl Words {
    /// Notes a function that comes with the server; `volatile` as PostgreSQL says it.
    pub(in super::super) fn add(&mut self, name: &str, volatile: bool) {
        let refused = REFUSED_ENDINGS.iter().any(|ending| name.ends_with(ending));
        let allowed = !refused && (!volatile || ALLOWED.contains(&name));
        self.functions.insert(name.to_owned(), allowed);
    }

    /// Notes one of the system's own tables.
    pub(in super::super) fn add_catalog(&mut self, name: &str) {
        self.catalogs.insert(name.to_owned());
    }

    /// Whether a statement may be sent, of which the length and the first word have been looked at.
    pub(in super::super) fn check(&self, access: SqlAccess, text: &str) -> Result<(), Error> {
        let known = self.known().get(text).copied();
        if known.is_some_and(|needed| needed <= access) {
            return Ok(());
        }
        let needed = self.needed(access, text)?;
        self.remember(text, needed);
        Ok(())
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Box<str>, SqlAccess>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, text: &str, needed: SqlAccess) {
        if text.len() > MAX_KNOWN_TEXT {
            return;
        }
        let mut known = self.known();
        if known.len() >= MAX_KNOWN {
            // Of a stage that makes its texts anew each time; those of the others are soon known again.
            known.clear();
        }
        known.insert(text.into(), needed);
    }

    /// What a statement needs, unless it may not be sent with this access.
    fn needed(&self, access: SqlAccess, text: &str) -> Result<SqlAccess, Error> {
        let tokens = scan(text).map_err(|why| refusal("this", why))?;
        let statement = Statement {
            tokens: &tokens,
            words: self,
        };
        statement.check_names()?;
        let needed = statement.needed()?;
        if needed > access {
            let first = statement.word(0).unwrap_or_default();
            return Err(refusal_of_access(&first.to_ascii_uppercase(), needed));
        }
        if needed > SqlAccess::ReadOnly {
            statement.check_catalogs()?;
        }
        Ok(needed)
    }
}

struct Statement<'a> {
    tokens: &'a [Token],
    words: &'a Words,
}

impl Statement<'_> {
    /// The word at a place, if it is one without quotes.
    fn word(&self, at: usize) -> Option<&str> {
        match self.tokens.get(at) {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    fn is(&self, at: usize, symbol: u8) -> bool {
        matches!(self.tokens.get(at), Some(Token::Symbol(seen)) if *seen == symbol)
    }

    /// The name at a place, in quotes or not.
    fn name(&self, at: usize) -> Option<&str> {
        match self.tokens.get(at) {
            Some(Token::Word(name) | Token::Quoted(name)) => Some(name),
            _ => None,
        }
    }

    fn names(&self) -> impl Iterator<Item = (usize, &str)> {
        (0..self.tokens.len()).filter_map(|at| Some((at, self.name(at)?)))
    }

    fn has(&self, words: &[&str]) -> bool {
        (0..self.tokens.len()).any(|at| self.word(at).is_some_and(|word| words.contains(&word)))
    }

    /// Names of the host's, of temporary tables, and of functions.
    fn check_names(&self) -> Result<(), Error> {
        for (at, name) in self.names() {
            let begins = |with: &[&str]| with.iter().any(|with| name.starts_with(with));
            if begins(HOSTS) {
                return Err(refusal(name, "it is the host's own"));
            }
            if begins(TEMPORARY) || name == "pg_settings" {
                return Err(refusal(name, super::SESSION));
            }
            // `(x).f` and `t.f` call a function of one argument too.
            let is_attribute = at > 0 && self.is(at - 1, b'.') && !self.is(at + 1, b'(');
            let refused = match is_attribute {
                true => !self.may_be_attribute(name),
                false => self.is(at + 1, b'(') && !self.may_call(at, name),
            };
            if refused {
                let why = "stages call functions that migrations made, and those of PostgreSQL that only compute";
                return Err(refusal(name, why));
            }
        }
        Ok(())
    }

    fn may_be_attribute(&self, name: &str) -> bool {
        let is_refused = REFUSED_BEGINNINGS.iter().any(|with| name.starts_with(with));
        !is_refused
            && self
                .words
                .functions
                .get(name)
                .is_none_or(|allowed| *allowed)
    }

    fn may_call(&self, at: usize, name: &str) -> bool {
        if REFUSED_BEGINNINGS.iter().any(|with| name.starts_with(with)) {
            return false;
        }
        let schema = (at >= 2 && self.is(at - 1, b'.')).then(|| self.name(at - 2));
        let schema = schema.flatten();
        if schema.is_some_and(|schema| REFUSED_SCHEMAS.contains(&schema)) {
            return false;
        }
        let is_catalogs = schema.is_none_or(|schema| schema == "pg_catalog");
        match self.words.functions.get(name) {
            Some(allowed) => *allowed || !is_catalogs,
            None => !name.starts_with("pg_") || !is_catalogs,
        }
    }

    /// The system's tables are written by data definition, not by hand.
    fn check_catalogs(&self) -> Result<(), Error> {
        let catalogs = &self.words.catalogs;
        let catalogs = self.names().find(|(_, name)| catalogs.contains(*name));
        match catalogs {
            None => Ok(()),
            Some((_, name)) => Err(refusal(
                name,
                "a statement that writes does not name the system's tables",
            )),
        }
    }

    /// What the whole of it asks for.
    fn needed(&self) -> Result<SqlAccess, Error> {
        let first = self
            .tokens
            .iter()
            .position(|token| !matches!(token, Token::Symbol(b';' | b'(')));
        let mut at = first.unwrap_or_default();
        if self.word(at) == Some("explain") {
            at = self.explained(at + 1);
            let main = self.word(at).unwrap_or_default();
            if !self.is(at, b'(') && !READING.contains(&main) && !WRITING.contains(&main) {
                return Err(refusal(
                    &format!("EXPLAIN {}", main.to_ascii_uppercase()),
                    "it explains statements that read and change rows",
                ));
            }
        }
        let defines = [
            "create", "alter", "drop", "comment", "reindex", "truncate", "analyze",
        ];
        if self.word(at).is_some_and(|word| defines.contains(&word)) {
            self.check_definition(at)?;
            return Ok(SqlAccess::DataDefinition);
        }
        if let Some(into) = self.made_table(at) {
            let mut at = into + 1;
            while matches!(self.word(at), Some("local" | "global")) {
                at += 1;
            }
            if matches!(self.word(at), Some("temp" | "temporary")) {
                return Err(refusal("INTO TEMP", super::SESSION));
            }
            return Ok(SqlAccess::DataDefinition);
        }
        // Also within WITH; and as a lock of rows.
        match self.has(WRITING) {
            true => Ok(SqlAccess::Data),
            false => Ok(SqlAccess::ReadOnly),
        }
    }

    /// Where the statement begins that is explained.
    fn explained(&self, mut at: usize) -> usize {
        while matches!(self.word(at), Some("analyze" | "analyse" | "verbose")) {
            at += 1;
        }
        // A parenthesis is a SELECT's where a word for one follows, or another; else it is that of options, however their names
        // are written.
        let is_query = self.is(at + 1, b'(')
            || (self.word(at + 1)).is_some_and(|word| READING.contains(&word));
        match self.is(at, b'(') && !is_query {
            true => self.closing(at) + 1,
            false => at,
        }
    }

    /// The place of the parenthesis that closes the one at a place.
    fn closing(&self, open: usize) -> usize {
        let mut depth = 0;
        for at in open..self.tokens.len() {
            depth += i32::from(self.is(at, b'(')) - i32::from(self.is(at, b')'));
            if depth == 0 {
                return at;
            }
        }
        self.tokens.len()
    }

    /// The place of the INTO of a SELECT INTO, which is no INSERT's or MERGE's.
    fn made_table(&self, begin: usize) -> Option<usize> {
        let main = match self.searches() {
            // Where the statement begins behind such a clause is not looked for.
            true => usize::MAX,
            false => self.main(begin),
        };
        (0..self.tokens.len()).find(|at| {
            let at = *at;
            let inserts = |at: usize| {
                matches!(self.word(at), Some("insert" | "merge"))
                    && (at == main || (at > 0 && self.is(at - 1, b'(')))
            };
            self.word(at) == Some("into") && !(at > 0 && inserts(at - 1))
        })
    }

    /// Whether a query of a WITH has SEARCH or CYCLE behind it.
    fn searches(&self) -> bool {
        (1..self.tokens.len())
            .any(|at| self.is(at - 1, b')') && matches!(self.word(at), Some("search" | "cycle")))
    }

    /// The place of the word that says what the statement is: behind the queries of a WITH.
    fn main(&self, begin: usize) -> usize {
        if self.word(begin) != Some("with") {
            return begin;
        }
        let mut at = begin + 1;
        while at < self.tokens.len() {
            if self.is(at, b'(') {
                at = self.closing(at) + 1;
                let main = self.word(at).map(|word| word.to_ascii_uppercase());
                if main.is_some_and(|main| main != "WITH" && needed(&main).is_some()) {
                    return at;
                }
                continue;
            }
            at += 1;
        }
        at
    }

    /// What is made, altered or dropped.
    fn check_definition(&self, at: usize) -> Result<(), Error> {
        const BEFORE: &[&str] = &[
            "or",
            "replace",
            "unique",
            "recursive",
            "unlogged",
            "materialized",
            "on",
            "global",
            "local",
        ];
        let verb = self.word(at).unwrap_or_default().to_ascii_uppercase();
        let mut kind_at = at + 1;
        while self
            .word(kind_at)
            .is_some_and(|word| BEFORE.contains(&word))
        {
            kind_at += 1;
        }
        let kind = self.word(kind_at).unwrap_or_default();
        let refused = |what: &str, why| {
            Err(refusal(
                &format!("{verb} {}", what.to_ascii_uppercase()),
                why,
            ))
        };
        match (verb.as_str(), kind) {
            (_, "temp" | "temporary") => return refused("TEMP", super::SESSION),
            ("TRUNCATE" | "ANALYZE", _) => return Ok(()),
            // Its options are first.
            ("REINDEX", _) if self.reindexes(kind_at) => {}
            ("COMMENT", "column" | "constraint") => {}
            ("REINDEX", _) => return refused(kind, "a stage sees to its tables and their indexes"),
            (_, kind) if KINDS.contains(&kind) => {}
            (_, kind) => {
                return refused(
                    kind,
                    "a stage defines tables, indexes, views, sequences and types",
                );
            }
        }
        if self.has(&["execute"]) {
            return refused("… EXECUTE", "the host prepares the statements");
        }
        let follows = |first: &str, second: &str| {
            (at..self.tokens.len())
                .any(|at| self.word(at) == Some(first) && self.word(at + 1) == Some(second))
        };
        if verb == "ALTER"
            && (follows("owner", "to") || follows("set", "schema") || follows("all", "in"))
        {
            return refused(
                "… OWNER, SCHEMA or ALL",
                "who owns what is seen to by migrations",
            );
        }
        if verb == "CREATE"
            && kind == "type"
            && !(follows("as", "enum") || self.is_composite(kind_at))
        {
            return refused("TYPE", "a stage makes types AS ENUM and AS (…)");
        }
        Ok(())
    }

    /// Whether it is about a table or an index; options may be before the word that says so.
    fn reindexes(&self, at: usize) -> bool {
        let at = match self.is(at, b'(') {
            true => self.closing(at) + 1,
            false => at,
        };
        matches!(self.word(at), Some("table" | "index"))
    }

    fn is_composite(&self, from: usize) -> bool {
        (from..self.tokens.len()).any(|at| self.word(at) == Some("as") && self.is(at + 1, b'('))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Words {
        let mut words = Words::default();
        for (name, volatile) in [
            ("set_config", true),
            ("pg_advisory_lock", true),
            ("pg_terminate_backend", true),
            ("nextval", true),
            ("random", true),
            ("query_to_xml", true),
            ("table_to_xml", false),
            ("lower", false),
            ("count", false),
            ("pg_column_size", false),
        ] {
            words.add(name, volatile);
        }
        for name in ["pg_class", "pg_proc"] {
            words.add_catalog(name);
        }
        words
    }

    #[track_caller]
    fn check(text: &str, expected: Result<SqlAccess, &str>) {
        let words = words();
        let checked = |access| match words.check(access, text) {
            Ok(()) => Ok(()),
            Err(Error::Database(error)) => Err(error.message),
            Err(other) => panic!("{text}: {other:?}"),
        };
        match expected {
            Ok(needed) => {
                let all = [
                    SqlAccess::ReadOnly,
                    SqlAccess::Data,
                    SqlAccess::DataDefinition,
                ];
                for access in all {
                    let seen = checked(access);
                    assert_eq!(
                        seen.is_ok(),
                        access >= needed,
                        "{text}: {access:?}: {seen:?}"
                    );
                }
            }
            Err(why) => {
                let seen = checked(SqlAccess::DataDefinition).expect_err(text);
                assert!(seen.contains(why), "{text}: {seen}");
            }
        }
    }

    #[test]
    fn what_a_statement_needs() {
        use SqlAccess::{Data, DataDefinition, ReadOnly};
        for (text, needed) in [
            ("select lower(name), count(*) from posts", ReadOnly),
            ("(select 1)", ReadOnly),
            ("values (1)", ReadOnly),
            ("explain select 1", ReadOnly),
            ("explain (costs off) select 1", ReadOnly),
            ("select 'update', \"delete\" from t", ReadOnly),
            ("with a as (select 1) select * from a", ReadOnly),
            (
                "with a as (delete from t returning *) select * from a",
                Data,
            ),
            (
                "with a (b) as (values (1)) insert into t select * from a",
                Data,
            ),
            ("select * from t for update", Data),
            ("explain analyze delete from t", Data),
            ("explain (analyze, format json) delete from t", Data),
            ("explain (select 1)", ReadOnly),
            (
                "with a as (insert into t values (1) returning *) select * from a",
                Data,
            ),
            ("insert into t (a, b) values (nextval('s'), random())", Data),
            (
                "merge into t using s on true when matched then delete",
                Data,
            ),
            ("select 1 into t", DataDefinition),
            ("explain (\"analyze\") delete from t", Data),
            ("explain ((select 1))", ReadOnly),
            ("select t.random, (t).lower from t", ReadOnly),
            ("reindex (verbose) table t", DataDefinition),
            (
                "with recursive t (n) as (select 1) search depth first by n set o select * from t",
                ReadOnly,
            ),
            (
                "with recursive t (n) as (select 1) cycle n set c using p select (1) insert into posts from t",
                DataDefinition,
            ),
            ("select 1 as insert into t", DataDefinition),
            ("select (1) insert into t", DataDefinition),
            (
                "with a as (select 1) select (1) insert into t",
                DataDefinition,
            ),
            (
                "create table t (owner text, role text, trigger int)",
                DataDefinition,
            ),
            ("create unique index on t (lower(a))", DataDefinition),
            ("create materialized view v as select 1", DataDefinition),
            ("create type mood as enum ('a')", DataDefinition),
            ("create type pair as (a int)", DataDefinition),
            ("alter table t add column b text", DataDefinition),
            ("drop table if exists t", DataDefinition),
            ("truncate t", DataDefinition),
            ("update films set pg_rating = 13", Data),
            ("select pg_column_size(a) from pg_class", ReadOnly),
            ("select public.set_config('a')", ReadOnly),
        ] {
            check(text, Ok(needed));
        }
    }

    #[test]
    fn what_is_remembered_of_one_stage_is_not_granted_to_another() {
        let (words, text) = (words(), "delete from posts");
        let granted = |access| words.check(access, text).is_ok();
        for _ in 0..2 {
            assert!(granted(SqlAccess::Data));
            assert!(!granted(SqlAccess::ReadOnly));
        }
        assert!(granted(SqlAccess::DataDefinition));
        for n in 0..2 * MAX_KNOWN {
            let text = format!("select {n}");
            assert!(words.check(SqlAccess::ReadOnly, &text).is_ok());
        }
        assert!(words.known().len() <= MAX_KNOWN);
    }

    #[test]
    fn what_no_stage_may_say() {
        for (text, why) in [
            ("update stagehost_progress set epoch = 1", "the host's own"),
            (
                "update \"stagehost_progress\" set epoch = 1",
                "the host's own",
            ),
            (
                "update public . Stagehost_Progress set epoch = 1",
                "the host's own",
            ),
            ("update U&\"stagehost\\005fprogress\" set epoch = 1", "U&"),
            ("select * from _sqlx_migrations", "the host's own"),
            ("select stagehost_save('a')", "the host's own"),
            ("select set_config('role', 'x', false)", "set_config"),
            (
                "select pg_catalog.set_config('role', 'x', false)",
                "set_config",
            ),
            (
                "select \"set_config\" /* a */ ('role', 'x', false)",
                "set_config",
            ),
            ("select * from pg_advisory_lock(1)", "pg_advisory_lock"),
            (
                "select query_to_xml('delete from t', true, true, '')",
                "query_to_xml",
            ),
            (
                "select table_to_xml('stagehost_progress', true, true, '')",
                "table_to_xml",
            ),
            ("select dblink_exec('', '')", "dblink_exec"),
            ("select pg_of_tomorrow()", "pg_of_tomorrow"),
            ("insert into pg_class (relname) values ('a')", "pg_class"),
            ("update pg_catalog.pg_proc set proname = 'a'", "pg_proc"),
            ("update pg_settings set setting = 'a'", "pg_settings"),
            ("create table pg_temp.t (a int)", "pg_temp"),
            ("create temp table t (a int)", "TEMP"),
            ("select 1 into temp t", "TEMP"),
            (
                "create function f() returns int language sql as 'select 1'",
                "FUNCTION",
            ),
            (
                "create or replace procedure f() language sql as 'select 1'",
                "PROCEDURE",
            ),
            (
                "create trigger a after insert on t execute function f()",
                "TRIGGER",
            ),
            ("create rule a as on insert to t do nothing", "RULE"),
            ("alter role current_user password 'x'", "ROLE"),
            ("alter user me superuser", "USER"),
            ("alter system set a = 1", "SYSTEM"),
            ("create extension dblink", "EXTENSION"),
            ("alter table t owner to me", "OWNER"),
            ("alter index all in tablespace a set tablespace b", "ALL"),
            ("drop schema public cascade", "SCHEMA"),
            ("create table t as execute g1", "EXECUTE"),
            ("explain analyze execute g1", "EXECUTE"),
            (
                "explain (analyze) create table t as select 1",
                "EXPLAIN CREATE",
            ),
            ("create type t (input = f, output = g)", "TYPE"),
            ("explain (\"analyze\") execute h1(1)", "EXPLAIN EXECUTE"),
            (
                "explain (\"analyze\", costs off) create temp table t as select 1",
                "EXPLAIN CREATE",
            ),
            ("explain analyze (\"verbose\") execute h1", "EXPLAIN"),
            ("select ($1::text).query_to_xml", "query_to_xml"),
            ("select ('a').\"set_config\"", "set_config"),
            (
                "select x.pg_advisory_lock from generate_series(3::bigint, 3) x",
                "pg_advisory_lock",
            ),
            (
                "select (7::bigint) /* a */ . pg_advisory_lock",
                "pg_advisory_lock",
            ),
            ("select * from crosstab($1) as (a text, b text)", "crosstab"),
            ("select cron.schedule('* * * * *', $1)", "schedule"),
            ("reindex (verbose) schema public", "REINDEX"),
            (
                "with recursive t (n) as (select 1) search depth first by n set o select (1) insert into temp posts from t",
                "INTO TEMP",
            ),
        ] {
            check(text, Err(why));
        }
    }
}
