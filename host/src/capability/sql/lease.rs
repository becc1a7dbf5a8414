//! A connection on loan from the pool.

use std::ops::{Deref, DerefMut};

use sqlx::pool::PoolConnection;

use super::{Error, transport_error};

/// Goes back into the pool when [`Lease::finish`] says that its work came to an end, and is closed
/// otherwise: a call that was given up, by its deadline or by a limit, leaves a statement running and
/// an answer half read, and neither may reach the next user. Its place in the pool is free at once, and the
/// database soon sees that nobody waits for the statement.
pub(super) struct Lease<D: sqlx::Database>(Option<PoolConnection<D>>);

impl<D: sqlx::Database> Lease<D> {
    pub(super) async fn take(pool: &sqlx::Pool<D>) -> Result<Self, Error> {
        match pool.acquire().await {
            Ok(connection) => Ok(Self(Some(connection))),
            Err(error) => Err(transport_error(&error)),
        }
    }

    /// Gives the connection back, which is at rest.
    pub(super) fn give_back(mut self) {
        drop(self.0.take());
    }

    /// Gives the connection back, or closes it where the outcome says that it is not at rest.
    pub(super) fn finish<T>(self, outcome: Result<T, Error>) -> Result<T, Error> {
        if is_at_rest(&outcome) {
            self.give_back();
        }
        outcome
    }
}

/// Whether a connection has done all that it was asked, after a call with this outcome.
pub(super) fn is_at_rest<T>(outcome: &Result<T, Error>) -> bool {
    matches!(outcome, Ok(_) | Err(Error::Database(_) | Error::Denied(_)))
}

impl<D: sqlx::Database> Drop for Lease<D> {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

impl<D: sqlx::Database> Deref for Lease<D> {
    type Target = PoolConnection<D>;

    fn deref(&self) -> &Self::Target {
        self.0
            .as_ref()
            .expect("a lease holds its connection until it ends")
    }
}

impl<D: sqlx::Database> DerefMut for Lease<D> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.0
            .as_mut()
            .expect("a lease holds its connection until it ends")
    }
}
