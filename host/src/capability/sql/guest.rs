//! What components call.

use std::collections::BTreeMap;
use std::sync::Arc;

use wasmtime::component::{HasData, Linker, Resource, ResourceTable};

use super::Database;
use crate::capability::Pending;
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
}

/// What one instance has of this interface.
pub struct SqlCtx {
    grants: Arc<SqlGrants>,
    pending: Arc<Pending>,
    denied: Option<String>,
}

impl SqlCtx {
    /// For an instance of the stage that has these grants. What it waits for is noted in `pending`.
    pub fn new(grants: Arc<SqlGrants>, pending: Arc<Pending>) -> Self {
        Self {
            grants,
            pending,
            denied: None,
        }
    }

    /// Where it is noted which database the instance waits for.
    pub fn waiting_for(&self) -> Arc<Pending> {
        self.pending.clone()
    }

    /// The first thing that was denied since this was last asked.
    pub fn take_denied(&mut self) -> Option<String> {
        self.denied.take()
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
    /// Runs a call on a handle's database, and notes for how long the instance waits for it.
    async fn call<T>(
        &mut self,
        handle: &Resource<Connection>,
        call: impl AsyncFnOnce(Database) -> Result<T, Error>,
    ) -> wasmtime::Result<Result<T, Error>> {
        let Connection { name, database } = self.table.get(handle)?.clone();
        let store = crate::capability::StoreName::Sql(name.clone());
        Ok(self.ctx.pending.during(store, call(database)).await)
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
        self.call(&handle, async |db| db.query(&statement, &params).await)
            .await
    }

    async fn execute(
        &mut self,
        handle: Resource<Connection>,
        statement: String,
        params: Vec<Value>,
    ) -> wasmtime::Result<Result<u64, Error>> {
        self.call(&handle, async |db| db.execute(&statement, &params).await)
            .await
    }

    async fn execute_many(
        &mut self,
        handle: Resource<Connection>,
        statement: String,
        params: Vec<Vec<Value>>,
    ) -> wasmtime::Result<Result<u64, Error>> {
        self.call(&handle, async |db| {
            db.execute_many(&statement, &params).await
        })
        .await
    }

    async fn drop(&mut self, handle: Resource<Connection>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

impl SqlCtx {
    /// stub
    pub fn take_away(&mut self) -> Option<crate::capability::StoreName> {
        None
    }
    /// stub
    pub fn set_transaction(&mut self, _: Option<super::Transaction>) {}
}
impl SqlGrants {
    /// stub
    pub async fn ping(&self, _: &str) -> Result<(), crate::capability::StoreError> {
        Ok(())
    }
}
