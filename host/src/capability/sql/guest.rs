//! What components call.

use std::collections::BTreeMap;
use std::sync::Arc;

use wasmtime::component::{HasData, Linker, Resource, ResourceTable};

use super::{Database, Done, Refusal, Transaction, Work};
use crate::capability::{Action, Away, Pending, StoreError, StoreName};
use crate::delivery::progress::Transaction as _;
use bindings::{Error, Rows, Value};

mod generated {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "
            package stagehost:host-sql;
            world imports {
                import stagehost:stage/sql@0.1.0;
            }
        ",
        world: "stagehost:host-sql/imports",
        imports: { default: async | trappable },
        with: { "stagehost:stage/sql.connection": super::Connection },
        additional_derives: [PartialEq],
    });
}

/// The interface's own types, which the host uses too.
pub(super) mod bindings {
    pub use super::generated::stagehost::stage::sql::{DatabaseError, Error, Rows, Value};
}

use generated::stagehost::stage::sql;

/// The databases that a stage may use, by the names that the pipeline gives them.
pub struct SqlGrants(BTreeMap<String, Database>);

impl SqlGrants {
    /// Grants these databases.
    pub fn new(databases: BTreeMap<String, Database>) -> Self {
        Self(databases)
    }

    /// Sees whether a database does what it did not do, without an effect.
    pub async fn probe(&self, name: &str, action: &Action) -> Result<(), StoreError> {
        match self.0.get(name) {
            Some(database) => database.probe(action).await,
            None => Err(StoreError::Refused(format!(
                "there is no SQL store `{name}`"
            ))),
        }
    }
}

/// What one instance has of this interface.
pub struct SqlCtx {
    grants: Arc<SqlGrants>,
    pending: Arc<Pending>,
    /// What the statements of the call at hand belong to.
    transaction: Option<Transaction>,
    denied: Option<String>,
    away: Option<Away>,
    slow: bool,
}

impl SqlCtx {
    /// For an instance of the stage that has these grants. What it waits for is noted in `pending`.
    pub fn new(grants: Arc<SqlGrants>, pending: Arc<Pending>) -> Self {
        Self {
            grants,
            pending,
            transaction: None,
            denied: None,
            away: None,
            slow: false,
        }
    }

    /// Has the statements from here on run in this transaction, or each by itself.
    pub fn set_transaction(&mut self, transaction: Option<Transaction>) {
        self.transaction = transaction;
    }

    /// Where it is noted which database the instance waits for.
    pub fn waiting_for(&self) -> Arc<Pending> {
        self.pending.clone()
    }

    /// The first thing that was denied since this was last asked.
    pub fn take_denied(&mut self) -> Option<String> {
        self.denied.take()
    }

    /// Whether a statement ran out of time since this was last asked.
    pub fn take_slow(&mut self) -> bool {
        std::mem::take(&mut self.slow)
    }

    /// Remembers on its way to the guest what a refusal says of the database, or of the grant.
    fn note(&mut self, store: StoreName, refusal: Refusal) -> Error {
        const INSUFFICIENT_PRIVILEGE: &str = "42501";
        let Refusal {
            error,
            away,
            is_slow,
        } = refusal;
        // The database is there, and the statement is what takes long.
        self.slow |= is_slow;
        match (&error, away) {
            (error, Some(action)) => {
                let why = match error {
                    Error::Unavailable(why) => why.clone(),
                    other => other.to_string(),
                };
                (self.away).get_or_insert(Away {
                    store,
                    action,
                    why,
                    was_gone: false,
                });
            }
            (Error::Denied(denied), None) => {
                self.denied.get_or_insert_with(|| denied.clone());
            }
            (Error::Database(said), None)
                if said.sqlstate.as_deref() == Some(INSUFFICIENT_PRIVILEGE) =>
            {
                let denied = format!("{store}: {}", said.message);
                self.denied.get_or_insert(denied);
            }
            _ => {}
        }
        error
    }

    /// The first database that did not do what it was asked since this was last asked.
    pub fn take_away(&mut self) -> Option<Away> {
        self.away.take()
    }
}

/// An instance's context and its table of resources, borrowed for one call.
pub struct SqlView<'a> {
    /// The instance's context.
    pub ctx: &'a mut SqlCtx,
    /// Where the instance's connections are.
    pub table: &'a mut ResourceTable,
}

/// Gives components the interface.
pub fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    view: fn(&mut T) -> SqlView<'_>,
) -> wasmtime::Result<()> {
    sql::add_to_linker::<T, HasSql>(linker, view)
}

struct HasSql;

impl HasData for HasSql {
    type Data<'a> = SqlView<'a>;
}

/// A guest's handle. It owns no connection: a statement borrows one of the pool's.
#[allow(unreachable_pub, reason = "the generated bindings re-export it")]
#[derive(Clone)]
pub struct Connection {
    name: Arc<str>,
    database: Database,
}

impl SqlView<'_> {
    /// Runs a statement on a handle's database, or in the transaction that there is for it, and notes for how long
    /// the instance waits.
    async fn call(
        &mut self,
        handle: &Resource<Connection>,
        statement: &str,
        work: Work<'_>,
    ) -> wasmtime::Result<Result<Done, Error>> {
        let Connection { name, database } = self.table.get(handle)?.clone();
        let store = StoreName::Sql(name);
        let pending = &self.ctx.pending;
        // A transactional stage has one database.
        let answer = match &self.ctx.transaction {
            None => {
                let call = database.call(statement, work, pending.sight());
                pending.during(store.clone(), call).await
            }
            Some(transaction) => {
                let call = transaction.call(statement, work, pending.sight());
                let answer = pending.during(store.clone(), call).await;
                // The guest must not go on, with effects elsewhere, as if its earlier ones held.
                if transaction.broken().is_some() {
                    let why = answer.err().map_or(String::new(), |refusal| {
                        let error = self.ctx.note(store.clone(), refusal);
                        format!(": {error}")
                    });
                    wasmtime::bail!(
                        "the transaction of {store} is void, and the batch will be run again{why}"
                    );
                }
                answer
            }
        };
        Ok(answer.map_err(|refusal| self.ctx.note(store, refusal)))
    }
}

impl sql::Host for SqlView<'_> {}

impl sql::HostConnection for SqlView<'_> {
    async fn open(
        &mut self,
        name: String,
    ) -> wasmtime::Result<Result<Resource<Connection>, Error>> {
        let Some(database) = self.ctx.grants.0.get(&name).cloned() else {
            let denied =
                format!("the pipeline does not grant the SQL store {name:?} to this stage");
            self.ctx.denied.get_or_insert_with(|| denied.clone());
            return Ok(Err(Error::Denied(denied)));
        };
        let name = name.into();
        Ok(Ok(self.table.push(Connection { name, database })?))
    }

    async fn query(
        &mut self,
        handle: Resource<Connection>,
        statement: String,
        params: Vec<Value>,
    ) -> wasmtime::Result<Result<Rows, Error>> {
        let work = Work::Query(&params);
        let answer = self.call(&handle, &statement, work).await?;
        Ok(answer.map(|done| done.rows))
    }

    async fn execute(
        &mut self,
        handle: Resource<Connection>,
        statement: String,
        params: Vec<Value>,
    ) -> wasmtime::Result<Result<u64, Error>> {
        let work = Work::Execute(&params);
        let answer = self.call(&handle, &statement, work).await?;
        Ok(answer.map(|done| done.affected))
    }

    async fn execute_many(
        &mut self,
        handle: Resource<Connection>,
        statement: String,
        params: Vec<Vec<Value>>,
    ) -> wasmtime::Result<Result<u64, Error>> {
        let work = Work::ExecuteMany(&params);
        let answer = self.call(&handle, &statement, work).await?;
        Ok(answer.map(|done| done.affected))
    }

    async fn drop(&mut self, handle: Resource<Connection>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::sql::HostConnection;
    use super::*;
    use crate::delivery::progress::{Ledger, Mode};
    use crate::pipeline::SqlUrl;

    struct Instance {
        ctx: SqlCtx,
        table: ResourceTable,
        database: Database,
        _folder: TempDir,
    }

    impl Instance {
        async fn new() -> Self {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let url = SqlUrl::Sqlite(folder.path().join("posts.db"));
            let database = Database::connect(&url, None, 4, None).await;
            let database = database.expect("a database");
            let made = database
                .execute("CREATE TABLE t (id INTEGER UNIQUE)", &[])
                .await;
            made.expect("a table");
            let grants = BTreeMap::from([("posts".to_owned(), database.clone())]);
            Self {
                ctx: SqlCtx::new(Arc::new(SqlGrants::new(grants)), pending()),
                table: ResourceTable::new(),
                database,
                _folder: folder,
            }
        }

        fn view(&mut self) -> SqlView<'_> {
            SqlView {
                ctx: &mut self.ctx,
                table: &mut self.table,
            }
        }

        async fn open(&mut self) -> u32 {
            let opened = self.view().open("posts".to_owned()).await;
            opened.expect("no trap").expect("a grant").rep()
        }

        async fn run(&mut self, rep: u32, text: &str) -> wasmtime::Result<Result<Rows, Error>> {
            let handle = Resource::new_borrow(rep);
            self.view().query(handle, text.to_owned(), vec![]).await
        }

        async fn count(&self) -> Vec<Vec<Value>> {
            let count = self.database.query("SELECT count(*) FROM t", &[]).await;
            count.expect("a table").rows
        }
    }

    #[tokio::test]
    async fn statements_belong_to_the_transaction_while_there_is_one() {
        let mut instance = Instance::new().await;
        let handle = instance.open().await;
        let transaction = instance.database.begin(Mode::Optimistic).await;
        let transaction = transaction.expect("a transaction");
        instance.ctx.set_transaction(Some(transaction.clone()));
        for _ in 0..2 {
            // The second is a violation, which the guest is told of.
            let answer = instance.run(handle, "INSERT INTO t VALUES (1)").await;
            answer.expect("no trap").ok();
        }
        assert_eq!(transaction.statements(), 2);
        transaction.rollback().await;
        instance.ctx.set_transaction(None);
        assert_eq!(instance.count().await, [[Value::Int64(0)]]);
        let answer = instance.run(handle, "INSERT INTO t VALUES (1)").await;
        answer.expect("no trap").expect("an insertion");
        assert_eq!(instance.count().await, [[Value::Int64(1)]]);
    }

    #[tokio::test]
    async fn a_guest_does_not_go_on_in_a_void_transaction() {
        let mut instance = Instance::new().await;
        let handle = instance.open().await;
        let transaction = instance.database.begin(Mode::Optimistic).await;
        let transaction = transaction.expect("a transaction");
        instance.ctx.set_transaction(Some(transaction.clone()));
        let large = "INSERT INTO t VALUES (1), (2), (3) RETURNING hex(zeroblob(4000000))";
        for text in [large, "SELECT 1"] {
            let trap = instance.run(handle, text).await.expect_err("a trap");
            let words = trap.to_string();
            assert!(words.contains("SQL store `posts`"), "{words}");
            assert!(words.contains("the batch will be run again"), "{words}");
        }
        assert!(transaction.broken().is_some());
        assert!(instance.ctx.take_away().is_none());
    }

    #[tokio::test]
    async fn a_database_that_was_away_is_remembered_once() {
        let mut instance = Instance::new().await;
        let handle = instance.open().await;
        let there = instance.run(handle, "SELECT 1").await;
        there.expect("no trap").expect("an answer");
        assert!(instance.ctx.take_away().is_none());
        assert!(
            instance
                .ctx
                .grants
                .probe("posts", &Action::Answer)
                .await
                .is_ok()
        );
        instance.database.close().await;
        let away = instance.run(handle, "SELECT 1").await;
        let away = away.expect("no trap");
        assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
        let posts = StoreName::Sql("posts".into());
        assert_eq!(instance.ctx.take_away().map(|away| away.store), Some(posts));
        assert!(instance.ctx.take_away().is_none());
        let ping = instance.ctx.grants.probe("posts", &Action::Answer).await;
        assert!(matches!(ping, Err(StoreError::Unavailable(_))), "{ping:?}");
        let unknown = instance.ctx.grants.probe("others", &Action::Answer).await;
        assert!(
            matches!(unknown, Err(StoreError::Refused(_))),
            "{unknown:?}"
        );
    }

    fn pending() -> Arc<Pending> {
        let log = crate::capability::logging::LogCtx::new("stage".into());
        Arc::new(Pending::new(log))
    }
}
