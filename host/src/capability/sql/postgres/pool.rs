//! Sessions on loan.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

use super::super::{ACQUIRE_TIMEOUT, Error, StoreError};
use super::client::Client;
use super::locks::Limits;
use super::server::Server;
use super::{Settings, in_time};

/// A connection that was unused for longer is asked whether it is alive before it is used again.
const PING_AFTER_IDLE: Duration = Duration::from_secs(5);
/// One that is older is made anew, so that none outlives what was changed about its server or its role for long.
const MAX_AGE: Duration = Duration::from_secs(30 * 60);

/// A bounded number of sessions of one role.
#[derive(Clone)]
pub(super) struct Pool(Arc<Inner>);

struct Inner {
    server: Server,
    settings: Settings,
    size: u32,
    places: Arc<Semaphore>,
    idle: Mutex<Vec<Session>>,
    /// It was said that the server ends transactions before stages do.
    was_warned: AtomicBool,
    /// A pooler is between: the server's process was another one than it had said.
    is_pooled: AtomicBool,
    /// Why no session could be made, when that was tried last.
    unmade: Mutex<Option<String>>,
}

struct Session {
    client: Client,
    made: Instant,
}

/// Goes back into the pool when it is dropped, if it is at rest, and is closed otherwise: a call that was given up, by its
/// deadline or by a limit, leaves a statement running and an answer half read, and neither may reach the next user. Its place
/// in the pool is free at once, and the server soon sees that nobody waits for the statement.
pub(super) struct Lease {
    session: Option<Session>,
    pool: Pool,
    _place: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new(server: Server, settings: Settings, size: u32) -> Self {
        Self(Arc::new(Inner {
            server,
            settings,
            size,
            places: Arc::new(Semaphore::new(size as usize)),
            idle: Mutex::default(),
            was_warned: AtomicBool::new(false),
            is_pooled: AtomicBool::new(false),
            unmade: Mutex::default(),
        }))
    }

    pub(super) fn server(&self) -> &Server {
        &self.0.server
    }

    /// Whether a pooler was between when a session was made last.
    pub(super) fn is_pooled(&self) -> bool {
        self.0.is_pooled.load(Ordering::Relaxed)
    }

    pub(super) async fn take(&self) -> Result<Lease, Error> {
        let place = self.place().await?;
        self.take_at(place).await
    }

    /// A place, which others may have.
    pub(super) async fn place(&self) -> Result<OwnedSemaphorePermit, Error> {
        let place = self.0.places.clone().acquire_owned();
        let place = tokio::time::timeout(ACQUIRE_TIMEOUT, place).await;
        let place = place.map_err(|_| self.no_place())?;
        place.map_err(|_| Error::Unavailable("the database was closed".to_owned()))
    }

    pub(super) async fn take_at(&self, place: OwnedSemaphorePermit) -> Result<Lease, Error> {
        let session = self.session_in_time().await?;
        Ok(Lease {
            session: Some(session),
            pool: self.clone(),
            _place: place,
        })
    }

    /// Others have all places. Where they wait for the server, that is what is wrong.
    fn no_place(&self) -> Error {
        let waited = ACQUIRE_TIMEOUT.as_secs();
        let why = format!("no connection became free within {waited} s");
        Error::Unavailable(match &*self.unmade() {
            Some(unmade) => format!("{unmade} ({why})"),
            None => why,
        })
    }

    async fn session_in_time(&self) -> Result<Session, Error> {
        let made = tokio::time::timeout(ACQUIRE_TIMEOUT, self.session()).await;
        let made = made.unwrap_or_else(|_| {
            let waited = ACQUIRE_TIMEOUT.as_secs();
            Err(Error::Unavailable(format!(
                "{} did not answer within {waited} s",
                self.0.server.place()
            )))
        });
        *self.unmade() = match &made {
            Err(Error::Unavailable(why)) => Some(why.clone()),
            _ => None,
        };
        made
    }

    /// One that is idle, or a new one.
    async fn session(&self) -> Result<Session, Error> {
        loop {
            let idle = self.idle().pop();
            let Some(mut session) = idle else { break };
            if session.made.elapsed() > MAX_AGE {
                session.client.close().await;
                continue;
            }
            let rested = session.client.idle_since.elapsed() > PING_AFTER_IDLE;
            if !rested || in_time(session.client.command("")).await.is_ok() {
                return Ok(session);
            }
        }
        let connected = self.0.server.connect().await;
        let mut client = connected.map_err(|error| match StoreError::from(error) {
            StoreError::Unavailable(why) | StoreError::Refused(why) => {
                Error::Unavailable(format!("{}: {why}", self.0.server.place()))
            }
        })?;
        let told = client.process;
        let applied = self.0.settings.apply(&mut client).await;
        applied.map_err(super::Failure::into_error)?;
        let is_pooled = client.process != told;
        self.0.is_pooled.store(is_pooled, Ordering::Relaxed);
        self.warn_of(client.limits);
        let made = Instant::now();
        Ok(Session { client, made })
    }

    /// Once: what is too short shows only when a stage takes its time.
    fn warn_of(&self, Limits { idle, .. }: Limits) {
        let pause = self.0.settings.pause.unwrap_or_default();
        if idle.is_zero() || idle >= pause || self.0.was_warned.swap(true, Ordering::Relaxed) {
            return;
        }
        warn!(
            "{}: idle_in_transaction_session_timeout is {}, and a stage may take {} between two statements: set it higher for the role or the database, or the stage's `limits.deadline` lower",
            self.0.server.place(),
            humantime::format_duration(idle),
            humantime::format_duration(pause),
        );
    }

    fn unmade(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        let unmade = self.0.unmade.lock();
        unmade.unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Session>> {
        let idle = self.0.idle.lock();
        idle.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what is on loan, and closes all.
    pub(super) async fn close(&self) {
        let all = self.0.places.acquire_many(self.0.size).await;
        self.0.places.close();
        drop(all);
        let idle = std::mem::take(&mut *self.idle());
        for session in idle {
            session.client.close().await;
        }
    }
}

impl Lease {
    /// Closes the session, and goes on with another.
    pub(super) async fn renew(&mut self) -> Result<(), Error> {
        self.session = Some(self.pool.session_in_time().await?);
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let session = self.session.take();
        if session
            .as_ref()
            .is_some_and(|session| session.client.is_spent)
        {
            // Those that were made before lead to the same server.
            self.pool.idle().clear();
            return;
        }
        if let Some(mut session) = session.filter(|session| session.client.is_at_rest()) {
            session.client.idle_since = Instant::now();
            self.pool.idle().push(session);
        }
    }
}

impl Deref for Lease {
    type Target = Client;

    fn deref(&self) -> &Self::Target {
        let session = self.session.as_ref();
        &session
            .expect("a lease holds its session until it ends")
            .client
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Self::Target {
        let session = self.session.as_mut();
        &mut session
            .expect("a lease holds its session until it ends")
            .client
    }
}
