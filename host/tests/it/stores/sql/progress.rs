//! The table of the lanes' progress: who makes it, and who owns a row.

use std::time::Duration;

use host::capability::StoreError;
use host::capability::sql::Database;
use host::delivery::progress::{
    Checkpoint, Commit, CommitError, LaneId, Ledger, Mode, Transaction,
};
use host::pipeline::SqlUrl;
use sqlx::{AssertSqlSafe, ConnectOptions};

use super::sqlite_grants::raw;
use super::{CONNECTIONS, Kind, Place, admin, execute, on, on_each, query};

pub(super) fn lane() -> LaneId {
    LaneId {
        group: "service.publisher".into(),
        topic: "app.newPosts".into(),
        partition: 3,
    }
}

pub(super) fn checkpoint(next_offset: i64) -> Checkpoint {
    Checkpoint {
        next_offset: Some(next_offset),
        attempts: 2,
        pending: vec![0, 1, 255],
        seen: b"seen".to_vec(),
    }
}

pub(super) fn commit<'a>(
    lane: &'a LaneId,
    epoch: i64,
    commits: i64,
    checkpoint: &'a Checkpoint,
) -> Commit<'a> {
    Commit {
        lane,
        epoch,
        commits,
        checkpoint,
    }
}

#[tokio::test]
async fn a_row_is_whose_epoch_is_the_last() {
    on_each(async |kind, database| {
        database.prepare_progress().await.expect("a new table");
        let lane = lane();
        let first = database.claim(&lane).await.expect("a claim");
        assert_eq!((first.epoch, first.commits), (1, 0));
        // Above that of any row which the lane may have lost before.
        assert!(first.generation > 1_700_000_000_000, "milliseconds of now");
        assert_eq!(first.checkpoint, Checkpoint::default());
        let other = LaneId {
            partition: 4,
            ..lane.clone()
        };
        assert_eq!(database.claim(&other).await.expect("a claim").epoch, 1);

        let state = checkpoint(10);
        let saved = database.save(commit(&lane, 1, 1, &state)).await;
        assert!(saved.is_ok(), "{kind:?}: {saved:?}");
        let second = database.claim(&lane).await.expect("a claim");
        assert_eq!((second.epoch, second.commits), (2, 1), "{kind:?}");
        assert_eq!(second.checkpoint, state, "{kind:?}");

        let fenced = database.save(commit(&lane, 1, 2, &state)).await;
        assert!(matches!(fenced, Err(CommitError::Fenced)), "{fenced:?}");
        let fenced = database.reclaim(&lane, 1).await.expect("an answer");
        assert_eq!(fenced, None, "{kind:?}");
        let third = database.reclaim(&lane, 2).await.expect("an answer");
        let third = third.expect("a claim");
        assert_eq!((third.epoch, third.commits), (3, 1), "{kind:?}");
        assert_eq!(third.checkpoint, state, "{kind:?}");
    })
    .await;
}

/// More than a guest's value may have: what a batch sends may be that much.
#[tokio::test]
async fn a_row_has_room_for_a_large_batch() {
    const BYTES: usize = 80 << 20;
    on_each(async |kind, database| {
        database.prepare_progress().await.expect("a new table");
        let lane = lane();
        let epoch = database.claim(&lane).await.expect("a claim").epoch;
        let mut state = checkpoint(10);
        state.pending = (0..BYTES).map(|at| (at % 251) as u8).collect();
        let transaction = database
            .begin(Mode::Optimistic)
            .await
            .expect("a transaction");
        let committed = transaction.commit(commit(&lane, epoch, 1, &state)).await;
        assert!(committed.is_ok(), "{kind:?}: {committed:?}");
        let claim = database.claim(&lane).await.expect("a claim");
        assert!(claim.checkpoint == state, "{kind:?}");
        let saved = database.save(commit(&lane, 2, 2, &state)).await;
        assert!(saved.is_ok(), "{kind:?}: {saved:?}");
    })
    .await;
}

#[tokio::test]
async fn hosts_that_start_at_once_make_one_table() {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        let mut hosts = Vec::new();
        for _ in 0..4 {
            hosts.push(place.open(None).await.expect("a database"));
        }
        let prepared = hosts.iter().map(Database::prepare_progress);
        for prepared in futures::future::join_all(prepared).await {
            assert!(prepared.is_ok(), "{kind:?}: {prepared:?}");
        }
        let lane = lane();
        for (at, host) in hosts.iter().enumerate() {
            let epoch = host.claim(&lane).await.expect("a claim").epoch;
            assert_eq!(epoch, at as i64 + 1, "{kind:?}");
        }
        for host in hosts {
            let again = host.prepare_progress().await;
            assert!(again.is_ok(), "{kind:?}: {again:?}");
            host.close().await;
        }
        place.remove().await;
    }
}

/// Runs statements on a new database, as the server's owner.
async fn as_owner(place: &Place, statements: &str) {
    let SqlUrl::Postgres(url) = &place.url else {
        panic!("not PostgreSQL");
    };
    let options: sqlx::postgres::PgConnectOptions = url.parse().expect("a URL");
    let mut owner = options.connect().await.expect("the owner's connection");
    let done = sqlx::raw_sql(AssertSqlSafe(statements))
        .execute(&mut owner)
        .await;
    done.unwrap_or_else(|error| panic!("{statements}: {error}"));
}

/// A role without any right but to connect.
async fn stranger(place: &Place) -> (String, Database) {
    let role = format!("{}_role", place.name);
    admin(&format!("CREATE ROLE {role} LOGIN PASSWORD 'geheim'")).await;
    // Up to PostgreSQL 14, everybody may.
    as_owner(place, "REVOKE CREATE ON SCHEMA public FROM public").await;
    let SqlUrl::Postgres(url) = &place.url else {
        panic!("not PostgreSQL");
    };
    let mut url = url::Url::parse(url).expect("a URL");
    url.set_username(&role).expect("a URL with users");
    url.set_password(Some("geheim")).expect("a URL with users");
    let url = SqlUrl::Postgres(url.into());
    let database = Database::connect(&url, None, CONNECTIONS, None).await;
    (role, database.expect("a database"))
}

#[tokio::test]
async fn missing_rights_are_named_with_what_to_do() {
    let place = Place::new(Kind::Postgres).await;
    let (role, database) = stranger(&place).await;
    let refused = async || match database.prepare_progress().await {
        Err(StoreError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let why = refused().await;
    let (words, statements) = why.split_once('\n').expect("words, then statements");
    for expected in [
        &*role,
        "permission denied for schema public",
        &format!("GRANT USAGE, CREATE ON SCHEMA public TO {role};"),
    ] {
        assert!(words.contains(expected), "{why}");
    }
    assert!(!why.contains("geheim"), "{why}");

    // As it says, a role that may make the table does.
    as_owner(&place, statements).await;
    database.prepare_progress().await.expect("a table");
    database.claim(&lane()).await.expect("a claim");
    let saved = database.save(commit(&lane(), 1, 1, &checkpoint(1))).await;
    assert!(saved.is_ok(), "{saved:?}");

    as_owner(
        &place,
        &format!("REVOKE UPDATE ON stagehost_progress FROM {role}"),
    )
    .await;
    let why = refused().await;
    let grant = format!("GRANT SELECT, INSERT, UPDATE ON public.stagehost_progress TO {role}");
    assert!(why.contains(&grant), "{why}");
    let claim = database.claim(&lane()).await;
    assert!(matches!(claim, Err(StoreError::Refused(_))), "{claim:?}");

    // The other way.
    as_owner(
        &place,
        &format!("DROP TABLE stagehost_progress; GRANT CREATE ON SCHEMA public TO {role}"),
    )
    .await;
    database.prepare_progress().await.expect("a new table");
    assert_eq!(database.claim(&lane()).await.expect("a claim").epoch, 1);
    database.close().await;
    place.remove().await;
    admin(&format!("DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_table_that_is_something_else_is_refused() {
    const OTHER: &str = "CREATE TABLE stagehost_progress (epoch BIGINT)";
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        let database = place.open(None).await.expect("a new database");
        match kind {
            Kind::Postgres => drop(execute(&database, OTHER, &[]).await),
            Kind::Sqlite => raw(&place).execute_batch(OTHER).expect("a table"),
        }
        let prepared = database.prepare_progress().await;
        match prepared {
            Err(StoreError::Refused(why)) => {
                assert!(why.contains("consumer_group"), "{kind:?}: {why}");
            }
            other => panic!("{kind:?}: {other:?}"),
        }
        database.close().await;
        place.remove().await;
    }
}

/// A host that stopped half-way through a commit holds its row until the server loses patience with it.
#[tokio::test]
async fn a_host_that_hangs_loses_its_lane() {
    let place = Place::new(Kind::Postgres).await;
    let open = async || {
        let pause = Some(Duration::ZERO);
        let database = Database::connect(&place.url, None, CONNECTIONS, pause).await;
        database.expect("a database")
    };
    let (hanging, next) = (open().await, open().await);
    hanging.prepare_progress().await.expect("a new table");
    let lane = lane();
    let epoch = hanging.claim(&lane).await.expect("a claim").epoch;
    let transaction = hanging
        .begin(Mode::Optimistic)
        .await
        .expect("a transaction");
    let lock = "SELECT epoch FROM stagehost_progress FOR UPDATE";
    let locked = transaction.query(lock, &[]).await;
    assert!(locked.is_ok(), "{locked:?}");
    let claim = next.claim(&lane).await.expect("a claim");
    assert_eq!(claim.epoch, epoch + 1);
    let state = checkpoint(1);
    let late = transaction.commit(commit(&lane, epoch, 1, &state)).await;
    assert!(matches!(late, Err(CommitError::Unanswered(_))), "{late:?}");
    let lost = hanging.reclaim(&lane, epoch).await.expect("an answer");
    assert_eq!(lost, None);
    hanging.close().await;
    next.close().await;
    place.remove().await;
}

#[tokio::test]
async fn a_claim_waits_for_what_is_being_committed() {
    on_each(async |kind, database| {
        database.prepare_progress().await.expect("a new table");
        let lane = lane();
        let epoch = database.claim(&lane).await.expect("a claim").epoch;
        let transaction = database
            .begin(Mode::Optimistic)
            .await
            .expect("a transaction");
        // On SQLite any write keeps others from theirs.
        let touch = match kind {
            Kind::Postgres => "UPDATE stagehost_progress SET attempts = attempts",
            Kind::Sqlite => "CREATE TABLE touched (id INTEGER)",
        };
        let touched = transaction.execute(touch, &[]).await;
        assert!(touched.is_ok(), "{kind:?}: {touched:?}");
        let claim = database.claim(&lane);
        tokio::pin!(claim);
        let early = tokio::time::timeout(Duration::from_millis(300), &mut claim).await;
        assert!(early.is_err(), "{kind:?}: {early:?}");
        let state = checkpoint(20);
        let committed = transaction.commit(commit(&lane, epoch, 1, &state)).await;
        assert!(committed.is_ok(), "{kind:?}: {committed:?}");
        let claim = claim.await.expect("a claim");
        assert_eq!((claim.epoch, claim.commits), (epoch + 1, 1), "{kind:?}");
        assert_eq!(claim.checkpoint, state, "{kind:?}");
    })
    .await;
}

/// However the stage has changed its session, the row is the host's.
#[tokio::test]
async fn a_stages_role_and_search_path_are_not_the_hosts() {
    on(Kind::Postgres, async |_, database| {
        database.prepare_progress().await.expect("a new table");
        let lane = lane();
        let epoch = database.claim(&lane).await.expect("a claim").epoch;
        let role = "pg_read_all_stats";
        for (commits, change) in [
            (1, format!("SELECT set_config('role', '{role}', true)")),
            (2, format!("SELECT set_config('role', '{role}', false)")),
            (3, "SELECT set_config('search_path', 'nowhere', false)".to_owned()),
        ] {
            let transaction = database.begin(Mode::Optimistic).await.expect("a transaction");
            let changed = transaction.query(&change, &[]).await;
            assert!(changed.is_ok(), "{changed:?}");
            let state = checkpoint(commits);
            let committed = transaction.commit(commit(&lane, epoch, commits, &state)).await;
            assert!(committed.is_ok(), "{change}: {committed:?}");
            let all = (0..CONNECTIONS).map(|_| {
                let own = "SELECT current_user = session_user AND to_regclass('stagehost_progress') IS NOT NULL";
                query(&database, own, &[])
            });
            for rows in futures::future::join_all(all).await {
                assert_eq!(rows, [[super::Value::Boolean(true)]], "{change}");
            }
        }
        // What can't be undone is the stage's own fault.
        let transaction = database.begin(Mode::Optimistic).await.expect("a transaction");
        let change = "SELECT set_config('transaction_read_only', 'on', true)";
        let changed = transaction.query(change, &[]).await;
        assert!(changed.is_ok(), "{changed:?}");
        let state = checkpoint(4);
        let refused = transaction.commit(commit(&lane, epoch, 4, &state)).await;
        assert!(matches!(refused, Err(CommitError::Refused(_))), "{refused:?}");
    })
    .await;
}
