//! What components call.

use std::collections::BTreeMap;
use std::sync::Arc;

use wasmtime::component::{HasData, Linker, Resource, ResourceTable};

use super::{Database, Done, Transaction, Work};
use crate::capability::{Pending, StoreError, StoreName};
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

    /// Asks a database for nothing, to see that it answers.
    pub async fn ping(&self, name: &str) -> Result<(), StoreError> {
        match self.0.get(name) {
            Some(database) => database.ping().await,
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
    away: Option<StoreName>,
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

    /// The first database that was not available since this was last asked.
    pub fn take_away(&mut self) -> Option<StoreName> {
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
                pending
                    .during(store.clone(), database.call(statement, work))
                    .await
            }
            Some(transaction) => {
                let call = transaction.call(statement, work);
                let answer = pending.during(store.clone(), call).await;
                // The guest must not go on, with effects elsewhere, as if its earlier ones held.
                if transaction.broken().is_some() {
                    let why = answer
                        .err()
                        .map_or(String::new(), |error| format!(": {error}"));
                    wasmtime::bail!(
                        "the transaction of {store} is void, and the batch will be run again{why}"
                    );
                }
                answer
            }
        };
        if let Err(Error::Unavailable(_)) = &answer {
            self.ctx.away.get_or_insert(store);
        }
        Ok(answer)
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
