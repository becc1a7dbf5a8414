//! A database as a host uses it: the host's own traits over requests that may be lost.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::capability::{Action, StoreError};
use host::delivery::progress::{
    Broken, Claim, Commit, CommitError, LaneId, Ledger, Mode, Transaction,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::database::{Database, Denial, Own, Row, Update};
use super::network::request;
use super::process::Process;
use super::trace::Subject;
use super::{World, lock, pause};

/// How long a client waits for an answer that may need a lock.
const PATIENCE: Duration = Duration::from_secs(15);

/// One process's way to a database.
pub(crate) struct Client {
    process: Process,
    database: Arc<Database>,
    /// The stage that it is for.
    stage: usize,
    /// Transactions at a time.
    slots: Arc<Semaphore>,
    /// Whatever writes takes one of them, as in SQLite.
    one_writer: bool,
}

impl Client {
    pub(crate) fn new(
        process: Process,
        database: Arc<Database>,
        stage: usize,
        slots: Arc<Semaphore>,
        one_writer: bool,
    ) -> Self {
        Self {
            process,
            database,
            stage,
            slots,
            one_writer,
        }
    }

    pub(crate) fn database(&self) -> &Database {
        &self.database
    }

    /// Asks whether it does this.
    pub(crate) async fn probe(&self, action: &Action) -> Result<(), StoreError> {
        let (database, action) = (self.database.clone(), action.clone());
        let asked = request(
            &self.process,
            "probe",
            async move { database.does(&action) },
        );
        match asked.await {
            Ok(true) => Ok(()),
            _ => Err(unavailable()),
        }
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        let turn = self.slots.clone().acquire_owned().await;
        turn.map_err(|error| StoreError::Unavailable(error.to_string()))
    }

    async fn turn_of_writer(&self) -> Result<Option<OwnedSemaphorePermit>, StoreError> {
        match self.one_writer {
            true => Ok(Some(self.turn().await?)),
            false => Ok(None),
        }
    }

    async fn ask_claim(
        &self,
        what: &'static str,
        lane: &LaneId,
        how: Own,
    ) -> Result<Option<Claim>, StoreError> {
        let _turn = self.turn_of_writer().await?;
        let (database, asked_for) = (self.database.clone(), lane.clone());
        let who = self.process.number();
        let asked = request(&self.process, what, async move {
            database.claim(who, asked_for, how).await
        });
        let answer = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(Ok(claim))) => Ok(claim),
            _ => {
                self.disturbed();
                Err(unavailable())
            }
        };
        let epoch = match &answer {
            Ok(claim) => claim.as_ref().map_or(-1, |claim| claim.epoch),
            Err(_) => -2,
        };
        let subject = Subject::Place(lane.topic.clone(), lane.partition);
        self.process.note(what, subject, [epoch, 0]);
        answer
    }

    fn disturbed(&self) {
        let world = self.process.world();
        world.evidence().disturbed(self.stage, 1);
    }
}

impl Ledger for Client {
    type Transaction = Open;

    async fn claim(&self, lane: &LaneId) -> Result<Claim, StoreError> {
        let claim = self.ask_claim("claim", lane, Own::Claim).await?;
        claim.ok_or_else(|| StoreError::Refused("a claim of any epoch was refused".into()))
    }

    async fn reclaim(&self, lane: &LaneId, epoch: i64) -> Result<Option<Claim>, StoreError> {
        self.ask_claim("reclaim", lane, Own::Reclaim(epoch)).await
    }

    async fn raise(
        &self,
        lane: &LaneId,
        epoch: i64,
        generation: i64,
    ) -> Result<Option<Claim>, StoreError> {
        let how = Own::Raise(epoch, generation);
        self.ask_claim("raise", lane, how).await
    }

    async fn look(&self, lane: &LaneId) -> Result<Option<Claim>, StoreError> {
        let (database, asked_for) = (self.database.clone(), lane.clone());
        let looked = request(
            &self.process,
            "look",
            async move { database.look(&asked_for) },
        );
        match looked.await {
            Ok(Ok(row)) => Ok(row),
            _ => Err(unavailable()),
        }
    }

    async fn begin(&self, mode: Mode) -> Result<Open, StoreError> {
        self.process.point("begin").await;
        let slot = self.turn().await?;
        let database = self.database.clone();
        let world = self.process.world().clone();
        // The end is made at once, so that a session is closed whose opening was not answered.
        let opened = request(&self.process, "begin", async move {
            let session = database.open(mode)?;
            Ok::<_, Denial>(Arc::new(End {
                world,
                database,
                session,
            }))
        });
        let opened = opened.await;
        let is_careful = i64::from(mode == Mode::Careful);
        self.process.note(
            "begin",
            Subject::None,
            [is_careful, i64::from(matches!(opened, Ok(Ok(_))))],
        );
        match opened {
            Ok(Ok(end)) => Ok(Open {
                process: self.process.clone(),
                stage: self.stage,
                end,
                state: Mutex::default(),
                _slot: slot,
            }),
            _ => {
                self.disturbed();
                Err(unavailable())
            }
        }
    }

    async fn save(&self, commit: Commit<'_>) -> Result<(), CommitError> {
        let _turn = self.turn_of_writer().await.map_err(|_| unanswered())?;
        let database = self.database.clone();
        let update = Update::from(commit);
        let saved = request(
            &self.process,
            "save",
            async move { database.save(update).await },
        );
        match saved.await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(CommitError::Fenced),
            _ => Err(unanswered()),
        }
    }
}

/// The client's end of a session. Once nobody holds it, and nothing is on its way, the server gets to know.
struct End {
    world: World,
    database: Arc<Database>,
    session: u64,
}

impl Drop for End {
    fn drop(&mut self) {
        if self.world.is_over() || !self.database.is_open(self.session) {
            return;
        }
        let (database, session) = (self.database.clone(), self.session);
        // Half of them at once; a few, whose machine is gone, only when the server asks.
        let delay = match self.world.roll(0..=9) {
            0 => self.world.roll(0..=self.world.weather().late),
            1..5 => self.world.roll(0..=20),
            _ => 0,
        };
        if delay == 0 {
            database.close(session);
        } else {
            self.world.spawn(async move {
                pause(delay).await;
                database.close(session);
            });
        }
    }
}

/// A transaction as a lane holds it.
pub(crate) struct Open {
    process: Process,
    stage: usize,
    end: Arc<End>,
    state: Mutex<State>,
    _slot: OwnedSemaphorePermit,
}

#[derive(Default)]
struct State {
    statements: u64,
    broken: Option<Broken>,
}

impl Open {
    pub(crate) async fn insert(&self, row: Row) -> Result<(), Denial> {
        self.statement("insert", |end| async move {
            end.database.insert(end.session, row)
        })
        .await
    }

    pub(crate) async fn fail(&self) -> Result<(), Denial> {
        self.statement("fail", |end| async move { end.database.fail(end.session) })
            .await
    }

    /// A statement that the server's process does not survive.
    pub(crate) async fn kill(&self) -> Result<(), Denial> {
        self.statement("kill", |end| async move {
            end.database.close(end.session);
            Err(Denial::Gone)
        })
        .await
    }

    async fn statement<F>(
        &self,
        what: &'static str,
        run: impl FnOnce(Arc<End>) -> F,
    ) -> Result<(), Denial>
    where
        F: Future<Output = Result<(), Denial>> + Send + 'static,
    {
        {
            let mut state = lock(&self.state);
            if state.broken.is_some() {
                return Err(Denial::Gone);
            }
            state.statements += 1;
            // Until it is answered: a call may be given up in the middle.
            state.broken = Some(Broken::Connection("given up half-way".into()));
        }
        let answer = request(&self.process, what, run(self.end.clone())).await;
        let answer = answer.unwrap_or_else(|_| {
            self.cost();
            Err(Denial::Gone)
        });
        let broken = match answer {
            Ok(()) => None,
            Err(Denial::Gone) => Some(Broken::Connection("it was lost".into())),
            Err(Denial::Failed | Denial::Sick(_)) => self
                .end
                .database
                .is_doomed(self.end.session)
                .then_some(Broken::Statement),
        };
        lock(&self.state).broken = broken;
        answer
    }

    /// A request of the host's own, which must not fail.
    async fn command<F>(
        &self,
        what: &'static str,
        run: impl FnOnce(Arc<End>) -> F,
    ) -> Result<(), StoreError>
    where
        F: Future<Output = Result<(), Denial>> + Send + 'static,
    {
        match request(&self.process, what, run(self.end.clone())).await {
            Ok(Ok(())) => Ok(()),
            _ => {
                self.cost();
                Err(unavailable())
            }
        }
    }

    fn cost(&self) {
        let world = self.process.world();
        world.evidence().cost(self.stage, 1);
    }

    fn disturbed(&self) {
        let world = self.process.world();
        world.evidence().disturbed(self.stage, 1);
    }

    fn note_commit(&self, update: &Update, outcome: &Result<(), CommitError>) {
        let what = match outcome {
            Ok(()) => "commit",
            Err(CommitError::Fenced) => "commit fenced",
            Err(CommitError::Refused(_)) => "commit refused",
            Err(CommitError::TooLong(_)) => "commit too long",
            Err(CommitError::Unanswered(_)) => "commit unanswered",
        };
        if outcome.is_err() {
            self.disturbed();
        }
        let subject = Subject::Place(update.lane.topic.clone(), update.lane.partition);
        let next = update.checkpoint.next_offset.unwrap_or(-1);
        self.process.note(what, subject, [next, update.epoch]);
    }
}

impl Transaction for Open {
    fn statements(&self) -> u64 {
        lock(&self.state).statements
    }

    fn broken(&self) -> Option<Broken> {
        lock(&self.state).broken.clone()
    }

    async fn savepoint(&self) -> Result<(), StoreError> {
        self.command("savepoint", |end| async move {
            end.database.savepoint(end.session)
        })
        .await
    }

    async fn rollback_to_savepoint(&self) -> Result<(), StoreError> {
        self.command("rollback to", |end| async move {
            end.database.rollback_to_savepoint(end.session)
        })
        .await
    }

    async fn commit(self, commit: Commit<'_>) -> Result<(), CommitError> {
        let update = Update::from(commit);
        let (end, sent) = (self.end.clone(), update.clone());
        let updated = request(&self.process, "update", async move {
            end.database.update(end.session, sent).await
        });
        let outcome = match updated.await {
            Ok(Ok(true)) => {
                let end = self.end.clone();
                let committed = request(&self.process, "commit", async move {
                    end.database.commit(end.session)
                });
                match committed.await {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(Denial::Failed)) => Err(CommitError::Refused("a constraint".into())),
                    Ok(Err(Denial::Gone | Denial::Sick(_))) | Err(_) => Err(unanswered()),
                }
            }
            Ok(Ok(false)) => Err(CommitError::Fenced),
            Ok(Err(_)) | Err(_) => Err(unanswered()),
        };
        self.note_commit(&update, &outcome);
        outcome
    }

    async fn rollback(self) {
        let end = self.end.clone();
        self.process.note("rollback", Subject::None, [0, 0]);
        // Whether it arrives or not, the session ends with its client's end.
        let _ = request(&self.process, "rollback", async move {
            end.database.close(end.session);
        })
        .await;
    }
}

fn unavailable() -> StoreError {
    StoreError::Unavailable("no answer".into())
}

fn unanswered() -> CommitError {
    CommitError::Unanswered("no answer".into())
}
