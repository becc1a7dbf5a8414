//! A pooler between host and server.
//!
//! One that gives each client a session of its own is no matter. One that shares sessions, by the transaction, mixes up what the
//! host prepares in them and sets for them: half of all statements would fail, and others' sessions would have its settings.

use std::time::Duration;

use super::super::{Failure, StoreError};
use super::client::Client;
use super::pool::Pool;
use super::server::Server;
use super::{Postgres, connect, in_time};

/// How often two sessions are asked who serves them.
const ROUNDS: usize = 3;
/// A pooler may have no second session to give. Then it does not share the first.
const SECOND_TIMEOUT: Duration = Duration::from_secs(2);

/// How long it may take to find out while lanes wait.
const PROBE_TIMEOUT: Duration = Duration::from_secs(4);

/// Refuses a server that is a pooler which shares sessions.
pub(super) async fn check(server: &Server, first: &mut Client) -> Result<(), StoreError> {
    let told = first.process;
    let before = serves(first).await?;
    if before == told {
        return Ok(());
    }
    let shares = tokio::time::timeout(SECOND_TIMEOUT, async {
        let mut second = connect(server).await?;
        for _ in 0..ROUNDS {
            let (one, other) = (serves(first).await?, serves(&mut second).await?);
            // One process for two, or another one than before.
            if one == other || one != before {
                return Ok::<_, StoreError>(true);
            }
        }
        second.close().await;
        Ok(false)
    });
    match shares.await {
        Ok(Ok(true)) => Err(StoreError::Refused(
            "a pooler is between that shares sessions (PgBouncer with pool_mode = transaction, or the like), and the host \
             prepares statements in its sessions: write pool_mode = session for this database, or the server's own address"
                .to_owned(),
        )),
        Ok(Ok(false) | Err(_)) | Err(_) => Ok(()),
    }
}

impl Postgres {
    /// Whether a pooler shares sessions by now: its settings may have been changed, or another one has the address.
    pub(in super::super) async fn probe_pooler(&self) -> Result<(), StoreError> {
        probe(&self.pool).await?;
        match self.secret {
            Some(_) => probe(&self.own).await,
            None => Ok(()),
        }
    }
}

/// In sessions of its own, which may be more than there is room for: what does not come about says nothing.
async fn probe(pool: &Pool) -> Result<(), StoreError> {
    if !pool.is_pooled() {
        return Ok(());
    }
    let server = pool.server();
    let checked = tokio::time::timeout(PROBE_TIMEOUT, async {
        let mut first = connect(server).await.ok()?;
        let checked = check(server, &mut first).await;
        first.close().await;
        checked.err()
    });
    match checked.await {
        Ok(Some(StoreError::Refused(why))) => Err(StoreError::Unavailable(format!(
            "{}: {why}",
            server.place()
        ))),
        _ => Ok(()),
    }
}

/// The process that serves a session just now.
async fn serves(client: &mut Client) -> Result<i32, StoreError> {
    let process = in_time(client.look("SELECT pg_catalog.pg_backend_pid()")).await;
    let process = process.map_err(Failure::into_error)?;
    Ok(process
        .and_then(|process| process.parse().ok())
        .unwrap_or_default())
}
