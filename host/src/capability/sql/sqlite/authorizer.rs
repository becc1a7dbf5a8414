//! What a guest's statement may do, as SQLite takes it apart: it asks about each table, column and function while it
//! prepares it, however they are written, and in views and triggers too.

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

use super::super::SqlAccess;
use super::super::statement::{FILES, SESSION, TRANSACTIONS};
use super::functions;
use super::guard::{Guard, Sender};

/// Names of the host's tables, and of what its migrations are kept in, begin so.
const RESERVED: [&str; 3] = ["stagehost_", "_stagehost_", "_sqlx_"];
/// Pragmas, also as tables, that only tell how tables are made.
const PRAGMAS: [&str; 7] = [
    "foreign_key_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "table_info",
    "table_list",
    "table_xinfo",
];
/// Virtual tables of SQLite's own that read the file's pages or the connection.
const INTERNAL_TABLES: [&str; 5] = [
    "dbstat",
    "sqlite_dbpage",
    "sqlite_stmt",
    "bytecode",
    "tables_used",
];

/// Answers SQLite, and notes why.
pub(super) fn decide(guard: &Guard, context: &AuthContext<'_>) -> Authorization {
    guard.with_sender(|sender| match check(sender, context) {
        Ok(()) => Authorization::Allow,
        Err(why) => {
            sender.refusal.get_or_insert(why);
            Authorization::Deny
        }
    })
}

fn check(sender: &mut Sender, context: &AuthContext<'_>) -> Result<(), String> {
    let Some(access) = sender.access else {
        return Ok(());
    };
    if context.database_name.is_some_and(|name| name == "temp")
        && !is_alteration(access, &context.action)
    {
        return Err(refusal("a temporary table", SESSION));
    }
    match context.action {
        AuthAction::Select | AuthAction::Recursive => Ok(()),
        AuthAction::Read { table_name, .. } => check_read(table_name),
        AuthAction::Insert { table_name }
        | AuthAction::Delete { table_name }
        | AuthAction::Update { table_name, .. } => check_write(access, table_name),
        AuthAction::Function { function_name } => check_function(sender, access, function_name),
        AuthAction::Pragma {
            pragma_name,
            pragma_value,
        } => check_pragma(pragma_name, pragma_value),
        AuthAction::Transaction { .. } => Err(refusal("a transaction's command", TRANSACTIONS)),
        AuthAction::Savepoint { .. } => Err(refusal("a savepoint", TRANSACTIONS)),
        AuthAction::Attach { .. } | AuthAction::Detach { .. } => Err(refusal("ATTACH", FILES)),
        action => check_definition(access, action),
    }
}

/// When it alters a table, SQLite looks for it in what is temporary, too.
fn is_alteration(access: SqlAccess, action: &AuthAction<'_>) -> bool {
    let (AuthAction::Read { table_name, .. } | AuthAction::Update { table_name, .. }) = action
    else {
        return matches!(action, AuthAction::Select | AuthAction::Function { .. });
    };
    access == SqlAccess::DataDefinition && is_sqlites(table_name)
}

fn is_sqlites(table: &str) -> bool {
    table
        .get(..7)
        .is_some_and(|start| start.eq_ignore_ascii_case("sqlite_"))
}

fn refusal(what: &str, why: &str) -> String {
    format!("{what} is not for stages: {why}")
}

/// Whether a name is one of those that the host keeps for itself, in whatever case.
pub(super) fn is_reserved(name: &str) -> bool {
    RESERVED.iter().any(|reserved| {
        name.get(..reserved.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(reserved))
    })
}

/// Whether a text that defines something names anything of the host's: the definition may come to it later, when it is
/// somebody else's statement that runs it. Names have no other spelling in SQLite than their letters.
fn names_reserved(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    RESERVED.iter().any(|reserved| text.contains(reserved))
}

fn check_name(name: &str) -> Result<(), String> {
    match is_reserved(name) {
        true => Err(refusal(
            &format!("the table {name}"),
            "it is the host's own",
        )),
        false => Ok(()),
    }
}

fn check_read(table: &str) -> Result<(), String> {
    check_name(table)?;
    let is = |name: &str| table.eq_ignore_ascii_case(name);
    let is_pragma = table
        .get(..7)
        .is_some_and(|start| start.eq_ignore_ascii_case("pragma_"));
    let may_read = !INTERNAL_TABLES.into_iter().any(is)
        && (!is_pragma
            || PRAGMAS
                .into_iter()
                .any(|name| table[7..].eq_ignore_ascii_case(name)));
    match may_read {
        true => Ok(()),
        false => Err(refusal(
            &format!("the table {table}"),
            "it is a part of SQLite's own",
        )),
    }
}

fn check_write(access: SqlAccess, table: &str) -> Result<(), String> {
    check_name(table)?;
    // SQLite itself writes to them where tables are defined, and lets nobody else.
    let needed = match is_sqlites(table) {
        true => SqlAccess::DataDefinition,
        false => SqlAccess::Data,
    };
    check_access(access, needed, "a change of rows")
}

fn check_access(access: SqlAccess, needed: SqlAccess, what: &str) -> Result<(), String> {
    if access >= needed {
        return Ok(());
    }
    let why = match needed {
        SqlAccess::DataDefinition => {
            "its grant in the pipeline needs `access = \"data-definition\"`"
        }
        _ => "its grant in the pipeline is read-only",
    };
    Err(refusal(what, why))
}

fn check_function(sender: &mut Sender, access: SqlAccess, name: &str) -> Result<(), String> {
    // A nested statement of SQLite's own, when it alters a table: nobody else can call these.
    let is_internal = name.starts_with("sqlite_rename_")
        || name.starts_with("sqlite_drop_")
        || name == "sqlite_fail";
    if is_internal {
        return check_access(access, SqlAccess::DataDefinition, "ALTER TABLE");
    }
    if !functions::is_allowed(name) {
        return Err(refusal(
            &format!("the function {name}"),
            "it is not among those that stages may call",
        ));
    }
    if functions::is_json(name) {
        if sender.is_running && !sender.uses_json {
            return Err(
                "its tables or views have changed while it was sent: send it once more".to_owned(),
            );
        }
        sender.uses_json = true;
    }
    Ok(())
}

fn check_pragma(name: &str, value: Option<&str>) -> Result<(), String> {
    if !PRAGMAS
        .into_iter()
        .any(|allowed| name.eq_ignore_ascii_case(allowed))
    {
        return Err(refusal(&format!("PRAGMA {name}"), SESSION));
    }
    value.map_or(Ok(()), check_name)
}

/// Tables, indexes, views and triggers; all else that there may be is refused.
fn check_definition(access: SqlAccess, action: AuthAction<'_>) -> Result<(), String> {
    let (what, names) = match action {
        AuthAction::CreateTable { table_name } => ("CREATE TABLE", [table_name, ""]),
        AuthAction::DropTable { table_name } => ("DROP TABLE", [table_name, ""]),
        AuthAction::AlterTable { table_name, .. } => ("ALTER TABLE", [table_name, ""]),
        AuthAction::Analyze { table_name } => ("ANALYZE", [table_name, ""]),
        AuthAction::Reindex { index_name } => ("REINDEX", [index_name, ""]),
        AuthAction::CreateIndex {
            index_name,
            table_name,
        } => ("CREATE INDEX", [index_name, table_name]),
        AuthAction::DropIndex {
            index_name,
            table_name,
        } => ("DROP INDEX", [index_name, table_name]),
        AuthAction::CreateView { view_name } => ("CREATE VIEW", [view_name, ""]),
        AuthAction::DropView { view_name } => ("DROP VIEW", [view_name, ""]),
        AuthAction::DropTrigger {
            trigger_name,
            table_name,
        } => ("DROP TRIGGER", [trigger_name, table_name]),
        AuthAction::CreateTrigger { .. } => {
            return Err(refusal(
                "CREATE TRIGGER",
                "it would run in others' statements; migrations make them",
            ));
        }
        AuthAction::CreateVtable { .. } | AuthAction::DropVtable { .. } => {
            return Err(refusal("a virtual table", "migrations make and drop them"));
        }
        _ => {
            return Err(refusal(
                "this statement",
                "it sends statements that read and change rows",
            ));
        }
    };
    check_access(access, SqlAccess::DataDefinition, what)?;
    names.into_iter().try_for_each(check_name)
}

/// What the text of a definition tells and its names do not: a new name, or what a view or key refers to.
pub(super) fn check_text(keyword: &str, text: &str) -> Result<(), String> {
    match keyword {
        "ALTER" | "ANALYZE" | "CREATE" | "DROP" | "REINDEX" if names_reserved(text) => {
            Err(refusal(
                &format!("{keyword} of what names the host's tables"),
                "they are the host's own",
            ))
        }
        _ => Ok(()),
    }
}
