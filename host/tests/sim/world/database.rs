//! A database's server: tables, the lanes' rows, locks on them, and sessions with their transactions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use host::capability::Action;
use host::delivery::progress::{Checkpoint, Claim, Commit, LaneId, Mode};
use tokio::sync::Notify;

use super::sickness::Sickness;
use super::trace::Subject;
use super::{World, lock};

/// A row that a stage has written.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) stage: usize,
    pub(crate) id: Arc<str>,
    /// The partition of the stage's input that its message was in, and the message's offset.
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// The commit is refused because of it.
    pub(crate) poison: bool,
}

/// What the server answers where it does not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denial {
    /// The session is closed, or the server is down.
    Gone,
    /// The statement fails.
    Failed,
    /// The server is there, and does not do it.
    Sick(Sickness),
}

/// A commit as it travels.
#[derive(Clone, Debug)]
pub(crate) struct Update {
    pub(crate) lane: LaneId,
    pub(crate) epoch: i64,
    pub(crate) generation: i64,
    pub(crate) commits: i64,
    pub(crate) checkpoint: Checkpoint,
}

impl From<Commit<'_>> for Update {
    fn from(commit: Commit<'_>) -> Self {
        Self {
            lane: commit.lane.clone(),
            epoch: commit.epoch,
            generation: commit.generation,
            commits: commit.commits,
            checkpoint: commit.checkpoint.clone(),
        }
    }
}

impl Update {
    /// Whether the row is the one that the commit follows.
    fn follows(&self, row: &Claim) -> bool {
        row.generation == self.generation && row.commits == self.commits - 1
    }
}

/// All that a database holds: rows, and the lanes'.
pub(crate) type Copy = (Vec<Row>, BTreeMap<LaneId, Claim>);

/// How a lane's row is taken hold of: whoever had it, or where it is of an epoch; or its generation is raised.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Own {
    Claim,
    Reclaim(i64),
    Raise(i64, i64),
}

impl Own {
    fn epoch(self) -> Option<i64> {
        match self {
            Self::Claim => None,
            Self::Reclaim(epoch) | Self::Raise(epoch, _) => Some(epoch),
        }
    }
}

/// What is planted in a database.
#[derive(Clone, Copy, Default)]
pub(crate) struct Lacks {
    /// The row of a lane is not locked by the commit that changes it.
    pub(crate) locks: bool,
    /// A commit does not look whether the row is the one that it follows.
    pub(crate) order_of_commits: bool,
}

pub(crate) struct Database {
    pub(crate) world: World,
    lacks: Lacks,
    server: Mutex<Server>,
    released: Notify,
}

#[derive(Default)]
struct Server {
    is_down: bool,
    sickness: Option<Sickness>,
    rows: Vec<Row>,
    lanes: BTreeMap<LaneId, Claim>,
    /// Which process claimed a lane last.
    claimed: BTreeMap<LaneId, u32>,
    sessions: BTreeMap<u64, Session>,
    last_session: u64,
    /// Which session holds a lane's row.
    locks: BTreeMap<LaneId, u64>,
}

struct Session {
    mode: Mode,
    rows: Vec<Row>,
    savepoint: usize,
    doomed: bool,
    update: Option<Update>,
}

impl Database {
    pub(crate) fn new(world: World, lacks: Lacks) -> Arc<Self> {
        Arc::new(Self {
            world,
            lacks,
            server: Mutex::default(),
            released: Notify::new(),
        })
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        lock(&self.server)
    }

    pub(crate) fn is_up(&self) -> bool {
        !self.server().is_down
    }

    /// A server that goes down forgets its sessions; transactions that are not committed are gone.
    pub(crate) fn set_up(&self, is_up: bool) {
        let mut server = self.server();
        server.is_down = !is_up;
        if !is_up {
            server.sessions.clear();
            server.locks.clear();
        }
        drop(server);
        self.world
            .note(0, "database", Subject::None, [i64::from(is_up), 0]);
        self.released.notify_waiters();
    }

    /// It is sick from now on, or well again. Whoever is connected stays so.
    pub(crate) fn set_sick(&self, sickness: Option<Sickness>) {
        self.server().sickness = sickness;
        let is_sick = i64::from(sickness.is_some());
        self.world
            .note(0, "database sick", Subject::None, [is_sick, 0]);
    }

    /// Whether it does this.
    pub(crate) fn does(&self, action: &Action) -> bool {
        let server = self.server();
        let does = |sickness: Sickness| sickness.does(action);
        !server.is_down && server.sickness.is_none_or(does)
    }

    /// What the host writes of its own: its rights are not a stage's.
    fn takes_writes(&self) -> Result<(), Denial> {
        match self.server().sickness {
            Some(sickness) if !sickness.does(&Action::Write) => Err(Denial::Sick(sickness)),
            _ => Ok(()),
        }
    }

    pub(crate) fn rows(&self) -> Vec<Row> {
        self.server().rows.clone()
    }

    pub(crate) fn lane(&self, lane: &LaneId) -> Option<Claim> {
        self.server().lanes.get(lane).cloned()
    }

    /// Changes a lane's row as a statement of somebody else's would.
    pub(crate) fn tamper(&self, lane: &LaneId, change: impl FnOnce(&mut Claim)) {
        if let Some(row) = self.server().lanes.get_mut(lane) {
            change(row);
        }
    }

    /// How often the message at an offset has failed, as the row says; where it is the process's.
    pub(crate) fn failed(&self, who: u32, lane: &LaneId, offset: i64) -> Option<u32> {
        let server = self.server();
        let checkpoint = &server.lanes.get(lane)?.checkpoint;
        let is_next = checkpoint.next_offset == Some(offset);
        (is_next && server.claimed.get(lane) == Some(&who)).then_some(checkpoint.attempts)
    }

    /// Takes hold of a lane's row, if its epoch is what it is to be.
    pub(crate) async fn claim(
        &self,
        who: u32,
        lane: LaneId,
        how: Own,
    ) -> Result<Option<Claim>, Denial> {
        self.takes_writes()?;
        let session = self.open(Mode::Optimistic)?;
        self.lock_row(&lane, session).await?;
        let mut server = self.server();
        let row = server.lanes.entry(lane.clone()).or_insert_with(|| Claim {
            epoch: 0,
            generation: self.new_generation(),
            commits: 0,
            checkpoint: Checkpoint::default(),
        });
        let claim = (how.epoch().is_none_or(|epoch| epoch == row.epoch)).then(|| {
            match how {
                Own::Claim | Own::Reclaim(_) => row.epoch += 1,
                Own::Raise(_, generation) => row.generation = row.generation.max(generation),
            }
            row.clone()
        });
        if claim.is_some() {
            server.claimed.insert(lane, who);
        }
        drop(server);
        self.close(session);
        Ok(claim)
    }

    /// Of a row that is made now, above that of one that was lost.
    fn new_generation(&self) -> i64 {
        i64::try_from(self.world.now()).unwrap_or(0)
    }

    /// Looks at a lane's row.
    pub(crate) fn look(&self, lane: &LaneId) -> Result<Option<Claim>, Denial> {
        let server = self.server();
        match server.is_down {
            true => Err(Denial::Gone),
            false => Ok(server.lanes.get(lane).cloned()),
        }
    }

    pub(crate) fn copy(&self) -> Copy {
        let server = self.server();
        (server.rows.clone(), server.lanes.clone())
    }

    /// It goes back, or forth, to a copy. Whoever is connected is cut off.
    pub(crate) fn restore(&self, copy: Copy) {
        self.server().sessions.clear();
        self.rewrite(copy);
    }

    /// Somebody writes a copy over what is there. Only commits that are under way would be in the way.
    pub(crate) fn rewrite(&self, (rows, lanes): Copy) {
        let mut server = self.server();
        let Server {
            sessions, locks, ..
        } = &mut *server;
        for session in std::mem::take(locks).values() {
            sessions.remove(session);
        }
        server.rows = rows;
        server.lanes = lanes;
        // Nobody knows of these rows yet.
        server.claimed.clear();
        drop(server);
        self.world.note(0, "restored", Subject::None, [0, 0]);
        self.released.notify_waiters();
    }

    /// Commits progress alone; answers whether the row was what it follows.
    pub(crate) async fn save(&self, update: Update) -> Result<bool, Denial> {
        self.takes_writes()?;
        let session = self.open(Mode::Optimistic)?;
        let done = self.update(session, update).await?;
        if done {
            self.commit(session)?;
        } else {
            self.close(session);
        }
        Ok(done)
    }

    /// Opens a session, in a transaction.
    pub(crate) fn open(&self, mode: Mode) -> Result<u64, Denial> {
        let mut server = self.server();
        if server.is_down {
            return Err(Denial::Gone);
        }
        server.last_session += 1;
        let number = server.last_session;
        let session = Session {
            mode,
            rows: Vec::new(),
            savepoint: 0,
            doomed: false,
            update: None,
        };
        server.sessions.insert(number, session);
        Ok(number)
    }

    /// Closes a session: what it has not committed is rolled back.
    pub(crate) fn close(&self, session: u64) {
        let mut server = self.server();
        server.sessions.remove(&session);
        server.locks.retain(|_, holder| *holder != session);
        drop(server);
        self.released.notify_waiters();
    }

    pub(crate) fn insert(&self, session: u64, row: Row) -> Result<(), Denial> {
        let sickness = self.server().sickness;
        self.statement(session, |session| match sickness {
            None => {
                session.rows.push(row);
                Ok(())
            }
            Some(sickness) => {
                session.doomed = session.mode == Mode::Optimistic;
                Err(Denial::Sick(sickness))
            }
        })
    }

    /// A statement that fails, and that dooms an optimistic transaction.
    pub(crate) fn fail(&self, session: u64) -> Result<(), Denial> {
        self.statement(session, |session| {
            session.doomed = session.mode == Mode::Optimistic;
            Err(Denial::Failed)
        })
    }

    pub(crate) fn savepoint(&self, session: u64) -> Result<(), Denial> {
        self.statement(session, |session| {
            session.savepoint = session.rows.len();
            Ok(())
        })
    }

    pub(crate) fn rollback_to_savepoint(&self, session: u64) -> Result<(), Denial> {
        self.statement(session, |session| {
            session.rows.truncate(session.savepoint);
            Ok(())
        })
    }

    pub(crate) fn is_open(&self, session: u64) -> bool {
        self.server().sessions.contains_key(&session)
    }

    pub(crate) fn is_doomed(&self, session: u64) -> bool {
        let server = self.server();
        server.sessions.get(&session).is_some_and(|s| s.doomed)
    }

    fn statement(
        &self,
        session: u64,
        run: impl FnOnce(&mut Session) -> Result<(), Denial>,
    ) -> Result<(), Denial> {
        let mut server = self.server();
        let session = server.sessions.get_mut(&session).ok_or(Denial::Gone)?;
        if session.doomed {
            return Err(Denial::Failed);
        }
        run(session)
    }

    /// Changes a lane's row in a transaction, if it is what the update follows. The row stays locked until the end.
    pub(crate) async fn update(&self, session: u64, update: Update) -> Result<bool, Denial> {
        self.takes_writes()?;
        self.lock_row(&update.lane, session).await?;
        let mut server = self.server();
        let is_mine = (server.lanes.get(&update.lane)).is_some_and(|row| {
            let follows = self.lacks.order_of_commits || update.follows(row);
            row.epoch == update.epoch && follows
        });
        let held = server.sessions.get_mut(&session).ok_or(Denial::Gone)?;
        if held.doomed {
            return Err(Denial::Failed);
        }
        if is_mine {
            held.update = Some(update);
        }
        if self.lacks.locks {
            server.locks.retain(|_, holder| *holder != session);
            drop(server);
            self.released.notify_waiters();
        }
        Ok(is_mine)
    }

    /// Makes a transaction durable.
    pub(crate) fn commit(&self, session: u64) -> Result<(), Denial> {
        let mut server = self.server();
        let Some(ended) = server.sessions.remove(&session) else {
            return Err(Denial::Gone);
        };
        server.locks.retain(|_, holder| *holder != session);
        let refused = ended.doomed || ended.rows.iter().any(|row| row.poison);
        if !refused {
            if let Some(update) = ended.update {
                let row = server.lanes.get_mut(&update.lane);
                let row = row.expect("a row is changed only if it is there");
                row.commits = update.commits;
                row.checkpoint = update.checkpoint;
            }
            let mut evidence = self.world.evidence();
            for row in &ended.rows {
                evidence.effect(row.stage, &row.id);
                let subject = Subject::Name(row.id.clone());
                self.world
                    .note(0, "  row", subject, [i64::from(row.partition), row.offset]);
            }
            drop(evidence);
            server.rows.extend(ended.rows);
        }
        drop(server);
        self.released.notify_waiters();
        if refused { Err(Denial::Failed) } else { Ok(()) }
    }

    async fn lock_row(&self, lane: &LaneId, session: u64) -> Result<(), Denial> {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            {
                let mut server = self.server();
                if !server.sessions.contains_key(&session) {
                    return Err(Denial::Gone);
                }
                let holder = server.locks.entry(lane.clone()).or_insert(session);
                if *holder == session {
                    return Ok(());
                }
            }
            released.await;
        }
    }
}
