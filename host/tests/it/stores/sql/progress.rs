//! The table of the lanes' progress: who makes it, and who owns a row.

use std::time::Duration;

use host::capability::StoreError;
use host::capability::sql::Database;
use host::delivery::progress::{
    Checkpoint, Claim, Commit, CommitError, LaneId, Ledger, Mode, Transaction,
};
use host::pipeline::SqlUrl;

use super::{CONNECTIONS, Kind, Place, admin, on_each};

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
    claim: &Claim,
    commits: i64,
    checkpoint: &'a Checkpoint,
) -> Commit<'a> {
    Commit {
        lane,
        epoch: claim.epoch,
        generation: claim.generation,
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
        let saved = database.save(commit(&lane, &first, 1, &state)).await;
        assert!(saved.is_ok(), "{kind:?}: {saved:?}");
        let second = database.claim(&lane).await.expect("a claim");
        assert_eq!((second.epoch, second.commits), (2, 1), "{kind:?}");
        assert_eq!(second.checkpoint, state, "{kind:?}");

        let fenced = database.save(commit(&lane, &first, 2, &state)).await;
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

/// A database that is another one than it was, such as an older copy, takes no commit that follows what it does not have.
#[tokio::test]
async fn a_commit_follows_the_one_before_it() {
    on_each(async |kind, database| {
        database.prepare_progress().await.expect("a new table");
        let (lane, state) = (lane(), checkpoint(10));
        let none = database.look(&lane).await.expect("an answer");
        assert_eq!(none, None, "{kind:?}");
        let own = database.claim(&lane).await.expect("a claim");
        let raised = database
            .raise(&lane, own.epoch, own.generation + 5)
            .await
            .expect("an answer");
        let raised = raised.expect("a row");
        assert_eq!(raised.generation, own.generation + 5, "{kind:?}");
        // It only rises.
        let kept = database.raise(&lane, own.epoch, own.generation).await;
        assert_eq!(kept.expect("an answer"), Some(raised.clone()), "{kind:?}");
        let saved = database.save(commit(&lane, &raised, 1, &state)).await;
        assert!(saved.is_ok(), "{kind:?}: {saved:?}");
        for (claim, commits) in [(&raised, 1), (&raised, 3), (&raised, 0), (&own, 2)] {
            let fenced = database.save(commit(&lane, claim, commits, &state)).await;
            assert!(matches!(fenced, Err(CommitError::Fenced)), "{fenced:?}");
            for mode in [Mode::Optimistic, Mode::Careful] {
                let transaction = database.begin(mode).await.expect("a transaction");
                let fenced = transaction
                    .commit(commit(&lane, claim, commits, &state))
                    .await;
                assert!(matches!(fenced, Err(CommitError::Fenced)), "{fenced:?}");
            }
        }
        let found = database.look(&lane).await.expect("an answer");
        let found = found.expect("a row");
        assert_eq!((found.epoch, found.commits), (own.epoch, 1), "{kind:?}");
        assert_eq!(found.checkpoint, state, "{kind:?}");
        let saved = database.save(commit(&lane, &raised, 2, &state)).await;
        assert!(saved.is_ok(), "{kind:?}: {saved:?}");
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
        let own = database.claim(&lane).await.expect("a claim");
        let mut state = checkpoint(10);
        state.pending = (0..BYTES).map(|at| (at % 251) as u8).collect();
        let transaction = database
            .begin(Mode::Optimistic)
            .await
            .expect("a transaction");
        let committed = transaction.commit(commit(&lane, &own, 1, &state)).await;
        assert!(committed.is_ok(), "{kind:?}: {committed:?}");
        let claim = database.claim(&lane).await.expect("a claim");
        assert!(claim.checkpoint == state, "{kind:?}");
        let saved = database.save(commit(&lane, &claim, 2, &state)).await;
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

/// A role without any right but to connect.
async fn stranger(place: &Place) -> (String, Database) {
    let role = format!("{}_role", place.name);
    admin(&format!("CREATE ROLE {role} LOGIN PASSWORD 'geheim'")).await;
    // Up to PostgreSQL 14, everybody may.
    place
        .run("REVOKE CREATE ON SCHEMA public FROM public")
        .await;
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
    place.run(statements).await;
    database.prepare_progress().await.expect("a table");
    let own = database.claim(&lane()).await.expect("a claim");
    let saved = database
        .save(commit(&lane(), &own, 1, &checkpoint(1)))
        .await;
    assert!(saved.is_ok(), "{saved:?}");

    place
        .run(&format!("REVOKE UPDATE ON stagehost_progress FROM {role}"))
        .await;
    let why = refused().await;
    let grant = format!("GRANT SELECT, INSERT, UPDATE ON public.stagehost_progress TO {role}");
    assert!(why.contains(&grant), "{why}");
    let claim = database.claim(&lane()).await;
    // Once it runs, somebody has taken a right away, and may give it back.
    assert!(
        matches!(claim, Err(StoreError::Unavailable(_))),
        "{claim:?}"
    );

    // The other way.
    place
        .run(&format!(
            "DROP TABLE stagehost_progress; GRANT CREATE ON SCHEMA public TO {role}"
        ))
        .await;
    database.prepare_progress().await.expect("a new table");
    assert_eq!(database.claim(&lane()).await.expect("a claim").epoch, 1);
    database.close().await;
    place.remove().await;
    admin(&format!("DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_table_that_is_something_else_is_refused() {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        let database = place.open(None).await.expect("a new database");
        place
            .run("CREATE TABLE stagehost_progress (epoch BIGINT)")
            .await;
        let prepared = database.prepare_progress().await;
        match prepared {
            Err(StoreError::Refused(why)) => {
                assert!(why.contains("consumer_group"), "{kind:?}: {why}");
            }
            other => panic!("{kind:?}: {other:?}"),
        }
        // Nothing was done to it.
        place
            .run("INSERT INTO stagehost_progress (epoch) VALUES (1)")
            .await;
        database.close().await;
        place.remove().await;
    }
}

/// What whoever runs the database may do, and no stage by itself.
const TOUCH: &str = "CREATE FUNCTION touch() RETURNS void LANGUAGE sql \
                     AS 'UPDATE public.stagehost_progress SET attempts = attempts'";

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
    let own = hanging.claim(&lane).await.expect("a claim");
    let transaction = hanging
        .begin(Mode::Optimistic)
        .await
        .expect("a transaction");
    place.run(TOUCH).await;
    let locked = transaction.query("SELECT touch()", &[]).await;
    assert!(locked.is_ok(), "{locked:?}");
    // Meanwhile it says who is in the way, as a lane has it that tries again.
    let claim = loop {
        match next.claim(&lane).await {
            Ok(claim) => break claim,
            Err(StoreError::Unavailable(why)) => assert!(why.contains("locked"), "{why}"),
            Err(other) => panic!("{other:?}"),
        }
    };
    assert_eq!(claim.epoch, own.epoch + 1);
    let state = checkpoint(1);
    let late = transaction.commit(commit(&lane, &own, 1, &state)).await;
    assert!(matches!(late, Err(CommitError::TooLong(_))), "{late:?}");
    let lost = hanging.reclaim(&lane, own.epoch).await.expect("an answer");
    assert_eq!(lost, None);
    hanging.close().await;
    next.close().await;
    place.remove().await;
}

#[tokio::test]
async fn a_claim_waits_for_what_is_being_committed() {
    for kind in [Kind::Sqlite, Kind::Postgres] {
        let place = Place::new(kind).await;
        let database = place.open(None).await.expect("a new database");
        database.prepare_progress().await.expect("a new table");
        // On SQLite any write keeps others from theirs; on PostgreSQL one of the row does.
        let touch = match kind {
            Kind::Postgres => {
                place.run(TOUCH).await;
                "SELECT touch()"
            }
            Kind::Sqlite => "CREATE TABLE touched (id INTEGER)",
        };
        let lane = lane();
        let own = database.claim(&lane).await.expect("a claim");
        let transaction = database.begin(Mode::Optimistic).await;
        let transaction = transaction.expect("a transaction");
        let touched = transaction.execute(touch, &[]).await;
        assert!(touched.is_ok(), "{kind:?}: {touched:?}");
        let claim = database.claim(&lane);
        tokio::pin!(claim);
        let early = tokio::time::timeout(Duration::from_millis(300), &mut claim).await;
        assert!(early.is_err(), "{kind:?}: {early:?}");
        let state = checkpoint(20);
        let committed = transaction.commit(commit(&lane, &own, 1, &state)).await;
        assert!(committed.is_ok(), "{kind:?}: {committed:?}");
        let claim = claim.await.expect("a claim");
        assert_eq!((claim.epoch, claim.commits), (own.epoch + 1, 1), "{kind:?}");
        assert_eq!(claim.checkpoint, state, "{kind:?}");
        database.close().await;
        place.remove().await;
    }
}

/// Whatever a function of the database's own does to the search path, the row is where it is.
#[tokio::test]
async fn a_search_path_hides_no_row() {
    const WANDER: &str = "CREATE FUNCTION wander() RETURNS text LANGUAGE sql \
                          AS $$SELECT set_config('search_path', 'elsewhere', true)$$; \
                          CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.stagehost_progress (epoch int)";
    let place = Place::new(Kind::Postgres).await;
    let database = place.open(None).await.expect("a new database");
    database.prepare_progress().await.expect("a new table");
    place.run(WANDER).await;
    let lane = lane();
    let own = database.claim(&lane).await.expect("a claim");
    let transaction = database.begin(Mode::Optimistic).await;
    let transaction = transaction.expect("a transaction");
    let wandered = transaction.query("SELECT wander()", &[]).await;
    assert!(wandered.is_ok(), "{wandered:?}");
    let state = checkpoint(1);
    let committed = transaction.commit(commit(&lane, &own, 1, &state)).await;
    assert!(committed.is_ok(), "{committed:?}");
    assert_eq!(database.claim(&lane).await.expect("a claim").commits, 1);
    database.close().await;
    place.remove().await;
}
